//! 256 bytes of registers, addressed by a `u8`.

use serde::{Deserialize, Serialize};

/// A byte for each index, so that no index is out of range, neither a guest's nor a save file's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByteFile([[u8; 16]; 16]);

impl ByteFile {
    /// The byte at `index`.
    pub fn get(&self, index: u8) -> u8 {
        self.0[usize::from(index >> 4)][usize::from(index & 15)]
    }

    /// Sets the byte at `index`.
    pub fn set(&mut self, index: u8, value: u8) {
        self.0[usize::from(index >> 4)][usize::from(index & 15)] = value;
    }

    /// Two bytes from `index` on, little-endian, wrapping at the end.
    pub fn word(&self, index: u8) -> u16 {
        self.dword(index) as u16
    }

    /// Four bytes from `index` on, little-endian, wrapping at the end.
    pub fn dword(&self, index: u8) -> u32 {
        u32::from_le_bytes([0, 1, 2, 3].map(|i| self.get(index.wrapping_add(i))))
    }

    /// Sets four bytes from `index` on, little-endian, wrapping at the end.
    pub fn set_dword(&mut self, index: u8, value: u32) {
        for (i, byte) in (0..).zip(value.to_le_bytes()) {
            self.set(index.wrapping_add(i), byte);
        }
    }
}
