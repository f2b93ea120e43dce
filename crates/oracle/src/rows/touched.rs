//! Which parts of the window an instruction may write.

use crate::window::{BYTES, PHYSICAL};
use iced_x86::{CodeSize, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};
use std::cell::RefCell;
use std::ops::Range;
use umbra_arch::{CpuState, rflags};
use umbra_hostexec::native::{Mode, SEGMENT_G, WINDOW};

thread_local! {
    static FACTORY: RefCell<InstructionInfoFactory> = RefCell::new(InstructionInfoFactory::new());
}

/// Bytes on either side of an operand that count as its own: bit offsets in registers, and room to see a write
/// that is too long.
const MARGIN: u64 = 80;
/// Bytes below and above the stack pointer that a stack instruction may use: ENTER's nesting.
const STACK: (u64, u64) = (0x120, 0x40);

/// Guest-physical ranges in the window that `i` may write from this state.
pub fn ranges(i: &Instruction, mode: Mode, s: &CpuState) -> Vec<Range<u64>> {
    let mut ranges = Vec::new();
    if i.is_stack_instruction() {
        let sp = if mode == Mode::Bits16 { WINDOW + (s.gpr[4] & 0xffff) } else { s.gpr[4] };
        add(&mut ranges, sp.wrapping_sub(STACK.0), STACK.0 + STACK.1);
    }
    if let Some((at, bytes)) = string(i, mode, s) {
        add(&mut ranges, at, bytes);
    }
    FACTORY.with_borrow_mut(|factory| {
        let info = factory.info(i);
        for m in info.used_memory() {
            let reads =
                matches!(m.access(), OpAccess::None | OpAccess::Read | OpAccess::NoMemAccess | OpAccess::CondRead);
            let in_segment = |r: Register| if r.is_segment_register() { 0 } else { value(r, mode, s) };
            if let Some(offset) = m.virtual_address(0, |r, _, _| Some(in_segment(r)))
                && !reads
            {
                let offset = offset.wrapping_add(bit_offset(i, s)) & address_mask(m.address_size());
                let at = value(m.segment(), mode, s).wrapping_add(offset) & mode.mask();
                add(&mut ranges, at.wrapping_sub(MARGIN), m.memory_size().size() as u64 + 2 * MARGIN);
            }
        }
    });
    merged(ranges)
}

/// The same bytes in ranges that don't overlap.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    ranges.dedup_by(|next, before| {
        let overlaps = next.start <= before.end;
        if overlaps {
            before.end = before.end.max(next.end);
        }
        overlaps
    });
    ranges
}

/// How many bytes from its operand on a bit in a register lies.
fn bit_offset(i: &Instruction, s: &CpuState) -> u64 {
    let writes = matches!(i.mnemonic(), Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    if !writes || i.op0_kind() != OpKind::Memory || i.op1_kind() != OpKind::Register {
        return 0;
    }
    let r = i.op1_register();
    let unused = 64 - 8 * r.size() as u32;
    ((s.gpr[r.full_register().number() & 15] << unused) as i64 >> unused >> 3) as u64
}

/// Adds what of a linear range is in the window.
fn add(ranges: &mut Vec<Range<u64>>, linear: u64, bytes: u64) {
    let start = linear.wrapping_sub(WINDOW);
    // Before the window, with wrapping: what reaches into it counts.
    let (start, bytes) =
        if start as i64 >= 0 { (start, bytes) } else { (0, bytes.saturating_sub(start.wrapping_neg())) };
    let end = start.saturating_add(bytes).min(BYTES as u64);
    if start < end {
        ranges.push(PHYSICAL + start..PHYSICAL + end);
    }
}

/// All rounds of a string instruction's store; the whole window where addresses wrap.
fn string(i: &Instruction, mode: Mode, s: &CpuState) -> Option<(u64, u64)> {
    let mask = (0..i.op_count()).find_map(|k| match i.op_kind(k) {
        OpKind::MemoryESDI => Some(0xffff),
        OpKind::MemoryESEDI => Some(0xffff_ffff),
        OpKind::MemoryESRDI => Some(u64::MAX),
        _ => None,
    })?;
    let count = if i.has_rep_prefix() || i.has_repne_prefix() { s.gpr[1] & mask } else { 1 };
    let size = i.memory_size().size() as u64;
    let bytes = count.saturating_mul(size).min(BYTES as u64);
    let offset = s.gpr[7] & mask;
    if mask == 0xffff && (offset < bytes || offset + bytes > 0xffff) {
        return Some((WINDOW, BYTES as u64));
    }
    let down = if s.rflags & rflags::DF != 0 { bytes.saturating_sub(size) } else { 0 };
    let start = (mode.base().wrapping_add(offset) & mode.mask()).wrapping_sub(down);
    Some((start.wrapping_sub(MARGIN), bytes + 2 * MARGIN))
}

fn address_mask(size: CodeSize) -> u64 {
    match size {
        CodeSize::Code16 => 0xffff,
        CodeSize::Code32 => 0xffff_ffff,
        CodeSize::Code64 | CodeSize::Unknown => u64::MAX,
    }
}

fn value(r: Register, mode: Mode, s: &CpuState) -> u64 {
    match r {
        Register::GS => SEGMENT_G.base,
        _ if r.is_segment_register() => mode.base(),
        _ if r.is_gpr() => s.gpr[r.full_register().number() & 15] & u64::MAX >> (64 - 8 * r.size()),
        _ => 0,
    }
}
