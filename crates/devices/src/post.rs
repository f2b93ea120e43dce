//! The power-on self-test code port (80h) and its neighbours that guests write for delay.

use crate::{Device, PortDevice, regmap};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// Port 80h: keeps the last code.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PostPort {
    code: u8,
}

impl PostPort {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[0x80];

    /// The code written last.
    pub fn code(&self) -> u8 {
        self.code
    }
}

impl Device for PostPort {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {
        self.code = 0;
    }
}

impl PortDevice for PostPort {
    fn port_read(&mut self, _now: VirtualTime, port: u16, width: AccessWidth) -> u32 {
        regmap::read_bytes(port, width, |port| if port == 0x80 { self.code } else { 0xff })
    }
    fn port_write(&mut self, _now: VirtualTime, port: u16, width: AccessWidth, value: u32) {
        regmap::write_bytes(port, width, value, |port, byte| {
            if port == 0x80 {
                self.code = byte;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_last_code() {
        let mut p = PostPort::default();
        p.port_write(VirtualTime(0), 0x80, AccessWidth::Word, 0xff55);
        assert_eq!(p.code(), 0x55);
        assert_eq!(p.port_read(VirtualTime(0), 0x80, AccessWidth::Word), 0xff55);
    }
}
