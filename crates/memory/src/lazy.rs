//! RAM whose contents arrive on demand from a file.
//!
//! A page that the source covers is [`PageFlags::ABSENT`] until somebody loads it. An engine that comes to
//! such a page by a guest's data access or fetch may let the guest wait for it; everybody else goes
//! through [`GuestMemory::map`], which loads at once. A page can also be sent away again
//! ([`PageFlags::SWAPPED`]): it keeps its bytes, and only those accesses wait for it.

use crate::{Backing, GuestMemory, MemoryError, PageFlags, RamOffset};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};
use umbra_arch::{Gpa, GpaPage, PAGE_SIZE};

const PAGE: usize = PAGE_SIZE as usize;

/// Where absent pages come from.
pub trait PageSource: Send + Sync {
    /// Bytes it has: RAM from this guest-physical address on is ordinary.
    fn bytes(&self) -> u64;

    /// Reads one page, zeros where the source ends within it.
    ///
    /// # Errors
    /// The host's reason.
    fn read_page(&self, page: GpaPage, into: &mut [u8; PAGE]) -> io::Result<()>;
}

/// A file whose offsets are guest-physical addresses. It must not change while it is used.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    bytes: u64,
}

impl FileSource {
    /// Takes the file with the length that it has now.
    ///
    /// # Errors
    /// When the host doesn't tell the length.
    pub fn new(file: File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        Ok(Self { file, bytes })
    }
}

impl PageSource for FileSource {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_page(&self, page: GpaPage, into: &mut [u8; PAGE]) -> io::Result<()> {
        let start = page.base().raw();
        let there = self.bytes.saturating_sub(start).min(PAGE_SIZE) as usize;
        let (read, rest) = into.split_at_mut(there);
        rest.fill(0);
        self.file.read_exact_at(read, start)
    }
}

/// A page that its source refused to give.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the memory file can't be read at {gpa}: {reason}: leave it as it is during the run")]
pub struct PageFailure {
    /// Where.
    pub gpa: Gpa,
    /// The host's reason.
    pub reason: String,
}

/// What a memory knows of its absent pages besides their flags.
#[derive(Default)]
pub(crate) struct Lazy {
    source: OnceLock<Box<dyn PageSource>>,
    /// Held while a page is loaded: its contents come exactly once.
    loading: Mutex<()>,
    loaded: AtomicU64,
    /// Covered pages that are not away.
    resident: AtomicU64,
    failure: OnceLock<PageFailure>,
}

impl GuestMemory {
    /// Makes all RAM that `source` covers and that nobody has written yet absent. To be called before
    /// the guest runs.
    ///
    /// # Errors
    /// [`MemoryError::SecondSource`] when there is a source already.
    pub fn set_page_source(&self, source: Box<dyn PageSource>) -> Result<(), MemoryError> {
        self.lazy.source.set(source).map_err(|_| MemoryError::SecondSource)?;
        for page in self.covered_pages() {
            if let Backing::Ram(off) = self.locate(page)
                && !self.page_flags(off).intersects(PageFlags::DIRTY)
            {
                self.set_flags(off, PageFlags::ABSENT);
            } else {
                self.lazy.resident.fetch_add(1, Relaxed);
            }
        }
        Ok(())
    }

    /// Bytes that the page source covers; `None` without one.
    #[inline]
    pub fn page_source_bytes(&self) -> Option<u64> {
        self.lazy.source.get().map(|source| source.bytes())
    }

    /// Pages of RAM that the source covers.
    fn covered_pages(&self) -> impl Iterator<Item = GpaPage> + use<> {
        let covered = self.page_source_bytes().unwrap_or(0);
        self.ram_ranges().into_iter().flat_map(move |(start, bytes)| {
            let end = start.raw().saturating_add(bytes).min(covered);
            (start.page().raw()..end.div_ceil(PAGE_SIZE)).map(GpaPage::new)
        })
    }

    fn has_any(&self, page: GpaPage, flags: PageFlags) -> bool {
        matches!(self.locate(page), Backing::Ram(off) if self.page_flags(off).intersects(flags))
    }

    /// Whether the guest's own accesses have to wait for the page.
    pub fn is_away(&self, page: GpaPage) -> bool {
        self.has_any(page, PageFlags::AWAY)
    }

    /// Whether the page has yet to be loaded.
    #[inline]
    pub fn is_absent(&self, page: GpaPage) -> bool {
        self.has_any(page, PageFlags::ABSENT)
    }

    /// Loads the page behind `backing` if it is absent.
    #[inline]
    pub(crate) fn ensure_loaded(&self, page: GpaPage, backing: Backing) {
        if self.lazy.source.get().is_some()
            && let Backing::Ram(off) = backing
            && self.page_flags(off).intersects(PageFlags::ABSENT)
        {
            self.load_page(page, off);
        }
    }

