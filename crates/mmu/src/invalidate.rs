//! Dropping exactly what was derived from a changed entry.

use crate::adopt::UPPER;
use crate::event::Event;
use crate::mmu::Mmu;
use crate::shadow::{Link, ShadowEntry};
use crate::writers::Writer;
use smallvec::SmallVec;
use umbra_arch::Gpa;
use umbra_memory::{Backing, PageFlags, RamOffset};

/// Entries stored to without any use of the table in between, after which it counts as reused.
const IDLE_WRITES: u32 = 64;
/// The same for a table without present entries. Not 0: guests empty a table and fill it again.
const IDLE_WRITES_WHEN_EMPTY: u32 = 16;
/// Up to so many linear pages are cleared one by one; beyond that whole columns go.
const MAX_SINGLE_CLEARS: u64 = 4096;

/// What a store to a table leaves to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Written {
    /// Nothing.
    Done,
    /// This entry, by its shadow page's index and its own, has to be looked at: [`Mmu::entry_written`].
    Entry(u32, u32),
    /// All: [`Mmu::frame_written`].
    Unknown,
}

impl Mmu {
    /// After a store of `bytes` bytes at `gpa` to a WATCHED page: drops what was derived from entries that now say something else.
    pub fn table_written(&mut self, gpa: Gpa, bytes: u32) {
        self.check_memory_map();
        let mut at = gpa;
        let mut left = u64::from(bytes);
        while left > 0 {
            let chunk = left.min(4096 - at.offset());
            if let Some(off) = self.mem.map(at.page()).readable() {
                self.frame_written(off.add(at.offset()), chunk);
            }
            at = at.add(chunk);
            left -= chunk;
        }
    }

    /// As [`frame_written`](Self::frame_written) for a scalar, as far as little is to be done, which is nearly always.
    #[inline(always)]
    pub fn scalar_written(&mut self, off: RamOffset, bytes: u64) -> Written {
        if self.drops_at_random() {
            return Written::Unknown;
        }
        let (first, last) = (off.raw() & 0xfff, (off.raw() & 0xfff) + bytes - 1);
        let Some(index) = self.shadow.first_of_frame(off) else { return Written::Unknown };
        let Some(page) = self.shadow.try_page_mut(index) else { return Written::Unknown };
        let shift = page.role.format.entry_bytes().trailing_zeros();
        let at = (first >> shift) as usize;
        let one = page.next().is_none() && bytes >= 4 && (first ^ last) >> shift == 0 && at < UPPER;
        if !one || page.idle_writes >= IDLE_WRITES_WHEN_EMPTY - 1 {
            return Written::Unknown;
        }
        let Some(entry) = page.entries.get(at) else { return Written::Unknown };
        page.idle_writes += 1;
        self.stats.table_writes += 1;
        if entry.is_present() { Written::Entry(index, at as u32) } else { Written::Done }
    }

    /// As far as [`scalar_written`](Self::scalar_written) left something to do.
    #[inline(always)]
    pub fn entry_written(&mut self, index: u32, at: u32) {
        if self.refresh_present_entry(index, at as usize) {
            self.stats.entries_dropped += 1;
        }
    }

    /// As [`table_written`](Self::table_written) for a store that was just translated, within one page.
    pub fn frame_written(&mut self, off: RamOffset, bytes: u64) {
        self.maybe_drop();
        let first_byte = off.raw() & 0xfff;
        let mut next = self.shadow.first_of_frame(off);
        if next.is_none() || cfg!(umbra_mutant = "byte-stores-drop-nothing") && bytes == 1 {
            return;
        }
        self.stats.table_writes += 1;
        while let Some(index) = next {
            let page = self.shadow.page_mut(index);
            next = page.next();
            // Of 4 or 8 bytes.
            let shift = page.role.format.entry_bytes().trailing_zeros();
            let (first, last) = ((first_byte >> shift) as usize, ((first_byte + bytes - 1) >> shift) as usize);
            let idle = page.idle_writes.saturating_add((last - first) as u32 + 1);
            page.idle_writes = idle;
            if last >= UPPER {
                self.part_upper_half(index);
            }
            let mut at = first;
            while at <= last {
                if self.refresh_entry(index, at) {
                    self.stats.entries_dropped += 1;
                }
                at += 1;
            }
            if idle >= IDLE_WRITES_WHEN_EMPTY {
                self.retire_if_unused(index);
            }
        }
    }

    /// A page without entries, or written to like data, no longer serves as a table.
    fn retire_if_unused(&mut self, index: u32) {
        let page = self.shadow.page(index);
        let enough = if page.present == 0 { IDLE_WRITES_WHEN_EMPTY } else { IDLE_WRITES };
        if page.idle_writes >= enough {
            self.retire(index);
        }
    }

