//! Scenarios 24 to 27, 41 and 45: writes of CR0, CR4 and EFER that are refused change nothing, those that are legal do
//! what they say. (Which are legal is enumerated by `umbra-arch`.)

use crate::support::*;
use umbra_arch::control::{CodeContext, Cr0, Cr4, Efer};

const VA: u64 = 0x40_0000;
const PAGE: u64 = 0x30_0000;
const OTHER: u64 = 0x31_0000;

/// Refused, and neither registers nor the MMU's state moved.
fn refused(rig: &mut Rig, what: &str, write: impl FnOnce(&mut Rig) -> bool) {
    let (regs, stats) = (rig.regs, rig.mmu.stats().clone());
    assert!(!write(rig), "{what}");
    assert_eq!((rig.regs, rig.mmu.stats()), (regs, &stats), "{what}");
    rig.audit();
}

#[test]
fn scenario_24_long_mode_needs_pae() {
    let mut rig = Rig::new();
    rig.efer(Efer::LME).expect("paging is off");
    refused(&mut rig, "PG with LME and without PAE", |rig| rig.cr0(rig.regs.cr0.raw() | Cr0::PG).is_ok());
    assert!(!rig.regs.efer.lma() && rig.regs.efer.lme());
}

#[test]
fn scenario_25_long_mode_is_not_entered_from_64_bit_code_or_with_a_16_bit_tss() {
    for (cs_long, tss16) in [(true, false), (false, true), (false, false)] {
        let mut rig = Rig::new();
        rig.set_cr4(Cr4::PAE, true);
        rig.efer(Efer::LME).expect("paging is off");
        let code = CodeContext { cs_long, tss16 };
        let write = |rig: &Rig| rig.regs.write_cr0(rig.regs.cr0.raw() | Cr0::PG, code, &rig.limits, &mut |_| [0; 4]);
        if cs_long || tss16 {
            refused(&mut rig, "CS.L or a 16-bit TSS", |rig| write(rig).is_ok());
        } else {
            assert!(write(&rig).expect("legal").regs.efer.lma());
        }
    }
}

#[test]
fn scenario_26_bad_pdptes_keep_paging_off() {
    let high: Vec<u32> = (u32::from(LIMITS.maxphyaddr)..64).collect();
    for bit in [1, 2, 5, 6, 7, 8].into_iter().chain(high) {
        for at in 0..4 {
            let mut rig = Rig::new();
            let pdpt = rig.table();
            rig.set_cr4(Cr4::PAE, true);
            rig.cr3(pdpt).expect("paging is off");
            rig.poke(pdpt + 8 * at, PAGE | P | 1 << bit);
            refused(&mut rig, "reserved bits", |rig| rig.cr0(rig.regs.cr0.raw() | Cr0::PG).is_ok());
            // The same bits without P mean nothing.
            rig.poke(pdpt + 8 * at, PAGE | 1 << bit);
            rig.set_cr0(Cr0::PG, true);
            assert_eq!(code(rig.read(at << 30)), Some(0));
        }
    }
}

#[test]
fn scenario_27_leaving_long_mode() {
    let mut rig = Rig::long();
    let leaf = rig.map(VA, PAGE | PWU);
    assert_eq!(rig.read(VA).map(|gpa| gpa.raw()), Ok(PAGE));
    let off = |rig: &mut Rig| rig.cr0(rig.regs.cr0.raw() & !Cr0::PG).is_ok();
    rig.cs_long = true;
    refused(&mut rig, "from 64-bit code", off);
    rig.cs_long = false;
    rig.set_cr4(Cr4::PCIDE, true);
    refused(&mut rig, "with PCIDE", off);
    rig.set_cr4(Cr4::PCIDE, false);
    let flushes = rig.mmu.stats().flushes_all;
    assert!(off(&mut rig));
    assert!(!rig.regs.efer.lma());
    assert_eq!(rig.mmu.stats().flushes_all, flushes + 1);
    rig.store64(leaf, OTHER | PWU).expect("paging is off");
    rig.set_cr0(Cr0::PG, true);
    assert_eq!(rig.read(VA).map(|gpa| gpa.raw()), Ok(OTHER));
}

#[test]
fn scenario_41_la57_changes_outside_long_mode_only() {
    let mut rig = Rig::long();
    rig.map(VA, PAGE | PWU);
    rig.read(VA).expect("mapped");
    for with in [0, Cr4::PSE, Cr4::PGE] {
        refused(&mut rig, "LA57 in long mode", |rig| rig.cr4(rig.regs.cr4.raw() ^ (Cr4::LA57 | with)).is_ok());
    }
    rig.set_cr0(Cr0::PG, false);
    rig.set_cr4(Cr4::LA57, true);
    rig.set_cr0(Cr0::PG, true);
    refused(&mut rig, "LA57 cleared in long mode", |rig| rig.cr4(rig.regs.cr4.raw() & !Cr4::LA57).is_ok());
}

#[test]
fn scenario_45_lma_is_not_written() {
    let mut rig = Rig::long();
    rig.map(VA, PAGE | PWU);
    rig.read(VA).expect("mapped");
    let stats = rig.mmu.stats().clone();
    rig.efer(rig.regs.efer.raw() & !Efer::LMA).expect("ignored");
    assert!(rig.regs.efer.lma());
    rig.read(VA).expect("still mapped");
    assert_eq!((rig.mmu.stats().walks, rig.mmu.stats().role_changes), (stats.walks, stats.role_changes));
    let mut off = Rig::new();
    off.efer(Efer::LMA).expect("ignored");
    assert!(!off.regs.efer.lma());
}
