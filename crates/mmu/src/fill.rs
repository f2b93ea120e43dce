//! The slow path: shadow tree first, guest walk on a shadow miss, then the contexts.

mod look;

use crate::context::{ALLOWED, FETCH, READ, REPORTED_WRITE, WRITE, column_of};
use crate::event::Event;
use crate::format::{Decoded, is_leaf};
use crate::hints::Hint;
use crate::mmu::{Mmu, Translation};
use crate::rights::{self, Rights};
use crate::role::PageRole;
use crate::shadow::{Fresh, Link, ShadowEntry, rights_of};
use crate::tables::MemoryTables;
use crate::walk::{self, Path, Reached, Regime, Step, Top};
use crate::writers::Full;
use umbra_arch::paging::{Access, AccessKind, entry, pfec};
use umbra_arch::{Fault, Gpa, GpaPage, Gva};
use umbra_memory::{Backing, PageFlags, RamOffset};

pub use look::{End, Look};

/// Tables on the longest path.
const MAX_DEPTH: usize = 5;

/// What the shadow tree says about a linear address.
#[derive(Clone, Copy)]
struct Found {
    gpa: Gpa,
    /// The leaf, with the rights over all levels.
    leaf: ShadowEntry,
}

/// What became of a walk by one entry.
enum Walked {
    /// The shadow tree has it now.
    Kept(Found),
    /// It led here; nothing may be kept of it, as the entry lies in ROM without A.
    Passing(Gpa),
    /// Somebody changed the entry meanwhile.
    Changed,
}

/// The last shadow page on the way to a linear address.
#[derive(Clone, Copy)]
struct Last {
    index: u32,
    /// Index of its entry for the address.
    at: usize,
    entry: ShadowEntry,
    /// Rights bits of the links that led to it.
    above: u64,
}

impl Mmu {
    /// Translates one byte: sets A and D bits, marks the page of a write dirty, fills the fast tables.
    /// `gva` is canonical, in legacy modes of 32 bits. An explicit access to an absent page is answered
    /// without loading it; what the processor does by itself loads it at once.
    ///
    /// # Errors
    /// #PF with its error code and the address for CR2.
    #[inline(never)]
    pub fn translate(&mut self, gva: Gva, access: Access) -> Result<Translation, Fault> {
        self.translate_here(gva, access)
    }

    /// As [`translate`](Self::translate), with what a fault at an entry without P takes in line.
    ///
    /// # Errors
    /// As [`translate`](Self::translate).
    #[inline(always)]
    pub fn translate_here(&mut self, gva: Gva, access: Access) -> Result<Translation, Fault> {
        self.check_memory_map();
        self.maybe_drop();
        let Some(last) = self.last_page(gva.raw()) else { return self.translate_from_top(gva, access) };
        self.translate_last(gva, access, &last)
    }

    #[inline(always)]
    fn translate_last(&mut self, gva: Gva, access: Access, last: &Last) -> Result<Translation, Fault> {
        if last.entry.is_leaf() {
            return self.translate_leaf(gva, access, last);
        }
        let raw = self.guest_entry(last);
        if raw & entry::P == 0 {
            return Err(self.not_present(gva, access));
        }
        self.translate_entry(gva, access, last, raw)
    }

    /// The shadow tree has a leaf for `gva`.
    #[inline(never)]
    fn translate_leaf(&mut self, gva: Gva, access: Access, last: &Last) -> Result<Translation, Fault> {
        let found = self.leaf_of(gva.raw(), last);
        self.check(gva, access, &found)?;
        if access.kind != AccessKind::Write || is_written(&found) {
            return Ok(self.finish(gva, access, found));
        }
        let raw = self.guest_entry(last);
        if raw & entry::P == 0 {
            return Err(self.not_present(gva, access));
        }
        self.translate_entry(gva, access, last, raw)
    }

    /// The guest has the present entry `raw` for `gva`, which the shadow tree lacks, or has as a leaf without D.
    #[inline(never)]
    fn translate_entry(&mut self, gva: Gva, access: Access, last: &Last, raw: u64) -> Result<Translation, Fault> {
        if !is_leaf(raw, self.shadow.page(last.index).role) {
            return self.translate_by_walk(gva, access, Some(*last));
        }
        match self.walk_leaf(gva, access, last, raw)? {
            Walked::Kept(found) => Ok(self.finish(gva, access, found)),
            Walked::Passing(gpa) => Ok(self.reach(gpa, access).0),
            Walked::Changed => self.translate_by_walk(gva, access, Some(*last)),
        }
    }

