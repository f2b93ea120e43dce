//! Scenarios 28 to 48: CR0.PG, modes and PDPTEs. (41 and 45 are with the writes that are refused.)

use crate::support::*;
use umbra_arch::Gva;
use umbra_arch::control::{ControlRegs, Cr0, Cr3, Cr4, Efer};
use umbra_arch::paging::{Access, AccessKind};

const VA: u64 = 0x40_0000;
const PAGE: u64 = 0x30_0000;
const OTHER: u64 = 0x31_0000;

fn at(rig: &mut Rig, gva: u64) -> u64 {
    rig.read(gva).unwrap_or_else(|fault| panic!("{fault}")).raw()
}

/// PAE paging with VA at PAGE: addresses of the PDPT and of the PD.
fn pae() -> (Rig, u64, u64) {
    let mut rig = Rig::new();
    let (pdpt, pd, pt) = (rig.table(), rig.table(), rig.table());
    rig.poke(pdpt, pd | P);
    rig.poke(pd + (VA >> 21) * 8, pt | PWU);
    rig.poke(pt, PAGE | PWU);
    rig.set_cr4(Cr4::PAE, true);
    rig.cr3(pdpt).expect("legal");
    rig.set_cr0(Cr0::PG, true);
    (rig, pdpt, pd)
}

/// Another PD for the same addresses, with VA at OTHER.
fn other_pd(rig: &mut Rig) -> u64 {
    let (pd, pt) = (rig.table(), rig.table());
    rig.poke(pd + (VA >> 21) * 8, pt | PWU);
    rig.poke(pt, OTHER | PWU);
    pd
}

#[test]
fn scenario_28_tables_changed_while_paging_was_off() {
    for global in [0, G] {
        let mut rig = Rig::long();
        rig.set_cr4(Cr4::PGE, true);
        let leaf = rig.map(VA, PAGE | PWU | global);
        assert_eq!(at(&mut rig, VA), PAGE);
        let flushes = rig.mmu.stats().flushes_all;
        rig.set_cr0(Cr0::PG, false);
        assert_eq!(rig.mmu.stats().flushes_all, flushes + 1);
        rig.store64(leaf, OTHER | PWU | global).expect("paging is off");
        rig.set_cr0(Cr0::PG, true);
        assert_eq!(at(&mut rig, VA), OTHER);
        rig.audit();
    }
}

#[test]
fn scenario_29_no_stale_root_by_a_later_no_flush_load() {
    let mut rig = Rig::long();
    let leaf = rig.map(VA, PAGE | PWU);
    let root = rig.regs.cr3.raw();
    assert_eq!(at(&mut rig, VA), PAGE);
    let empty = rig.table();
    rig.cr3(empty).expect("legal");
    rig.set_cr0(Cr0::PG, false);
    rig.store64(leaf, OTHER | PWU).expect("paging is off");
    rig.set_cr0(Cr0::PG, true);
    rig.set_cr4(Cr4::PCIDE, true);
    rig.cr3(root | Cr3::NO_FLUSH).expect("legal");
    assert_eq!(at(&mut rig, VA), OTHER);
}

#[test]
fn scenario_30_paging_off_ignores_everything_else() {
    let mut rig = Rig::new();
    let built = rig.mmu.stats().roots_built;
    for cr4 in [Cr4::PAE, Cr4::PSE | Cr4::SMEP | Cr4::SMAP, Cr4::PKE | Cr4::LA57, CR4_ALL & !Cr4::PCIDE & !Cr4::CET] {
        rig.cr4(cr4).expect("legal");
        rig.efer(Efer::NXE | Efer::LME).expect("legal");
        rig.set_cr0(Cr0::WP, cr4 & Cr4::PAE == 0);
        rig.mmu.set_pkru(!0);
        assert_eq!(all_six(&mut rig, 0x1_2345), [0; 6]);
        assert_eq!(at(&mut rig, 0x1_2345), 0x1_2345);
    }
    assert_eq!((rig.mmu.stats().roots_built, rig.mmu.stats().role_changes), (built, 0));
}

