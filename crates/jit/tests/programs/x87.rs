//! x87 and MMX instructions for random programs, and what looks at their state.

use super::{Choice, DATA, SMALL, TICKS, compare, looped};
use iced_x86::{Decoder, DecoderOptions, Mnemonic as M};

/// Control words at [`CONTROL`]: of all precisions and roundings, the last two with exceptions unmasked.
pub const WORDS: [u16; 8] = [0x37f, 0x27f, 0x07f, 0x77f, 0xb7f, 0x1f7f, 0x37e, 0x34d];
/// Where they are.
pub const CONTROL: u64 = DATA + 0x1810;

/// An x87 instruction, now and then another that has to do with its state.
pub fn instruction(c: &mut Choice) -> Vec<u8> {
    match c.take(22) {
        0..=6 => registers(c),
        7..=14 => memory(c),
        15 => constant(c),
        16 => control_word(c),
        17 | 18 => vec![0xdf, 0xe0], // fnstsw ax
        19 | 20 => mmx(c),
        _ => state(c),
    }
}

/// As [`super::program`], mostly of x87 instructions.
pub fn program(body: &[u64]) -> Vec<u8> {
    let one =
        |number: u64| if number >> 61 == 0 { super::instruction(number) } else { instruction(&mut Choice(number)) };
    looped(body.iter().flat_map(|&number| one(number)))
}

/// Any register form.
fn registers(c: &mut Choice) -> Vec<u8> {
    loop {
        let bytes = vec![0xd8 + c.take(8) as u8, 0xc0 + c.take(64) as u8];
        let i = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
        let ends = i.is_invalid() || matches!(i.mnemonic(), M::Frstpm | M::Fstdw | M::Fstsg);
        if !ends && (i.mnemonic() != M::Fninit || c.take(8) == 0) {
            return bytes;
        }
    }
}

/// Any memory form; few that load control state, since what they load is random.
fn memory(c: &mut Choice) -> Vec<u8> {
    loop {
        let (opcode, extension) = (0xd8 + c.take(8) as u8, c.take(8) as u8);
        let loads_control = matches!((opcode, extension), (0xd9, 4 | 5) | (0xdd, 4));
        let undefined = matches!((opcode, extension), (0xd9, 1) | (0xdb, 4 | 6) | (0xdd, 5));
        if !undefined && (!loads_control || c.take(16) == 0) {
            return c.form(&[], false, &[opcode], extension, true);
        }
    }
}

/// FLD1 and the others.
fn constant(c: &mut Choice) -> Vec<u8> {
    vec![0xd9, 0xe8 + c.take(7) as u8]
}

fn control_word(c: &mut Choice) -> Vec<u8> {
    let which = if c.take(4) == 0 { c.take(8) } else { c.take(6) };
    let mut bytes = vec![0xd9, 0x2c, 0x25];
    bytes.extend((CONTROL as u32 + 2 * which as u32).to_le_bytes());
    bytes
}

fn mmx(c: &mut Choice) -> Vec<u8> {
    const OPCODES: [u8; 24] = [
        0x60, 0x61, 0x63, 0x67, 0x6b, 0x6e, 0x6f, 0x75, 0x7e, 0x7f, 0xd1, 0xd4, 0xd5, 0xd8, 0xda, 0xdf, 0xe0, 0xe4,
        0xf1, 0xf4, 0xf6, 0xfa, 0xfd, 0xfe,
    ];
    let opcode = OPCODES[c.take(24) as usize];
    let (reg, wide, memory) = (c.register(), c.take(2) == 1, c.take(3) == 0);
    c.form(&[], wide, &[0x0f, opcode], reg, memory)
}

fn state(c: &mut Choice) -> Vec<u8> {
    const CHOICES: [&[u8]; 16] = [
        &[0xd9, 0xb7, 0x00, 0x03, 0, 0],       // fnstenv [rdi + 0x300]
        &[0xd9, 0xa7, 0x00, 0x03, 0, 0],       // fldenv
        &[0xdd, 0xb7, 0x00, 0x03, 0, 0],       // fnsave
        &[0xdd, 0xa7, 0x00, 0x03, 0, 0],       // frstor
        &[0x48, 0x0f, 0xae, 0x87, 0, 4, 0, 0], // fxsave64 [rdi + 0x400]
        &[0x0f, 0xae, 0x87, 0, 4, 0, 0],       // fxsave
        &[0x0f, 0xae, 0x8f, 0, 4, 0, 0],       // fxrstor
        &[0x9b],                               // fwait
        &[0x0f, 0x77],                         // emms
        &[0x0f, 0x6f, 0x4f, 0x20],             // movq mm1, [rdi + 0x20]
        &[0x0f, 0xfe, 0xca],                   // paddd mm1, mm2
        &[0x0f, 0x2a, 0x47, 0x10],             // cvtpi2ps xmm0, [rdi + 0x10]
        &[0x66, 0x0f, 0x2a, 0x47, 0x10],       // cvtpi2pd xmm0, [rdi + 0x10]
        &[0xdb, 0xe2],                         // fnclex
        &[0xd9, 0x7f, 0x30],                   // fnstcw [rdi + 0x30]
        // mov rax, cr0; or al, 8 (TS); mov cr0, rax
        &[0x0f, 0x20, 0xc0, 0x0c, 8, 0x0f, 0x22, 0xc0],
    ];
    CHOICES[c.take(16) as usize].to_vec()
}

/// The unit becomes forbidden while its state is in the host's registers.
#[test]
fn a_forbidden_unit_loses_its_state_to_the_core() {
    // fld1; mov rax, cr0; or eax, TS; mov cr0, rax; fld1, which is #NM first; fstp st0, twice
    let body = [0xd9, 0xe8, 0x0f, 0x20, 0xc0, 0x83, 0xc8, 8, 0x0f, 0x22, 0xc0, 0xd9, 0xe8, 0xdd, 0xd8, 0xdd, 0xd8];
    compare(&looped(body.into_iter()), 0, SMALL, &[TICKS]).unwrap();
}

/// CVTPI2PS makes the x87 state an MMX state even with a memory operand.
#[test]
fn conversions_from_mmx_are_left_to_functions() {
    // fld1; cvtpi2ps xmm0, [rdi]; fnsave [rdi + 0x300]
    let body = [0xd9, 0xe8, 0x0f, 0x2a, 0x07, 0xdd, 0xb7, 0x00, 0x03, 0, 0];
    compare(&looped(body.into_iter()), 0, SMALL, &[TICKS]).unwrap();
}
