//! The host code around a guest's instruction.
//!
//! Stub registers on entry: RDI the FP state (x87: the FXSAVE image), RSI the general registers, RDX status
//! flags, RCX the operands' register numbers (a byte each), R8 the memory operand. It returns flags in RAX.

use crate::form::{Form, Slot};
use crate::host_op::Class;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::mem::offset_of;
use umbra_arch::fpu::{FpState, MXCSR_RESET};

/// Entry of a stub.
pub(crate) type Entry = unsafe extern "sysv64" fn(*mut FpState, *mut u64, u64, u64, *mut u8) -> u64;

const XMM: usize = offset_of!(FpState, xmm);
const YMM_HIGH: usize = offset_of!(FpState, ymm_high);
const ST: usize = offset_of!(FpState, st);
const MXCSR: usize = offset_of!(FpState, mxcsr);

/// Host code for `form`, position independent.
pub(crate) fn assemble(form: &Form) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    match form.class {
        Class::Sse | Class::Avx | Class::Mmx => vector(&mut a, form)?,
        Class::X87 => x87(&mut a, form)?,
        Class::Integer => integer(&mut a, form)?,
    }
    a.assemble(0)
}

fn xmm(k: usize) -> AsmRegisterXmm {
    [xmm1, xmm2, xmm3, xmm4][k]
}
fn ymm(k: usize) -> AsmRegisterYmm {
    [ymm1, ymm2, ymm3, ymm4][k]
}
fn mm(k: usize) -> AsmRegisterMm {
    [mm1, mm2, mm3, mm4][k]
}

fn vector(a: &mut CodeAssembler, form: &Form) -> Result<(), IcedError> {
    load_slots(a, form)?;
    load_implicit(a, form)?;
    if form.mxcsr {
        a.ldmxcsr(dword_ptr(rdi + MXCSR))?;
    }
    a.add_instruction(form.core)?;
    if form.flags_written != 0 {
        a.pushfq()?;
        a.pop(rax)?;
    }
    store(a, form)?;
    if form.mxcsr {
        // Rust code runs with MXCSR's modes as after reset, and without a meaning for its flags: nothing to save.
        a.stmxcsr(dword_ptr(rdi + MXCSR))?;
        a.mov(dword_ptr(rsp - 8), MXCSR_RESET)?;
        a.ldmxcsr(dword_ptr(rsp - 8))?;
    }
    if form.class == Class::Avx {
        a.vzeroupper()?;
    }
    if form.enters_mmx {
        a.emms()?;
    }
    a.ret()
}

/// Loads every register operand; leaves the first one's number in R10.
fn load_slots(a: &mut CodeAssembler, form: &Form) -> Result<(), IcedError> {
    let vex = form.class == Class::Avx;
    for k in 0..4 {
        if form.slots[k] == Slot::None {
            continue;
        }
        if k >= 2 {
            a.mov(eax, ecx)?;
            a.shr(eax, 8 * k as u32)?;
            if k == 2 {
                a.movzx(eax, al)?;
            }
        } else if k == 1 {
            a.movzx(eax, ch)?;
        } else {
            a.movzx(eax, cl)?;
            a.mov(r10d, eax)?;
        }
        match form.slots[k] {
            Slot::None => {}
            Slot::Gpr => a.mov(r11, qword_ptr(rsi + rax * 8))?,
            Slot::Mm => {
                a.shl(eax, 4)?;
                a.movq(mm(k), qword_ptr(rdi + rax + ST))?;
            }
            Slot::Xmm => {
                a.shl(eax, 4)?;
                if vex {
                    a.vmovaps(xmm(k), xmmword_ptr(rdi + rax + XMM))?;
                } else {
                    a.movaps(xmm(k), xmmword_ptr(rdi + rax + XMM))?;
                }
            }
            Slot::Ymm => {
                a.shl(eax, 4)?;
                a.vmovaps(xmm(k), xmmword_ptr(rdi + rax + XMM))?;
                a.vinsertf128(ymm(k), ymm(k), xmmword_ptr(rdi + rax + YMM_HIGH), 1)?;
            }
        }
    }
    Ok(())
}

