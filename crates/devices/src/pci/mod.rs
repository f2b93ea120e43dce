//! PCI.

use crate::{Device, PortDevice};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// PCI.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PciBus {}

impl PciBus {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[0xcf8, 0xcfc, 0xcfd, 0xcfe, 0xcff];

    /// A bus with the chipset functions.
    pub fn chipset() -> Self {
        Self {}
    }
    /// Adds a function at `device`.`function`.
    pub fn add(&mut self, _device: u8, _function: u8, _config: PciFunction) {}
    /// The function at `device`.`function`.
    pub fn function(&self, _device: u8, _function: u8) -> Option<&PciFunction> {
        None
    }
    /// The same, to change.
    pub fn function_mut(&mut self, _device: u8, _function: u8) -> Option<&mut PciFunction> {
        None
    }
    /// Whether a BAR or a command register changed since the last call.
    pub fn take_layout_change(&mut self) -> bool {
        false
    }
}

impl Device for PciBus {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {}
}

impl PortDevice for PciBus {
    fn port_read(&mut self, _now: VirtualTime, _port: u16, width: AccessWidth) -> u32 {
        width.mask() as u32
    }
    fn port_write(&mut self, _now: VirtualTime, _port: u16, _width: AccessWidth, _value: u32) {}
}

/// Configuration space of one function.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PciFunction {}
