//! Runs a test ROM and reads its report.

use super::engine::Engine;
use super::guest;
use super::{AccelArgs, EngineChoice, MmuArgs, TraceArgs, report};
use crate::error::CliError;
use std::io::{Write, stdout};
use umbra_accel::Backend;
use umbra_accel::kvm::Irqchip;
use umbra_arch::VirtualTime;
use umbra_machine::{End, Host, Stop};
use umbra_test_roms::Rom;

/// Virtual time after which a ROM hangs: all of them together take less.
const LIMIT: VirtualTime = VirtualTime(120_000_000_000);
/// Guest RAM.
const MEMORY: u64 = 16 << 20;

/// What a ROM runs on.
pub struct Options<'a> {
    /// CPU model.
    pub cpu: &'a str,
    /// As [`Args::engine`](super::Args::engine).
    pub engine: Option<EngineChoice>,
    pub mmu: MmuArgs,
    pub accel: &'a AccelArgs,
    pub tracing: &'a TraceArgs,
}

/// How a ROM ended.
pub struct Outcome {
    pub passed: bool,
    /// The serial output, without carriage returns.
    pub report: String,
    /// In words.
    pub end: String,
    pub retired: u64,
    /// The accelerator's backend and where its local APIC was, if one took part.
    pub backend: Option<(Backend, Irqchip)>,
    /// Changes of engines, in words.
    pub switches: Vec<String>,
}

/// One line of a report.
pub struct Section<'a> {
    pub name: &'a str,
    pub checks: u64,
    pub passed: bool,
    pub failed: u64,
}

/// Collects what the ROM says.
struct Listener {
    heard: Vec<u8>,
    /// Pass it on to stdout as it comes.
    echo: bool,
    /// Text at which another engine is to take over.
    awaited: Option<Vec<u8>>,
}

impl Host for Listener {
    fn serial(&mut self, bytes: &[u8]) {
        let from = self.heard.len();
        self.heard.extend(bytes.iter().filter(|&&byte| byte != b'\r'));
        if self.echo {
            // Nobody is left to tell when stdout is gone.
            let _ = stdout().write_all(&self.heard[from..]).and_then(|()| stdout().flush());
        }
    }
    fn stop(&mut self) -> Option<Stop> {
        let heard = &self.heard;
        let is_there = |text: &mut Vec<u8>| heard.windows(text.len()).any(|window| window == text.as_slice());
        self.awaited.take_if(is_there).map(|_| Stop::HandOver)
    }
}

/// Runs `rom`; with `echo` its report also goes to stdout as it comes.
///
/// # Errors
/// [`CliError`] when it can't be run at all.
pub fn run(rom: &Rom, options: &Options<'_>, echo: bool) -> Result<Outcome, CliError> {
    let mut machine = guest::rom_machine(rom, MEMORY, options)?;
    let awaited = options.accel.serial_text().map(|text| text.as_bytes().to_vec());
    let mut listener = Listener { heard: Vec::new(), echo, awaited };
    let end = loop {
        match machine.run(&mut listener, Some(LIMIT)) {
            End::Mark(_) => {}
            End::Stopped(Stop::HandOver) => machine.vcpus_mut().for_each(Engine::hand_over),
            end => break end,
        }
    };
    let report = String::from_utf8_lossy(&listener.heard).into_owned();
    let passed = end == End::PowerOff && report.lines().any(|line| line.starts_with(rom.expect));
    let engine = machine.vcpu(0);
    Ok(Outcome {
        passed,
        report,
        end: report::sentence(&end),
        retired: machine.retired(),
        backend: engine.and_then(Engine::backend),
        switches: engine.map_or_else(Vec::new, Engine::switches),
    })
}

impl Outcome {
    /// The report's sections: lines like `title   12 checked  PASS`.
    pub fn sections(&self) -> impl Iterator<Item = Section<'_>> {
        self.report.lines().filter_map(section)
    }
}

fn section(line: &str) -> Option<Section<'_>> {
    let (before, verdict) = line.split_once(" checked  ")?;
    let (name, checks) = before.rsplit_once(' ')?;
    let failed = match verdict.split_once(' ') {
        None => 0,
        Some((_, number)) => number.parse().ok()?,
    };
    Some(Section { name: name.trim_end(), checks: checks.parse().ok()?, passed: verdict == "PASS", failed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_are_read() {
        let good = section("real mode, strings          17 checked  PASS").unwrap();
        assert_eq!((good.name, good.checks, good.passed, good.failed), ("real mode, strings", 17, true, 0));
        let bad = section("long mode   3 checked  FAIL 2").unwrap();
        assert_eq!((bad.name, bad.checks, bad.passed, bad.failed), ("long mode", 3, false, 2));
        assert!(section("Result: PASS, all of 3 sections").is_none());
    }
}
