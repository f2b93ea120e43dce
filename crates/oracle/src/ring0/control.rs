//! The generator `control`: control-register and EFER writes, legal and illegal, between page-table edits and
//! accesses.
//!
//! Only what manuals define: after an edit that a TLB may not have seen, INVLPG follows.

use super::step::{self, Access};
use super::tables::{ARENA_LOW, Root};
use super::{DATA, DATA_END, LOG, Paging, TABLES, TABLES_END};
use crate::case::{Case, Piece};
use crate::random::Random;
use umbra_arch::CpuState;
use umbra_arch::control::{Cr0, Cr4, Efer};
use umbra_arch::paging::entry::{A, D, G, P, PS, U, W, XD};

/// Pages of the arena.
const PAGES: u64 = 8;

/// What the sequences of a generator use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Features {
    /// SMEP, SMAP and protection keys too.
    All,
    /// Only what every 64-bit processor has (WP, NXE, PGE, roots and what is illegal), in 64-bit mode.
    Plain,
}

/// A random sequence that uses everything.
pub fn case(r: &mut Random) -> Case {
    case_of(Features::All, r)
}

/// A random sequence.
pub fn case_of(features: Features, r: &mut Random) -> Case {
    let paging = if features == Features::All { r.pick(&Paging::ALL) } else { Paging::Long };
    let roots = [Root::new(paging, 0), Root::new(paging, 1)];
    let mut memory = Vec::new();
    for root in roots {
        memory.push(entry(root, root.arena_directory_entry(), directory_value(root, r)));
        memory.extend((0..PAGES).map(|page| entry(root, root.arena_page_entry(page), page_value(paging, r))));
    }
    let count = 4 + r.below(20);
    let steps = (0..count).flat_map(|_| steps(features, paging, &roots, r)).collect();
    let watch = vec![LOG..LOG + 0x1000, TABLES..TABLES_END, DATA..DATA_END];
    super::case(paging, start(features, paging, r), memory, steps, watch)
}

fn start(features: Features, paging: Paging, r: &mut Random) -> CpuState {
    let mut s = super::state(paging);
    let has_keys = paging.is_long() && features == Features::All;
    let some = |r: &mut Random, bits: &[u64]| bits.iter().filter(|_| r.one_in(2)).sum::<u64>();
    s.cr0 = Cr0::new(s.cr0.raw() & !Cr0::WP | some(r, &[Cr0::WP]));
    let bits = if features == Features::All { &[Cr4::SMEP, Cr4::SMAP, Cr4::PGE][..] } else { &[Cr4::PGE] };
    s.cr4 = Cr4::new(s.cr4.raw() | some(r, bits) | if has_keys { some(r, &[Cr4::PKE]) } else { 0 });
    s.efer = Efer::new(s.efer.raw() | some(r, &[Efer::NXE]));
    if paging == Paging::Pae {
        s.pdpte[0] = Root::new(paging, 0).first_pdpte();
    }
    if has_keys && r.one_in(3) {
        s.pkru = (r.next() & 0xff) as u32;
    }
    s
}

fn entry(root: Root, gpa: u64, value: u64) -> Piece {
    Piece { gpa, bytes: value.to_le_bytes()[..root.entry_bytes() as usize].to_vec() }
}

fn rights(paging: Paging, r: &mut Random) -> u64 {
    let mut value = if r.one_in(12) { 0 } else { P };
    for (bit, of) in [(W, 2), (U, 2), (A, 2), (D, 2), (G, 4)] {
        value |= if r.one_in(of) { bit } else { 0 };
    }
    if paging != Paging::TwoLevel {
        value |= if r.one_in(6) { XD } else { 0 } | if r.one_in(24) { 1 << 51 } else { 0 };
    }
    if paging.is_long() && r.one_in(3) {
        value |= r.below(4) << 59;
    }
    value
}

/// A page table, or a large page over the low memory.
fn directory_value(root: Root, r: &mut Random) -> u64 {
    let paging = root.paging();
    let large = r.one_in(3);
    // A page table's own rights are mostly all there are.
    let rights = if !large && r.one_in(2) { P | W | U } else { rights(paging, r) & if large { !0 } else { !G } };
    rights | if large { PS } else { root.page_table() }
}

