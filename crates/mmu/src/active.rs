//! The fast paths: one lookup in the column that the current root and view select.

use crate::context::{Column, Entry, Pool, column_of};
use crate::mmu::Mmu;
use umbra_arch::Gva;
use umbra_memory::{PageFlags, RamOffset};

/// A base beyond every pool: no slot is found.
const NOWHERE: usize = usize::MAX / 2;

/// The table that the fast data paths read at present, for generated code: slot `gva >> 12 & mask`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FastTable {
    /// Address of its first slot, valid until the next call of any of [`Mmu`]'s methods that change it.
    pub slots: *const Entry,
    /// Number of slots minus one.
    pub mask: u64,
}

/// The column that the fast paths read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Active {
    base: usize,
    mask: u64,
}

impl Active {
    /// No slot is found.
    pub(crate) const NONE: Active = Active { base: NOWHERE, mask: 0 };

    fn of(column: &Column) -> Active {
        Active { base: column.base as usize, mask: column.mask() }
    }

    #[inline(always)]
    fn slot<'a>(&self, pool: &'a Pool, gva: Gva) -> Option<&'a Entry> {
        pool.entries.get(self.base + (gva.raw() >> 12 & self.mask) as usize)
    }

    /// The tag of the page that an access ends in: equal to its slot's tag only if that is the page it
    /// starts in, since the next page has another slot.
    #[inline(always)]
    fn tag(&self, gva: Gva, bytes: u64) -> u64 {
        gva.raw().wrapping_add(bytes.wrapping_sub(1)) & !0xfff
    }

    #[inline(always)]
    fn read<'a>(&self, pool: &'a Pool, gva: Gva, bytes: u64) -> Option<&'a Entry> {
        self.slot(pool, gva).filter(|slot| slot.tag_read == self.tag(gva, bytes))
    }

    #[inline(always)]
    fn reported_write<'a>(&self, pool: &'a Pool, gva: Gva, bytes: u64) -> Option<&'a Entry> {
        self.slot(pool, gva).filter(|slot| slot.tag_write == self.tag(gva, bytes) ^ Entry::REPORTED)
    }

    #[inline(always)]
    fn write<'a>(&self, pool: &'a Pool, gva: Gva, bytes: u64) -> Option<&'a Entry> {
        self.slot(pool, gva).filter(|slot| slot.tag_write == self.tag(gva, bytes))
    }
}

impl Mmu {
    /// After anything that can move or clear the columns that are read.
    #[inline]
    pub(crate) fn sync_active(&mut self) {
        let Some(root) = self.roots.slots[self.current].as_ref() else { return };
        let column = &root.columns[column_of(&self.view)];
        if !column.exists() {
            return;
        }
        if self.guarded {
            (self.active, self.system) = (Active::NONE, Active::NONE);
            return;
        }
        self.active = Active::of(column);
        self.system = match column_of(&self.view.implicit()) {
            same if same == column_of(&self.view) => self.active,
            other => {
                let other = &root.columns[other];
                if other.exists() && other.keys & self.restricted == 0 { Active::of(other) } else { Active::NONE }
            }
        };
    }

    /// Makes the fast paths miss every access, for a caller that has to look at each (breakpoints,
    /// alignment checks), or lets them hit again.
    pub fn set_guarded(&mut self, guarded: bool) {
        self.guarded = guarded;
        self.selections += 1;
        self.sync_active();
    }

    /// Whether the fast paths read `column`, for the audit.
    pub(crate) fn reads_column(&self, column: &Column) -> bool {
        self.guarded || column.exists() && self.active == Active::of(column)
    }

    /// Whether implicit accesses read `column` or none, for the audit.
    pub(crate) fn reads_for_system(&self, column: &Column) -> bool {
        self.system == Active::NONE || column.exists() && self.system == Active::of(column)
    }

    /// The fast translation of `bytes` (1..=8192) bytes at `gva` for a read; `None` on a miss and for
    /// an access that crosses a page's end.
    #[inline(always)]
    pub fn lookup_read(&self, gva: Gva, bytes: u64) -> Option<RamOffset> {
        self.active.read(&self.pool, gva, bytes).map(|slot| self.offset_in(slot, gva))
    }

    /// As [`lookup_read`](Self::lookup_read) for a write that nobody has to be told of: the page is
    /// RAM, dirty already, no code and no table.
    #[inline(always)]
    pub fn lookup_write(&self, gva: Gva, bytes: u64) -> Option<RamOffset> {
        self.active.write(&self.pool, gva, bytes).map(|slot| self.offset_in(slot, gva))
    }

