//! The upper half of a new root: as a rule that of the root in force, since kernels map themselves alike in all
//! address spaces.
//!
//! Where both topmost tables say the same of it, the new root's has the identity ([`Mmu::upper_stamp`]) of the old one's,
//! until one of the two tables changes there: what is known of fetches in one holds in the other.

use crate::mmu::Mmu;
use crate::role::EntryFormat;
use crate::walk::{Regime, Top};
use smallvec::SmallVec;
use umbra_arch::paging::entry;
use umbra_memory::RamOffset;

/// First entry of a topmost table's upper half.
pub(crate) const UPPER: usize = 256;

impl Mmu {
    /// As [`fetch_stamp`](Self::fetch_stamp) for linear addresses of the upper half in 4- and 5-level paging: roots that
    /// map it by the same tables have the same.
    #[inline(always)]
    pub fn upper_stamp(&self) -> u64 {
        let upper = self.roots.slots[self.current].as_ref().map_or(0, |root| root.upper);
        // No fetch stamp ends like this.
        upper << 8 | self.fetch_class() << 2 | 3
    }

    /// Gives the current root, which is new, the identity of root `from`'s upper half if their topmost tables agree about
    /// it.
    pub(crate) fn adopt_upper_half(&mut self, from: usize) {
        let agreed = self.agreeing_top(from);
        let upper = self.roots.slots[from].as_ref().map(|root| root.upper);
        if let (Some(index), Some(upper), Some(root)) = (agreed, upper, &mut self.roots.slots[self.current]) {
            root.upper = upper;
            root.tops[0] = Some(self.shadow.link_of(index));
            self.stats.upper_halves_adopted += 1;
        }
    }

    /// The shadow page of the current root's topmost table, if that says what root `from`'s says of the upper half and
    /// walks have nothing to write there.
    fn agreeing_top(&mut self, from: usize) -> Option<u32> {
        let (old, new) = (self.roots.slots[from].as_ref()?, self.roots.slots[self.current].as_ref()?);
        let Top::Table(table) = new.regime.top else { return None };
        let same = old.regime == Regime { top: old.regime.top, ..new.regime };
        if from == self.current || !same || new.regime.role.format != EntryFormat::Long {
            return None;
        }
        let (role, link) = (new.regime.role, old.tops[0]?);
        let theirs = self.upper_entries(self.shadow.get(link)?.off);
        if theirs == [[0; 8]; UPPER] {
            return None;
        }
        // Watched from here on, so that no later store is missed.
        let index = self.shadow_page_of(table.page(), role)?;
        let ours = self.upper_entries(self.shadow.page(index).off);
        let unmarked = cfg!(umbra_mutant = "upper-half-adopted-without-a-bits");
        let untouched = |raw: u64| raw & entry::P == 0 || raw & entry::A != 0 || unmarked;
        (theirs == ours && ours.iter().all(|raw| untouched(u64::from_le_bytes(*raw)))).then_some(index)
    }

    pub(crate) fn upper_entries(&self, table: RamOffset) -> [[u8; 8]; UPPER] {
        let mut entries = [[0; 8]; UPPER];
        self.mem.load_bytes(RamOffset::new(table.raw() + 8 * UPPER as u64), entries.as_flattened_mut());
        entries
    }

    /// The topmost table in shadow page `index` may say something else of the upper half now: its roots agree with no
    /// other about that.
    pub(crate) fn part_upper_half(&mut self, index: u32) {
        let role = self.shadow.page(index).role;
        if role.format != EntryFormat::Long || role.level < 4 || cfg!(umbra_mutant = "top-table-stores-part-nothing") {
            return;
        }
        let link = self.shadow.link_of(index);
        for slot in self.roots.used() {
            let stamp = self.next_stamp();
            if let Some(root) = self.roots.slots[slot].as_mut().filter(|root| root.tops[0] == Some(link)) {
                root.upper = stamp;
            }
        }
    }

    /// Translations by shadow page `index` of fetches in the upper half may have ended.
    pub(crate) fn upper_half_changed(&mut self, index: u32) {
        if self.shadow.page(index).is_child { self.renew_upper_halves() } else { self.part_upper_half(index) }
    }

    /// No table is watched any more.
    pub(crate) fn part_all_upper_halves(&mut self) {
        for slot in self.roots.used() {
            let stamp = self.next_stamp();
            self.roots.for_each_in(1 << slot, |root| root.upper = stamp);
        }
    }

    /// A translation of a fetch in the upper half may have ended in some root: in all, as one may know of it by others
    /// that agree with it, or did.
    fn renew_upper_halves(&mut self) {
        if cfg!(umbra_mutant = "upper-half-never-renewed") {
            return;
        }
        let mut renewed: SmallVec<[(u64, u64); 8]> = SmallVec::new();
        for slot in self.roots.used() {
            let stamp = self.next_stamp();
            self.roots.for_each_in(1 << slot, |root| {
                let known = renewed.iter().find(|(old, _)| *old == root.upper).map(|(_, new)| *new);
                if known.is_none() {
                    renewed.push((root.upper, stamp));
                }
                root.upper = known.unwrap_or(stamp);
            });
        }
    }
}