    #[inline(always)]
    fn check(&self, gva: Gva, access: Access, found: &Found) -> Result<(), Fault> {
        rights::check(found.leaf.rights(), access, &self.view).map_err(|code| Fault::page(gva.raw(), code))
    }

    /// Finds the last shadow page on the way to `gva` under the current root, which notes that its contexts may hold what
    /// the page says from now on.
    #[inline(always)]
    fn last_page(&mut self, gva: u64) -> Option<Last> {
        if let Some(hint) = self.hints.get(gva, self.current) {
            let last = self.last_by(gva, hint);
            // A page that was freed leaves links to it behind.
            if !last.entry.is_link() || self.shadow.index_of(last.entry.child()).is_none() {
                return Some(last);
            }
        }
        let hint = self.follow_links(gva)?;
        Some(self.last_by(gva, &hint))
    }

    #[inline(always)]
    fn last_by(&self, gva: u64, hint: &Hint) -> Last {
        let page = self.shadow.page(hint.index);
        let at = page.index(gva);
        Last { index: hint.index, at, entry: page.entries[at], above: hint.above }
    }

    #[inline(never)]
    fn follow_links(&mut self, gva: u64) -> Option<Hint> {
        let end = self.find_end(gva, self.current)?;
        self.note_path(gva, end);
        Some(end)
    }

    /// What a leaf says of `gva`.
    #[inline(always)]
    fn leaf_of(&mut self, gva: u64, last: &Last) -> Found {
        let page = self.shadow.page_mut(last.index);
        page.used();
        found_at(gva, page.shift, last.entry, last.above)
    }

    /// The guest's own entry.
    #[inline(always)]
    fn guest_entry(&self, last: &Last) -> u64 {
        self.shadow.guest_entry(&self.mem, last.index, last.at)
    }

    /// The fault of a walk that ends at an entry without P in the last table, all of whose way is in the shadow tree.
    #[inline(always)]
    fn not_present(&mut self, gva: Gva, access: Access) -> Fault {
        let fault = Fault::page(gva.raw(), rights::attempt_code(access, &self.view));
        self.count_walk(gva, access, 1, Err(fault));
        fault
    }

    #[inline(always)]
    fn count_walk(&mut self, gva: Gva, access: Access, entries: u64, outcome: Result<Gpa, Fault>) {
        self.stats.walks += 1;
        self.stats.entries_read += entries;
        self.events.note(|| Event::walk(gva, access, entries, outcome));
    }

    /// The shadow tree knows nothing of `gva`, or there is none.
    #[cold]
    fn translate_from_top(&mut self, gva: Gva, access: Access) -> Result<Translation, Fault> {
        let Some(root) = &self.roots.slots[self.current] else { return Err(Fault::GP0) };
        if root.regime.top != Top::Direct {
            return self.translate_by_walk(gva, access, None);
        }
        let gpa = Gpa::new(gva.raw() & 0xffff_ffff);
        let found = Found { gpa, leaf: ShadowEntry::leaf(gpa.page().base(), Rights::ALL, true) };
        self.check(gva, access, &found)?;
        Ok(self.finish_walk(gva, access, found))
    }

    /// Follows a root's shadow pages to the last one on the way to `gva`: it holds the leaf, or lacks the next entry.
    pub(crate) fn find_end(&self, gva: u64, slot: usize) -> Option<Hint> {
        let root = self.roots.slots[slot].as_ref()?;
        let mut index = self.shadow.index_of(root.tops[root.top_slot(gva)]?)?;
        let mut above = ShadowEntry::RIGHTS;
        for _ in 0..MAX_DEPTH {
            let entry = self.shadow.page(index).entry_for(gva);
            if entry.is_leaf() && cfg!(umbra_mutant = "leaf-rights-on-the-way") {
                above &= entry.0;
            }
            let child = if entry.is_link() { self.shadow.index_of(entry.child()) } else { None };
            let Some(child) = child else { break };
            above &= entry.0;
            index = child;
        }
        Some(self.hints.hint(gva, slot, index, above))
    }

    /// Notes on each page of the path that the current root's contexts may hold translations by it.
    #[cold]
    fn note_path(&mut self, gva: u64, end: Hint) {
        let Some(root) = &self.roots.slots[self.current] else { return };
        let mut next = root.tops[root.top_slot(gva)];
        while let Some(link) = next {
            let page = self.shadow.page_mut(link.index);
            page.reached(gva, self.current);
            next = (link.index != end.index).then(|| page.entry_for(gva).child());
        }
        self.hints.set(gva, end);
    }

