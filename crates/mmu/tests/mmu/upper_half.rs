//! Roots that share the identity of their upper half: as long as it is the same, so is every translation of a fetch.

use super::support::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use umbra_arch::Gva;
use umbra_arch::paging::{Access, AccessKind, entry};
use umbra_memory::{PageFlags, RamOffset};
use umbra_mmu::MmuOptions;

const P: u64 = entry::P;
const W: u64 = entry::W;
const A: u64 = entry::A;
/// Pages of the upper half, four below each of two entries of the topmost table.
const PAGES: [u64; 8] = [
    0xffff_8000_0000_0000,
    0xffff_8000_0000_1000,
    0xffff_8000_0020_2000,
    0xffff_8000_4000_3000,
    0xffff_ffff_8000_4000,
    0xffff_ffff_8000_5000,
    0xffff_ffff_8020_6000,
    0xffff_ffff_c000_7000,
];
const FRAMES: u64 = 0x40_0000;

fn fetch() -> Access {
    Access::explicit(AccessKind::Fetch, 0)
}

/// Fetches as an engine does that keeps decoded code: the page is claimed.
fn execute(rig: &mut Rig, page: u64) -> Option<u64> {
    let gpa = rig.fetch(page).ok()?.raw();
    let off = RamOffset::new(gpa);
    if rig.mmu.watcher().claim(off, PageFlags::CODE) {
        rig.mmu.code_page_changed(off);
    }
    Some(gpa)
}

/// A topmost table with the upper half of `other`.
fn table_like(rig: &mut Rig, other: u64) -> u64 {
    let table = rig.table();
    for at in 256..512 {
        let value = rig.peek64(other + 8 * at);
        if value != 0 {
            rig.poke(table + 8 * at, value);
        }
    }
    table
}

fn map_all(rig: &mut Rig) -> Vec<u64> {
    let root = rig.regs.cr3.raw();
    let map = |(n, &page): (usize, &u64)| rig.map(page, (FRAMES + 0x1000 * n as u64) | P | W | A);
    let leaves = PAGES.iter().enumerate().map(map).collect();
    for at in 256..512 {
        let value = rig.peek64(root + 8 * at);
        if value != 0 {
            rig.poke(root + 8 * at, value | A);
        }
    }
    leaves
}

#[test]
fn a_new_address_space_has_the_upper_half_in_force() {
    let mut rig = Rig::long();
    let first = rig.regs.cr3.raw();
    let leaves = map_all(&mut rig);
    for page in PAGES {
        execute(&mut rig, page);
        assert!(rig.write(page).is_ok());
    }
    let (stamp, second) = (rig.mmu.upper_stamp(), table_like(&mut rig, first));
    rig.cr3(second).expect("legal");
    assert_eq!((rig.mmu.stats().upper_halves_adopted, rig.mmu.upper_stamp()), (1, stamp));
    for page in PAGES {
        execute(&mut rig, page);
    }
    rig.audit();
    // What goes in one goes in both, and they go on agreeing.
    rig.poke(leaves[4], 0);
    rig.audit();
    let renewed = rig.mmu.upper_stamp();
    assert_ne!(renewed, stamp);
    assert!(rig.fetch(PAGES[4]).is_err());
    rig.cr3(first).expect("legal");
    assert_eq!(rig.mmu.upper_stamp(), renewed);
    assert!(rig.fetch(PAGES[4]).is_err() && rig.fetch(PAGES[5]).is_ok());
    // Until one topmost table changes there, be it by one byte; the lower half is nobody's business.
    rig.poke_bytes(second + 8 * 300 + 7, &[1]);
    assert_eq!(rig.mmu.upper_stamp(), renewed);
    rig.cr3(second).expect("legal");
    assert_ne!(rig.mmu.upper_stamp(), renewed);
    let third = table_like(&mut rig, second);
    rig.cr3(third).expect("legal");
    let shared = rig.mmu.upper_stamp();
    rig.poke(second + 8 * 3, 0x7000 | P);
    rig.cr3(second).expect("legal");
    assert_eq!(rig.mmu.upper_stamp(), shared);
    rig.audit();
}

/// As when a process ends.
#[test]
fn what_ends_in_the_lower_half_says_nothing_of_the_upper_one() {
    let mut rig = Rig::long();
    map_all(&mut rig);
    let (root, lower) = (rig.regs.cr3.raw(), 0x1000_0000_0000);
    rig.map(lower, (FRAMES + 0x9000) | P | W | A);
    for page in [PAGES[0], lower] {
        execute(&mut rig, page);
    }
    let (stamp, all) = (rig.mmu.upper_stamp(), rig.mmu.fetch_stamp());
    rig.poke(root + 8 * (lower >> 39), 0);
    assert_eq!(rig.mmu.upper_stamp(), stamp);
    assert_ne!(rig.mmu.fetch_stamp(), all);
    rig.audit();
}

