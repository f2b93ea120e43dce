//! The audit: every cached entry against the guest's own tables.

use crate::context::{Column, Entry, column_of, view_of};
use crate::mmu::Mmu;
use crate::roots::Root;
use crate::tables::{MemoryTables, read_entry};
use crate::walk::{self, Walk};
use umbra_arch::Gva;
use umbra_arch::paging::{Access, AccessKind, entry};
use umbra_memory::{PageFlags, RamOffset};

impl Mmu {
    /// Checks every cached entry: shadow entries equal a fresh reading of the guest's; shadowed frames
    /// are watched; fast entries are what a walk under their column's view gives; write tags are only
    /// on dirty pages that are neither code nor tables; every reverse link needed to drop them exists.
    ///
    /// # Errors
    /// Says what is wrong: a bug in this crate, or a store that was not reported.
    pub fn audit(&self) -> Result<(), String> {
        for index in self.shadow.indices() {
            self.audit_page(index)?;
        }
        for slot in self.roots.used() {
            let Some(root) = &self.roots.slots[slot] else { continue };
            for (column, block) in root.columns.iter().enumerate().filter(|(_, c)| c.exists()) {
                self.audit_column(slot, root, column, block)?;
            }
        }
        self.audit_hints()?;
        self.audit_upper_halves()?;
        self.audit_active()
    }

    /// Roots that share an identity of their upper half have topmost tables that are watched and say the same of it.
    fn audit_upper_halves(&self) -> Result<(), String> {
        let roots = || self.roots.slots.iter().flatten();
        for (at, root) in roots().enumerate() {
            let Some(other) = roots().take(at).find(|other| other.upper == root.upper) else { continue };
            let tables = [root, other].map(|root| root.tops[0].and_then(|link| self.shadow.get(link)));
            let [Some(a), Some(b)] = tables else {
                return Err("roots share an upper half without a topmost table".to_owned());
            };
            if self.upper_entries(a.off) != self.upper_entries(b.off) {
                return Err(format!("roots of {:?} and {:?} don't agree about the upper half", a.table, b.table));
            }
        }
        Ok(())
    }

    fn audit_hints(&self) -> Result<(), String> {
        for (gva, slot, hint) in self.hints.known() {
            let page = self.shadow.page(hint.index);
            // A hint may outlive its leaf, but not the way to it.
            if !page.entry_for(gva).is_link() && self.find_end(gva, slot) != Some(*hint) {
                return Err(format!("{hint:x?} for {gva:#x} in root {slot} leads elsewhere than the tree"));
            }
            if !page.knows(gva, slot) {
                return Err(format!("{hint:x?} for {gva:#x} in root {slot} leads to a page that does not know"));
            }
        }
        Ok(())
    }

    fn audit_page(&self, index: u32) -> Result<(), String> {
        let page = self.shadow.page(index);
        let name = || format!("shadow page of {:?} {:?}", page.table, page.role);
        if !self.mem.page_flags(page.off).contains(PageFlags::WATCHED)
            || !self.watcher.has_claimed(page.off, PageFlags::WATCHED)
        {
            return Err(format!("{} is not watched", name()));
        }
        if self.mem.map(page.table).readable() != Some(page.off) {
            return Err(format!("{}: its frame moved", name()));
        }
        let bytes = page.role.format.entry_bytes();
        let mut present = 0;
        for (at, &entry) in page.entries.iter().enumerate().filter(|(_, e)| e.is_present()) {
            present += 1;
            let raw = read_entry(&self.mem, page.table.base().add(at as u64 * bytes), bytes);
            let decoded = self.format.decode(raw, page.role);
            if !self.shadow.says(entry, page.role, decoded) {
                return Err(format!("{} entry {at}: holds {entry:x?}, the guest's {raw:#x} says {decoded:x?}", name()));
            }
        }
        if present != page.present {
            return Err(format!("{} has {present} entries and counts {}", name(), page.present));
        }
        Ok(())
    }

