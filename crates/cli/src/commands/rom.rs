//! `umbra rom`: the test ROMs.

use crate::exit_code;
use crate::run::rom::{Options, Outcome, run};
use crate::run::{AccelArgs, EngineChoice, MmuArgs, TraceArgs, report};
use clap::{Args as ClapArgs, Subcommand};
use serde_json::json;
use std::path::{Path, PathBuf};
use umbra_test_roms::{ROMS, Rom};

/// Test ROMs: guests that check themselves. Each boots through Umbra's reset stub; its report's last line
/// decides.
#[derive(ClapArgs, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// List all ROMs
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Write a ROM's image and the reset stub to files, for another emulator: load the image at 0x10000,
    /// the stub is the BIOS
    Write {
        /// A name from `umbra rom list`
        #[arg(value_name = "NAME")]
        name: String,
        /// Where to write NAME.bin and reset.bin
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Run one ROM, or all; exit code 0 if every one passes, 1 if any fails
    Run {
        /// A name from `umbra rom list`, or all
        #[arg(value_name = "NAME")]
        name: String,
        /// CPU model, as in `umbra run`
        #[arg(long, value_name = "MODEL", default_value = umbra_arch::cpuid::PROFILE_NAMES[0])]
        cpu: String,
        /// What executes it [default: as in `umbra run`]
        #[arg(long, value_enum, value_name = "ENGINE")]
        engine: Option<EngineChoice>,
        #[command(flatten)]
        mmu: MmuArgs,
        #[command(flatten)]
        accel: Box<AccelArgs>,
        #[command(flatten)]
        tracing: Box<TraceArgs>,
        /// Print one JSON object for each ROM and line
        #[arg(long)]
        json: bool,
    },
}

/// Lists or runs; gives the exit code.
pub fn execute(args: &Args) -> u8 {
    match &args.command {
        Command::List { json } => {
            list(*json);
            exit_code::CLEAN
        }
        Command::Write { name, directory } => match write(name, directory) {
            Ok(()) => exit_code::CLEAN,
            Err(why) => {
                eprintln!("umbra: {why}");
                exit_code::HOST
            }
        },
        Command::Run { name, cpu, engine, mmu, accel, tracing, json } => {
            run_named(name, &Options { cpu, engine: *engine, mmu: *mmu, accel, tracing }, *json)
        }
    }
}

fn list(json: bool) {
    if json {
        let roms: Vec<_> = ROMS.iter().map(|rom| json!({ "name": rom.name, "about": rom.about })).collect();
        println!("{}", json!(roms));
        return;
    }
    for rom in ROMS {
        println!("{:<14}{}", rom.name, rom.about);
    }
}

fn write(name: &str, directory: &Path) -> Result<(), String> {
    let rom = umbra_test_roms::rom(name).ok_or_else(|| unknown(name))?;
    let image = rom.image().map_err(|error| error.to_string())?;
    let reset = umbra_firmware::reset_image().map_err(|error| error.to_string())?;
    for (file, bytes) in [(format!("{name}.bin"), image), ("reset.bin".to_owned(), reset)] {
        let path = directory.join(file);
        std::fs::write(&path, bytes).map_err(|error| format!("{}: {error}: check the path", path.display()))?;
    }
    Ok(())
}

fn unknown(name: &str) -> String {
    format!("no ROM is called {name:?}: see umbra rom list")
}

fn run_named(name: &str, options: &Options<'_>, json: bool) -> u8 {
    let chosen: Vec<&Rom> = ROMS.iter().filter(|rom| name == "all" || rom.name == name).collect();
    if chosen.is_empty() {
        eprintln!("umbra: {}", unknown(name));
        return exit_code::HOST;
    }
    let mut failed = false;
    for rom in chosen {
        match run(rom, options, !json) {
            Ok(outcome) => {
                failed |= !outcome.passed;
                print(rom, &outcome, json);
            }
            Err(error) => {
                report::print_error(&error, json);
                return exit_code::HOST;
            }
        }
    }
    failed.into()
}

fn print(rom: &Rom, outcome: &Outcome, json: bool) {
    if !json {
        let verdict = if outcome.passed { "PASS" } else { "FAIL" };
        let backend = outcome.backend;
        let backend = backend
            .map_or_else(String::new, |(backend, irqchip)| format!("; executed by {backend}, irqchip: {irqchip}"));
        outcome.switches.iter().for_each(|switch| println!("handed over {switch}"));
        println!("{}: {verdict} ({}, {} instructions{backend})\n", rom.name, outcome.end, outcome.retired);
        return;
    }
    let sections: Vec<_> = outcome
        .sections()
        .map(|s| json!({ "name": s.name, "checks": s.checks, "passed": s.passed, "failed_checks": s.failed }))
        .collect();
    let object = json!({
        "rom": rom.name,
        "passed": outcome.passed,
        "end": outcome.end,
        "retired": outcome.retired,
        "sections": sections,
        "backend": outcome.backend.map(|(backend, _)| backend.label()),
        "irqchip": outcome.backend.map(|(_, irqchip)| irqchip.to_string()),
        "hand_overs": outcome.switches,
    });
    println!("{object}");
}