    #[cold]
    fn retire(&mut self, index: u32) {
        let link = self.shadow.link_of(index);
        if self.is_current_top(link) {
            return;
        }
        for slot in self.roots.used() {
            if self.roots.slots[slot].as_ref().is_some_and(|root| root.tops.contains(&Some(link))) {
                self.free_root(slot);
            }
        }
        self.stats.tables_retired += 1;
        self.free_page(index);
    }

    fn is_current_top(&self, link: Link) -> bool {
        self.roots.slots[self.current].as_ref().is_some_and(|root| root.tops.contains(&Some(link)))
    }

    /// Drops one present entry and all that the contexts hold because of it.
    #[inline(always)]
    pub(crate) fn drop_entry(&mut self, index: u32, at: usize) {
        if self.events.is_on() {
            self.note_drop(index, at);
        }
        let page = self.shadow.page_mut(index);
        let (mut shift, roots, anywhere) = (page.shift, page.roots, page.anywhere);
        let only_base = if let [base] = page.bases[..] { Some(base) } else { None };
        let entry = page.take(at);
        if cfg!(umbra_mutant = "format-from-the-mode-in-force") {
            let level = page.role.level;
            shift = self.cpu_role().root_page_role(false).format.shift(level);
        }
        let is_small = entry.is_leaf() && shift == 12;
        if is_small && (!entry.is_executable() || self.holds_no_code(entry.frame())) {
            // Nearly always.
            if let Some(base) = only_base.filter(|_| !anywhere) {
                return self.clear_page(roots, base.wrapping_add((at as u64) << 12));
            }
        } else if !entry.is_leaf() && self.shadow.get(entry.child()).is_none() {
            // What was below went when the child was freed.
            return;
        } else if entry.is_executable() {
            self.fetches_ended(index, at, shift);
        }
        self.dropped(index, at, entry, shift);
    }

    #[cold]
    fn note_drop(&mut self, index: u32, at: usize) {
        let (table, level) = (self.shadow.page(index).table, self.shadow.page(index).role.level);
        self.events.note(|| Event::EntryDropped { table, level, index: at });
    }

    /// Fetches by an entry of a shadow page that covers 2 to the power of `shift` bytes may have ended.
    #[cold]
    fn fetches_ended(&mut self, index: u32, at: usize, shift: u32) {
        self.renew_stamps(self.shadow.page(index).roots);
        let page = self.shadow.page(index);
        let is_upper = |base: &u64| base.wrapping_add((at as u64) << shift) >> 63 != 0;
        // What is topmost has both halves.
        let upper = if page.is_child { page.anywhere || page.bases.iter().any(is_upper) } else { at >= UPPER };
        if upper {
            self.upper_half_changed(index);
        }
    }

    /// Clears what the contexts hold because of `entry`, which was dropped.
    #[inline(never)]
    fn dropped(&mut self, index: u32, at: usize, entry: ShadowEntry, shift: u32) {
        if !entry.is_leaf() && !cfg!(umbra_mutant = "hints-outlive-links") {
            self.hints.forget();
        }
        let page = self.shadow.page(index);
        let roots = page.roots;
        if page.anywhere {
            return self.clear_columns(roots);
        }
        let mut known = 0;
        while let Some(&base) = self.shadow.page(index).bases.get(known) {
            known += 1;
            let gva = base.wrapping_add((at as u64) << shift);
            if entry.is_leaf() {
                self.clear_range(roots, gva, 1 << (shift - 12));
            } else {
                self.clear_below(roots, gva, entry.child(), 1 << (shift - 12));
            }
        }
    }

    /// Nothing was decoded from the page, so no fetch from it is remembered by a stamp.
    fn holds_no_code(&self, page: Gpa) -> bool {
        match self.mem.locate(page.page()) {
            Backing::Ram(off) => !self.watcher.has_claimed(off, PageFlags::CODE),
            _ => false,
        }
    }

    /// Clears what was reached at `gva` through a link to `child`.
    fn clear_below(&mut self, roots: u64, gva: u64, child: Link, pages: u64) {
        let singles: SmallVec<[u64; 64]> = match self.shadow.get(child) {
            Some(child) if child.role.level == 1 && child.present <= 64 => present_at(&child.entries).collect(),
            _ => return self.clear_range(roots, gva, pages),
        };
        singles.into_iter().for_each(|at| self.clear_range(roots, gva.wrapping_add(at << 12), 1));
    }

    #[inline(never)]
    fn clear_range(&mut self, roots: u64, gva: u64, pages: u64) {
        if pages.saturating_mul(u64::from(roots.count_ones())) > MAX_SINGLE_CLEARS {
            return self.clear_columns(roots);
        }
        for at in 0..pages {
            self.clear_page(roots, gva.wrapping_add(at << 12));
        }
    }

