//! Scenarios 64 to 78 and 82: the shadow structure.

use crate::support::*;
use umbra_arch::control::{ControlLimits, Cr0};
use umbra_arch::{Gpa, Gva};
use umbra_memory::PageFlags;
use umbra_mmu::format::Format;

const VA: u64 = 0x40_0000;
const PAGE: u64 = 0x30_0000;
const OTHER: u64 = 0x31_0000;

fn at(rig: &mut Rig, gva: u64) -> u64 {
    rig.read(gva).unwrap_or_else(|fault| panic!("{fault}")).raw()
}

fn watched(rig: &Rig, gpa: u64) -> bool {
    let off = rig.mem.map(Gpa::new(gpa).page()).readable().expect("RAM");
    rig.mem.page_flags(off).contains(PageFlags::WATCHED)
}

#[test]
fn scenario_64_one_directory_under_two_rights() {
    for first in [0, 1] {
        let mut rig = Rig::long();
        let root = rig.regs.cr3.raw();
        let pdpte = rig.entry_at(root, 4, 3, 0, PWU);
        let leaf = rig.entry_at(root, 4, 1, VA, PWU);
        rig.poke(leaf, PAGE | PWU);
        // The second GiB is the same directory, read-only.
        rig.poke(pdpte + 8, rig.peek64(pdpte) & !W);
        rig.view(3, false);
        for turn in [first, 1 - first, first] {
            if turn == 0 {
                rig.write(VA).expect("writable path");
            } else {
                assert_eq!(code(rig.write(VA | 1 << 30)), Some(7));
                rig.read(VA | 1 << 30).expect("readable");
            }
        }
        rig.view(0, false);
        assert_eq!(code(rig.write(VA | 1 << 30)), Some(3));
        rig.audit();
    }
}

#[test]
fn scenario_65_large_page_changed_by_somebody_else_and_memory_removed() {
    let mut rig = Rig::long();
    let root = rig.regs.cr3.raw();
    let pde = rig.entry_at(root, 4, 2, VA, PWU);
    rig.poke(pde, 0x20_0000 | PWU | PS);
    assert_eq!(at(&mut rig, VA + 0x1000), 0x20_1000);
    // `poke` is a device's write.
    rig.poke(pde, 0x60_0000 | PWU | PS);
    assert_eq!(at(&mut rig, VA + 0x5000), 0x60_5000);
    assert_eq!(at(&mut rig, VA + 0x1000), 0x60_1000);
    rig.audit();
    rig.mem.remove_region(Gpa::new(0x60_0000), 0x20_0000).expect("aligned");
    rig.drain();
    assert_eq!(rig.mmu.lookup_read(Gva::new(VA + 0x5000), 1), None);
    assert_eq!(at(&mut rig, VA + 0x5000), 0x60_5000);
    rig.audit();
}

#[test]
fn scenario_66_leaf_and_table_of_one_frame_alternate() {
    let mut rig = Rig::long();
    let root = rig.regs.cr3.raw();
    let pde = rig.entry_at(root, 4, 2, VA, PWU);
    let table = 0x40_0000;
    rig.poke(table, PAGE | PWU);
    for _ in 0..3 {
        rig.poke(pde, table | PWU | PS);
        assert_eq!(at(&mut rig, VA), table);
        rig.poke(pde, table | PWU);
        assert_eq!(at(&mut rig, VA), PAGE);
        rig.audit();
    }
}

#[test]
fn scenario_66_a_link_moves_to_another_table_and_says_nothing_else_new() {
    let mut rig = Rig::long();
    let root = rig.regs.cr3.raw();
    let pde = rig.entry_at(root, 4, 2, VA, PWU);
    let tables = [PAGE, OTHER].map(|frame| {
        let table = rig.table();
        rig.poke(table, frame | PWU);
        (table, frame)
    });
    for (table, frame) in [tables[0], tables[1], tables[0], tables[1]] {
        rig.poke(pde, table | PWU | A);
        assert_eq!(at(&mut rig, VA), frame);
        rig.audit();
    }
}

#[test]
fn scenario_67_partial_and_misaligned_stores() {
    let mut rig = Rig::long();
    let leaf = rig.map(VA, PAGE | PWU);
    rig.map(VA + 0x1000, OTHER | PWU);
    let both = |rig: &mut Rig| (code(rig.write(VA)), code(rig.write(VA + 0x1000)));
    assert_eq!(both(&mut rig), (None, None));
    rig.poke_bytes(leaf, &[(rig.peek64(leaf) & !W) as u8]);
    assert_eq!(both(&mut rig), (Some(3), None));
    let new = OTHER | PWU;
    rig.poke_bytes(leaf, &(new as u32).to_le_bytes());
    rig.poke_bytes(leaf + 4, &[0; 4]);
    assert_eq!(at(&mut rig, VA), OTHER);
    // Bytes 4..8 of the first and 0..4 of the second entry.
    rig.poke_bytes(leaf + 4, &[0, 0, 0, 0, (P | U) as u8, 0, 0x30, 0]);
    assert_eq!(at(&mut rig, VA + 0x1000), PAGE);
    assert_eq!(both(&mut rig), (None, Some(3)));
    rig.audit();
}

