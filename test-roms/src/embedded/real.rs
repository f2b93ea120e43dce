//! Real mode, on the way in and on the way out.

use super::Done;
use crate::link::Code;
use crate::pc::{selector, variable};
use crate::report::{check, check_memory, check_zero_flag, initialise, print, section};
use iced_x86::code_asm::*;

const TEST_INTERRUPT: u32 = 0x40;

/// The first instructions of the guest.
pub fn start(c: &mut Code<'_>) -> Done {
    c.cli()?;
    initialise(c)?;
    print(c, "Umbra embedded guest\n\n")?;
    section(c, "real mode", |c| {
        arithmetic(c)?;
        addressing(c)?;
        strings(c)?;
        interrupts(c)
    })?;
    let gdtr = c.address("gdtr");
    c.lgdt(fword_ptr(gdtr))?;
    c.mov(eax, cr0)?;
    c.or(eax, 1)?;
    c.mov(cr0, eax)?;
    let far = c.address("far protected");
    Ok(c.jmp(fword_ptr(far))?)
}

fn arithmetic(c: &mut Code<'_>) -> Done {
    c.mov(ax, 0x7fffu32)?;
    c.add(ax, 1)?;
    c.pushf()?;
    c.pop(bx)?;
    c.and(ebx, 0x8d5u32)?;
    // OF, SF, AF, PF; not ZF, not CF.
    check(c, ebx, 0x894)?;
    c.movzx(eax, ax)?;
    check(c, eax, 0x8000)?;
    c.mov(ax, 0x1234u32)?;
    c.mov(cx, 0x5678u32)?;
    c.mul(cx)?;
    c.shl(edx, 16)?;
    c.mov(dx, ax)?;
    check(c, edx, 0x1234 * 0x5678)?;
    c.mov(al, 0x79u32)?;
    c.add(al, 0x35u32)?;
    c.cbw()?;
    c.cwde()?;
    check(c, eax, 0xffff_ffae)
}

/// Wrap at 64 KiB and at 1 MiB (A20 is on, so there it does not).
fn addressing(c: &mut Code<'_>) -> Done {
    let scratch = c.offset(variable::SCRATCH);
    c.mov(dword_ptr(scratch), 0x1122_3344)?;
    c.mov(bx, 0xffffu32)?;
    c.mov(ax, word_ptr(bx + (scratch + 1)))?;
    c.movzx(eax, ax)?;
    check(c, eax, 0x3344)?;
    c.mov(ax, 0xffffu32)?;
    c.mov(es, ax)?;
    c.mov(word_ptr(0x0700u32).es(), 0x55aau32)?;
    c.xor(ax, ax)?;
    c.mov(es, ax)?;
    c.mov(word_ptr(0x06f0u32).es(), 0xaa55u32)?;
    c.mov(ax, 0xffffu32)?;
    c.mov(es, ax)?;
    c.movzx(eax, word_ptr(0x0700u32).es())?;
    check(c, eax, 0x55aa)
}

fn strings(c: &mut Code<'_>) -> Done {
    c.push(ds)?;
    c.pop(es)?;
    let scratch = c.offset(variable::SCRATCH);
    c.mov(di, scratch)?;
    c.mov(cx, 5u32)?;
    c.mov(al, 0x5au32)?;
    c.rep().stosb()?;
    c.mov(si, scratch)?;
    c.mov(di, scratch + 8)?;
    c.mov(cx, 3u32)?;
    c.rep().movsw()?;
    check_memory(c, variable::SCRATCH + 8, 0x5a5a_5a5a)?;
    c.mov(si, scratch)?;
    c.mov(di, scratch + 8)?;
    c.mov(cx, 6u32)?;
    c.repe().cmpsb()?;
    check_zero_flag(c)
}

/// INT through the vector table, and a divide error that the handler steps over.
fn interrupts(c: &mut Code<'_>) -> Done {
    let mut start = c.create_label();
    c.jmp(start)?;
    c.name("interrupt handler")?;
    let interrupts = c.dword(variable::INTERRUPTS);
    c.inc(interrupts)?;
    c.iret()?;
    c.name("divide handler")?;
    c.push(bp)?;
    c.mov(bp, sp)?;
    // DIV CX has two bytes; the saved IP is above BP's slot.
    c.add(word_ptr(bp + 2), 2)?;
    c.pop(bp)?;
    c.mov(interrupts, 7)?;
    c.iret()?;
    c.set_label(&mut start)?;
    c.xor(ax, ax)?;
    c.mov(es, ax)?;
    let (divide, handler) = (c.address("divide handler"), c.address("interrupt handler"));
    c.mov(word_ptr(0u32).es(), divide)?;
    c.mov(word_ptr(2u32).es(), cs)?;
    c.mov(word_ptr(TEST_INTERRUPT * 4).es(), handler)?;
    c.mov(word_ptr(TEST_INTERRUPT * 4 + 2).es(), cs)?;
    c.int(TEST_INTERRUPT)?;
    c.int(TEST_INTERRUPT)?;
    check_memory(c, variable::INTERRUPTS, 2)?;
    c.xor(cx, cx)?;
    c.div(cx)?;
    check_memory(c, variable::INTERRUPTS, 7)?;
    let interrupts = c.dword(variable::INTERRUPTS);
    Ok(c.mov(interrupts, 0)?)
}

/// From 16-bit protected mode to real mode, the result, the end.
pub fn back(c: &mut Code<'_>) -> Done {
    c.name("back to real mode")?;
    c.mov(eax, cr0)?;
    c.and(eax, 0xffff_fffeu32)?;
    c.mov(cr0, eax)?;
    let next = c.address("real mode again");
    c.jmp_far(crate::ENTRY.0, next)?;
    c.name("real mode again")?;
    c.mov(ax, cs)?;
    c.mov(ds, ax)?;
    c.mov(es, ax)?;
    c.xor(ax, ax)?;
    c.mov(ss, ax)?;
    c.mov(esp, 0x7c00)?;
    section(c, "real mode again", |c| {
        c.mov(eax, cr0)?;
        c.and(eax, 0x8000_0001u32)?;
        check_zero_flag(c)?;
        c.mov(ax, ds)?;
        c.movzx(eax, ax)?;
        check(c, eax, u32::from(crate::ENTRY.0))?;
        let interrupts = c.dword(variable::INTERRUPTS);
        c.mov(interrupts, 0)?;
        c.int(TEST_INTERRUPT)?;
        check_memory(c, variable::INTERRUPTS, 1)
    })?;
    print(c, "\n")?;
    c.jump("finish.16")
}

/// Loads the data segments with `selector`, from any width.
pub fn load_data_segments(c: &mut Code<'_>, data: u16) -> Done {
    debug_assert!(data == selector::DATA32 || data == selector::DATA16);
    c.mov(eax, u32::from(data))?;
    for segment in [ds, es, ss, fs, gs] {
        c.mov(segment, eax)?;
    }
    Ok(())
}
