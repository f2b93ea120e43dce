//! Translation contexts: direct-mapped tables of translations that the fast paths read.
//!
//! A root owns up to [`COLUMNS`] *columns*, one for each way of judging raw rights. All columns are
//! blocks of one pool, so that selecting one is choosing an offset and a mask. A tag is the address of the page that
//! may be accessed, or that of a page which belongs to another slot: whatever address is looked for in a slot, a check
//! is that it lies less than a page above the tag.

use crate::rights::{self, Rights};
use crate::role::View;
use crate::windows::Withdrawn;
use umbra_arch::paging::{Access, AccessKind};

/// A slot of a column. Integers only: generated code reads it too.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Entry {
    /// The page's address if reads are allowed, else that of another slot's page.
    pub tag_read: u64,
    /// Likewise for writes that nobody has to be told of. If it differs from the page's by [`Entry::REPORTED`]: writes are
    /// allowed, if whoever has to be is told.
    pub tag_write: u64,
    /// Likewise for instruction fetches.
    pub tag_fetch: u64,
    /// What to add to a linear address to get its host address, wrapping.
    pub addend: u64,
}

/// What makes a page's address that of one which has another slot: nothing is allowed. No access is so long that it ends
/// there.
const ELSEWHERE: u64 = 0x8000;

impl Entry {
    /// Likewise, and it says something.
    pub(crate) const REPORTED: u64 = 0x1_0000;

    /// Slots of a table that is empty for ever, which has as many as tell a page from that in its tag.
    pub const FEW: usize = 2 * (ELSEWHERE >> 12) as usize;

    /// What slot number `slot` holds if it holds nothing.
    pub const fn empty(slot: u64) -> Self {
        let tag = slot << 12 ^ ELSEWHERE;
        Self { tag_read: tag, tag_write: tag, tag_fetch: tag, addend: 0 }
    }

    /// What may be written may be read.
    fn holds(&self, tag: u64) -> bool {
        self.tag_read == tag || self.tag_fetch == tag
    }
    /// Whether what `old` says of the same `page` is still so.
    fn allows_all_of(&self, old: &Entry, page: u64) -> bool {
        let keeps = |new: u64, old: u64| old != page || new == old;
        self.addend == old.addend
            && keeps(self.tag_read, old.tag_read)
            && keeps(self.tag_write, old.tag_write)
            && keeps(self.tag_fetch, old.tag_fetch)
    }
    /// The page that slot number `slot` of a column with this mask holds.
    fn page(&self, slot: u64, mask: u64) -> Option<u64> {
        [self.tag_read, self.tag_fetch].into_iter().find(|tag| tag >> 12 & mask == slot)
    }
}

/// Columns of a root: one for CPL 3, eight for the supervisor's (WP, SMAP enforced, SMEP).
pub(crate) const COLUMNS: usize = 9;
/// Column sizes in entries.
const SIZES: [u32; 4] = [512, 4096, 16384, 65536];
const _: () = assert!((ELSEWHERE | Entry::REPORTED) >> 12 < SIZES[0] as u64, "they choose other slots");
/// Bound on the pool's entries (64 MiB).
const POOL_ENTRIES: u32 = 2 << 20;
/// Of these so many are kept for columns of the smallest size.
const SMALL_RESERVE: u32 = 64 * COLUMNS as u32 * SIZES[0];

/// The column that judges as `view` does.
#[inline(always)]
pub(crate) const fn column_of(view: &View) -> usize {
    if view.user {
        0
    } else {
        let wp = view.wp && !cfg!(umbra_mutant = "column-without-wp");
        1 + (wp as usize | (view.smap_enforced(false) as usize) << 1 | (view.smep as usize) << 2)
    }
}

/// The view that a column stands for, without keys.
pub(crate) const fn view_of(column: usize) -> View {
    let bits = column.wrapping_sub(1);
    View {
        user: column == 0,
        ac: false,
        wp: bits & 1 != 0,
        smap: bits & 2 != 0,
        smep: bits & 4 != 0,
        reports_fetches: false,
        pke: false,
        pks: false,
        pkru: 0,
        pkrs: 0,
    }
}

pub(crate) const READ: u8 = 1;
pub(crate) const WRITE: u8 = 2;
pub(crate) const FETCH: u8 = 4;
/// Writes that have to be told of.
pub(crate) const REPORTED_WRITE: u8 = 8;

