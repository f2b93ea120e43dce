//! Runs a prebuilt directory of kvm-unit-tests: every x86 section of its `x86/unittests.cfg`.
//!
//! A verdict follows from the exit code that the test writes to the debug-exit port: 0 is a pass (only if
//! no sub-test failed), 1 a failure, 38 "all skipped"; anything else is a crash. Skipped is not passed.

mod config;
mod sha256;

use crate::XtaskError;
use config::Section;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Where the JSON goes.
const REPORT: &str = "kut.json";
const DEFAULT_TIMEOUT: u64 = 90;

/// Tests that can't pass on a PC without a hypervisor, by file, with the reason.
const KNOWN: [(&str, &str); 2] = [
    (
        "apic.flat",
        "test_pv_ipi executes VMCALL, KVM's hypercall, which is #UD here; the rest runs with TEST_DEVICE=0 in --environ",
    ),
    ("s3.flat", "it enters ACPI S3 without asking the DSDT, which offers only S5"),
];

/// What became of a test.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    Pass,
    Fail,
    Skip,
    Timeout,
    Crash,
}

impl Verdict {
    const fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "fail",
            Self::Skip => "skip",
            Self::Timeout => "timeout",
            Self::Crash => "crash",
        }
    }
}

/// One test as it ran.
struct Outcome {
    name: String,
    file: String,
    sha256: String,
    arguments: Vec<String>,
    verdict: Verdict,
    exit_code: Option<i32>,
    seconds: f64,
    passed: usize,
    skipped: usize,
    failing: Vec<String>,
    last_line: String,
}

impl Outcome {
    /// Why it is known not to pass, if it did not.
    fn reason(&self) -> Option<&'static str> {
        let failed = matches!(self.verdict, Verdict::Fail | Verdict::Crash);
        KNOWN.iter().find(|(file, _)| failed && *file == self.file).map(|&(_, reason)| reason)
    }
}

/// What the command line asks for.
struct Options {
    directory: PathBuf,
    binary: PathBuf,
    report: PathBuf,
    /// Added to every timeout factor: loaded hosts need more.
    slower: u64,
    only: Vec<String>,
    /// A file of NAME=VALUE lines, which the tests read as their environment.
    environ: Option<PathBuf>,
}

/// `cargo xtask kut DIR [--umbra FILE] [--out FILE] [--slower N] [--environ FILE] [NAME...]`.
///
/// # Errors
/// When the directory can't be read, the binary can't be run or the report can't be written.
pub fn run(arguments: impl Iterator<Item = String>) -> Result<bool, XtaskError> {
    let options = options(arguments)?;
    let sections = config::read(&options.directory.join("x86/unittests.cfg"))?;
    let umbra = Umbra::new(&options.binary)?;
    let mut outcomes = Vec::new();
    for section in sections {
        let chosen = options.only.is_empty() || options.only.contains(&section.name);
        let file = options.directory.join("x86").join(&section.file);
        if !chosen || !section.is_for_pc() || !file.is_file() {
            continue;
        }
        let outcome = umbra.test(&section, &file, &options)?;
        print_line(&outcome);
        outcomes.push(outcome);
    }
    std::fs::write(&options.report, report(&outcomes))
        .map_err(|error| XtaskError::Write(options.report.clone(), error))?;
    let count = |verdict| outcomes.iter().filter(|o| o.verdict == verdict).count();
    println!(
        "{} tests: {} pass, {} fail, {} skip, {} timeout, {} crash; {}",
        outcomes.len(),
        count(Verdict::Pass),
        count(Verdict::Fail),
        count(Verdict::Skip),
        count(Verdict::Timeout),
        count(Verdict::Crash),
        options.report.display()
    );
    Ok(outcomes.iter().all(|o| matches!(o.verdict, Verdict::Pass | Verdict::Skip)))
}

fn options(mut arguments: impl Iterator<Item = String>) -> Result<Options, XtaskError> {
    const USAGE: &str =
        "usage: cargo xtask kut DIR [--umbra FILE] [--out FILE] [--slower N] [--environ FILE] [NAME...]";
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or("target".into(), PathBuf::from);
    let mut options = Options {
        directory: arguments.next().ok_or(XtaskError::Usage(USAGE))?.into(),
        binary: target.join("release/umbra"),
        report: REPORT.into(),
        slower: 1,
        only: Vec::new(),
        environ: None,
    };
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(XtaskError::Usage(USAGE));
        match argument.as_str() {
            "--umbra" => options.binary = value()?.into(),
            "--environ" => options.environ = Some(value()?.into()),
            "--out" => options.report = value()?.into(),
            "--slower" => options.slower = value()?.parse().map_err(|_| XtaskError::Usage(USAGE))?,
            flag if flag.starts_with('-') => return Err(XtaskError::Usage(USAGE)),
            name => options.only.push(name.to_owned()),
        }
    }
    Ok(options)
}

/// The binary under test.
struct Umbra {
    binary: PathBuf,
    /// Whether it knows `--smp`.
    smp: bool,
}

