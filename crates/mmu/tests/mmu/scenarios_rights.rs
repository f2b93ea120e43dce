//! Scenarios 1 to 23: WP, SMEP, SMAP, NX and keys.

use crate::support::*;
use umbra_arch::control::{Cr0, Cr4};

const VA: u64 = 0x40_0000;
const PAGE: u64 = 0x30_0000;

/// One page mapped with `leaf` flags in 4-level paging.
fn mapped(leaf: u64) -> (Rig, u64) {
    let mut rig = Rig::long();
    let at = rig.map(VA, PAGE | leaf);
    (rig, at)
}

#[test]
fn scenario_01_wp_toggles_keep_the_root_and_flush_nothing() {
    let (mut rig, _) = mapped(PWU);
    rig.write(VA).expect("mapped");
    let before = rig.mmu.stats().clone();
    rig.set_cr0(Cr0::WP, false);
    rig.set_cr0(Cr0::WP, true);
    let after = rig.mmu.stats();
    assert_eq!(after.flushes_none - before.flushes_none, 2);
    assert_eq!(after.role_changes - before.role_changes, 2);
    assert_eq!((after.roots_built, after.roots_freed), (before.roots_built, before.roots_freed));
}

#[test]
fn scenario_02_a_thousand_wp_toggles_with_writes() {
    let (mut rig, _) = mapped(PWU);
    let before = rig.mmu.stats().clone();
    for _ in 0..500 {
        for wp in [false, true] {
            rig.set_cr0(Cr0::WP, wp);
            rig.write(VA).expect("writable either way");
        }
    }
    let after = rig.mmu.stats();
    assert_eq!(after.roots_built, before.roots_built);
    assert_eq!((after.entries_dropped, after.dropped_by_flush), (0, 0));
    assert!(after.refills - before.refills <= 4 && after.walks - before.walks <= 2);
}

#[test]
fn scenario_03_and_04_a_write_under_wp_0_does_not_outlive_it() {
    let (mut rig, leaf) = mapped(P | U);
    rig.set_cr0(Cr0::WP, false);
    rig.write(VA).expect("WP = 0");
    assert_eq!(rig.peek64(leaf) & (A | D), A | D);
    rig.view(3, false);
    rig.read(VA).expect("user page");
    assert_eq!(code(rig.write(VA)), Some(7));
    rig.view(0, false);
    rig.write(VA).expect("WP = 0 still");
    rig.set_cr0(Cr0::WP, true);
    assert_eq!(code(rig.write(VA)), Some(3));
    rig.audit();
}

#[test]
fn scenario_05_wp_0_with_smep() {
    let (mut rig, _) = mapped(P | U);
    rig.set_cr4(Cr4::SMEP, true);
    rig.set_cr0(Cr0::WP, false);
    assert_eq!(all_six(&mut rig, VA), [0, 7, 0, 0, 0, 0x11]);
}

#[test]
fn scenario_06_smep_after_a_wp_0_write() {
    let (mut rig, _) = mapped(P | U);
    rig.set_cr0(Cr0::WP, false);
    rig.write(VA).expect("WP = 0");
    rig.fetch(VA).expect("no SMEP");
    let before = rig.mmu.stats().flushes_pcid;
    rig.set_cr4(Cr4::SMEP, true);
    assert_eq!(rig.mmu.stats().flushes_pcid, before + 1);
    assert_eq!(code(rig.fetch(VA)), Some(0x11));
}

#[test]
fn scenario_07_smap_after_a_wp_0_write() {
    let (mut rig, _) = mapped(P | U);
    rig.set_cr0(Cr0::WP, false);
    rig.write(VA).expect("WP = 0");
    rig.set_cr4(Cr4::SMAP, true);
    rig.cr3(rig.regs.cr3.raw()).expect("legal");
    assert_eq!(code(rig.read(VA)), Some(1));
    rig.view(0, true);
    rig.read(VA).expect("AC = 1");
}

#[test]
fn scenario_08_wp_toggled_while_paging_is_off() {
    let (mut rig, _) = mapped(P);
    rig.set_cr0(Cr0::PG, false);
    let roles = rig.mmu.stats().role_changes;
    rig.set_cr0(Cr0::WP, false);
    rig.set_cr0(Cr0::WP, true);
    rig.set_cr0(Cr0::WP, false);
    assert_eq!(rig.mmu.stats().role_changes, roles, "WP means nothing with paging off");
    rig.set_cr0(Cr0::PG, true);
    rig.write(VA).expect("WP = 0 holds now");
    rig.set_cr0(Cr0::WP, true);
    assert_eq!(code(rig.write(VA)), Some(3));
}

