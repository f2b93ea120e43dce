//! Each counter has something that moves it, and the pools behind the contexts keep their promises.

use crate::support::*;
use std::collections::BTreeMap;
use umbra_arch::control::{Cr0, Cr4, Efer};
use umbra_arch::{Gpa, Gva};
use umbra_memory::PageFlags;
use umbra_mmu::{MmuMode, MmuOptions};

const VA: u64 = 0x40_0000;
const PAGE: u64 = 0x30_0000;

fn mapped() -> (Rig, u64) {
    let mut rig = Rig::long();
    let leaf = rig.map(VA, PAGE | PWU);
    rig.read(VA).expect("mapped");
    (rig, leaf)
}

/// The counters that `event` moves, by how much.
fn moved(rig: &mut Rig, event: impl FnOnce(&mut Rig)) -> BTreeMap<String, u64> {
    let before: BTreeMap<_, _> = rig.mmu.stats().fields().collect();
    event(rig);
    rig.audit();
    let after = rig.mmu.stats().fields();
    after.map(|(name, value)| (name.clone(), value - before[&name])).filter(|(_, by)| *by > 0).collect()
}

fn expect(rig: &mut Rig, event: impl FnOnce(&mut Rig), expected: &[(&str, u64)]) {
    let expected: BTreeMap<String, u64> = expected.iter().map(|&(name, by)| (name.to_owned(), by)).collect();
    assert_eq!(moved(rig, event), expected);
}

#[test]
fn control_register_commits() {
    let (mut rig, _) = mapped();
    let root = rig.regs.cr3.raw();
    let other = rig.table();
    expect(&mut rig, |r| r.set_cr0(Cr0::WP, false), &[("role_changes", 1), ("flushes_none", 1)]);
    expect(&mut rig, |r| r.set_cr0(Cr0::TS, true), &[("flushes_none", 1)]);
    expect(&mut rig, |r| r.set_cr4(Cr4::SMEP, true), &[("role_changes", 1), ("flushes_pcid", 1)]);
    expect(&mut rig, |r| r.set_cr4(Cr4::PGE, true), &[("flushes_all", 1)]);
    let built = [("root_misses", 1), ("roots_built", 1), ("flushes_pcid_non_global", 1)];
    expect(&mut rig, |r| r.cr3(other).expect("legal"), &built);
    let found = [("root_hits", 1), ("root_hits_slot_1", 1), ("flushes_pcid_non_global", 1)];
    expect(&mut rig, |r| r.cr3(root).expect("legal"), &found);
    let off = [("role_changes", 1), ("root_hits", 1), ("root_hits_slot_2", 1), ("flushes_all", 1)];
    expect(&mut rig, |r| r.set_cr0(Cr0::PG, false), &off);
    expect(&mut rig, |r| r.efer(Efer::LME).expect("legal"), &[("flushes_none", 1)]);
}

#[test]
fn invalidations() {
    let (mut rig, _) = mapped();
    expect(&mut rig, |r| r.mmu.invlpg(Gva::new(VA)), &[("flushes_page", 1)]);
    expect(&mut rig, |r| r.mmu.invpcid(0, 1, Gva::new(VA)), &[("flushes_page", 1)]);
    expect(&mut rig, |r| r.mmu.invpcid(1, 1, Gva::new(0)), &[("flushes_pcid_non_global", 1)]);
    expect(&mut rig, |r| r.mmu.invpcid(2, 0, Gva::new(0)), &[("flushes_all", 1)]);
    expect(&mut rig, |r| r.mmu.invpcid(3, 0, Gva::new(0)), &[("flushes_all_non_global", 1)]);
}

