//! All vector registers of the guest at once, and MXCSR, between the host's registers and the core.

use crate::emitter::Alu;
use crate::emitter::{Emitter, Mem, cc};
use crate::frame::{frame_field, xmm, ymm_high};
use crate::registers::{A, B};

/// Vector registers of 64-bit mode.
const REGISTERS: u8 = 16;

/// See [`Stubs::vectors_load`](crate::stubs::Stubs::vectors_load).
pub fn emit_load(e: &mut Emitter) -> usize {
    let here = e.here();
    e.rm(false, &[0x0f, 0xb6], B, frame_field!(vectors)); // movzx
    e.alu(Alu::And, false, B, A);
    e.alu(Alu::Cmp, false, B, A);
    let forbidden = e.jcc(cc::NOT_EQUAL);
    e.rm(false, &[0x0f, 0xae], 2, frame_field!(mxcsr)); // ldmxcsr
    let has_avx = is_x86_feature_detected!("avx");
    for n in 0..REGISTERS {
        if has_avx {
            vex(e, 1, 0, 0x10, n, 0, xmm(n)); // vmovups
            vex(e, 3, 5, 0x18, n, n, ymm_high(n)); // vinsertf128
            e.raw(&[1]);
        } else {
            e.rm(false, &[0x0f, 0x10], n, xmm(n)); // movups
        }
    }
    e.rm(false, &[0x0f, 0xb6], B, frame_field!(vectors));
    e.rm(false, &[0x88], B, frame_field!(vectors_live)); // mov byte
    e.bind(forbidden);
    e.raw(&[0xc3]);
    here
}

/// The registers go to the core if they aren't there, before Rust code uses them. Clobbers the host's flags.
pub fn emit_store(e: &mut Emitter) {
    e.rm(false, &[0x80], 7, frame_field!(vectors_live)); // cmp
    e.raw(&[0]);
    let stored = e.jcc(cc::EQUAL);
    let has_avx = is_x86_feature_detected!("avx");
    for n in 0..REGISTERS {
        e.rm(false, &[0x0f, 0x11], n, xmm(n)); // movups
        if has_avx {
            vex(e, 3, 5, 0x19, n, 0, ymm_high(n)); // vextractf128
            e.raw(&[1]);
        }
    }
    if has_avx {
        e.raw(&[0xc5, 0xf8, 0x77]); // vzeroupper
    }
    e.rm(false, &[0x0f, 0xae], 3, frame_field!(mxcsr)); // stmxcsr
    e.rm(false, &[0x0f, 0xae], 2, frame_field!(host_mxcsr)); // ldmxcsr
    e.rm(false, &[0xc6], 0, frame_field!(vectors_live)); // mov byte
    e.raw(&[0]);
    e.bind(stored);
}

/// A three-byte VEX encoding of opcode map `map`; `length` is its L and pp fields, `source` the second register.
fn vex(e: &mut Emitter, map: u8, length: u8, opcode: u8, reg: u8, source: u8, mem: Mem) {
    // R, X and B are inverted.
    let base = mem.base.unwrap_or(0);
    let second = u8::from(reg < 8) << 7 | 1 << 6 | u8::from(base < 8) << 5 | map;
    e.raw(&[0xc4, second, (!source & 0xf) << 3 | length, opcode]);
    e.modrm(reg, mem);
}
