//! MMX instructions: their registers are the x87 ones, so that they have host code where x87 instructions have.

use iced_x86::{EncodingKind, Instruction, Mnemonic as M, OpKind};

/// Whether it works on MMX registers, and perhaps a general one, alone. Conversions obey MXCSR.
pub fn fits(i: &Instruction) -> bool {
    let registers = || (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register).map(|n| i.op_register(n));
    if !registers().any(|r| r.is_mm()) {
        return i.mnemonic() == M::Emms;
    }
    let known = registers().all(|r| r.is_mm() || r.is_gpr32() || r.is_gpr64());
    let converts = matches!(i.mnemonic(), M::Cvtps2pi | M::Cvttps2pi | M::Cvtpd2pi | M::Cvttpd2pi);
    let special = converts || i.mnemonic() == M::Maskmovq;
    known && !special && i.code().op_code().encoding() == EncodingKind::Legacy
}