    /// Nothing can have been derived from an absent page, so nobody has to be told.
    #[cold]
    fn load_page(&self, page: GpaPage, off: RamOffset) {
        let _loading = self.lazy.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.page_flags(off).intersects(PageFlags::ABSENT) {
            return;
        }
        let mut contents = [0; PAGE];
        self.read_source(page, &mut contents);
        self.fill_absent(off, &contents);
        self.lazy.loaded.fetch_add(1, Relaxed);
    }

    /// Gives an absent page its contents.
    pub(crate) fn fill_absent(&self, off: RamOffset, contents: &[u8]) {
        self.store_bytes(off.page_base(), contents);
        self.set_flags(off, PageFlags::DIRTY);
        self.clear_flags(off, PageFlags::ABSENT);
        self.lazy.resident.fetch_add(1, Relaxed);
    }

    /// Reads a page from the source; zeros if that fails, which [`page_failure`](Self::page_failure) tells.
    fn read_source(&self, page: GpaPage, into: &mut [u8; PAGE]) {
        let Some(source) = self.lazy.source.get() else { return };
        if let Err(error) = source.read_page(page, into) {
            into.fill(0);
            self.lazy.failure.get_or_init(|| PageFailure { gpa: page.base(), reason: error.to_string() });
        }
    }

    /// Loads every absent page, for those who reach RAM without asking.
    pub fn load_all(&self) {
        self.covered_pages().for_each(|page| self.page_arrived(page));
    }

    /// A page is there for the guest's own accesses, too.
    pub fn page_arrived(&self, page: GpaPage) {
        if let Backing::Ram(off) = self.map(page)
            && self.page_flags(off).intersects(PageFlags::SWAPPED)
        {
            self.clear_flags(off, PageFlags::SWAPPED);
            self.lazy.resident.fetch_add(1, Relaxed);
        }
    }

    /// Pages that the source covers and that are not away.
    pub fn resident_pages(&self) -> u64 {
        self.lazy.resident.load(Relaxed)
    }

    /// Sends up to `count` pages that are present away, as a host does that swaps: the next ones in the order of
    /// their addresses from `from` on, all around. Answers where to go on.
    pub fn swap_out(&self, from: GpaPage, count: u64) -> GpaPage {
        let (before, behind): (Vec<_>, Vec<_>) = self.covered_pages().partition(|&page| page < from);
        let mut left = count;
        let mut next = from;
        for page in behind.into_iter().chain(before) {
            if left == 0 {
                break;
            }
            next = GpaPage::new(page.raw() + 1);
            if !self.is_away(page) {
                self.set_swapped(page);
                left -= 1;
            }
        }
        self.map_changed();
        next
    }

    fn set_swapped(&self, page: GpaPage) {
        if let Backing::Ram(off) = self.locate(page) {
            self.set_flags(off, PageFlags::SWAPPED);
            self.lazy.resident.fetch_sub(1, Relaxed);
        }
    }

    /// The pages that were sent away.
    pub fn swapped_pages(&self) -> Vec<GpaPage> {
        self.covered_pages().filter(|&page| self.has_any(page, PageFlags::SWAPPED)).collect()
    }

    /// Sends away exactly these: a saved machine is restored.
    pub fn restore_swapped(&self, pages: &[GpaPage]) {
        self.swapped_pages().into_iter().for_each(|page| self.page_arrived(page));
        let covered = self.page_source_bytes().unwrap_or(0);
        let fits = |page: &GpaPage| page.base().raw() < covered && !self.is_away(*page);
        pages.iter().copied().filter(fits).for_each(|page| self.set_swapped(page));
        self.map_changed();
    }

    /// Makes pages that the source covers absent again, whatever they hold: a saved machine is restored.
    pub fn forget_pages(&self, pages: impl IntoIterator<Item = GpaPage>) {
        let mut any = false;
        for page in pages {
            if let Backing::Ram(off) = self.locate(page) {
                if !self.page_flags(off).intersects(PageFlags::AWAY) {
                    self.lazy.resident.fetch_sub(1, Relaxed);
                }
                self.clear_flags(off, PageFlags::DIRTY.union(PageFlags::SWAPPED));
                self.set_flags(off, PageFlags::ABSENT);
                any = true;
            }
        }
        if any {
            self.map_changed();
        }
    }

    /// Reads as [`read`](Self::read), but leaves absent pages absent: for traces.
    pub fn peek(&self, gpa: Gpa, into: &mut [u8]) {
        for (at, chunk) in crate::guest::pages_of(gpa, into.len()) {
            let piece = &mut into[chunk];
            if self.is_absent(at.page()) {
                let mut contents = [0; PAGE];
                self.read_source(at.page(), &mut contents);
                let start = at.offset() as usize;
                piece.copy_from_slice(&contents[start..start + piece.len()]);
            } else {
                self.read(at, piece);
            }
        }
    }

    /// Pages read from the source so far.
    pub fn loaded_pages(&self) -> u64 {
        self.lazy.loaded.load(Relaxed)
    }

    /// The first page that the source refused to give. What the guest has seen since is wrong: end the run.
    #[inline]
    pub fn page_failure(&self) -> Option<&PageFailure> {
        self.lazy.failure.get()
    }
}
