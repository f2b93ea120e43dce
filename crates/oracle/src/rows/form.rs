//! Instructions for a code: every operand kind with random registers and memory operands.

use super::selectors;
use crate::random::Random;
use iced_x86::{Code, Encoder, Instruction, OpCodeOperandKind as Kind, OpKind, Register};
use umbra_hostexec::native::{Mode, SEGMENT_G};

/// What an instruction is made for.
pub struct Wish {
    /// Code size.
    pub mode: Mode,
    /// Offset at which it lies.
    pub rip: u64,
    /// Linear address of its memory operand, where the encoding holds it.
    pub target: u64,
}

impl Wish {
    /// The target as an offset in the segment that `i` uses.
    fn offset(&self, i: &Instruction) -> u64 {
        self.target.wrapping_sub(base_of(i.segment_prefix(), self.mode)) & self.mode.mask()
    }
}

/// Base of the segment that a prefix names, or of the ordinary ones.
pub fn base_of(segment: Register, mode: Mode) -> u64 {
    if segment == Register::GS { SEGMENT_G.base } else { mode.base() }
}

/// Whether `code` exists in `mode`.
pub fn exists(code: Code, mode: Mode) -> bool {
    let info = code.op_code();
    match mode {
        Mode::Bits16 => info.mode16(),
        Mode::Bits32 => info.mode32(),
        Mode::Bits64 => info.mode64(),
    }
}

/// The bytes of a random instruction with that code.
pub fn encode(code: Code, wish: &Wish, r: &mut Random) -> Option<Vec<u8>> {
    let info = code.op_code();
    let mut i = Instruction::default();
    i.set_code(code);
    for k in 0..info.op_count() {
        operand(&mut i, k, info.op_kind(k), wish, r)?;
    }
    let lockable = info.can_use_lock_prefix() && i.op0_kind() == OpKind::Memory;
    i.set_has_lock_prefix(lockable && r.one_in(3));
    if info.can_use_rep_prefix() && r.one_in(2) {
        i.set_has_rep_prefix(true);
    } else if info.can_use_repne_prefix() && r.one_in(2) {
        i.set_has_repne_prefix(true);
    }
    let mut encoder = Encoder::new(wish.mode.bits());
    encoder.encode(&i, wish.rip).ok()?;
    Some(encoder.take_buffer())
}

fn operand(i: &mut Instruction, k: u32, kind: Kind, wish: &Wish, r: &mut Random) -> Option<()> {
    use Kind::*;
    let long = wish.mode == Mode::Bits64;
    let wide = if long { 16 } else { 8 };
    let is_rm = matches!(kind, r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem | mm_or_mem | xmm_or_mem | ymm_or_mem);
    if matches!(kind, mem_vsib32x | mem_vsib64x | mem_vsib32y | mem_vsib64y) {
        let first = if matches!(kind, mem_vsib32x | mem_vsib64x) { Register::XMM0 } else { Register::YMM0 };
        i.set_op_kind(k, OpKind::Memory);
        i.set_memory_base(if long { Register::RAX } else { Register::EAX } + r.below(wide) as u32);
        i.set_memory_index(first + r.below(wide) as u32);
        i.set_memory_index_scale(1 << r.below(4));
        displacement(i, r, if long { 8 } else { 4 });
        return Some(());
    }
    if matches!(kind, mem | mem_mib) || is_rm && r.one_in(2) {
        memory(i, k, wish, r);
        return Some(());
    }
    let pick = |first: Register, count: u64, r: &mut Random| Some(first + r.below(count) as u32);
    let register = match kind {
        r8_or_mem | r8_reg | r8_opcode => pick(Register::AL, if long { 20 } else { 8 }, r),
        r16_or_mem | r16_reg | r16_rm | r16_opcode => pick(Register::AX, wide, r),
        r32_or_mem | r32_reg | r32_rm | r32_opcode | r32_vvvv => pick(Register::EAX, wide, r),
        r64_or_mem | r64_reg | r64_rm | r64_opcode | r64_vvvv => pick(Register::RAX, wide, r),
        mm_or_mem | mm_reg | mm_rm => pick(Register::MM0, 8, r),
        xmm_or_mem | xmm_reg | xmm_rm | xmm_vvvv | xmm_is4 => pick(Register::XMM0, wide, r),
        ymm_or_mem | ymm_reg | ymm_rm | ymm_vvvv | ymm_is4 => pick(Register::YMM0, wide, r),
        seg_reg => Some(r.pick(&[Register::ES, Register::CS, Register::SS, Register::DS, Register::GS])),
        cr_reg => Some(Register::CR0),
        dr_reg => Some(Register::DR0),
        es => Some(Register::ES),
        cs => Some(Register::CS),
        ss => Some(Register::SS),
        ds => Some(Register::DS),
        gs => Some(Register::GS),
        al => Some(Register::AL),
        cl => Some(Register::CL),
        ax => Some(Register::AX),
        dx => Some(Register::DX),
        eax => Some(Register::EAX),
        rax => Some(Register::RAX),
        st0 => Some(Register::ST0),
        sti_opcode => pick(Register::ST0, 8, r),
        _ => Option::None,
    };
    if let Some(register) = register {
        i.set_op_kind(k, OpKind::Register);
        i.set_op_register(k, register);
        return Some(());
    }
    if immediate(i, k, kind, r) || implied(i, k, kind, wish, r) {
        return Some(());
    }
    branch(i, k, kind, wish, r).then_some(())
}

