//! What the rows cover, and which of them are verified: the listing behind `umbra isa`.
//!
//! A code is verified when a generated test runs it natively and interpreted, and everything agrees
//! (`crates/oracle/tests/rows`). The codes that aren't are named in [`UNVERIFIED`] with the reason; the test fails when that
//! list isn't exact, so it can only grow by a change that says why.

use crate::isa::{self, Row};
use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic};

/// Codes with a row that aren't compared with a host CPU: name, tab, reason.
pub const UNVERIFIED: &str = include_str!("unverified.txt");

/// The entries of [`UNVERIFIED`].
pub fn unverified() -> impl Iterator<Item = (&'static str, &'static str)> {
    UNVERIFIED.lines().filter_map(|line| line.split_once('\t'))
}

/// One row and the codes it covers.
pub struct RowCoverage {
    /// The row.
    pub row: &'static Row,
    /// Every code that the row covers.
    pub codes: Vec<Code>,
    /// Those of them that aren't verified, with the reason.
    pub unverified: Vec<(Code, &'static str)>,
}

/// Every row, in the order of the families.
pub fn rows() -> Vec<RowCoverage> {
    let listed: hashbrown::HashMap<&str, &str> = unverified().collect();
    let mut all: Vec<_> =
        isa::rows().map(|(_, row)| RowCoverage { row, codes: Vec::new(), unverified: Vec::new() }).collect();
    for code in Code::values() {
        let Some(coverage) = isa::row_of(code).and_then(|(index, _)| all.get_mut(usize::from(index))) else { continue };
        coverage.codes.push(code);
        if let Some(reason) = listed.get(format!("{code:?}").as_str()) {
            coverage.unverified.push((code, reason));
        }
    }
    all
}

/// Codes of the general-purpose and system instruction sets that no row covers: they raise #UD.
pub fn missing() -> impl Iterator<Item = Code> {
    Code::values().filter(|&code| is_general(code) && isa::row_of(code).is_none())
}

/// Part of an instruction set that computes on general registers or controls the CPU, and of present processors.
fn is_general(code: Code) -> bool {
    use CpuidFeature as F;
    let info = code.op_code();
    let present = info.is_instruction() && matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
    // Documented as raising #UD, which is what having no row does.
    let undefined = matches!(code.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 | Mnemonic::INVALID);
    present
        && !undefined
        && code.cpuid_features().iter().all(|f| {
            matches!(
                f,
                F::INTEL8086
                    | F::INTEL186
                    | F::INTEL286
                    | F::INTEL386
                    | F::INTEL486
                    | F::X64
                    | F::ADX
                    | F::BMI1
                    | F::BMI2
                    | F::CLFLUSHOPT
                    | F::CLFSH
                    | F::CLWB
                    | F::CMOV
                    | F::CMPXCHG16B
                    | F::CPUID
                    | F::CX8
                    | F::FSGSBASE
                    | F::INVPCID
                    | F::LZCNT
                    | F::MONITOR
                    | F::MOVBE
                    | F::MSR
                    | F::MULTIBYTENOP
                    | F::PAUSE
                    | F::PKU
                    | F::POPCNT
                    | F::PREFETCHW
                    | F::RDPID
                    | F::RDPMC
                    | F::RDRAND
                    | F::RDSEED
                    | F::RDTSCP
                    | F::SEP
                    | F::SMAP
                    | F::SYSCALL
                    | F::TSC
                    | F::WBNOINVD
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unverified_codes_have_rows_and_reasons() {
        for line in UNVERIFIED.lines() {
            let (name, reason) = line.split_once('\t').expect(line);
            let code = Code::values().find(|code| format!("{code:?}") == name).expect(name);
            assert!(isa::row_of(code).is_some(), "{name} has no row");
            assert!(!reason.is_empty());
        }
    }

    #[test]
    fn every_code_of_a_row_is_counted_once() {
        let with_row = Code::values().filter(|&code| isa::row_of(code).is_some()).count();
        assert_eq!(rows().iter().map(|r| r.codes.len()).sum::<usize>(), with_row);
    }
}
