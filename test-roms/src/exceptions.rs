//! Exceptions: which one, with which error code, and which of two comes first.

use crate::Rom;
use crate::link::Code;
use crate::pc::{selector, variable};
use crate::report::{check, check_memory, section};
use crate::stages::{Done, Stages, build, no_data, raises};
use iced_x86::code_asm::*;
use umbra_arch::control::Cr0;
use umbra_arch::fault::vector;

/// Name and expectation.
pub const ROM: Rom = Rom {
    name: "exceptions",
    about: "exceptions, their error codes and priorities in 16-, 32- and 64-bit code",
    expect: "Result: PASS",
    build: || build(&STAGES),
};

const STAGES: Stages = Stages { title: "Umbra exceptions", real, protected, long, data: no_data };

/// IDT entries 20h to 2Fh are not present; 31h is beyond the IDT's limit.
const ABSENT_VECTOR: u32 = 0x20;
const BEYOND: u32 = 0x31;

/// Real mode has no error codes: the handler counts, and the frame has three words.
fn real(c: &mut Code<'_>) -> Done {
    section(c, "real mode", |c| {
        real_handler(c)?;
        for (number, raise) in [(6u32, ud as fn(&mut Code<'_>) -> Done), (0, divide), (13, beyond_segment), (6, lock)] {
            real_raises(c, number, raise)?;
        }
        Ok(())
    })
}

/// `real handler` goes on at the resume address and counts; SP must be six bytes below.
fn real_handler(c: &mut Code<'_>) -> Done {
    let mut over = c.create_label();
    c.jmp(over)?;
    c.name("real handler")?;
    c.push(bp)?;
    c.mov(bp, sp)?;
    let (resume, interrupts) = (c.dword(variable::RESUME), c.dword(variable::INTERRUPTS));
    c.push(eax)?;
    c.mov(eax, resume)?;
    c.mov(word_ptr(bp + 2), ax)?;
    c.inc(interrupts)?;
    c.pop(eax)?;
    c.pop(bp)?;
    c.iret()?;
    Ok(c.set_label(&mut over)?)
}

fn real_raises(c: &mut Code<'_>, number: u32, raise: fn(&mut Code<'_>) -> Done) -> Done {
    let after = c.fresh_name();
    let (handler, resume_at) = (c.address("real handler"), c.address(&after));
    c.xor(ax, ax)?;
    c.mov(es, ax)?;
    c.mov(word_ptr(number * 4).es(), handler)?;
    c.mov(word_ptr(number * 4 + 2).es(), cs)?;
    let (resume, interrupts) = (c.dword(variable::RESUME), c.dword(variable::INTERRUPTS));
    c.mov(resume, resume_at)?;
    c.mov(interrupts, 0)?;
    raise(c)?;
    c.name(&after)?;
    c.nop()?;
    check_memory(c, variable::INTERRUPTS, 1)?;
    c.movzx(eax, sp)?;
    check(c, eax, 0x7c00)
}

fn ud(c: &mut Code<'_>) -> Done {
    Ok(c.ud2()?)
}

fn divide(c: &mut Code<'_>) -> Done {
    c.xor(ecx, ecx)?;
    Ok(c.div(ecx)?)
}

/// A word at FFFFh of a 64 KiB segment.
fn beyond_segment(c: &mut Code<'_>) -> Done {
    c.mov(bx, 0xffffu32)?;
    Ok(c.mov(ax, word_ptr(bx))?)
}

/// LOCK NOP.
fn lock(c: &mut Code<'_>) -> Done {
    Ok(c.db(&[0xf0, 0x90])?)
}

fn protected(c: &mut Code<'_>) -> Done {
    section(c, "protected mode", |c| {
        common(c)?;
        raises(c, vector::OF, 0, |c| {
            c.mov(al, 0x7fu32)?;
            c.add(al, 1)?;
            Ok(c.db(&[0xce])?)
        })?;
        raises(c, vector::BR, 0, |c| {
            let scratch = variable::SCRATCH;
            c.mov(dword_ptr(scratch), 5)?;
            c.mov(dword_ptr(scratch + 4), 9)?;
            c.mov(eax, 10)?;
            Ok(c.bound(eax, dword_ptr(scratch))?)
        })?;
        raises(c, vector::GP, 0, |c| {
            c.xor(eax, eax)?;
            Ok(c.mov(ss, eax)?)
        })?;
        raises(c, vector::GP, 0, |c| Ok(c.jmp_far(0, 0)?))?;
        raises(c, vector::GP, u32::from(selector::DATA32), |c| Ok(c.jmp_far(selector::DATA32, 0)?))?;
        raises(c, vector::GP, 0x1230, |c| Ok(c.jmp_far(0x1230, 0)?))?;
        raises(c, vector::GP, u32::from(selector::DATA32), |c| {
            c.pushfd()?;
            c.push(i32::from(selector::DATA32))?;
            c.push(0)?;
            Ok(c.iretd()?)
        })
    })
}

fn long(c: &mut Code<'_>) -> Done {
    section(c, "64-bit mode", |c| {
        common(c)?;
        raises(c, vector::GP, 0, |c| {
            c.mov(rax, 0x8000_0000_0000_0000u64)?;
            Ok(c.mov(ecx, dword_ptr(rax))?)
        })?;
        raises(c, vector::SS, 0, |c| {
            c.mov(rbp, 0x8000_0000_0000_0000u64)?;
            Ok(c.mov(ecx, dword_ptr(rbp))?)
        })?;
        // The last canonical address: the dword's second byte is not canonical.
        raises(c, vector::GP, 0, |c| {
            c.mov(rax, 0x0000_7fff_ffff_ffffu64)?;
            Ok(c.mov(ecx, dword_ptr(rax))?)
        })?;
        // PUSH ES, DAA, PUSHA, AAM, INTO, far CALL, SALC: not in 64-bit mode.
        for opcode in [0x06u8, 0x27, 0x60, 0xd4, 0xce, 0x9a, 0xd6] {
            raises(c, vector::UD, 0, |c| Ok(c.db(&[opcode, 0, 0, 0, 0, 0, 0])?))?;
        }
        raises(c, vector::GP, u32::from(selector::DATA32), |c| {
            c.push(i32::from(selector::DATA32))?;
            c.push(0x1000)?;
            c.pushfq()?;
            c.push(i32::from(selector::DATA32))?;
            c.push(0)?;
            Ok(c.iretq()?)
        })
    })
}

/// The same in 32- and 64-bit code.
fn common(c: &mut Code<'_>) -> Done {
    raises(c, vector::UD, 0, ud)?;
    raises(c, vector::UD, 0, lock)?;
    raises(c, vector::BP, 0, |c| Ok(c.int3()?))?;
    raises(c, vector::DE, 0, divide)?;
    raises(c, vector::DE, 0, |c| {
        c.mov(eax, 0x8000_0000u32)?;
        c.mov(edx, -1)?;
        c.mov(ecx, -1)?;
        Ok(c.idiv(ecx)?)
    })?;
    raises(c, vector::GP, BEYOND * 8 + 2, |c| Ok(c.int(BEYOND)?))?;
    raises(c, vector::NP, ABSENT_VECTOR * 8 + 2, |c| Ok(c.int(ABSENT_VECTOR)?))?;
    selectors(c)?;
    control(c)?;
    // Fifteen bytes are the most that an instruction may have.
    raises(c, vector::GP, 0, |c| {
        Ok(c.db(&[0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x90])?)
    })?;
    device_not_available(c)
}

fn selectors(c: &mut Code<'_>) -> Done {
    let load = |c: &mut Code<'_>, code: u32, segment: AsmRegisterSegment, selector: u32| {
        raises(c, vector::GP, code, |c| {
            c.mov(eax, selector)?;
            Ok(c.mov(segment, eax)?)
        })
    };
    load(c, 0x1230, fs, 0x1230)?;
    load(c, 0x1230, fs, 0x1233)?;
    // An LDT that was never loaded.
    load(c, 0x0c, gs, 0x0c)?;
    load(c, u32::from(selector::CODE32), ss, u32::from(selector::CODE32))?;
    load(c, u32::from(selector::DATA32), ss, u32::from(selector::DATA32) + 1)?;
    raises(c, vector::GP, u32::from(selector::DATA32), |c| {
        c.mov(eax, u32::from(selector::DATA32))?;
        Ok(c.lldt(ax)?)
    })?;
    raises(c, vector::GP, 0, |c| {
        c.xor(eax, eax)?;
        Ok(c.ltr(ax)?)
    })
}

