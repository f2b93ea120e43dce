//! String instructions that fault in the middle and start again; code that changes itself.

use crate::Rom;
use crate::embedded::protected::change_efer;
use crate::embedded::tables::{ABSENT, DEMAND_ENTRY, DEMAND_FRAME, GLOBAL, READ_ONLY, root_leaves};
use crate::link::Code;
use crate::pc::variable;
use crate::report::{check, check_memory, check_page_fault, check_zero_flag, section};
use crate::stages::{Done, Stages, build, no_data, nothing};
use iced_x86::code_asm::*;
use umbra_arch::control::Efer;

/// Name and expectation.
pub const ROM: Rom = Rom {
    name: "strings",
    about: "string instructions with faults in the middle, restarts; self-modifying code",
    expect: "Result: PASS",
    build: || build(&STAGES),
};

const STAGES: Stages = Stages { title: "Umbra strings", real: nothing, protected, long, data: no_data };

/// Bytes before the page that is not present.
const BEFORE: u32 = 0x40;
const PATTERN: u32 = 0x5a5a_a5a5;

/// The tables have entries with XD set.
fn protected(c: &mut Code<'_>) -> Done {
    change_efer(c, 0, Efer::NXE)
}

fn long(c: &mut Code<'_>) -> Done {
    section(c, "string instructions that fault", |c| {
        forwards(c)?;
        backwards(c)?;
        reads(c)?;
        restarts(c)
    })?;
    section(c, "self-modifying code", |c| {
        next_instruction(c)?;
        in_a_loop(c)?;
        through_an_alias(c)
    })
}

/// STOSB, STOSD and MOVSB up to the absent page: registers say how far it went.
fn forwards(c: &mut Code<'_>) -> Done {
    c.cld()?;
    for (bytes, fault_at) in [(1u32, ABSENT), (4, ABSENT)] {
        check_page_fault(c, 2, fault_at, |c| {
            c.mov(edi, ABSENT - BEFORE)?;
            c.mov(ecx, 0x1000u32)?;
            c.mov(eax, PATTERN)?;
            if bytes == 1 {
                c.rep().stosb()?
            } else {
                c.rep().stosd()?
            }
            Ok(())
        })?;
        check(c, edi, ABSENT)?;
        check(c, ecx, 0x1000 - BEFORE / bytes)?;
    }
    check_memory(c, ABSENT - 4, PATTERN)?;
    // A dword that straddles the border is not written at all.
    c.mov(dword_ptr(ABSENT - 4), 0)?;
    check_page_fault(c, 2, ABSENT, |c| {
        c.mov(edi, ABSENT - 2 - 8)?;
        c.mov(ecx, 5)?;
        c.mov(eax, PATTERN)?;
        Ok(c.rep().stosd()?)
    })?;
    check(c, edi, ABSENT - 2)?;
    check(c, ecx, 3)?;
    check_memory(c, ABSENT - 4, PATTERN >> 16)?;
    check_page_fault(c, 2, ABSENT, |c| {
        c.mov(esi, variable::BASE)?;
        c.mov(edi, ABSENT - 5)?;
        c.mov(ecx, 9)?;
        Ok(c.rep().movsb()?)
    })?;
    check(c, esi, variable::BASE + 5)?;
    check(c, ecx, 4)
}

/// With DF = 1, down into a page that is not writable.
fn backwards(c: &mut Code<'_>) -> Done {
    c.std()?;
    check_page_fault(c, 3, READ_ONLY + 0xfff, |c| {
        c.mov(edi, READ_ONLY + 0x1000 + 3)?;
        c.mov(ecx, 100)?;
        c.mov(al, 0xc3u32)?;
        Ok(c.rep().stosb()?)
    })?;
    c.cld()?;
    check(c, edi, READ_ONLY + 0xfff)?;
    check(c, ecx, 96)
}

/// LODSB, SCASB and CMPSB reading into the absent page.
fn reads(c: &mut Code<'_>) -> Done {
    check_page_fault(c, 0, ABSENT, |c| {
        c.mov(esi, ABSENT - 3)?;
        c.mov(ecx, 10)?;
        Ok(c.rep().lodsb()?)
    })?;
    check(c, esi, ABSENT)?;
    check(c, ecx, 7)?;
    c.mov(dword_ptr(ABSENT - 4), 0)?;
    check_page_fault(c, 0, ABSENT, |c| {
        c.mov(edi, ABSENT - 4)?;
        c.mov(ecx, 10)?;
        c.xor(eax, eax)?;
        Ok(c.repe().scasb()?)
    })?;
    check(c, edi, ABSENT)?;
    check(c, ecx, 6)?;
    c.mov(dword_ptr(variable::SCRATCH), 0)?;
    check_page_fault(c, 0, ABSENT, |c| {
        c.mov(esi, variable::SCRATCH)?;
        c.mov(edi, ABSENT - 2)?;
        c.mov(ecx, 4)?;
        Ok(c.repe().cmpsb()?)
    })?;
    check(c, esi, variable::SCRATCH + 2)?;
    check(c, ecx, 2)
}

