//! The hazards of a shadow MMU that never unloads: what KVM's role words leave out, and what goes wrong when roots of
//! several modes live side by side.

use crate::support::*;
use umbra_arch::control::{ControlLimits, Cr0, Cr4, Efer};
use umbra_arch::{Fault, Gpa, Gva};
use umbra_mmu::format::Format;

const VA: u64 = 0x40_0000;
const PAGE: u64 = 0x30_0000;
const OTHER: u64 = 0x31_0000;

fn raw(result: Result<Gpa, Fault>) -> u64 {
    result.unwrap_or_else(|fault| panic!("{fault}")).raw()
}

/// By way of paging off into another mode: CR4 bits PAE, PSE and LA57, EFER, CR3.
fn switch(rig: &mut Rig, cr4: u64, efer: u64, cr3: u64) {
    rig.set_cr0(Cr0::PG, false);
    let kept = rig.regs.cr4.raw() & !(Cr4::PAE | Cr4::PSE | Cr4::LA57);
    rig.cr4(kept | cr4).expect("paging is off");
    rig.efer(efer).expect("paging is off");
    rig.cr3(cr3).expect("paging is off");
    rig.set_cr0(Cr0::PG, true);
}

const LONG: u64 = Efer::LME | Efer::NXE;

#[test]
fn hazard_h1_nxe_is_in_the_page_role() {
    let mut rig = Rig::long();
    let root = rig.regs.cr3.raw();
    let pde = rig.entry_at(root, 4, 2, VA, PWU);
    // Bit 63 in a leaf, then in a link.
    let leaf = rig.map(VA, PAGE | PWU | XD);
    for at in [leaf, pde] {
        let entry = rig.peek64(at);
        rig.poke(leaf, PAGE | PWU);
        rig.poke(at, entry | XD);
        for _ in 0..2 {
            rig.set_nxe(true);
            assert_eq!(raw(rig.read(VA)), PAGE);
            assert_eq!(code(rig.fetch(VA)), Some(0x11));
            rig.set_nxe(false);
            rig.cr3(root).expect("legal");
            assert_eq!(rig.mmu.lookup_read(Gva::new(VA), 1), None);
            assert_eq!(all_six(&mut rig, VA), [0xd, 0xf, 0xd, 9, 0xb, 9]);
            rig.audit();
        }
        rig.poke(at, entry & !XD);
        // Both readings agree on this one: two roots, each found again.
        raw(rig.fetch(VA));
        rig.set_nxe(true);
        raw(rig.fetch(VA));
    }
    let before = rig.mmu.stats().clone();
    for on in [false, true, false, true] {
        rig.set_nxe(on);
        raw(rig.fetch(VA));
    }
    let after = rig.mmu.stats();
    assert_eq!((after.walks, after.roots_built), (before.walks, before.roots_built));
}

#[test]
fn hazard_h2_pse_is_in_the_page_role_of_2_level_paging() {
    let mut rig = Rig::new();
    let pd = rig.table();
    // A table at 4 MiB, so that the entry is legal both ways.
    let table = 0x40_0000;
    rig.poke32(table + 4, (PAGE | PWU) as u32);
    rig.poke32(pd + 4, (table | PWU | PS) as u32);
    rig.cr3(pd).expect("legal");
    rig.set_cr0(Cr0::PG, true);
    let linear = (1 << 22) + 0x1000;
    for _ in 0..3 {
        rig.set_cr4(Cr4::PSE, true);
        assert_eq!(raw(rig.read(linear)), table + 0x1000);
        rig.set_cr4(Cr4::PSE, false);
        rig.cr3(pd).expect("legal");
        assert_eq!(raw(rig.read(linear)), PAGE);
        rig.audit();
    }
    assert_eq!(rig.mmu.stats().walks, 2, "each reading once");
}