    /// As [`lookup_write`](Self::lookup_write) for a write to a table, or to a page of code, that this MMU's processor
    /// alone has to be told of.
    #[inline(always)]
    pub fn lookup_reported_write(&self, gva: Gva, bytes: u64) -> Option<RamOffset> {
        let slot = self.active.reported_write(&self.pool, gva, bytes)?;
        let off = self.offset_in(slot, gva);
        let flags = self.mem.page_flags(off);
        let known = flags.contains(PageFlags::DIRTY) && flags.intersects(PageFlags::REPORTED);
        (known && !flags.intersects(PageFlags::AWAY) && self.watcher.is_alone()).then_some(off)
    }

    /// As [`lookup_reported_write`](Self::lookup_reported_write) for a write to a table that holds no code.
    #[inline(always)]
    pub fn lookup_table_write(&self, gva: Gva, bytes: u64) -> Option<RamOffset> {
        const ASKED: PageFlags =
            PageFlags::DIRTY.union(PageFlags::AWAY).union(PageFlags::WATCHED).union(PageFlags::CODE);
        let slot = self.active.reported_write(&self.pool, gva, bytes)?;
        let off = self.offset_in(slot, gva);
        let is_table = self.mem.page_flags(off).intersection(ASKED) == PageFlags::DIRTY.union(PageFlags::WATCHED);
        (is_table && self.watcher.is_alone()).then_some(off)
    }

    /// Whether the table in force knows of `gva`'s page as much as can be known of one whose writes are reported, if they
    /// are allowed.
    pub(crate) fn is_cached(&self, gva: Gva, writes: bool) -> bool {
        self.lookup_read(gva, 1).is_some() && (!writes || self.active.reported_write(&self.pool, gva, 1).is_some())
    }

    /// The table that [`lookup_read`](Self::lookup_read) and [`lookup_write`](Self::lookup_write) read; `None`
    /// if they always miss.
    #[inline]
    pub fn fast_table(&self) -> Option<FastTable> {
        let Active { base, mask } = self.active;
        let first = self.pool.entries.get(base)?;
        Some(FastTable { slots: first, mask })
    }

    /// As long as this is the same, what was found in a [`FastTable`] holds for that table, even if its slot
    /// holds another page by now.
    #[inline(always)]
    pub fn withdrawals(&self) -> u64 {
        self.pool.withdrawals
    }

    /// The pages around `gva`, at most `most` in each direction, that the fast table maps to neighbouring RAM for a
    /// read or a write: the first one's address and their number; `None` if not even `gva`'s is there.
    pub fn run_around(&self, gva: Gva, write: bool, most: u64) -> Option<(Gva, u64)> {
        let lookup = |page: Gva| if write { self.lookup_write(page, 1) } else { self.lookup_read(page, 1) };
        let page = Gva::new(gva.raw() & !0xfff);
        let ram = lookup(page)?.raw().wrapping_sub(page.raw());
        let follows = |at: u64| lookup(Gva::new(at)).is_some_and(|off| off.raw().wrapping_sub(at) == ram);
        let before = (1..=most).take_while(|n| page.raw() >= n << 12 && follows(page.raw() - (n << 12))).count() as u64;
        let after = (1..=most).take_while(|n| page.raw().checked_add(n << 12).is_some_and(follows)).count() as u64;
        Some((Gva::new(page.raw() - (before << 12)), before + 1 + after))
    }

    /// As [`lookup_read`](Self::lookup_read) for an implicit supervisor access.
    #[inline(always)]
    pub fn lookup_system_read(&self, gva: Gva, bytes: u64) -> Option<RamOffset> {
        self.system.read(&self.pool, gva, bytes).map(|slot| self.offset_in(slot, gva))
    }

    /// As [`lookup_write`](Self::lookup_write) for an implicit supervisor access.
    #[inline(always)]
    pub fn lookup_system_write(&self, gva: Gva, bytes: u64) -> Option<RamOffset> {
        self.system.write(&self.pool, gva, bytes).map(|slot| self.offset_in(slot, gva))
    }

    /// As [`lookup_read`](Self::lookup_read) for one byte of an instruction fetch.
    #[inline(always)]
    pub fn lookup_fetch(&self, gva: Gva) -> Option<RamOffset> {
        let slot = self.active.slot(&self.pool, gva)?;
        (slot.tag_fetch == self.active.tag(gva, 1)).then(|| self.offset_in(slot, gva))
    }

    /// Where `gva` is in RAM by its page's slot.
    #[inline(always)]
    pub(crate) fn offset_in(&self, slot: &Entry, gva: Gva) -> RamOffset {
        RamOffset::new(gva.raw().wrapping_add(slot.addend).wrapping_sub(self.ram))
    }
}