fn to_pae(rig: &mut Rig, pdpt: u64) {
    rig.set_cr0(Cr0::PG, false);
    rig.efer(Efer::NXE).expect("legal");
    rig.cr3(pdpt).expect("legal");
    rig.set_cr0(Cr0::PG, true);
}

fn to_long(rig: &mut Rig, root: u64) {
    rig.set_cr0(Cr0::PG, false);
    rig.efer(Efer::NXE | Efer::LME).expect("legal");
    rig.cr3(root).expect("legal");
    rig.set_cr0(Cr0::PG, true);
}

#[test]
fn scenario_31_and_32_long_to_pae_and_back() {
    let mut rig = Rig::long();
    let root = rig.regs.cr3.raw();
    rig.map(VA, PAGE | PWU);
    assert_eq!(at(&mut rig, VA), PAGE);
    let pd = other_pd(&mut rig);
    let pdpt = rig.table();
    rig.poke(pdpt, pd | P);
    to_pae(&mut rig, pdpt);
    assert_eq!(at(&mut rig, VA), OTHER);
    let before = rig.mmu.stats().clone();
    to_long(&mut rig, root);
    assert_eq!(at(&mut rig, VA), PAGE);
    to_pae(&mut rig, pdpt);
    assert_eq!(at(&mut rig, VA), OTHER);
    let after = rig.mmu.stats();
    assert_eq!((after.roots_built, after.walks, after.refills), (before.roots_built, before.walks, before.refills));
    // 32: a PML4 entry is changed with paging off.
    rig.set_cr0(Cr0::PG, false);
    rig.store64(root, 0).expect("paging is off");
    to_long(&mut rig, root);
    assert_eq!(code(rig.read(VA)), Some(0));
    rig.audit();
}

#[test]
fn scenario_33_pdptes_stay_latched() {
    for (reload, cr0, cr4) in [
        (true, Cr0::CD, 0),
        (true, 0, Cr4::PGE),
        (true, 0, Cr4::PSE),
        (true, 0, Cr4::SMEP),
        (false, 0, Cr4::SMAP),
        (false, 0, Cr4::PKE),
    ] {
        let (mut rig, pdpt, _) = pae();
        assert_eq!(at(&mut rig, VA), PAGE);
        let pd = other_pd(&mut rig);
        rig.poke(pdpt, pd | P);
        assert_eq!(at(&mut rig, VA), PAGE, "latched");
        rig.set_cr0(cr0, true);
        rig.set_cr4(cr4, true);
        rig.view(0, true);
        assert_eq!(at(&mut rig, VA), if reload { OTHER } else { PAGE }, "CR0 {cr0:#x} CR4 {cr4:#x}");
        rig.audit();
    }
}

#[test]
fn scenario_34_cr3_reload_takes_the_new_pdptes() {
    let (mut rig, pdpt, pd) = pae();
    assert_eq!(at(&mut rig, VA), PAGE);
    assert_eq!(code(rig.read(VA + (1 << 30))), Some(0));
    rig.poke(pdpt + 8, pd | P);
    rig.cr3(pdpt).expect("legal");
    assert_eq!(at(&mut rig, VA + (1 << 30)), PAGE);
    let built = rig.mmu.stats().roots_built;
    rig.cr3(pdpt).expect("legal");
    assert_eq!(rig.mmu.stats().roots_built, built, "same PDPTEs, same root");
}

#[test]
fn scenario_35_bad_pdptes_change_nothing() {
    let (mut rig, _, _) = pae();
    assert_eq!(at(&mut rig, VA), PAGE);
    let bad = rig.table();
    rig.poke(bad, OTHER | P | 1 << 5);
    let stats = rig.mmu.stats().clone();
    assert_eq!(code(rig.cr3(bad).map(|()| umbra_arch::Gpa::new(0))), Some(0), "#GP(0)");
    assert_eq!(*rig.mmu.stats(), stats);
    assert_eq!(at(&mut rig, VA), PAGE);
}

#[test]
fn scenario_36_two_pdpts_in_one_page() {
    let (mut rig, pdpt, _) = pae();
    let pd = other_pd(&mut rig);
    rig.poke(pdpt + 0xe0, pd | P);
    rig.cr3(pdpt + 0xe0).expect("legal");
    assert_eq!(at(&mut rig, VA), OTHER);
    rig.cr3(pdpt | 0x1f).expect("low bits are ignored");
    assert_eq!(at(&mut rig, VA), PAGE);
}

