//! Which operations of a block become host code, in what way, and which status flags anything can look at.

use crate::bit_tests::is_in_string;
use crate::bits::Bits;
use crate::groups::Groups;
use crate::mechanisms::{Mechanism, Mechanisms};
use crate::recipes::Recipe;
use crate::strings::Repeated;
use crate::system::System;
use crate::turns::Turn;
use crate::{vector, x87};
use iced_x86::{
    Code, ConditionCode, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic as M, OpAccess, OpKind,
    Register, UsedRegister,
};
use umbra_arch::segment::Seg;
use umbra_cpu::decode::register_index;
use umbra_cpu::op::Op;

/// How an operation is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// By its function.
    Helper,
    /// Nothing at all.
    Nop,
    /// The guest's instruction with other registers; it writes no flags.
    Move,
    /// Likewise, and the host's flags are the guest's afterwards.
    Arithmetic,
    /// Likewise, flags are written in a way that the host's needn't follow, and nothing looks at them.
    Silent,
    /// A shift by a constant, 1 to less than the width.
    Shift(ShiftKind),
    /// Another shift or rotate, its flags being looked at.
    Turn(Turn),
    /// IMUL with two or three operands.
    Imul,
    /// MUL, or IMUL with one operand.
    Multiply,
    /// DIV, or IDIV if signed.
    Divide {
        signed: bool,
    },
    /// BT and relatives: CF alone changes.
    BitTest,
    /// Likewise, of a string in memory.
    BitString,
    /// CBW's and CWD's families.
    Extend,
    /// XCHG.
    Exchange,
    /// CMPXCHG of 4 or 8 bytes in memory.
    CompareExchange,
    /// CMPXCHG16B.
    CompareExchange16,
    /// Bit scans, counts and fields.
    Bits(Bits),
    /// SSE or AVX.
    Vector,
    /// x87.
    X87,
    /// MOVS or STOS with REP.
    Repeated(Repeated),
    System(System),
    Push,
    Pop,
    Leave,
    Jcc,
    Jmp,
    JmpIndirect,
    Call,
    CallIndirect,
    Ret,
}

/// What a shift does to OF.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShiftKind {
    Left,
    Right,
    Arithmetic,
}

impl ShiftKind {
    /// What says so in the ModRM byte.
    pub const fn extension(self) -> u8 {
        match self {
            Self::Left => 4,
            Self::Right => 5,
            Self::Arithmetic => 7,
        }
    }
}

impl Kind {
    /// Whether it is the last of its block and goes on by itself.
    pub fn is_branch(self) -> bool {
        let near =
            matches!(self, Kind::Jcc | Kind::Jmp | Kind::JmpIndirect | Kind::Call | Kind::CallIndirect | Kind::Ret);
        near || matches!(self, Kind::System(system) if system.is_branch())
    }

    /// Whether it can't be had without these mechanisms.
    fn needs(self, i: &Instruction, off: Mechanisms) -> bool {
        off.has(Mechanism::Native)
            || off.has(Mechanism::Vectors) && self == Kind::Vector
            || off.has(Mechanism::X87) && self == Kind::X87
            || off.has(Mechanism::Views) && matches!(self, Kind::System(system) if system.changes_view())
            || off.has(Mechanism::Strings) && matches!(self, Kind::Repeated(_))
            || off.has(Mechanism::Memory) && self.accesses_memory(i)
    }

    /// Whether its host code may fault: nothing but scratch registers and the host's flags has changed when it accesses memory.
    pub fn may_fault(self) -> bool {
        let data = matches!(self, Kind::Move | Kind::Arithmetic | Kind::Silent | Kind::Imul | Kind::Multiply);
        let stack = matches!(self, Kind::Push | Kind::Pop | Kind::Leave | Kind::Call | Kind::Ret);
        data || stack || matches!(self, Kind::Vector | Kind::JmpIndirect | Kind::CallIndirect | Kind::Divide { .. })
    }