fn control(c: &mut Code<'_>) -> Done {
    raises(c, vector::GP, 0, |c| {
        c.mov(ecx, 0x0bad_0000)?;
        Ok(c.rdmsr()?)
    })?;
    raises(c, vector::GP, 0, |c| {
        c.mov(ecx, 0x0bad_0000)?;
        Ok(c.wrmsr()?)
    })?;
    // PG without PE.
    raises(c, vector::GP, 0, |c| {
        c.mov(eax, 0x8000_0000u32)?;
        if c.bits() == 64 {
            c.mov(cr0, rax)?;
        } else {
            c.mov(cr0, eax)?;
        }
        Ok(())
    })?;
    // A reserved bit of CR4.
    raises(c, vector::GP, 0, |c| {
        c.mov(eax, 0x8000_0000u32)?;
        if c.bits() == 64 {
            c.mov(cr4, rax)?;
        } else {
            c.mov(cr4, eax)?;
        }
        Ok(())
    })
}

/// CR0.TS, and what comes before it; SSE without CR4.OSFXSR.
fn device_not_available(c: &mut Code<'_>) -> Done {
    raises(c, vector::UD, 0, |c| Ok(c.movaps(xmm0, xmm0)?))?;
    crate::embedded::protected::set_cr0(c, Cr0::TS)?;
    raises(c, vector::NM, 0, |c| Ok(c.fninit()?))?;
    // LOCK FNINIT: invalid before anything else.
    raises(c, vector::UD, 0, |c| Ok(c.db(&[0xf0, 0xdb, 0xe3])?))?;
    c.clts()?;
    Ok(c.fninit()?)
}
