//! Guest memory: layout, flags, journal, regions, scalars against plain bytes.

use proptest::prelude::*;
use std::sync::Arc;
use umbra_arch::{Gpa, GpaPage};
use umbra_memory::{Backing, Change, GuestMemory, MemoryError, PageFlags, RamOffset, Watcher};

const MIB: u64 = 1 << 20;

fn memory(bytes: u64) -> GuestMemory {
    GuestMemory::new(bytes).expect("a small mapping")
}

#[test]
fn layout_of_small_and_large_ram() {
    let small = memory(16 * MIB);
    let ranges = [(Gpa::new(0), 0xa_0000), (Gpa::new(0xc_0000), 16 * MIB - 0xc_0000)];
    assert_eq!(small.ram_ranges(), ranges);
    let five_gib = 5 << 30;
    let large = memory(five_gib);
    let high = five_gib - 0xc000_0000;
    assert_eq!(large.ram_ranges()[1..], [(Gpa::new(0xc_0000), 0xc000_0000 - 0xc_0000), (Gpa::new(1 << 32), high)]);
    for (gpa, expected) in [
        (0, Backing::Ram(RamOffset::new(0))),
        (0x9_f000, Backing::Ram(RamOffset::new(0x9_f000))),
        (0xa_0000, Backing::Mmio),
        (0xb_f000, Backing::Mmio),
        (0xc_0000, Backing::Ram(RamOffset::new(0xc_0000))),
        (0xbfff_f000, Backing::Ram(RamOffset::new(0xbfff_f000))),
        (0xc000_0000, Backing::Mmio),
        (0xffff_f000, Backing::Mmio),
        (0x1_0000_0000, Backing::Ram(RamOffset::new(0xc000_0000))),
        ((1 << 32) + high - 4096, Backing::Ram(RamOffset::new(five_gib - 4096))),
        ((1 << 32) + high, Backing::Mmio),
        (1 << 51, Backing::Mmio),
        (!0xfff, Backing::Mmio),
    ] {
        assert_eq!(large.map(Gpa::new(gpa).page()), expected, "{gpa:#x}");
    }
}

#[test]
fn sizes_that_no_host_gives() {
    for bytes in [0, 1, 4095, 4097, 1 << 60] {
        assert!(matches!(GuestMemory::new(bytes), Err(MemoryError::BadSize(_))), "{bytes}");
    }
}

#[test]
fn outside_the_mapping_nothing_happens() {
    let mem = memory(MIB);
    for raw in [mem.mapping_bytes(), mem.mapping_bytes() + 1, u64::MAX, u64::MAX - 7] {
        let off = RamOffset::new(raw);
        mem.store(off, 0x1234_5678u32);
        assert_eq!(mem.load::<u64>(off), 0);
        assert_eq!(mem.load::<u128>(off), 0);
        mem.note_store(off, 64);
        mem.set_flags(off, PageFlags::CODE);
        assert_eq!(mem.page_flags(off), PageFlags::NONE);
        let mut bytes = [7; 16];
        mem.load_bytes(off, &mut bytes);
        assert_eq!(bytes, [0; 16]);
        mem.store_bytes(off, &bytes);
    }
    // The last byte's neighbours are slack.
    let last = RamOffset::new(mem.mapping_bytes() - 1);
    mem.store(last, !0u128);
    assert_eq!(mem.load::<u8>(last), 0xff);
}

#[test]
fn rom_is_read_only_and_hides_ram() {
    let mem = Arc::new(memory(16 * MIB));
    let generation = mem.generation();
    let image: Vec<u8> = (0..5000u32).map(|i| i as u8).collect();
    mem.add_rom(Gpa::new(0xfffe_0000), &image).expect("room");
    mem.write(Gpa::new(0xf_0000), b"below");
    mem.add_rom(Gpa::new(0xf_0000), &image).expect("room");
    assert_ne!(mem.generation(), generation);
    assert_eq!(Watcher::sole(Arc::clone(&mem)).take_changes(), [Change::Everything]);
    for base in [0xfffe_0000, 0xf_0000] {
        let mut bytes = vec![0; 5000];
        mem.write(Gpa::new(base), b"xyz");
        mem.read(Gpa::new(base), &mut bytes);
        assert_eq!(bytes, image);
        assert!(matches!(mem.map(Gpa::new(base).page()), Backing::Rom(_)));
    }
    let mut after = [1; 4];
    mem.read(Gpa::new(0xfffe_0000 + 5000), &mut after);
    assert_eq!(after, [0; 4], "padded to whole pages");
    assert_eq!(mem.ram_ranges().len(), 3, "the ROM is cut out of RAM");
    mem.remove_region(Gpa::new(0xf_0000), 0x2000).expect("aligned");
    assert_eq!(mem.map(Gpa::new(0xf_0000).page()), Backing::Mmio);
}

