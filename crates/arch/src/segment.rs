//! Segment registers with their hidden parts ("Segment Registers", "Segment Descriptors").

use serde::{Deserialize, Serialize};

/// Index of a segment register, in the order of the instruction encoding; then LDTR and TR.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are the manual's")]
pub enum Seg {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
    Ldtr = 6,
    Tr = 7,
}

impl Seg {
    /// The six segment registers that instructions can name, in encoding order.
    pub const USER: [Seg; 6] = [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs];
}

/// Descriptor attributes as VMX and KVM keep them: bits 3:0 type, 4 S, 6:5 DPL, 7 P, 12 AVL, 13 L, 14 D/B, 15 G, 16 unusable.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Attr(pub u32);

impl Attr {
    /// No usable segment: a null selector was loaded.
    pub const UNUSABLE: Attr = Attr(1 << 16);

    /// Type field, 0..16.
    #[inline]
    pub const fn kind(self) -> u8 {
        (self.0 & 0xf) as u8
    }
    /// S: a code or data segment rather than a system one.
    #[inline]
    pub const fn is_code_or_data(self) -> bool {
        self.0 & (1 << 4) != 0
    }
    /// A code segment.
    #[inline]
    pub const fn is_code(self) -> bool {
        self.0 & 0x18 == 0x18
    }
    /// A data segment that may be written.
    #[inline]
    pub const fn is_writable_data(self) -> bool {
        self.0 & 0x1a == 0x12
    }
    /// May be read: data, or readable code.
    #[inline]
    pub const fn is_readable(self) -> bool {
        self.0 & 0x18 == 0x10 || self.0 & 0x1a == 0x1a
    }
    /// An expand-down data segment.
    #[inline]
    pub const fn is_expand_down(self) -> bool {
        self.0 & 0x1c == 0x14
    }
    /// A conforming code segment.
    #[inline]
    pub const fn is_conforming(self) -> bool {
        self.0 & 0x1c == 0x1c
    }
    /// Descriptor privilege level.
    #[inline]
    pub const fn dpl(self) -> u8 {
        (self.0 >> 5 & 3) as u8
    }
    /// P: present.
    #[inline]
    pub const fn is_present(self) -> bool {
        self.0 & (1 << 7) != 0
    }
    /// L: 64-bit code.
    #[inline]
    pub const fn is_long(self) -> bool {
        self.0 & (1 << 13) != 0
    }
    /// D/B: 32-bit default size (code) or 32-bit stack pointer.
    #[inline]
    pub const fn is_big(self) -> bool {
        self.0 & (1 << 14) != 0
    }
    /// G: limit in 4 KiB units.
    #[inline]
    pub const fn is_granular(self) -> bool {
        self.0 & (1 << 15) != 0
    }
    /// A null selector was loaded, or the register was never loaded.
    #[inline]
    pub const fn is_unusable(self) -> bool {
        self.0 & (1 << 16) != 0
    }
    /// The same with another DPL.
    #[inline]
    pub const fn with_dpl(self, dpl: u8) -> Self {
        Attr(self.0 & !0x60 | (dpl as u32 & 3) << 5)
    }
}

/// A segment register: the selector and its cached descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[repr(C)]
pub struct Segment {
    /// Base linear address.
    pub base: u64,
    /// Limit in bytes: the highest valid offset (already scaled by G).
    pub limit: u32,
    /// Cached attributes.
    pub attr: Attr,
    /// The visible selector.
    pub selector: u16,
}

impl Segment {
    /// A real-mode style segment: base = selector * 16, limit 64 KiB - 1, read/write data, DPL 0.
    pub const fn real(selector: u16) -> Self {
        Self { base: (selector as u64) << 4, limit: 0xffff, attr: Attr(0x93), selector }
    }
    /// A flat 4 GiB data segment of ring `dpl`.
    pub const fn flat_data(selector: u16, dpl: u8) -> Self {
        Self { base: 0, limit: u32::MAX, attr: Attr(0xc093).with_dpl(dpl), selector }
    }
    /// A flat 4 GiB 32-bit code segment of ring `dpl`.
    pub const fn flat_code32(selector: u16, dpl: u8) -> Self {
        Self { base: 0, limit: u32::MAX, attr: Attr(0xc09b).with_dpl(dpl), selector }
    }
    /// A 64-bit code segment of ring `dpl`.
    pub const fn code64(selector: u16, dpl: u8) -> Self {
        Self { base: 0, limit: u32::MAX, attr: Attr(0xa09b).with_dpl(dpl), selector }
    }
    /// A null selector's register.
    pub const fn null(selector: u16) -> Self {
        Self { base: 0, limit: 0, attr: Attr::UNUSABLE, selector }
    }
    /// The null stack segment of ring `cpl` in 64-bit mode.
    pub const fn null_stack(cpl: u8) -> Self {
        Self { attr: Attr::UNUSABLE.with_dpl(cpl), ..Self::null(cpl as u16) }
    }
    /// Requested privilege level: the selector's low two bits.
    #[inline]
    pub const fn rpl(&self) -> u8 {
        (self.selector & 3) as u8
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[repr(C)]
pub struct TableRegister {
    /// Linear address of the table.
    pub base: u64,
    /// Highest valid byte offset.
    pub limit: u16,
}
