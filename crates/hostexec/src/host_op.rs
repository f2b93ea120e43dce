//! What callers hold: a prepared instruction, its memory buffer, its outcome.

use iced_x86::Code;
use std::io;

/// A prepared instruction: which stub, and which registers it applies to.
///
/// Belongs to the [`HostExec`](crate::HostExec) that prepared it; another one's runs some other instruction,
/// which is a wrong result but nothing worse.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostOp(u64);

impl HostOp {
    /// Significant bits of [`to_bits`](Self::to_bits): 24 of the stub's number, 4 of each of 4 registers.
    pub const BITS: u32 = 40;

    pub(crate) fn new(stub: u32, regs: [u8; 4]) -> Self {
        let nibbles = regs.iter().rev().fold(0, |all, r| all << 4 | u64::from(r & 15));
        Self(u64::from(stub) & 0xff_ffff | nibbles << 24)
    }
    /// As an integer of [`BITS`](Self::BITS) bits, for a field of a decoded operation.
    pub fn to_bits(self) -> u64 {
        self.0
    }
    /// From [`to_bits`](Self::to_bits); higher bits are ignored.
    #[inline(always)]
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
    #[inline(always)]
    pub(crate) fn stub(self) -> usize {
        (self.0 & 0xff_ffff) as usize
    }
    /// One register number below 16 per byte, in operand order. Stubs rely on the bound.
    #[inline(always)]
    pub(crate) fn regs(self) -> u64 {
        let r = self.0 >> 24;
        r & 0xf | r << 4 & 0xf00 | r << 8 & 0xf_0000 | r << 12 & 0xf00_0000
    }
}

/// Stands for the instruction's memory operand, which is its first bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C, align(64))]
pub struct MemBuf(pub [u8; 64]);

impl Default for MemBuf {
    fn default() -> Self {
        Self([0; 64])
    }
}

/// Which of the CPU's register files and rules an instruction belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// XMM registers, legacy encoding.
    Sse,
    /// XMM and YMM registers, VEX encoding.
    Avx,
    /// MMX registers, perhaps also XMM.
    Mmx,
    /// x87.
    X87,
    /// General registers and flags only.
    Integer,
}

/// What [`HostExec::prepare`](crate::HostExec::prepare) found out about an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Prepared {
    /// To be given to [`HostExec::run`](crate::HostExec::run).
    pub op: HostOp,
    /// Register file and rules.
    pub class: Class,
    /// Bytes of the memory operand that are read, or 0.
    pub mem_read: u8,
    /// Bytes of the memory operand that are written, or 0.
    pub mem_write: u8,
    /// Alignment in bytes that the memory operand must have, else #GP(0); 1 when none.
    pub mem_align: u8,
    /// Obeys MXCSR and can raise #XM.
    pub mxcsr: bool,
    /// Makes the x87 state an MMX state.
    pub enters_mmx: bool,
    /// Depends on status flags.
    pub flags_read: bool,
    /// Status flags that it writes (RFLAGS bits).
    pub flags_written: u64,
}

/// How an instruction ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Outcome {
    /// Complete: the caller stores the memory operand if it is written.
    Done,
    /// An unmasked x87 exception: only FSW changed. Nothing is to be stored; #MF comes with the next waiting
    /// x87 instruction.
    Suppressed,
    /// An unmasked SIMD floating-point exception: only MXCSR's flags changed. The caller raises #XM (or #UD).
    SimdException,
    /// Nothing changed; the caller raises #DE.
    DivideError,
}

/// Why an instruction can't be prepared, or the executor can't be made.
#[derive(Debug, thiserror::Error)]
pub enum HostExecError {
    /// Not a data instruction that this crate runs: the caller executes it by its own means.
    #[error("{code:?} is not run on the host: {reason}")]
    Unsupported {
        /// The instruction.
        code: Code,
        /// What about it.
        reason: &'static str,
    },
    /// The host CPU lacks it: choose a CPU profile without that feature.
    #[error("{code:?} needs {feature}, which this host's CPU lacks: choose a guest CPU without it")]
    MissingFeature {
        /// The instruction.
        code: Code,
        /// The feature's name.
        feature: &'static str,
    },
    /// No room for another stub: make a new [`HostExec`](crate::HostExec). Only integer forms can get there.
    #[error("the code memory for host stubs is full: use a new HostExec")]
    Full,
    /// No executable memory from the operating system.
    #[error("can't map executable memory for host stubs: {0} (is memfd_create or PROT_EXEC forbidden here?)")]
    Map(#[from] io::Error),
    /// The host's MXCSR or FXSAVE lacks something that every x86-64 CPU of today has.
    #[error("this host's CPU has no denormals-are-zeros mode: it can't run SSE instructions for a guest")]
    NoDaz,
}