#[test]
fn scenario_09_wp_and_nxe_interleaved() {
    let (mut rig, _) = mapped(P);
    for wp in [false, true, false] {
        rig.set_cr0(Cr0::WP, wp);
        assert_eq!(code(rig.write(VA)), if wp { Some(3) } else { None });
        rig.set_nxe(false);
        assert_eq!(code(rig.write(VA)), if wp { Some(3) } else { None });
        rig.set_nxe(true);
    }
}

#[test]
fn scenario_10_dirty_bits_of_two_large_mappings_of_one_frame() {
    let mut rig = Rig::long();
    rig.set_cr0(Cr0::WP, false);
    let root = rig.regs.cr3.raw();
    let a = rig.entry_at(root, 4, 2, 0x4000_0000, PWU);
    let b = rig.entry_at(root, 4, 2, 0x4020_0000, PWU);
    rig.poke(a, 0x20_0000 | P | PS);
    rig.poke(b, 0x20_0000 | P | PS);
    rig.write(0x4000_1000).expect("WP = 0");
    assert_eq!((rig.peek64(a) & D, rig.peek64(b) & D), (D, 0));
    rig.read(0x4020_1000).expect("mapped");
    assert_eq!(rig.peek64(b) & (A | D), A);
    rig.write(0x4020_1000).expect("WP = 0");
    assert_eq!(rig.peek64(b) & D, D);
    rig.audit();
}

#[test]
fn scenario_11_nx_off_makes_bit_63_reserved() {
    let (mut rig, _) = mapped(PWU | XD);
    rig.read(VA).expect("mapped");
    rig.set_nxe(false);
    rig.cr3(rig.regs.cr3.raw()).expect("legal");
    assert_eq!(code(rig.read(VA)), Some(9));
    rig.view(3, false);
    assert_eq!(code(rig.read(VA)), Some(0xd));
    rig.set_nxe(true);
    rig.read(VA).expect("execute-disable again");
}

#[test]
fn scenario_12_nx_on() {
    let (mut rig, _) = mapped(PWU | XD);
    rig.set_nxe(false);
    assert_eq!(code(rig.read(VA)), Some(9));
    rig.set_nxe(true);
    assert_eq!(all_six(&mut rig, VA), [0, 0, 0x15, 0, 0, 0x11]);
}

#[test]
fn scenario_13_when_fetches_are_reported() {
    let mut rig = Rig::long();
    rig.view(3, false);
    for (nxe, smep, expected) in [(false, false, 4), (true, false, 0x14), (false, true, 0x14), (true, true, 0x14)] {
        rig.set_nxe(nxe);
        rig.set_cr4(Cr4::SMEP, smep);
        assert_eq!(code(rig.fetch(VA)), Some(expected), "NXE {nxe} SMEP {smep}");
    }
    // 2-level paging: NXE counts for nothing.
    let mut rig = Rig::new();
    rig.set_nxe(true);
    let pd = rig.table();
    rig.cr3(pd).expect("legal");
    rig.set_cr0(Cr0::PG, true);
    rig.view(3, false);
    assert_eq!(code(rig.fetch(VA)), Some(4));
    rig.set_cr4(Cr4::SMEP, true);
    assert_eq!(code(rig.fetch(VA)), Some(0x14));
}

#[test]
fn scenario_14_wp_0_smep_and_no_nx() {
    let (mut rig, _) = mapped(P | U);
    rig.set_nxe(false);
    rig.set_cr4(Cr4::SMEP, true);
    rig.set_cr0(Cr0::WP, false);
    rig.write(VA).expect("WP = 0");
    assert_eq!(code(rig.fetch(VA)), Some(0x11));
    rig.audit();
}

#[test]
fn scenario_15_and_16_smep_takes_effect_at_once() {
    let (mut rig, _) = mapped(PWU);
    rig.fetch(VA).expect("no SMEP");
    let before = rig.mmu.stats().clone();
    rig.set_cr4(Cr4::SMEP, true);
    assert_eq!(code(rig.fetch(VA)), Some(0x11));
    assert_eq!(rig.mmu.stats().flushes_pcid, before.flushes_pcid + 1);
    rig.set_cr4(Cr4::SMEP, false);
    rig.fetch(VA).expect("no SMEP");
    let after = rig.mmu.stats();
    assert_eq!((after.flushes_pcid, after.flushes_none), (before.flushes_pcid + 1, before.flushes_none + 1));
    assert_eq!((after.roots_built, after.walks), (before.roots_built, before.walks));
}

