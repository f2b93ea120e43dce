//! RAM that arrives on demand.

use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use umbra_arch::{Gpa, GpaPage};
use umbra_memory::{Backing, FileSource, GuestMemory, MemoryError, PageFlags, PageSource, Watcher};

const RAM: u64 = 8 << 20;
const COVERED: u64 = 4 << 20;

/// Every byte is its page's number; counts what is read.
struct Numbered(Arc<AtomicU64>);

impl PageSource for Numbered {
    fn bytes(&self) -> u64 {
        COVERED
    }
    fn read_page(&self, page: GpaPage, into: &mut [u8; 4096]) -> io::Result<()> {
        self.0.fetch_add(1, Relaxed);
        into.fill(page.raw() as u8);
        Ok(())
    }
}

fn numbered() -> (GuestMemory, Arc<AtomicU64>) {
    let (mem, reads) = (GuestMemory::new(RAM).unwrap(), Arc::new(AtomicU64::new(0)));
    mem.write(Gpa::new(0x5010), b"early");
    mem.set_page_source(Box::new(Numbered(Arc::clone(&reads)))).unwrap();
    (mem, reads)
}

fn flags(mem: &GuestMemory, gpa: u64) -> PageFlags {
    let Backing::Ram(off) = mem.locate(Gpa::new(gpa).page()) else { panic!("{gpa:#x} is no RAM") };
    mem.page_flags(off)
}

#[test]
fn covered_and_unwritten_ram_is_absent() {
    let (mem, reads) = numbered();
    for page in 0..(RAM + (1 << 20)) >> 12 {
        let gpa = page << 12;
        let hole = (0xa_0000..0xc_0000).contains(&gpa);
        let expected = gpa < COVERED && gpa != 0x5000 && !hole;
        assert_eq!(mem.is_absent(GpaPage::new(page)), expected, "{gpa:#x}");
    }
    assert_eq!((reads.load(Relaxed), mem.loaded_pages()), (0, 0));
    let second = mem.set_page_source(Box::new(Numbered(reads)));
    assert!(matches!(second, Err(MemoryError::SecondSource)));
}

#[test]
fn a_page_is_loaded_once_and_is_dirty() {
    let (mem, reads) = numbered();
    let mut bytes = [0; 4];
    // Across two pages.
    mem.read(Gpa::new(0x6ffe), &mut bytes);
    assert_eq!(bytes, [6, 6, 7, 7]);
    assert!(flags(&mem, 0x6000).contains(PageFlags::DIRTY) && !flags(&mem, 0x6000).intersects(PageFlags::ABSENT));
    mem.write(Gpa::new(0x7ffe), b"xyzw");
    mem.read(Gpa::new(0x7ffd), &mut bytes);
    assert_eq!(&bytes, b"\x07xyz");
    mem.read(Gpa::new(0x8001), &mut bytes);
    assert_eq!(&bytes, b"w\x08\x08\x08");
    assert_eq!((reads.load(Relaxed), mem.loaded_pages()), (3, 3));
    mem.read(Gpa::new(0x500f), &mut bytes);
    assert_eq!(&bytes, b"\0ear", "written before the source came");
    assert_eq!(reads.load(Relaxed), 3);
}

#[test]
fn a_whole_page_written_needs_no_load() {
    let (mem, reads) = numbered();
    mem.write(Gpa::new(0x9ff0), &[0xee; 0x1010 + 1]);
    let mut bytes = [0; 2];
    mem.read(Gpa::new(0xaff0 - 1), &mut bytes);
    assert_eq!(bytes, [0xee, 0xee]);
    mem.read(Gpa::new(0xb000), &mut bytes);
    assert_eq!(bytes, [0xee, 0x0b]);
    assert_eq!(reads.load(Relaxed), 2, "the first and the last page, of which parts stay");
    assert!(flags(&mem, 0xa000).contains(PageFlags::DIRTY));
}

#[test]
fn loading_tells_no_watcher() {
    let (mem, _) = numbered();
    let mem = Arc::new(mem);
    let watcher = Watcher::register(Arc::clone(&mem)).unwrap();
    mem.map(GpaPage::new(3));
    mem.write(Gpa::new(0x4000), &[1; 4096]);
    assert!(!watcher.is_pending());
    mem.forget_pages([GpaPage::new(3)]);
    assert!(watcher.is_pending(), "what was derived from it must go");
    assert!(mem.is_absent(GpaPage::new(3)) && !mem.is_absent(GpaPage::new(4)));
}

#[test]
fn peeking_changes_nothing() {
    let (mem, _) = numbered();
    let mut bytes = [0; 4];
    mem.peek(Gpa::new(0x4ffe), &mut bytes);
    assert_eq!(bytes, [4, 4, 0, 0]);
    mem.peek(Gpa::new(COVERED - 2), &mut bytes);
    assert_eq!(bytes, [0xff, 0xff, 0, 0]);
    assert!(mem.is_absent(GpaPage::new(4)) && mem.loaded_pages() == 0);
    assert!(!flags(&mem, 0x4000).intersects(PageFlags::DIRTY));
}

