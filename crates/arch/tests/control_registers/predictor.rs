//! What the predictors share: bit combinations, rules that are counted, a TLB of six entries.

use umbra_arch::control::{ControlLimits, ControlRegs, Effects, FlushScope};
use umbra_arch::{Fault, Gpa};

pub const M: u8 = 46;
pub const CURRENT: u16 = 5;
pub const OTHER: u16 = 9;

pub fn bit(n: u32) -> u64 {
    1 << n
}

/// All values whose bits are chosen from `bits`.
pub fn combinations(bits: &[u32]) -> impl Iterator<Item = u64> + Clone {
    let bits = bits.to_vec();
    (0..1u64 << bits.len())
        .map(move |pick| bits.iter().enumerate().fold(0, |value, (i, &n)| value | (pick >> i & 1) << n))
}

/// Memory as the PDPTE load sees it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Table {
    Good,
    /// A present entry with the given reserved bit.
    Bad(u32),
    /// A reserved bit in an entry that is not present.
    BadButAbsent(u32),
}

pub const TABLES: [Table; 3] = [Table::Good, Table::Bad(1), Table::BadButAbsent(5)];

impl Table {
    pub fn entries(self) -> [u64; 4] {
        let good = [0x1001, 0, 0x2001, 0x3019];
        match self {
            Table::Good => good,
            Table::Bad(n) => [good[0], good[1], good[2] | bit(n), good[3]],
            Table::BadButAbsent(n) => [good[0], bit(n), good[2], good[3]],
        }
    }
}

/// The TLB as six entries: PCIDs 0, CURRENT and OTHER, non-global and global.
pub type Gone = u8;
pub const PCIDS: [u16; 3] = [0, CURRENT, OTHER];

pub fn entry(pcid: u16, global: bool) -> Gone {
    PCIDS.iter().position(|&p| p == pcid).map_or(0, |i| 1 << (i * 2 + usize::from(global)))
}

pub fn gone(scope: FlushScope) -> Gone {
    let non_global = PCIDS.iter().fold(0, |g, &p| g | entry(p, false));
    match scope {
        FlushScope::None => 0,
        FlushScope::PcidNonGlobal(p) => entry(p, false),
        FlushScope::Pcid(p) => entry(p, false) | entry(p, true),
        FlushScope::AllNonGlobal => non_global,
        FlushScope::All => 0x3f,
    }
}

/// A rule that forbids a write, and how often it was the only one that did.
pub struct Rule<C> {
    pub name: &'static str,
    pub forbids: Forbids<C>,
    pub alone: u64,
}

pub type Forbids<C> = fn(&C) -> bool;

pub fn rules<C>(list: &[(&'static str, Forbids<C>)]) -> Vec<Rule<C>> {
    list.iter().map(|&(name, forbids)| Rule { name, forbids, alone: 0 }).collect()
}

/// Whether the case is forbidden.
pub fn judge<C>(rules: &mut [Rule<C>], case: &C) -> bool {
    let mut broken = rules.iter_mut().filter(|r| (r.forbids)(case));
    let first = broken.next();
    let second = broken.next();
    match (first, second) {
        (Some(only), None) => {
            only.alone += 1;
            true
        }
        (Some(_), Some(_)) => true,
        _ => false,
    }
}

pub fn each_rule_mattered<C>(rules: &[Rule<C>]) {
    for rule in rules {
        assert!(rule.alone > 0, "no case was refused by this rule alone: {}", rule.name);
    }
}

pub fn limits() -> ControlLimits {
    ControlLimits { maxphyaddr: M, cr4_allowed: 0x01f7_1fff, efer_allowed: 0xd01 }
}

/// Runs a write, counting the table reads it makes.
pub fn observe(
    regs: &ControlRegs,
    table: Table,
    write: impl FnOnce(&ControlRegs, &mut dyn FnMut(Gpa) -> [u64; 4]) -> Result<Effects, Fault>,
) -> (Result<Effects, Fault>, Vec<u64>) {
    let mut reads = Vec::new();
    let result = write(regs, &mut |at| {
        reads.push(at.raw());
        table.entries()
    });
    (result, reads)
}
