//! Protected mode: without paging, with 2-level paging, with PAE paging; the ways into and out of long mode.

use super::Done;
use super::real::load_data_segments;
use super::tables::{self, Leaves};
use crate::link::Code;
use crate::pc::{STACK_TOP, selector, variable};
use crate::report::{COUNTED_INTERRUPT, check, check_memory, check_page_fault, check_raises, check_zero_flag, section};
use iced_x86::code_asm::*;
use umbra_arch::control::{Cr0, Cr4, Efer};
use umbra_arch::fault::vector;
use umbra_arch::msr::IA32_EFER;

/// From real mode's far jump to long mode's.
pub fn all(c: &mut Code<'_>) -> Done {
    c.name("protected")?;
    load_data_segments(c, selector::DATA32)?;
    c.mov(esp, STACK_TOP)?;
    let idtr = c.address("idtr.32");
    c.lidt(fword_ptr(idtr))?;
    section(c, "protected mode, no paging", |c| {
        arithmetic(c)?;
        exceptions(c)
    })?;
    let build = c.address("build_tables");
    c.call(u64::from(build))?;
    section(c, "protected mode, 2-level paging", two_level)?;
    section(c, "protected mode, PAE paging", pae)?;
    enter_long_mode(c)?;
    tables::build(c)
}

fn arithmetic(c: &mut Code<'_>) -> Done {
    c.mov(eax, 0x8000_0000u32)?;
    c.mov(ecx, 3)?;
    c.imul_2(eax, ecx)?;
    c.seto(bl)?;
    c.movzx(ebx, bl)?;
    check(c, ebx, 1)?;
    check(c, eax, 0x8000_0000)?;
    c.mov(eax, 0x1234_5678)?;
    c.mov(edx, 0x9abc_def0u32)?;
    c.shld(eax, edx, 12u32)?;
    check(c, eax, 0x4567_89ab)?;
    c.bswap(eax)?;
    check(c, eax, 0xab89_6745)?;
    c.bsr(ecx, eax)?;
    check(c, ecx, 31)?;
    c.mov(edx, 1)?;
    c.mov(eax, 5)?;
    c.mov(ecx, 10)?;
    c.div(ecx)?;
    check(c, eax, 0x1999_999a)?;
    check(c, edx, 1)?;
    // Address arithmetic with scale, index and displacement.
    c.mov(ebx, variable::SCRATCH)?;
    c.mov(ecx, 3)?;
    c.mov(dword_ptr(ebx + ecx * 4 + 4), 0x0dec_0de5)?;
    check_memory(c, variable::SCRATCH + 16, 0x0dec_0de5)
}

/// Faults and traps through the IDT, the same in every width that has one.
pub fn exceptions(c: &mut Code<'_>) -> Done {
    let interrupts = c.dword(variable::INTERRUPTS);
    c.mov(interrupts, 0)?;
    c.int(COUNTED_INTERRUPT)?;
    c.int(COUNTED_INTERRUPT)?;
    check_memory(c, variable::INTERRUPTS, 2)?;
    check_raises(c, vector::UD, |c| Ok(c.ud2()?))?;
    check_raises(c, vector::BP, |c| Ok(c.int3()?))?;
    check_raises(c, vector::DE, |c| {
        c.xor(ecx, ecx)?;
        Ok(c.div(ecx)?)
    })?;
    // A selector beyond the GDT: the error code is the selector.
    check_raises(c, vector::GP, |c| {
        c.mov(eax, 0x1230)?;
        Ok(c.mov(fs, eax)?)
    })?;
    check_memory(c, variable::FAULT_CODE, 0x1230)
}

/// Clears and sets bits of CR0. Clobbers EAX.
pub fn change_cr0(c: &mut Code<'_>, clear: u64, set: u64) -> Done {
    c.mov(eax, cr0)?;
    c.and(eax, !(clear as u32))?;
    c.or(eax, set as u32)?;
    Ok(c.mov(cr0, eax)?)
}

/// Clears and sets bits of CR4. Clobbers EAX.
pub fn change_cr4(c: &mut Code<'_>, clear: u64, set: u64) -> Done {
    c.mov(eax, cr4)?;
    c.and(eax, !(clear as u32))?;
    c.or(eax, set as u32)?;
    Ok(c.mov(cr4, eax)?)
}

/// Clears and sets bits of EFER. Clobbers EAX, ECX, EDX.
pub fn change_efer(c: &mut Code<'_>, clear: u64, set: u64) -> Done {
    c.mov(ecx, IA32_EFER)?;
    c.rdmsr()?;
    c.and(eax, !(clear as u32))?;
    c.or(eax, set as u32)?;
    Ok(c.wrmsr()?)
}

fn load_cr3(c: &mut Code<'_>, table: u32) -> Done {
    c.mov(eax, table)?;
    Ok(c.mov(cr3, eax)?)
}

/// Without paging to 2-level paging. Clobbers EAX.
pub fn enter_two_level(c: &mut Code<'_>) -> Done {
    change_cr4(c, Cr4::PAE, 0)?;
    load_cr3(c, tables::TWO_LEVEL)?;
    change_cr0(c, 0, Cr0::PG | Cr0::WP)
}