    /// Whether a region that its first access has found its base register in is known behind it, however it is done.
    pub fn finds_region(self) -> bool {
        matches!(self, Kind::Move | Kind::Arithmetic | Kind::Silent | Kind::Imul | Kind::Push | Kind::Pop | Kind::Leave)
    }

    /// Whether its host code may have to leave it to its function.
    pub fn may_give_up(self, i: &Instruction) -> bool {
        let data = matches!(self, Kind::Move | Kind::Arithmetic | Kind::Silent | Kind::Shift(_) | Kind::Imul);
        let plain = data || matches!(self, Kind::Extend | Kind::Nop | Kind::Jcc | Kind::Jmp);
        !plain || self.accesses_memory(i)
    }

    /// Whether it may miss.
    pub fn accesses_memory(self, i: &Instruction) -> bool {
        match self {
            Kind::Push | Kind::Pop | Kind::Leave | Kind::Call | Kind::CallIndirect | Kind::Ret => true,
            Kind::Nop => false,
            Kind::System(_) | Kind::Repeated(_) => true,
            _ => has_memory(i) && i.mnemonic() != M::Lea,
        }
    }
}

/// What is done with one operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    pub kind: Kind,
    /// Its flags can be looked at.
    pub live: bool,
    /// How its slow path gets the flags that are there before it, if they aren't saved.
    pub recipe: Option<Recipe>,
    /// What its recipe is made from is to be kept.
    pub keeps: bool,
    /// Its flags are in the host's when the branch behind it is done, and saved only where that leaves the trace.
    pub unsaved: bool,
}

impl Step {
    /// By its function, with flags that can be looked at.
    pub const HELPER: Self = Self { kind: Kind::Helper, live: true, recipe: None, keeps: false, unsaved: false };
}

/// Whether an instruction has a memory operand.
pub fn has_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
}

/// Plans a block without the mechanisms that are `off`, last operation first. Flags are live at its end and before
/// everything that can leave it. `steps` are all by their functions before.
pub fn plan(instructions: &[Instruction], ops: &[Op], off: Mechanisms, steps: &mut [Step]) {
    let mut live = true;
    for (at, i) in instructions.iter().enumerate().rev() {
        live |= off.has(Mechanism::Flags);
        let kind = Some(kind(i, &ops[at], live)).filter(|kind| !kind.needs(i, off)).unwrap_or(Kind::Helper);
        steps[at] = Step { kind, live, ..Step::HELPER };
        live = live_before(i, kind, kind.accesses_memory(i), live);
    }
}

/// Accesses that a group covers can't leave the block: fewer flags are live.
pub fn regard_groups(steps: &mut [Step], instructions: &[Instruction], groups: &Groups, off: Mechanisms) {
    let mut live = true;
    for (at, (i, step)) in instructions.iter().zip(steps).enumerate().rev() {
        step.live = live || off.has(Mechanism::Flags);
        live = live_before(i, step.kind, step.kind.accesses_memory(i) && !groups.cover(at), step.live);
    }
}

/// Whether flags are live before an instruction, by whether it `can_miss` memory and whether they are live behind it.
fn live_before(i: &Instruction, kind: Kind, can_miss: bool, live: bool) -> bool {
    let observes = kind == Kind::Helper || can_miss || matches!(kind, Kind::Divide { .. });
    let kills = writes_all_flags(kind) || kind == Kind::Vector && vector::writes_flags(i);
    // Vector or x87 registers may be forbidden.
    let observes = observes || matches!(kind, Kind::Vector | Kind::X87);
    observes || reads_flags(i) || live && !kills
}

/// Whether all status flags are written, those before it forgotten.
pub fn writes_all_flags(kind: Kind) -> bool {
    let bits = if let Kind::Bits(bits) = kind { bits.writes_all() } else { false };
    bits || matches!(kind, Kind::Arithmetic | Kind::Shift(_) | Kind::Imul | Kind::Multiply | Kind::CompareExchange)
}

/// The general registers that an instruction may write.
pub fn written_registers(i: &Instruction, info: &mut InstructionInfoFactory) -> impl Iterator<Item = u8> {
    let mut left = written_first(i).unwrap_or_else(|| written(i, info));
    std::iter::from_fn(move || {
        let register = left.checked_sub(1).map(|_| left.trailing_zeros() as u8);
        left &= left.wrapping_sub(1);
        register
    })
}

