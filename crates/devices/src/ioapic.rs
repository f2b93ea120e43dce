//! I/O APIC.

use crate::{Device, InterruptMessage, MmioDevice};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// Usual base address.
pub const DEFAULT_BASE: u64 = 0xfec0_0000;
/// Number of pins.
pub const PINS: usize = 24;

/// I/O APIC.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct IoApic {}

impl IoApic {
    /// An I/O APIC with this id.
    pub fn new(_id: u8) -> Self {
        Self {}
    }
    /// Sets input line `pin` (0..24; others are ignored).
    pub fn set_line(&mut self, _pin: usize, _level: bool) {}
    /// The next message to deliver; ask until `None` after each change of a line, write or EOI.
    pub fn take_message(&mut self) -> Option<InterruptMessage> {
        None
    }
    /// EOI broadcast of a local APIC.
    pub fn eoi(&mut self, _vector: u8) {}
}

impl Device for IoApic {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {}
}

impl MmioDevice for IoApic {
    fn mmio_read(&mut self, _now: VirtualTime, _offset: u64, _width: AccessWidth) -> u64 {
        0
    }
    fn mmio_write(&mut self, _now: VirtualTime, _offset: u64, _width: AccessWidth, _value: u64) {}
}