#[test]
fn scenario_68_a_table_becomes_data_and_a_table_again() {
    let mut rig = Rig::long();
    let root = rig.regs.cr3.raw();
    let leaf = rig.map(VA, PAGE | PWU);
    let table = leaf & !0xfff;
    assert_eq!(at(&mut rig, VA), PAGE);
    assert!(watched(&rig, table));
    let data = VA + 0x20_0000;
    rig.map(data, table | PWU);
    // The guest clears the entry, unlinks the table and uses it as data.
    rig.store64(data + (leaf & 0xfff), 0).expect("mapped");
    assert_eq!(code(rig.read(VA)), Some(0));
    let pde = rig.entry_at(root, 4, 2, VA, PWU);
    rig.poke(pde, 0);
    let writes = rig.mmu.stats().table_writes;
    for i in 0..512 {
        rig.store64(data + i * 8, 0x1111 * i).expect("data");
    }
    assert!(!watched(&rig, table), "no entries left: retired");
    assert!(rig.mmu.stats().table_writes - writes < 20);
    // As a page directory, one level up.
    let pt = rig.table();
    rig.poke(pt, OTHER | PWU);
    rig.store64(data, pt | PWU).expect("data");
    let pdpte = rig.entry_at(root, 4, 3, 1 << 30, PWU);
    rig.poke(pdpte, table | PWU);
    assert_eq!(at(&mut rig, 1 << 30), OTHER);
    rig.store64(data, 0).expect("data");
    assert_eq!(code(rig.read(1 << 30)), Some(0));
    rig.audit();
}

#[test]
fn scenario_68_data_writes_to_a_forgotten_table_end_its_watch() {
    let mut rig = Rig::long();
    let leaf = rig.map(VA, PAGE | PWU);
    assert_eq!(at(&mut rig, VA), PAGE);
    let mut writes = 0;
    // Elsewhere in the table, again and again, without the table being used.
    while watched(&rig, leaf) && writes < 10_000 {
        rig.poke((leaf & !0xfff) + 0x800, writes << 1);
        writes += 1;
    }
    assert!(writes < 10_000, "still watched");
    assert_eq!(rig.mmu.stats().tables_retired, 1);
    assert_eq!(at(&mut rig, VA), PAGE);
    rig.audit();
}

#[test]
fn scenario_69_recursive_map() {
    let mut rig = Rig::long();
    let root = rig.regs.cr3.raw();
    let leaf = rig.map(VA, PAGE | PWU);
    rig.poke(root + 510 * 8, root | PWU);
    assert_eq!(at(&mut rig, VA), PAGE);
    // The PTE's own linear address.
    let window = 0xffff_0000_0000_0000 | 510 << 39 | VA >> 9 & 0x7f_ffff_fff8;
    assert_eq!(at(&mut rig, window), leaf);
    rig.store64(window, OTHER | PWU).expect("mapped by itself");
    assert_eq!(at(&mut rig, VA), OTHER);
    // The PML4 through itself, four times.
    let top = 0xffff_0000_0000_0000 | 510 << 39 | 510 << 30 | 510 << 21 | 510 << 12;
    assert_eq!(at(&mut rig, top), root);
    rig.store64(top, 0).expect("mapped by itself");
    assert_eq!(code(rig.read(VA)), Some(0));
    rig.store64(top + 510 * 8, 0).expect("for the last time");
    assert_eq!(code(rig.read(top)), Some(0));
    rig.audit();
}

#[test]
fn scenario_70_a_freed_top_table_frees_its_root_only() {
    let mut rig = Rig::long();
    let first = rig.regs.cr3.raw();
    rig.map(VA, PAGE | PWU);
    assert_eq!(at(&mut rig, VA), PAGE);
    let second = rig.table();
    rig.cr3(second).expect("legal");
    rig.map(VA, OTHER | PWU);
    assert_eq!(at(&mut rig, VA), OTHER);
    let before = rig.mmu.stats().clone();
    rig.poke_bytes(first, &[0; 4096]);
    let after = rig.mmu.stats().clone();
    assert_eq!(after.roots_freed - before.roots_freed, 1);
    assert!(!watched(&rig, first));
    rig.cr3(first).expect("legal");
    assert_eq!(code(rig.read(VA)), Some(0));
    rig.cr3(second).expect("legal");
    assert_eq!(at(&mut rig, VA), OTHER);
    assert_eq!(rig.mmu.stats().root_hits, after.root_hits + 1, "the other root was kept");
    rig.audit();
}