impl Umbra {
    fn new(binary: &Path) -> Result<Self, XtaskError> {
        let help = Command::new(binary)
            .args(["run", "--help"])
            .output()
            .map_err(|error| XtaskError::Run(binary.to_owned(), error))?;
        let smp = String::from_utf8_lossy(&help.stdout).contains("--smp");
        Ok(Self { binary: binary.to_owned(), smp })
    }

    fn test(&self, section: &Section, file: &Path, options: &Options) -> Result<Outcome, XtaskError> {
        let image = std::fs::read(file).map_err(|error| XtaskError::Read(file.to_owned(), error))?;
        let mut arguments = section.arguments(self.smp);
        let seconds = section.timeout.unwrap_or(DEFAULT_TIMEOUT).saturating_mul(options.slower);
        arguments.extend(["--timeout".to_owned(), seconds.to_string()]);
        if let Some(environ) = &options.environ {
            arguments.extend(["--initrd".to_owned(), environ.display().to_string()]);
        }
        let swapped = section.needs_swapping().then(SparseFile::new).transpose()?;
        if let Some(file) = &swapped {
            // As the test's own comment has it: more than 1 GiB of RAM on a host that lends 512 MiB.
            let path = file.0.display().to_string();
            arguments.extend(["--memory-file".to_owned(), path, "--memory-resident".to_owned(), "512M".to_owned()]);
        }
        let start = Instant::now();
        let output = Command::new(&self.binary)
            .args(["run", "--kernel"])
            .arg(file)
            .args(&arguments)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| XtaskError::Run(self.binary.clone(), error))?;
        let text = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        let lines =
            |prefix: &str| text.lines().filter(|l| l.starts_with(prefix)).map(str::to_owned).collect::<Vec<_>>();
        let failing = lines("FAIL");
        let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        Ok(Outcome {
            name: section.name.clone(),
            file: section.file.clone(),
            sha256: sha256::hex(&image),
            arguments,
            verdict: verdict(output.status.code(), !failing.is_empty()),
            exit_code: output.status.code(),
            seconds: start.elapsed().as_secs_f64(),
            passed: lines("PASS").len(),
            skipped: lines("SKIP").len(),
            failing,
            last_line: last.to_owned(),
        })
    }
}

/// An empty file of 2 GiB, there as long as this value.
struct SparseFile(PathBuf);

impl SparseFile {
    fn new() -> Result<Self, XtaskError> {
        let path = std::env::temp_dir().join(format!("umbra-kut-{}.ram", std::process::id()));
        let made = std::fs::File::create(&path).and_then(|file| file.set_len(2 << 30));
        made.map_err(|error| XtaskError::Write(path.clone(), error))?;
        Ok(Self(path))
    }
}

impl Drop for SparseFile {
    fn drop(&mut self) {
        // A file left behind takes no room.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Exit codes are the debug-exit device's: (value << 1) | 1.
const fn verdict(code: Option<i32>, failures: bool) -> Verdict {
    match code {
        Some(1) if !failures => Verdict::Pass,
        Some(1 | 3) => Verdict::Fail,
        Some(77) => Verdict::Skip,
        Some(124) => Verdict::Timeout,
        _ => Verdict::Crash,
    }
}

fn print_line(o: &Outcome) {
    let counts = format!("{} passed, {} failed, {} skipped", o.passed, o.failing.len(), o.skipped);
    println!("{:<28} {:<8} {counts:<40} {:>7.1} s", o.name, o.verdict.name(), o.seconds);
    o.failing.iter().for_each(|line| println!("    {line}"));
    if o.verdict == Verdict::Crash {
        println!("    {}", o.last_line.trim());
    }
    if let Some(reason) = o.reason() {
        println!("    known: {reason}");
    }
}

fn report(outcomes: &[Outcome]) -> String {
    let rows: Vec<_> = outcomes
        .iter()
        .map(|o| {
            serde_json::json!({
                "name": o.name, "file": o.file, "sha256": o.sha256, "arguments": o.arguments,
                "verdict": o.verdict.name(), "exit_code": o.exit_code, "seconds": o.seconds,
                "passed": o.passed, "skipped": o.skipped, "failing": o.failing, "last_line": o.last_line, "known_reason": o.reason(),
            })
        })
        .collect();
    format!("{:#}\n", serde_json::json!({ "tests": rows }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exit_code_0_without_failing_lines_passes() {
        assert_eq!(verdict(Some(1), false), Verdict::Pass);
        assert_eq!(verdict(Some(1), true), Verdict::Fail);
        assert_eq!(verdict(Some(3), true), Verdict::Fail);
        assert_eq!(verdict(Some(77), false), Verdict::Skip);
        assert_eq!(verdict(Some(124), false), Verdict::Timeout);
        for code in [None, Some(0), Some(122), Some(126), Some(127)] {
            assert_eq!(verdict(code, false), Verdict::Crash);
        }
    }
}