#[test]
fn translations() {
    let mut rig = Rig::long();
    rig.map(VA, PAGE | PWU);
    rig.map(VA + 0x1000, PAGE | PWU);
    let got = moved(&mut rig, |r| _ = r.read(VA).expect("mapped"));
    assert_eq!(got["entries_read"], 4);
    assert_eq!((got["walks"], got["pages_allocated"], got["refills"]), (1, 4, 1));
    expect(&mut rig, |r| _ = r.read(VA).expect("mapped"), &[]);
    // A first write: D must be set, so the guest's last table is read; what is above it is in the shadow tree.
    let write = [("walks", 1), ("entries_read", 1), ("refills", 1)];
    expect(&mut rig, |r| _ = r.write(VA).expect("mapped"), &write);
    expect(&mut rig, |r| _ = r.write(VA).expect("mapped"), &[]);
    expect(&mut rig, |r| _ = r.read(VA + 0x1000).expect("mapped"), &write);
    expect(&mut rig, |r| r.mmu.drop_all_contexts(), &[("context_clears", 1)]);
    expect(&mut rig, |r| _ = r.write(VA).expect("mapped"), &[("refills", 1)]);
    // The page directory lacks an entry; what is above it is in the shadow tree.
    expect(&mut rig, |r| _ = r.read(VA + 0x40_0000).expect_err("not mapped"), &[("walks", 1), ("entries_read", 1)]);
    // A fault that the shadow tree knows of costs no walk.
    rig.view(3, false);
    rig.map(VA, PAGE | P | W);
    rig.view(0, false);
    rig.read(VA).expect("mapped");
    rig.view(3, false);
    expect(&mut rig, |r| _ = r.read(VA).expect_err("supervisor page"), &[]);
}

#[test]
fn a_fault_shadows_the_tables_on_its_way() {
    let (mut rig, _) = mapped();
    rig.mmu.drop_all_shadow();
    let way = [("walks", 1), ("entries_read", 4), ("pages_allocated", 4)];
    expect(&mut rig, |r| _ = r.read(VA + 0x1000).expect_err("not mapped"), &way);
    expect(&mut rig, |r| _ = r.read(VA + 0x1000).expect_err("not mapped"), &[("walks", 1), ("entries_read", 1)]);
    // Behind an entry whose A bit is clear, and stays so, nothing is kept.
    let mut rig = Rig::long();
    rig.map(VA, PAGE | PWU);
    let fault = |r: &mut Rig| _ = r.read(VA + 0x1000).expect_err("not mapped");
    expect(&mut rig, fault, &[("walks", 1), ("entries_read", 4), ("pages_allocated", 1)]);
    expect(&mut rig, fault, &[("walks", 1), ("entries_read", 4)]);
}

#[test]
fn table_writes() {
    let (mut rig, leaf) = mapped();
    let same = rig.peek64(leaf);
    expect(&mut rig, |r| r.poke(leaf, same), &[("table_writes", 1)]);
    expect(&mut rig, |r| r.poke(leaf, same | D), &[("table_writes", 1)]);
    expect(&mut rig, |r| r.poke(leaf + 8, PAGE | PWU), &[("table_writes", 1)]);
    rig.read(VA + 0x1000).expect("mapped");
    expect(&mut rig, |r| r.poke(leaf, 0), &[("table_writes", 1), ("entries_dropped", 1)]);
    // The last entry goes; the table is kept for a while, in case it is filled again.
    expect(&mut rig, |r| r.poke(leaf + 8, 0), &[("table_writes", 1), ("entries_dropped", 1)]);
    rig.poke(leaf, PAGE | PWU);
    expect(&mut rig, |r| _ = r.read(VA).expect("mapped"), &[("walks", 1), ("entries_read", 1), ("refills", 1)]);
    rig.poke(leaf, 0);
    let retired = [("table_writes", 1), ("tables_retired", 1), ("pages_freed", 1)];
    expect(&mut rig, |r| r.poke_bytes(leaf & !0xfff, &[0; 256]), &retired);
    expect(&mut rig, |r| r.poke(leaf + 8, 0), &[]);
}