#[test]
fn scenario_71_memory_removed_while_only_an_old_root_knows_it() {
    let mut rig = Rig::long();
    let first = rig.regs.cr3.raw();
    rig.map(VA, 0x60_0000 | PWU);
    rig.write(VA).expect("mapped");
    let second = rig.table();
    rig.cr3(second).expect("legal");
    rig.mem.remove_region(Gpa::new(0x60_0000), 0x1000).expect("aligned");
    rig.cr3(first).expect("legal");
    assert_eq!(rig.mmu.lookup_read(Gva::new(VA), 1), None);
    let done =
        rig.mmu.translate(Gva::new(VA), umbra_arch::paging::Access::explicit(umbra_arch::paging::AccessKind::Read, 0));
    assert_eq!(done.expect("mapped").backing, umbra_memory::Backing::Mmio);
    assert_eq!(rig.mmu.stats().full_drops, 1);
    rig.audit();
}

#[test]
fn scenario_72_accessed_and_dirty() {
    let mut rig = Rig::long();
    let root = rig.regs.cr3.raw();
    let leaf = rig.map(VA, PAGE | PWU);
    let upper: Vec<u64> = (2..=4).map(|level| rig.entry_at(root, 4, level, VA, PWU)).collect();
    rig.read(VA).expect("mapped");
    assert_eq!(rig.peek64(leaf) & (A | D), A);
    assert!(upper.iter().all(|&at| rig.peek64(at) & (A | D) == A));
    rig.write(VA).expect("mapped");
    assert_eq!(rig.peek64(leaf) & (A | D), A | D);
    for bit in [D, A, A | D] {
        rig.poke(leaf, rig.peek64(leaf) & !bit);
        rig.write(VA).expect("mapped");
        assert_eq!(rig.peek64(leaf) & (A | D), A | D);
    }
    // A fault sets no D; a read-only page that was read keeps D clear.
    rig.poke(leaf, PAGE | P);
    assert_eq!(code(rig.write(VA)), Some(3));
    rig.read(VA).expect("mapped");
    assert_eq!(code(rig.write(VA)), Some(3));
    assert_eq!(rig.peek64(leaf) & D, 0);
    rig.audit();
}

#[test]
fn scenario_72_pdptes_have_no_accessed_bit() {
    let mut rig = Rig::new();
    let (pdpt, pd, pt) = (rig.table(), rig.table(), rig.table());
    rig.poke(pdpt, pd | P);
    rig.poke(pd + (VA >> 21) * 8, pt | PWU);
    rig.poke(pt, PAGE | PWU);
    rig.set_cr4(umbra_arch::control::Cr4::PAE, true);
    rig.cr3(pdpt).expect("legal");
    rig.set_cr0(Cr0::PG, true);
    rig.write(VA).expect("mapped");
    assert_eq!(rig.peek64(pdpt), pd | P);
    assert_eq!((rig.peek64(pd + (VA >> 21) * 8) & A, rig.peek64(pt) & (A | D)), (A, A | D));
}

#[test]
fn scenario_73_neighbours_are_left_alone() {
    let mut rig = Rig::long();
    rig.map(VA, PAGE | PWU);
    let neighbour = rig.map(VA + 0x1000, OTHER | PWU | XD);
    rig.read(VA).expect("mapped");
    assert_eq!(rig.peek64(neighbour) & A, 0);
    assert_eq!(code(rig.fetch(VA + 0x1000)), Some(0x11));
    assert_eq!(rig.peek64(neighbour) & A, 0);
}

#[test]
fn scenario_74_reserved_above_not_present_and_the_reverse() {
    let mut rig = Rig::long();
    let root = rig.regs.cr3.raw();
    let leaf = rig.map(VA, 0);
    let pde = rig.entry_at(root, 4, 2, VA, PWU);
    let link = rig.peek64(pde);
    rig.poke(pde, link | 1 << 51);
    assert_eq!(code(rig.read(VA)), Some(9));
    rig.poke(pde, link & !P);
    rig.poke(leaf, PAGE | PWU | 1 << 51);
    assert_eq!(code(rig.read(VA)), Some(0));
    rig.poke(pde, link);
    assert_eq!(code(rig.read(VA)), Some(9));
}

