//! What the oracle refuses to run: whatever could change this process outside the window.

use super::{Mode, NativeState, PAGES, SEGMENT_G, WINDOW};
use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};
use std::ops::Range;

/// Addresses that hold the window or nothing at all, with room for an operand at either end.
const SAFE: Range<u64> = WINDOW - (1 << 19)..WINDOW + PAGES as u64 * 4096 + (1 << 19);
/// Most rounds of a repeated instruction.
const MAX_COUNT: u64 = 1 << 14;

/// `None` if the instruction may run with these registers.
pub(super) fn refuse(i: &Instruction, mode: Mode, state: &NativeState) -> Option<&'static str> {
    if i.code() == Code::INVALID {
        return Some("isn't an instruction");
    }
    if enters_kernel(i.mnemonic()) {
        return Some("enters the kernel, or changes what the process needs");
    }
    if loads_fs(i) {
        return Some("loads FS, which belongs to the process");
    }
    let mask = counter_mask(i, mode);
    if (i.has_rep_prefix() || i.has_repne_prefix()) && i.is_string_instruction() && state.gpr[1] & mask > MAX_COUNT {
        return Some("repeats too often");
    }
    (!stores_are_safe(i, mode, state)).then_some("might store outside the window")
}

fn enters_kernel(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Syscall | Sysenter | Int | Int1 | Wrfsbase | Wrgsbase | Wrpkru | Iret | Iretd | Iretq | Sysret | Sysexit
    )
}

fn loads_fs(i: &Instruction) -> bool {
    let first = i.op_count() > 0 && i.op_kind(0) == OpKind::Register && i.op0_register() == Register::FS;
    i.mnemonic() == Mnemonic::Lfs || first && i.mnemonic() != Mnemonic::Push
}

fn counter_mask(i: &Instruction, mode: Mode) -> u64 {
    let narrow = |k: u32| {
        Some(match i.op_kind(k) {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => 0xffff,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => 0xffff_ffff,
            _ => return None,
        })
    };
    (0..i.op_count()).find_map(narrow).unwrap_or(mode.mask())
}

fn stores_are_safe(i: &Instruction, mode: Mode, state: &NativeState) -> bool {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(i);
    info.used_memory().iter().all(|m| {
        let writes =
            !matches!(m.access(), OpAccess::None | OpAccess::Read | OpAccess::NoMemAccess | OpAccess::CondRead);
        if !writes {
            return true;
        }
        let Some(at) = m.virtual_address(0, |r, _, _| Some(value(r, mode, state))) else { return false };
        SAFE.contains(&((at & mode.mask()).wrapping_add(bit_bytes(i, state) as u64)))
    })
}

/// How far a register bit offset reaches outside the operand.
fn bit_bytes(i: &Instruction, state: &NativeState) -> i64 {
    let bit_test = matches!(i.mnemonic(), Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    if !bit_test || i.op0_kind() != OpKind::Memory || i.op1_kind() != OpKind::Register {
        return 0;
    }
    let r = i.op1_register();
    let unused = 64 - 8 * r.size() as u32;
    (state.gpr[r.full_register().number() & 15] << unused) as i64 >> unused >> 3
}

fn value(r: Register, mode: Mode, state: &NativeState) -> u64 {
    match r {
        Register::GS => SEGMENT_G.base,
        _ if r.is_segment_register() => mode.base(),
        _ if r.is_gpr() => {
            let full = state.gpr[r.full_register().number() & 15];
            full & u64::MAX >> (64 - 8 * r.size())
        }
        _ => 0,
    }
}
