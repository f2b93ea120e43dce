//! The embedded guest: the same report under every MMU mode, and counters that show what a kept root saves.

use serde_json::Value;
use std::process::{Command, Stdio};

/// What a kept root saves, for each toggle.
const WORK: [&str; 4] = ["pages_allocated", "refills", "walks", "entries_dropped"];

/// Serial output and report of a run.
fn run(args: &[&str]) -> (String, Value) {
    let output = Command::new(env!("CARGO_BIN_EXE_umbra"))
        .args(["run", "--json", "--timeout", "300"])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {message}");
    (String::from_utf8(output.stdout).unwrap(), serde_json::from_str(&message).unwrap())
}

/// One counter of the CR0.WP phase.
fn wp(report: &Value, counter: &str) -> u64 {
    let phases = report["phases"].as_array().unwrap();
    let phase = phases.iter().find(|phase| phase["name"] == "CR0.WP toggles").unwrap();
    assert_eq!(phase["count"], 1_000_000);
    phase["counters"][counter].as_u64().unwrap_or(0)
}

#[test]
fn a_million_wp_toggles_cost_nothing_that_is_counted() {
    let (serial, report) = run(&[]);
    assert!(serial.lines().any(|line| line.starts_with("Result: PASS")), "{serial}");
    assert_eq!(report["end"], "power-off");
    assert_eq!(wp(&report, "role_changes"), 1_000_000);
    for counter in WORK {
        assert_eq!(wp(&report, counter), 0, "{counter}");
    }
}

#[test]
fn unloading_always_says_the_same_and_works_more() {
    let (kept, _) = run(&[]);
    let (unloaded, report) = run(&["--mmu", "unload-always"]);
    assert_eq!(kept, unloaded);
    assert!(wp(&report, "walks") >= 1_000_000 && wp(&report, "refills") >= 1_000_000);
}

#[test]
fn caches_dropped_at_random_change_nothing_that_a_guest_sees() {
    let (kept, report) = run(&[]);
    for seed in ["1", "2"] {
        let (dropped, random) = run(&["--mmu", "drop-at-random", "--seed", seed]);
        assert_eq!(kept, dropped, "seed {seed}");
        for same in ["guest_ns", "retired"] {
            assert_eq!(report[same], random[same], "seed {seed}: {same}");
        }
    }
}

#[test]
fn lockstep_finds_no_difference_and_makes_none() {
    let (serial, report) = run(&["--engine", "interp"]);
    for blocks in ["1", "37"] {
        let (stepped, lockstep) = run(&["--lockstep", blocks]);
        assert_eq!(serial, stepped, "{blocks}");
        // The time at the end is that of the last turn's start.
        for same in ["retired", "written_bytes"] {
            assert_eq!(report[same], lockstep[same], "{blocks}: {same}");
        }
        let instructions = lockstep["retired"].as_u64().unwrap();
        let compared = lockstep["compared"].as_u64().unwrap();
        assert!((instructions / 500..instructions).contains(&compared), "{compared}");
        let count = |name: &str| lockstep["jit"][name].as_u64().unwrap();
        assert!(count("ops_translated") > 10 * count("ops_interpreted"), "{lockstep}");
    }
}

#[test]
fn the_translator_and_what_it_can_do_without_change_nothing() {
    let (serial, report) = run(&["--engine", "interp"]);
    assert!(report.get("jit").is_none());
    for off in ["", "native", "vectors,x87,flags", "memory", "links", "jumps"] {
        let options: &[&str] = if off.is_empty() { &[] } else { &["--jit-off", off] };
        let (translated, jit) = run(options);
        assert_eq!(serial, translated, "{off}");
        assert_eq!(report["guest_ns"], jit["guest_ns"], "{off}");
        assert_eq!(report["retired"], jit["retired"], "{off}");
        let counter = |name: &str| jit["jit"][name].as_u64().unwrap();
        assert!(counter("ops_translated") > 1_000_000, "{off}: {jit}");
        assert_eq!(counter("linked") == 0, ["links", "native"].contains(&off), "{off}: {jit}");
        assert_eq!(counter("ops_by_helper") == counter("ops_translated"), off == "native", "{off}: {jit}");
    }
}
