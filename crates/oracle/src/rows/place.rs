//! Registers and memory for an instruction: random, but so that its operands lie where the case wants them.

use super::form::base_of;
use super::selectors;
use crate::random::Random;
use crate::window;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use umbra_arch::CpuState;
use umbra_arch::fpu::FpState;
use umbra_arch::rflags;
use umbra_hostexec::native::{Mode, WINDOW};

/// A linear address for an operand of at most `size` bytes: inside writable memory, or across a border between
/// pages of different protection, at every possible byte.
pub fn target(size: u64, r: &mut Random) -> u64 {
    let back = r.below(size + 1);
    let offset = match r.below(20) {
        0 => 0x4000 - back,
        1 => 0x6000 - back,
        2 => 0x5000 - back,
        3 => 0x9000 - back,
        4 => 0x7000 - back,
        5 => 0xa000 - back,
        6 => 0x3000 - back,
        7 => 0x1_0000 - back,
        8..14 => 0x2000 + r.below(0x1f00),
        _ => 0x2000 + r.below(0x7c) * 64,
    };
    WINDOW + offset
}

fn stack(r: &mut Random) -> u64 {
    let offset = match r.below(12) {
        0 => 0xd000 + r.below(65),
        1 => 0x9000 + r.below(65),
        2 => 0xb000 - r.below(65),
        3 => 0xf000 + r.below(40) - 20,
        4 => 0xd000 + r.below(0x2000),
        _ => 0xd800 + r.below(0x200) * 8,
    };
    WINDOW + offset
}

/// Random registers for `i`; `None` if these operands can't be put anywhere sensible.
pub fn state(i: &Instruction, mode: Mode, target: u64, with_fp: bool, r: &mut Random) -> Option<CpuState> {
    let flags = match r.below(4) {
        0 => 0,
        1 => rflags::STATUS,
        _ => r.next() & rflags::STATUS,
    };
    let direction = if i.is_string_instruction() && r.one_in(3) { rflags::DF } else { 0 };
    let mut s = window::state(mode);
    s.gpr = std::array::from_fn(|_| r.operand());
    s.rflags |= flags | direction;
    if with_fp {
        s.fp = floating(r);
    }
    stack_pointer(mode, &mut s, r);
    special(i, mode, &mut s, r)?;
    put(i, mode, target, s, r)
}

/// RSP in a part of the window that is for stacks.
pub fn stack_pointer(mode: Mode, s: &mut CpuState, r: &mut Random) {
    s.gpr[4] = stack(r) - mode.base();
    if mode == Mode::Bits16 && r.one_in(2) {
        // Only SP counts.
        s.gpr[4] |= r.next() << 16 & 0xffff_0000;
    }
}

/// The same state with the operands where the case wants them; `None` as above.
pub fn put(i: &Instruction, mode: Mode, target: u64, mut s: CpuState, r: &mut Random) -> Option<CpuState> {
    strings(i, mode, target, &mut s, r);
    operand(i, mode, target, &mut s, r)?;
    if mode != Mode::Bits64 {
        s.gpr.iter_mut().for_each(|value| *value &= 0xffff_ffff);
    }
    Some(s)
}

fn floating(r: &mut Random) -> FpState {
    let mut fp = FpState { fcw: 0x037f | r.pick(&[0, 0x400, 0x800, 0xc00]), ..FpState::default() };
    if r.one_in(4) {
        fp.fcw &= !0x300;
    }
    fp.fsw = (r.next() & 0x7f00) as u16 & 0x7f00;
    fp.ftw = if r.one_in(2) { 0xff } else { r.next() as u8 };
    fp.mxcsr = 0x1f80;
    if r.one_in(3) {
        fp.mxcsr |= (r.next() & 0xe040) as u32;
    }
    if r.one_in(8) {
        fp.mxcsr &= !(r.next() as u32 & 0x1f80);
    }
    for lane in fp.xmm.iter_mut().chain(&mut fp.ymm_high) {
        *lane = r.lane();
    }
    for st in &mut fp.st {
        let sign = r.next() & 0x8000;
        *st = match r.below(8) {
            0 => [0, sign],
            1 => [1 << 63, 0x7fff | sign],
            2 => [r.next() | 3 << 62, 0x7fff | sign],
            3 => [r.next() >> 1, sign],
            4 => [(r.next() >> 8 | 1) << 63 | r.below(9) << 59, (0x3fff + r.below(8)) | sign],
            _ => [r.next() | 1 << 63, (0x3fff - 40 + r.below(80)) | sign],
        };
    }
    fp
}

