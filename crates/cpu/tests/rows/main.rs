//! Every instruction row against the host CPU: the same bytes run natively and interpreted, with the same
//! registers, flags and memory, in 16-, 32- and 64-bit code.
//!
//! `UMBRA_ROWS_CASES` multiplies the number of cases, `UMBRA_ROWS_ONLY` names one mnemonic.
#![cfg(target_os = "linux")]

#[path = "../bus/mod.rs"]
mod bus;
mod compare;
mod excluded;
mod fallback;
mod form;
mod guest;
mod place;
mod processors;
mod random;
mod selectors;
mod undefined;

use compare::Comparison;
use iced_x86::Code;
use std::collections::BTreeSet;
use umbra_arch::cpuid::CpuidProfile;
use umbra_cpu::{coverage, isa};
use umbra_hostexec::native::Mode;

fn cases() -> usize {
    std::env::var("UMBRA_ROWS_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// Compares every code of `mode`; the codes that were.
fn compare(mode: Mode) -> BTreeSet<Code> {
    let only = std::env::var("UMBRA_ROWS_ONLY").ok();
    let mut comparison = Comparison::new(mode, 1);
    comparison.all(40 * cases(), |code| only.as_ref().is_none_or(|m| format!("{:?}", code.mnemonic()) == *m));
    comparison.finish()
}

/// Every row in every mode. The codes that this doesn't reach are exactly those that `unverified.txt` lists
/// (`UMBRA_ROWS_UPDATE=1` writes it).
#[test]
fn rows_agree_with_the_host() {
    let mut verified = BTreeSet::new();
    for mode in Mode::ALL {
        verified.extend(compare(mode));
    }
    if std::env::var_os("UMBRA_ROWS_ONLY").is_some() {
        return;
    }
    let offered = guest::profile();
    let covered = || Code::values().filter(|&code| isa::row_of(code).is_some());
    let text: String = covered()
        .filter(|code| !verified.contains(code))
        .map(|code| format!("{code:?}\t{}\n", excluded::reason(code).unwrap_or("never decoded, or this host lacks it")))
        .collect();
    if std::env::var_os("UMBRA_ROWS_UPDATE").is_some() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/src/unverified.txt"), &text).unwrap();
        return;
    }
    let listed: BTreeSet<_> = coverage::unverified().map(|(name, _)| name).collect();
    for code in covered() {
        let name = format!("{code:?}");
        if verified.contains(&code) {
            assert!(!listed.contains(name.as_str()), "{name} is verified: take it off src/unverified.txt");
        } else if is_offered(code, &offered) {
            assert!(listed.contains(name.as_str()), "{name} isn't verified any more");
        }
    }
}

/// Whether the host can run it; sets that every x86-64 CPU has aren't asked for.
fn is_offered(code: Code, profile: &CpuidProfile) -> bool {
    let row = isa::row_of(code).map(|(_, row)| row);
    let vector = !compare::uses_fp(code) || isa::host_data::is_offered(code.cpuid_features(), profile);
    vector && row.is_some_and(|row| row.needs.is_none_or(|feature| profile.has(feature)))
}