#[test]
fn regions_come_and_go() {
    let mem = memory(4 * MIB);
    assert!(matches!(mem.add_ram(Gpa::new(0x10), 4096), Err(MemoryError::Misaligned { .. })));
    assert!(matches!(mem.add_ram(Gpa::new(1 << 40), 1 << 40), Err(MemoryError::NoRoom { .. })));
    mem.add_ram(Gpa::new(1 << 40), 0x3000).expect("room");
    mem.write(Gpa::new((1 << 40) + 0xffe), b"abcd");
    let mut bytes = [0; 4];
    mem.read(Gpa::new((1 << 40) + 0xffe), &mut bytes);
    assert_eq!(&bytes, b"abcd");
    assert!(mem.remove_region(Gpa::new((1 << 40) + 0x1000), 0x1000).expect("aligned"));
    assert!(!mem.remove_region(Gpa::new((1 << 40) + 0x1000), 0x1000).expect("aligned"));
    mem.read(Gpa::new((1 << 40) + 0xffe), &mut bytes);
    assert_eq!(&bytes, b"ab\xff\xff");
    assert_eq!(mem.map(Gpa::new((1 << 40) + 0x2000).page()).readable().map(|o| o.raw() & 0xfff), Some(0));
    assert_eq!(mem.map(GpaPage::new(0x100)), Backing::Ram(RamOffset::new(0x10_0000)), "RAM lies where it lay");
}

#[test]
fn journal_has_each_flagged_page_once_a_write() {
    let mem = Arc::new(memory(4 * MIB));
    for (page, flag) in [(0x101, PageFlags::CODE), (0x102, PageFlags::WATCHED), (0x104, PageFlags::DIRTY)] {
        mem.set_flags(RamOffset::new(page << 12), flag);
    }
    mem.write(Gpa::new(0x10_0ffc), &[1; 0x5000]);
    let watcher = Watcher::sole(Arc::clone(&mem));
    assert!(watcher.is_pending());
    let written = |gpa| Change::Written { gpa: Gpa::new(gpa), bytes: 4096 };
    assert_eq!(watcher.take_changes(), [written(0x10_1000), written(0x10_2000)]);
    assert!(!watcher.is_pending() && watcher.take_changes().is_empty());
    let dirty: Vec<u64> = mem.pages_with(PageFlags::DIRTY).map(|off| off.raw() >> 12).collect();
    assert_eq!(dirty, [0x100, 0x101, 0x102, 0x103, 0x104, 0x105]);
    mem.clear_flags(RamOffset::new(0x10_1000), PageFlags::DIRTY);
    assert_eq!(mem.page_flags(RamOffset::new(0x10_1fff)), PageFlags::CODE);
}

