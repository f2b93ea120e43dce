//! What is enumerated: forms of paging, entry bits, control bits, kinds of access.

use crate::manual::{Attempt, Kind};
use crate::support::*;

/// Tables by level; all forms share them, but for the page directory of 2-level paging and PAE's PDPTEs.
pub const PT: u64 = 0x10_0000;
pub const PD: u64 = 0x10_1000;
pub const PDPT: u64 = 0x10_2000;
pub const PML4: u64 = 0x10_3000;
pub const PML5: u64 = 0x10_4000;
pub const PDPTES: u64 = 0x10_5000;
pub const SHORT_PD: u64 = 0x10_6000;
pub const TABLE_BYTES: usize = 0x7000;
/// Pages next to each other that take turns.
pub const SLOTS: u64 = 8;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    TwoLevel { pse: bool },
    Pae,
    Long { levels: u32 },
}

impl Mode {
    pub fn top(self) -> u32 {
        match self {
            Mode::TwoLevel { .. } | Mode::Pae => 2,
            Mode::Long { levels } => levels,
        }
    }
    pub fn is_short(self) -> bool {
        matches!(self, Mode::TwoLevel { .. })
    }
    pub fn bytes(self) -> usize {
        if self.is_short() { 4 } else { 8 }
    }
    pub fn shift(self, level: u32) -> u32 {
        12 + (if self.is_short() { 10 } else { 9 }) * (level - 1)
    }
    pub fn table(self, level: u32) -> u64 {
        match (self, level) {
            (_, 1) => PT,
            (Mode::TwoLevel { .. }, _) => SHORT_PD,
            (_, 2) => PD,
            (_, 3) => PDPT,
            (_, 4) => PML4,
            _ => PML5,
        }
    }
    /// Index 1 at every level above the page's, so that one path leads to all slots.
    pub fn linear(self, page: u32, slot: u64) -> u64 {
        let above: u64 = (page + 1..=self.top()).map(|level| 1 << self.shift(level)).sum();
        let pdpte = if self == Mode::Pae { 1 << 30 } else { 0 };
        above | pdpte | slot << self.shift(page)
    }
    pub fn entry(self, page: u32, level: u32, slot: u64) -> u64 {
        self.table(level) + if level == page { slot } else { 1 } * self.bytes() as u64
    }
}

/// One form of paging with pages at one level, of which one upper level (0: none) varies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    pub mode: Mode,
    pub page: u32,
    pub varied: u32,
}

/// PAE's PDPTEs count as level 3.
pub fn plans() -> Vec<Plan> {
    let mut plans = Vec::new();
    let mut add = |mode: Mode, page: u32, top: u32| {
        let varied: Vec<u32> = (page + 1..=top).collect();
        plans.extend(varied.iter().map(|&varied| Plan { mode, page, varied }));
        if varied.is_empty() {
            plans.push(Plan { mode, page, varied: 0 });
        }
    };
    add(Mode::TwoLevel { pse: false }, 1, 2);
    add(Mode::TwoLevel { pse: true }, 1, 2);
    add(Mode::TwoLevel { pse: true }, 2, 2);
    for (page, top) in [(1, 3), (2, 3)] {
        add(Mode::Pae, page, top);
    }
    for levels in [4, 5] {
        for page in 1..=3 {
            add(Mode::Long { levels }, page, levels);
        }
    }
    plans
}

/// What an entry's enumerated bits are; the rest is the block's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bits {
    pub flags: u64,
    /// 0: none, 1: an address bit beyond MAXPHYADDR, 2: a low bit of a large page, or PS where it is no page.
    pub reserved: u8,
}

fn combine(bits: &[u64]) -> impl Iterator<Item = u64> {
    (0..1u64 << bits.len()).map(move |n| bits.iter().enumerate().map(|(i, bit)| (n >> i & 1) * bit).sum())
}

fn present(bits: &[u64], reserved: &[u8]) -> Vec<Bits> {
    let some =
        combine(bits).flat_map(|flags| reserved.iter().map(move |&reserved| Bits { flags: flags | P, reserved }));
    [Bits { flags: 0, reserved: 0 }].into_iter().chain(some).collect()
}

impl Plan {
    pub fn leaves(&self) -> Vec<Bits> {
        let reserved: &[u8] = if self.page > 1 { &[0, 1, 2] } else { &[0, 1] };
        match self.mode {
            Mode::TwoLevel { .. } => present(&[W, U, A, D], if self.page > 1 { &[0, 2] } else { &[0] }),
            _ => present(&[W, U, A, D, XD], reserved),
        }
    }
    pub fn uppers(&self) -> Vec<Bits> {
        match (self.mode, self.varied) {
            (_, 0) => vec![Bits { flags: 0, reserved: 0 }],
            (Mode::Pae, 3) => [0, P].map(|flags| Bits { flags, reserved: 0 }).to_vec(),
            // Without PSE, PS is ignored.
            (Mode::TwoLevel { pse }, _) => present(&[W, U, A], if pse { &[0] } else { &[0, 2] }),
            (Mode::Long { .. }, 4 | 5) => present(&[W, U, A, XD], &[0, 1, 2]),
            _ => present(&[W, U, A, XD], &[0, 1]),
        }
    }
    pub fn controls(&self) -> Vec<Control> {
        let mut all = Vec::new();
        let keys: &[Option<u32>] =
            if matches!(self.mode, Mode::Long { .. }) { &[None, Some(0), Some(1), Some(2), Some(3)] } else { &[None] };
        for (wp, smep, nxe) in (0..8).map(|n| (n & 1 != 0, n & 2 != 0, n & 4 != 0)) {
            for (smap, ac) in [(false, false), (true, false), (true, true)] {
                all.extend(keys.iter().map(|&keys| Control { wp, smep, nxe, smap, ac, keys }));
            }
        }
        all
    }
    /// Leaves one by one with every upper entry, but for every fifth of those, which takes all leaves.
    pub fn blocks(&self) -> usize {
        self.leaves().len() + self.uppers().len() / 5
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Control {
    pub wp: bool,
    pub smep: bool,
    pub nxe: bool,
    pub smap: bool,
    pub ac: bool,
    /// Keys in force, and the two bits that every key has.
    pub keys: Option<u32>,
}

pub const ATTEMPTS: [Attempt; 8] = {
    const fn attempt(kind: Kind, user: bool, implicit: bool) -> Attempt {
        Attempt { kind, user, implicit }
    }
    [
        attempt(Kind::Read, true, false),
        attempt(Kind::Write, true, false),
        attempt(Kind::Fetch, true, false),
        attempt(Kind::Read, false, false),
        attempt(Kind::Write, false, false),
        attempt(Kind::Fetch, false, false),
        attempt(Kind::Read, false, true),
        attempt(Kind::Write, false, true),
    ]
};
