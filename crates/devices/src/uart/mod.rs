//! 16550A serial ports of a PC: the register machine in [`core`], at a block of eight ports.

pub mod core;

use self::core::Uart16550;
use crate::{Device, PortDevice, regmap};
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;
use umbra_arch::{AccessWidth, VirtualTime};

/// First port of the first serial port, which uses IRQ 4.
pub const COM1_BASE: u16 = 0x3f8;
/// ISA interrupt of the first serial port.
pub const COM1_IRQ: u8 = 4;
/// First port of the second serial port.
pub const COM2_BASE: u16 = 0x2f8;
/// ISA interrupt of the second serial port.
pub const COM2_IRQ: u8 = 3;

/// A 16550A at eight ports.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Uart {
    base: u16,
    registers: Uart16550,
}

impl Uart {
    /// A serial port at `base` and the seven ports after it.
    pub fn new(base: u16) -> Self {
        Self { base, registers: Uart16550::default() }
    }

    /// Ports the device answers at.
    pub fn ports(&self) -> RangeInclusive<u16> {
        self.base..=self.base.saturating_add(7)
    }

    /// Level of the interrupt line.
    pub fn irq(&self) -> bool {
        self.registers.irq()
    }

    /// Bytes sent since the last call; ask after each write, so that the buffer stays small.
    pub fn take_output(&mut self) -> Vec<u8> {
        self.registers.take_output()
    }

    /// Whether the receiver has room for a byte. Keep the byte and ask again later if not.
    pub fn can_receive(&self) -> bool {
        self.registers.can_receive()
    }

    /// A byte arrives on the line at `now`.
    pub fn receive(&mut self, now: VirtualTime, byte: u8) {
        self.registers.advance(now);
        self.registers.receive(now, byte);
    }
}

impl Device for Uart {
    fn advance(&mut self, now: VirtualTime) {
        self.registers.advance(now);
    }
    fn next_event(&self) -> Option<VirtualTime> {
        self.registers.next_event()
    }
    fn reset(&mut self) {
        let output = self.registers.take_output();
        self.registers = Uart16550::with_output(output);
    }
}

impl PortDevice for Uart {
    fn port_read(&mut self, now: VirtualTime, port: u16, width: AccessWidth) -> u32 {
        self.registers.advance(now);
        regmap::read_bytes(port, width, |port| match port.wrapping_sub(self.base) {
            offset @ 0..8 => self.registers.read(now, offset),
            _ => 0xff,
        })
    }
    fn port_write(&mut self, now: VirtualTime, port: u16, width: AccessWidth, value: u32) {
        self.registers.advance(now);
        regmap::write_bytes(port, width, value, |port, byte| {
            if let offset @ 0..8 = port.wrapping_sub(self.base) {
                self.registers.write(now, offset, byte);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soak;
    use proptest::prelude::*;

    #[test]
    fn wide_accesses_reach_neighbouring_registers() {
        let mut u = Uart::new(COM1_BASE);
        let now = VirtualTime(0);
        u.port_write(now, COM1_BASE + 3, AccessWidth::Word, 0x0b03);
        assert_eq!(u.port_read(now, COM1_BASE + 3, AccessWidth::Word), 0x0b03);
        assert_eq!(u.port_read(now, COM1_BASE + 7, AccessWidth::Word), 0xff00);
    }

    #[test]
    fn reset_keeps_what_was_sent() {
        let mut u = Uart::new(COM1_BASE);
        u.port_write(VirtualTime(0), COM1_BASE, AccessWidth::Byte, 0x41);
        u.reset();
        assert_eq!(u.take_output(), b"A");
        assert_eq!(u, Uart::new(COM1_BASE));
    }

    proptest! {
        #[test]
        fn survives_anything(steps in soak::steps()) {
            let ports: Vec<u16> = Uart::new(COM1_BASE).ports().collect();
            soak::ports(Uart::new(COM1_BASE), &ports, &steps, |u, now| {
                if u.can_receive() && now.0.is_multiple_of(3) {
                    u.receive(now, now.0 as u8);
                }
            });
        }
    }
}