fn immediate(i: &mut Instruction, k: u32, kind: Kind, r: &mut Random) -> bool {
    let value = r.operand();
    match kind {
        Kind::imm8 if k > 0 && i.op_kind(k - 1) != OpKind::Register && i.op_kind(k - 1) != OpKind::Memory => {
            i.set_op_kind(k, OpKind::Immediate8_2nd);
            i.set_immediate8_2nd(if r.one_in(2) { r.below(4) as u8 } else { value as u8 });
        }
        Kind::imm8 => {
            i.set_op_kind(k, OpKind::Immediate8);
            i.set_immediate8(value as u8);
        }
        Kind::imm8_const_1 => {
            i.set_op_kind(k, OpKind::Immediate8);
            i.set_immediate8(1);
        }
        Kind::imm8sex16 => {
            i.set_op_kind(k, OpKind::Immediate8to16);
            i.set_immediate8to16(i16::from(value as i8));
        }
        Kind::imm8sex32 => {
            i.set_op_kind(k, OpKind::Immediate8to32);
            i.set_immediate8to32(i32::from(value as i8));
        }
        Kind::imm8sex64 => {
            i.set_op_kind(k, OpKind::Immediate8to64);
            i.set_immediate8to64(i64::from(value as i8));
        }
        Kind::imm16 => {
            i.set_op_kind(k, OpKind::Immediate16);
            i.set_immediate16(value as u16);
        }
        Kind::imm32 => {
            i.set_op_kind(k, OpKind::Immediate32);
            i.set_immediate32(value as u32);
        }
        Kind::imm32sex64 => {
            i.set_op_kind(k, OpKind::Immediate32to64);
            i.set_immediate32to64(i64::from(value as i32));
        }
        Kind::imm64 => {
            i.set_op_kind(k, OpKind::Immediate64);
            i.set_immediate64(value);
        }
        _ => return false,
    }
    true
}

/// Memory operands that the instruction implies, and absolute ones.
fn implied(i: &mut Instruction, k: u32, kind: Kind, wish: &Wish, r: &mut Random) -> bool {
    use OpKind::{
        MemoryESDI, MemoryESEDI, MemoryESRDI, MemorySegDI, MemorySegEDI, MemorySegESI, MemorySegRDI, MemorySegRSI,
        MemorySegSI,
    };
    // Address sizes that the mode has: its own, and the one the prefix gives.
    let (si, di, es_di, size) = match (wish.mode, r.one_in(4)) {
        (Mode::Bits16, false) | (Mode::Bits32, true) => (MemorySegSI, MemorySegDI, MemoryESDI, 2),
        (Mode::Bits64, false) => (MemorySegRSI, MemorySegRDI, MemoryESRDI, 8),
        _ => (MemorySegESI, MemorySegEDI, MemoryESEDI, 4),
    };
    // Both operands of a string instruction have one address size.
    let before = (k > 0).then(|| i.op_kind(k - 1));
    let same = |ours: OpKind, of: [OpKind; 3]| match before {
        Some(MemorySegSI | MemoryESDI) => of[0],
        Some(MemorySegESI | MemoryESEDI) => of[1],
        Some(MemorySegRSI | MemoryESRDI) => of[2],
        _ => ours,
    };
    match kind {
        Kind::seg_rSI => i.set_op_kind(k, same(si, [MemorySegSI, MemorySegESI, MemorySegRSI])),
        Kind::es_rDI => i.set_op_kind(k, same(es_di, [MemoryESDI, MemoryESEDI, MemoryESRDI])),
        Kind::seg_rDI => i.set_op_kind(k, di),
        Kind::seg_rBX_al => {
            i.set_op_kind(k, OpKind::Memory);
            i.set_memory_index(Register::AL);
            i.set_memory_base(match size {
                2 => Register::BX,
                4 => Register::EBX,
                _ => Register::RBX,
            });
        }
        Kind::mem_offs => {
            i.set_op_kind(k, OpKind::Memory);
            segment(i, wish, r);
            i.set_memory_displ_size(size);
            let offset = wish.offset(i);
            i.set_memory_displacement64(if size == 2 { offset & 0xffff } else { offset });
            return true;
        }
        _ => return false,
    }
    if i.op_kind(k) != MemoryESDI && i.op_kind(k) != MemoryESEDI && i.op_kind(k) != MemoryESRDI {
        segment(i, wish, r);
    }
    true
}

