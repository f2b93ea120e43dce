//! Who keeps something derived from memory: one watcher for each engine with its MMU.

use crate::journal::{Change, Journal, MAX_WATCHERS};
use crate::{GuestMemory, MemoryError, PageFlags, RamOffset};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use umbra_arch::Gpa;

/// Flags that watchers claim.
const CLAIMED: [PageFlags; 3] = [PageFlags::CODE, PageFlags::WATCHED, PageFlags::MONITORED];

/// For each of [`CLAIMED`] and each page, which watchers need it: a bit each.
struct Owners([Box<[AtomicU32]>; CLAIMED.len()]);

impl Owners {
    /// What the flags say while only `sole` has set them.
    fn of_one(mem: &GuestMemory, sole: u32) -> Self {
        let owned = |flag| mem.pages().map(move |off| if mem.page_flags(off).intersects(flag) { sole } else { 0 });
        Self(CLAIMED.map(|flag| owned(flag).map(AtomicU32::new).collect()))
    }

    fn cell(cells: &[AtomicU32], off: RamOffset) -> Option<&AtomicU32> {
        cells.get((off.raw() >> 12) as usize)
    }

    /// Watchers that need one of `flags` of this page.
    fn of(&self, off: RamOffset, flags: PageFlags) -> u32 {
        let mut owners = 0;
        for (flag, cells) in CLAIMED.iter().zip(&self.0) {
            if flags.intersects(*flag) {
                owners |= Self::cell(cells, off).map_or(0, |cell| cell.load(Relaxed));
            }
        }
        owners
    }

    fn cells_of(&self, flag: PageFlags) -> &[AtomicU32] {
        let at = CLAIMED.iter().position(|&claimed| claimed == flag);
        at.map_or(&[], |at| &self.0[at])
    }
}

/// The watchers of one memory. While there was only ever one, the page flags alone say what it needs.
#[derive(Default)]
pub(crate) struct Watchers {
    journal: Journal,
    registered: AtomicU32,
    owners: OnceLock<Owners>,
}

impl Watchers {
    /// All queues; the first serves a memory whose only watcher never registered, too.
    fn everybody(&self) -> u32 {
        self.registered.load(Relaxed) | 1
    }

    pub(crate) fn map_changed(&self) {
        self.journal.push(self.everybody(), Change::Everything);
    }

    /// A write by a device or the host to a page with `flags`.
    pub(crate) fn written(&self, off: RamOffset, flags: PageFlags, gpa: Gpa, bytes: u32) {
        let flags = flags.intersection(PageFlags::REPORTED);
        let to = match self.owners.get() {
            _ if flags == PageFlags::NONE => return,
            Some(owners) => owners.of(off, flags),
            None => 1,
        };
        self.journal.push(to, Change::Written { gpa, bytes });
    }
}

/// One engine's ear at the memory, and its claims on page flags. Flags stay set while any watcher
/// needs them; what one watcher does reaches the others through their queues, which each must
/// [drain](Self::take_changes) before it touches memory again.
#[derive(Debug)]
pub struct Watcher {
    mem: Arc<GuestMemory>,
    id: u8,
    registered: bool,
}

impl Watcher {
    /// Registers a further watcher.
    ///
    /// # Errors
    /// [`MemoryError::TooManyWatchers`] beyond 32.
    pub fn register(mem: Arc<GuestMemory>) -> Result<Self, MemoryError> {
        let all = &mem.watchers;
        let taken = all.registered.load(Relaxed);
        let id = taken.trailing_ones();
        if id as usize >= MAX_WATCHERS {
            return Err(MemoryError::TooManyWatchers(MAX_WATCHERS));
        }
        if id > 0 {
            // Only the first can have set flags without claims.
            all.owners.get_or_init(|| Owners::of_one(&mem, 1));
        }
        all.registered.fetch_or(1 << id, Relaxed);
        all.journal.take(id as u8);
        Ok(Self { mem, id: id as u8, registered: true })
    }

    /// The only watcher that this memory will ever have.
    pub fn sole(mem: Arc<GuestMemory>) -> Self {
        Self { mem, id: 0, registered: false }
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.mem
    }

