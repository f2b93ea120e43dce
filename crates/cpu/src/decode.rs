//! From guest bytes to [`Op`]s: iced-x86 decodes, the row of the instruction selects the function.

use crate::core::CodeSize;
use crate::isa;
use crate::op::{CODE_BASE, HIGH_BYTE, NO_REG, Op};
use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, OpKind, Register};
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::segment::Seg;

/// Where an operand is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loc {
    /// No such operand.
    None,
    /// A general register.
    Reg,
    /// The memory operand.
    Mem,
    /// An immediate.
    Imm,
    /// A branch target.
    Near,
    /// Anything else: segment, control, vector registers, implied string operands ...
    Other,
}

/// What a row's selector sees of an instruction.
pub struct Form<'a> {
    /// The whole instruction.
    pub i: &'a Instruction,
    /// Code size it was decoded for.
    pub size: CodeSize,
    /// Bytes of the first operand.
    pub bytes: u64,
    /// Bytes of the second operand.
    pub src_bytes: u64,
    /// The first operand.
    pub dst: Loc,
    /// The second operand.
    pub src: Loc,
    /// What the guest's CPU offers.
    pub profile: &'a CpuidProfile,
    /// Executor of host instructions, for rows that prepare stubs.
    pub host: &'a mut umbra_hostexec::HostExec,
    /// What the row wants in [`Op::aux`].
    pub aux: u64,
}

/// Why no instruction could be decoded from the bytes given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DecodeError {
    /// The bytes end in the middle of an instruction: fetch more.
    More,
    /// An invalid encoding: #UD.
    Invalid,
    /// More than 15 bytes: #GP(0).
    TooLong,
}

/// An instruction decoded and resolved.
pub struct Decoded {
    /// The operation; `start`, `prefix` are the block's business.
    pub op: Op,
    /// Whether it ends its block.
    pub ends: isa::Ends,
}

/// Decodes the first instruction in `bytes` at `rip`, counted from [`CODE_BASE`]. `at_end`: no more bytes can follow
/// (15 or more were given, or the next page is absent).
///
/// # Errors
/// See [`DecodeError`].
pub fn decode(bytes: &[u8], rip: u64, size: CodeSize) -> Result<Instruction, DecodeError> {
    let mut decoder = Decoder::with_ip(size as u32, bytes, rip, DecoderOptions::NONE);
    let i = decoder.decode();
    if i.code() == Code::Pause {
        // With REX.B it isn't PAUSE but XCHG of EAX and R8D.
        return Ok(Decoder::with_ip(size as u32, bytes, rip, DecoderOptions::NO_PAUSE).decode());
    }
    if !i.is_invalid() {
        return Ok(i);
    }
    match decoder.last_error() {
        DecoderError::NoMoreBytes if bytes.len() < 15 => Err(DecodeError::More),
        DecoderError::NoMoreBytes => Err(DecodeError::TooLong),
        _ if is_too_long(bytes, rip, size) => Err(DecodeError::TooLong),
        _ => Err(DecodeError::Invalid),
    }
}

/// As [`decode`] for the instruction that `decoder` is at, which `bytes` begin with: making a decoder takes as long as
/// decoding.
pub(crate) fn decode_next(
    decoder: &mut Decoder<'_>,
    bytes: &[u8],
    rip: u64,
    size: CodeSize,
) -> Result<Instruction, DecodeError> {
    let i = decoder.decode();
    if i.is_invalid() || i.code() == Code::Pause { decode(bytes, rip, size) } else { Ok(i) }
}

/// Whether `bytes` would be an instruction but for a legacy prefix that makes it longer than 15 bytes.
fn is_too_long(bytes: &[u8], rip: u64, size: CodeSize) -> bool {
    let [0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf2 | 0xf3, rest @ ..] = bytes else { return false };
    match decode(rest, rip.wrapping_add(1), size) {
        Ok(i) => i.len() == 15,
        Err(error) => error == DecodeError::TooLong,
    }
}

/// Resolves a decoded instruction to an operation.
pub fn resolve(
    i: &Instruction,
    size: CodeSize,
    profile: &CpuidProfile,
    host: &mut umbra_hostexec::HostExec,
) -> Decoded {
    let mut op = Op { imm: immediate(i), len: i.len() as u8, legacy: size != CodeSize::Bits64, ..isa::invalid_op() };
    memory_operand(i, size, &mut op);
    let (dst, src) = (loc(i, 0), loc(i, 1));
    op.dst = register(i, 0);
    op.src = register(i, 1);
    let mut form = Form { i, size, bytes: bytes(i, 0), src_bytes: bytes(i, 1), dst, src, profile, host, aux: 0 };
    let lock_is_wrong = i.has_lock_prefix() && dst != Loc::Mem;
    let row = if lock_is_wrong { None } else { isa::row_of(i.code()) };
    let offered = row.filter(|(_, row)| row.needs.is_none_or(|feature| profile.has(feature)));
    let Some((index, row)) = offered else {
        return Decoded { op, ends: isa::Ends::Block };
    };
    match (row.select)(&mut form) {
        Some(exec) => {
            let aux = form.aux;
            Decoded { op: Op { exec, row: index, aux, ..op }, ends: row.ends }
        }
        None => Decoded { op, ends: isa::Ends::Block },
    }
}

fn loc(i: &Instruction, n: u32) -> Loc {
    if n >= i.op_count() {
        return Loc::None;
    }
    match i.op_kind(n) {
        OpKind::Register if i.op_register(n).is_gpr() => Loc::Reg,
        OpKind::Register => Loc::Other,
        OpKind::Memory => Loc::Mem,
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => Loc::Near,
        OpKind::Immediate8
        | OpKind::Immediate8_2nd
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Loc::Imm,
        _ => Loc::Other,
    }
}

