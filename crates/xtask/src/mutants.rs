//! Mutation check: one rule of the MMU broken at a time, behind `cfg!(umbra_mutant = "NAME")`; the MMU's tests have to
//! notice each.
//!
//! A compiler wrapper for workspace members adds the cfg, so that everything else is built once for all mutants.

use crate::{XtaskError, sources};
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How a mutant appears in the code.
const MARK: &str = "cfg!(umbra_mutant = \"";
/// Longest run of the tests; a mutant that makes them endless is caught, too.
const PATIENCE: Duration = Duration::from_secs(240);
/// Fewer random sequences, and a failure's shortest form isn't looked for.
const QUICK: [(&str, &str); 3] =
    [("PROPTEST_CASES", "40"), ("PROPTEST_MAX_SHRINK_ITERS", "0"), ("RUST_BACKTRACE", "0")];
/// Name of the run with nothing broken.
const CONTROL: &str = "control";

/// `cargo xtask mutants [NAME...]`: all of them, or these; a run without any goes first and has to pass.
///
/// # Errors
/// When a name is unknown, cargo can't be run or a mutant doesn't build.
pub fn run(names: impl Iterator<Item = String>) -> Result<bool, XtaskError> {
    let known = known()?;
    let mut chosen: Vec<String> = names.collect();
    if let Some(unknown) = chosen.iter().find(|name| !known.contains(name)) {
        return Err(XtaskError::UnknownMutant(unknown.clone(), known.join(", ")));
    }
    if chosen.is_empty() {
        chosen = known;
    }
    let bench = Bench::new()?;
    let failing = bench.test(CONTROL)?;
    println!("{CONTROL}: {} failing tests", failing.len());
    if !failing.is_empty() {
        println!("nothing is broken, yet these fail: {}", failing.join(", "));
        return Ok(false);
    }
    let mut survivors = 0;
    for name in &chosen {
        let start = Instant::now();
        let failing = bench.test(name)?;
        survivors += usize::from(failing.is_empty());
        println!("{name}: {} ({} s)", verdict(&failing), start.elapsed().as_secs());
    }
    println!("{} mutants, {survivors} survived", chosen.len());
    Ok(survivors == 0)
}

fn verdict(failing: &[String]) -> String {
    match failing.len() {
        0 => "SURVIVED".to_owned(),
        n if n > 4 => format!("caught by {n} tests: {}, ...", failing[..4].join(", ")),
        _ => format!("caught by {}", failing.join(", ")),
    }
}

/// All names in the sources, in order.
fn known() -> Result<Vec<String>, XtaskError> {
    let sources = sources::all()?;
    // Instructions' mutants are for `fuzz/planted.sh`: the MMU's tests can't notice them.
    let others = ["crates/xtask/", "crates/cpu/"];
    let is_ours = |path: &str| path.starts_with("crates/") && !others.iter().any(|other| path.starts_with(other));
    let code = sources.iter().filter(|s| is_ours(&s.path));
    let mut names: Vec<String> = code.flat_map(|source| named(&source.text)).collect();
    names.sort();
    names.dedup();
    Ok(names)
}

fn named(text: &str) -> Vec<String> {
    text.split(MARK).skip(1).filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())).collect()
}

/// Where mutants are built.
struct Bench {
    target: PathBuf,
}

impl Bench {
    fn new() -> Result<Self, XtaskError> {
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| sources::root().join("target"), PathBuf::from);
        let target = target.join("mutants");
        std::fs::create_dir_all(&target).map_err(|e| XtaskError::Write(target.clone(), e))?;
        Ok(Self { target: target.canonicalize().map_err(|e| XtaskError::Read(target, e))? })
    }

    /// The tests that fail with `name` broken.
    fn test(&self, name: &str) -> Result<Vec<String>, XtaskError> {
        let binary = self.build(name)?;
        let log = self.target.join(format!("{name}.log"));
        let out = File::create(&log).map_err(|e| XtaskError::Write(log.clone(), e))?;
        let passed = finish(Command::new(&binary).stdout(out).stderr(Stdio::null()).envs(QUICK))?;
        let text = std::fs::read_to_string(&log).map_err(|e| XtaskError::Read(log, e))?;
        let mut failing = failing(&text);
        if failing.is_empty() && !passed {
            failing.push("the whole run, which ended without a report".to_owned());
        }
        Ok(failing)
    }

    /// Builds the MMU's tests with `name` broken.
    fn build(&self, name: &str) -> Result<PathBuf, XtaskError> {
        let built = Command::new("cargo")
            .current_dir(sources::root())
            .args(["test", "--package", "umbra-mmu", "--test", "mmu", "--no-run", "--message-format=json"])
            .env("CARGO_TARGET_DIR", &self.target)
            .env("RUSTC_WORKSPACE_WRAPPER", self.wrapper(name)?)
            .env("CARGO_INCREMENTAL", "0")
            .env("CARGO_PROFILE_TEST_OPT_LEVEL", "1")
            .env("CARGO_PROFILE_TEST_DEBUG", "none")
            .env("CARGO_PROFILE_DEV_DEBUG", "none")
            .output()
            .map_err(|e| XtaskError::Start("cargo", e))?;
        let messages = String::from_utf8_lossy(&built.stdout);
        let binary = messages
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .find_map(|message| message["executable"].as_str().map(PathBuf::from));
        let wrong = || XtaskError::Build(name.to_owned(), String::from_utf8_lossy(&built.stderr).into_owned());
        binary.filter(|_| built.status.success()).ok_or_else(wrong)
    }

    /// A script of its own for each mutant: cargo tells builds apart by the wrapper's path.
    fn wrapper(&self, name: &str) -> Result<PathBuf, XtaskError> {
        let path = self.target.join(format!("{name}.sh"));
        let cfg = if name == CONTROL { String::new() } else { format!(" --cfg 'umbra_mutant=\"{name}\"'") };
        let wrong = |e| XtaskError::Write(path.clone(), e);
        std::fs::write(&path, format!("#!/bin/sh\nexec \"$@\"{cfg}\n")).map_err(wrong)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).map_err(wrong)?;
        Ok(path)
    }
}

/// Runs to the end, or for as long as patience lasts. True if it ended well.
fn finish(command: &mut Command) -> Result<bool, XtaskError> {
    let wrong = |e| XtaskError::Start("the tests", e);
    let mut child = command.spawn().map_err(wrong)?;
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        if let Some(status) = child.try_wait().map_err(wrong)? {
            return Ok(status.success());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill().map_err(wrong)?;
    child.wait().map_err(wrong)?;
    Ok(false)
}

/// Names of failed tests in the output of the test harness.
fn failing(output: &str) -> Vec<String> {
    let mut names: Vec<String> = output
        .lines()
        .filter_map(|line| line.strip_prefix("---- ")?.strip_suffix(" stdout ----"))
        .map(str::to_owned)
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_in_code() {
        let text = format!("if {MARK}one\") || {MARK}two\") {{}}");
        assert_eq!(named(&text), ["one", "two"]);
        assert!(known().expect("readable sources").len() >= 10);
    }

    #[test]
    fn failed_tests_are_read_from_the_report() {
        let output =
            "running 2 tests\n.F\nfailures:\n\n---- b::two stdout ----\nthread panicked\n---- a::one stdout ----\n";
        assert_eq!(failing(output), ["a::one", "b::two"]);
        assert_eq!(verdict(&[]), "SURVIVED");
    }
}
