//! Scenarios 49 to 63: CR3, PCIDs, global pages, invalidation. Where hardware may be stale, the fresh
//! value is demanded.

use crate::support::*;
use umbra_arch::Gva;
use umbra_arch::control::{Cr3, Cr4};
use umbra_arch::paging::{Access, AccessKind};

const VA: u64 = 0x40_0000;
const PAGE: u64 = 0x30_0000;
const OTHER: u64 = 0x31_0000;

fn at(rig: &mut Rig, gva: u64) -> u64 {
    rig.read(gva).unwrap_or_else(|fault| panic!("{fault}")).raw()
}

/// Two address spaces A and B with VA at PAGE and at OTHER, PCIDs on; the leaf entry of A.
fn two_spaces(global: u64) -> (Rig, u64, u64, u64) {
    let mut rig = Rig::long();
    let a = rig.regs.cr3.raw();
    let leaf = rig.map(VA, PAGE | PWU | global);
    let b = rig.table();
    rig.cr3(b).expect("legal");
    rig.map(VA, OTHER | PWU);
    rig.cr3(a).expect("legal");
    rig.set_cr4(Cr4::PGE, true);
    rig.set_cr4(Cr4::PCIDE, true);
    (rig, a | 1, b | 2, leaf)
}

#[test]
fn scenario_49_illegal_cr3_changes_nothing() {
    let mut rig = Rig::long();
    rig.map(VA, PAGE | PWU);
    let before = rig.mmu.stats().clone();
    assert!(rig.cr3(1 << 40).is_err());
    assert!(rig.cr3(rig.regs.cr3.raw() | Cr3::NO_FLUSH).is_err());
    assert_eq!(*rig.mmu.stats(), before);
    rig.set_cr4(Cr4::PCIDE, true);
    rig.cr3(rig.regs.cr3.raw() | Cr3::NO_FLUSH).expect("PCIDE = 1");
    assert_eq!(rig.regs.cr3.raw() & Cr3::NO_FLUSH, 0);
    assert_eq!(at(&mut rig, VA), PAGE);
}

#[test]
fn scenario_50_and_51_pcide_and_old_roots() {
    let mut rig = Rig::long();
    let a = rig.regs.cr3.raw();
    let leaf = rig.map(VA, PAGE | PWU);
    assert_eq!(at(&mut rig, VA), PAGE);
    rig.poke(leaf, OTHER | PWU);
    let b = rig.table();
    rig.cr3(b).expect("legal");
    let flushes = rig.mmu.stats().flushes_none;
    rig.set_cr4(Cr4::PCIDE, true);
    assert_eq!(rig.mmu.stats().flushes_none, flushes + 1);
    rig.cr3(a | Cr3::NO_FLUSH).expect("legal");
    assert_eq!(at(&mut rig, VA), OTHER);
}

#[test]
fn scenario_52_pcide_off_and_on_again() {
    let (mut rig, a, b, leaf) = two_spaces(G);
    rig.cr3(a).expect("legal");
    assert_eq!(at(&mut rig, VA), PAGE);
    rig.cr3(b & !0xfff).expect("legal");
    let flushes = rig.mmu.stats().flushes_all;
    rig.set_cr4(Cr4::PCIDE, false);
    assert_eq!(rig.mmu.stats().flushes_all, flushes + 1);
    rig.poke(leaf, OTHER | PWU | G);
    rig.set_cr4(Cr4::PCIDE, true);
    rig.cr3(a | Cr3::NO_FLUSH).expect("legal");
    assert_eq!(at(&mut rig, VA), OTHER);
}

#[test]
fn scenario_53_to_55_no_flush_switches() {
    type Invalidate = fn(&mut Rig);
    let ways: [Invalidate; 6] = [
        |_| {},
        |rig| rig.mmu.invpcid(0, 1, Gva::new(VA)),
        |rig| rig.mmu.invpcid(1, 1, Gva::new(0)),
        |rig| rig.mmu.invpcid(2, 0, Gva::new(0)),
        |rig| rig.mmu.invpcid(3, 0, Gva::new(0)),
        |rig| rig.mmu.invlpg(Gva::new(VA)),
    ];
    for (global, invalidate) in [0, G].into_iter().flat_map(|g| ways.map(|w| (g, w))) {
        let (mut rig, a, b, leaf) = two_spaces(global);
        for cr3 in [a, b, a] {
            rig.cr3(cr3 | Cr3::NO_FLUSH).expect("legal");
            rig.read(VA).expect("mapped");
        }
        let before = rig.mmu.stats().clone();
        rig.cr3(b | Cr3::NO_FLUSH).expect("legal");
        rig.cr3(a | Cr3::NO_FLUSH).expect("legal");
        assert_eq!(at(&mut rig, VA), PAGE);
        let after = rig.mmu.stats();
        assert_eq!((after.root_hits, after.refills), (before.root_hits + 2, before.refills));
        rig.cr3(b | Cr3::NO_FLUSH).expect("legal");
        rig.poke(leaf, 0x32_0000 | PWU | global);
        invalidate(&mut rig);
        assert_eq!(at(&mut rig, VA), OTHER);
        rig.cr3(a | Cr3::NO_FLUSH).expect("legal");
        assert_eq!(at(&mut rig, VA), 0x32_0000);
        assert_eq!(rig.mmu.stats().dropped_by_flush, 0);
        rig.audit();
    }
}