/// What each column allows for each combination of raw rights (bit 0 W, bit 1 U, bit 2 X).
pub(crate) const ALLOWED: [[u8; 8]; COLUMNS] = allowed_table();

const fn allowed_table() -> [[u8; 8]; COLUMNS] {
    let mut table = [[0; 8]; COLUMNS];
    let mut column = 0;
    while column < COLUMNS {
        let mut bits = 0;
        while bits < 8 {
            let raw = Rights { write: bits & 1 != 0, user: bits & 2 != 0, exec: bits & 4 != 0, key: 0 };
            table[column][bits] = allowed(raw, &view_of(column));
            bits += 1;
        }
        column += 1;
    }
    table
}

const fn allowed(raw: Rights, view: &View) -> u8 {
    let cpl = if view.user { 3 } else { 0 };
    let mut allowed = 0;
    if rights::check(raw, Access::explicit(AccessKind::Read, cpl), view).is_ok() {
        allowed |= READ;
    }
    if rights::check(raw, Access::explicit(AccessKind::Write, cpl), view).is_ok() {
        allowed |= WRITE | REPORTED_WRITE;
    }
    if rights::check(raw, Access::explicit(AccessKind::Fetch, cpl), view).is_ok() {
        allowed |= FETCH;
    }
    allowed
}

/// How a page's address differs from the tags for reads, writes and fetches, by the accesses that are allowed.
const TAGS: [[u64; 3]; 16] = tag_table();

const fn tag_table() -> [[u64; 3]; 16] {
    let mut table = [[ELSEWHERE; 3]; 16];
    let mut allowed = 0;
    while allowed < 16 {
        let [read, write, fetch] = &mut table[allowed as usize];
        if allowed & READ != 0 {
            *read = 0;
        }
        if allowed & WRITE != 0 {
            *write = 0;
        }
        if allowed & REPORTED_WRITE != 0 {
            *write = Entry::REPORTED;
        }
        if allowed & FETCH != 0 {
            *fetch = 0;
        }
        allowed += 1;
    }
    table
}

/// A block of the pool; `entries` is 0 until it is needed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Column {
    pub base: u32,
    pub entries: u32,
    /// Protection keys of what was filled in since the last clear, as `View::restricted_keys`.
    pub keys: u32,
    /// Fills since the last clear: nothing is held when 0.
    pub held: u32,
    /// Of the fills since growth was last thought of, those that evicted something.
    conflicts: u32,
    /// Who has to be told of what is withdrawn; 0: nobody.
    pub window: u8,
}

impl Column {
    pub(crate) fn exists(&self) -> bool {
        self.entries != 0
    }
    pub(crate) fn mask(&self) -> u64 {
        u64::from(self.entries) - 1
    }
    /// The page's slot, counted from the block's first.
    fn index(&self, page: u64) -> u64 {
        page >> 12 & self.mask()
    }
    /// Likewise from the pool's first.
    fn slot(&self, page: u64) -> usize {
        self.base as usize + self.index(page) as usize
    }
    /// Whether fills have evicted so much that a larger block pays: looked at each time that it could have been filled.
    #[inline(always)]
    fn wants_growth(&mut self) -> bool {
        // The largest block is for pages that keep evicting each other.
        let few = if self.entries == SIZES[SIZES.len() - 2] { self.entries / 2 } else { self.entries / 4 };
        self.held & (self.entries - 1) == 0 && std::mem::take(&mut self.conflicts) >= few
    }
}

/// The memory of all columns.
pub(crate) struct Pool {
    pub entries: Vec<Entry>,
    /// Times that any translation, or the place of them all, was taken away.
    pub withdrawals: u64,
    /// Of those, times that some column's place was, or all that it had.
    pub moves: u64,
    pub withdrawn: Withdrawn,
    /// First entries of unused blocks, by size.
    free: [Vec<u32>; SIZES.len()],
}

impl Pool {
    pub(crate) fn new() -> Self {
        Self {
            entries: Vec::new(),
            withdrawals: 0,
            moves: 0,
            withdrawn: Withdrawn::default(),
            free: Default::default(),
        }
    }

