//! Names of bytes in the host mapping.

use std::fmt;

/// A byte's offset in the one host mapping behind guest memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct RamOffset(u64);

impl RamOffset {
    /// Wraps a raw offset; nothing is checked until it is used.
    #[inline(always)]
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }
    /// The raw offset.
    #[inline(always)]
    pub const fn raw(self) -> u64 {
        self.0
    }
    /// The offset of the page's first byte.
    #[inline(always)]
    pub const fn page_base(self) -> Self {
        Self(self.0 & !0xfff)
    }
    /// This offset plus `bytes`, wrapping at 2^64.
    #[inline(always)]
    #[allow(clippy::should_implement_trait, reason = "wrapping is part of the name's meaning here")]
    pub const fn add(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }
}

impl fmt::Debug for RamOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RamOffset({:#x})", self.0)
    }
}

/// What lies behind a guest-physical page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u64)]
pub enum Backing {
    /// Readable and writable memory.
    Ram(RamOffset),
    /// Memory that ignores writes.
    Rom(RamOffset),
    /// A device or nothing at all.
    Mmio,
}

impl Backing {
    /// The offset that a read may use.
    #[inline(always)]
    pub const fn readable(self) -> Option<RamOffset> {
        match self {
            Backing::Ram(off) | Backing::Rom(off) => Some(off),
            Backing::Mmio => None,
        }
    }
    /// The backing of the byte `bytes` further in the same page.
    #[inline(always)]
    pub const fn at(self, bytes: u64) -> Self {
        match self {
            Backing::Ram(off) => Backing::Ram(off.add(bytes)),
            Backing::Rom(off) => Backing::Rom(off.add(bytes)),
            Backing::Mmio => Backing::Mmio,
        }
    }
}
