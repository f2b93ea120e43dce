//! Every instruction row against the host CPU: the same bytes run natively and interpreted, with the same
//! registers, flags and memory, in 16-, 32- and 64-bit code.
//!
//! `UMBRA_ROWS_CASES` multiplies the number of cases, `UMBRA_ROWS_ONLY` names one mnemonic.
#![cfg(target_os = "linux")]

mod fallback;

use iced_x86::{Code, Mnemonic};
use std::collections::{BTreeMap, BTreeSet};
use umbra_cpu::{coverage, isa};
use umbra_hostexec::native::Mode;
use umbra_oracle::compare::{Comparison, compare};
use umbra_oracle::engine::{Answer, End, Engine};
use umbra_oracle::engines::{self, Host, Interp};
use umbra_oracle::random::Random;
use umbra_oracle::rows;

fn cases() -> usize {
    std::env::var("UMBRA_ROWS_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// What was seen of a code.
#[derive(Default, Clone)]
struct Seen {
    compared: usize,
    completed: usize,
    differ: usize,
    first: String,
}

struct Rig {
    interp: Interp,
    host: Host,
    seen: BTreeMap<Code, Seen>,
}

impl Rig {
    /// One random instruction; `None` if none could be compared.
    fn one(&mut self, mode: Mode, code: Code, r: &mut Random) -> Option<()> {
        let case = rows::case(mode, code, r)?;
        let Answer::Outcome(theirs) = self.host.run(&case) else { return None };
        let Answer::Outcome(ours) = self.interp.run(&case) else { panic!("{case:x?}") };
        let stray = self.interp.settle().and(self.host.settle());
        let seen = self.seen.entry(rows::instruction(&case, mode).code()).or_default();
        let difference = match (compare(&case, ("here", &ours), ("there", &theirs)), stray) {
            (_, Err(stray)) => stray,
            (Comparison::Free(_), _) => return None,
            (Comparison::Same, _) => String::new(),
            (Comparison::Different(text), _) => text,
        };
        seen.compared += 1;
        seen.completed += usize::from(theirs.end == End::Completed);
        if !difference.is_empty() {
            seen.differ += 1;
            seen.first = format!("{mode:?} {:02x?}: {difference}", case.code.steps);
        }
        Some(())
    }
}

/// Compares every code of `mode`; the codes that were.
fn compare_all(mode: Mode) -> BTreeSet<Code> {
    let only = std::env::var("UMBRA_ROWS_ONLY").ok();
    let interp = Interp::new("interp", &umbra_oracle::engines::profile(), Default::default()).unwrap();
    let mut rig = Rig { interp, host: Host::new().unwrap(), seen: BTreeMap::new() };
    let mut r = Random::new(1);
    let wanted = |code: &Code| only.as_ref().is_none_or(|m| format!("{:?}", code.mnemonic()) == *m);
    for code in Code::values().filter(wanted).filter(|&code| rows::is_comparable(mode, code)) {
        let mut left = 40 * cases();
        for _ in 0..20 * left {
            if left > 0 && rig.one(mode, code, &mut r).is_some() {
                left -= 1;
            }
        }
    }
    let total: usize = rig.seen.values().map(|seen| seen.compared).sum();
    println!("{mode:?}: {total} cases, {} codes", rig.seen.len());
    let differing: Vec<_> = rig.seen.iter().filter(|(_, seen)| seen.differ > 0).collect();
    for (code, seen) in &differing {
        println!("{code:?}: {} of {} differ\n   {}", seen.differ, seen.compared, seen.first);
    }
    assert!(differing.is_empty(), "{} codes differ", differing.len());
    let enough = |(code, seen): (Code, Seen)| (seen.completed > 1 || always_faults(code)).then_some(code);
    rig.seen.into_iter().filter_map(enough).collect()
}

/// Every row in every mode. The codes that this doesn't reach are exactly those that `unverified.txt` lists
/// (`UMBRA_ROWS_UPDATE=1` writes it).
#[test]
fn rows_agree_with_the_host() {
    let mut verified = BTreeSet::new();
    for mode in Mode::ALL {
        verified.extend(compare_all(mode));
    }
    if std::env::var_os("UMBRA_ROWS_ONLY").is_some() {
        return;
    }
    let offered = engines::profile();
    let covered = || Code::values().filter(|&code| isa::row_of(code).is_some());
    let reason = |code| rows::excluded::reason(code).unwrap_or("never decoded, or this host lacks it");
    let text: String =
        covered().filter(|code| !verified.contains(code)).map(|code| format!("{code:?}\t{}\n", reason(code))).collect();
    if std::env::var_os("UMBRA_ROWS_UPDATE").is_some() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/../cpu/src/unverified.txt"), &text).unwrap();
        return;
    }
    let listed: BTreeSet<_> = coverage::unverified().map(|(name, _)| name).collect();
    for code in covered() {
        let name = format!("{code:?}");
        if verified.contains(&code) {
            assert!(!listed.contains(name.as_str()), "{name} is verified: take it off src/unverified.txt");
        } else if rows::is_offered(code, &offered) {
            assert!(listed.contains(name.as_str()), "{name} isn't verified any more");
        }
    }
}

/// User code can't complete it: that it faults alike is all there is to see.
fn always_faults(code: Code) -> bool {
    let kernel_only = matches!(
        code.mnemonic(),
        Mnemonic::In
            | Mnemonic::Out
            | Mnemonic::Insb
            | Mnemonic::Insw
            | Mnemonic::Insd
            | Mnemonic::Outsb
            | Mnemonic::Outsw
            | Mnemonic::Outsd
            | Mnemonic::Cli
            | Mnemonic::Sti
            | Mnemonic::Monitor
            | Mnemonic::Mwait
    );
    code.is_privileged() || kernel_only
}