/// Without paging to PAE paging. Clobbers EAX.
pub fn enter_pae(c: &mut Code<'_>) -> Done {
    change_cr4(c, 0, Cr4::PAE)?;
    load_cr3(c, tables::PAE)?;
    change_cr0(c, 0, Cr0::PG | Cr0::WP)
}

/// Turns paging off; from compatibility mode that leaves IA-32e mode. Clobbers EAX.
pub fn leave_paging(c: &mut Code<'_>) -> Done {
    change_cr0(c, Cr0::PG, 0)
}

/// Without paging to compatibility mode under 4-level root 0. Clobbers EAX, ECX, EDX.
pub fn enter_four_level(c: &mut Code<'_>) -> Done {
    change_cr4(c, 0, Cr4::PAE)?;
    change_efer(c, 0, Efer::LME)?;
    load_cr3(c, tables::root(0))?;
    change_cr0(c, 0, Cr0::PG | Cr0::WP)
}

/// Clears EFER.LME, for PAE paging. Clobbers EAX, ECX, EDX.
pub fn clear_lme(c: &mut Code<'_>) -> Done {
    change_efer(c, Efer::LME, 0)
}

fn two_level(c: &mut Code<'_>) -> Done {
    enter_two_level(c)?;
    rights(c, tables::TWO_LEVEL_LEAVES, tables::TWO_LEVEL_INDEX)?;
    leave_paging(c)
}

fn pae(c: &mut Code<'_>) -> Done {
    change_efer(c, 0, Efer::NXE)?;
    enter_pae(c)?;
    rights(c, tables::PAE_LEAVES, tables::PAE_INDEX)?;
    check_page_fault(c, 0x11, tables::NO_EXECUTE, |c| {
        c.mov(eax, tables::NO_EXECUTE)?;
        Ok(c.jmp(eax)?)
    })?;
    leave_paging(c)
}

/// What holds under every table format. WP = 1.
pub fn rights(c: &mut Code<'_>, leaves: Leaves, index: u32) -> Done {
    check_memory(c, tables::IDENTITY, tables::signature(index))?;
    check_page_fault(c, 3, tables::READ_ONLY, |c| Ok(c.mov(dword_ptr(tables::READ_ONLY), 1)?))?;
    check_page_fault(c, 0, tables::ABSENT, |c| Ok(c.mov(eax, dword_ptr(tables::ABSENT))?))?;
    check_page_fault(c, 2, tables::ABSENT + 4, |c| Ok(c.mov(dword_ptr(tables::ABSENT + 4), 1)?))?;
    // The handler maps the page and the instruction runs again.
    let (map_at, map_value) = (c.dword(variable::MAP_AT), c.dword(variable::MAP_VALUE));
    c.mov(map_at, leaves.entry(tables::ABSENT))?;
    c.mov(map_value, tables::DEMAND_ENTRY)?;
    c.mov(ebx, dword_ptr(tables::ABSENT))?;
    check(c, ebx, tables::DEMAND_FRAME)?;
    // Accessed, not dirty; dirty after a write.
    dirty_accessed(c, leaves, 0x20)?;
    c.mov(dword_ptr(tables::ABSENT), tables::DEMAND_FRAME)?;
    dirty_accessed(c, leaves, 0x60)?;
    c.mov(dword_ptr(leaves.entry(tables::ABSENT)), 0)?;
    c.invlpg(byte_ptr(tables::ABSENT))?;
    check_page_fault(c, 0, tables::ABSENT, |c| Ok(c.mov(eax, dword_ptr(tables::ABSENT))?))
}

fn dirty_accessed(c: &mut Code<'_>, leaves: Leaves, expected: u32) -> Done {
    c.mov(eax, dword_ptr(leaves.entry(tables::ABSENT)))?;
    c.and(eax, 0x60)?;
    check(c, eax, expected)
}

/// From protected mode without paging to `long mode`.
pub fn enter_long_mode(c: &mut Code<'_>) -> Done {
    enter_four_level(c)?;
    let long = c.address("long mode");
    Ok(c.jmp_far(selector::CODE64, long)?)
}

/// From compatibility mode to real mode's door.
pub fn back(c: &mut Code<'_>) -> Done {
    c.name("leave long mode")?;
    leave_paging(c)?;
    clear_lme(c)?;
    let idtr = c.address("idtr.32");
    c.lidt(fword_ptr(idtr))?;
    load_data_segments(c, selector::DATA32)?;
    section(c, "protected mode again", |c| {
        c.mov(ecx, IA32_EFER)?;
        c.rdmsr()?;
        c.and(eax, (Efer::LMA | Efer::LME) as u32)?;
        check_zero_flag(c)?;
        exceptions(c)
    })?;
    // Real mode's vectors, for the time after the switch.
    let real = c.address("idtr.real");
    c.lidt(fword_ptr(real))?;
    load_data_segments(c, selector::DATA16)?;
    let door = c.linear("back to real mode") - crate::LOAD.raw() as u32;
    Ok(c.jmp_far(selector::CODE16, door)?)
}

/// Sets bits of CR0 in either width. Clobbers EAX.
pub fn set_cr0(c: &mut Code<'_>, set: u64) -> Done {
    if c.bits() == 64 {
        c.mov(rax, cr0)?;
        c.or(eax, set as u32)?;
        return Ok(c.mov(cr0, rax)?);
    }
    change_cr0(c, 0, set)
}
