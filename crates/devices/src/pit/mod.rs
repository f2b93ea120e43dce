//! The 8254 interval timer and system control port B (61h), which gates its third counter.

mod channel;

use self::channel::Channel;
use crate::{Device, PortDevice, regmap};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// Input clock in hertz.
pub const PIT_HZ: u64 = 1_193_182;
/// Input clock ticks between two toggles of the refresh bit (about 15 microseconds).
const REFRESH_TICKS: u64 = 18;

/// Port 61h bits.
mod port_b {
    pub const GATE_2: u8 = 1 << 0;
    pub const SPEAKER: u8 = 1 << 1;
    pub const WRITABLE: u8 = 0x0f;
    pub const REFRESH: u8 = 1 << 4;
    pub const OUTPUT_2: u8 = 1 << 5;
}

/// Counter 0 (IRQ 0), 1 (memory refresh once) and 2 (speaker) at 40h to 43h, and port 61h.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pit {
    channels: [Channel; 3],
    port_b: u8,
}

impl Default for Pit {
    fn default() -> Self {
        Self { channels: [Channel::new(true), Channel::new(true), Channel::new(false)], port_b: 0 }
    }
}

impl Pit {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[0x40, 0x41, 0x42, 0x43, 0x61];

    /// Output of counter 0, which is IRQ 0.
    pub fn irq0(&self) -> bool {
        self.channels[0].output()
    }

    /// Whether IRQ 0 rose since the last call, even if it has been low again since: the low pulse of
    /// mode 2 is shorter than some instructions. On true lower and raise the line at the interrupt
    /// controllers before setting it to [`irq0`](Self::irq0).
    pub fn take_irq0_rise(&mut self) -> bool {
        self.channels[0].take_rise()
    }

    /// Level of the speaker line.
    pub fn speaker(&self) -> bool {
        self.port_b & port_b::SPEAKER != 0 && self.channels[2].output()
    }

    fn read(&mut self, now: VirtualTime, port: u16) -> u8 {
        match port {
            0x40..=0x42 => self.channels[usize::from(port - 0x40)].read(),
            0x61 => self.read_port_b(now),
            _ => 0xff,
        }
    }

    fn write(&mut self, port: u16, value: u8) {
        match port {
            0x40..=0x42 => self.channels[usize::from(port - 0x40)].write(value),
            0x43 => self.write_control(value),
            0x61 => {
                self.port_b = value & port_b::WRITABLE;
                self.channels[2].set_gate(value & port_b::GATE_2 != 0);
            }
            _ => {}
        }
    }

    fn read_port_b(&self, now: VirtualTime) -> u8 {
        let refresh = (now.ticks(PIT_HZ) / REFRESH_TICKS) & 1 != 0;
        self.port_b
            | if refresh { port_b::REFRESH } else { 0 }
            | if self.channels[2].output() { port_b::OUTPUT_2 } else { 0 }
    }

    fn write_control(&mut self, value: u8) {
        match (value >> 6, value >> 4 & 3) {
            (3, _) => self.read_back(value),
            (n, 0) => self.channels[usize::from(n)].latch_count(),
            (n, _) => self.channels[usize::from(n)].set_mode(value),
        }
    }

    fn read_back(&mut self, value: u8) {
        for (n, channel) in self.channels.iter_mut().enumerate() {
            if value & 2 << n == 0 {
                continue;
            }
            if value & 0x20 == 0 {
                channel.latch_count();
            }
            if value & 0x10 == 0 {
                channel.latch_status();
            }
        }
    }
}

impl Device for Pit {
    fn advance(&mut self, now: VirtualTime) {
        let tick = now.ticks(PIT_HZ);
        for channel in &mut self.channels {
            channel.advance(tick);
        }
    }
    fn next_event(&self) -> Option<VirtualTime> {
        self.channels[0].next_change().map(|tick| VirtualTime::of_ticks(tick, PIT_HZ))
    }
    fn reset(&mut self) {
        let fresh = Self::default();
        for (channel, fresh) in self.channels.iter_mut().zip(fresh.channels) {
            channel.reset_to(fresh);
        }
        self.port_b = fresh.port_b;
    }
}

impl PortDevice for Pit {
    fn port_read(&mut self, now: VirtualTime, port: u16, width: AccessWidth) -> u32 {
        self.advance(now);
        regmap::read_bytes(port, width, |port| self.read(now, port))
    }
    fn port_write(&mut self, now: VirtualTime, port: u16, width: AccessWidth, value: u32) {
        self.advance(now);
        regmap::write_bytes(port, width, value, |port, byte| self.write(port, byte));
    }
}

#[cfg(test)]
mod tests;