/// Likewise, by bits, as `info` has it.
fn written(i: &Instruction, info: &mut InstructionInfoFactory) -> u16 {
    let written = |used: &&UsedRegister| !matches!(used.access(), OpAccess::None | OpAccess::Read | OpAccess::CondRead);
    let used = info.info_options(i, InstructionInfoOptions::NO_MEMORY_USAGE).used_registers();
    let registers = used.iter().filter(written).map(|used| used.register().full_register());
    registers.filter(|register| register.is_gpr()).fold(0, |set, register| set | 1 << register_index(register))
}

/// Likewise of the instructions that there are most of, which write their first operand at most: without asking.
pub fn written_first(i: &Instruction) -> Option<u16> {
    let writes = match i.mnemonic() {
        M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Lea | M::Not | M::Neg | M::Inc | M::Dec => true,
        M::Add | M::Sub | M::And | M::Or | M::Xor | M::Adc | M::Sbb | M::Shl | M::Shr | M::Sar => true,
        M::Movups | M::Movaps | M::Movdqu | M::Movdqa | M::Movd | M::Movq | M::Pxor => true,
        M::Cmp | M::Test | M::Bt | M::Nop | M::Jmp => false,
        _ if i.is_jcc_short_or_near() => false,
        _ if is_setcc_or_cmovcc(i) => true,
        _ => return None,
    };
    let first = Some(i.op0_register()).filter(|first| writes && i.op0_kind() == OpKind::Register && first.is_gpr());
    Some(first.map_or(0, |first| 1 << register_index(first.full_register())))
}

/// Whether it reads flags; INC and DEC keep CF.
pub fn reads_flags(i: &Instruction) -> bool {
    let reads = matches!(i.mnemonic(), M::Adc | M::Sbb | M::Inc | M::Dec);
    reads || i.condition_code() != ConditionCode::None || x87::reads_flags(i)
}

fn kind(i: &Instruction, op: &Op, live: bool) -> Kind {
    let kind = any_kind(i, op, live);
    let renamed = matches!(kind, Kind::Move | Kind::Arithmetic) && i.mnemonic() != M::Xadd;
    if renamed || !has_high_byte(i) { kind } else { Kind::Helper }
}

fn any_kind(i: &Instruction, op: &Op, live: bool) -> Kind {
    if op.row == u16::MAX {
        return Kind::Helper;
    }
    if is_plain(i) && operands_fit(i, op) { data(i, live, slot(op)) } else { other_kind(i, op, live) }
}

/// What there is most of, and nothing else with general registers and memory.
fn is_plain(i: &Instruction) -> bool {
    let moves = matches!(i.mnemonic(), M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Lea | M::Push | M::Pop | M::Call);
    let counts = matches!(i.mnemonic(), M::Add | M::Sub | M::Cmp | M::And | M::Or | M::Xor | M::Test | M::Inc | M::Dec);
    moves || counts || matches!(i.mnemonic(), M::Shl | M::Shr | M::Sar | M::Jmp | M::Ret) || i.is_jcc_short_or_near()
}

fn other_kind(i: &Instruction, op: &Op, live: bool) -> Kind {
    // 32-bit code has eight vector registers: the others stay as they are.
    let all = op.legacy && matches!(i.mnemonic(), M::Vzeroupper | M::Vzeroall);
    if vector::fits(i) && !all && (!has_memory(i) || address_fits(i, op)) {
        return Kind::Vector;
    }
    if x87::fits(i) && (!has_memory(i) || address_fits(i, op)) {
        return Kind::X87;
    }
    if let Some(repeated) = Repeated::of(i, op) {
        return Kind::Repeated(repeated);
    }
    let fits = |system: &System| (!has_memory(i) || address_fits(i, op)) && (!op.legacy || system.is_narrow());
    if let Some(system) = System::of(i).filter(fits) {
        return Kind::System(system);
    }
    if is_nop(i) {
        return Kind::Nop;
    }
    if !operands_fit(i, op) {
        return Kind::Helper;
    }
    if let Some(bits) = Bits::of(i) {
        return Kind::Bits(bits);
    }
    data(i, live, slot(op))
}

