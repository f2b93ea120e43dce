//! The generator `shapes`: one access through tables of any shape, under any rights.
//!
//! Every entry on the arena's path has random flags, reserved bits included; the engine `model` predicts the
//! outcome without sharing a line with the MMU.

use super::step::{self, Access};
use super::tables::Root;
use super::{DATA, IN_LDT, LARGE, LDT_OFFSET, LOG, Paging, TABLES, TABLES_END};
use crate::case::{Case, Piece};
use crate::random::Random;
use umbra_arch::control::{Cr0, Cr4, Efer};
use umbra_arch::paging::entry::{A, D, G, P, PS, U, W, XD};
use umbra_arch::segment::{Attr, Seg, Segment};
use umbra_arch::{CpuState, rflags};

/// Where the fault, if there is one, is logged.
pub const FAULT: std::ops::Range<u64> = LOG..LOG + 16;
/// The page of a large page that the arena is in.
const IN_LARGE: u64 = DATA;

/// The page that is accessed: the only one that its tables map.
pub fn arena(paging: Paging) -> u64 {
    match paging {
        Paging::TwoLevel => 5 << 22 | IN_LARGE,
        Paging::Pae => 2 << 30 | 1 << 21 | IN_LARGE,
        Paging::Long => 1 << 39 | 2 << 30 | 1 << 21 | IN_LARGE,
    }
}

/// Address and contents of the entries on the path, top first. PAE's first are registers.
fn path(paging: Paging) -> Vec<(u64, u64)> {
    let root = Root::new(paging, 0);
    let (size, gva) = (root.entry_bytes(), arena(paging));
    let shifts: &[u32] = match paging {
        Paging::TwoLevel => &[22, 12],
        Paging::Pae => &[30, 21, 12],
        Paging::Long => &[39, 30, 21, 12],
    };
    // Tables of root 1 are free, the first is CR3's.
    let own = |n: usize| TABLES + 0x1000 + n as u64 * 0x2000;
    let index = |shift: u32| gva >> shift & if size == 4 { 1023 } else { 511 };
    let place = |(n, shift): (usize, &u32)| {
        let table = if n == 0 { root.cr3() } else { own(n) };
        (table + index(*shift) * size, own(n + 1))
    };
    let mut all: Vec<_> = shifts.iter().enumerate().map(place).collect();
    if let Some(last) = all.last_mut() {
        last.1 = DATA;
    }
    all
}

/// Whether a case in long mode goes by a page of 1 GiB.
pub fn has_gib_page(case: &Case) -> bool {
    let on_the_way = path(Paging::Long)[1].0;
    let large = |piece: &Piece| piece.gpa == on_the_way && u64::from(piece.bytes[0]) & (P | PS) == P | PS;
    case.state.efer.lma() && case.memory.iter().any(large)
}

/// A random access.
pub fn case(r: &mut Random) -> Case {
    let paging = r.pick(&Paging::ALL);
    let kind = r.pick(&Access::ALL);
    let offset = if matches!(kind, Access::Fetch | Access::UserFetch) { 0 } else { 0x20 + 4 * r.below(32) };
    let gva = arena(paging) + offset;
    let mut memory = Vec::new();
    let mut state = state(paging, r);
    for (level, (gpa, next)) in (1..=path(paging).len()).rev().zip(path(paging)) {
        let value = entry(paging, level, next, r);
        if paging == Paging::Pae && level == 3 {
            state.pdpte[2] = value & P | next;
        }
        let bytes = if paging == Paging::TwoLevel { 4 } else { 8 };
        let value = if paging == Paging::Pae && level == 3 { value & P | next } else { value };
        memory.push(Piece { gpa, bytes: value.to_le_bytes()[..bytes].to_vec() });
    }
    if kind == Access::UserFetch {
        // The call's push is about a page of key 0.
        state.pkru &= !3;
    }
    let (step, ldt) = self::step(kind, gva, paging.is_long());
    if let Some(base) = ldt {
        state.seg[Seg::Ldtr as usize] = Segment { base, limit: 0x1f, attr: Attr(0x82), selector: super::LDTS };
    }
    let data = [DATA..DATA + 0x1000, LARGE + IN_LARGE..LARGE + IN_LARGE + 0x1000];
    let mut watch = vec![FAULT, TABLES..TABLES_END];
    watch.extend(data);
    super::case(paging, state, memory, vec![step], watch)
}