#[test]
fn hazard_h3_each_root_has_its_own_level() {
    let mut rig = Rig::long();
    let four = rig.regs.cr3.raw();
    let leaf = rig.map(VA, PAGE | PWU);
    assert_eq!(raw(rig.read(VA)), PAGE);
    let five = rig.table();
    let leaf5 = rig.entry_at(five, 5, 1, VA, PWU);
    rig.poke(leaf5, PAGE | PWU);
    let (pd, pt) = (rig.table(), rig.table());
    rig.poke32(pd + (VA >> 22) * 4, (pt | PWU) as u32);
    rig.poke32(pt, (PAGE | PWU) as u32);
    let modes = [(Cr4::PAE, LONG, four), (Cr4::PAE | Cr4::LA57, LONG, five), (0, Efer::NXE, pd)];
    for (cr4, efer, cr3) in modes {
        switch(&mut rig, cr4, efer, cr3);
        assert_eq!(raw(rig.read(VA)), PAGE);
    }
    // While each of the others is in force, INVLPG and an edit of one's leaf: that root's entry goes, at its address.
    for (edited, entry) in [(0, leaf), (1, leaf5), (2, pt)] {
        for other in (0..3).filter(|&other| other != edited) {
            for frame in [OTHER, PAGE] {
                let (cr4, efer, cr3) = modes[other];
                switch(&mut rig, cr4, efer, cr3);
                assert_eq!(raw(rig.read(VA)), PAGE);
                if edited == 2 {
                    rig.poke32(entry, (frame | PWU) as u32);
                } else {
                    rig.poke(entry, frame | PWU);
                }
                rig.mmu.invlpg(Gva::new(VA));
                rig.audit();
                let (cr4, efer, cr3) = modes[edited];
                switch(&mut rig, cr4, efer, cr3);
                assert_eq!(rig.mmu.lookup_read(Gva::new(VA), 1), None);
                assert_eq!(raw(rig.read(VA)), frame);
            }
        }
    }
}

/// As before with a directory entry, whose reach depends on the format.
#[test]
fn hazard_h3_a_directory_entry_reaches_as_far_as_in_its_own_format() {
    let mut rig = Rig::long();
    let long = rig.regs.cr3.raw();
    let far = VA + (3 << 21);
    let pde = rig.entry_at(long, 4, 2, far, PWU);
    let tables = [PAGE, OTHER].map(|frame| {
        let table = rig.table();
        rig.poke(table, frame | PWU);
        table
    });
    let pd = rig.table();
    for (entry, mapped) in [
        (tables[0] | PWU | A, PAGE),
        (tables[1] | PWU | A, OTHER),
        (0x60_0000 | PWU | PS, 0x60_0000),
        (0x40_0000 | PWU | PS, 0x40_0000),
        (tables[0] | PWU | A, PAGE),
    ] {
        switch(&mut rig, 0, Efer::NXE, pd);
        rig.poke(pde, entry);
        rig.audit();
        switch(&mut rig, Cr4::PAE, LONG, long);
        assert_eq!(rig.mmu.lookup_read(Gva::new(far), 1), None);
        assert_eq!(raw(rig.read(far)), mapped);
    }
}

#[test]
fn hazard_h4_an_entry_is_judged_by_its_own_pages_role() {
    let mut rig = Rig::long();
    let root = rig.regs.cr3.raw();
    let leaf = rig.map(VA, PAGE | PWU);
    raw(rig.fetch(VA));
    // Under NXE = 0, where bit 63 is reserved, the entry of the other role gets it.
    rig.set_nxe(false);
    raw(rig.fetch(VA));
    rig.poke(leaf, PAGE | PWU | XD);
    rig.mmu.invlpg(Gva::new(VA));
    assert_eq!(code(rig.read(VA)), Some(9));
    rig.audit();
    rig.set_nxe(true);
    assert_eq!(raw(rig.read(VA)), PAGE);
    assert_eq!(code(rig.fetch(VA)), Some(0x11));
    // And under 2-level paging, where there are no reserved bits at all.
    let pd = rig.table();
    switch(&mut rig, 0, Efer::NXE, pd);
    rig.poke(leaf, PAGE | PWU | 1 << 51);
    rig.mmu.invlpg(Gva::new(VA));
    rig.audit();
    switch(&mut rig, Cr4::PAE, LONG, root);
    assert_eq!(code(rig.read(VA)), Some(9));
}

#[test]
fn hazard_h5_a_full_flush_needs_no_synchronisation_of_old_roots() {
    let mut rig = Rig::long();
    let roots: Vec<u64> = (0..3).map(|_| rig.table()).collect();
    let leaves: Vec<u64> = roots
        .iter()
        .map(|&root| {
            rig.cr3(root).expect("legal");
            let leaf = rig.map(VA, PAGE | PWU | G);
            raw(rig.read(VA));
            leaf
        })
        .collect();
    leaves.iter().for_each(|&leaf| rig.poke(leaf, OTHER | PWU | G));
    let pd = rig.table();
    switch(&mut rig, 0, Efer::NXE, pd);
    rig.set_cr4(Cr4::PGE, true);
    rig.audit();
    let freed = rig.mmu.stats().roots_freed;
    for &root in &roots {
        switch(&mut rig, Cr4::PAE, LONG, root);
        assert_eq!(raw(rig.read(VA)), OTHER);
    }
    assert_eq!(rig.mmu.stats().roots_freed, freed, "kept, and fresh");
    assert_eq!(rig.mmu.stats().dropped_by_flush, 0);
}