#[test]
fn compare_exchange_of_every_width_and_alignment() {
    macro_rules! width {
        ($mem:expr, $t:ty) => {
            for at in 0x1000..0x1011u64 {
                let off = RamOffset::new(at);
                $mem.store::<$t>(off, 5);
                assert_eq!($mem.compare_exchange::<$t>(off, 6, 7), Err(5));
                assert_eq!($mem.load::<$t>(off), 5);
                assert_eq!($mem.compare_exchange::<$t>(off, 5, <$t>::MAX - 1), Ok(5));
                assert_eq!($mem.load::<$t>(off), <$t>::MAX - 1);
                assert_eq!($mem.load::<u8>(RamOffset::new(at - 1)), 0, "the byte before");
                assert_eq!($mem.load::<u8>(off.add(size_of::<$t>() as u64)), 0, "the byte after");
                $mem.store::<$t>(off, 0);
            }
        };
    }
    let mem = memory(MIB);
    width!(mem, u8);
    width!(mem, u16);
    width!(mem, u32);
    width!(mem, u64);
    width!(mem, u128);
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, Vec<u8>),
    Store64(u64, u64),
    Store16(u64, u16),
    Store128(u64, u128),
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Across the hole's lower border, against a plain array.
    #[test]
    fn bytes_are_where_they_were_put(ops in prop::collection::vec(prop_oneof![
        (0u64..0x4000, prop::collection::vec(any::<u8>(), 0..5000)).prop_map(|(at, bytes)| Op::Write(at, bytes)),
        (0u64..0x1ff8, any::<u64>()).prop_map(|(at, v)| Op::Store64(at, v)),
        (0u64..0x1ffe, any::<u16>()).prop_map(|(at, v)| Op::Store16(at, v)),
        (0u64..0x1ff0, any::<u128>()).prop_map(|(at, v)| Op::Store128(at, v)),
    ], 1..20)) {
        const BASE: u64 = 0x9_e000;
        let mem = memory(MIB);
        let mut model = vec![0u8; 0x2000];
        model.resize(0x6000, 0xff);
        for op in ops {
            let (at, bytes) = match op {
                Op::Write(at, bytes) => {
                    mem.write(Gpa::new(BASE + at), &bytes);
                    (at, bytes)
                }
                Op::Store64(at, v) => {
                    mem.store(RamOffset::new(BASE + at), v);
                    (at, v.to_le_bytes().to_vec())
                }
                Op::Store16(at, v) => {
                    mem.store(RamOffset::new(BASE + at), v);
                    (at, v.to_le_bytes().to_vec())
                }
                Op::Store128(at, v) => {
                    mem.store(RamOffset::new(BASE + at), v);
                    (at, v.to_le_bytes().to_vec())
                }
            };
            for (i, byte) in bytes.into_iter().enumerate().filter(|(i, _)| at as usize + i < 0x2000) {
                model[at as usize + i] = byte;
            }
            let mut got = vec![0; 0x6000];
            mem.read(Gpa::new(BASE), &mut got);
            prop_assert!(got == model);
        }
    }
}

#[test]
fn host_regions_cover_what_map_says_and_hold_its_bytes() {
    let mem = GuestMemory::new(4 << 20).unwrap();
    mem.add_rom(Gpa::new(0xf_0000), &[7; 0x2000]).unwrap();
    mem.add_ram(Gpa::new(1 << 40), 0x3000).unwrap();
    let regions = mem.host_regions();
    let first = regions[0].host;
    for pair in regions.windows(2) {
        assert!(pair[0].gpa.raw() + pair[0].bytes <= pair[1].gpa.raw(), "sorted, without overlaps");
    }
    for page in (0..0x500).chain([1 << 28, (1 << 28) + 2, (1 << 28) + 3]) {
        let at = page << 12;
        let region = regions.iter().find(|r| (r.gpa.raw()..r.gpa.raw() + r.bytes).contains(&at));
        let expected = region.map(|r| (r.host + (at - r.gpa.raw()) - first, r.rom));
        let found = match mem.map(GpaPage::new(page)) {
            Backing::Ram(off) => Some((off.raw(), false)),
            Backing::Rom(off) => Some((off.raw(), true)),
            Backing::Mmio => None,
        };
        assert_eq!(expected, found, "{at:#x}");
    }
}

#[test]
fn pages_written_outside_are_dirty_and_reported_as_writes_are() {
    let mem = Arc::new(GuestMemory::new(4 << 20).unwrap());
    let watcher = Watcher::register(mem.clone()).unwrap();
    watcher.claim(RamOffset::new(0x5000), PageFlags::CODE);
    watcher.take_changes();
    mem.page_written_outside(GpaPage::new(5));
    mem.page_written_outside(GpaPage::new(6));
    mem.page_written_outside(GpaPage::new(0xa0));
    assert_eq!(watcher.take_changes(), [Change::Written { gpa: Gpa::new(0x5000), bytes: 4096 }]);
    let dirty: Vec<u64> = mem.pages_with(PageFlags::DIRTY).map(|off| off.raw()).collect();
    assert_eq!(dirty, [0x5000, 0x6000]);
}
