//! Scenario 83: two processors over one memory.

use crate::support::*;
use std::sync::Arc;
use umbra_arch::Gva;
use umbra_memory::{GuestMemory, Watcher};
use umbra_mmu::MmuOptions;

const VA: u64 = 0x40_0000;
const PAGE: u64 = 0x30_0000;
const OTHER: u64 = 0x31_0000;
/// Where the first processor sees the page table.
const WINDOW: u64 = 0x60_0000;

/// Both in 4-level paging over the same tables, with VA at PAGE; the leaf's address.
fn two() -> ([Rig; 2], u64) {
    let mem = Arc::new(GuestMemory::new(8 << 20).expect("8 MiB"));
    let rig = || Rig::watching(Watcher::register(mem.clone()).expect("room"), MmuOptions::default());
    let (mut first, mut second) = (rig(), rig());
    let root = first.table();
    first.enter_long(root);
    second.enter_long(root);
    let leaf = first.map(VA, PAGE | PWU);
    first.map(WINDOW, leaf & !0xfff | PWU);
    second.drain();
    ([first, second], leaf)
}

#[test]
fn scenario_83_a_shootdown_between_two_processors() {
    let ([mut first, mut second], leaf) = two();
    for _ in 0..3 {
        for (frame, old) in [(OTHER, PAGE), (PAGE, OTHER)] {
            for _ in 0..100 {
                assert_eq!(second.read(VA).map(|gpa| gpa.raw()), Ok(old));
            }
            assert!(second.mmu.lookup_read(Gva::new(VA), 8).is_some(), "a tight loop");
            first.store64(WINDOW | leaf & 0xfff, frame | PWU).expect("mapped");
            // The interrupt, INVLPG and the acknowledgement.
            second.drain();
            second.mmu.invlpg(Gva::new(VA));
            assert_eq!(second.mmu.lookup_read(Gva::new(VA), 8), None);
            assert_eq!(second.read(VA).map(|gpa| gpa.raw()), Ok(frame));
            first.audit();
            second.audit();
        }
    }
}

#[test]
fn scenario_83_a_page_is_tracked_before_anybody_can_write_it_untold() {
    let ([mut first, mut second], _) = two();
    // The first writes a page by its fast path; then the second uses it as a page table.
    first.map(VA + 0x1000, OTHER | PWU);
    first.write(VA + 0x1000).expect("mapped");
    first.write(VA + 0x1000).expect("mapped");
    assert!(first.mmu.lookup_write(Gva::new(VA + 0x1000), 8).is_some());
    let root = second.regs.cr3.raw();
    let pde = second.entry_at(root, 4, 2, 0x80_0000, PWU);
    second.poke(pde, OTHER | PWU);
    second.poke(OTHER, PAGE | PWU);
    assert_eq!(second.read(0x80_0000).map(|gpa| gpa.raw()), Ok(PAGE));
    first.drain();
    assert_eq!(first.mmu.lookup_write(Gva::new(VA + 0x1000), 8), None, "the first was told");
    first.store64(VA + 0x1000, 0).expect("mapped");
    second.drain();
    assert_eq!(code(second.read(0x80_0000)), Some(0));
    first.audit();
    second.audit();
}

#[test]
fn scenario_83_dirty_bits_of_both() {
    let ([mut first, mut second], leaf) = two();
    first.write(VA).expect("mapped");
    second.drain();
    second.write(VA).expect("mapped");
    second.write(VA).expect("mapped");
    assert!(second.mmu.lookup_write(Gva::new(VA), 1).is_some());
    first.drain();
    first.store64(WINDOW | leaf & 0xfff, PAGE | PWU | A).expect("mapped");
    second.drain();
    assert_eq!(second.mmu.lookup_write(Gva::new(VA), 1), None, "D is clear");
    second.write(VA).expect("mapped");
    assert_eq!(first.peek64(leaf) & D, D);
    first.drain();
    first.audit();
    second.audit();
}