#[test]
fn scenario_37_and_39_pae_and_pse_under_paging() {
    let mut rig = Rig::new();
    // One page read in three ways: 8-byte PDPTEs, 4-byte PDEs, and a 4 MiB PDE.
    let (pd, pt, other) = (rig.table(), rig.table(), rig.table());
    rig.poke32(pd + (VA >> 22) * 4, (PAGE & 0xffc0_0000 | pt & 0x003f_f000 | PWU | PS) as u32);
    rig.poke32(pd + (VA >> 22) * 4, (pt | PWU | PS) as u32);
    rig.poke32(pt, (OTHER | PWU) as u32);
    rig.cr3(pd).expect("legal");
    rig.set_cr0(Cr0::PG, true);
    assert_eq!(at(&mut rig, VA), OTHER, "PSE = 0: PS is ignored");
    rig.set_cr4(Cr4::PSE, true);
    // pt's address has bits 21:12, reserved or high address bits in a 4 MiB entry.
    assert_eq!(code(rig.read(VA)).unwrap_or(0) & !9, 0);
    rig.poke32(pd + (VA >> 22) * 4, (PWU | PS) as u32);
    assert_eq!(at(&mut rig, VA + 0x1234), 0x1234, "PSE = 1: 4 MiB at 0");
    rig.set_cr4(Cr4::PSE, false);
    rig.cr3(pd).expect("legal");
    assert_ne!(rig.read(VA + 0x1234).map(|gpa| gpa.raw()), Ok(0x1234), "PSE = 0: a table at 0");
    // 37: PAE 0 -> 1 with paging on loads PDPTEs from the same page.
    rig.poke(pd, other | P);
    let built = rig.mmu.stats().roots_built;
    let flushes = rig.mmu.stats().flushes_pcid;
    rig.set_cr4(Cr4::PAE, true);
    assert_eq!(rig.mmu.stats().flushes_pcid, flushes + 1);
    assert_eq!(rig.mmu.stats().roots_built, built + 1);
    assert_eq!(code(rig.read(VA)), Some(0));
    rig.audit();
}

#[test]
fn scenario_38_pae_cannot_be_cleared_in_long_mode() {
    let mut rig = Rig::long();
    let before = rig.mmu.stats().clone();
    assert!(rig.cr4(rig.regs.cr4.raw() & !Cr4::PAE).is_err());
    assert_eq!(*rig.mmu.stats(), before);
}

#[test]
fn scenario_40_4m_pages() {
    let mut rig = Rig::new();
    rig.set_cr4(Cr4::PSE, true);
    let pd = rig.table();
    let pde = pd + (VA >> 22) * 4;
    rig.cr3(pd).expect("legal");
    rig.set_cr0(Cr0::PG, true);
    rig.poke32(pde, (PWU | PS | 1 << 21) as u32);
    assert_eq!(code(rig.read(VA)), Some(9));
    rig.poke32(pde, (PWU | PS | 1 << 13) as u32);
    assert_eq!(at(&mut rig, VA + 0x1000), 0x1_0000_1000);
    rig.set_cr4(Cr4::PSE, false);
    rig.poke32(pde, (PWU | PS | 1 << 21) as u32);
    assert_ne!(code(rig.read(VA)).unwrap_or(0) & 8, 8, "PSE = 0: nothing is reserved");
}

#[test]
fn scenario_42_four_and_five_levels() {
    let mut rig = Rig::long();
    let root = rig.regs.cr3.raw();
    rig.map(VA, PAGE | PWU);
    // Read as a PML5, the same page leads to the PDPT as PML4, and so on: other tables are needed.
    let five = rig.entry_at(root, 5, 1, VA | 1 << 48, PWU);
    rig.poke(five, OTHER | PWU);
    assert_eq!(at(&mut rig, VA), PAGE);
    rig.set_cr0(Cr0::PG, false);
    rig.set_cr4(Cr4::LA57, true);
    rig.set_cr0(Cr0::PG, true);
    assert_eq!(at(&mut rig, VA | 1 << 48), OTHER);
    rig.mmu.invlpg(Gva::new(VA));
    let before = rig.mmu.stats().clone();
    rig.set_cr0(Cr0::PG, false);
    rig.set_cr4(Cr4::LA57, false);
    rig.set_cr0(Cr0::PG, true);
    assert_eq!(at(&mut rig, VA), PAGE);
    assert_eq!((rig.mmu.stats().roots_built, rig.mmu.stats().walks), (before.roots_built, before.walks));
    rig.audit();
}

