//! Guest addresses: linear and physical ones never mix, nor do addresses and page numbers.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Size of the smallest page in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

macro_rules! address {
    ($addr:ident, $page:ident, $what:literal) => {
        #[doc = concat!("A guest-", $what, " address in bytes.")]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[repr(transparent)]
        pub struct $addr(u64);

        #[doc = concat!("A guest-", $what, " page number: the address shifted right by 12.")]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[repr(transparent)]
        pub struct $page(u64);

        impl $addr {
            /// Wraps a raw address. The border between a register's value and a typed address.
            #[inline(always)]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }
            /// The raw address.
            #[inline(always)]
            pub const fn raw(self) -> u64 {
                self.0
            }
            /// The page that holds this address.
            #[inline(always)]
            pub const fn page(self) -> $page {
                $page(self.0 >> PAGE_SHIFT)
            }
            /// Offset in the page, 0..4096.
            #[inline(always)]
            pub const fn offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }
            /// This address plus `bytes`, wrapping at 2^64.
            #[inline(always)]
            #[allow(clippy::should_implement_trait, reason = "wrapping is part of the name's meaning here")]
            pub const fn add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }
        }

        impl $page {
            /// Wraps a raw page number.
            #[inline(always)]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }
            /// The raw page number.
            #[inline(always)]
            pub const fn raw(self) -> u64 {
                self.0
            }
            /// Address of the page's first byte.
            #[inline(always)]
            pub const fn base(self) -> $addr {
                $addr(self.0 << PAGE_SHIFT)
            }
            /// Address of the byte at `offset` (0..4096) in this page.
            #[inline(always)]
            pub const fn at(self, offset: u64) -> $addr {
                $addr((self.0 << PAGE_SHIFT) | (offset & (PAGE_SIZE - 1)))
            }
            /// The page `n` pages further.
            #[inline(always)]
            #[allow(clippy::should_implement_trait, reason = "wrapping is part of the name's meaning here")]
            pub const fn add(self, n: u64) -> Self {
                Self(self.0.wrapping_add(n))
            }
        }

        impl fmt::Debug for $addr {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:#x})", stringify!($addr), self.0)
            }
        }
        impl fmt::Display for $addr {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
        impl fmt::Debug for $page {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:#x})", stringify!($page), self.0)
            }
        }
        impl fmt::Display for $page {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address!(Gva, GvaPage, "linear");
address!(Gpa, GpaPage, "physical");

impl Gva {
    /// Whether bits 63..`bits`-1 are all equal ("Canonical Addressing"); `bits` is 48, or 57 with CR4.LA57.
    #[inline(always)]
    pub const fn is_canonical(self, bits: u32) -> bool {
        let shift = 64 - bits;
        (((self.0 << shift) as i64) >> shift) as u64 == self.0
    }
}