    /// The walk that is left to do nearly always: all of the way but its end is in the shadow tree, and of guest tables
    /// there is but one entry to read, the leaf `raw`.
    #[inline(always)]
    fn walk_leaf(&mut self, gva: Gva, access: Access, last: &Last, raw: u64) -> Result<Walked, Fault> {
        let page = self.shadow.page(last.index);
        let Some(leaf) = page.leaf(raw) else {
            let code = pfec::P | pfec::RSVD | rights::attempt_code(access, &self.view);
            return Err(self.walk_faulted(gva, access, Fault::page(gva.raw(), code)));
        };
        let found = found_at(gva.raw(), page.shift, leaf, last.above);
        let allowed = self.check(gva, access, &found);
        if !cfg!(umbra_mutant = "flags-set-before-rights-are-checked") {
            allowed.map_err(|fault| self.walk_faulted(gva, access, fault))?;
        }
        let wanted = raw | entry::A | if access.kind == AccessKind::Write { entry::D } else { 0 };
        let mut marked = raw;
        if raw != wanted && self.shadow.page(last.index).is_ram {
            if !self.mark_entry(last, raw, wanted) {
                return Ok(Walked::Changed);
            }
            marked = wanted;
        }
        allowed?;
        self.count_walk(gva, access, 1, Ok(found.gpa));
        if marked & entry::A == 0 {
            return Ok(Walked::Passing(found.gpa));
        }
        let dirty = if marked & entry::D != 0 { ShadowEntry::D } else { 0 };
        let page = self.shadow.page_mut(last.index);
        page.used();
        page.set(last.at, ShadowEntry(leaf.0 | dirty));
        Ok(Walked::Kept(Found { leaf: ShadowEntry(found.leaf.0 | dirty), ..found }))
    }

    /// Sets A, or D, or both in the last entry of a walk. False if somebody changed it since it was read.
    #[inline(always)]
    fn mark_entry(&mut self, last: &Last, raw: u64, marked: u64) -> bool {
        let page = self.shadow.page(last.index);
        let (off, bytes) = (page.offset_of(last.at), page.role.format.entry_bytes());
        let gpa = page.table.base().add(off.raw() & 0xfff);
        let tables = MemoryTables { watcher: &self.watcher, reads: 0 };
        let done = tables.replace(gpa, off, bytes, raw, marked);
        if done && (marked ^ raw) & entry::D != 0 {
            self.refresh_aliases(off);
        }
        done
    }

    /// A walk by the last entry alone has faulted.
    #[cold]
    fn walk_faulted(&mut self, gva: Gva, access: Access, fault: Fault) -> Fault {
        self.count_walk(gva, access, 1, Err(fault));
        fault
    }

    /// A walk from the last table that is shadowed, or from the root.
    #[cold]
    #[inline(never)]
    fn translate_by_walk(&mut self, gva: Gva, access: Access, from: Option<Last>) -> Result<Translation, Fault> {
        // First of all: what is evicted may lie on the way to the table that is known.
        let from = if self.make_room(MAX_DEPTH) { None } else { from };
        let Some(root) = &self.roots.slots[self.current] else { return Err(Fault::GP0) };
        let (regime, above) = match from {
            // The entries above are in the shadow tree, so they say the same as the guest's.
            Some(last) => (self.regime_below(last.index, &root.regime), rights_of(last.above, 0)),
            None => (root.regime, Rights::ALL),
        };
        let mut tables = MemoryTables { watcher: &self.watcher, reads: 0 };
        let mut path = Path::EMPTY;
        let walked = walk::walk_below(&mut tables, &regime, above, gva, access, &self.view, &mut path);
        let entries = tables.reads;
        self.count_walk(gva, access, entries, walked.map(|reached| reached.gpa));
        let reached = match walked {
            Ok(reached) => reached,
            Err(fault) => {
                // Where one access faults the next one will, too.
                self.install_tables(gva, path.steps(), from.is_none());
                return Err(fault);
            }
        };
        if let Some(step) = path.steps().last().filter(|_| reached.dirtied)
            && let Some(off) = self.mem.map(step.table.page()).at(step.entry().offset()).readable()
        {
            self.refresh_aliases(off);
        }
        let last = self.install(gva, &path, &reached, from.is_none()).and_then(|()| self.last_page(gva.raw()));
        Ok(match last.filter(|last| last.entry.is_leaf()) {
            Some(last) => {
                let found = self.leaf_of(gva.raw(), &last);
                self.finish_walk(gva, access, found)
            }
            None => self.reach(reached.gpa, access).0,
        })
    }

