//! The slow path: shadow tree first, guest walk on a shadow miss, then the contexts.

use crate::context::{ALLOWED, COLUMNS, FETCH, READ, WRITE};
use crate::format::Decoded;
use crate::mmu::{Mmu, Translation};
use crate::rights::{self, Rights};
use crate::shadow::{Fresh, Link, ShadowEntry, rights_of};
use crate::tables::{MemoryTables, read_entry};
use crate::walk::{self, Step, Top, Walk};
use crate::writers::Full;
use umbra_arch::paging::{Access, AccessKind};
use umbra_arch::{Fault, Gpa, Gva};
use umbra_memory::{Backing, PageFlags, RamOffset};

/// Tables on the longest path.
const MAX_DEPTH: usize = 5;

/// What the shadow tree says about a linear address.
#[derive(Clone, Copy)]
struct Found {
    gpa: Gpa,
    rights: Rights,
    dirty: bool,
    /// Shadow pages used, topmost first.
    path: [u32; MAX_DEPTH],
    depth: usize,
}

impl Mmu {
    /// Translates one byte: sets A and D bits, marks the page of a write dirty, fills the fast tables.
    /// `gva` is canonical, in legacy modes of 32 bits.
    ///
    /// # Errors
    /// #PF with its error code and the address for CR2.
    pub fn translate(&mut self, gva: Gva, access: Access) -> Result<Translation, Fault> {
        self.check_memory_map();
        self.maybe_drop();
        if let Some(found) = self.look_in_shadow(gva) {
            rights::check(found.rights, access, &self.view).map_err(|code| Fault::page(gva.raw(), code))?;
            if access.kind != AccessKind::Write || found.dirty {
                return Ok(self.finish(gva, access, &found));
            }
        }
        self.translate_by_walk(gva, access)
    }

    /// Follows the current root's shadow pages; `None` if an entry is missing.
    #[inline]
    fn look_in_shadow(&self, gva: Gva) -> Option<Found> {
        let root = self.roots.slots[self.current].as_ref()?;
        let mut found = Found { gpa: Gpa::new(0), rights: Rights::ALL, dirty: true, path: [0; MAX_DEPTH], depth: 0 };
        if root.regime.top == Top::Direct {
            found.gpa = Gpa::new(gva.raw() & 0xffff_ffff);
            return Some(found);
        }
        let mut link = root.tops[root.top_slot(gva.raw())]?;
        let mut combined = ShadowEntry::RIGHTS;
        for depth in 0..MAX_DEPTH {
            let page = self.shadow.get(link)?;
            let role = page.role;
            let entry = page.entries[role.format.index(role.level, gva.raw())];
            if !entry.is_present() {
                return None;
            }
            combined &= entry.0;
            found.path[depth] = link.index;
            if entry.is_leaf() {
                let within = gva.raw() & ((1 << role.format.shift(role.level)) - 1);
                found.gpa = entry.frame().add(within);
                found.rights = rights_of(combined, entry.key());
                found.dirty = entry.is_dirty();
                found.depth = depth + 1;
                return Some(found);
            }
            link = entry.child();
        }
        None
    }

    #[inline(never)]
    fn translate_by_walk(&mut self, gva: Gva, access: Access) -> Result<Translation, Fault> {
        let Some(root) = self.roots.slots[self.current].as_ref() else { return Err(Fault::GP0) };
        let regime = root.regime;
        let mut tables = MemoryTables { mem: &self.mem, reads: 0 };
        let walked = walk::walk(&mut tables, &regime, gva, access, &self.view);
        self.stats.entries_read += tables.reads;
        self.stats.walks += 1;
        let walked = walked?;
        self.refresh_aliases(&walked);
        Ok(match self.install(gva, &walked) {
            Some(found) => self.finish(gva, access, &found),
            None => self.answer(walked.gpa, access),
        })
    }

    /// The walk may have set D in an entry that other shadow pages of the same frame hold too.
    fn refresh_aliases(&mut self, walked: &Walk) {
        for step in walked.steps() {
            let Some(off) = self.mem.map(step.table.page()).readable() else { continue };
            let at_byte = step.entry().offset();
            for index in self.shadow.of_frame(off) {
                let role = self.shadow.page(index).role;
                let at = (at_byte / role.format.entry_bytes()) as usize;
                self.refresh_entry(index, at);
            }
        }
    }

    /// Makes a present entry agree with the guest's, or drops it. True if it was dropped.
    pub(crate) fn refresh_entry(&mut self, index: u32, at: usize) -> bool {
        let page = self.shadow.page(index);
        if !page.entries[at].is_present() {
            return false;
        }
        let bytes = page.role.format.entry_bytes();
        let raw = read_entry(&self.mem, page.table.base().add(at as u64 * bytes), bytes);
        let stale = self.shadow.refresh(index, at, raw, &self.format) == Fresh::Stale;
        if stale {
            self.drop_entry(index, at);
        }
        stale
    }