#[test]
fn dropping_everything() {
    let (mut rig, _) = mapped();
    let dropped = [("pages_freed", 4), ("context_clears", 1)];
    expect(&mut rig, |r| r.mmu.drop_all_shadow(), &dropped);
    rig.read(VA).expect("mapped");
    let all = [
        ("full_drops", 1),
        ("pages_freed", 4),
        ("context_clears", 1),
        ("roots_freed", 2),
        ("root_misses", 1),
        ("roots_built", 1),
    ];
    expect(&mut rig, |r| r.mmu.set_limits(LIMITS), &all);
}

#[test]
fn unload_always_drops_by_flush() {
    let mut rig = Rig::long_with(MmuOptions { mode: MmuMode::UnloadAlways, ..MmuOptions::default() });
    rig.map(VA, PAGE | PWU);
    rig.read(VA).expect("mapped");
    let got = moved(&mut rig, |r| r.cr3(r.regs.cr3.raw()).expect("legal"));
    assert_eq!(got["dropped_by_flush"], 1);
    rig.read(VA).expect("mapped");
    // A WP change demands no flush; KVM unloads all the same.
    let got = moved(&mut rig, |r| r.set_cr0(Cr0::WP, false));
    assert_eq!((got.get("dropped_by_flush"), got["roots_freed"]), (None, 1));
}

#[test]
fn evictions_keep_the_bound() {
    let mut rig = Rig::long_with(MmuOptions { shadow_pages: 16, ..MmuOptions::default() });
    for i in 0..64u64 {
        rig.map(VA + (i << 21), PAGE | PWU);
        rig.write(VA + (i << 21)).expect("mapped");
        assert!(rig.mmu.shadow_pages() <= 16);
        rig.audit();
    }
    let stats = rig.mmu.stats();
    assert!(stats.pages_evicted > 40 && stats.pages_evicted <= stats.pages_freed);
    for i in 0..64u64 {
        assert_eq!(rig.read(VA + (i << 21)).map(Gpa::raw), Ok(PAGE));
    }
}

/// Pages whose slots collide in every column size.
fn colliding(rig: &mut Rig, pages: u64, leaf: u64) -> Vec<u64> {
    (0..pages)
        .map(|i| {
            let gva = (i % 4) << 30 | (i / 4) << 12;
            rig.map(gva, leaf + ((i % 64) << 12));
            gva
        })
        .collect()
}

#[test]
fn columns_grow_on_conflicts_and_lose_nothing() {
    let mut rig = Rig::long();
    // 512 slots are too few for these, 4096 are enough.
    let pages: Vec<u64> = (0..1024u64)
        .map(|i| {
            rig.map(i << 12, (0x40_0000 + (i << 12)) | PWU);
            i << 12
        })
        .collect();
    for _ in 0..4 {
        for &gva in &pages {
            rig.write(gva).expect("mapped");
        }
    }
    assert_eq!(rig.mmu.stats().context_growths, 1);
    let before = rig.mmu.stats().refills;
    for &gva in &pages {
        rig.write(gva).expect("mapped");
    }
    assert_eq!(rig.mmu.stats().refills, before, "all fit now");
    rig.audit();
    // What moved can still be dropped.
    rig.mmu.drop_all_contexts();
    assert!(pages.iter().all(|&gva| rig.mmu.lookup_read(Gva::new(gva), 1).is_none()));
    // Four pages a slot in the largest size: it grows to that and no further.
    let pages = colliding(&mut rig, 4096, 0x40_0000 | PWU);
    for _ in 0..40 {
        for &gva in &pages {
            rig.read(gva).expect("mapped");
        }
    }
    assert_eq!(rig.mmu.stats().context_growths, 3);
    rig.audit();
}

