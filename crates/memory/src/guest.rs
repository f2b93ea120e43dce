//! Guest memory as everybody sees it.

#[cfg(target_os = "linux")]
use crate::Window;
use crate::flags::FlagTable;
use crate::host::HostMapping;
use crate::layout::{Layout, PlainRam, Region};
use crate::lazy::Lazy;
use crate::watcher::Watchers;
use crate::{Backing, MemoryError, PageFlags, RamOffset, Scalar};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{PoisonError, RwLock};
use umbra_arch::{Gpa, GpaPage, PAGE_SIZE};

/// Room behind RAM for ROM images and added regions; untouched pages cost nothing.
const EXTRA_BYTES: u64 = 64 << 20;

/// A run of guest pages and where the host has them, for accelerators that map them into a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostRegion {
    /// Guest-physical address of the first byte.
    pub gpa: Gpa,
    /// Length, whole pages.
    pub bytes: u64,
    /// Host address of the first byte, valid as long as the [`GuestMemory`] lives.
    pub host: u64,
    /// Guest writes must not reach it.
    pub rom: bool,
}

/// The guest's physical memory: RAM, ROM and holes, with flags for every page.
///
/// Shared as `Arc<GuestMemory>`. RAM lies at `[0, 0xA0000)`, from `0xC0000` up to at most
/// `0xC000_0000`, and the rest from 4 GiB on; the offset of a low address is the address itself.
pub struct GuestMemory {
    host: HostMapping,
    ram_bytes: u64,
    plain: PlainRam,
    /// RAM lies as at power-on: `plain` answers for it.
    is_plain: AtomicBool,
    layout: RwLock<Layout>,
    flags: FlagTable,
    pub(crate) watchers: Watchers,
    generation: AtomicU64,
    extra_used: AtomicU64,
    pub(crate) lazy: Lazy,
}

impl GuestMemory {
    /// Maps `ram_bytes` of RAM, all zero and not yet backed by host memory.
    ///
    /// # Errors
    /// When the size is no multiple of a page or the host refuses the mapping.
    pub fn new(ram_bytes: u64) -> Result<GuestMemory, MemoryError> {
        if ram_bytes == 0 || !ram_bytes.is_multiple_of(PAGE_SIZE) || ram_bytes > 1 << 46 {
            return Err(MemoryError::BadSize(ram_bytes));
        }
        let host = HostMapping::new(ram_bytes + EXTRA_BYTES)?;
        let plain = PlainRam::new(ram_bytes);
        Ok(GuestMemory {
            flags: FlagTable::new((host.bytes() >> 12) as usize),
            host,
            ram_bytes,
            plain,
            is_plain: AtomicBool::new(true),
            layout: RwLock::new(Layout::new(&plain)),
            watchers: Watchers::default(),
            generation: AtomicU64::new(0),
            extra_used: AtomicU64::new(0),
            lazy: Lazy::default(),
        })
    }

    /// Bytes of RAM asked for at creation, the video hole's included.
    pub fn ram_bytes(&self) -> u64 {
        self.ram_bytes
    }

    /// Bytes of the host mapping: every [`RamOffset`] in use is below.
    pub fn mapping_bytes(&self) -> u64 {
        self.host.bytes()
    }

    /// Host address of the byte at offset 0, valid as long as this lives.
    pub fn mapping_address(&self) -> u64 {
        self.host.address()
    }

    /// RAM as sorted `(start, bytes)` ranges, for the firmware's memory map.
    pub fn ram_ranges(&self) -> Vec<(Gpa, u64)> {
        self.layout.read().unwrap_or_else(PoisonError::into_inner).ram_ranges()
    }

    /// The map of regions as the host sees it: sorted, without overlaps, until
    /// [`generation`](Self::generation) changes. Loads all absent pages: who uses it doesn't ask for them.
    pub fn host_regions(&self) -> Vec<HostRegion> {
        self.load_all();
        let layout = self.layout.read().unwrap_or_else(PoisonError::into_inner);
        let region = |r: Region| HostRegion {
            gpa: GpaPage::new(r.start).base(),
            bytes: r.pages << 12,
            host: self.host.address() + r.offset,
            rom: r.rom,
        };
        layout.flat().into_iter().map(region).collect()
    }

    /// Changes whenever the map of regions changes.
    #[inline(always)]
    pub fn generation(&self) -> u64 {
        self.generation.load(Relaxed)
    }

    /// Adds a read-only region at a page-aligned address, padded with zeros to whole pages.
    /// It hides what was there.
    ///
    /// # Errors
    /// When the address is no page's or the room behind RAM is used up.
    pub fn add_rom(&self, gpa: Gpa, bytes: &[u8]) -> Result<RamOffset, MemoryError> {
        let rounded = (bytes.len() as u64).next_multiple_of(PAGE_SIZE);
        let offset = self.add_region(gpa, rounded, true)?;
        self.host.store_bytes(offset, bytes);
        Ok(offset)
    }

