//! The header that all tables but RSDP and FACS share ("System Description Table Header").

/// Who made the machine.
pub(super) const OEM_ID: &[u8; 6] = b"UMBRA ";
const OEM_TABLE_ID: &[u8; 8] = b"UMBRAPC ";
const CREATOR: &[u8; 4] = b"UMBR";

/// The byte that makes the sum of all bytes, itself included, zero.
pub(super) fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

/// A table being written.
pub(super) struct Table {
    bytes: Vec<u8>,
}

impl Table {
    pub(super) fn new(signature: &[u8; 4], revision: u8) -> Self {
        let mut table = Self { bytes: Vec::new() };
        table.raw(signature);
        table.u32(0);
        table.u8(revision);
        table.u8(0);
        table.raw(OEM_ID);
        table.raw(OEM_TABLE_ID);
        table.u32(1);
        table.raw(CREATOR);
        table.u32(1);
        table
    }
    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }
    pub(super) fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }
    pub(super) fn u16(&mut self, value: u16) {
        self.raw(&value.to_le_bytes());
    }
    pub(super) fn u32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }
    pub(super) fn u64(&mut self, value: u64) {
        self.raw(&value.to_le_bytes());
    }
    /// Bytes written so far: the next field's offset.
    pub(super) fn offset(&self) -> usize {
        self.bytes.len()
    }
    /// Fills in length and checksum.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let len = self.bytes.len() as u32;
        self.bytes[4..8].copy_from_slice(&len.to_le_bytes());
        self.bytes[9] = checksum(&self.bytes);
        self.bytes
    }
}
