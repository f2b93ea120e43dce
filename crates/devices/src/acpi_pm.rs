//! ACPI PM.

use crate::{Device, PortDevice};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// ACPI PM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AcpiPm {}

impl AcpiPm {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[];

    /// SCI level.
    pub fn sci(&self) -> bool {
        false
    }
    /// What the guest asked for since the last call.
    pub fn take_request(&mut self) -> Option<PowerRequest> {
        None
    }
    /// The user presses the power button.
    pub fn press_power_button(&mut self, _now: VirtualTime) {}
}

impl Device for AcpiPm {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {}
}

impl PortDevice for AcpiPm {
    fn port_read(&mut self, _now: VirtualTime, _port: u16, width: AccessWidth) -> u32 {
        width.mask() as u32
    }
    fn port_write(&mut self, _now: VirtualTime, _port: u16, _width: AccessWidth, _value: u32) {}
}

/// First port of the power-management block.
pub const PM_BASE: u16 = 0x600;
/// PM1a event block, 4 bytes.
pub const PM1A_EVT_BLK: u16 = PM_BASE;
/// PM1a control block, 2 bytes.
pub const PM1A_CNT_BLK: u16 = PM_BASE + 4;
/// PM timer block, 4 bytes.
pub const PM_TMR_BLK: u16 = PM_BASE + 8;
/// General-purpose event block 0, 4 bytes.
pub const GPE0_BLK: u16 = PM_BASE + 0xc;
/// SMI command port.
pub const SMI_CMD: u16 = 0xb2;
/// Written to [`SMI_CMD`]: hand over to ACPI.
pub const ACPI_ENABLE: u8 = 0xf1;
/// Written to [`SMI_CMD`]: back to legacy mode.
pub const ACPI_DISABLE: u8 = 0xf0;
/// SLP_TYP of S5 in the DSDT's `_S5`.
pub const S5_SLP_TYP: u8 = 0;

/// What the guest asks of the machine through SLP_EN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PowerRequest {
    /// S5.
    PowerOff,
    /// Another SLP_TYP.
    Sleep(u8),
}
