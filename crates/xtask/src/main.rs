//! Repository chores: `cargo xtask deps | lengths | unsafe | check | bless | kut DIR | mutants`.
#![forbid(unsafe_code)]

mod bless;
mod deps;
mod kut;
mod lengths;
mod mutants;
mod sources;
mod unsafe_code;

use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = concat!(
    "usage: cargo xtask COMMAND\n",
    "  deps     fail on a dependency between crates that ARCHITECTURE.md does not allow, or on a pre-release version\n",
    "  lengths  warn of source files over 500 lines, fail over 800 (tables, *.table.rs, are exempt)\n",
    "  unsafe   fail on unsafe code outside the crates that may have it\n",
    "  check    all of these\n",
    "  bless    take the translator's host code for right as it is now: crates/jit/tests/golden\n",
    "  kut DIR  run a built directory of kvm-unit-tests with the release binary; verdicts as JSON\n",
    "  mutants  break the MMU's rules one at a time (or only NAME...) and say by which tests each is caught",
);

/// Why a chore could not be done, as opposed to what it found.
#[derive(Debug, thiserror::Error)]
enum XtaskError {
    #[error("cannot read {0}: {1}")]
    Read(PathBuf, std::io::Error),
    #[error("cannot write {0}: {1}")]
    Write(PathBuf, std::io::Error),
    #[error("cannot run {0}: {1} (cargo build --release makes it)")]
    Run(PathBuf, std::io::Error),
    #[error("cannot run {0}: {1}")]
    Start(&'static str, std::io::Error),
    #[error("{0} does not build: cargo test -p umbra-mmu says\n{1}")]
    Build(String, String),
    #[error("the code has no mutant {0:?}; it has: {1}")]
    UnknownMutant(String, String),
    #[error("cannot run cargo metadata: {0}")]
    Metadata(std::io::Error),
    #[error("cargo metadata failed: {0}")]
    MetadataFailed(String),
    #[error("cargo metadata printed something unexpected: {0}")]
    MetadataFormat(#[from] serde_json::Error),
    #[error("{0}")]
    Usage(&'static str),
}

/// What a check found.
#[derive(Debug, Default, PartialEq)]
struct Findings {
    /// Worth a look.
    warnings: Vec<String>,
    /// Must be fixed.
    errors: Vec<String>,
    /// What was looked at, for the summary.
    examined: String,
}

type Check = fn() -> Result<Findings, XtaskError>;

const CHECKS: [(&str, Check); 3] = [("deps", deps::check), ("lengths", lengths::check), ("unsafe", unsafe_code::check)];

fn main() -> ExitCode {
    match run(std::env::args().nth(1).as_deref()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(command: Option<&str>) -> Result<bool, XtaskError> {
    if command == Some("kut") {
        return kut::run(std::env::args().skip(2));
    }
    if command == Some("bless") {
        return bless::run();
    }
    if command == Some("mutants") {
        return mutants::run(std::env::args().skip(2));
    }
    let chosen: Vec<_> =
        CHECKS.into_iter().filter(|(name, _)| command == Some("check") || command == Some(name)).collect();
    if chosen.is_empty() {
        return Err(XtaskError::Usage(USAGE));
    }
    let mut clean = true;
    for (name, check) in chosen {
        let findings = check()?;
        findings.warnings.iter().for_each(|w| eprintln!("{name}: warning: {w}"));
        findings.errors.iter().for_each(|e| eprintln!("{name}: error: {e}"));
        println!(
            "{name}: {}, {} errors, {} warnings",
            findings.examined,
            findings.errors.len(),
            findings.warnings.len()
        );
        clean &= findings.errors.is_empty();
    }
    Ok(clean)
}
