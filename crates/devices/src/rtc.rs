//! MC146818.

use crate::{Device, PortDevice};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// MC146818.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rtc {}

impl Rtc {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[0x70, 0x71, 0x72, 0x73];

    /// A clock that shows `unix_seconds` (UTC) at virtual time 0.
    pub fn new(_unix_seconds: i64) -> Self {
        Self {}
    }
    /// Fills the memory-size bytes: RAM bytes below 4 GiB and from 4 GiB up.
    pub fn set_memory_size(&mut self, _below_4g: u64, _above_4g: u64) {}
    /// CMOS byte for firmware and tests.
    pub fn cmos(&self, _index: u8) -> u8 {
        0
    }
    /// Sets a CMOS byte.
    pub fn set_cmos(&mut self, _index: u8, _value: u8) {}
    /// IRQ8 line.
    pub fn irq(&self) -> bool {
        false
    }
    /// Whether port 70h bit 7 masks NMI.
    pub fn nmi_masked(&self) -> bool {
        false
    }
}

impl Device for Rtc {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {}
}

impl PortDevice for Rtc {
    fn port_read(&mut self, _now: VirtualTime, _port: u16, width: AccessWidth) -> u32 {
        width.mask() as u32
    }
    fn port_write(&mut self, _now: VirtualTime, _port: u16, _width: AccessWidth, _value: u32) {}
}