/// The step, and the LDT's base if it uses one: the descriptor lies at `gva`'s page.
fn step(kind: Access, gva: u64, long: bool) -> (Vec<u8>, Option<u64>) {
    let ldt = (gva & !0xfff) + LDT_OFFSET;
    match kind {
        Access::Descriptor => (step::load_fs(IN_LDT), Some(ldt)),
        Access::FreshDescriptor => (step::load_fs(IN_LDT + 8), Some(ldt)),
        _ => (step::access(kind, gva, 0, long), None),
    }
}

/// What the one step of a case of this generator accesses, and how; `None` for other cases.
pub fn accessed(case: &Case, paging: Paging) -> Option<(Access, u64)> {
    let [given] = case.code.steps.as_slice() else { return None };
    // mov ebx, address, or mov rbx, address; descriptors are found by the LDT.
    let field = |at: usize, bytes: usize| {
        let raw = given.get(at..at + bytes)?;
        Some(raw.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    };
    let ldt = case.state.seg[Seg::Ldtr as usize].base;
    let gva = match given.as_slice() {
        [0xbb, ..] => field(1, 4)?,
        [0x48, 0xbb, ..] => field(2, 8)?,
        _ => ldt,
    };
    Access::ALL.into_iter().find_map(|kind| {
        let (step, its_ldt) = self::step(kind, gva, paging.is_long());
        let at = match kind {
            Access::Descriptor => ldt + 8,
            Access::FreshDescriptor => ldt + 16,
            _ => gva,
        };
        let same = step == *given && its_ldt.is_none_or(|its| its == ldt) && at & !0xfff == arena(paging);
        same.then_some((kind, at))
    })
}

fn state(paging: Paging, r: &mut Random) -> CpuState {
    let mut s = super::state(paging);
    let some = |r: &mut Random, bits: &[u64]| bits.iter().filter(|_| r.one_in(2)).sum::<u64>();
    s.cr0 = Cr0::new(s.cr0.raw() & !Cr0::WP | some(r, &[Cr0::WP]));
    s.cr4 = Cr4::new(s.cr4.raw() | some(r, &[Cr4::SMEP, Cr4::SMAP, Cr4::PGE]));
    s.efer = Efer::new(s.efer.raw() | some(r, &[Efer::NXE]));
    s.rflags |= some(r, &[rflags::AC]);
    if paging.is_long() {
        s.cr4 = Cr4::new(s.cr4.raw() | some(r, &[Cr4::PKE]));
        s.pkru = (r.next() & 0xff) as u32;
    }
    if paging == Paging::Pae {
        s.pdpte[0] = Root::new(paging, 0).first_pdpte();
    }
    s
}

fn entry(paging: Paging, level: usize, next: u64, r: &mut Random) -> u64 {
    let mut value = if r.one_in(16) { 0 } else { P };
    for (bit, of) in [(W, 4), (U, 3), (A, 2), (D, 2)] {
        value |= if r.one_in(of) { 0 } else { bit };
    }
    value |= if r.one_in(4) { G } else { 0 };
    if paging != Paging::TwoLevel {
        value |= if r.one_in(6) { XD } else { 0 } | if r.one_in(40) { 1 << 51 } else { 0 };
    }
    if paging.is_long() && r.one_in(2) {
        value |= r.below(4) << 59;
    }
    if level == 1 || !r.one_in(4) {
        return value | next;
    }
    // A large page, or a set bit where none may be.
    let frame = if paging != Paging::TwoLevel && level == 2 && r.one_in(2) { LARGE } else { 0 };
    // In a 4 MiB page's entry, bit 13 is an address bit.
    let bit = if paging == Paging::TwoLevel { 1 << 21 } else { 1 << 13 };
    let reserved = if r.one_in(12) { bit } else { 0 };
    value | PS | frame | reserved
}
