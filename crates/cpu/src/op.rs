//! A decoded operation: what the interpreter's loop calls.

use crate::core::Core;
use umbra_arch::Bus;

/// Why an operation didn't simply retire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Stop {
    /// It raised [`Core::fault`]; nothing of it is visible but what the manual allows.
    Fault,
    /// It did a part (a `rep` chunk) and starts again at its own address; counts as retired.
    Again,
    /// It came to the page of RAM [`Core::absent`], which has yet to arrive; nothing of it is visible, and it
    /// starts again.
    Absent,
    /// Triple fault or an unsupported feature: see [`Core::exit`].
    Exit,
}

/// `Ok` when the operation retired.
pub type Flow = Result<(), Stop>;

/// An operation's function, specialised for its form and width.
pub type ExecFn = fn(&mut Core, &mut dyn Bus, &Op) -> Flow;

/// Index of the register that always reads 0, for absent base or index registers.
pub const NO_REG: u8 = 16;
/// Index of the register that RIP-relative operands and branch targets count from: in 64-bit mode the page of the
/// running block, so that blocks don't depend on where their page is mapped, and in [flat](crate::core::FLAT) 32-bit code
/// but for the last page; otherwise 0.
pub const CODE_BASE: u8 = 17;
/// Set in a register index: bits 15:8 of register 0..=3 (AH, CH, DH, BH).
pub const HIGH_BYTE: u8 = 0x20;

/// One decoded instruction.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Op {
    /// What executes it.
    pub exec: ExecFn,
    /// Immediate (sign-extended), or a branch target's RIP from [`CODE_BASE`].
    pub imm: u64,
    /// Displacement; from [`CODE_BASE`] where the operand is RIP-relative. The width of a near branch's target as a mask.
    pub disp: u64,
    /// Address-size mask of the effective address.
    pub ea_mask: u64,
    /// Base register or [`NO_REG`].
    pub base: u8,
    /// Index register or [`NO_REG`].
    pub index: u8,
    /// Scale as a shift count.
    pub scale: u8,
    /// Segment of the memory operand.
    pub seg: u8,
    /// First register operand.
    pub dst: u8,
    /// Second register operand.
    pub src: u8,
    /// Length in bytes, 1..=15.
    pub len: u8,
    /// Segment limits and types must be checked (not 64-bit mode).
    pub legacy: bool,
    /// Offset of the instruction from the block's start in bytes.
    pub start: u16,
    /// Index of its row in [`isa::ROWS`](crate::isa).
    pub row: u16,
    /// Cost of the block's operations before this one, in ticks.
    pub prefix: u32,
    /// Whatever the row wants: a host stub, a second immediate, a condition.
    pub aux: u64,
}

/// Where [`Op::aux`] has the opcode of an x87 data instruction, 11 bits.
pub(crate) const FOP_AT: u32 = 48;

impl Op {
    /// What FOP becomes ("Fopcode"); of an x87 data instruction.
    #[inline(always)]
    pub fn x87_opcode(&self) -> u16 {
        (self.aux >> FOP_AT & 0x7ff) as u16
    }

    /// RIP of the next instruction, given the block's.
    #[inline(always)]
    pub fn next_rip(&self, block_rip: u64) -> u64 {
        block_rip.wrapping_add(self.start as u64).wrapping_add(self.len as u64)
    }
}