    #[inline(always)]
    fn clear_page(&mut self, roots: u64, page: u64) {
        let pool = &mut self.pool;
        self.roots.for_each_in(roots, |root| {
            root.existing_columns().filter(|c| c.held != 0).for_each(|column| pool.drop_page(column, page));
        });
    }

    /// Clears all columns of these roots.
    pub(crate) fn clear_columns(&mut self, roots: u64) {
        let (pool, clears) = (&mut self.pool, &mut self.stats.context_clears);
        self.roots.for_each_in(roots, |root| {
            for column in root.columns.iter_mut().filter(|c| c.held != 0) {
                pool.clear(column);
                *clears += 1;
            }
        });
        self.sync_active();
    }

    fn renew_stamps(&mut self, roots: u64) {
        // Several roots may share it: `fetch_stamp` adds the slot.
        let stamp = self.next_stamp();
        self.roots.for_each_in(roots, |root| root.stamp = stamp);
        self.sync_fetch_stamp();
    }

    /// Frees a shadow page, with what the contexts hold because of it; its frame may become unwatched.
    pub(crate) fn free_page(&mut self, index: u32) {
        self.hints.forget();
        // Nobody watches it any more.
        self.part_upper_half(index);
        let page = self.shadow.page(index);
        let (off, roots, present) = (page.off, page.roots, u64::from(page.present));
        if present != 0 {
            let page = self.shadow.page(index);
            let is_upper = page.anywhere || page.bases.iter().any(|base| base >> 63 != 0);
            self.renew_stamps(roots);
            if is_upper {
                self.upper_half_changed(index);
            }
            let cost = present * u64::from(roots.count_ones()) * page_bases(self.shadow.page(index).bases.len());
            let page = self.shadow.page(index);
            if page.role.level == 1 && !page.anywhere && cost <= MAX_SINGLE_CLEARS {
                let bases = page.bases.clone();
                let singles: Vec<u64> = present_at(&page.entries).collect();
                for base in bases {
                    singles.iter().for_each(|at| self.clear_range(roots, base.wrapping_add(at << 12), 1));
                }
            } else {
                self.clear_columns(roots);
            }
        }
        self.stats.pages_freed += 1;
        let page = self.shadow.page(index);
        let (table, role) = (page.table, page.role);
        self.events.note(|| Event::PageFreed { table, role });
        if self.shadow.release(index) {
            self.watcher.release(off, PageFlags::WATCHED);
        }
    }

    /// Evicts shadow pages until `more` new ones fit. True if there were any.
    pub(crate) fn make_room(&mut self, more: usize) -> bool {
        let mut evicted = false;
        let tops = self.roots.slots[self.current].as_ref().map_or([None; 4], |root| root.tops);
        while let Some(index) = self.shadow.victim(more, |link| tops.contains(&Some(link))) {
            self.stats.pages_evicted += 1;
            self.free_page(index);
            evicted = true;
        }
        evicted
    }

    /// CODE, WATCHED or MONITORED was set for the page that holds `off`: no fast write may hit it any more.
    pub fn code_page_changed(&mut self, off: RamOffset) {
        self.drop_write_tags(off);
    }

    /// Clears DIRTY of the page that holds `off`; its next write sets it again.
    pub fn clean_page(&mut self, off: RamOffset) {
        self.watcher.clean(off);
        self.drop_write_tags(off);
    }

    pub(crate) fn drop_write_tags(&mut self, off: RamOffset) {
        let writers = self.writers.take(off);
        self.drop_writers(&writers);
    }

    pub(crate) fn drop_writers(&mut self, writers: &[Writer]) {
        for &(page, roots) in writers {
            let pool = &mut self.pool;
            self.roots.for_each_in(roots, |root| {
                root.columns.iter().filter(|c| c.held != 0).for_each(|column| pool.drop_write(column, page));
            });
        }
    }

    /// Drops all fast translations; they come back from the shadow tree.
    pub fn drop_all_contexts(&mut self) {
        self.clear_columns(!0);
    }

    /// Drops all shadow pages and fast translations; they come back from the guest's tables.
    pub fn drop_all_shadow(&mut self) {
        self.clear_columns(!0);
        self.writers.clear();
        self.hints.forget();
        self.renew_stamps(!0);
        self.part_all_upper_halves();
        let all: Vec<u32> = self.shadow.indices().collect();
        for index in all {
            let page = self.shadow.page(index);
            let (off, table, role) = (page.off, page.table, page.role);
            self.events.note(|| Event::PageFreed { table, role });
            self.shadow.release(index);
            self.watcher.release(off, PageFlags::WATCHED);
            self.stats.pages_freed += 1;
        }
    }
}

fn page_bases(n: usize) -> u64 {
    n.max(1) as u64
}

fn present_at(entries: &[ShadowEntry]) -> impl Iterator<Item = u64> + '_ {
    entries.iter().enumerate().filter(|(_, e)| e.is_present()).map(|(at, _)| at as u64)
}