fn load_implicit(a: &mut CodeAssembler, form: &Form) -> Result<(), IcedError> {
    if form.implicit.xmm0 {
        if form.class == Class::Avx {
            a.vmovaps(xmm0, xmmword_ptr(rdi + XMM))?;
        } else {
            a.movaps(xmm0, xmmword_ptr(rdi + XMM))?;
        }
    }
    if form.implicit.rax_rdx {
        a.mov(rax, qword_ptr(rsi))?;
        a.mov(rdx, qword_ptr(rsi + 16))?;
    }
    Ok(())
}

/// Stores what the instruction wrote.
fn store(a: &mut CodeAssembler, form: &Form) -> Result<(), IcedError> {
    let vex = form.class == Class::Avx;
    if form.implicit.xmm0 {
        if vex {
            a.vmovaps(xmmword_ptr(rdi + XMM), xmm0)?;
            a.vextractf128(xmmword_ptr(rdi + YMM_HIGH), ymm0, 1)?;
        } else {
            a.movaps(xmmword_ptr(rdi + XMM), xmm0)?;
        }
    }
    if form.implicit.rcx {
        a.mov(qword_ptr(rsi + 8), rcx)?;
    }
    if !form.writes_slot0 {
        return Ok(());
    }
    if form.slots[0] == Slot::Gpr {
        return a.mov(qword_ptr(rsi + r10 * 8), r11);
    }
    a.add(r10d, r10d)?;
    match form.slots[0] {
        Slot::Mm => {
            a.movq(qword_ptr(rdi + r10 * 8 + ST), mm(0))?;
            a.mov(word_ptr(rdi + r10 * 8 + (ST + 8)), 0xffff)
        }
        _ if vex => {
            a.vmovaps(xmmword_ptr(rdi + r10 * 8 + XMM), xmm(0))?;
            a.vextractf128(xmmword_ptr(rdi + r10 * 8 + YMM_HIGH), ymm(0), 1)
        }
        _ => a.movaps(xmmword_ptr(rdi + r10 * 8 + XMM), xmm(0)),
    }
}

/// The image's MXCSR is made the host's first: FXRSTOR loads it, and XMM registers, which are scratch here.
fn x87(a: &mut CodeAssembler, form: &Form) -> Result<(), IcedError> {
    a.stmxcsr(dword_ptr(rdi + MXCSR))?;
    a.fxrstor64(ptr(rdi))?;
    if form.flags_read {
        a.push(rdx)?;
        a.popfq()?;
    }
    a.add_instruction(form.core)?;
    if form.flags_written != 0 {
        a.pushfq()?;
        a.pop(rax)?;
    }
    a.fxsave64(ptr(rdi))?;
    a.fninit()?;
    a.ret()
}

const GPRS: [AsmRegister64; 16] = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
const SAVED: [AsmRegister64; 6] = [rbx, rbp, r12, r13, r14, r15];

/// All general registers but RSP and the one that addresses memory hold the guest's values.
fn integer(a: &mut CodeAssembler, form: &Form) -> Result<(), IcedError> {
    let base = form.mem_base.number();
    for register in SAVED {
        a.push(register)?;
    }
    a.push(rsi)?;
    a.push(r8)?;
    a.push(rdx)?;
    a.popfq()?;
    for (i, register) in GPRS.into_iter().enumerate() {
        if ![4, 6, base].contains(&i) {
            a.mov(register, qword_ptr(rsi + 8 * i))?;
        }
    }
    if base != 6 {
        a.mov(rsi, qword_ptr(rsi + 8 * 6))?;
    }
    a.mov(GPRS[base], qword_ptr(rsp))?;
    a.add_instruction(form.core)?;
    a.pushfq()?;
    a.push(r15)?;
    a.mov(r15, qword_ptr(rsp + 24))?;
    for (i, register) in GPRS.into_iter().enumerate() {
        if ![4, 15, base].contains(&i) {
            a.mov(qword_ptr(r15 + 8 * i), register)?;
        }
    }
    a.pop(qword_ptr(r15 + 8 * 15))?;
    a.pop(rax)?;
    a.pop(rsi)?;
    a.pop(rsi)?;
    for register in SAVED.into_iter().rev() {
        a.pop(register)?;
    }
    a.ret()
}
