//! The mouse behind the controller: standard PS/2, with a wheel if asked for in the usual way.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

const BUFFER: usize = 64;
const ACK: u8 = 0xfa;
const ERROR: u8 = 0xfe;

/// The sample rates that, set one after the other, turn on the wheel.
const WHEEL_KNOCK: [u8; 3] = [200, 100, 80];

/// A PS/2 mouse.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mouse {
    queue: VecDeque<u8>,
    /// A command whose parameter is awaited.
    awaits: Option<u8>,
    reporting: bool,
    remote: bool,
    scaling: bool,
    resolution: u8,
    rate: u8,
    recent_rates: [u8; 3],
    wheel: bool,
    buttons: u8,
}

impl Default for Mouse {
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            awaits: None,
            reporting: false,
            remote: false,
            scaling: false,
            resolution: 2,
            rate: 100,
            recent_rates: [0; 3],
            wheel: false,
            buttons: 0,
        }
    }
}

impl Mouse {
    /// Whether bytes wait to be sent to the controller.
    pub fn has_output(&self) -> bool {
        !self.queue.is_empty()
    }

    /// The next byte for the controller.
    pub fn pop(&mut self) -> Option<u8> {
        self.queue.pop_front()
    }

    /// The user moves the mouse (right and up positive) or changes buttons (bit 0 left, 1 right, 2
    /// middle). False if nobody listens or there is no room.
    pub fn report(&mut self, dx: i16, dy: i16, wheel: i8, buttons: u8) -> bool {
        self.buttons = buttons & 7;
        if !self.reporting || self.remote || self.queue.len() + 4 > BUFFER {
            return false;
        }
        self.push_packet(dx, dy, wheel);
        true
    }

    /// A byte from the controller.
    pub fn write(&mut self, byte: u8) {
        if let Some(command) = self.awaits.take() {
            return self.parameter(command, byte);
        }
        match byte {
            0xe6 | 0xe7 => {
                self.scaling = byte == 0xe7;
                self.reply(&[ACK]);
            }
            0xe8 | 0xf3 => {
                self.awaits = Some(byte);
                self.reply(&[ACK]);
            }
            0xe9 => self.reply(&[ACK, self.status(), self.resolution, self.rate]),
            0xea | 0xf0 => {
                self.remote = byte == 0xf0;
                self.reply(&[ACK]);
            }
            0xeb => {
                self.reply(&[ACK]);
                self.push_packet(0, 0, 0);
            }
            0xec => self.reply(&[ACK]),
            0xf2 => self.reply(&[ACK, if self.wheel { 3 } else { 0 }]),
            0xf4 | 0xf5 => {
                self.reporting = byte == 0xf4;
                self.reply(&[ACK]);
            }
            0xf6 => {
                *self = Self { wheel: self.wheel, buttons: self.buttons, ..Self::default() };
                self.reply(&[ACK]);
            }
            0xff => {
                *self = Self { buttons: self.buttons, ..Self::default() };
                self.reply(&[ACK, 0xaa, 0x00]);
            }
            _ => self.reply(&[ERROR]),
        }
    }

    fn parameter(&mut self, command: u8, byte: u8) {
        if command == 0xf3 {
            self.rate = byte;
            self.recent_rates = [self.recent_rates[1], self.recent_rates[2], byte];
            self.wheel |= self.recent_rates == WHEEL_KNOCK;
        } else {
            self.resolution = byte & 3;
        }
        self.reply(&[ACK]);
    }

    fn status(&self) -> u8 {
        // Here the left button is bit 2 and the right one bit 0.
        let swapped = (self.buttons & 1) << 2 | self.buttons >> 1 & 1 | (self.buttons >> 2 & 1) << 1;
        swapped | u8::from(self.scaling) << 4 | u8::from(self.reporting) << 5 | u8::from(self.remote) << 6
    }

    fn push_packet(&mut self, dx: i16, dy: i16, wheel: i8) {
        let (x, y) = (dx.clamp(-256, 255), dy.clamp(-256, 255));
        let signs = u8::from(x < 0) << 4 | u8::from(y < 0) << 5;
        self.reply(&[0x08 | self.buttons | signs, x as u8, y as u8]);
        if self.wheel {
            self.reply(&[wheel.clamp(-8, 7) as u8]);
        }
    }

    fn reply(&mut self, bytes: &[u8]) {
        if self.queue.len() + bytes.len() <= BUFFER {
            self.queue.extend(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(m: &mut Mouse, bytes: &[u8]) -> Vec<u8> {
        for &byte in bytes {
            m.write(byte);
        }
        std::iter::from_fn(|| m.pop()).collect()
    }

    #[test]
    fn commands() {
        let mut m = Mouse::default();
        for (command, expected) in [
            (&[0xffu8][..], &[ACK, 0xaa, 0][..]),
            (&[0xf2], &[ACK, 0]),
            (&[0xe9], &[ACK, 0, 2, 100]),
            (&[0xe8, 3], &[ACK, ACK]),
            (&[0xf3, 40], &[ACK, ACK]),
            (&[0xe9], &[ACK, 0, 3, 40]),
            (&[0xe1], &[ERROR]),
            (&[0xf3, 200, 0xf3, 100, 0xf3, 80, 0xf2], &[ACK, ACK, ACK, ACK, ACK, ACK, ACK, 3]),
        ] {
            assert_eq!(answers(&mut m, command), expected, "{command:x?}");
        }
    }

    #[test]
    fn packets() {
        let mut m = Mouse::default();
        assert!(!m.report(1, 1, 0, 0), "off until enabled");
        assert_eq!(answers(&mut m, &[0xf4]), [ACK]);
        assert!(m.report(-3, 300, 0, 1));
        assert_eq!(answers(&mut m, &[]), [0x19, 0xfd, 0xff]);
        assert_eq!(answers(&mut m, &[0xe9]), [ACK, 0x24, 2, 100]);
        assert!((0..100).any(|_| !m.report(1, 1, 0, 0)), "the buffer is bounded");
    }
}