    /// Adds zeroed RAM at a page-aligned address, over what was there.
    ///
    /// # Errors
    /// When address or size are not page-aligned or the room behind RAM is used up.
    pub fn add_ram(&self, gpa: Gpa, bytes: u64) -> Result<RamOffset, MemoryError> {
        self.add_region(gpa, bytes, false)
    }

    fn add_region(&self, gpa: Gpa, bytes: u64, rom: bool) -> Result<RamOffset, MemoryError> {
        if gpa.offset() != 0 || !bytes.is_multiple_of(PAGE_SIZE) || bytes == 0 {
            return Err(MemoryError::Misaligned { gpa, bytes });
        }
        let mut layout = self.layout.write().unwrap_or_else(PoisonError::into_inner);
        let used = self.extra_used.load(Relaxed);
        let left = EXTRA_BYTES - used;
        if bytes > left {
            return Err(MemoryError::NoRoom { bytes, left });
        }
        self.extra_used.store(used + bytes, Relaxed);
        let (start, pages) = (gpa.page().raw(), bytes >> 12);
        if layout.has_ram(start, pages) {
            self.is_plain.store(false, Relaxed);
        }
        let offset = self.ram_bytes + used;
        layout.add(Region { start, pages, offset, rom });
        drop(layout);
        self.map_changed();
        Ok(RamOffset::new(offset))
    }

