//! What the project promises: role changes throw nothing away and cost lookups only.

use crate::support::*;
use umbra_arch::Gva;
use umbra_arch::control::{Cr0, Cr4, Efer};
use umbra_memory::PageFlags;
use umbra_mmu::{MmuMode, MmuOptions, MmuStats};

const DATA: u64 = 0x40_0000;
const CODE: u64 = 0x41_0000;

/// Everything that would be work beyond a lookup.
fn work(stats: &MmuStats) -> [u64; 10] {
    [
        stats.roots_built,
        stats.roots_freed,
        stats.pages_allocated,
        stats.pages_freed,
        stats.walks,
        stats.entries_read,
        stats.refills,
        stats.entries_dropped,
        stats.dropped_by_flush,
        stats.context_clears,
    ]
}

/// Runs `round` until warm, then again: the second run must cost nothing.
fn costs_nothing(rig: &mut Rig, mut round: impl FnMut(&mut Rig)) {
    round(rig);
    round(rig);
    let before = work(rig.mmu.stats());
    for _ in 0..10 {
        round(rig);
    }
    assert_eq!(work(rig.mmu.stats()), before);
    rig.audit();
}

fn touch(rig: &mut Rig) {
    for page in 0..8 {
        rig.write(DATA + page * 0x1000).expect("mapped");
        rig.read(DATA + page * 0x1000).expect("mapped");
        rig.fetch(CODE + page * 0x1000).expect("mapped");
    }
}

fn map_both(rig: &mut Rig) {
    for page in 0..8 {
        rig.map(DATA + page * 0x1000, (0x30_0000 + page * 0x1000) | P | W);
        rig.map(CODE + page * 0x1000, (0x31_0000 + page * 0x1000) | P);
    }
}

fn long() -> Rig {
    let mut rig = Rig::long();
    map_both(&mut rig);
    rig
}

#[test]
fn toggling_wp_costs_nothing() {
    let mut rig = long();
    costs_nothing(&mut rig, |rig| {
        rig.set_cr0(Cr0::WP, false);
        touch(rig);
        rig.write(CODE).expect("WP is clear");
        rig.set_cr0(Cr0::WP, true);
        touch(rig);
        assert_eq!(code(rig.write(CODE)), Some(3));
    });
    let stats = rig.mmu.stats();
    assert_eq!((stats.roots_built, stats.role_changes > 20), (2, true), "paging off and one root");
}

#[test]
fn toggling_every_role_bit_costs_nothing() {
    let mut rig = long();
    costs_nothing(&mut rig, |rig| {
        for bit in [Cr4::SMEP, Cr4::SMAP, Cr4::PGE, Cr4::PKE, Cr4::PKS, Cr4::PCIDE] {
            rig.set_cr4(bit, true);
            touch(rig);
            rig.set_cr4(bit, false);
            touch(rig);
        }
        rig.set_nxe(false);
        touch(rig);
        rig.set_nxe(true);
        touch(rig);
    });
}

#[test]
fn sixteen_address_spaces_cost_nothing() {
    let mut rig = Rig::long();
    let roots: Vec<u64> = (0..16)
        .map(|_| {
            let root = rig.table();
            rig.cr3(root).expect("legal");
            map_both(&mut rig);
            root
        })
        .collect();
    costs_nothing(&mut rig, |rig| {
        for &root in &roots {
            rig.cr3(root).expect("legal");
            touch(rig);
        }
    });
    assert!(rig.mmu.stats().root_hits_by_slot[7] > 0, "hits deep in the cache");
}

fn leave_paging(rig: &mut Rig, next_cr3: u64, efer: u64) {
    rig.set_cr0(Cr0::PG, false);
    rig.efer(efer).expect("LME may change with paging off");
    rig.cr3(next_cr3).expect("legal");
}

/// A PAE mapping of the same addresses; the value for CR3.
fn pae_tables(rig: &mut Rig) -> u64 {
    let (pdpt, pd, pt, pt2) = (rig.table(), rig.table(), rig.table(), rig.table());
    rig.poke(pdpt, pd | P);
    rig.poke(pd + (DATA >> 21) * 8, pt | PWU);
    rig.poke(pd, pt2 | PWU);
    for page in 0..32 {
        rig.poke(pt + page * 8, (0x30_0000 + page * 0x1000) | P | W);
    }
    pdpt
}

#[test]
fn long_to_pae_and_back_costs_nothing() {
    let mut rig = long();
    let long_root = rig.regs.cr3.raw();
    let pdpt = pae_tables(&mut rig);
    costs_nothing(&mut rig, |rig| {
        touch(rig);
        leave_paging(rig, pdpt, Efer::NXE);
        rig.set_cr0(Cr0::PG, true);
        touch(rig);
        leave_paging(rig, long_root, Efer::NXE | Efer::LME);
        rig.set_cr0(Cr0::PG, true);
        touch(rig);
    });
}

