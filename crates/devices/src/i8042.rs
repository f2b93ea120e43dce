//! Keyboard controller.

use crate::{Device, PortDevice};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// Keyboard controller.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct I8042 {}

impl I8042 {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[0x60, 0x64];

    /// Keyboard interrupt.
    pub fn irq1(&self) -> bool {
        false
    }
    /// Mouse interrupt.
    pub fn irq12(&self) -> bool {
        false
    }
    /// Whether this gate lets A20 through.
    pub fn a20(&self) -> bool {
        true
    }
    /// Whether the guest asked for a reset since the last call.
    pub fn take_reset_request(&mut self) -> bool {
        false
    }
    /// The user makes the keyboard send these bytes (scan code set 2); false if there is no room.
    pub fn receive_keys(&mut self, _codes: &[u8]) -> bool {
        false
    }
}

impl Device for I8042 {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {}
}

impl PortDevice for I8042 {
    fn port_read(&mut self, _now: VirtualTime, _port: u16, width: AccessWidth) -> u32 {
        width.mask() as u32
    }
    fn port_write(&mut self, _now: VirtualTime, _port: u16, _width: AccessWidth, _value: u32) {}
}
