//! Code that rewrites itself: functions that are called, patched and copied over each other, in lines and pages of
//! their own and shared ones, also by the block that runs. The translator does what the interpreter does.

use crate::decode_execute::{Mode, interpreter, run, translator};
use crate::random::Random;

/// Where the functions begin, how far apart they are, how many there are: on both sides of a page's end.
const FUNCTIONS: u32 = 0xe40;
const APART: u32 = 61;
const COUNT: u64 = 12;
/// Linear address of the code.
const CODE: u32 = 0x1_0000;
/// Ticks that a program runs.
const TICKS: u64 = 12_000;
/// `op eax, imm32`, and MOV.
const OPCODES: [u8; 6] = [0x05, 0x2d, 0x35, 0x0d, 0x25, 0xb8];

/// The property. The input chooses the program.
pub fn self_modifying(data: &[u8]) {
    let code = program(&mut Random::of(data));
    let whole = run(interpreter, Mode::Long, &[], &code, &[TICKS]);
    let translated = run(translator, Mode::Long, &[], &code, &[TICKS]);
    assert_eq!(whole, translated, "the translator differs from the interpreter: {code:02x?}");
    let pieces = run(translator, Mode::Long, &[], &code, &[33, 1000, 1001, TICKS]);
    assert_eq!(whole, pieces, "a translated run in slices differs: {code:02x?}");
}

fn function(n: u64) -> u32 {
    FUNCTIONS + n as u32 * APART
}

/// An operation list that starts again at its end, and the functions.
fn program(r: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    while code.len() < 0x40 + r.below(0x400) as usize {
        operation(&mut code, r);
    }
    code.push(0xe9);
    code.extend(0u32.wrapping_sub(code.len() as u32 + 4).to_le_bytes());
    for n in 0..COUNT {
        code.resize(function(n) as usize, 0x90);
        for _ in 0..1 + n % 4 {
            code.push(r.pick(&OPCODES));
            code.extend((r.next() as u32).to_le_bytes());
        }
        code.extend([0x01, 0xc3, 0xc3]); // add ebx, eax; ret
    }
    code
}

fn operation(code: &mut Vec<u8>, r: &mut Random) {
    let at = CODE + function(r.below(COUNT));
    let bytes = |value: u32| value.to_le_bytes();
    match r.below(10) {
        // MOV of one, four or eight bytes to an immediate, or to an opcode.
        0 => store(code, &[0xc7, 0x04, 0x25], at + 1 + r.below(4) as u32, &bytes(r.next() as u32)),
        1 => store(code, &[0xc6, 0x04, 0x25], at, &[r.pick(&OPCODES)]),
        2 => store(code, &[0x48, 0xc7, 0x04, 0x25], at + 1, &bytes(r.next() as u32 & 0x7fff_ffff)),
        // INC of an immediate's byte; ADD of a register to it.
        3 => store(code, &[0xfe, 0x04, 0x25], at + 1 + r.below(4) as u32, &[]),
        4 => store(code, &[0x01, 0x1c, 0x25], at + 1, &[]),
        // MOV ECX, imm32 whose immediate the instruction before it stores.
        5 => {
            let ahead = CODE + code.len() as u32 + 12;
            store(code, &[0xc7, 0x04, 0x25], ahead, &bytes(r.next() as u32));
            code.push(0xb9);
            code.extend(bytes(0));
            code.extend([0x01, 0xcb]);
        }
        // REP MOVSB of one function over another.
        6 => {
            code.push(0xbf);
            code.extend(bytes(at));
            code.push(0xbe);
            code.extend(bytes(CODE + function(r.below(COUNT))));
            code.push(0xb9);
            code.extend(bytes(1 + r.below(u64::from(APART)) as u32));
            code.extend([0xf3, 0xa4]);
        }
        // MOVUPS, which may reach into the next function.
        7 => {
            code.extend([0x0f, 0x10, 0x04, 0x25]);
            code.extend(bytes(CODE + function(r.below(COUNT))));
            store(code, &[0x0f, 0x11, 0x04, 0x25], at, &[]);
        }
        // Calls, many or one.
        8 => {
            code.push(0xbd);
            code.extend(bytes(1 + r.below(20) as u32));
            call(code, at);
            code.extend([0xff, 0xcd, 0x75, 0xf7]); // dec ebp; jnz back
        }
        _ => call(code, at),
    }
}

fn store(code: &mut Vec<u8>, opcode: &[u8], at: u32, value: &[u8]) {
    code.extend(opcode);
    code.extend(at.to_le_bytes());
    code.extend(value);
}

fn call(code: &mut Vec<u8>, at: u32) {
    code.push(0xe8);
    code.extend((at - CODE).wrapping_sub(code.len() as u32 + 4).to_le_bytes());
}