/// The handler maps the page; the instruction goes on as if nothing had been.
fn restarts(c: &mut Code<'_>) -> Done {
    let leaf = root_leaves(0).entry(ABSENT);
    let (map_at, map_value) = (c.dword(variable::MAP_AT), c.dword(variable::MAP_VALUE));
    c.mov(map_at, leaf)?;
    c.mov(map_value, DEMAND_ENTRY)?;
    c.mov(edi, ABSENT - 0x10)?;
    c.mov(ecx, 0x20)?;
    c.mov(eax, PATTERN)?;
    c.rep().stosb()?;
    check(c, edi, ABSENT + 0x10)?;
    check(c, ecx, 0)?;
    check_memory(c, ABSENT - 4, 0xa5a5_a5a5)?;
    check_memory(c, DEMAND_FRAME + 12, 0xa5a5_a5a5)?;
    check_memory(c, DEMAND_FRAME + 16, 0)?;
    // Overlapping copy, a byte at a time: the first byte is repeated.
    c.mov(dword_ptr(ABSENT), 0x0403_0201)?;
    c.mov(esi, ABSENT)?;
    c.mov(edi, ABSENT + 1)?;
    c.mov(ecx, 7)?;
    c.rep().movsb()?;
    check_memory(c, ABSENT, 0x0101_0101)?;
    check_memory(c, ABSENT + 4, 0x0101_0101)?;
    // Nothing happens with a count of 0, whatever the addresses.
    c.mov(edi, 0x7fff_0000)?;
    c.xor(ecx, ecx)?;
    c.rep().stosb()?;
    check(c, edi, 0x7fff_0000)?;
    c.mov(dword_ptr(leaf), 0)?;
    Ok(c.invlpg(byte_ptr(ABSENT))?)
}

/// A store into the very next instruction.
fn next_instruction(c: &mut Code<'_>) -> Done {
    let patched = c.fresh_name();
    for value in [0x11u32, 0x22] {
        let name = format!("{patched} {value}");
        let at = c.address(&name);
        c.mov(byte_ptr(at + 1), value)?;
        c.name(&name)?;
        c.mov(al, 0x7fu32)?;
        c.movzx(eax, al)?;
        check(c, eax, value)?;
    }
    Ok(())
}

/// A loop whose body counts itself up.
fn in_a_loop(c: &mut Code<'_>) -> Done {
    let mut again = c.create_label();
    let patched = c.fresh_name();
    let at = c.address(&patched);
    c.xor(ebx, ebx)?;
    c.mov(ecx, 100)?;
    c.set_label(&mut again)?;
    c.inc(byte_ptr(at + 1))?;
    c.name(&patched)?;
    c.mov(al, 0u32)?;
    c.movzx(eax, al)?;
    c.add(ebx, eax)?;
    c.dec(ecx)?;
    c.jne(again)?;
    check(c, ebx, 100 * 101 / 2)
}

/// A routine in a page that is written through another linear address.
fn through_an_alias(c: &mut Code<'_>) -> Done {
    let leaf = root_leaves(0).entry(ABSENT);
    c.mov(dword_ptr(leaf), DEMAND_ENTRY)?;
    c.invlpg(byte_ptr(ABSENT))?;
    for value in [1u32, 2, 3] {
        // MOV EAX, value; RET. Written at the frame's own address, executed at the page's.
        c.mov(byte_ptr(DEMAND_FRAME + 0x100), 0xb8u32)?;
        c.mov(dword_ptr(DEMAND_FRAME + 0x101), value)?;
        c.mov(byte_ptr(DEMAND_FRAME + 0x105), 0xc3u32)?;
        c.mov(ebx, ABSENT + 0x100)?;
        c.call(rbx)?;
        check(c, eax, value)?;
        c.mov(ebx, DEMAND_FRAME + 0x100)?;
        c.call(rbx)?;
        check(c, eax, value)?;
    }
    // The page now leads to another frame: what was executed there must not come back.
    c.mov(dword_ptr(GLOBAL + 0x100), 0xc3c0_3190u32)?;
    c.mov(eax, dword_ptr(root_leaves(0).entry(GLOBAL)))?;
    c.mov(dword_ptr(leaf), eax)?;
    c.invlpg(byte_ptr(ABSENT))?;
    c.mov(ebx, ABSENT + 0x100)?;
    c.call(rbx)?;
    c.test(eax, eax)?;
    check_zero_flag(c)
}
