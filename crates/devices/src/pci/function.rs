//! Configuration space of one PCI function ("PCI Local Bus Specification", configuration space).

use crate::bytes::ByteFile;
use serde::{Deserialize, Serialize};
use umbra_arch::AccessWidth;

/// Offsets of the type 0 header.
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod offset {
    pub const VENDOR_ID: u8 = 0x00;
    pub const DEVICE_ID: u8 = 0x02;
    pub const COMMAND: u8 = 0x04;
    pub const STATUS: u8 = 0x06;
    pub const REVISION_AND_CLASS: u8 = 0x08;
    pub const CACHE_LINE_SIZE: u8 = 0x0c;
    pub const LATENCY_TIMER: u8 = 0x0d;
    pub const HEADER_TYPE: u8 = 0x0e;
    pub const BAR0: u8 = 0x10;
    pub const SUBSYSTEM: u8 = 0x2c;
    pub const CAPABILITIES: u8 = 0x34;
    pub const INTERRUPT_LINE: u8 = 0x3c;
    pub const INTERRUPT_PIN: u8 = 0x3d;
}

/// Command register bits.
#[allow(missing_docs, reason = "the names are the specification's")]
pub mod command {
    pub const IO_SPACE: u16 = 1 << 0;
    pub const MEMORY_SPACE: u16 = 1 << 1;
    pub const BUS_MASTER: u16 = 1 << 2;
    pub const INTERRUPT_DISABLE: u16 = 1 << 10;
    /// Bits software can change; parity and SERR are stored without effect.
    pub(super) const WRITABLE: u16 = IO_SPACE | MEMORY_SPACE | BUS_MASTER | 1 << 6 | 1 << 8 | INTERRUPT_DISABLE;
}

const STATUS_HAS_CAPABILITIES: u8 = 1 << 4;
const HEADER_MULTIFUNCTION: u8 = 1 << 7;
/// Where capabilities start.
const FIRST_CAPABILITY: u8 = 0x40;

/// Who a function says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciIdentity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Class, subclass and programming interface, from high to low.
    pub class: u32,
    /// Subsystem vendor id and subsystem id.
    pub subsystem: (u16, u16),
}

/// What a base address register maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere, prefetchable; takes the next register, too.
    Memory64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Bar {
    kind: BarKind,
    size: u64,
}

/// A region that a base address register decodes now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarWindow {
    /// Ports or memory.
    pub kind: BarKind,
    /// First port or guest-physical address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

/// 256 bytes of configuration space, with masks that say which bits software can write.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PciFunction {
    config: ByteFile,
    writable: ByteFile,
    write_one_clears: ByteFile,
    bars: [Option<Bar>; 6],
    last_capability: u8,
    next_capability: u8,
}

impl PciFunction {
    /// A function with a type 0 header and no BARs, capabilities or interrupt pin.
    pub fn new(identity: PciIdentity) -> Self {
        let mut f = Self {
            config: ByteFile::default(),
            writable: ByteFile::default(),
            write_one_clears: ByteFile::default(),
            bars: [None; 6],
            last_capability: 0,
            next_capability: FIRST_CAPABILITY,
        };
        f.config.set_dword(offset::VENDOR_ID, u32::from(identity.device) << 16 | u32::from(identity.vendor));
        f.config.set_dword(offset::REVISION_AND_CLASS, identity.class << 8 | u32::from(identity.revision));
        let (vendor, id) = identity.subsystem;
        f.config.set_dword(offset::SUBSYSTEM, u32::from(id) << 16 | u32::from(vendor));
        f.writable.set_dword(offset::COMMAND, command::WRITABLE.into());
        f.write_one_clears.set(offset::STATUS + 1, 0xf9);
        for byte in [offset::CACHE_LINE_SIZE, offset::LATENCY_TIMER, offset::INTERRUPT_LINE] {
            f.writable.set(byte, 0xff);
        }
        f
    }

    /// Says that the device has more functions than 0.
    pub fn multifunction(mut self) -> Self {
        self.config.set(offset::HEADER_TYPE, self.config.get(offset::HEADER_TYPE) | HEADER_MULTIFUNCTION);
        self
    }

    /// Uses interrupt pin INTA (1) to INTD (4).
    pub fn with_interrupt_pin(mut self, pin: u8) -> Self {
        self.config.set(offset::INTERRUPT_PIN, pin);
        self
    }

