//! What is cached, for people.

use crate::mmu::Mmu;
use crate::role::PageRole;
use crate::walk::{Regime, Top};
use umbra_arch::{GpaPage, Gva};

/// A kept root.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RootInfo {
    /// Where it is kept.
    pub slot: usize,
    /// What names it.
    pub top: Top,
    /// Role of its top tables.
    pub role: PageRole,
    /// The registers select it at present.
    pub is_current: bool,
    /// Translations entered into its contexts since they were last cleared.
    pub held: u64,
}

/// One level of the current root's shadow tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShadowLevel {
    /// The guest table.
    pub table: GpaPage,
    /// How it is read.
    pub role: PageRole,
    /// Whether the shadow entry for the address is present.
    pub is_present: bool,
}

impl Mmu {
    /// All kept roots, by slot.
    pub fn root_infos(&self) -> impl Iterator<Item = RootInfo> + '_ {
        self.roots.slots.iter().enumerate().filter_map(|(slot, root)| {
            let root = root.as_ref()?;
            let Regime { top, role, .. } = root.regime;
            let held = root.columns.iter().map(|column| u64::from(column.held)).sum();
            Some(RootInfo { slot, top, role, is_current: slot == self.current, held })
        })
    }

    /// The shadow pages that a refill of `gva` would go through, topmost first.
    pub fn shadow_path(&self, gva: Gva) -> Vec<ShadowLevel> {
        let mut levels = Vec::new();
        let Some(root) = self.roots.slots[self.current].as_ref() else { return levels };
        if root.regime.top == Top::Direct {
            return levels;
        }
        let mut next = root.tops[root.top_slot(gva.raw())];
        while let Some(page) = next.and_then(|link| self.shadow.get(link)) {
            let entry = page.entry_for(gva.raw());
            levels.push(ShadowLevel { table: page.table, role: page.role, is_present: entry.is_present() });
            next = (entry.is_present() && !entry.is_leaf()).then(|| entry.child());
        }
        levels
    }
}
