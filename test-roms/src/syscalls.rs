//! SYSCALL and SYSRET: selectors, RCX, R11, the flags' mask, and what they refuse.

use crate::Rom;
use crate::embedded::protected::change_efer;
use crate::embedded::tables::root_leaves;
use crate::link::{Code, Linker};
use crate::pc::{STACK_TOP, selector, variable};
use crate::report::{check, check_memory, check_zero_flag, section};
use crate::stages::{Done, Stages, build, nothing, raises};
use iced_x86::code_asm::*;
use umbra_arch::control::Efer;
use umbra_arch::descriptor::encode;
use umbra_arch::fault::vector;
use umbra_arch::msr::{IA32_FMASK, IA32_LSTAR, IA32_STAR};
use umbra_arch::segment::Attr;

/// Name and expectation.
pub const ROM: Rom = Rom {
    name: "syscalls",
    about: "SYSCALL and SYSRET: selectors, flags, ring 3 in 64-bit mode, refusals",
    expect: "Result: PASS",
    build: || build(&STAGES),
};

const STAGES: Stages = Stages { title: "Umbra syscalls", real: nothing, protected: nothing, long, data };

/// SYSRET loads SS from this plus 8 and CS from this plus 16, both with RPL 3. The runtime's selectors
/// come first in the table.
const SYSRET_BASE: u32 = 0x30;
const USER_DATA: u32 = 0x38 | 3;
const USER_CODE: u32 = 0x40 | 3;
const SYSCALL_CODE: u32 = 0x48;
const USER_STACK: u32 = 0x5_f000;
/// IF, DF and IOPL stay as they are but for what the mask clears: DF.
const MASK: u32 = 0x400;
const USER_FLAGS: u32 = 0x3402;

fn data(l: &mut Linker) -> Done {
    let flat = |attr| encode(0, u32::MAX, Attr(attr));
    let table =
        [0, flat(0xc09b), flat(0xc093), flat(0xa09b), 0, 0, 0, flat(0xc0f3), flat(0xa0fb), flat(0xa09b), flat(0xc093)];
    let bytes: Vec<u8> = table.iter().flat_map(|entry: &u64| entry.to_le_bytes()).collect();
    l.data("own gdt", &bytes)?;
    let mut register = (bytes.len() as u16 - 1).to_le_bytes().to_vec();
    register.extend_from_slice(&u64::from(l.address("own gdt")).to_le_bytes());
    l.data("own gdtr", &register)
}

fn long(c: &mut Code<'_>) -> Done {
    let gdtr = c.address("own gdtr");
    c.lgdt(fword_ptr(gdtr))?;
    open_pages(c)?;
    section(c, "refusals", |c| {
        raises(c, vector::UD, 0, |c| Ok(c.syscall()?))?;
        change_efer(c, 0, Efer::SCE)
    })?;
    section(c, "SYSCALL and SYSRET", |c| {
        registers(c)?;
        enter(c)
    })
}

/// The first mebibyte becomes readable for ring 3.
fn open_pages(c: &mut Code<'_>) -> Done {
    let mut next = c.create_label();
    c.mov(edi, root_leaves(0).entry(0))?;
    c.mov(ecx, 256)?;
    c.set_label(&mut next)?;
    c.or(dword_ptr(edi), 4)?;
    c.add(edi, 8)?;
    c.dec(ecx)?;
    c.jne(next)?;
    c.mov(rax, cr3)?;
    Ok(c.mov(cr3, rax)?)
}

fn write_msr(c: &mut Code<'_>, msr: u32, high: u32, low: u32) -> Done {
    c.mov(ecx, msr)?;
    c.mov(edx, high)?;
    c.mov(eax, low)?;
    Ok(c.wrmsr()?)
}

fn registers(c: &mut Code<'_>) -> Done {
    let entry = c.address("entry");
    write_msr(c, IA32_STAR, SYSRET_BASE << 16 | SYSCALL_CODE, 0)?;
    write_msr(c, IA32_LSTAR, 0, entry)?;
    write_msr(c, IA32_FMASK, 0, MASK)
}

/// Ring 3 by SYSRET, ring 0 by SYSCALL.
fn enter(c: &mut Code<'_>) -> Done {
    let (user, after, done) = (c.address("user"), c.address("after syscall"), c.address("done"));
    c.mov(ecx, user)?;
    c.mov(r11d, USER_FLAGS)?;
    c.mov(esp, USER_STACK)?;
    c.sysretq()?;
    c.name("user")?;
    c.mov(eax, cs)?;
    check(c, eax, USER_CODE)?;
    c.mov(eax, ss)?;
    check(c, eax, USER_DATA)?;
    c.pushfq()?;
    c.pop(rax)?;
    // IOPL and DF came with R11.
    c.and(eax, 0x3400u32)?;
    check(c, eax, 0x3400)?;
    c.std()?;
    c.syscall()?;
    c.name("after syscall")?;
    c.mov(eax, cs)?;
    check(c, eax, USER_CODE)?;
    c.cld()?;
    c.mov(dword_ptr(variable::SCRATCH), 1)?;
    c.syscall()?;
    // Entered twice: the first time goes back, the second time stays.
    c.name("entry")?;
    c.mov(eax, cs)?;
    check(c, eax, SYSCALL_CODE)?;
    c.mov(eax, ss)?;
    check(c, eax, SYSCALL_CODE + 8)?;
    c.pushfq()?;
    c.pop(rax)?;
    c.and(eax, MASK)?;
    check_zero_flag(c)?;
    c.cmp(dword_ptr(variable::SCRATCH), 1)?;
    c.je(u64::from(done))?;
    check(c, ecx, after)?;
    // R11 has the flags from before the mask.
    c.mov(eax, r11d)?;
    c.and(eax, MASK)?;
    check(c, eax, MASK)?;
    c.sysretq()?;
    c.name("done")?;
    c.mov(eax, u32::from(selector::DATA32))?;
    c.mov(ss, eax)?;
    c.mov(esp, STACK_TOP)?;
    check_memory(c, variable::SCRATCH, 1)
}