#[test]
fn scenario_43_cet_and_wp_in_order() {
    let mut rig = Rig::long();
    rig.map(VA, PAGE | P);
    rig.set_cr4(Cr4::CET, true);
    assert!(rig.cr0(rig.regs.cr0.raw() & !Cr0::WP).is_err());
    let built = rig.mmu.stats().roots_built;
    for _ in 0..3 {
        rig.set_cr4(Cr4::CET, false);
        rig.set_cr0(Cr0::WP, false);
        rig.write(VA).expect("WP = 0");
        rig.set_cr0(Cr0::WP, true);
        rig.set_cr4(Cr4::CET, true);
        assert_eq!(code(rig.write(VA)), Some(3));
    }
    assert_eq!(rig.mmu.stats().roots_built, built);
}

#[test]
fn scenario_44_and_46_host_writes_of_any_kind() {
    let mut rig = Rig::long();
    rig.map(VA, PAGE | PWU);
    assert_eq!(at(&mut rig, VA), PAGE);
    let old = rig.regs;
    // LME flipped by the host with paging on; PCIDE without LMA; LMA without anything.
    let efers = [0, Efer::LME, Efer::LMA, Efer::LME | Efer::LMA | Efer::NXE];
    let cr4s = [0, Cr4::PAE, Cr4::PAE | Cr4::PCIDE, Cr4::PCIDE | Cr4::PSE, CR4_ALL];
    for (efer, cr4) in efers.into_iter().flat_map(|e| cr4s.map(|c| (e, c))) {
        let regs = ControlRegs { efer: Efer::new(efer), cr4: Cr4::new(cr4), ..old };
        rig.regs = regs;
        rig.mmu.reset_to(&regs);
        for kind in [AccessKind::Read, AccessKind::Write, AccessKind::Fetch] {
            let access = Access::explicit(kind, 0);
            let peeked = rig.mmu.peek(Gva::new(VA), access);
            assert_eq!(rig.mmu.translate(Gva::new(VA), access), peeked);
        }
        rig.audit();
    }
    rig.regs = old;
    rig.mmu.reset_to(&old);
    assert_eq!(at(&mut rig, VA), PAGE);
}

#[test]
fn scenario_47_given_pdptes_are_used_until_reloaded() {
    let (mut rig, pdpt, pd) = pae();
    let other = other_pd(&mut rig);
    let mut regs = rig.regs;
    regs.pdpte[0] = other | P;
    rig.regs = regs;
    rig.mmu.reset_to(&regs);
    assert_eq!(at(&mut rig, VA), OTHER);
    assert_eq!(rig.peek64(pdpt), pd | P);
    rig.cr3(pdpt).expect("legal");
    assert_eq!(at(&mut rig, VA), PAGE);
}

#[test]
fn scenario_48_init_and_new_tables_at_the_same_cr3() {
    let mut rig = Rig::long();
    let root = rig.regs.cr3.raw();
    let leaf = rig.map(VA, PAGE | PWU);
    assert_eq!(at(&mut rig, VA), PAGE);
    let init = ControlRegs { cr0: Cr0::new(Cr0::ET | Cr0::CD | Cr0::NW), ..ControlRegs::default() };
    rig.regs = init;
    rig.mmu.reset_to(&init);
    assert_eq!(at(&mut rig, leaf), leaf);
    rig.store64(leaf, OTHER | PWU).expect("paging is off");
    rig.cr0(Cr0::PE | Cr0::ET).expect("legal");
    rig.enter_long(root);
    assert_eq!(at(&mut rig, VA), OTHER);
}