    /// A walk that begins at a shadowed table.
    fn regime_below(&self, index: u32, whole: &Regime) -> Regime {
        let page = self.shadow.page(index);
        Regime { top: Top::Table(page.table.base()), role: page.role, ..*whole }
    }

    /// The walk has set D in the entry at `off`, which other shadow pages of the same frame may hold too. (Entries without
    /// A nobody holds.)
    fn refresh_aliases(&mut self, off: RamOffset) {
        if cfg!(umbra_mutant = "aliases-of-a-table-not-refreshed") {
            return;
        }
        let at_byte = off.raw() & 0xfff;
        let mut next = self.shadow.first_of_frame(off);
        while let Some(index) = next {
            let page = self.shadow.page(index);
            next = page.next();
            let width = page.role.format.entry_bytes();
            self.refresh_entry(index, (at_byte / width) as usize);
        }
    }

    /// Makes an entry agree with the guest's, if it is present, or drops it. True if it was dropped.
    #[inline(always)]
    pub(crate) fn refresh_entry(&mut self, index: u32, at: usize) -> bool {
        self.shadow.page(index).entries[at].is_present() && self.refresh_present_entry(index, at)
    }

    /// Makes a present entry agree with the guest's, or drops it. True if it was dropped.
    #[inline(never)]
    pub(crate) fn refresh_present_entry(&mut self, index: u32, at: usize) -> bool {
        let raw = self.shadow.guest_entry(&self.mem, index, at);
        let stale = self.shadow.refresh(index, at, raw, &self.format) == Fresh::Stale;
        if stale {
            self.drop_entry(index, at);
        }
        stale
    }

    /// Enters a walk into the shadow tree; `None` if a table cannot be watched or has no A bit set
    /// (it lies in ROM), so that nothing may be kept.
    fn install(&mut self, gva: Gva, path: &Path, reached: &Reached, from_top: bool) -> Option<()> {
        let last = self.install_tables(gva, path.steps(), from_top)?;
        self.set_leaf(last, path.steps().last()?, reached)
    }

    /// Enters the tables that a walk has read into the shadow tree: the last one's shadow page, unless something may
    /// not be kept.
    fn install_tables(&mut self, gva: Gva, steps: &[Step], from_top: bool) -> Option<u32> {
        let mut parent: Option<(u32, &Step)> = None;
        for step in steps {
            if parent.is_some_and(|(_, above)| above.raw & entry::A == 0) {
                return None;
            }
            let index = self.shadow_page_for(step)?;
            let link = self.shadow.link_of(index);
            match parent {
                None if from_top => self.set_top(gva, link),
                None => {}
                Some((above, above_step)) => self.set_link(above, above_step, link)?,
            }
            parent = Some((index, step));
        }
        parent.map(|(index, _)| index)
    }

    fn set_top(&mut self, gva: Gva, link: Link) {
        if let Some(root) = &mut self.roots.slots[self.current] {
            let slot = root.top_slot(gva.raw());
            root.tops[slot] = Some(link);
        }
    }

    fn set_link(&mut self, index: u32, step: &Step, child: Link) -> Option<()> {
        match self.format.decode(step.raw, step.role) {
            Decoded::Table { rights, accessed: true, .. } => {
                self.shadow.page_mut(child.index).is_child = true;
                self.shadow.set(index, step.index as usize, ShadowEntry::link(child, rights));
                Some(())
            }
            _ => None,
        }
    }

    /// Enters the leaf that a walk ended at, as its walk has read it.
    fn set_leaf(&mut self, index: u32, step: &Step, reached: &Reached) -> Option<()> {
        if step.raw & entry::A == 0 {
            return None;
        }
        let leaf = ShadowEntry::leaf(reached.base, reached.own, step.raw & entry::D != 0);
        self.shadow.set(index, step.index as usize, leaf);
        Some(())
    }

    /// Finds or makes the shadow page of a walked table.
    fn shadow_page_for(&mut self, step: &Step) -> Option<u32> {
        self.shadow_page_of(step.table.page(), step.role)
    }

    /// Finds or makes the shadow page of a table in a role.
    pub(crate) fn shadow_page_of(&mut self, table: GpaPage, role: PageRole) -> Option<u32> {
        let backing = self.mem.map(table);
        let off = backing.readable()?;
        if let Some(index) = self.shadow.find(off, table, role) {
            return Some(index);
        }
        self.stats.pages_allocated += 1;
        self.events.note(|| Event::PageAllocated { table, role });
        let index = self.shadow.allocate(backing, table, role, &self.format)?;
        if self.watcher.claim(off, PageFlags::WATCHED) {
            self.drop_write_tags(off);
        }
        Some(index)
    }

