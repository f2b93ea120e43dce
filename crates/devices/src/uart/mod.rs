//! 16550A serial port.

use crate::{Device, PortDevice};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// 16550A serial port.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Uart {}

impl Uart {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[];

    /// A port at `base` (3F8h for the first).
    pub fn new(_base: u16) -> Self {
        Self {}
    }
    /// Interrupt line.
    pub fn irq(&self) -> bool {
        false
    }
    /// Bytes sent since the last call.
    pub fn take_output(&mut self) -> Vec<u8> {
        Vec::new()
    }
    /// Whether the receiver has room for a byte.
    pub fn can_receive(&self) -> bool {
        false
    }
    /// A byte arrives on the line at `now`.
    pub fn receive(&mut self, _now: VirtualTime, _byte: u8) {}
}

impl Device for Uart {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {}
}

impl PortDevice for Uart {
    fn port_read(&mut self, _now: VirtualTime, _port: u16, width: AccessWidth) -> u32 {
        width.mask() as u32
    }
    fn port_write(&mut self, _now: VirtualTime, _port: u16, _width: AccessWidth, _value: u32) {}
}