    /// Takes a page-aligned range out of the map; its addresses become [`Backing::Mmio`]. Answers
    /// whether anything was there. The bytes stay allocated.
    ///
    /// # Errors
    /// When address or size are not page-aligned.
    pub fn remove_region(&self, gpa: Gpa, bytes: u64) -> Result<bool, MemoryError> {
        if gpa.offset() != 0 || !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Misaligned { gpa, bytes });
        }
        let mut layout = self.layout.write().unwrap_or_else(PoisonError::into_inner);
        let removed = layout.remove(gpa.page().raw(), bytes >> 12);
        self.is_plain.store(false, Relaxed);
        drop(layout);
        self.map_changed();
        Ok(removed)
    }

    pub(crate) fn map_changed(&self) {
        self.generation.fetch_add(1, Relaxed);
        self.watchers.map_changed();
    }

    /// What lies behind a physical page, loaded if it was absent; offsets are the page's first byte's.
    #[inline]
    pub fn map(&self, page: GpaPage) -> Backing {
        let backing = self.locate(page);
        self.ensure_loaded(page, backing);
        backing
    }

    /// As [`map`](Self::map), but leaves an absent page absent.
    #[inline]
    pub fn locate(&self, page: GpaPage) -> Backing {
        if self.is_plain.load(Relaxed)
            && let Some(off) = self.plain.map(page.raw())
        {
            return Backing::Ram(off);
        }
        self.locate_slow(page)
    }

    #[cold]
    fn locate_slow(&self, page: GpaPage) -> Backing {
        self.layout.read().unwrap_or_else(PoisonError::into_inner).map(page)
    }

    /// Addresses of the host at which pages of RAM can be mapped once more; `None` if it refuses.
    #[cfg(target_os = "linux")]
    pub fn window(&self, bytes: usize) -> Option<Window> {
        Window::new(self.host.shared()?, bytes).ok()
    }

    /// Loads a scalar; no alignment is demanded. 0 outside the mapping.
    #[inline(always)]
    pub fn load<T: Scalar>(&self, off: RamOffset) -> T {
        self.host.load(off)
    }

    /// Stores a scalar; no alignment is demanded. Ignored outside the mapping. Sets no flag.
    #[inline(always)]
    pub fn store<T: Scalar>(&self, off: RamOffset, value: T) {
        self.host.store(off, value);
    }

    /// Loads words, one after the other; zeros outside the mapping.
    #[inline(always)]
    pub fn load_words<T: Scalar, const N: usize>(&self, off: RamOffset) -> [T; N] {
        self.host.load_words(off)
    }

    /// Stores words, one after the other. Ignored outside the mapping. Sets no flag.
    #[inline(always)]
    pub fn store_words<T: Scalar, const N: usize>(&self, off: RamOffset, words: &[T; N]) {
        self.host.store_words(off, words);
    }

    /// Loads bytes; zeros when any of them is outside the mapping.
    pub fn load_bytes(&self, off: RamOffset, into: &mut [u8]) {
        self.host.load_bytes(off, into);
    }

    /// Stores bytes; nothing when any of them is outside the mapping. Sets no flag.
    pub fn store_bytes(&self, off: RamOffset, from: &[u8]) {
        self.host.store_bytes(off, from);
    }

    /// Compare and exchange: a locked operation where `off` is a multiple of the width, else a load
    /// and a store. Sets no flag.
    ///
    /// # Errors
    /// The value found, when it isn't `current`.
    pub fn compare_exchange<T: Scalar>(&self, off: RamOffset, current: T, new: T) -> Result<T, T> {
        self.host.compare_exchange(off, current, new)
    }

    /// Replaces a scalar that is `current`; whether it was. Not locked: for whom nobody stores to at the same time. Sets no
    /// flag.
    #[inline(always)]
    pub fn replace<T: Scalar>(&self, off: RamOffset, current: T, new: T) -> bool {
        let found = self.host.load::<T>(off) == current;
        if found {
            self.host.store(off, new);
        }
        found
    }

    /// The flags of the page that holds `off`.
    #[inline(always)]
    pub fn page_flags(&self, off: RamOffset) -> PageFlags {
        self.flags.get(off)
    }

    /// Sets flags of the page that holds `off`. CODE and WATCHED are a [`Watcher`](crate::Watcher)'s to
    /// claim, unless there is only one.
    pub fn set_flags(&self, off: RamOffset, flags: PageFlags) {
        self.flags.set(off, flags);
    }

    /// Clears flags of the page that holds `off`. Who clears DIRTY must also have the MMU drop its
    /// write translations.
    pub fn clear_flags(&self, off: RamOffset, flags: PageFlags) {
        self.flags.clear(off, flags);
    }

    /// Marks the pages of a store as dirty.
    #[inline]
    pub fn note_store(&self, off: RamOffset, bytes: u64) {
        self.mark_dirty(off);
        let last = off.add(bytes.saturating_sub(1));
        if last.page_base() != off.page_base() {
            self.mark_dirty(last);
        }
    }

    #[inline(always)]
    fn mark_dirty(&self, off: RamOffset) {
        if !self.flags.get(off).contains(PageFlags::DIRTY) {
            self.flags.set(off, PageFlags::DIRTY);
        }
    }

    /// Reads by physical address, any length; absent memory reads as 0xff.
    pub fn read(&self, gpa: Gpa, into: &mut [u8]) {
        for (at, chunk) in pages_of(gpa, into.len()) {
            let piece = &mut into[chunk];
            match self.map(at.page()).at(at.offset()) {
                Backing::Ram(off) | Backing::Rom(off) => self.host.load_bytes(off, piece),
                Backing::Mmio => piece.fill(0xff),
            }
        }
    }

    /// Writes by physical address, any length: marks pages dirty and tells the watchers of CODE and WATCHED
    /// pages. Writes to ROM and absent memory vanish.
    pub fn write(&self, gpa: Gpa, from: &[u8]) {
        for (at, chunk) in pages_of(gpa, from.len()) {
            let piece = &from[chunk];
            if piece.len() as u64 == PAGE_SIZE && self.is_absent(at.page()) {
                // Nothing of the old contents remains: no need to load them.
                if let Backing::Ram(off) = self.locate(at.page()) {
                    self.fill_absent(off, piece);
                }
            } else if let Backing::Ram(off) = self.map(at.page()).at(at.offset()) {
                self.host.store_bytes(off, piece);
                self.written(off, at, piece.len() as u32);
            }
        }
    }

    /// An accelerator's guest has written to this page of RAM by way of [`host_regions`](Self::host_regions):
    /// marks it dirty and tells the watchers.
    pub fn page_written_outside(&self, page: GpaPage) {
        if let Backing::Ram(off) = self.map(page) {
            self.written(off, page.base(), PAGE_SIZE as u32);
        }
    }

    fn written(&self, off: RamOffset, gpa: Gpa, bytes: u32) {
        self.mark_dirty(off);
        self.watchers.written(off, self.flags.get(off), gpa, bytes);
    }

    /// The offsets of the pages that have any of `flags`, in order.
    pub fn pages_with(&self, flags: PageFlags) -> impl Iterator<Item = RamOffset> + '_ {
        let used = (self.ram_bytes + self.extra_used.load(Relaxed)) >> 12;
        self.pages().take(used as usize).filter(move |&off| self.flags.get(off).intersects(flags))
    }

    /// The offsets of all pages in the mapping, RAM first.
    pub fn pages(&self) -> impl Iterator<Item = RamOffset> + use<> {
        (0..self.host.bytes() >> 12).map(|page| RamOffset::new(page << 12))
    }
}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GuestMemory({} bytes)", self.ram_bytes)
    }
}

/// Splits `[gpa, gpa + len)` at page borders into addresses and index ranges.
pub(crate) fn pages_of(gpa: Gpa, len: usize) -> impl Iterator<Item = (Gpa, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = gpa.add(done as u64);
        let n = (len - done).min((PAGE_SIZE - at.offset()) as usize);
        done += n;
        Some((at, done - n..done))
    })
}