/// Bytes of what CALL pushes.
pub fn slot(op: &Op) -> u32 {
    if op.legacy { 4 } else { 8 }
}

/// `slot` is the width of what CALL pushes.
fn data(i: &Instruction, live: bool, slot: u32) -> Kind {
    match i.mnemonic() {
        M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Not => Kind::Move,
        M::Bswap | M::Lea if width(i) >= 4 => Kind::Move,
        M::Add | M::Sub | M::Cmp | M::Neg | M::And | M::Or | M::Xor | M::Test => Kind::Arithmetic,
        M::Adc | M::Sbb | M::Inc | M::Dec => Kind::Arithmetic,
        M::Shl | M::Sal => shift(i, ShiftKind::Left, live),
        M::Shr => shift(i, ShiftKind::Right, live),
        M::Sar => shift(i, ShiftKind::Arithmetic, live),
        M::Rol | M::Ror => turn(i, live),
        M::Shld | M::Shrd if width(i) >= 4 => turn(i, live),
        M::Imul if i.op_count() > 1 => Kind::Imul,
        M::Mul | M::Imul if width(i) >= 4 => Kind::Multiply,
        M::Div if width(i) >= 4 => Kind::Divide { signed: false },
        M::Idiv if width(i) >= 4 => Kind::Divide { signed: true },
        M::Bt | M::Bts | M::Btr | M::Btc if !has_memory(i) || i.op1_kind() != OpKind::Register => Kind::BitTest,
        M::Bt | M::Bts | M::Btr | M::Btc if is_in_string(i) => Kind::BitString,
        M::Cdqe | M::Cwde | M::Cdq | M::Cqo => Kind::Extend,
        M::Xchg => Kind::Exchange,
        M::Popcnt if is_x86_feature_detected!("popcnt") => Kind::Arithmetic,
        M::Movbe if is_x86_feature_detected!("movbe") => Kind::Move,
        M::Xadd => Kind::Arithmetic,
        M::Cmpxchg if has_memory(i) && width(i) >= 4 => Kind::CompareExchange,
        M::Cmpxchg16b => Kind::CompareExchange16,
        M::Push if pushes(i, slot) => Kind::Push,
        M::Pop if i.op0_kind() == OpKind::Register && i.op0_register().is_gpr() && width(i) == slot => Kind::Pop,
        M::Leave if matches!((i.code(), slot), (Code::Leaveq, 8) | (Code::Leaved, 4)) => Kind::Leave,
        _ => branch(i, slot),
    }
}

/// Nothing happens, whatever the operand.
fn is_nop(i: &Instruction) -> bool {
    let nop = matches!(i.mnemonic(), M::Nop | M::Endbr64 | M::Endbr32 | M::Reservednop);
    let prefetch =
        matches!(i.mnemonic(), M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchnta | M::Prefetchw);
    nop || prefetch || matches!(i.mnemonic(), M::Lfence | M::Mfence | M::Sfence)
}

fn branch(i: &Instruction, slot: u32) -> Kind {
    let kind = if slot == 8 { OpKind::NearBranch64 } else { OpKind::NearBranch32 };
    let near = i.op_count() == 1 && i.op0_kind() == kind;
    let indirect = i.is_jmp_near_indirect() || i.is_call_near_indirect();
    match i.mnemonic() {
        M::Jmp if near => Kind::Jmp,
        M::Call if near => Kind::Call,
        M::Jmp if indirect && width(i) == slot => Kind::JmpIndirect,
        M::Call if indirect && width(i) == slot => Kind::CallIndirect,
        M::Ret if slot == 8 && matches!(i.code(), Code::Retnq | Code::Retnq_imm16) => Kind::Ret,
        M::Ret if slot == 4 && matches!(i.code(), Code::Retnd | Code::Retnd_imm16) => Kind::Ret,
        _ if i.is_jcc_short_or_near() && near => Kind::Jcc,
        _ if is_setcc_or_cmovcc(i) => Kind::Move,
        _ => Kind::Helper,
    }
}

