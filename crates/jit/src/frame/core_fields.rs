//! What lies in the interpreter's core, as memory operands of generated code.

use crate::emitter::Mem;
use crate::engine::Engine;
use crate::frame::at_engine;
use std::mem::offset_of;
use umbra_arch::CpuState;
use umbra_arch::fpu::FpState;
use umbra_arch::segment::{Segment, TableRegister};
use umbra_arch::state::Msrs;
use umbra_cpu::op::CODE_BASE;
use umbra_cpu::{Core, Interpreter};

const CORE: usize = offset_of!(Engine, interp) + Interpreter::CORE_OFFSET;

/// Guest register `n` in the core.
pub const fn gpr(n: u8) -> Mem {
    at_engine(CORE + offset_of!(Core, gpr) + 8 * n as usize)
}

/// What RIPs in a translation count from.
pub const fn code_base() -> Mem {
    gpr(CODE_BASE)
}

/// What decoding depends on besides the bytes.
pub fn code_mode() -> Mem {
    at_engine(CORE + offset_of!(Core, code_mode))
}

/// A segment's base.
pub fn seg_base(seg: u8) -> Mem {
    at_engine(CORE + offset_of!(Core, seg_base) + 8 * usize::from(seg))
}

/// The segments whose accesses may be refused, by bits, a byte.
pub fn seg_checked() -> Mem {
    at_engine(CORE + offset_of!(Core, seg_checked))
}

/// A field of the guest's state.
fn state(offset: usize) -> Mem {
    at_engine(CORE + offset_of!(Core, s) + offset)
}

/// The number of CPUs, 32 bits.
pub fn cpus() -> Mem {
    at_engine(CORE + offset_of!(Core, cpus))
}

/// CPL, a byte.
pub fn cpl() -> Mem {
    state(offset_of!(CpuState, cpl))
}

/// RFLAGS but for status flags.
pub fn rflags() -> Mem {
    state(offset_of!(CpuState, rflags))
}

/// PKRU, 32 bits.
pub fn pkru() -> Mem {
    state(offset_of!(CpuState, pkru))
}

/// What the TSC is ahead of virtual time.
pub fn tsc_offset() -> Mem {
    state(offset_of!(CpuState, msr) + offset_of!(Msrs, tsc_offset))
}

/// IA32_TSC_AUX.
pub fn tsc_aux() -> Mem {
    state(offset_of!(CpuState, msr) + offset_of!(Msrs, tsc_aux))
}

/// The selector in segment register `n`, as instructions number them.
pub fn selector(n: usize) -> Mem {
    state(offset_of!(CpuState, seg) + n * size_of::<Segment>() + offset_of!(Segment, selector))
}

/// Segment register `n`.
pub fn segment(n: usize) -> Mem {
    state(offset_of!(CpuState, seg) + n * size_of::<Segment>())
}

/// The base in segment register `n`.
pub fn segment_base(n: usize) -> Mem {
    Mem { disp: segment(n).disp + offset_of!(Segment, base) as i32, ..segment(n) }
}

/// The limit in segment register `n`.
pub fn segment_limit(n: usize) -> Mem {
    Mem { disp: segment(n).disp + offset_of!(Segment, limit) as i32, ..segment(n) }
}

/// GDTR.
pub fn gdtr() -> Mem {
    state(offset_of!(CpuState, gdtr))
}

/// IDTR.
pub fn idtr() -> Mem {
    state(offset_of!(CpuState, idtr))
}

/// The base in one of them.
pub fn table_base(register: Mem) -> Mem {
    Mem { disp: register.disp + offset_of!(TableRegister, base) as i32, ..register }
}

/// The limit in one of them, 16 bits.
pub fn table_limit(register: Mem) -> Mem {
    Mem { disp: register.disp + offset_of!(TableRegister, limit) as i32, ..register }
}

/// Whether NMIs are blocked, a byte.
pub fn nmi_blocked() -> Mem {
    state(offset_of!(CpuState, nmi_blocked))
}

/// CR0.
pub fn cr0() -> Mem {
    control(0)
}

/// CR0, CR2, CR3 or CR4.
pub fn control(number: u8) -> Mem {
    state(match number {
        0 => offset_of!(CpuState, cr0),
        2 => offset_of!(CpuState, cr2),
        3 => offset_of!(CpuState, cr3),
        _ => offset_of!(CpuState, cr4),
    })
}

/// IA32_LSTAR.
pub fn lstar() -> Mem {
    state(offset_of!(CpuState, msr) + offset_of!(Msrs, lstar))
}

/// IA32_FMASK.
pub fn fmask() -> Mem {
    state(offset_of!(CpuState, msr) + offset_of!(Msrs, fmask))
}

/// IA32_KERNEL_GS_BASE.
pub fn kernel_gs_base() -> Mem {
    state(offset_of!(CpuState, msr) + offset_of!(Msrs, kernel_gs_base))
}

/// Where execution goes on.
pub fn next_rip() -> Mem {
    at_engine(CORE + offset_of!(Core, next_rip))
}

const FP: usize = CORE + offset_of!(Core, s) + offset_of!(CpuState, fp);

/// XMM register `n` in the core.
pub fn xmm(n: u8) -> Mem {
    at_engine(FP + offset_of!(FpState, xmm) + 16 * usize::from(n))
}

/// The upper half of YMM register `n` in the core.
pub fn ymm_high(n: u8) -> Mem {
    at_engine(FP + offset_of!(FpState, ymm_high) + 16 * usize::from(n))
}

/// Offsets in FXSAVE's image, which [`FpState`] begins with.
pub mod fx {
    use super::{FpState, offset_of};
    pub const FCW: usize = offset_of!(FpState, fcw);
    pub const FSW: usize = offset_of!(FpState, fsw);
    pub const FTW: usize = offset_of!(FpState, ftw);
    pub const FOP: usize = offset_of!(FpState, fop);
    pub const FIP: usize = offset_of!(FpState, fip);
    pub const FDP: usize = offset_of!(FpState, fdp);
    pub const ST: usize = offset_of!(FpState, st);
}

/// What is at an offset of the [`FpState`] in the core.
pub fn fp(offset: usize) -> Mem {
    at_engine(FP + offset)
}