fn bytes(i: &Instruction, n: u32) -> u64 {
    if n >= i.op_count() {
        return 0;
    }
    match i.op_kind(n) {
        OpKind::Register => i.op_register(n).size() as u64,
        OpKind::Memory => i.memory_size().size() as u64,
        OpKind::Immediate8 | OpKind::Immediate8_2nd => 1,
        OpKind::Immediate16 | OpKind::Immediate8to16 => 2,
        OpKind::Immediate32 | OpKind::Immediate8to32 => 4,
        OpKind::Immediate64 | OpKind::Immediate8to64 | OpKind::Immediate32to64 => 8,
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        _ => i.memory_size().size() as u64,
    }
}

/// Index of a general register as operations keep it.
pub fn register_index(r: Register) -> u8 {
    match r {
        Register::AH | Register::CH | Register::DH | Register::BH => HIGH_BYTE | (r as u8 - Register::AH as u8),
        _ if r.is_gpr() => r.full_register().number() as u8,
        _ if r.is_xmm() || r.is_ymm() || r.is_mm() || r.is_st() => r.number() as u8,
        _ if r.is_segment_register() => r.number() as u8,
        _ if r.is_cr() || r.is_dr() => r.number() as u8,
        _ => NO_REG,
    }
}

fn register(i: &Instruction, n: u32) -> u8 {
    if n < i.op_count() && i.op_kind(n) == OpKind::Register { register_index(i.op_register(n)) } else { NO_REG }
}

fn immediate(i: &Instruction) -> u64 {
    let branch = (0..i.op_count())
        .any(|n| matches!(i.op_kind(n), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64));
    if branch {
        // Sign-extended, as it counts from a page.
        return if i.op0_kind() == OpKind::NearBranch32 {
            i.near_branch32() as i32 as u64
        } else {
            i.near_branch_target()
        };
    }
    (0..i.op_count()).find(|&n| loc(i, n) == Loc::Imm).map_or(0, |n| i.immediate(n))
}

fn memory_operand(i: &Instruction, size: CodeSize, op: &mut Op) {
    op.seg = segment(i.memory_segment());
    if !(0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) {
        op.seg = string_segment(i);
        op.ea_mask = string_mask(i, size);
        op.disp = match i.op0_kind() {
            OpKind::NearBranch16 => 0xffff,
            OpKind::NearBranch32 => 0xffff_ffff,
            OpKind::NearBranch64 => u64::MAX,
            _ => 0,
        };
        return;
    }
    let (base, index) = (i.memory_base(), i.memory_index());
    op.disp = i.memory_displacement64();
    op.ea_mask = address_mask(base, index, i, size);
    if i.is_ip_rel_memory_operand() {
        op.base = CODE_BASE;
    } else if base != Register::None {
        op.base = register_index(base);
    }
    // A vector index belongs to a gather row, which looks at the instruction itself.
    if index.is_gpr() {
        op.index = register_index(index);
    }
    op.scale = i.memory_index_scale().trailing_zeros() as u8;
}

fn address_mask(base: Register, index: Register, i: &Instruction, size: CodeSize) -> u64 {
    let of_register = |r: Register| match r.size() {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    };
    if base != Register::None {
        return of_register(base);
    }
    if index.is_gpr() {
        return of_register(index);
    }
    match (i.memory_displ_size(), size) {
        (2, _) => 0xffff,
        (4, CodeSize::Bits16 | CodeSize::Bits32) => 0xffff_ffff,
        (4, CodeSize::Bits64) => 0xffff_ffff,
        _ => u64::MAX,
    }
}

fn segment(r: Register) -> u8 {
    if r.is_segment_register() { r.number() as u8 } else { Seg::Ds as u8 }
}

/// Segment of the source of string instructions (overridable), of XLAT and MASKMOV.
fn string_segment(i: &Instruction) -> u8 {
    segment(i.memory_segment())
}

/// Address size of string operands and of RCX in LOOP, JRCXZ.
fn string_mask(i: &Instruction, size: CodeSize) -> u64 {
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::MemorySegSI | OpKind::MemoryESDI | OpKind::MemorySegDI => return 0xffff,
            OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI => return 0xffff_ffff,
            OpKind::MemorySegRSI | OpKind::MemoryESRDI | OpKind::MemorySegRDI => return u64::MAX,
            _ => {}
        }
    }
    match i.code() {
        Code::Jcxz_rel8_16 | Code::Jcxz_rel8_32 => 0xffff,
        Code::Jecxz_rel8_16 | Code::Jecxz_rel8_32 | Code::Jecxz_rel8_64 => 0xffff_ffff,
        Code::Jrcxz_rel8_16 | Code::Jrcxz_rel8_64 => u64::MAX,
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => 0xffff,
        Code::Loop_rel8_16_ECX
        | Code::Loop_rel8_32_ECX
        | Code::Loop_rel8_64_ECX
        | Code::Loope_rel8_16_ECX
        | Code::Loope_rel8_32_ECX
        | Code::Loope_rel8_64_ECX
        | Code::Loopne_rel8_16_ECX
        | Code::Loopne_rel8_32_ECX
        | Code::Loopne_rel8_64_ECX => 0xffff_ffff,
        _ => match size {
            CodeSize::Bits16 => 0xffff,
            CodeSize::Bits32 => 0xffff_ffff,
            CodeSize::Bits64 => u64::MAX,
        },
    }
}
