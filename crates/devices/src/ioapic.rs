//! I/O APIC (82093AA with the later EOI register, version 20h).

use crate::interrupt::{DeliveryMode, InterruptMessage};
use crate::{Device, MmioDevice, regmap};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// Usual base address.
pub const DEFAULT_BASE: u64 = 0xfec0_0000;
/// Bytes of the register page.
pub const MMIO_SIZE: u64 = 0x1000;
/// Number of pins.
pub const PINS: usize = 24;

/// Register select, data window and EOI: offsets in the page.
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOIR: u64 = 0x40;

/// Redirection entry fields.
mod entry {
    pub const VECTOR: u64 = 0xff;
    pub const LOGICAL: u64 = 1 << 11;
    pub const REMOTE_IRR: u64 = 1 << 14;
    pub const LEVEL: u64 = 1 << 15;
    pub const MASKED: u64 = 1 << 16;
    pub const WRITABLE: u64 = 0xff00_0000_0001_afff;
    pub const DESTINATION_SHIFT: u32 = 56;
}

/// An I/O APIC. Lines are given as asserted or not, so the polarity bit is stored without effect.
///
/// An edge on a masked pin is lost, as in the data sheet. A level-triggered pin sends when its line is
/// up and remote IRR is clear; EOI by broadcast or by the EOI register clears that; so does a change
/// to edge trigger, which older drivers use for the purpose.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IoApic {
    id: u8,
    select: u8,
    entries: [u64; PINS],
    /// Asserted lines, a bit for each pin.
    lines: u32,
    /// Edges to be sent.
    edges: u32,
}

impl Default for IoApic {
    fn default() -> Self {
        Self::new(0)
    }
}

impl IoApic {
    /// An I/O APIC with this id, all pins masked.
    pub fn new(id: u8) -> Self {
        Self { id: id & 0xf, select: 0, entries: [entry::MASKED; PINS], lines: 0, edges: 0 }
    }

    /// Asserts or releases the line at `pin` (0..24; others are ignored).
    pub fn set_line(&mut self, pin: usize, asserted: bool) {
        if pin >= PINS {
            return;
        }
        let bit = 1 << pin;
        if !asserted {
            self.lines &= !bit;
        } else if self.lines & bit == 0 {
            self.lines |= bit;
            if !self.is_level(pin) && self.entries[pin] & entry::MASKED == 0 {
                self.edges |= bit;
            }
        }
    }

    /// The next message to deliver. Ask until `None` after each change of a line, write and EOI.
    pub fn take_message(&mut self) -> Option<InterruptMessage> {
        self.take_from_pin().map(|(_, message)| message)
    }

    /// As [`take_message`](Self::take_message), with the pin that sends it.
    pub fn take_from_pin(&mut self) -> Option<(usize, InterruptMessage)> {
        loop {
            let pin = (0..PINS).find(|&pin| self.wants_to_send(pin))?;
            if self.is_level(pin) {
                self.entries[pin] |= entry::REMOTE_IRR;
            } else {
                self.edges &= !(1 << pin);
            }
            if let Some(message) = self.message(pin) {
                return Some((pin, message));
            }
        }
    }