    /// What lies at `gpa`, marked dirty by a write, and the flags of its page of RAM.
    #[inline(always)]
    fn reach(&mut self, gpa: Gpa, access: Access) -> (Translation, PageFlags) {
        let page = gpa.page();
        let backing = if access.implicit { self.mem.map(page) } else { self.mem.locate(page) }.at(gpa.offset());
        let Backing::Ram(off) = backing else {
            return (Translation { gpa, backing, absent: false }, PageFlags::NONE);
        };
        let mut flags = self.mem.page_flags(off);
        let absent = !access.implicit && is_away(flags);
        if access.kind == AccessKind::Write && !absent && !flags.contains(PageFlags::DIRTY) {
            self.mem.note_store(off, 1);
            flags = flags.union(PageFlags::DIRTY);
        }
        (Translation { gpa, backing, absent }, flags)
    }

    #[inline(never)]
    fn finish_walk(&mut self, gva: Gva, access: Access, found: Found) -> Translation {
        self.finish(gva, access, found)
    }

    #[inline(always)]
    fn finish(&mut self, gva: Gva, access: Access, found: Found) -> Translation {
        let (translation, flags) = self.reach(found.gpa, access);
        let (off, write) = match translation.backing {
            Backing::Ram(_) if is_away(flags) => return translation,
            Backing::Ram(off) if !is_written(&found) || !flags.contains(PageFlags::DIRTY) => (off, 0),
            Backing::Ram(off) if flags.intersects(PageFlags::REPORTED) => (off, REPORTED_WRITE),
            Backing::Ram(off) => (off, WRITE),
            Backing::Rom(off) => (off, 0),
            Backing::Mmio => return translation,
        };
        // A store to a table or to code: what can be cached is cached.
        if access.kind != AccessKind::Write || write == WRITE || !self.is_cached(gva, write != 0) {
            let view = if access.implicit { self.view.implicit() } else { self.view };
            self.fill(gva, column_of(&view), found.leaf, off, write);
        }
        translation
    }

    /// Writes a column of the current root by a leaf with the rights over all levels; `write` is what its page allows of
    /// writes. Other columns follow when they miss: mostly they never do.
    #[inline(always)]
    fn fill(&mut self, gva: Gva, at: usize, leaf: ShadowEntry, off: RamOffset, write: u8) {
        let page = gva.raw() & !0xfff;
        let rights = leaf.rights_index();
        // With a key under restrictions only fetches may be fast, which heed no keys.
        let (mask, key) = match leaf.key_bit() {
            key if self.restricted & key == 0 => (FETCH | READ | write, key),
            _ => (FETCH, 0),
        };
        // The column may get a write tag; remembering one too many costs nothing but its place.
        if mask & WRITE != 0 {
            self.record_writer(off, page);
        }
        self.stats.refills += 1;
        let addend = self.ram.wrapping_add(off.page_base().raw()).wrapping_sub(page);
        let Some(root) = &mut self.roots.slots[self.current] else { return };
        let column = &mut root.columns[at];
        let allowed = ALLOWED[at][rights] & mask;
        if !column.exists() || allowed == 0 {
            return;
        }
        column.keys |= key;
        if self.pool.fill(column, page, allowed, addend) && self.pool.grow(column) {
            self.stats.context_growths += 1;
            self.sync_active();
        }
    }

    #[inline]
    fn record_writer(&mut self, off: RamOffset, page: u64) {
        match self.writers.record(off, page, self.current) {
            None => {}
            Some(Full::Frame(writers)) => self.drop_writers(&writers),
            Some(Full::All) => self.drop_all_contexts(),
        }
    }
}

/// D is set: a write needs no walk.
#[inline]
fn is_written(found: &Found) -> bool {
    found.leaf.is_dirty() || cfg!(umbra_mutant = "clean-pages-written-without-a-walk")
}

#[inline(always)]
fn found_at(gva: u64, shift: u32, leaf: ShadowEntry, above: u64) -> Found {
    Found { gpa: leaf.frame().add(gva & ((1 << shift) - 1)), leaf: leaf.below(above) }
}

/// Explicit accesses to such a page must come here.
#[inline]
fn is_away(flags: PageFlags) -> bool {
    flags.intersects(PageFlags::AWAY)
}
