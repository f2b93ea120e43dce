//! The device that CPU test suites bring along (as pc-testdev elsewhere): a port register that reads back
//! what was written, interrupt lines by port, and a window of memory that is a device's.

use crate::{Device, MmioDevice, PortDevice};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// Where the memory window lies.
pub const WINDOW_BASE: u64 = 0xff00_0000;
/// Bytes of the memory window.
pub const WINDOW_BYTES: u64 = 0x1_0000;
/// The port that drives interrupt line 0; the lines' ports follow one another.
pub const LINES_PORT: u16 = 0x2000;
/// Number of lines.
pub const LINES: u16 = 16;

const DATA: u16 = 0xe0;
const DATA_END: u16 = 0xe3;

/// A 32-bit register at E0h that can be accessed at any width and offset, a port at E4h that asks for a
/// page's host mapping to be dropped (there is nothing to do), line levels at 2000h to 200Fh, and 64 KiB of
/// memory that answers as device registers do.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TestDevice {
    data: u32,
    lines: u16,
    /// Empty until the first write.
    window: Vec<u8>,
}

impl TestDevice {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[
        0xe0, 0xe1, 0xe2, 0xe3, 0xe4, 0xe5, 0xe6, 0xe7, 0x2000, 0x2001, 0x2002, 0x2003, 0x2004, 0x2005, 0x2006, 0x2007,
        0x2008, 0x2009, 0x200a, 0x200b, 0x200c, 0x200d, 0x200e, 0x200f,
    ];

    /// Levels of the interrupt lines that the guest drives by hand.
    pub fn lines(&self) -> u16 {
        self.lines
    }
}

impl Device for TestDevice {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {
        *self = Self::default();
    }
}

impl PortDevice for TestDevice {
    fn port_read(&mut self, _now: VirtualTime, port: u16, width: AccessWidth) -> u32 {
        match port {
            DATA..=DATA_END => self.data >> (8 * (port - DATA)) & width.mask() as u32,
            _ => width.mask() as u32,
        }
    }

    fn port_write(&mut self, _now: VirtualTime, port: u16, width: AccessWidth, value: u32) {
        match port {
            DATA..=DATA_END => {
                let shift = 8 * u32::from(port - DATA);
                let mask = (width.mask() as u32) << shift;
                self.data = self.data & !mask | value << shift & mask;
            }
            _ if port.wrapping_sub(LINES_PORT) < LINES => {
                let bit = 1 << (port - LINES_PORT);
                let high = value & width.mask() as u32 != 0;
                self.lines = if high { self.lines | bit } else { self.lines & !bit };
            }
            _ => {}
        }
    }
}

impl MmioDevice for TestDevice {
    fn mmio_read(&mut self, _now: VirtualTime, offset: u64, width: AccessWidth) -> u64 {
        let mut raw = [0u8; 8];
        for (n, byte) in raw.iter_mut().take(width.bytes() as usize).enumerate() {
            *byte = self.window.get(offset as usize + n).copied().unwrap_or(0);
        }
        u64::from_le_bytes(raw)
    }

    fn mmio_write(&mut self, _now: VirtualTime, offset: u64, width: AccessWidth, value: u64) {
        self.window.resize(WINDOW_BYTES as usize, 0);
        for (n, byte) in value.to_le_bytes().into_iter().take(width.bytes() as usize).enumerate() {
            if let Some(slot) = self.window.get_mut(offset as usize + n) {
                *slot = byte;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: VirtualTime = VirtualTime(0);

    #[test]
    fn register_keeps_bytes_that_a_narrow_write_leaves() {
        let mut d = TestDevice::default();
        d.port_write(NOW, 0xe0, AccessWidth::Dword, 0x1122_3344);
        d.port_write(NOW, 0xe1, AccessWidth::Byte, 0xfaa);
        assert_eq!(d.port_read(NOW, 0xe0, AccessWidth::Dword), 0x1122_aa44);
        assert_eq!(d.port_read(NOW, 0xe2, AccessWidth::Word), 0x1122);
    }

    #[test]
    fn lines_follow_their_ports() {
        let mut d = TestDevice::default();
        d.port_write(NOW, 0x200b, AccessWidth::Dword, 1);
        d.port_write(NOW, 0x2000, AccessWidth::Byte, 0x80);
        assert_eq!(d.lines(), 0x801);
        d.port_write(NOW, 0x200b, AccessWidth::Dword, 0);
        assert_eq!(d.lines(), 1);
    }

    #[test]
    fn window_holds_what_was_written_up_to_its_last_byte() {
        let mut d = TestDevice::default();
        assert_eq!(d.mmio_read(NOW, 0x100, AccessWidth::Qword), 0);
        d.mmio_write(NOW, WINDOW_BYTES - 1, AccessWidth::Dword, 0x55aa);
        assert_eq!(d.mmio_read(NOW, WINDOW_BYTES - 1, AccessWidth::Dword), 0xaa);
    }
}
