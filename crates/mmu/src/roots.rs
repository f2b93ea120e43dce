//! Roots: what a CR3 (or four PDPTEs) under a role leads to, and the cache that keeps them.

use crate::context::{COLUMNS, Column};
use crate::shadow::Link;
use crate::walk::{Regime, Top};

/// Roots kept; root sets are bits of one word.
pub(crate) const MAX_ROOTS: usize = 64;

/// One root. Its level and format are its own: nothing here depends on the mode now in force.
pub(crate) struct Root {
    /// The key.
    pub regime: Regime,
    /// Shadow page of the topmost table; the first only, but for PAE's four page directories.
    pub tops: [Option<Link>; 4],
    pub columns: [Column; COLUMNS],
    /// Columns that have a block, a bit each.
    pub existing: u32,
    /// Changes whenever a translation of a fetch may have ended.
    pub stamp: u64,
    /// Likewise for the upper half; the same in roots whose topmost tables say the same of it.
    pub upper: u64,
}

impl Root {
    /// The columns that have a block.
    #[inline(always)]
    pub(crate) fn existing_columns(&self) -> impl Iterator<Item = &Column> {
        let mut left = self.existing;
        std::iter::from_fn(move || {
            let at = (left != 0).then(|| left.trailing_zeros())?;
            left &= left - 1;
            Some(&self.columns[at as usize])
        })
    }

    /// The slot of `tops` that serves `gva`.
    #[inline(always)]
    pub(crate) fn top_slot(&self, gva: u64) -> usize {
        match self.regime.top {
            Top::Pdptes(_) => (gva >> 30 & 3) as usize,
            _ => 0,
        }
    }
}

/// Set in fingerprints that only narrow the search.
const INEXACT: u64 = 1 << 41;

/// The bits of a role's word that tell roots apart: all.
const KEYED: u32 = if cfg!(umbra_mutant = "root-key-without-nx") {
    !(1 << 8)
} else if cfg!(umbra_mutant = "root-key-without-pse") {
    !(1 << 9)
} else if cfg!(umbra_mutant = "root-key-without-smm") {
    !(1 << 10)
} else {
    !0
};

/// A root's key in one word: exact, but for four PDPTEs. CPUID facts are left out, since no root
/// survives their change.
fn fingerprint(regime: &Regime) -> u64 {
    let top = match regime.top {
        Top::Pdptes(p) if cfg!(umbra_mutant = "pae-root-keyed-by-one-pdpte") => p[0],
        Top::Direct => 1 << 40,
        Top::Table(table) => table.page().raw(),
        Top::Pdptes(p) => {
            let mixed = p[0] ^ p[1].rotate_left(13) ^ p[2].rotate_left(27) ^ p[3].rotate_left(41);
            ((mixed ^ mixed >> 40) & 0xff_ffff_ffff) | INEXACT
        }
    };
    top | u64::from(regime.role.word() & KEYED) << 48
}

/// Roots in slots, and their order of use.
pub(crate) struct RootCache {
    pub slots: Vec<Option<Root>>,
    /// Fingerprint and slot, most recently used first.
    order: Vec<(u64, u8)>,
}

impl RootCache {
    pub(crate) fn new() -> Self {
        Self { slots: (0..MAX_ROOTS).map(|_| None).collect(), order: Vec::with_capacity(MAX_ROOTS) }
    }

    /// Finds a root and makes it the most recently used: its slot and former position.
    #[inline]
    pub(crate) fn find(&mut self, regime: &Regime) -> Option<(usize, usize)> {
        let print = fingerprint(regime);
        let same = |slot: u8| self.slots[slot as usize].as_ref().is_some_and(|root| root.regime == *regime);
        let fits = |&(p, slot): &(u64, u8)| p == print && (p & INEXACT == 0 || same(slot));
        let position = self.order.iter().position(fits)?;
        let found = self.order[position];
        self.order.copy_within(..position, 1);
        self.order[0] = found;
        Some((found.1 as usize, position))
    }

    /// The slot to give up before a new root fits.
    pub(crate) fn victim(&self) -> Option<usize> {
        if self.order.len() < MAX_ROOTS { None } else { self.order.last().map(|&(_, slot)| slot as usize) }
    }

    /// Puts a root into a free slot, most recently used. The caller has made room.
    pub(crate) fn insert(&mut self, root: Root) -> usize {
        let slot = self.slots.iter().position(Option::is_none).unwrap_or(0);
        self.order.insert(0, (fingerprint(&root.regime), slot as u8));
        self.slots[slot] = Some(root);
        slot
    }

    pub(crate) fn remove(&mut self, slot: usize) -> Option<Root> {
        self.order.retain(|&(_, s)| s as usize != slot);
        self.slots[slot].take()
    }

    /// Slots in use.
    pub(crate) fn used(&self) -> impl Iterator<Item = usize> + use<> {
        let mut slots: Vec<usize> = self.order.iter().map(|&(_, slot)| slot as usize).collect();
        slots.sort_unstable();
        slots.into_iter()
    }

    /// Visits the roots of a set, one bit a slot.
    #[inline(always)]
    pub(crate) fn for_each_in(&mut self, set: u64, mut visit: impl FnMut(&mut Root)) {
        let mut left = set;
        while left != 0 {
            let slot = left.trailing_zeros() as usize;
            left &= left - 1;
            if let Some(root) = &mut self.slots[slot] {
                visit(root);
            }
        }
    }
}