#[test]
fn who_maps_ram_finds_all_of_it() {
    let (mem, _) = numbered();
    assert!(!mem.host_regions().is_empty());
    assert_eq!(mem.pages_with(PageFlags::ABSENT).count(), 0);
    assert_eq!(mem.loaded_pages(), (COVERED >> 12) - 1 - 32);
}

/// A file with `bytes` bytes, each of them the low byte of its offset plus 1.
fn file(name: &str, bytes: u64) -> std::fs::File {
    let path = std::env::temp_dir().join(format!("umbra-lazy-{}-{name}", std::process::id()));
    let mut file = std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let contents: Vec<u8> = (0..bytes).map(|at| (at as u8).wrapping_add(1)).collect();
    file.write_all(&contents).unwrap();
    file
}

#[test]
fn a_file_ends_in_zeros() {
    let mem = GuestMemory::new(RAM).unwrap();
    mem.set_page_source(Box::new(FileSource::new(file("zeros", 0x1234)).unwrap())).unwrap();
    assert_eq!(mem.page_source_bytes(), Some(0x1234));
    let mut bytes = [0xff; 8];
    mem.read(Gpa::new(0x1230), &mut bytes);
    assert_eq!(bytes, [0x31, 0x32, 0x33, 0x34, 0, 0, 0, 0]);
    assert!(mem.is_absent(GpaPage::new(0)) && !mem.is_absent(GpaPage::new(2)));
    assert_eq!(mem.page_failure(), None);
}

#[test]
fn a_file_that_shrinks_is_a_failure() {
    let (source, mem) = (file("shrinks", 0x3000), GuestMemory::new(RAM).unwrap());
    let other = source.try_clone().unwrap();
    mem.set_page_source(Box::new(FileSource::new(source).unwrap())).unwrap();
    other.set_len(0x1800).unwrap();
    let mut bytes = [0xff; 2];
    mem.read(Gpa::new(0), &mut bytes);
    assert_eq!((bytes, mem.page_failure()), ([1, 2], None));
    mem.read(Gpa::new(0x1000), &mut bytes);
    assert_eq!(bytes, [0, 0]);
    assert_eq!(mem.page_failure().map(|failure| failure.gpa), Some(Gpa::new(0x1000)));
    mem.read(Gpa::new(0x2000), &mut bytes);
    assert_eq!(mem.page_failure().map(|failure| failure.gpa), Some(Gpa::new(0x1000)), "the first one is kept");
    other.write_all_at(b"back", 0x1000).unwrap();
    mem.read(Gpa::new(0x1000), &mut bytes);
    assert_eq!(bytes, [0, 0], "a page comes once");
}

#[test]
fn pages_sent_away_keep_their_bytes() {
    let (mem, reads) = numbered();
    let page = GpaPage::new;
    let away =
        |mem: &GuestMemory| (0..9).filter(|&n| mem.is_away(page(n)) && !mem.is_absent(page(n))).collect::<Vec<_>>();
    (1..4).for_each(|n| _ = mem.map(page(n)));
    assert_eq!((mem.resident_pages(), away(&mem)), (4, vec![]), "three loaded, one written before");
    assert_eq!(mem.swap_out(page(2), 2), page(4));
    assert_eq!((mem.resident_pages(), away(&mem)), (2, vec![2, 3]));
    let mut bytes = [0; 2];
    mem.read(Gpa::new(0x2fff), &mut bytes);
    assert_eq!((bytes, reads.load(Relaxed)), ([2, 3], 3));
    assert_eq!(away(&mem), [2, 3], "reading them is nothing that the guest does");
    mem.page_arrived(page(2));
    assert_eq!((mem.resident_pages(), away(&mem)), (3, vec![3]));
    // All around, as far as there are any.
    mem.swap_out(page(4), 2);
    assert_eq!((mem.resident_pages(), away(&mem)), (1, vec![1, 3, 5]));
    mem.swap_out(page(4), 100);
    assert_eq!((mem.resident_pages(), away(&mem)), (0, vec![1, 2, 3, 5]));
    // A page that isn't covered, one that is absent, one that is present.
    mem.restore_swapped(&[page(COVERED >> 12), page(7), page(5)]);
    assert_eq!((mem.resident_pages(), mem.swapped_pages()), (3, vec![page(5)]));
    mem.forget_pages([page(5), page(1)]);
    assert_eq!((mem.resident_pages(), away(&mem)), (2, vec![]));
    assert!(mem.is_absent(page(5)) && mem.is_absent(page(1)));
}
