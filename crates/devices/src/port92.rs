//! System control port A (92h): fast A20 gate and fast reset.

use crate::{Device, PortDevice, regmap};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

const FAST_RESET: u8 = 1 << 0;
const FAST_A20: u8 = 1 << 1;

/// Port 92h. Bit 0 pulses the reset line on its 0-to-1 transition, bit 1 opens the A20 gate. The
/// machine opens A20 if this or the keyboard controller does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Port92 {
    value: u8,
    reset_requested: bool,
}

impl Port92 {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[0x92];

    /// Whether this gate lets A20 through.
    pub fn a20(&self) -> bool {
        self.value & FAST_A20 != 0
    }

    /// Whether the guest asked for a reset since the last call.
    pub fn take_reset_request(&mut self) -> bool {
        std::mem::take(&mut self.reset_requested)
    }
}

impl Device for Port92 {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {
        *self = Self::default();
    }
}

impl PortDevice for Port92 {
    fn port_read(&mut self, _now: VirtualTime, port: u16, width: AccessWidth) -> u32 {
        regmap::read_bytes(port, width, |port| if port == 0x92 { self.value } else { 0xff })
    }
    fn port_write(&mut self, _now: VirtualTime, port: u16, width: AccessWidth, value: u32) {
        regmap::write_bytes(port, width, value, |port, byte| {
            if port == 0x92 {
                self.reset_requested |= byte & !self.value & FAST_RESET != 0;
                self.value = byte & (FAST_RESET | FAST_A20);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a20_and_reset() {
        let mut p = Port92::default();
        let now = VirtualTime(0);
        assert!(!p.a20());
        p.port_write(now, 0x92, AccessWidth::Byte, 2);
        assert!(p.a20());
        assert_eq!(p.port_read(now, 0x92, AccessWidth::Byte), 2);
        assert!(!p.take_reset_request());
        p.port_write(now, 0x92, AccessWidth::Byte, 3);
        assert!(p.take_reset_request());
        p.port_write(now, 0x92, AccessWidth::Byte, 3);
        assert!(!p.take_reset_request(), "only the transition resets");
    }
}