fn page_value(paging: Paging, r: &mut Random) -> u64 {
    rights(paging, r) | (DATA + r.below(PAGES) * 0x1000)
}

/// One operation, as one or more steps.
fn steps(features: Features, paging: Paging, roots: &[Root; 2], r: &mut Random) -> Vec<Vec<u8>> {
    let long = paging.is_long();
    match r.below(32) {
        0..=2 => vec![step::toggle_control(0, Cr0::WP as u32)],
        3 => vec![cr0(long, r)],
        4..=6 => vec![cr4(features, paging, r)],
        7 => vec![step::set_control(4, illegal(r), long)],
        8..=10 => vec![step::set_control(3, r.pick(roots).cr3(), long), flush(long)],
        11 => vec![efer(long, r), flush(long)],
        12..=16 => edit(paging, r.pick(roots), r),
        17 | 18 => vec![step::set_ac(r.one_in(2))],
        19 if long && features == Features::All => vec![step::set_pkru((r.next() & 0xff) as u32)],
        _ => vec![access(long, r)],
    }
}

fn cr0(long: bool, r: &mut Random) -> Vec<u8> {
    match r.below(4) {
        // #GP in 64-bit mode.
        0 if long => step::toggle_control(0, Cr0::PG as u32),
        // Paging goes and comes back: the code is mapped one to one.
        0 => {
            let off = step::toggle_control(0, Cr0::PG as u32);
            [off.clone(), off].concat()
        }
        1 => step::toggle_control(0, Cr0::NW as u32),
        2 => step::toggle_control(0, (Cr0::AM | Cr0::NE) as u32),
        _ if long => step::toggle_control(0, Cr0::PE as u32),
        _ => step::toggle_control(0, Cr0::TS as u32),
    }
}

fn cr4(features: Features, paging: Paging, r: &mut Random) -> Vec<u8> {
    let all = [Cr4::SMEP, Cr4::SMAP, Cr4::SMAP, Cr4::PGE];
    let common = if features == Features::All { &all[..] } else { &all[3..] };
    let bit = match r.below(8) {
        0 if paging.is_long() => r.pick(&[Cr4::PKE, Cr4::PAE, Cr4::LA57, Cr4::PSE]),
        0 if paging == Paging::Pae => r.pick(&[Cr4::PSE, Cr4::PCIDE]),
        _ => r.pick(common),
    };
    step::toggle_control(4, bit as u32)
}

/// CR4 values that no processor of this kind takes.
fn illegal(r: &mut Random) -> u64 {
    r.pick(&[1 << 15, 1 << 31, 1 << 19 | Cr4::PAE, 1 << 28])
}

fn efer(long: bool, r: &mut Random) -> Vec<u8> {
    match r.below(4) {
        // LME can't change while paging is on; bit 1 is reserved.
        0 if long => step::toggle_efer(Efer::LME as u32),
        1 => step::toggle_efer(2),
        _ => step::toggle_efer(Efer::NXE as u32),
    }
}

fn pages() -> impl Iterator<Item = u64> {
    (0..PAGES).map(|page| ARENA_LOW + page * 0x1000)
}

fn flush(long: bool) -> Vec<u8> {
    step::invalidate(pages(), long)
}

fn edit(paging: Paging, root: Root, r: &mut Random) -> Vec<Vec<u8>> {
    let (at, value) = if r.one_in(4) {
        (root.arena_directory_entry(), directory_value(root, r))
    } else {
        (root.arena_page_entry(r.below(PAGES)), page_value(paging, r))
    };
    vec![step::store(at, value, root.entry_bytes()), flush(paging.is_long())]
}

fn access(long: bool, r: &mut Random) -> Vec<u8> {
    let page = r.below(PAGES);
    let kind = r.pick(&Access::ALL);
    let offset = match kind {
        Access::Fetch | Access::UserFetch => 0,
        // Across the next page's start, which has no RET there to spoil.
        Access::Read | Access::UserRead if r.one_in(6) => 0xffe,
        _ => 0x20 + 4 * r.below(32),
    };
    step::access(kind, ARENA_LOW + page * 0x1000 + offset, page, long)
}