    /// Enters a walk into the shadow tree; `None` if a table cannot be watched or has no A bit set
    /// (it lies in ROM), so that nothing may be kept.
    fn install(&mut self, gva: Gva, walked: &Walk) -> Option<Found> {
        self.make_room(MAX_DEPTH);
        let mut found = Found {
            gpa: walked.gpa,
            rights: walked.rights,
            dirty: walked.dirty,
            path: [0; MAX_DEPTH],
            depth: walked.steps().len(),
        };
        let mut parent: Option<(u32, Step)> = None;
        for (depth, step) in walked.steps().iter().enumerate() {
            let index = self.shadow_page_for(step)?;
            let link = self.shadow.link_of(index);
            match parent {
                None => self.set_top(gva, link),
                Some((above, above_step)) => self.set_link(above, &above_step, link)?,
            }
            found.path[depth] = index;
            parent = Some((index, *step));
        }
        if let Some((index, step)) = parent {
            self.set_leaf(index, &step)?;
        }
        Some(found)
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
                self.shadow.set(index, step.index as usize, ShadowEntry::link(child, rights));
                Some(())
            }
            _ => None,
        }
    }

    fn set_leaf(&mut self, index: u32, step: &Step) -> Option<()> {
        match self.format.decode(step.raw, step.role) {
            Decoded::Leaf { base, rights, accessed: true, dirty } => {
                self.shadow.set(index, step.index as usize, ShadowEntry::leaf(base, rights, dirty));
                Some(())
            }
            _ => None,
        }
    }

    /// Finds or makes the shadow page of a walked table.
    fn shadow_page_for(&mut self, step: &Step) -> Option<u32> {
        let off = self.mem.map(step.table.page()).readable()?;
        let table = step.table.page();
        if let Some(index) = self.shadow.find(off, table, step.role) {
            return Some(index);
        }
        self.stats.pages_allocated += 1;
        let index = self.shadow.allocate(off, table, step.role);
        self.mem.set_flags(off, PageFlags::WATCHED);
        self.drop_write_tags(off);
        Some(index)
    }

    fn answer(&mut self, gpa: Gpa, access: Access) -> Translation {
        let backing = self.mem.map(gpa.page()).at(gpa.offset());
        if let (Backing::Ram(off), AccessKind::Write) = (backing, access.kind) {
            self.mem.note_store(off, 1);
        }
        Translation { gpa, backing }
    }

    #[inline]
    fn finish(&mut self, gva: Gva, access: Access, found: &Found) -> Translation {
        let translation = self.answer(found.gpa, access);
        self.fill(gva, found, translation.backing);
        translation
    }

    /// Writes all columns of the current root from the raw rights.
    fn fill(&mut self, gva: Gva, found: &Found, backing: Backing) {
        let (off, writable) = match backing {
            Backing::Ram(off) => (off, found.dirty && is_quiet(self.mem.page_flags(off))),
            Backing::Rom(off) => (off, false),
            Backing::Mmio => return,
        };
        let slot = self.current;
        for &index in &found.path[..found.depth] {
            self.shadow.page_mut(index).reached(gva.raw(), slot);
        }
        let page = gva.raw() & !0xfff;
        let key = 1 << (found.rights.key + if found.rights.user { 0 } else { 16 });
        let allowed = self.allowed_by_column(found.rights, writable, self.restricted & key == 0);
        if allowed.iter().any(|a| a & WRITE != 0) {
            self.record_writer(off, page);
        }
        let addend = off.page_base().raw().wrapping_sub(page);
        self.stats.refills += 1;
        let Some(root) = &mut self.roots.slots[slot] else { return };
        for (column, allowed) in root.columns.iter_mut().zip(allowed).filter(|(c, _)| c.exists()) {
            if allowed == 0 {
                self.pool.drop_page(column, page);
                continue;
            }
            if allowed != FETCH {
                column.keys |= key;
            }
            if self.pool.fill(column, page, allowed, addend) && self.pool.grow(column) {
                self.stats.context_growths += 1;
            }
        }
        self.sync_active();
    }

    fn allowed_by_column(&self, rights: Rights, writable: bool, key_free: bool) -> [u8; COLUMNS] {
        let bits = rights.write as usize | (rights.user as usize) << 1 | (rights.exec as usize) << 2;
        let mut mask = FETCH;
        if key_free {
            mask |= READ | if writable { WRITE } else { 0 };
        }
        let existing = self.roots.slots[self.current].as_ref().map(|root| &root.columns);
        std::array::from_fn(|column| match existing {
            Some(columns) if columns[column].exists() => ALLOWED[column][bits] & mask,
            _ => 0,
        })
    }

    fn record_writer(&mut self, off: RamOffset, page: u64) {
        match self.writers.record(off, page, self.current) {
            None => {}
            Some(Full::Frame(writers)) => self.drop_writers(&writers),
            Some(Full::All) => self.drop_all_contexts(),
        }
    }
}

/// Stores to such a page concern nobody.
fn is_quiet(flags: PageFlags) -> bool {
    flags.contains(PageFlags::DIRTY) && !flags.intersects(PageFlags::REPORTED)
}
