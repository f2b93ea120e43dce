//! Reset control register (CF9h) of the PIIX.

use crate::{Device, PortDevice};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

const SYSTEM_RESET: u8 = 1 << 1;
const RESET_CPU: u8 = 1 << 2;

/// Port CF9h, byte accesses only: wider ones at CF8h belong to PCI configuration. The reset happens
/// when bit 2 goes from 0 to 1; bit 1 says whether it is a hard one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ResetControl {
    value: u8,
    reset_requested: bool,
}

impl ResetControl {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[0xcf9];

    /// Whether the guest asked for a reset since the last call.
    pub fn take_reset_request(&mut self) -> bool {
        std::mem::take(&mut self.reset_requested)
    }
}

impl Device for ResetControl {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {
        *self = Self::default();
    }
}

impl PortDevice for ResetControl {
    fn port_read(&mut self, _now: VirtualTime, port: u16, width: AccessWidth) -> u32 {
        match (port, width) {
            (0xcf9, AccessWidth::Byte) => self.value.into(),
            _ => width.mask() as u32,
        }
    }
    fn port_write(&mut self, _now: VirtualTime, port: u16, width: AccessWidth, value: u32) {
        if (port, width) == (0xcf9, AccessWidth::Byte) {
            let value = value as u8;
            self.reset_requested |= value & !self.value & RESET_CPU != 0;
            self.value = value & (SYSTEM_RESET | RESET_CPU);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reset_on_transition_of_bit_2() {
        let now = VirtualTime(0);
        for (sequence, expected) in
            [(&[2u32, 6][..], true), (&[2], false), (&[4], true), (&[0xe], true), (&[2, 0], false)]
        {
            let mut r = ResetControl::default();
            for &v in sequence {
                r.port_write(now, 0xcf9, AccessWidth::Byte, v);
            }
            assert_eq!(r.take_reset_request(), expected, "{sequence:x?}");
            assert!(!r.take_reset_request());
        }
        let mut r = ResetControl::default();
        r.port_write(now, 0xcf9, AccessWidth::Word, 6);
        assert!(!r.take_reset_request());
    }
}
