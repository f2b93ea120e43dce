//! The one-way debug console at port E9h.

use crate::{Device, PortDevice, regmap};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// Bytes written to port E9h are collected; it reads as E9h, which tells guests that it is there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DebugConsole {
    output: Vec<u8>,
}

impl DebugConsole {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[0xe9];

    /// Bytes written since the last call. The machine asks after every write, so the buffer stays small.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }
}

impl Device for DebugConsole {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {}
}

impl PortDevice for DebugConsole {
    fn port_read(&mut self, _now: VirtualTime, port: u16, width: AccessWidth) -> u32 {
        regmap::read_bytes(port, width, |port| if port == 0xe9 { 0xe9 } else { 0xff })
    }
    fn port_write(&mut self, _now: VirtualTime, port: u16, width: AccessWidth, value: u32) {
        regmap::write_bytes(port, width, value, |port, byte| {
            if port == 0xe9 {
                self.output.push(byte);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn collects_bytes() {
        let mut d = DebugConsole::default();
        assert_eq!(d.port_read(VirtualTime(0), 0xe9, AccessWidth::Byte), 0xe9);
        for byte in b"ok\n" {
            d.port_write(VirtualTime(0), 0xe9, AccessWidth::Byte, (*byte).into());
        }
        assert_eq!(d.take_output(), b"ok\n");
        assert!(d.take_output().is_empty());
    }
}
