//! The test device that ends the machine by a port write (as isa-debug-exit elsewhere).

use crate::{Device, PortDevice};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// Usual port.
pub const DEFAULT_PORT: u16 = 0xf4;

/// A write of any width to its four ports asks the machine to exit with the value written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DebugExit {
    port: u16,
    requested: Option<u32>,
}

impl DebugExit {
    /// Ports the device answers at when made with [`DEFAULT_PORT`].
    pub const PORTS: &'static [u16] = &[0xf4, 0xf5, 0xf6, 0xf7];

    /// A device at `port` and the three after it.
    pub fn new(port: u16) -> Self {
        Self { port, requested: None }
    }

    /// The first value written since the last call.
    pub fn take_exit(&mut self) -> Option<u32> {
        self.requested.take()
    }
}

impl Default for DebugExit {
    fn default() -> Self {
        Self::new(DEFAULT_PORT)
    }
}

impl Device for DebugExit {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {
        self.requested = None;
    }
}

impl PortDevice for DebugExit {
    fn port_read(&mut self, _now: VirtualTime, _port: u16, _width: AccessWidth) -> u32 {
        0
    }
    fn port_write(&mut self, _now: VirtualTime, port: u16, width: AccessWidth, value: u32) {
        if port.wrapping_sub(self.port) < 4 {
            self.requested.get_or_insert(value & width.mask() as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_write_of_each_width_counts() {
        for (width, expected) in
            [(AccessWidth::Byte, 0x44), (AccessWidth::Word, 0x3344), (AccessWidth::Dword, 0x1122_3344)]
        {
            let mut d = DebugExit::default();
            d.port_write(VirtualTime(0), 0xf4, width, 0x1122_3344);
            d.port_write(VirtualTime(0), 0xf4, width, 1);
            assert_eq!(d.take_exit(), Some(expected));
            assert_eq!(d.take_exit(), None);
        }
    }
}
