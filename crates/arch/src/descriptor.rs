//! Descriptors in memory ("Segment Descriptors", "System Descriptor Types", "IDT Descriptors").

use crate::segment::{Attr, Segment};

/// System-descriptor types (S = 0).
pub mod system {
    #![allow(missing_docs, reason = "the names are the manual's")]
    pub const TSS16_AVAILABLE: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL_GATE16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT_GATE16: u8 = 6;
    pub const TRAP_GATE16: u8 = 7;
    pub const TSS_AVAILABLE: u8 = 9;
    pub const TSS_BUSY: u8 = 0xb;
    pub const CALL_GATE: u8 = 0xc;
    pub const INTERRUPT_GATE: u8 = 0xe;
    pub const TRAP_GATE: u8 = 0xf;
}

/// An 8-byte descriptor as read from the GDT or an LDT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Descriptor(pub u64);

impl Descriptor {
    /// Attributes in [`Attr`]'s layout.
    pub const fn attr(self) -> Attr {
        Attr((self.0 >> 40 & 0xf0ff) as u32)
    }
    /// 32-bit base.
    pub const fn base(self) -> u64 {
        (self.0 >> 16 & 0xff_ffff) | (self.0 >> 32 & 0xff00_0000)
    }
    /// Limit in bytes, scaled by G.
    pub const fn limit(self) -> u32 {
        let raw = (self.0 & 0xffff | self.0 >> 32 & 0xf_0000) as u32;
        if self.attr().is_granular() { raw << 12 | 0xfff } else { raw }
    }
    /// The segment register that loading `selector` with this descriptor gives.
    pub const fn segment(self, selector: u16) -> Segment {
        Segment { base: self.base(), limit: self.limit(), attr: self.attr(), selector }
    }
    /// The same with base bits 63:32 from the second half of a 16-byte system descriptor.
    pub const fn segment64(self, high: u64, selector: u16) -> Segment {
        Segment { base: self.base() | high << 32, limit: self.limit(), attr: self.attr(), selector }
    }
}

/// A call, interrupt, trap or task gate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gate {
    /// Type, DPL and P in [`Attr`]'s layout.
    pub attr: Attr,
    /// Target code segment, or TSS for a task gate.
    pub selector: u16,
    /// Target offset.
    pub offset: u64,
    /// IST index (64-bit interrupt and trap gates), 0..8.
    pub ist: u8,
    /// Parameter count of a call gate, 0..32.
    pub params: u8,
}

impl Gate {
    /// From 8 bytes (legacy mode).
    pub const fn legacy(low: u64) -> Self {
        let attr = Attr((low >> 40 & 0xff) as u32);
        let full = low & 0xffff | low >> 32 & 0xffff_0000;
        let offset = if attr.kind() & 8 != 0 { full } else { full & 0xffff };
        Self { attr, selector: (low >> 16) as u16, offset, ist: 0, params: (low >> 32 & 0x1f) as u8 }
    }
    /// From 16 bytes (IA-32e mode).
    pub const fn long(low: u64, high: u64) -> Self {
        let attr = Attr((low >> 40 & 0xff) as u32);
        let offset = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        Self { attr, selector: (low >> 16) as u16, offset, ist: (low >> 32 & 7) as u8, params: 0 }
    }
}

/// Bytes of GDT entry for a flat or system segment: what boot protocols and test ROMs write.
pub const fn encode(base: u32, limit: u32, attr: Attr) -> u64 {
    let raw = if attr.is_granular() { limit >> 12 } else { limit };
    (raw as u64 & 0xffff)
        | (base as u64 & 0xff_ffff) << 16
        | (attr.0 as u64 & 0xff) << 40
        | (raw as u64 >> 16 & 0xf) << 48
        | (attr.0 as u64 >> 12 & 0xf) << 52
        | (base as u64 >> 24) << 56
}