    /// The level-triggered messages that were sent and wait for their EOI, with their pins.
    pub fn unfinished(&self) -> impl Iterator<Item = (usize, InterruptMessage)> + '_ {
        let waiting = (0..PINS).filter(|&pin| self.entries[pin] & entry::REMOTE_IRR != 0);
        waiting.filter_map(|pin| Some((pin, self.message(pin)?)))
    }

    /// EOI of a level-triggered vector, broadcast by a local APIC.
    pub fn eoi(&mut self, vector: u8) {
        for value in &mut self.entries {
            if *value & entry::VECTOR == vector.into() {
                *value &= !entry::REMOTE_IRR;
            }
        }
    }

    /// What the pin's entry sends; nothing with a reserved delivery mode.
    fn message(&self, pin: usize) -> Option<InterruptMessage> {
        let value = self.entries[pin];
        let mode = DeliveryMode::of_field((value >> 8) as u32)?;
        let logical = value & entry::LOGICAL != 0;
        Some(InterruptMessage {
            destination: InterruptMessage::destination8((value >> entry::DESTINATION_SHIFT) as u8, logical),
            logical,
            mode,
            vector: value as u8,
            level: self.is_level(pin),
            assert: true,
        })
    }

    /// NMI, INIT and ExtINT are edge-triggered whatever the entry says; the rest goes by it.
    fn is_level(&self, pin: usize) -> bool {
        let value = self.entries[pin];
        value & entry::LEVEL != 0 && !matches!(value >> 8 & 7, 4 | 5 | 7)
    }

    fn wants_to_send(&self, pin: usize) -> bool {
        let value = self.entries[pin];
        if self.is_level(pin) {
            self.lines >> pin & 1 != 0 && value & (entry::MASKED | entry::REMOTE_IRR) == 0
        } else {
            self.edges >> pin & 1 != 0
        }
    }

    fn read_register(&self) -> u32 {
        match self.select {
            0 | 2 => u32::from(self.id) << 24,
            1 => (PINS as u32 - 1) << 16 | 0x20,
            select => match self.entries.get(usize::from(select.wrapping_sub(0x10)) / 2) {
                Some(value) if select & 1 == 0 => *value as u32,
                Some(value) => (value >> 32) as u32,
                None => 0,
            },
        }
    }

    fn write_register(&mut self, value: u32) {
        if self.select == 0 {
            self.id = (value >> 24) as u8 & 0xf;
            return;
        }
        let pin = usize::from(self.select.wrapping_sub(0x10)) / 2;
        let Some(old) = self.entries.get(pin).copied() else { return };
        let merged = if self.select & 1 == 0 {
            old & 0xffff_ffff_0000_0000 | u64::from(value)
        } else {
            old & 0xffff_ffff | u64::from(value) << 32
        };
        let mut new = merged & entry::WRITABLE | old & entry::REMOTE_IRR;
        if new & entry::LEVEL == 0 {
            new &= !entry::REMOTE_IRR;
        }
        self.entries[pin] = new;
        if new & entry::MASKED != 0 || self.is_level(pin) {
            self.edges &= !(1 << pin);
        }
    }
}

impl Device for IoApic {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {
        *self = Self { lines: self.lines, ..Self::new(self.id) };
    }
}

