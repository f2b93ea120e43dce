//! Little-endian fields of hostile images: every read is checked.

/// Reads `N` bytes at `offset`.
pub(super) fn array<const N: usize>(image: &[u8], offset: u64) -> Option<[u8; N]> {
    let start = usize::try_from(offset).ok()?;
    image.get(start..start.checked_add(N)?)?.try_into().ok()
}

/// The byte at `offset`.
pub(super) fn u8_at(image: &[u8], offset: u64) -> Option<u8> {
    array::<1>(image, offset).map(|[byte]| byte)
}

/// The 16-bit field at `offset`.
pub(super) fn u16_at(image: &[u8], offset: u64) -> Option<u16> {
    array(image, offset).map(u16::from_le_bytes)
}

/// The 32-bit field at `offset`.
pub(super) fn u32_at(image: &[u8], offset: u64) -> Option<u32> {
    array(image, offset).map(u32::from_le_bytes)
}

/// The 64-bit field at `offset`.
pub(super) fn u64_at(image: &[u8], offset: u64) -> Option<u64> {
    array(image, offset).map(u64::from_le_bytes)
}

/// The range `offset..offset + len`, if the image has it.
pub(super) fn range(image: &[u8], offset: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let len = usize::try_from(len).ok()?;
    image.get(start..start.checked_add(len)?)
}

/// Rounds up to a power of two; `None` past 2^64.
pub(super) fn align_up(value: u64, align: u64) -> Option<u64> {
    Some(value.checked_add(align - 1)? & !(align - 1))
}

/// Writes `value` into `page` at `offset`, which the caller knows to be inside.
pub(super) fn put<const N: usize>(page: &mut [u8], offset: usize, value: [u8; N]) {
    page[offset..offset + N].copy_from_slice(&value);
}