    fn audit_column(&self, slot: usize, root: &Root, column: usize, block: &Column) -> Result<(), String> {
        for (at, entry) in self.pool.block(block).iter().enumerate() {
            let tags = [
                (entry.tag_read, AccessKind::Read, false),
                (entry.tag_write, AccessKind::Write, false),
                (entry.tag_write ^ Entry::REPORTED, AccessKind::Write, true),
                (entry.tag_fetch, AccessKind::Fetch, false),
            ];
            let here = |page: u64| page >> 12 & block.mask() == at as u64;
            for (page, kind, reported) in tags.into_iter().filter(|(tag, ..)| here(*tag)) {
                if kind == AccessKind::Write && entry.tag_read != page {
                    return Err(format!("page {page:#x} may be written and not read"));
                }
                self.audit_tag(slot, root, column, page, (kind, reported), entry)
                    .map_err(|what| format!("root {:x?} column {column} {kind:?} of {page:#x}: {what}", root.regime))?;
                if block.held == 0 {
                    return Err(format!("page {page:#x} lies in slot {at} of a column that holds nothing"));
                }
            }
        }
        Ok(())
    }

    fn audit_tag(
        &self,
        slot: usize,
        root: &Root,
        column: usize,
        page: u64,
        (kind, reported): (AccessKind, bool),
        entry: &Entry,
    ) -> Result<(), String> {
        let view = view_of(column);
        let access = Access::explicit(kind, if view.user { 3 } else { 0 });
        let mut tables = MemoryTables { watcher: &self.watcher, reads: 0 };
        let walked = walk::look(&mut tables, &root.regime, Gva::new(page), access, &view)
            .map_err(|fault| format!("a walk gives {fault}"))?;
        let backing = self.mem.map(walked.gpa.page());
        let off = self.offset_in(entry, Gva::new(page));
        if backing.readable() != Some(off) {
            return Err(format!("leads to {off:?}, a walk to {backing:?}"));
        }
        self.audit_links(slot, page, &walked)?;
        if kind == AccessKind::Write && !walked.dirty {
            return Err("write tag under a clean leaf".to_owned());
        }
        if kind == AccessKind::Write && !reported {
            self.audit_write(slot, page, off)?;
        }
        Ok(())
    }

    fn audit_links(&self, slot: usize, page: u64, walked: &Walk) -> Result<(), String> {
        for step in walked.steps() {
            if step.raw & entry::A == 0 {
                return Err(format!("accessed bit is clear in {step:x?}"));
            }
            let off = self.mem.map(step.table.page()).readable().ok_or("table is no memory")?;
            let index =
                self.shadow.find(off, step.table.page(), step.role).ok_or("a table on the path has no shadow")?;
            if !self.shadow.page(index).knows(page, slot) {
                return Err(format!("{:?} does not know that it was reached", step.role));
            }
        }
        Ok(())
    }

    fn audit_write(&self, slot: usize, page: u64, off: RamOffset) -> Result<(), String> {
        let flags = self.mem.page_flags(off);
        if !flags.contains(PageFlags::DIRTY) || flags.intersects(PageFlags::REPORTED) {
            return Err(format!("write tag on a page with {flags:?}"));
        }
        if !self.writers.knows(off, page, slot) {
            return Err("no reverse link from the frame".to_owned());
        }
        Ok(())
    }

    /// The active column must hold no page of a restricted key, and the fast paths must read it.
    fn audit_active(&self) -> Result<(), String> {
        let root = self.roots.slots[self.current].as_ref().ok_or("no current root")?;
        if root.regime != self.regime() {
            return Err(format!("current root {:x?} is not the registers' {:x?}", root.regime, self.regime()));
        }
        let column = &root.columns[column_of(&self.view)];
        if column.keys & self.restricted != 0 {
            return Err("the active column holds pages of restricted keys".to_owned());
        }
        if !self.reads_column(column) {
            return Err("the fast paths read another column than the view's".to_owned());
        }
        let column = &root.columns[column_of(&self.view.implicit())];
        if !self.reads_for_system(column) {
            return Err("implicit accesses read another column than theirs".to_owned());
        }
        if self.fetch_stamp() != self.current_stamp() {
            return Err("the fetch stamp is another root's or view's".to_owned());
        }
        Ok(())
    }
}
