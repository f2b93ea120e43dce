//! x87, MMX, SSE and AVX registers, laid out as XSAVE's standard format lays them out.

use serde::{Deserialize, Serialize};

/// State components in XCR0 ("XSAVE-Supported Features and State-Component Bitmaps").
pub mod xcr0 {
    #![allow(missing_docs, reason = "the names are the manual's")]
    pub const X87: u64 = 1 << 0;
    pub const SSE: u64 = 1 << 1;
    pub const AVX: u64 = 1 << 2;
    pub const PKRU: u64 = 1 << 9;
}

/// MXCSR after reset.
pub const MXCSR_RESET: u32 = 0x1f80;
/// MXCSR bits that exist (MXCSR_MASK).
pub const MXCSR_MASK: u32 = 0xffff;

/// The registers in FXSAVE's 64-bit layout ("Non-64-bit-Mode and 64-bit Mode with REX.W ... Layout of
/// the FXSAVE"), followed by the upper halves of YMM0..15.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[repr(C, align(64))]
pub struct FpState {
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word; TOP is bits 13:11.
    pub fsw: u16,
    /// Abridged tag word: bit i is 1 when *physical* register i is not empty.
    pub ftw: u8,
    /// Reserved, 0.
    pub reserved: u8,
    /// Last x87 opcode, 11 bits.
    pub fop: u16,
    /// Last x87 instruction pointer.
    pub fip: u64,
    /// Last x87 data pointer.
    pub fdp: u64,
    /// MXCSR.
    pub mxcsr: u32,
    /// MXCSR_MASK as FXSAVE shows it.
    pub mxcsr_mask: u32,
    /// ST(0)..ST(7) in *stack* order, 10 bytes each in 16; MMX registers are their low 8 bytes when TOP is 0.
    pub st: [[u64; 2]; 8],
    /// XMM0..15.
    pub xmm: [[u64; 2]; 16],
    /// FXSAVE's bytes 416..512: 48 reserved, 48 for software.
    pub tail: [u64; 12],
    /// Bits 255:128 of YMM0..15.
    pub ymm_high: [[u64; 2]; 16],
}

const _: () = assert!(std::mem::offset_of!(FpState, st) == 32);
const _: () = assert!(std::mem::offset_of!(FpState, xmm) == 160);
const _: () = assert!(std::mem::offset_of!(FpState, ymm_high) == 512);

impl Default for FpState {
    /// As after reset (FCW 0040h, all registers +0 and valid is what hardware has; we start as after FNINIT
    /// with FCW 0040h, which INIT leaves alone).
    fn default() -> Self {
        Self {
            fcw: 0x0040,
            fsw: 0,
            ftw: 0xff,
            reserved: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            mxcsr: MXCSR_RESET,
            mxcsr_mask: MXCSR_MASK,
            st: [[0; 2]; 8],
            xmm: [[0; 2]; 16],
            tail: [0; 12],
            ymm_high: [[0; 2]; 16],
        }
    }
}