#[test]
fn scenario_75_gib_pages_and_vendors() {
    let mut rig = Rig::long();
    let root = rig.regs.cr3.raw();
    let pdpte = rig.entry_at(root, 4, 3, 0, PWU);
    rig.poke(pdpte, PWU | PS);
    let intel = Format::intel(40);
    rig.mmu.set_format(Format { gib_pages: false, ..intel });
    assert_eq!((code(rig.read(VA)), all_six(&mut rig, VA)[0]), (Some(9), 0xd));
    rig.mmu.set_format(intel);
    assert_eq!(at(&mut rig, VA), VA);
    rig.audit();
    for bit in 13..30 {
        rig.poke(pdpte, PWU | PS | 1 << bit);
        assert_eq!(code(rig.read(VA)), Some(9), "bit {bit}");
    }
    // Bit 8 above the last levels.
    let pdpt = rig.peek64(root) & !0xfff;
    let pd = rig.table();
    rig.poke(pd + (VA >> 21) * 8, PWU | PS);
    rig.poke(pdpte, pd | PWU | G);
    rig.poke(root, pdpt | PWU | G);
    assert_eq!(at(&mut rig, VA), 0, "ignored on Intel processors");
    rig.mmu.set_format(Format { amd: true, ..intel });
    assert_eq!(code(rig.read(VA)), Some(9), "reserved in the PML4 entry");
    rig.poke(root, pdpt | PWU);
    assert_eq!(at(&mut rig, VA), 0, "not in the PDPT entry");
}

#[test]
fn scenario_76_maxphyaddr_changes() {
    let mut rig = Rig::long();
    rig.map(VA, 0x8_0000_0000 | PWU);
    rig.map(VA + 0x1000, PAGE | PWU);
    assert_eq!(at(&mut rig, VA), 0x8_0000_0000);
    rig.read(VA + 0x1000).expect("mapped");
    let freed = rig.mmu.stats().roots_freed;
    rig.mmu.set_limits(ControlLimits { maxphyaddr: 34, ..LIMITS });
    assert!(rig.mmu.stats().roots_freed > freed);
    assert_eq!(rig.mmu.lookup_read(Gva::new(VA + 0x1000), 1), None);
    assert_eq!(code(rig.read(VA)), Some(9));
    assert_eq!(at(&mut rig, VA + 0x1000), PAGE);
    rig.audit();
}

#[test]
fn scenario_77_tables_outside_memory() {
    let mut rig = Rig::long();
    let inside = rig.regs.cr3.raw();
    let outside = 0x10_0000_0000;
    rig.cr3(outside).expect("below MAXPHYADDR");
    assert_eq!(code(rig.read(VA)), Some(9), "all ones: reserved bits");
    rig.audit();
    // A table in a device's hole, then memory appears there.
    rig.mem.add_ram(Gpa::new(outside), 0x4000).expect("room");
    rig.drain();
    assert_eq!(code(rig.read(VA)), Some(0), "zeros");
    let root = rig.regs.cr3.raw();
    let leaf = rig.entry_at(root, 4, 1, VA, PWU);
    rig.poke(leaf, PAGE | PWU);
    assert_eq!(at(&mut rig, VA), PAGE);
    rig.cr3(inside).expect("legal");
    rig.audit();
}

#[test]
fn scenario_77_tables_in_rom_are_read_and_never_cached() {
    let mut rig = Rig::long();
    let mut table = [0u8; 4096];
    table[..8].copy_from_slice(&(PAGE | PWU).to_le_bytes());
    rig.mem.add_rom(Gpa::new(0xffff_0000), &table).expect("room");
    rig.drain();
    let root = rig.regs.cr3.raw();
    let pde = rig.entry_at(root, 4, 2, VA, PWU);
    rig.poke(pde, 0xffff_0000 | PWU);
    for _ in 0..2 {
        assert_eq!(at(&mut rig, VA), PAGE);
        rig.write(VA).expect("mapped");
        assert_eq!(rig.mmu.lookup_write(Gva::new(VA), 1), None, "D cannot be set there");
    }
    assert_eq!(rig.peek64(0xffff_0000), PAGE | PWU);
    rig.audit();
}

#[test]
fn scenario_78_and_82_smm_and_nested_guests_have_their_own_pages() {
    let mut rig = Rig::long();
    rig.map(VA, PAGE | PWU);
    assert_eq!(at(&mut rig, VA), PAGE);
    for (smm, guest) in [(true, false), (false, true)] {
        let pages = rig.mmu.shadow_pages();
        rig.mmu.set_environment(smm, guest);
        assert_eq!(at(&mut rig, VA), PAGE);
        assert_eq!(rig.mmu.shadow_pages(), pages + 4);
        let before = rig.mmu.stats().clone();
        rig.mmu.set_environment(false, false);
        assert_eq!(at(&mut rig, VA), PAGE);
        rig.mmu.set_environment(smm, guest);
        assert_eq!(at(&mut rig, VA), PAGE);
        rig.mmu.set_environment(false, false);
        let after = rig.mmu.stats();
        assert_eq!((after.walks, after.refills, after.roots_built), (before.walks, before.refills, before.roots_built));
        assert_eq!(after.root_hits, before.root_hits + 3);
    }
    rig.audit();
}