impl MmioDevice for IoApic {
    fn mmio_read(&mut self, _now: VirtualTime, offset: u64, width: AccessWidth) -> u64 {
        let value = match offset & !3 {
            IOREGSEL => self.select.into(),
            IOWIN => self.read_register(),
            _ => 0,
        };
        regmap::extract(value, offset as u32 & 3, width).into()
    }
    fn mmio_write(&mut self, _now: VirtualTime, offset: u64, width: AccessWidth, value: u64) {
        match offset {
            IOREGSEL => self.select = value as u8,
            IOWIN if width == AccessWidth::Dword => self.write_register(value as u32),
            EOIR => self.eoi(value as u8),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::BROADCAST;
    use crate::soak;
    use proptest::prelude::*;

    const NOW: VirtualTime = VirtualTime(0);

    fn write(a: &mut IoApic, register: u8, value: u32) {
        a.mmio_write(NOW, IOREGSEL, AccessWidth::Dword, register.into());
        a.mmio_write(NOW, IOWIN, AccessWidth::Dword, value.into());
    }

    fn read(a: &mut IoApic, register: u8) -> u32 {
        a.mmio_write(NOW, IOREGSEL, AccessWidth::Dword, register.into());
        a.mmio_read(NOW, IOWIN, AccessWidth::Dword) as u32
    }

    fn drain(a: &mut IoApic) -> Vec<u8> {
        std::iter::from_fn(|| a.take_message()).map(|m| m.vector).collect()
    }

    #[test]
    fn identity() {
        let mut a = IoApic::new(2);
        assert_eq!(read(&mut a, 0), 2 << 24);
        assert_eq!(read(&mut a, 1), 0x0017_0020);
        for pin in 0..24 {
            assert_eq!(read(&mut a, 0x10 + 2 * pin), 0x1_0000);
            assert_eq!(read(&mut a, 0x11 + 2 * pin), 0);
        }
        assert_eq!(read(&mut a, 0x40), 0);
        assert_eq!(read(&mut a, 0x0f), 0);
        write(&mut a, 0x10, 0xffff_ffff);
        write(&mut a, 0x11, 0xffff_ffff);
        assert_eq!((read(&mut a, 0x10), read(&mut a, 0x11)), (0x1_afff, 0xff00_0000));
    }

    #[test]
    fn edges() {
        let mut a = IoApic::new(0);
        a.set_line(4, true);
        write(&mut a, 0x18, 0x31);
        assert!(drain(&mut a).is_empty(), "an edge on a masked pin is lost");
        a.set_line(4, false);
        a.set_line(4, true);
        a.set_line(4, true);
        assert_eq!(drain(&mut a), [0x31]);
        a.set_line(4, false);
        assert!(drain(&mut a).is_empty());
    }

    #[test]
    fn levels_wait_for_eoi() {
        for by_register in [false, true] {
            let mut a = IoApic::new(0);
            a.set_line(9, true);
            write(&mut a, 0x22, 0x8000 | 0x41);
            assert_eq!(drain(&mut a), [0x41], "unmasking shows the level");
            assert_eq!(read(&mut a, 0x22), 0xc041);
            a.eoi(0x40);
            assert!(drain(&mut a).is_empty());
            let eoi = |a: &mut IoApic| match by_register {
                true => a.mmio_write(NOW, EOIR, AccessWidth::Dword, 0x41),
                false => a.eoi(0x41),
            };
            eoi(&mut a);
            assert_eq!(drain(&mut a), [0x41], "still asserted");
            a.set_line(9, false);
            eoi(&mut a);
            assert!(drain(&mut a).is_empty());
            a.set_line(9, true);
            drain(&mut a);
            write(&mut a, 0x22, 0x1_0041);
            assert_eq!(read(&mut a, 0x22), 0x1_0041, "edge trigger clears remote IRR");
        }
    }

    #[test]
    fn message_fields() {
        for (low, high, expected) in [
            (0x0931u32, 0x0c00_0000u32, (0x0c, true, DeliveryMode::LowestPriority, false)),
            (0x0031, 0xff00_0000, (BROADCAST, false, DeliveryMode::Fixed, false)),
            (0x8831, 0xff00_0000, (0xff, true, DeliveryMode::Fixed, true)),
            (0x8431, 0x0100_0000, (1, false, DeliveryMode::Nmi, false)),
            (0x0731, 0x0100_0000, (1, false, DeliveryMode::ExtInt, false)),
        ] {
            let mut a = IoApic::new(0);
            write(&mut a, 0x15, high);
            write(&mut a, 0x14, low);
            a.set_line(2, true);
            let m = a.take_message().unwrap();
            assert_eq!((m.destination, m.logical, m.mode, m.level), expected);
            assert_eq!(a.take_message(), None);
        }
        let mut a = IoApic::new(0);
        write(&mut a, 0x14, 0x8831);
        a.set_line(2, true);
        assert_eq!(a.unfinished().count(), 0);
        let sent = a.take_from_pin().unwrap();
        assert_eq!((sent.0, a.unfinished().collect::<Vec<_>>()), (2, vec![sent]));
        a.eoi(0x31);
        assert_eq!(a.unfinished().count(), 0);
        let mut a = IoApic::new(0);
        write(&mut a, 0x14, 0x331);
        a.set_line(2, true);
        assert_eq!(a.take_message(), None, "reserved delivery mode");
    }

    proptest! {
        #[test]
        fn survives_anything(steps in soak::steps()) {
            let mut a = IoApic::new(1);
            for pin in 0..24 {
                write(&mut a, 0x10 + 2 * pin, (0x30 + u32::from(pin)) | if pin > 15 { 0x8000 } else { 0 });
            }
            soak::mmio(a, &[IOREGSEL, IOWIN, IOWIN, EOIR], &steps, |a, now| {
                a.set_line((now.0 % 30) as usize, now.0 & 0x40 != 0);
                let mut sent = 0;
                while a.take_message().is_some() {
                    sent += 1;
                    assert!(sent <= PINS, "a pin sends once");
                }
            });
        }
    }
}
