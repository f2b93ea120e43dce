//! Where processors differ from each other, so that the host's answer is one of several right ones.

use crate::engine::End;
use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind};
use umbra_arch::fault::vector;
use umbra_arch::{CpuState, Fault};
use umbra_hostexec::native::Mode;

/// Whether `i` does different things on Intel's and on AMD's processors.
pub fn differ(i: &Instruction, mode: Mode, bytes: &[u8]) -> bool {
    // Intel's ignore the operand-size prefix of near branches in 64-bit mode.
    let near = |k| matches!(i.op_kind(k), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
    let branch = i.flow_control() == FlowControl::UnconditionalBranch
        || (0..i.op_count()).any(near)
        || matches!(i.mnemonic(), Mnemonic::Call | Mnemonic::Ret | Mnemonic::Jmp);
    let short_branch = branch && mode == Mode::Bits64 && bytes[..bytes.len().min(4)].contains(&0x66);
    // AMD's read 32 bits, although the destination has 16.
    let wide_move = i.code() == Code::Movsxd_r16_rm16 && i.op1_kind() == OpKind::Memory;
    // AMD's don't enter the MMX state if the operand is in memory.
    let half_mmx = i.code() == Code::Cvtpi2ps_xmm_mmm64 && i.op1_kind() == OpKind::Memory;
    // LOCK MOV CR0 is MOV CR8 on AMD's.
    // Some ignore LOCK before VERW.
    let locked = i.has_lock_prefix() && i.mnemonic() == Mnemonic::Verw;
    let locked_cr = locked || i.has_lock_prefix() && i.mnemonic() == Mnemonic::Mov;
    // REPNE and REPE override the condition of LOOPcc on some.
    let looped = matches!(i.mnemonic(), Mnemonic::Loope | Mnemonic::Loopne) && bytes.iter().any(|b| b & 0xfe == 0xf2);
    locked_cr || looped || short_branch || wide_move || half_mmx
}

/// The same for some operands only.
pub fn differ_with(i: &Instruction, s: &CpuState) -> bool {
    // With an unmasked exception, the MMX state may have been entered or not.
    let converts = matches!(
        i.mnemonic(),
        Mnemonic::Cvtpi2ps | Mnemonic::Cvttps2pi | Mnemonic::Cvttpd2pi | Mnemonic::Cvtps2pi | Mnemonic::Cvtpd2pi
    );
    // With a count of 0, the port's permission is checked or not.
    let port = matches!(
        i.mnemonic(),
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd | Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd
    );
    let mask = if port { s.gpr[1] & 0xffff } else { 1 };
    mask == 0 || converts && s.fp.mxcsr & 0x1f80 != 0x1f80
}

/// Several exceptions at once whose order isn't defined, or whether one of them exists.
pub fn free(i: &Instruction, ours: &End, theirs: &End) -> bool {
    free_one_way(i, fault(ours), fault(theirs)) || free_one_way(i, fault(theirs), fault(ours))
}

fn fault(end: &End) -> Result<(), Fault> {
    if let End::Fault(fault) = end { Err(*fault) } else { Ok(()) }
}

fn code(fault: Fault) -> u32 {
    fault.code.unwrap_or(0)
}

fn free_one_way(i: &Instruction, ours: Result<(), Fault>, theirs: Result<(), Fault>) -> bool {
    // A byte-masked store may fault for bytes that it doesn't store.
    let masked = matches!(i.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu);
    if masked && (ours.is_err() || theirs.is_err()) {
        return true;
    }
    let Err(ours) = ours else { return false };
    let alike = |t: Fault| t.vector == ours.vector && code(t) == code(ours);
    // A stack segment's limit and a vector operand's alignment.
    if ours.vector == vector::SS && theirs.is_err_and(|t| t.vector == vector::GP) && super::uses_fp(i.code()) {
        return true;
    }
    match i.mnemonic() {
        // Either operand may be read first.
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => theirs.is_err(),
        // The pushes that were possible may have been done.
        Mnemonic::Pusha | Mnemonic::Pushad => theirs.is_err_and(alike),
        // The lower bound may decide before the upper one is read.
        Mnemonic::Bound => theirs.is_err_and(|t| t.vector == vector::BR),
        // Ten bytes may be read as eight and two, the latter at an offset that wraps round.
        Mnemonic::Fbld | Mnemonic::Fbstp | Mnemonic::Fld | Mnemonic::Fstp => {
            matches!(ours.vector, vector::GP | vector::SS)
        }
        // A far pointer likewise.
        Mnemonic::Jmp | Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lgs | Mnemonic::Lss
            if i.op_kind(i.op_count() - 1) == OpKind::Memory =>
        {
            matches!(ours.vector, vector::GP | vector::SS) && code(ours) == 0
        }
        // AMD's take the outer stack pointer off the stack before they look at the selector.
        Mnemonic::Retf => {
            ours.vector == vector::GP && theirs.is_err_and(|t| matches!(t.vector, vector::PF | vector::SS))
        }
        // AMD's have one bit more in MXCSR.
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => ours.vector == vector::GP && theirs.is_ok(),
        // A bad target, and a stack that can't be written, or is before the target is looked at.
        Mnemonic::Call => {
            let far = umbra_cpu::isa::branch::is_far(i.code());
            ours.vector == vector::GP && theirs.is_err_and(|t| t.vector == vector::PF || far && alike(t))
        }
        // AMD's don't ask for alignment.
        Mnemonic::Sha1rnds4
        | Mnemonic::Sha1nexte
        | Mnemonic::Sha1msg1
        | Mnemonic::Sha1msg2
        | Mnemonic::Sha256rnds2
        | Mnemonic::Sha256msg1
        | Mnemonic::Sha256msg2 => ours.vector == vector::GP,
        _ => false,
    }
}

/// What an instruction leaves undefined besides flags (LAR: bits 19:16), or an exception leaves open: with an
/// unmasked SIMD exception, the flags of masked ones.
#[derive(Clone, Copy, Default, Debug)]
pub struct Open {
    /// A general register and the bits of it that aren't compared.
    pub gpr: (usize, u64),
    /// Bits of MXCSR that aren't compared.
    pub mxcsr: u32,
}

/// What isn't compared after `i` with these ends; `mxcsr` is one of the engines' values.
pub fn open(i: &Instruction, ours: &End, theirs: &End, mxcsr: u32) -> Open {
    let mut open = Open::default();
    if i.mnemonic() == Mnemonic::Lar {
        open.gpr = (i.op0_register().full_register().number(), 0xf_0000);
    }
    if [ours, theirs].into_iter().any(|end| fault(end).is_err_and(|t| t.vector == vector::XM)) {
        // Overflow and underflow may or may not report that the result was inexact, too.
        let inexact = if mxcsr & 0x18 != 0 { 0x20 } else { 0 };
        // Products and sums of a dot product are checked one after the other.
        let dot = matches!(i.mnemonic(), Mnemonic::Dpps | Mnemonic::Dppd | Mnemonic::Vdpps | Mnemonic::Vdppd);
        open.mxcsr = if dot { 0x3f } else { mxcsr >> 7 & 0x3f | inexact };
    }
    open
}

/// A far transfer from 16- to 64-bit code: which width the stack pointer moves in isn't defined.
pub fn changes_width(mode: Mode, after: &CpuState) -> bool {
    mode == Mode::Bits16 && after.seg[1].selector == Mode::Bits64.code().selector
}

/// A far transfer from 64-bit to other code: the upper halves of the general registers become undefined
/// ("General-Purpose Registers in 64-Bit Mode").
pub fn leaves_64_bit(mode: Mode, after: &CpuState) -> bool {
    mode == Mode::Bits64 && after.seg[1].selector != Mode::Bits64.code().selector
}

/// A 32-bit push of a selector writes 16 bits on Intel's, 32 on AMD's: bytes above RSP that aren't compared.
pub fn pushes_selector(i: &Instruction) -> bool {
    matches!(
        i.code(),
        Code::Pushd_ES | Code::Pushd_CS | Code::Pushd_SS | Code::Pushd_DS | Code::Pushd_FS | Code::Pushd_GS
    )
}