#[test]
fn long_to_2_level_and_back_costs_nothing() {
    let mut rig = long();
    let long_root = rig.regs.cr3.raw();
    let (pd, pt) = (rig.table(), rig.table());
    rig.poke32(pd + (DATA >> 22) * 4, (pt | PWU) as u32);
    for page in 0..32 {
        rig.poke32(pt + page * 4, ((0x30_0000 + page * 0x1000) | P | W) as u32);
    }
    costs_nothing(&mut rig, |rig| {
        touch(rig);
        leave_paging(rig, pd, Efer::NXE);
        rig.set_cr4(Cr4::PAE, false);
        rig.set_cr0(Cr0::PG, true);
        touch(rig);
        leave_paging(rig, long_root, Efer::NXE | Efer::LME);
        rig.set_cr4(Cr4::PAE, true);
        rig.set_cr0(Cr0::PG, true);
        touch(rig);
    });
}

#[test]
fn dropped_contexts_refill_without_a_guest_walk() {
    let mut rig = long();
    touch(&mut rig);
    touch(&mut rig);
    let before = rig.mmu.stats().clone();
    rig.mmu.drop_all_contexts();
    touch(&mut rig);
    let after = rig.mmu.stats();
    assert_eq!((after.walks, after.entries_read), (before.walks, before.entries_read));
    assert!(after.refills >= before.refills + 16);
    rig.audit();
}

#[test]
fn kvms_behaviour_pays_for_each_toggle() {
    let mut rig = Rig::long_with(MmuOptions { mode: MmuMode::UnloadAlways, ..MmuOptions::default() });
    map_both(&mut rig);
    touch(&mut rig);
    let before = rig.mmu.stats().clone();
    for _ in 0..10 {
        rig.set_cr0(Cr0::WP, false);
        touch(&mut rig);
        rig.set_cr0(Cr0::WP, true);
        touch(&mut rig);
    }
    let after = rig.mmu.stats();
    assert_eq!(after.roots_built - before.roots_built, 20);
    assert!(after.refills >= before.refills + 20 * 8);
}

#[test]
fn kvms_key_builds_a_root_a_role_and_finds_it_again() {
    let mut rig = Rig::long_with(MmuOptions { kvm_role: true, ..MmuOptions::default() });
    map_both(&mut rig);
    let before = rig.mmu.stats().clone();
    costs_nothing(&mut rig, |rig| {
        rig.set_cr0(Cr0::WP, false);
        touch(rig);
        rig.set_cr0(Cr0::WP, true);
        touch(rig);
    });
    let after = rig.mmu.stats();
    assert_eq!(after.roots_built - before.roots_built, 1, "the root of WP = 0");
    assert!(after.root_hits >= before.root_hits + 20);
}

#[test]
fn fetch_stamps_come_back_unless_something_executable_was_dropped() {
    let mut rig = long();
    let first = rig.regs.cr3.raw();
    let second = rig.table();
    touch(&mut rig);
    let stamp = rig.mmu.fetch_stamp();
    // Other roots and views have other stamps, and this one comes back.
    rig.view(3, false);
    assert_ne!(rig.mmu.fetch_stamp(), stamp);
    rig.view(0, true);
    assert_eq!(rig.mmu.fetch_stamp(), stamp, "AC does not concern fetches");
    rig.set_cr0(Cr0::WP, false);
    assert_eq!(rig.mmu.fetch_stamp(), stamp, "nor does WP");
    rig.set_cr4(Cr4::SMEP, true);
    assert_ne!(rig.mmu.fetch_stamp(), stamp);
    rig.set_cr4(Cr4::SMEP, false);
    rig.cr3(second).expect("legal");
    assert_ne!(rig.mmu.fetch_stamp(), stamp);
    rig.cr3(first).expect("legal");
    assert_eq!(rig.mmu.fetch_stamp(), stamp);
    // A page that cannot be executed.
    let data = rig.map(DATA + 0x20_0000, 0x33_0000 | P | W | XD);
    rig.write(DATA + 0x20_0000).expect("mapped");
    assert_eq!(rig.mmu.fetch_stamp(), stamp, "not present to present");
    rig.poke(data, 0);
    assert_eq!(rig.mmu.fetch_stamp(), stamp);
    // An executable one: nothing was decoded from it, then something was.
    let leaf = rig.map(CODE, 0x31_0000 | P | A);
    rig.fetch(CODE).expect("mapped");
    rig.poke(leaf, 0);
    assert_eq!(rig.mmu.fetch_stamp(), stamp);
    rig.poke(leaf, 0x31_0000 | P | A);
    rig.fetch(CODE).expect("mapped");
    let off = rig.mmu.lookup_fetch(Gva::new(CODE)).expect("just fetched");
    rig.mmu.watcher().claim(off, PageFlags::CODE);
    rig.cr3(second).expect("legal");
    rig.poke(leaf, 0);
    rig.cr3(first).expect("legal");
    assert_ne!(rig.mmu.fetch_stamp(), stamp, "dropped while another root was selected");
    assert_eq!(rig.mmu.lookup_fetch(Gva::new(CODE)), None);
}
