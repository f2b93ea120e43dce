//! One byte of flags for every page of the mapping.

use crate::RamOffset;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// Flags of a page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(transparent)]
pub struct PageFlags(u8);

impl PageFlags {
    /// No flag.
    pub const NONE: PageFlags = PageFlags(0);
    /// Written since the flag was last cleared.
    pub const DIRTY: PageFlags = PageFlags(1);
    /// Decoded or translated instructions were taken from it.
    pub const CODE: PageFlags = PageFlags(2);
    /// The MMU holds entries derived from it: stores must be reported.
    pub const WATCHED: PageFlags = PageFlags(4);
    /// The page source has its contents: nobody may use the bytes before they are loaded.
    pub const ABSENT: PageFlags = PageFlags(8);
    /// It was present and has to arrive again before the guest's own accesses reach it. The bytes are in place:
    /// everybody else may use them.
    pub const SWAPPED: PageFlags = PageFlags(0x20);
    /// A processor waits by MWAIT for stores to it.
    pub const MONITORED: PageFlags = PageFlags(0x10);

    /// The guest's own accesses have to wait for it.
    pub const AWAY: PageFlags = PageFlags::ABSENT.union(PageFlags::SWAPPED);

    /// Whether any of `other`'s flags is set.
    #[inline(always)]
    pub const fn intersects(self, other: PageFlags) -> bool {
        self.0 & other.0 != 0
    }
    /// Whether all of `other`'s flags are set.
    #[inline(always)]
    pub const fn contains(self, other: PageFlags) -> bool {
        self.0 & other.0 == other.0
    }
    /// Both sets together.
    #[inline(always)]
    pub const fn union(self, other: PageFlags) -> PageFlags {
        PageFlags(self.0 | other.0)
    }
    /// The flags in both sets.
    #[inline(always)]
    pub const fn intersection(self, other: PageFlags) -> PageFlags {
        PageFlags(self.0 & other.0)
    }
    /// Stores to such a page must be reported to the engine and the MMU.
    pub const REPORTED: PageFlags = PageFlags::CODE.union(PageFlags::WATCHED).union(PageFlags::MONITORED);
}

/// Flags share no bit: their sum is their union.
const _: () = {
    use PageFlags as F;
    let all = F::DIRTY.union(F::REPORTED).union(F::AWAY);
    assert!(F::DIRTY.0 + F::CODE.0 + F::WATCHED.0 + F::MONITORED.0 + F::ABSENT.0 + F::SWAPPED.0 == all.0);
};

/// The flags of all pages.
pub(crate) struct FlagTable(Box<[AtomicU8]>);

impl FlagTable {
    pub(crate) fn new(pages: usize) -> Self {
        Self((0..pages).map(|_| AtomicU8::new(0)).collect())
    }
    #[inline(always)]
    pub(crate) fn get(&self, off: RamOffset) -> PageFlags {
        self.0.get((off.raw() >> 12) as usize).map_or(PageFlags::NONE, |f| PageFlags(f.load(Relaxed)))
    }
    pub(crate) fn set(&self, off: RamOffset, flags: PageFlags) {
        if let Some(f) = self.0.get((off.raw() >> 12) as usize) {
            f.fetch_or(flags.0, Relaxed);
        }
    }
    pub(crate) fn clear(&self, off: RamOffset, flags: PageFlags) {
        if let Some(f) = self.0.get((off.raw() >> 12) as usize) {
            f.fetch_and(!flags.0, Relaxed);
        }
    }
}
