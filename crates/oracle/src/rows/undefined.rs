//! What the manual leaves undefined, as narrowly as it says it.

use iced_x86::{Instruction, Mnemonic, OpKind};
use umbra_arch::rflags::{AF, CF, OF};
use umbra_cpu::isa::Row;

fn count(i: &Instruction, rcx: u64) -> u64 {
    let last = i.op_count() - 1;
    let raw = if i.op_kind(last) == OpKind::Register { rcx } else { i.immediate(last) };
    raw & if bits(i) == 64 { 63 } else { 31 }
}

fn bits(i: &Instruction) -> u64 {
    let bytes = if i.op0_kind() == OpKind::Register { i.op0_register().size() } else { i.memory_size().size() };
    bytes as u64 * 8
}

/// Status flags that may have any value after `i`.
pub fn flags(i: &Instruction, row: &Row, rcx: u64) -> u64 {
    use Mnemonic::*;
    match i.mnemonic() {
        Shl | Sal | Shr | Sar | Shld | Shrd => {
            let n = count(i, rcx);
            let not_one = if n > 1 { OF } else { 0 };
            let lost = if n >= bits(i) && i.mnemonic() != Sar { CF } else { 0 };
            if n == 0 { 0 } else { AF | not_one | lost }
        }
        Rol | Ror | Rcl | Rcr if count(i, rcx) == 1 => 0,
        Rol | Ror | Rcl | Rcr if count(i, rcx) == 0 => 0,
        Rol | Ror | Rcl | Rcr => OF,
        _ => row.undefined,
    }
}

/// "If the count is greater than the operand size, the result is undefined": processors differ.
pub fn result(i: &Instruction, rcx: u64) -> bool {
    matches!(i.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd) && count(i, rcx) > bits(i)
}