    /// Adds base address register `index`.
    ///
    /// # Panics
    /// If the size is no power of two of at least 16 (4 for ports), or the register does not exist.
    pub fn with_bar(mut self, index: usize, kind: BarKind, size: u64) -> Self {
        let least = if kind == BarKind::Io { 4 } else { 16 };
        assert!(size.is_power_of_two() && size >= least, "BAR sizes are powers of two, this is {size:#x}");
        assert!(index < if kind == BarKind::Memory64 { 5 } else { 6 }, "there are six BARs");
        let at = offset::BAR0 + 4 * index as u8;
        let mask = !(size - 1);
        let flags = match kind {
            BarKind::Io => 0x1,
            BarKind::Memory32 => 0x0,
            BarKind::Memory64 => 0xc,
        };
        self.config.set_dword(at, flags);
        self.writable.set_dword(at, mask as u32);
        if kind == BarKind::Memory64 {
            self.writable.set_dword(at + 4, (mask >> 32) as u32);
        }
        self.bars[index] = Some(Bar { kind, size });
        self
    }

    /// Adds a capability: `body` follows its id and link; `writable` are the bits of the body that
    /// software can change (missing bytes: none). Returns its offset.
    ///
    /// # Panics
    /// If configuration space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let at = self.next_capability;
        let end = usize::from(at) + 2 + body.len();
        assert!(end <= 0xfc, "configuration space is full");
        self.config.set(at, id);
        for (i, byte) in (at + 2..).zip(body) {
            self.config.set(i, *byte);
        }
        for (i, mask) in (at + 2..).zip(writable) {
            self.writable.set(i, *mask);
        }
        let link = if self.last_capability == 0 { offset::CAPABILITIES } else { self.last_capability + 1 };
        self.config.set(link, at);
        self.config.set(offset::STATUS, self.config.get(offset::STATUS) | STATUS_HAS_CAPABILITIES);
        self.last_capability = at;
        self.next_capability = end.next_multiple_of(4) as u8;
        at
    }

    /// Sets a device-specific byte and which of its bits software can write.
    pub fn with_byte(mut self, offset: u8, value: u8, writable: u8) -> Self {
        self.config.set(offset, value);
        self.writable.set(offset, writable);
        self
    }

    /// Command register.
    pub fn command(&self) -> u16 {
        self.config.word(offset::COMMAND)
    }

    /// Where base address register `index` decodes; `None` if it has none or the command register
    /// turns its space off.
    pub fn bar(&self, index: usize) -> Option<BarWindow> {
        let Bar { kind, size } = (*self.bars.get(index)?)?;
        let at = offset::BAR0 + 4 * index as u8;
        let enable = if kind == BarKind::Io { command::IO_SPACE } else { command::MEMORY_SPACE };
        let mut base = u64::from(self.config.dword(at));
        if kind == BarKind::Memory64 {
            base |= u64::from(self.config.dword(at + 4)) << 32;
        }
        (self.command() & enable != 0).then_some(BarWindow { kind, base: base & !size.wrapping_sub(1), size })
    }

    /// A byte of configuration space.
    pub fn byte(&self, offset: u8) -> u8 {
        self.config.get(offset)
    }

    /// Sets a byte of configuration space from the device's side, whatever software may write.
    pub fn set_byte(&mut self, offset: u8, value: u8) {
        self.config.set(offset, value);
    }

    /// Reads as software does; bytes beyond the end wrap.
    pub fn read(&self, offset: u8, width: AccessWidth) -> u32 {
        self.config.dword(offset) & width.mask() as u32
    }

    /// Writes as software does. True if a BAR or the command register changed, and so the layout.
    pub fn write(&mut self, offset: u8, width: AccessWidth, value: u32) -> bool {
        let mut layout = false;
        for i in 0..width.bytes().min(4) as u8 {
            layout |= self.write_byte(offset.wrapping_add(i), (value >> (8 * i)) as u8);
        }
        layout
    }

    fn write_byte(&mut self, offset: u8, value: u8) -> bool {
        let old = self.config.get(offset);
        let writable = self.writable.get(offset);
        let new = old & !writable & !(value & self.write_one_clears.get(offset)) | value & writable;
        self.config.set(offset, new);
        let in_layout = matches!(offset, offset::COMMAND | 0x05 | offset::BAR0..=0x27);
        in_layout && new != old
    }
}