/// GS, whose base and limit are its own, or a segment that changes nothing but SS's faults.
fn segment(i: &mut Instruction, wish: &Wish, r: &mut Random) {
    match r.below(12) {
        0 => i.set_segment_prefix(Register::GS),
        1 if wish.mode != Mode::Bits64 => i.set_segment_prefix(r.pick(&[Register::ES, Register::SS])),
        _ => {}
    }
}

fn branch(i: &mut Instruction, k: u32, kind: Kind, wish: &Wish, r: &mut Random) -> bool {
    if matches!(kind, Kind::farbr2_2 | Kind::farbr4_2) {
        i.set_op_kind(k, if kind == Kind::farbr2_2 { OpKind::FarBranch16 } else { OpKind::FarBranch32 });
        i.set_far_branch_selector(selectors::random(r));
        i.set_far_branch16(near_offset(r) as u16);
        if kind == Kind::farbr4_2 {
            i.set_far_branch32(near_offset(r) as u32);
        }
        return true;
    }
    let near = wish.rip.wrapping_add(r.below(200)).wrapping_sub(90);
    let far = wish.rip.wrapping_add(r.next() as i32 as u64 >> 1);
    match kind {
        Kind::br16_1 | Kind::br16_2 => {
            i.set_op_kind(k, OpKind::NearBranch16);
            i.set_near_branch16(if kind == Kind::br16_1 { near } else { r.next() } as u16);
        }
        Kind::br32_1 | Kind::br32_4 => {
            i.set_op_kind(k, OpKind::NearBranch32);
            i.set_near_branch32(if kind == Kind::br32_1 { near } else { far } as u32);
        }
        Kind::br64_1 | Kind::br64_4 => {
            i.set_op_kind(k, OpKind::NearBranch64);
            i.set_near_branch64(if kind == Kind::br64_1 { near } else { far });
        }
        _ => return false,
    }
    true
}

/// A far target: within a small segment or not.
fn near_offset(r: &mut Random) -> u64 {
    if r.one_in(3) { r.operand() } else { r.below(0x1800) }
}

fn memory(i: &mut Instruction, k: u32, wish: &Wish, r: &mut Random) {
    i.set_op_kind(k, OpKind::Memory);
    segment(i, wish, r);
    // Address size: usually the mode's own.
    match (wish.mode, r.one_in(5)) {
        (Mode::Bits16, false) => memory16(i, wish, r),
        (Mode::Bits32, true) => {
            // A 16-bit offset reaches the window only through GS.
            i.set_segment_prefix(Register::GS);
            memory16(i, wish, r);
        }
        (Mode::Bits64, false) => memory_wide(i, wish, r, Register::RAX, 16),
        (Mode::Bits64, true) => memory_wide(i, wish, r, Register::EAX, 16),
        _ => memory_wide(i, wish, r, Register::EAX, 8),
    }
}

fn memory16(i: &mut Instruction, wish: &Wish, r: &mut Random) {
    use Register::{BP, BX, DI, None, SI};
    let (base, index) =
        r.pick(&[(BX, SI), (BX, DI), (BP, SI), (BP, DI), (SI, None), (DI, None), (BP, None), (BX, None), (None, None)]);
    i.set_memory_base(base);
    i.set_memory_index(index);
    if base == None {
        i.set_memory_displ_size(2);
        i.set_memory_displacement64(wish.offset(i) & 0xffff);
    } else {
        displacement(i, r, 2);
    }
}

fn displacement(i: &mut Instruction, r: &mut Random, wide: u32) {
    match r.below(3) {
        0 => i.set_memory_displ_size(0),
        1 => {
            i.set_memory_displ_size(1);
            i.set_memory_displacement64(r.next() as i8 as u64);
        }
        _ => {
            i.set_memory_displ_size(wide);
            let value = r.next() as i32;
            let masked = match wide {
                2 => u64::from(value as u16),
                4 => u64::from(value as u32),
                _ => i64::from(value) as u64,
            };
            i.set_memory_displacement64(masked);
        }
    }
}

fn memory_wide(i: &mut Instruction, wish: &Wish, r: &mut Random, first: Register, count: u64) {
    let wide = if first == Register::RAX { 8 } else { 4 };
    let form = r.below(10);
    if form == 0 {
        i.set_memory_displ_size(wide);
        i.set_memory_displacement64(wish.offset(i));
        if wish.mode == Mode::Bits64 && r.one_in(2) {
            i.set_memory_base(if wide == 8 { Register::RIP } else { Register::EIP });
        }
        return;
    }
    i.set_memory_base(first + r.below(count) as u32);
    if form > 5 {
        let index = r.below(count) as u32;
        if index != 4 {
            i.set_memory_index(first + index);
            i.set_memory_index_scale(1 << r.below(4));
        }
    }
    displacement(i, r, wide);
}