#[test]
fn a_column_that_just_grew_can_be_dropped_for_its_keys() {
    let mut rig = Rig::long();
    rig.mmu.set_pkru(1 << 2);
    let pages: Vec<u64> = (0..1024).map(|i| i << 12).collect();
    for &gva in &pages {
        rig.map(gva, (0x40_0000 + gva) | PWU | 1 << 59);
    }
    let grown_at = pages.iter().cycle().position(|&gva| {
        rig.read(gva).expect("mapped");
        rig.mmu.stats().context_growths == 1
    });
    rig.audit();
    assert!(grown_at.is_some_and(|n| n < 4096));
    rig.set_cr4(Cr4::PKE, true);
    rig.audit();
    assert!(pages.iter().all(|&gva| rig.mmu.lookup_read(Gva::new(gva), 1).is_none()));
    assert_eq!(code(rig.read(pages[0])), Some(0x21));
}

#[test]
fn a_cleared_column_holds_nothing_at_any_address() {
    let (mut rig, _) = mapped();
    rig.read(VA).expect("mapped");
    rig.mmu.drop_all_contexts();
    rig.map(VA + 0x1000, PAGE | PWU);
    rig.read(VA + 0x1000).expect("mapped");
    for page in (0..1 << 13).flat_map(|page: u64| [page, VA >> 12 ^ page, page.wrapping_sub(1 << 12)]) {
        let gva = Gva::new(page << 12 | 0xfff);
        let lookups = [1, 2, 0x1001, 0x2000].map(|bytes| rig.mmu.lookup_read(gva, bytes));
        let is_mapped = page == (VA >> 12) + 1;
        assert_eq!(lookups.map(|found| found.is_some()), [is_mapped, false, false, false], "{gva:?}");
        assert_eq!(rig.mmu.lookup_fetch(gva).is_some(), is_mapped, "{gva:?}");
        let writes = [1, 2, 0x1001, 0x2000].map(|bytes| rig.mmu.lookup_write(gva, bytes));
        assert_eq!(writes, [None; 4], "{gva:?}");
    }
}

#[test]
fn a_guarded_mmu_never_hits_and_translates_as_ever() {
    let (mut rig, _) = mapped();
    rig.write(VA).expect("mapped");
    rig.fetch(VA).expect("mapped");
    let hits = |rig: &Rig| {
        let gva = Gva::new(VA);
        [rig.mmu.lookup_read(gva, 1), rig.mmu.lookup_write(gva, 1), rig.mmu.lookup_fetch(gva)].map(|off| off.is_some())
    };
    assert_eq!(hits(&rig), [true; 3]);
    rig.mmu.set_guarded(true);
    for _ in 0..2 {
        assert_eq!(hits(&rig), [false; 3]);
        assert_eq!(rig.read(VA).map(Gpa::raw), Ok(PAGE));
        rig.set_cr0(Cr0::WP, false);
        rig.view(0, true);
    }
    rig.mmu.set_guarded(false);
    rig.read(VA).expect("mapped");
    assert_eq!(hits(&rig), [true; 3]);
    rig.audit();
}

#[test]
fn stores_to_watched_pages_have_entries_of_their_own() {
    let (mut rig, leaf) = mapped();
    let gva = Gva::new(VA + 0x1000);
    let kinds =
        |rig: &Rig| [rig.mmu.lookup_write(gva, 8), rig.mmu.lookup_reported_write(gva, 8)].map(|off| off.is_some());
    // The table that maps both, mapped itself.
    let table = leaf & !0xfff;
    rig.map(gva.raw(), table | PWU);
    assert_eq!(kinds(&rig), [false, false]);
    rig.write(gva.raw()).expect("mapped");
    assert_eq!(kinds(&rig), [false, true]);
    // Across the page's end, where writes aren't allowed, and after a store of another's that has to be noticed.
    assert_eq!(rig.mmu.lookup_reported_write(Gva::new(gva.raw() + 0xffc), 8), None);
    let off = rig.mem.map(Gpa::new(table).page()).readable().expect("RAM");
    rig.mmu.clean_page(off);
    assert_eq!(kinds(&rig), [false, false]);
    rig.write(gva.raw()).expect("mapped");
    assert_eq!(kinds(&rig), [false, true]);
    rig.audit();
    // Its store drops what it changes, itself included.
    rig.store64(gva.raw() + (leaf & 0xfff) + 8, (PAGE + 0x5000) | PWU).expect("mapped");
    assert_eq!(kinds(&rig), [false, false]);
    assert_eq!(rig.read(gva.raw()).map(Gpa::raw), Ok(PAGE + 0x5000));
    rig.audit();
}

