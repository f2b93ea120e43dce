//! Where the last walks through the shadow tree ended: most refills need only the last table's entry.

use crate::shadow::ShadowEntry;

const HINTS: usize = 64;
/// Linear bits below a hint's granularity: the smallest that the last table of any format covers.
const SHIFT: u32 = 21;

/// The last shadow page on the way to a linear address, and the rights above it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Hint {
    key: u64,
    epoch: u64,
    /// The page.
    pub index: u32,
    /// Rights bits of the links that led to it.
    pub above: u64,
}

/// A direct-mapped table of hints; all of them are forgotten whenever any link, page or root goes.
pub(crate) struct Hints {
    table: [Hint; HINTS],
    epoch: u64,
}

impl Hints {
    pub(crate) fn new() -> Self {
        let empty = Hint { key: 0, epoch: 0, index: 0, above: ShadowEntry::RIGHTS };
        Self { table: [empty; HINTS], epoch: 1 }
    }

    fn key(gva: u64, slot: usize) -> u64 {
        gva >> SHIFT << 8 | slot as u64
    }

    /// The place of the hint for `gva`: mixed, since a guest's regions begin at round addresses.
    #[inline(always)]
    fn place(gva: u64) -> usize {
        ((gva >> SHIFT).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - HINTS.ilog2())) as usize
    }

    /// What is known about `gva` in root `slot`.
    #[inline(always)]
    pub(crate) fn get(&self, gva: u64, slot: usize) -> Option<&Hint> {
        let hint = &self.table[Self::place(gva)];
        (hint.key == Self::key(gva, slot) && hint.epoch == self.epoch).then_some(hint)
    }

    /// A hint that is true at present.
    pub(crate) fn hint(&self, gva: u64, slot: usize, index: u32, above: u64) -> Hint {
        Hint { key: Self::key(gva, slot), epoch: self.epoch, index, above }
    }

    pub(crate) fn set(&mut self, gva: u64, hint: Hint) {
        self.table[Self::place(gva)] = hint;
    }

    pub(crate) fn forget(&mut self) {
        self.epoch += 1;
    }

    /// Everything known at present: a linear address in the hint's range, the root's slot, the hint.
    pub(crate) fn known(&self) -> impl Iterator<Item = (u64, usize, &Hint)> {
        let known = self.table.iter().filter(|hint| hint.epoch == self.epoch);
        known.map(|hint| (hint.key >> 8 << SHIFT, (hint.key & 0xff) as usize, hint))
    }
}
