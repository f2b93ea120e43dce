//! 8254 and port 61h.

use crate::{Device, PortDevice};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// 8254 and port 61h.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pit {}

impl Pit {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[0x40, 0x41, 0x42, 0x43, 0x61];

    /// Output of channel 0, which is IRQ0.
    pub fn irq0(&self) -> bool {
        false
    }
    /// Whether IRQ0 rose since the last call, even if it is low or has been low again meanwhile. On
    /// true lower and raise the line of the interrupt controllers, then set it to [`irq0`](Self::irq0).
    pub fn take_irq0_rise(&mut self) -> bool {
        false
    }
    /// Level of the speaker line.
    pub fn speaker(&self) -> bool {
        false
    }
}

impl Device for Pit {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {}
}

impl PortDevice for Pit {
    fn port_read(&mut self, _now: VirtualTime, _port: u16, width: AccessWidth) -> u32 {
        width.mask() as u32
    }
    fn port_write(&mut self, _now: VirtualTime, _port: u16, _width: AccessWidth, _value: u32) {}
}
