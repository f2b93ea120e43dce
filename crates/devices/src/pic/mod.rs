//! The PC's two cascaded 8259A interrupt controllers with their edge/level control registers.

pub mod core;

use self::core::Pic8259;
use crate::{Device, PortDevice, regmap};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// Input of the master that the slave drives.
const CASCADE: u8 = 2;

/// Master (20h/21h, ISA interrupts 0 to 7) and slave (A0h/A1h, 8 to 15), ELCR at 4D0h and 4D1h.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PicPair {
    master: Pic8259,
    slave: Pic8259,
}

impl Default for PicPair {
    fn default() -> Self {
        Self { master: Pic8259::new(1 << CASCADE, 0xf8), slave: Pic8259::new(0, 0xde) }
    }
}

impl PicPair {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1];

    /// Sets the line of ISA interrupt `n` (0..16 without 2; others are ignored).
    pub fn set_line(&mut self, n: u8, level: bool) {
        match n {
            CASCADE => {}
            0..8 => self.master.set_line(n, level),
            8..16 => {
                self.slave.set_line(n - 8, level);
                self.update_cascade();
            }
            _ => {}
        }
    }

    /// The INTR output to the CPU or LINT0.
    pub fn intr(&self) -> bool {
        self.master.intr()
    }

    /// Interrupt acknowledge: the vector. If the request has gone it is that of input 7 of the chip
    /// that was asked, with nothing in service there (a spurious interrupt).
    pub fn acknowledge(&mut self) -> u8 {
        let Some(n) = self.master.take() else { return self.master.vector(7) };
        if !self.master.is_cascade(n) {
            return self.master.vector(n);
        }
        let request = self.slave.take();
        // The slave's INT falls with the acknowledge, so that a further request makes an edge.
        self.master.set_line(CASCADE, false);
        self.update_cascade();
        self.slave.vector(request.unwrap_or(7))
    }

    fn update_cascade(&mut self) {
        let level = self.slave.intr();
        self.master.set_line(CASCADE, level);
    }

    fn read(&mut self, port: u16) -> u8 {
        let value = match port {
            0x20 => self.master.read_command(),
            0x21 => self.master.read_data(),
            0xa0 => self.slave.read_command(),
            0xa1 => self.slave.read_data(),
            0x4d0 => self.master.elcr(),
            0x4d1 => self.slave.elcr(),
            _ => 0xff,
        };
        self.update_cascade();
        value
    }

    fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 => self.master.write_command(value),
            0x21 => self.master.write_data(value),
            0xa0 => self.slave.write_command(value),
            0xa1 => self.slave.write_data(value),
            0x4d0 => self.master.set_elcr(value),
            0x4d1 => self.slave.set_elcr(value),
            _ => {}
        }
        self.update_cascade();
    }
}

impl Device for PicPair {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {
        self.master.reset();
        self.slave.reset();
    }
}

impl PortDevice for PicPair {
    fn port_read(&mut self, _now: VirtualTime, port: u16, width: AccessWidth) -> u32 {
        regmap::read_bytes(port, width, |port| self.read(port))
    }
    fn port_write(&mut self, _now: VirtualTime, port: u16, width: AccessWidth, value: u32) {
        regmap::write_bytes(port, width, value, |port, byte| self.write(port, byte));
    }
}

#[cfg(test)]
mod tests;