#[test]
fn scenario_17_smap_toggles_keep_the_root() {
    let (mut rig, _) = mapped(PWU);
    rig.read(VA).expect("no SMAP");
    let built = rig.mmu.stats().roots_built;
    rig.set_cr4(Cr4::SMAP, true);
    assert_eq!(all_six(&mut rig, VA), [0, 0, 0, 1, 3, 0]);
    rig.set_cr4(Cr4::SMAP, false);
    rig.read(VA).expect("no SMAP");
    assert_eq!(rig.mmu.stats().roots_built, built);
}

#[test]
fn scenario_18_ac_is_no_mmu_event() {
    let (mut rig, _) = mapped(PWU);
    rig.set_cr4(Cr4::SMAP, true);
    rig.view(0, true);
    rig.write(VA).expect("AC = 1");
    let before = rig.mmu.stats().clone();
    for _ in 0..4 {
        rig.view(0, false);
        assert_eq!(code(rig.read(VA)), Some(1));
        rig.view(0, true);
        rig.read(VA).expect("AC = 1");
    }
    assert_eq!(*rig.mmu.stats(), before);
}

#[test]
fn scenario_19_implicit_accesses_ignore_ac() {
    let (mut rig, _) = mapped(PWU);
    rig.set_cr4(Cr4::SMAP, true);
    rig.view(3, true);
    rig.read(VA).expect("user page");
    assert_eq!(code(rig.implicit_read(VA)), Some(1), "U/S is clear: a supervisor access");
    rig.set_cr4(Cr4::SMAP, false);
    rig.implicit_read(VA).expect("no SMAP");
}

#[test]
fn scenario_20_smap_is_not_for_fetches() {
    let (mut rig, _) = mapped(PWU);
    rig.set_cr4(Cr4::SMAP, true);
    rig.fetch(VA).expect("no SMEP");
}

#[test]
fn scenario_21_smep_looks_at_all_levels() {
    for (upper, leaf, expected) in [(PWU, P | W, None), (P | W, PWU, None), (PWU, PWU, Some(0x11))] {
        let mut rig = Rig::long();
        rig.set_cr4(Cr4::SMEP, true);
        let root = rig.regs.cr3.raw();
        let pd = rig.entry_at(root, 4, 2, VA, PWU);
        let pt = rig.table();
        rig.poke(pd, pt | upper);
        rig.poke(pt + (VA >> 12 & 511) * 8, PAGE | leaf);
        assert_eq!(code(rig.fetch(VA)), expected);
    }
}

#[test]
fn scenario_22_protection_keys() {
    const KEY: u32 = 3;
    let (mut rig, _) = mapped(PWU | u64::from(KEY) << 59);
    rig.set_cr4(Cr4::PKE, true);
    let built = rig.mmu.stats().roots_built;
    assert_eq!(all_six(&mut rig, VA), [0; 6]);
    rig.mmu.set_pkru(1 << (2 * KEY));
    assert_eq!(all_six(&mut rig, VA), [0x25, 0x27, 0, 0x21, 0x23, 0]);
    rig.mmu.set_pkru(2 << (2 * KEY));
    assert_eq!(all_six(&mut rig, VA), [0, 0x27, 0, 0, 0x23, 0]);
    rig.set_cr0(Cr0::WP, false);
    assert_eq!(all_six(&mut rig, VA), [0, 0x27, 0, 0, 0, 0]);
    rig.set_cr0(Cr0::WP, true);
    let flushes = rig.mmu.stats().flushes_none;
    rig.set_cr4(Cr4::PKE, false);
    assert_eq!(rig.mmu.stats().flushes_none, flushes + 1);
    assert_eq!(all_six(&mut rig, VA), [0; 6]);
    assert_eq!(rig.mmu.stats().roots_built, built);
    rig.audit();
}

#[test]
fn scenario_22_supervisor_keys() {
    let (mut rig, _) = mapped(P | W | 5 << 59);
    rig.set_cr4(Cr4::PKS, true);
    rig.mmu.set_pkrs(2 << 10);
    // The key denies a user write to a supervisor page too, so PK is reported with it.
    assert_eq!(all_six(&mut rig, VA), [5, 0x27, 0x15, 0, 0x23, 0]);
    rig.mmu.set_pkrs(1 << 10);
    assert_eq!(all_six(&mut rig, VA), [0x25, 0x27, 0x15, 0x21, 0x23, 0]);
}

#[test]
fn scenario_23_reserved_bits_win_over_keys() {
    let (mut rig, _) = mapped(PWU | 3 << 59 | 1 << 51);
    rig.set_cr4(Cr4::PKE, true);
    rig.mmu.set_pkru(!0);
    assert_eq!(all_six(&mut rig, VA), [0xd, 0xf, 0x1d, 9, 0xb, 0x19]);
}
