//! The layout of XSAVE areas ("Standard Format", "Compacted Format of an XSAVE Area").

use crate::fpu::xcr0;

/// Bytes of the legacy region and the XSAVE header, which every area has.
pub const BASE_SIZE: u32 = 512 + 64;

/// One extended state component.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Component {
    /// Its bit in XCR0 or IA32_XSS.
    pub bit: u32,
    /// Bytes.
    pub size: u32,
    /// Offset in the standard format.
    pub offset: u32,
}

/// The extended components that exist, in the order of their bits. All are user components, none
/// needs alignment to 64 bytes in the compacted format.
pub const COMPONENTS: [Component; 2] =
    [Component { bit: 2, size: 256, offset: 576 }, Component { bit: 9, size: 8, offset: 2688 }];

const _: () = assert!(1 << COMPONENTS[0].bit == xcr0::AVX && 1 << COMPONENTS[1].bit == xcr0::PKRU);

fn selected(bits: u64) -> impl Iterator<Item = &'static Component> {
    COMPONENTS.iter().filter(move |c| bits >> c.bit & 1 != 0)
}

/// The component with that bit number.
pub fn component(bit: u32) -> Option<&'static Component> {
    COMPONENTS.iter().find(|c| c.bit == bit)
}

/// Bytes of a standard-format area for the components `bits`.
pub fn standard_size(bits: u64) -> u32 {
    selected(bits).map(|c| c.offset + c.size).max().unwrap_or(0).max(BASE_SIZE)
}

/// Offset of component `bit` in a compacted area whose XCOMP_BV selects `bits`.
pub fn compacted_offset(bits: u64, bit: u32) -> u32 {
    BASE_SIZE + selected(bits).take_while(|c| c.bit < bit).map(|c| c.size).sum::<u32>()
}

/// Bytes of a compacted area for the components `bits`.
pub fn compacted_size(bits: u64) -> u32 {
    compacted_offset(bits, 64)
}