    fn all(&self) -> &Watchers {
        &self.mem.watchers
    }

    fn others(&self) -> u32 {
        self.all().everybody() & !(1 << self.id)
    }

    /// Whether nobody else has ever watched this memory, so that [`stored`](Self::stored) tells nobody.
    #[inline(always)]
    pub fn is_alone(&self) -> bool {
        self.all().owners.get().is_none()
    }

    /// Claims CODE, WATCHED or MONITORED for the page that holds `off`. True if this watcher had not claimed it:
    /// its own fast writes to the page must go; the others' will hear of it.
    pub fn claim(&self, off: RamOffset, flag: PageFlags) -> bool {
        let before = self.mem.page_flags(off);
        let Some(owners) = self.all().owners.get() else {
            self.mem.set_flags(off, flag);
            return !before.contains(flag);
        };
        let own = 1 << self.id;
        let Some(cell) = Owners::cell(owners.cells_of(flag), off) else { return false };
        if cell.fetch_or(own, Relaxed) & own != 0 {
            return false;
        }
        self.mem.set_flags(off, flag);
        if !before.intersects(PageFlags::REPORTED) {
            self.all().journal.push(self.others(), Change::Flagged(off));
        }
        true
    }

    /// Gives up a claim; the flag goes with the last one.
    pub fn release(&self, off: RamOffset, flag: PageFlags) {
        let own = 1 << self.id;
        let left = match self.all().owners.get() {
            Some(owners) => Owners::cell(owners.cells_of(flag), off).map_or(0, |c| c.fetch_and(!own, Relaxed) & !own),
            None => 0,
        };
        if left == 0 {
            self.mem.clear_flags(off, flag);
        }
    }

    /// Whether this watcher has claimed `flag` of the page.
    pub fn has_claimed(&self, off: RamOffset, flag: PageFlags) -> bool {
        match self.all().owners.get() {
            Some(owners) => owners.of(off, flag) >> self.id & 1 != 0,
            None => self.mem.page_flags(off).intersects(flag),
        }
    }

    /// Clears DIRTY of the page. The caller drops its own fast writes; the others will hear of it.
    pub fn clean(&self, off: RamOffset) {
        self.mem.clear_flags(off, PageFlags::DIRTY);
        self.all().journal.push(self.others() & self.all().registered.load(Relaxed), Change::Flagged(off));
    }

    /// After a store by this watcher's own instruction, of which it knows: tells the others.
    #[inline]
    pub fn stored(&self, gpa: Gpa, off: RamOffset, bytes: u32) {
        if let Some(owners) = self.all().owners.get() {
            let to = owners.of(off, PageFlags::REPORTED) & !(1 << self.id);
            self.all().journal.push(to, Change::Written { gpa, bytes });
        }
    }

    /// After this watcher's page walk has set accessed or dirty bits, which its MMU knows of: tells the
    /// others, and itself if the page holds code.
    #[inline]
    pub fn walk_stored(&self, gpa: Gpa, off: RamOffset, bytes: u32) {
        self.stored(gpa, off, bytes);
        if self.mem.page_flags(off).intersects(PageFlags::CODE) && self.has_claimed(off, PageFlags::CODE) {
            self.all().journal.push(1 << self.id, Change::Written { gpa, bytes });
        }
    }

    /// Whether [`take_changes`](Self::take_changes) would give anything.
    #[inline(always)]
    pub fn is_pending(&self) -> bool {
        self.mem.watchers.journal.pending(self.id)
    }

    /// What others have done since the last call, in order.
    pub fn take_changes(&self) -> Vec<Change> {
        self.all().journal.take(self.id)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        if !self.registered {
            return;
        }
        let flagged: Vec<RamOffset> = self.mem.pages_with(PageFlags::REPORTED).collect();
        for off in flagged {
            CLAIMED.into_iter().filter(|&flag| self.has_claimed(off, flag)).for_each(|flag| self.release(off, flag));
        }
        self.all().registered.fetch_and(!(1 << self.id), Relaxed);
        self.all().journal.take(self.id);
    }
}
