//! Splitting of accesses: the one place where a wide access to an 8-bit device becomes byte accesses.

use umbra_arch::AccessWidth;

/// Reads `width` bytes from an 8-bit device, lowest port first, as a bus with 8-bit devices does.
pub fn read_bytes(port: u16, width: AccessWidth, mut read: impl FnMut(u16) -> u8) -> u32 {
    let mut value = 0;
    for i in 0..width.bytes().min(4) as u16 {
        value |= u32::from(read(port.wrapping_add(i))) << (8 * i);
    }
    value
}

/// Writes `width` bytes to an 8-bit device, lowest port first.
pub fn write_bytes(port: u16, width: AccessWidth, value: u32, mut write: impl FnMut(u16, u8)) {
    for i in 0..width.bytes().min(4) as u16 {
        write(port.wrapping_add(i), (value >> (8 * i)) as u8);
    }
}

/// The part of a 32-bit register that an access at `byte` (0..4) within it sees.
pub const fn extract(register: u32, byte: u32, width: AccessWidth) -> u32 {
    (register >> (8 * (byte & 3))) & width.mask() as u32
}

/// The bits of a 32-bit register that an access at `byte` (0..4) within it covers.
pub const fn lane_mask(byte: u32, width: AccessWidth) -> u32 {
    (width.mask() as u32) << (8 * (byte & 3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_accesses_become_bytes_in_order() {
        let mut seen = Vec::new();
        let value = read_bytes(0x3f8, AccessWidth::Dword, |port| {
            seen.push(port);
            port as u8
        });
        assert_eq!(seen, [0x3f8, 0x3f9, 0x3fa, 0x3fb]);
        assert_eq!(value, 0xfbfa_f9f8);
        let mut seen = Vec::new();
        write_bytes(0xffff, AccessWidth::Word, 0x1234, |port, byte| seen.push((port, byte)));
        assert_eq!(seen, [(0xffff, 0x34), (0, 0x12)]);
    }

    #[test]
    fn lanes() {
        assert_eq!(extract(0x1234_5678, 1, AccessWidth::Word), 0x3456);
        assert_eq!(extract(0x1234_5678, 3, AccessWidth::Byte), 0x12);
        assert_eq!(lane_mask(2, AccessWidth::Word), 0xffff_0000);
        assert_eq!(lane_mask(3, AccessWidth::Dword), 0xff00_0000);
    }
}