/// Registers with a meaning of their own.
fn special(i: &Instruction, mode: Mode, s: &mut CpuState, r: &mut Random) -> Option<()> {
    use Mnemonic::*;
    let stack_offset = stack(r) - mode.base();
    match i.mnemonic() {
        Enter | Leave => s.gpr[5] = stack_offset,
        Loop | Loope | Loopne | Jcxz | Jecxz | Jrcxz if r.one_in(2) => {
            s.gpr[1] = r.pick(&[0, 1, 2, 1 << 16, 1 << 32, 1 << 16 | 1, 1 << 32 | 1]);
        }
        Div if r.one_in(2) => s.gpr[2] = 0,
        Idiv if r.one_in(2) => s.gpr[2] = if s.gpr[0] >> 63 != 0 { u64::MAX } else { 0 },
        // One of many bits is far away: the window isn't that large.
        Bt | Bts | Btr | Btc if i.op0_kind() == OpKind::Memory && i.op1_kind() == OpKind::Register => {
            let source = i.op1_register().full_register();
            if source == i.memory_base().full_register() || source == i.memory_index().full_register() {
                return None;
            }
            s.gpr[source.number()] = (r.below(1024) as i64 - 512) as u64;
        }
        _ if selectors::uses(i.code()) && i.op_count() > 0 => {
            let k = i.op_count() - 1;
            if i.op_kind(k) == OpKind::Register && i.op_register(k).is_gpr() {
                let value = &mut s.gpr[i.op_register(k).full_register().number()];
                *value = *value & !0xffff | u64::from(selectors::random(r));
            }
        }
        _ => {}
    }
    Some(())
}

/// RSI, RDI and RCX of string instructions.
fn strings(i: &Instruction, mode: Mode, at: u64, s: &mut CpuState, r: &mut Random) {
    let size = i.memory_size().size() as u64;
    for k in 0..i.op_count() {
        let (register, mask) = match i.op_kind(k) {
            OpKind::MemorySegSI => (6, 0xffff),
            OpKind::MemorySegESI => (6, 0xffff_ffff),
            OpKind::MemorySegRSI => (6, u64::MAX),
            OpKind::MemorySegDI | OpKind::MemoryESDI => (7, 0xffff),
            OpKind::MemorySegEDI | OpKind::MemoryESEDI => (7, 0xffff_ffff),
            OpKind::MemorySegRDI | OpKind::MemoryESRDI => (7, u64::MAX),
            _ => continue,
        };
        let count = if r.one_in(8) { r.below(1500) } else { r.below(9) };
        s.gpr[1] = s.gpr[1] & !mask | count;
        let es = matches!(i.op_kind(k), OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI);
        let prefix = if es { Register::None } else { i.segment_prefix() };
        let linear = if k == 0 { at } else { target(size, r) };
        let offset = linear.wrapping_sub(base_of(prefix, mode));
        s.gpr[register] = s.gpr[register] & !mask | offset & mask;
    }
}

/// Solves the memory operand's address for its base register.
fn operand(i: &Instruction, mode: Mode, target: u64, s: &mut CpuState, r: &mut Random) -> Option<()> {
    if !(0..i.op_count()).any(|k| i.op_kind(k) == OpKind::Memory) {
        return Some(());
    }
    let (base, index) = (i.memory_base(), i.memory_index());
    if i.is_vsib() {
        let n = index.number();
        for lane in s.fp.xmm[n].iter_mut().chain(&mut s.fp.ymm_high[n]) {
            *lane = if i.is_vsib32() { r.below(4) | r.below(4) << 32 } else { r.below(4) };
        }
    }
    if base == Register::None || i.is_ip_rel_memory_operand() {
        return index.is_gpr().then_some(()).map_or(Some(()), |()| None);
    }
    let full = base.full_register();
    if i.is_stack_instruction() && full == Register::RSP {
        return (i.memory_displ_size() < 2 && index == Register::None).then_some(());
    }
    if i.is_stack_instruction() && full == Register::RBP && matches!(i.mnemonic(), Mnemonic::Enter | Mnemonic::Leave) {
        return None;
    }
    let mask = match base.size() {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    };
    let offset = target.wrapping_sub(base_of(i.segment_prefix(), mode));
    let own = index.is_gpr() && index.full_register() == full;
    if own {
        return None;
    }
    let from_index = if index.is_gpr() && index != Register::AL {
        s.gpr[index.full_register().number()].wrapping_mul(i.memory_index_scale().into())
    } else if index == Register::AL {
        s.gpr[0] & 0xff
    } else {
        0
    };
    let value = offset.wrapping_sub(i.memory_displacement64()).wrapping_sub(from_index) & mask;
    s.gpr[full.number()] = s.gpr[full.number()] & !mask | value;
    Some(())
}