fn is_setcc_or_cmovcc(i: &Instruction) -> bool {
    let conditional = i.condition_code() != ConditionCode::None;
    conditional && i.op_count() < 3 && !i.is_jcc_short_or_near() && !i.is_loopcc()
}

/// Width in bytes of the first operand.
pub fn width(i: &Instruction) -> u32 {
    if i.op0_kind() == OpKind::Register { i.op0_register().size() as u32 } else { i.memory_size().size() as u32 }
}

fn pushes(i: &Instruction, slot: u32) -> bool {
    let operand = match i.op0_kind() {
        OpKind::Register => i.op0_register().is_gpr(),
        _ => true,
    };
    operand && i.stack_pointer_increment() == -(slot as i32)
}

/// Shifts by CL may leave flags alone, and those beyond the width have other rules.
fn shift(i: &Instruction, kind: ShiftKind, live: bool) -> Kind {
    let bits = width(i) * 8;
    let constant = i.op1_kind() == OpKind::Immediate8;
    let count = if constant { u32::from(i.immediate8()) & if bits == 64 { 63 } else { 31 } } else { 0 };
    if constant && count > 0 && count < bits {
        return Kind::Shift(kind);
    }
    turn(i, live)
}

fn turn(i: &Instruction, live: bool) -> Kind {
    match Turn::of(i) {
        _ if !live => Kind::Silent,
        Some(turn) => Kind::Turn(turn),
        None => Kind::Helper,
    }
}

/// Whether the operands are general registers that can be renamed, immediates, and an ordinary address.
fn operands_fit(i: &Instruction, op: &Op) -> bool {
    let registers = (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register).map(|n| i.op_register(n));
    registers.into_iter().all(|r| r.is_gpr()) && (!has_memory(i) || address_fits(i, op))
}

fn has_high_byte(i: &Instruction) -> bool {
    let high = |r| matches!(r, Register::AH | Register::CH | Register::DH | Register::BH);
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && high(i.op_register(n)))
}

fn address_fits(i: &Instruction, op: &Op) -> bool {
    let absolute = op.base == umbra_cpu::op::NO_REG && op.index == umbra_cpu::op::NO_REG;
    let index = i.memory_index();
    let plain = index == Register::None || index.is_gpr();
    if op.legacy {
        // Through CS it may be refused.
        return op.ea_mask == 0xffff_ffff && plain && op.seg != Seg::Cs as u8;
    }
    op.ea_mask == u64::MAX && plain && (absolute || i32::try_from(op.disp as i64).is_ok())
}

#[cfg(test)]
mod tests {
    use super::{written, written_first};
    use iced_x86::{Code, Decoder, DecoderOptions, InstructionInfoFactory};
    use std::collections::HashSet;

    /// Every opcode of one and two bytes, with prefixes, with operands in registers and in memory.
    #[test]
    fn registers_are_known_without_asking() {
        let mut info = InstructionInfoFactory::new();
        let mut codes: HashSet<Code> = HashSet::new();
        for prefix in [&[][..], &[0x66], &[0x48], &[0x4d], &[0x67], &[0xf3], &[0xf2], &[0x66, 0x48], &[0xf0]] {
            for (opcode, modrm) in (0..0x200u32).flat_map(|opcode| (0..=255u8).map(move |modrm| (opcode, modrm))) {
                let mut bytes = prefix.to_vec();
                bytes.extend((opcode > 0xff).then_some(0x0f));
                bytes.extend([opcode as u8, modrm, 0x21, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
                let i = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE).decode();
                if let Some(set) = written_first(&i).filter(|_| !i.is_invalid()) {
                    assert_eq!(set, written(&i, &mut info), "{i} ({bytes:02x?})");
                    codes.insert(i.code());
                }
            }
        }
        assert!(codes.len() > 250, "only {} forms", codes.len());
    }
}