#[test]
fn hazard_h6_pae_and_2_level_roots_are_found_again() {
    let mut rig = Rig::long();
    let long = rig.regs.cr3.raw();
    rig.map(VA, PAGE | PWU);
    let (pd2, pt2) = (rig.table(), rig.table());
    rig.poke32(pd2 + (VA >> 22) * 4, (pt2 | PWU) as u32);
    rig.poke32(pt2, (PAGE | PWU) as u32);
    // Two sets of PDPTEs: one CR3, told apart by what was loaded.
    let (pdpt, pds) = (rig.table(), [rig.table(), rig.table()]);
    for (pd, frame) in pds.into_iter().zip([PAGE, OTHER]) {
        let pt = rig.table();
        rig.poke(pd + (VA >> 21) * 8, pt | PWU);
        rig.poke(pt, frame | PWU);
    }
    let round = |rig: &mut Rig| {
        for (pd, frame) in pds.into_iter().zip([PAGE, OTHER]) {
            rig.poke(pdpt, pd | P);
            switch(rig, Cr4::PAE, Efer::NXE, pdpt);
            assert_eq!(raw(rig.read(VA)), frame);
        }
        switch(rig, 0, Efer::NXE, pd2);
        assert_eq!(raw(rig.read(VA)), PAGE);
        switch(rig, Cr4::PAE, LONG, long);
        assert_eq!(raw(rig.read(VA)), PAGE);
    };
    round(&mut rig);
    let before = rig.mmu.stats().clone();
    (0..5).for_each(|_| round(&mut rig));
    let after = rig.mmu.stats();
    assert_eq!(
        (after.roots_built, after.walks, after.refills, after.pages_allocated),
        (before.roots_built, before.walks, before.refills, before.pages_allocated)
    );
}

#[test]
fn hazard_h7_nxe_is_not_reported_in_2_level_paging() {
    let mut rig = Rig::new();
    let pd = rig.table();
    rig.efer(Efer::NXE).expect("legal");
    rig.cr3(pd).expect("legal");
    rig.set_cr0(Cr0::PG, true);
    assert_eq!(all_six(&mut rig, VA), [4, 6, 4, 0, 2, 0]);
    assert_eq!(code(rig.fetch(VA)), Some(0));
    rig.set_cr4(Cr4::SMEP, true);
    assert_eq!(code(rig.fetch(VA)), Some(0x10));
}

#[test]
fn hazard_h8_cpuid_changes_count_at_once_without_a_change_of_role() {
    let mut rig = Rig::long();
    let root = rig.regs.cr3.raw();
    rig.map(VA, 0x8_0000_0000 | PWU);
    let pdpte = rig.entry_at(root, 4, 3, 1 << 30, PWU);
    rig.poke(pdpte, PWU | PS);
    rig.map(VA + 0x1000, PAGE | PWU);
    let roles = rig.mmu.stats().role_changes;
    for _ in 0..2 {
        assert_eq!(raw(rig.read(VA)), 0x8_0000_0000);
        assert_eq!(raw(rig.read(1 << 30 | PAGE)), PAGE);
        assert_eq!(raw(rig.read(VA + 0x1000)), PAGE);
        rig.mmu.set_limits(ControlLimits { maxphyaddr: 34, ..LIMITS });
        assert_eq!(code(rig.read(VA)), Some(9));
        assert_eq!(raw(rig.read(VA + 0x1000)), PAGE);
        rig.mmu.set_format(Format { gib_pages: false, ..Format::intel(40) });
        assert_eq!(rig.mmu.lookup_read(Gva::new(1 << 30 | PAGE), 1), None);
        assert_eq!(code(rig.read(1 << 30 | PAGE)), Some(9));
        rig.mmu.set_format(Format::intel(40));
        rig.audit();
    }
    assert_eq!(rig.mmu.stats().role_changes, roles);
}