#[test]
fn scenario_56_same_cr3_again() {
    let (mut rig, a, _, _) = two_spaces(0);
    rig.cr3(a).expect("legal");
    rig.read(VA).expect("mapped");
    let before = rig.mmu.stats().clone();
    rig.cr3(a).expect("legal");
    rig.read(VA).expect("mapped");
    let after = rig.mmu.stats();
    assert_eq!(after.flushes_pcid_non_global, before.flushes_pcid_non_global + 1);
    assert_eq!((after.root_misses, after.refills), (before.root_misses, before.refills));
}

#[test]
fn scenario_57_more_roots_than_the_cache_holds() {
    const ROOTS: u64 = 80;
    let mut rig = Rig::long();
    let roots: Vec<u64> = (0..ROOTS).map(|_| rig.table()).collect();
    for &root in &roots {
        rig.cr3(root).expect("legal");
        rig.map(VA, PAGE | PWU);
        rig.read(VA).expect("mapped");
    }
    let before = rig.mmu.stats().clone();
    for &root in &roots {
        rig.cr3(root).expect("legal");
        assert_eq!(at(&mut rig, VA), PAGE);
    }
    let after = rig.mmu.stats();
    assert_eq!(after.root_misses - before.root_misses, ROOTS, "a cycle longer than an LRU cache");
    assert_eq!(after.roots_freed - before.roots_freed, ROOTS);
    assert_eq!(after.pages_allocated, before.pages_allocated, "each root's shadow pages are found again");
    assert!(rig.mmu.cached_roots() < 80);
    rig.audit();
}

#[test]
fn scenario_58_pge_and_smap_in_one_write() {
    let mut rig = Rig::long();
    rig.set_cr4(Cr4::PGE, true);
    let leaf = rig.map(VA, PAGE | PWU | G);
    assert_eq!(at(&mut rig, VA), PAGE);
    rig.poke(leaf, OTHER | PWU | G);
    let flushes = rig.mmu.stats().flushes_all;
    rig.cr4(rig.regs.cr4.raw() & !Cr4::PGE | Cr4::SMAP).expect("legal");
    assert_eq!(rig.mmu.stats().flushes_all, flushes + 1);
    rig.view(0, true);
    assert_eq!(at(&mut rig, VA), OTHER);
    rig.cr4(rig.regs.cr4.raw() | Cr4::PGE | Cr4::PCIDE).expect("legal");
    assert_eq!(rig.mmu.stats().flushes_all, flushes + 2);
}

#[test]
fn scenario_59_global_pages() {
    let (mut rig, a, b, leaf) = two_spaces(G);
    rig.cr3(a).expect("legal");
    assert_eq!(at(&mut rig, VA), PAGE);
    rig.poke(leaf, OTHER | PWU | G);
    rig.cr3(a).expect("legal");
    assert_eq!(at(&mut rig, VA), OTHER);
    rig.cr3(b).expect("legal");
    rig.poke(leaf, PAGE | PWU | G);
    rig.cr3(a).expect("legal");
    assert_eq!(at(&mut rig, VA), PAGE);
}

#[test]
fn scenario_60_not_present_to_present() {
    let mut rig = Rig::long();
    let leaf = rig.map(VA, 0);
    assert_eq!(code(rig.read(VA)), Some(0));
    rig.poke(leaf, PAGE | PWU);
    assert_eq!(at(&mut rig, VA), PAGE);
    // A table linked at a second PDE, changed meanwhile.
    let root = rig.regs.cr3.raw();
    let second = VA + (1 << 21);
    let pde = rig.entry_at(root, 4, 2, VA, PWU);
    let pde2 = rig.entry_at(root, 4, 2, second, PWU);
    assert_eq!(code(rig.read(second)), Some(0));
    rig.poke(leaf, OTHER | PWU);
    rig.poke(pde2, rig.peek64(pde));
    assert_eq!(at(&mut rig, second), OTHER);
    assert_eq!(at(&mut rig, VA), OTHER);
    // And changed through both at once.
    rig.poke(leaf, PAGE | PWU);
    assert_eq!((at(&mut rig, VA), at(&mut rig, second)), (PAGE, PAGE));
    rig.audit();
}

#[test]
fn scenario_61_read_only_to_writable() {
    let mut rig = Rig::long();
    let leaf = rig.map(VA, PAGE | P | U);
    rig.read(VA).expect("mapped");
    assert_eq!(code(rig.write(VA)), Some(3));
    rig.poke(leaf, rig.peek64(leaf) | W);
    rig.write(VA).expect("no spurious fault");
}

#[test]
fn scenario_62_present_to_not_present() {
    let mut rig = Rig::long();
    let leaf = rig.map(VA, PAGE | PWU);
    for kind in [AccessKind::Read, AccessKind::Write, AccessKind::Fetch] {
        rig.access(VA, Access::explicit(kind, 0)).expect("mapped");
    }
    rig.poke(leaf, 0);
    rig.mmu.invlpg(Gva::new(VA));
    assert_eq!(all_six(&mut rig, VA), [4, 6, 0x14, 0, 2, 0x10]);
    assert_eq!(code(rig.read(VA)), Some(0));
}

#[test]
fn scenario_63_invalidations_are_counted_by_scope() {
    let mut rig = Rig::long();
    let before = rig.mmu.stats().clone();
    rig.mmu.invlpg(Gva::new(1 << 60));
    for kind in 0..4 {
        rig.mmu.invpcid(kind, 0, Gva::new(0));
    }
    let after = rig.mmu.stats();
    assert_eq!(after.flushes_page - before.flushes_page, 2);
    assert_eq!(after.flushes_pcid_non_global - before.flushes_pcid_non_global, 1);
    assert_eq!(after.flushes_all - before.flushes_all, 1);
    assert_eq!(after.flushes_all_non_global - before.flushes_all_non_global, 1);
}