#[test]
fn an_entry_that_walks_would_mark_is_not_adopted() {
    let mut rig = Rig::long();
    map_all(&mut rig);
    let first = rig.regs.cr3.raw();
    execute(&mut rig, PAGES[0]);
    let unmarked = rig.peek64(first + 8 * 511) & !A;
    rig.poke(first + 8 * 511, unmarked);
    let (stamp, second) = (rig.mmu.upper_stamp(), table_like(&mut rig, first));
    rig.cr3(second).expect("legal");
    assert_eq!(rig.mmu.stats().upper_halves_adopted, 0);
    assert_ne!(rig.mmu.upper_stamp(), stamp);
}

/// Room for a walk's tables is made before the table that it begins at is looked up.
#[test]
fn a_walk_does_not_begin_at_a_table_that_it_evicts() {
    let mut rig = Rig::long_with(MmuOptions { shadow_pages: 16, ..MmuOptions::default() });
    let leaves = map_all(&mut rig);
    let another = |rig: &mut Rig| {
        let current = rig.regs.cr3.raw();
        let table = table_like(rig, current);
        rig.cr3(table).expect("legal");
    };
    another(&mut rig);
    execute(&mut rig, PAGES[0]);
    (0..2).for_each(|_| another(&mut rig));
    execute(&mut rig, PAGES[4]);
    rig.mmu.drop_all_shadow();
    for n in [3, 0] {
        execute(&mut rig, PAGES[n]);
    }
    another(&mut rig);
    for n in [4, 7, 6] {
        execute(&mut rig, PAGES[n]);
    }
    let (upper, fetch) = (rig.mmu.upper_stamp(), rig.mmu.fetch_stamp());
    rig.poke_bytes(leaves[6], &[0]);
    assert!(upper != rig.mmu.upper_stamp() && fetch != rig.mmu.fetch_stamp());
}

#[derive(Clone, Debug)]
enum Op {
    New,
    Select(usize),
    Execute(usize),
    Write(usize),
    Leaf { page: usize, value: u64, bytes: usize },
    Top { table: usize, at: usize, like: usize, accessed: bool },
    Forget,
}

fn op() -> impl Strategy<Value = Op> {
    let leaf = prop_oneof![Just(0), (0..8u64).prop_map(|n| (FRAMES + 0x1000 * n) | P | W | A)];
    prop_oneof![
        2 => Just(Op::New),
        6 => any::<usize>().prop_map(Op::Select),
        8 => (0..PAGES.len()).prop_map(Op::Execute),
        2 => (0..PAGES.len()).prop_map(Op::Write),
        3 => (0..PAGES.len(), leaf, prop_oneof![Just(1usize), Just(2), Just(8)])
            .prop_map(|(page, value, bytes)| Op::Leaf { page, value, bytes }),
        2 => (any::<usize>(), prop_oneof![Just(256usize), Just(511)], 0..3usize, any::<bool>())
            .prop_map(|(table, at, like, accessed)| Op::Top { table, at, like, accessed }),
        1 => Just(Op::Forget),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_same_identity_means_the_same_translations(
        ops in prop::collection::vec(op(), 1..120),
        small: bool,
    ) {
        let options = MmuOptions { shadow_pages: if small { 16 } else { 4096 }, ..MmuOptions::default() };
        let mut rig = Rig::long_with(options);
        let leaves = map_all(&mut rig);
        let mut tables = vec![rig.regs.cr3.raw()];
        // What an entry of a topmost table may become: as it was, the other one, nothing.
        let entries = [rig.peek64(tables[0] + 8 * 256), rig.peek64(tables[0] + 8 * 511), 0];
        let mut known: BTreeMap<(u64, u64), u64> = BTreeMap::new();
        for op in ops {
            match op {
                Op::New if tables.len() < 12 => {
                    let current = rig.regs.cr3.raw();
                    let table = table_like(&mut rig, current);
                    tables.push(table);
                    rig.cr3(table).expect("legal");
                }
                Op::New => {}
                Op::Select(n) => rig.cr3(tables[n % tables.len()]).expect("legal"),
                Op::Execute(n) => {
                    if let Some(gpa) = execute(&mut rig, PAGES[n]) {
                        known.insert((rig.mmu.upper_stamp(), PAGES[n]), gpa);
                    }
                }
                Op::Write(n) => drop(rig.write(PAGES[n])),
                Op::Leaf { page, value, bytes } => rig.poke_bytes(leaves[page], &value.to_le_bytes()[..bytes]),
                Op::Top { table, at, like, accessed } => {
                    let value = if accessed { entries[like] } else { entries[like] & !A };
                    rig.poke(tables[table % tables.len()] + 8 * at as u64, value);
                }
                Op::Forget => rig.mmu.drop_all_shadow(),
            }
            rig.audit();
            for page in PAGES {
                if let Some(&gpa) = known.get(&(rig.mmu.upper_stamp(), page)) {
                    let now = rig.mmu.peek(Gva::new(page), fetch()).map(|found| found.gpa.raw());
                    prop_assert_eq!(now, Ok(gpa), "{:#x}", page);
                    let top = rig.peek64(rig.regs.cr3.raw() + 8 * (page >> 39 & 511));
                    prop_assert!(top & A != 0, "{:#x} without a walk that marks its topmost entry", page);
                }
            }
        }
    }
}
