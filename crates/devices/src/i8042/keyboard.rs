//! The keyboard behind the controller: it speaks scan code set 2, as the controller expects.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Bytes the keyboard's own buffer holds.
const BUFFER: usize = 16;
/// Replies may go beyond the key buffer by this much before further commands stay unanswered.
const REPLY_ROOM: usize = 16;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;

/// A two-byte command whose second byte is awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Awaits {
    Ignored,
    ScanCodeSet,
}

/// A PS/2 keyboard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Keyboard {
    queue: VecDeque<u8>,
    awaits: Option<Awaits>,
    scanning: bool,
    set: u8,
    last: u8,
}

impl Default for Keyboard {
    fn default() -> Self {
        Self { queue: VecDeque::new(), awaits: None, scanning: true, set: 2, last: 0 }
    }
}

impl Keyboard {
    /// Whether bytes wait to be sent to the controller.
    pub fn has_output(&self) -> bool {
        !self.queue.is_empty()
    }

    /// The next byte for the controller.
    pub fn pop(&mut self) -> Option<u8> {
        let byte = self.queue.pop_front()?;
        self.last = byte;
        Some(byte)
    }

    /// The user presses or releases keys: whole scan code sequences of set 2, all or nothing.
    pub fn type_codes(&mut self, codes: &[u8]) -> bool {
        let fits = self.scanning && self.queue.len() + codes.len() <= BUFFER;
        if fits {
            self.queue.extend(codes);
        }
        fits
    }

    /// A byte from the controller.
    pub fn write(&mut self, byte: u8) {
        if let Some(awaited) = self.awaits.take() {
            return self.parameter(awaited, byte);
        }
        match byte {
            0xed | 0xf3 | 0xfb..=0xfd => self.await_parameter(Awaits::Ignored),
            0xf0 => self.await_parameter(Awaits::ScanCodeSet),
            0xee => self.reply(&[0xee]),
            0xf2 => self.reply(&[ACK, 0xab, 0x83]),
            0xf4 => {
                self.queue.clear();
                self.scanning = true;
                self.reply(&[ACK]);
            }
            0xf5 | 0xf6 => {
                *self = Self { scanning: byte == 0xf6, ..Self::default() };
                self.reply(&[ACK]);
            }
            0xf7..=0xfa => self.reply(&[ACK]),
            0xfe => self.reply(&[self.last]),
            0xff => {
                *self = Self::default();
                self.reply(&[ACK, SELF_TEST_PASSED]);
            }
            _ => self.reply(&[RESEND]),
        }
    }

    fn await_parameter(&mut self, awaits: Awaits) {
        self.awaits = Some(awaits);
        self.reply(&[ACK]);
    }

    fn parameter(&mut self, awaited: Awaits, byte: u8) {
        match (awaited, byte) {
            (Awaits::ScanCodeSet, 0) => self.reply(&[ACK, self.set]),
            (Awaits::ScanCodeSet, 1..=3) => {
                self.set = byte;
                self.reply(&[ACK]);
            }
            (Awaits::ScanCodeSet, _) => self.reply(&[RESEND]),
            (Awaits::Ignored, _) => self.reply(&[ACK]),
        }
    }

    fn reply(&mut self, bytes: &[u8]) {
        if self.queue.len() + bytes.len() <= BUFFER + REPLY_ROOM {
            self.queue.extend(bytes);
        }
    }
}

/// The controller's translation of scan code set 2 to set 1.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Translator {
    /// The break prefix F0h was seen; it becomes bit 7 of the next code.
    released: bool,
}

impl Translator {
    /// The byte the host sees, or `None` for the prefix that is merged with the next one.
    pub fn translate(&mut self, byte: u8) -> Option<u8> {
        if byte == 0xf0 {
            self.released = true;
            return None;
        }
        let code = match byte {
            0..0x80 => SET_1[usize::from(byte)],
            0x83 => 0x41,
            0x84 => 0x54,
            other => other,
        };
        Some(code | if std::mem::take(&mut self.released) { 0x80 } else { 0 })
    }
}

#[rustfmt::skip]
const SET_1: [u8; 128] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59,
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b,
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d,
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f,
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61,
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76,
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f,
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
];

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(k: &mut Keyboard, bytes: &[u8]) -> Vec<u8> {
        for &byte in bytes {
            k.write(byte);
        }
        std::iter::from_fn(|| k.pop()).collect()
    }

    #[test]
    fn commands() {
        let mut k = Keyboard::default();
        for (command, expected) in [
            (&[0xffu8][..], &[ACK, 0xaa][..]),
            (&[0xf2], &[ACK, 0xab, 0x83]),
            (&[0xee], &[0xee]),
            (&[0xed, 7], &[ACK, ACK]),
            (&[0xf3, 0], &[ACK, ACK]),
            (&[0xf0, 0], &[ACK, ACK, 2]),
            (&[0xf0, 9], &[ACK, RESEND]),
            (&[0xf4], &[ACK]),
            (&[0x12], &[RESEND]),
        ] {
            assert_eq!(answers(&mut k, command), expected, "{command:x?}");
        }
        assert!(k.type_codes(&[0x1c, 0xf0, 0x1c]));
        assert_eq!(answers(&mut k, &[]), [0x1c, 0xf0, 0x1c]);
        answers(&mut k, &[0xf5]);
        assert!(!k.type_codes(&[0x1c]), "scanning is off");
        answers(&mut k, &[0xf4]);
        assert!(!k.type_codes(&[0; 17]));
    }

    #[test]
    fn translation() {
        let mut t = Translator::default();
        let out: Vec<u8> = [0x1c, 0xf0, 0x1c, 0xe0, 0x75, 0xe0, 0xf0, 0x75, 0xfa, 0xab, 0x83]
            .into_iter()
            .filter_map(|byte| t.translate(byte))
            .collect();
        assert_eq!(out, [0x1e, 0x9e, 0xe0, 0x48, 0xe0, 0xc8, 0xfa, 0xab, 0x41]);
        let mut codes: Vec<u8> = SET_1.to_vec();
        codes.sort();
        codes.dedup();
        assert_eq!(codes.len(), 128, "the translation is one-to-one");
    }
}
