//! Pages that have yet to arrive: an explicit access is told so, nothing is loaded or filled for it.

use crate::support::*;
use std::io;
use std::sync::Arc;
use umbra_arch::paging::{Access, AccessKind};
use umbra_arch::{Gpa, GpaPage, Gva};
use umbra_memory::{GuestMemory, PageFlags, PageSource, Watcher};
use umbra_mmu::MmuOptions;

const VA: u64 = 0x40_0000;
const PAGE: u64 = 0x30_0000;
const BYTES: u64 = 8 << 20;

struct Image(Vec<u8>);

impl PageSource for Image {
    fn bytes(&self) -> u64 {
        BYTES
    }
    fn read_page(&self, page: GpaPage, into: &mut [u8; 4096]) -> io::Result<()> {
        into.copy_from_slice(&self.0[page.base().raw() as usize..][..4096]);
        Ok(())
    }
}

/// 4-level paging in memory of which nothing has arrived; the address of the entry that maps VA to PAGE.
fn lazy() -> (Rig, u64) {
    let mut model = Rig::long();
    let leaf = model.map(VA, PAGE | PWU);
    let mut image = vec![0; BYTES as usize];
    model.mem.read(Gpa::new(0), &mut image);
    let mem = Arc::new(GuestMemory::new(BYTES).expect("8 MiB"));
    mem.set_page_source(Box::new(Image(image))).expect("the first source");
    let mut rig = Rig::watching(Watcher::sole(mem), MmuOptions::default());
    rig.enter_long(model.regs.cr3.raw());
    (rig, leaf)
}

fn fast(rig: &Rig) -> [bool; 3] {
    let gva = Gva::new(VA);
    [rig.mmu.lookup_read(gva, 1), rig.mmu.lookup_write(gva, 1), rig.mmu.lookup_fetch(gva)].map(|found| found.is_some())
}

#[test]
fn an_explicit_access_leaves_the_page_absent_and_the_fast_paths_empty() {
    for kind in [AccessKind::Read, AccessKind::Write, AccessKind::Fetch] {
        let (mut rig, leaf) = lazy();
        let access = Access::explicit(kind, 0);
        for _ in 0..2 {
            let found = rig.mmu.translate(Gva::new(VA), access).expect("mapped");
            assert!(found.absent && found.gpa == Gpa::new(PAGE), "{kind:?}");
            assert!(rig.mem.is_absent(Gpa::new(PAGE).page()) && fast(&rig) == [false; 3], "{kind:?}");
            assert_eq!(rig.mem.loaded_pages(), 4, "{kind:?}: the tables alone");
            rig.audit();
        }
        let dirty = if kind == AccessKind::Write { D } else { 0 };
        assert_eq!(rig.peek64(leaf), PAGE | PWU | A | dirty, "{kind:?}");

        let off = rig.mem.map(Gpa::new(PAGE).page()).readable().expect("RAM");
        assert!(rig.mem.page_flags(off).contains(PageFlags::DIRTY));
        assert!(!rig.mmu.translate(Gva::new(VA), access).expect("mapped").absent);
        assert_eq!(fast(&rig), [true, kind == AccessKind::Write, true], "{kind:?}");
        rig.audit();
    }
}

#[test]
fn what_the_processor_does_by_itself_loads_at_once() {
    for kind in [AccessKind::Read, AccessKind::Write] {
        let (mut rig, _) = lazy();
        assert!(!rig.mmu.translate(Gva::new(VA), Access::implicit(kind)).expect("mapped").absent);
        assert!(!rig.mem.is_absent(Gpa::new(PAGE).page()));
    }
}

#[test]
fn a_peek_loads_nothing_not_even_tables() {
    let (rig, _) = lazy();
    let found = rig.mmu.peek(Gva::new(VA), Access::explicit(AccessKind::Read, 0)).expect("mapped");
    assert!(found.absent && found.gpa == Gpa::new(PAGE));
    assert_eq!(rig.mem.loaded_pages(), 0);
}
