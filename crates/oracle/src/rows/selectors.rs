//! Selectors and their descriptors, the same on both sides.

use crate::random::Random;
use iced_x86::{Code, Mnemonic, OpCodeOperandKind as Kind};
use umbra_arch::segment::Segment;
use umbra_hostexec::native::{GLOBAL, LOCAL, Mode, SEGMENT_G};

/// Every descriptor in the guest's tables.
pub fn descriptors() -> impl Iterator<Item = (u16, Segment)> {
    let flat = |&(selector, attr)| (selector, Segment { base: 0, limit: u32::MAX, attr, selector });
    let local = |&(selector, attr)| (selector, Segment { attr, selector, ..SEGMENT_G });
    let of_16_bits = [Mode::Bits16.code(), Mode::Bits16.data(), SEGMENT_G];
    GLOBAL.iter().map(flat).chain(LOCAL.iter().map(local)).chain(of_16_bits.map(|segment| (segment.selector, segment)))
}

/// The eight bytes of a descriptor.
pub fn encode(s: &Segment) -> u64 {
    let limit = u64::from(if s.attr.is_granular() { s.limit >> 12 } else { s.limit });
    let attr = u64::from(s.attr.0);
    limit & 0xffff
        | (s.base & 0xff_ffff) << 16
        | (attr & 0xff) << 40
        | (limit >> 16 & 15) << 48
        | (attr >> 12 & 15) << 52
        | (s.base >> 24 & 0xff) << 56
}

/// A selector worth trying: every descriptor with any RPL, null, and outside the tables.
pub fn random(r: &mut Random) -> u16 {
    let all: Vec<u16> = descriptors().map(|(selector, _)| selector).collect();
    match r.below(8) {
        0 => r.below(4) as u16,
        1 => r.pick(&[0x80, 0x83, 0xfff8, 0x3f, 0xffff, 8, 0x40]),
        2 => r.pick(&all) & !3 | r.below(4) as u16,
        _ => r.pick(&all),
    }
}

/// Whether a code loads or examines a selector.
pub fn uses(code: Code) -> bool {
    loads(code) || matches!(code.mnemonic(), Mnemonic::Lar | Mnemonic::Lsl | Mnemonic::Verr | Mnemonic::Verw)
}

/// Whether a code may change a segment register.
pub fn loads(code: Code) -> bool {
    use Mnemonic::*;
    let info = code.op_code();
    let first = info.op_count() > 0
        && matches!(info.op_kind(0), Kind::seg_reg | Kind::es | Kind::ss | Kind::ds | Kind::fs | Kind::gs);
    match code.mnemonic() {
        Mov | Pop => first,
        Lds | Les | Lgs | Lss | Retf => true,
        Jmp | Call => umbra_cpu::isa::branch::is_far(code),
        _ => false,
    }
}
