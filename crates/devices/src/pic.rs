//! Two 8259A.

use crate::{Device, PortDevice};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// Two 8259A.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PicPair {}

impl PicPair {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1];

    /// Sets input line `n` (0..16).
    pub fn set_line(&mut self, _n: u8, _level: bool) {}
    /// The master INTR output.
    pub fn intr(&self) -> bool {
        false
    }
    /// Interrupt acknowledge cycle: the vector.
    pub fn acknowledge(&mut self) -> u8 {
        0
    }
}

impl Device for PicPair {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {}
}

impl PortDevice for PicPair {
    fn port_read(&mut self, _now: VirtualTime, _port: u16, width: AccessWidth) -> u32 {
        width.mask() as u32
    }
    fn port_write(&mut self, _now: VirtualTime, _port: u16, _width: AccessWidth, _value: u32) {}
}
