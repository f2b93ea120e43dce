//! Long mode, and what is measured there.

use super::protected::{exceptions, rights};
use super::real::load_data_segments;
use super::{Done, switches, tables};
use crate::link::Code;
use crate::pc::{STACK_TOP, selector, variable};
use crate::report::{check, check_memory, check_page_fault, check_zero_flag, section};
use iced_x86::code_asm::*;
use umbra_arch::control::{Cr0, Cr4};
use umbra_arch::msr::IA32_FS_BASE;

/// From the jump into 64-bit code to the jump out of it.
pub fn all(c: &mut Code<'_>) -> Done {
    c.name("long mode")?;
    load_data_segments(c, selector::DATA32)?;
    c.mov(esp, STACK_TOP)?;
    let idtr = c.address("idtr.64");
    c.lidt(fword_ptr(idtr))?;
    section(c, "long mode", |c| {
        arithmetic(c)?;
        addressing(c)?;
        sse(c)?;
        exceptions(c)
    })?;
    section(c, "long mode, 4-level paging", |c| {
        rights(c, tables::root_leaves(0), 0)?;
        check_page_fault(c, 0x11, tables::NO_EXECUTE, |c| {
            c.mov(eax, tables::NO_EXECUTE)?;
            Ok(c.jmp(rax)?)
        })
    })?;
    switches::all(c)?;
    let far = c.address("far leave long mode");
    Ok(c.jmp(fword_ptr(far))?)
}

fn arithmetic(c: &mut Code<'_>) -> Done {
    c.mov(rax, 0x0123_4567_89ab_cdefu64)?;
    c.mov(r9, rax)?;
    c.bswap(r9)?;
    c.add(rax, r9)?;
    c.shr(rax, 32)?;
    check(c, eax, 0xf0f0_f0f0)?;
    // A 32-bit result clears the upper half, a 16-bit one keeps it.
    c.mov(r10, -1i64)?;
    c.mov(r10d, 5)?;
    c.shr(r10, 32)?;
    check(c, r10d, 0)?;
    c.mov(r10, -1i64)?;
    c.mov(r10w, 5u32)?;
    c.shr(r10, 16)?;
    check(c, r10d, u32::MAX)?;
    c.mov(rax, 0x1_0000_0001u64)?;
    c.mul(rax)?;
    check(c, edx, 1)?;
    check(c, eax, 1)?;
    c.mov(r11, 0x8000_0000_0000_0000u64)?;
    c.tzcnt(rcx, r11)?;
    check(c, ecx, 63)?;
    c.movsxd(rax, r10d)?;
    c.inc(rax)?;
    check_zero_flag(c)
}

/// RIP-relative, FS base, the limit-free flat segments.
fn addressing(c: &mut Code<'_>) -> Done {
    let scratch = variable::SCRATCH;
    c.mov(dword_ptr(scratch + 8), 0x600d_f00du32)?;
    c.mov(ecx, IA32_FS_BASE)?;
    c.mov(eax, scratch)?;
    c.xor(edx, edx)?;
    c.wrmsr()?;
    c.mov(eax, dword_ptr(8u32).fs())?;
    check(c, eax, 0x600d_f00d)?;
    c.xor(eax, eax)?;
    c.wrmsr()?;
    let mut here = c.create_label();
    c.lea(rax, qword_ptr(here))?;
    c.call(here)?;
    c.set_label(&mut here)?;
    c.pop(rbx)?;
    c.cmp(rax, rbx)?;
    check_zero_flag(c)
}

fn sse(c: &mut Code<'_>) -> Done {
    c.mov(rax, cr0)?;
    c.and(eax, !(Cr0::EM | Cr0::TS) as u32)?;
    c.or(eax, (Cr0::MP | Cr0::NE) as u32)?;
    c.mov(cr0, rax)?;
    c.mov(rax, cr4)?;
    c.or(eax, (Cr4::OSFXSR | Cr4::OSXMMEXCPT) as u32)?;
    c.mov(cr4, rax)?;
    c.mov(eax, 1_000_000)?;
    c.movd(xmm0, eax)?;
    c.pshufd(xmm1, xmm0, 0u32)?;
    c.paddd(xmm1, xmm0)?;
    c.movd(eax, xmm1)?;
    check(c, eax, 2_000_000)?;
    c.cvtsi2sd(xmm2, eax)?;
    c.sqrtsd(xmm2, xmm2)?;
    c.cvttsd2si(eax, xmm2)?;
    check(c, eax, 1414)?;
    c.movups(xmmword_ptr(variable::SCRATCH + 16), xmm1)?;
    check_memory(c, variable::SCRATCH + 28, 1_000_000)
}