#[test]
fn a_page_that_is_watched_no_longer_is_written_freely_again() {
    let (mut rig, leaf) = mapped();
    let gva = VA + 0x20_0000;
    rig.map(gva, (leaf & !0xfff) | PWU);
    rig.write(gva).expect("mapped");
    assert!(rig.mmu.lookup_reported_write(Gva::new(gva), 1).is_some());
    for at in 0..20 {
        rig.store64(gva + (leaf & 0xfff) + 8 * at, 0).expect("mapped");
    }
    assert_eq!(rig.mmu.stats().tables_retired, 1);
    assert_eq!(rig.mmu.lookup_reported_write(Gva::new(gva), 1), None);
    rig.write(gva).expect("mapped");
    assert!(rig.mmu.lookup_write(Gva::new(gva), 1).is_some());
    rig.audit();
}

#[test]
fn accesses_across_a_page_end_never_hit() {
    let mut rig = Rig::long();
    for page in 0..2 {
        rig.map(VA + page * 0x1000, (PAGE + page * 0x1000) | PWU);
        rig.write(VA + page * 0x1000).expect("mapped");
    }
    for bytes in [1, 2, 4, 8, 16, 64] {
        for offset in 0xfb0..0x1000u64 {
            let gva = Gva::new(VA + offset);
            let expected = (offset + bytes <= 0x1000).then_some(PAGE + offset);
            assert_eq!(rig.mmu.lookup_read(gva, bytes).map(|o| o.raw()), expected, "{offset:#x}+{bytes}");
            assert_eq!(rig.mmu.lookup_write(gva, bytes).map(|o| o.raw()), expected);
        }
    }
}

#[test]
fn writers_of_a_frame_are_found_however_many() {
    let mut rig = Rig::long();
    let aliases: Vec<u64> = (0..40).map(|i| VA + (i << 21)).collect();
    for &gva in &aliases {
        rig.map(gva, PAGE | PWU);
    }
    let off = rig.mem.map(Gpa::new(PAGE).page()).readable().expect("RAM");
    for _ in 0..2 {
        for &gva in &aliases {
            rig.write(gva).expect("mapped");
            rig.audit();
        }
        let fast = aliases.iter().filter(|&&gva| rig.mmu.lookup_write(Gva::new(gva), 1).is_some()).count();
        assert!((1..=8).contains(&fast), "a bounded list: {fast}");
        rig.mem.set_flags(off, PageFlags::CODE);
        rig.mmu.code_page_changed(off);
        assert!(aliases.iter().all(|&gva| rig.mmu.lookup_write(Gva::new(gva), 1).is_none()));
        assert!(aliases.iter().any(|&gva| rig.mmu.lookup_read(Gva::new(gva), 1).is_some()));
        for &gva in &aliases {
            rig.write(gva).expect("mapped");
            assert_eq!(rig.mmu.lookup_write(Gva::new(gva), 1), None, "code");
        }
        rig.mem.clear_flags(off, PageFlags::CODE);
        rig.mmu.clean_page(off);
        assert!(!rig.mem.page_flags(off).contains(PageFlags::DIRTY));
    }
}

#[test]
fn the_report_names_every_counter_once() {
    let (rig, _) = mapped();
    let report = rig.mmu.stats().to_string();
    let fields: Vec<_> = rig.mmu.stats().fields().collect();
    assert_eq!(report.lines().count(), fields.len());
    for ((name, value), line) in fields.iter().zip(report.lines()) {
        let mut words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words.pop(), Some(value.to_string().as_str()));
        assert_eq!(words.join("_"), *name);
    }
}