    /// A block of size class `class`, empty; `None` when the pool's bound is reached.
    fn allocate(&mut self, class: usize) -> Option<Column> {
        let entries = SIZES[class];
        if let Some(base) = self.free[class].pop() {
            let mut column = Column { base, entries, ..Column::default() };
            self.clear(&mut column);
            return Some(column);
        }
        let base = self.entries.len() as u32;
        let bound = if class == 0 { POOL_ENTRIES } else { POOL_ENTRIES - SMALL_RESERVE };
        if base + entries > bound {
            return None;
        }
        self.moved();
        self.entries.extend((0..u64::from(entries)).map(Entry::empty));
        Some(Column { base, entries, ..Column::default() })
    }

    /// Gives `column` a block of the smallest size. There always is one: the bound leaves room for the
    /// columns of all roots.
    pub(crate) fn create(&mut self, column: &mut Column) {
        if let Some(new) = self.allocate(0) {
            *column = new;
        }
    }

    pub(crate) fn release(&mut self, column: &mut Column) {
        if let Some(class) = SIZES.iter().position(|&s| s == column.entries) {
            self.free[class].push(column.base);
        }
        self.withdrawn.column(column.window);
        self.moved();
        *column = Column::default();
    }

    fn moved(&mut self) {
        self.withdrawals += 1;
        self.moves += 1;
    }

    /// Forgets everything in a column.
    pub(crate) fn clear(&mut self, column: &mut Column) {
        self.withdrawn.column(column.window);
        self.moved();
        for (slot, entry) in (0..).zip(self.block_mut(column)) {
            *entry = Entry::empty(slot);
        }
        column.keys = 0;
        column.held = 0;
    }

    pub(crate) fn block(&self, column: &Column) -> &[Entry] {
        &self.entries[column.base as usize..(column.base + column.entries) as usize]
    }

    fn block_mut(&mut self, column: &Column) -> &mut [Entry] {
        &mut self.entries[column.base as usize..(column.base + column.entries) as usize]
    }

    /// Enters a translation with `allowed` accesses. True if the column has become too small.
    #[inline(always)]
    pub(crate) fn fill(&mut self, column: &mut Column, page: u64, allowed: u8, addend: u64) -> bool {
        let [read, write, fetch] = TAGS[allowed as usize % TAGS.len()];
        let new = Entry { tag_read: page ^ read, tag_write: page ^ write, tag_fetch: page ^ fetch, addend };
        let slot = &mut self.entries[column.slot(page)];
        if slot.holds(page) {
            if !new.allows_all_of(slot, page) {
                self.withdrawals += 1;
                self.withdrawn.page(column.window, page);
            }
        } else {
            column.conflicts += u32::from(slot.page(column.index(page), column.mask()).is_some());
        }
        *slot = new;
        column.held = column.held.saturating_add(1);
        column.wants_growth()
    }

    /// Moves a column to a block of the next size, if there is one. True if it moved.
    pub(crate) fn grow(&mut self, column: &mut Column) -> bool {
        let Some(class) = SIZES.iter().position(|&s| s > column.entries) else { return false };
        let Some(mut new) = self.allocate(class) else { return false };
        for slot in 0..u64::from(column.entries) {
            let old = self.entries[column.base as usize + slot as usize];
            if let Some(page) = old.page(slot, column.mask()) {
                self.entries[new.slot(page)] = old;
            }
        }
        (new.keys, new.held, new.window) = (column.keys, column.held, std::mem::take(&mut column.window));
        self.release(column);
        *column = new;
        true
    }

    /// Forgets one page.
    pub(crate) fn drop_page(&mut self, column: &Column, page: u64) {
        let slot = &mut self.entries[column.slot(page)];
        if slot.holds(page) {
            *slot = Entry::empty(column.index(page));
        }
        // Another page may have taken the slot, and somebody still know this one.
        self.withdrawals += 1;
        self.withdrawn.page(column.window, page);
    }

    /// Forgets that one page can be written.
    pub(crate) fn drop_write(&mut self, column: &Column, page: u64) {
        let slot = &mut self.entries[column.slot(page)];
        if slot.tag_write == page {
            slot.tag_write = page ^ ELSEWHERE;
        }
        self.withdrawals += 1;
        self.withdrawn.page(column.window, page);
    }
}
