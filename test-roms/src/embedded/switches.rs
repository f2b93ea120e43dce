//! Switches of control registers, many times over: what a shadow MMU should make cheap.

use super::protected::{clear_lme, enter_four_level, enter_pae, enter_two_level, leave_paging};
use super::{Done, tables};
use crate::link::Code;
use crate::measure::{MEASUREMENT_PORT, Phase};
use crate::pc::{selector, variable};
use crate::report::{check, check_memory, check_page_fault, check_zero_flag, section};
use iced_x86::code_asm::*;
use umbra_arch::control::{Cr0, Cr4, Efer};
use umbra_arch::msr::IA32_EFER;

/// A write to the read-only page every so many WP toggles.
const WRITE_EVERY: u32 = 1024;
/// Times that a phase's work is done before it is measured.
const WARM_UP: u32 = 2 * WRITE_EVERY;
/// Counter of the trips, kept in memory: registers' upper halves do not survive them.
const TRIPS: u32 = variable::SCRATCH + 32;
/// Wrong reads.
const WRONG: u32 = variable::SCRATCH + 36;

/// All measured sections. For long mode under root 0 with WP = 1.
pub fn all(c: &mut Code<'_>) -> Done {
    measured(c, Phase::WpToggles, wp_loop, wp_checks)?;
    measured(c, Phase::RootSwitches, root_loop, |_| Ok(()))?;
    measured(c, Phase::PgeToggles, |c| cr4_loop(c, Cr4::PGE, tables::GLOBAL, tables::GLOBAL_FRAMES[0]), pge_checks)?;
    smep(c)?;
    measured(c, Phase::NxeToggles, nxe_loop, nxe_checks)?;
    measured(c, Phase::PaeTrips, |c| trip_loop(c, "far trip pae"), |_| Ok(()))?;
    measured(c, Phase::TwoLevelTrips, |c| trip_loop(c, "far trip 2-level"), |_| Ok(()))
}

/// A section whose loop runs `R12D` times: first unmeasured, then between the marks. The loop leaves
/// the number of wrong reads in EBP.
fn measured(
    c: &mut Code<'_>,
    phase: Phase,
    body: impl FnOnce(&mut Code<'_>) -> Done,
    more: impl FnOnce(&mut Code<'_>) -> Done,
) -> Done {
    let (mut work, mut start) = (c.create_label(), c.create_label());
    c.jmp(start)?;
    c.set_label(&mut work)?;
    body(c)?;
    c.ret()?;
    c.set_label(&mut start)?;
    section(c, &format!("{} {}", phase.count(), phase.name()), |c| {
        c.mov(r12d, WARM_UP.min(phase.count()))?;
        c.call(work)?;
        mark(c, phase.id())?;
        c.mov(r12d, phase.count())?;
        c.call(work)?;
        mark(c, 0)?;
        check(c, ebp, 0)?;
        more(c)
    })
}

fn mark(c: &mut Code<'_>, id: u8) -> Done {
    c.mov(eax, u32::from(id))?;
    Ok(c.out(u32::from(MEASUREMENT_PORT), al)?)
}

/// Flips WP; writes to the read-only page in every 1024th round, in which WP is 0.
fn wp_loop(c: &mut Code<'_>) -> Done {
    let (mut next, mut no_write) = (c.create_label(), c.create_label());
    c.mov(rax, cr0)?;
    c.mov(ecx, 1)?;
    c.set_label(&mut next)?;
    c.xor(eax, Cr0::WP as u32)?;
    c.mov(cr0, rax)?;
    c.mov(edx, ecx)?;
    c.and(edx, WRITE_EVERY - 1)?;
    c.cmp(edx, 1)?;
    c.jne(no_write)?;
    c.mov(dword_ptr(tables::READ_ONLY), ecx)?;
    c.set_label(&mut no_write)?;
    c.inc(ecx)?;
    c.cmp(ecx, r12d)?;
    c.jbe(next)?;
    Ok(c.xor(ebp, ebp)?)
}

fn wp_checks(c: &mut Code<'_>) -> Done {
    let last = (Phase::WpToggles.count() - 1) / WRITE_EVERY * WRITE_EVERY + 1;
    check_memory(c, tables::READ_ONLY, last)?;
    c.mov(rax, cr0)?;
    c.and(eax, Cr0::WP as u32)?;
    check(c, eax, Cr0::WP as u32)?;
    check_page_fault(c, 3, tables::READ_ONLY, |c| Ok(c.mov(dword_ptr(tables::READ_ONLY), 1)?))?;
    check_memory(c, tables::READ_ONLY, last)
}

/// Round robin over the roots, back to the first at the end.
fn root_loop(c: &mut Code<'_>) -> Done {
    let mut next = c.create_label();
    c.xor(ebp, ebp)?;
    c.xor(ecx, ecx)?;
    c.set_label(&mut next)?;
    c.inc(ecx)?;
    c.mov(ebx, ecx)?;
    c.and(ebx, tables::ROOTS - 1)?;
    c.mov(eax, ebx)?;
    c.shl(eax, 14)?;
    c.add(eax, tables::root(0))?;
    c.mov(cr3, rax)?;
    c.add(ebx, tables::signature(0))?;
    count_wrong(c, tables::IDENTITY)?;
    c.cmp(ecx, r12d)?;
    c.jb(next)?;
    Ok(())
}

/// Compares the dword at `address` with EBX.
fn count_wrong(c: &mut Code<'_>, address: u32) -> Done {
    let mut right = c.create_label();
    c.cmp(ebx, dword_ptr(address))?;
    c.je(right)?;
    c.inc(ebp)?;
    c.set_label(&mut right)?;
    Ok(c.nop()?)
}

fn cr4_loop(c: &mut Code<'_>, bit: u64, address: u32, value: u32) -> Done {
    let mut next = c.create_label();
    c.xor(ebp, ebp)?;
    c.mov(ebx, value)?;
    c.mov(ecx, r12d)?;
    c.set_label(&mut next)?;
    c.mov(rax, cr4)?;
    c.xor(eax, bit as u32)?;
    c.mov(cr4, rax)?;
    count_wrong(c, address)?;
    c.dec(ecx)?;
    c.jne(next)?;
    Ok(())
}

/// A change of a global page's entry shows after a change of PGE, though not after a load of CR3.
fn pge_checks(c: &mut Code<'_>) -> Done {
    let entry = tables::root_leaves(0).entry(tables::GLOBAL);
    for (i, from) in [(1, 0), (0, 1)] {
        check_memory(c, tables::GLOBAL, tables::GLOBAL_FRAMES[from])?;
        c.mov(dword_ptr(entry), tables::global_entry(i))?;
        c.mov(rax, cr4)?;
        c.xor(eax, Cr4::PGE as u32)?;
        c.mov(cr4, rax)?;
        check_memory(c, tables::GLOBAL, tables::GLOBAL_FRAMES[i])?;
    }
    Ok(())
}

/// SMEP is optional: without it in CPUID the section says so.
fn smep(c: &mut Code<'_>) -> Done {
    let (mut absent, mut end) = (c.create_label(), c.create_label());
    c.mov(eax, 7)?;
    c.xor(ecx, ecx)?;
    c.cpuid()?;
    c.test(ebx, 1u32 << 7)?;
    c.je(absent)?;
    measured(
        c,
        Phase::SmepToggles,
        |c| cr4_loop(c, Cr4::SMEP, tables::IDENTITY, tables::signature(0)),
        |c| {
            call_user_page(c)?;
            set_smep(c)?;
            check_page_fault(c, 0x11, tables::USER, |c| {
                c.mov(eax, tables::USER)?;
                Ok(c.jmp(rax)?)
            })?;
            set_smep(c)?;
            call_user_page(c)
        },
    )?;
    c.jmp(end)?;
    c.set_label(&mut absent)?;
    section(c, "CR4.SMEP is not offered by this CPU", |_| Ok(()))?;
    c.set_label(&mut end)?;
    Ok(c.nop()?)
}

/// Flips CR4.SMEP.
fn set_smep(c: &mut Code<'_>) -> Done {
    c.mov(rax, cr4)?;
    c.xor(eax, Cr4::SMEP as u32)?;
    Ok(c.mov(cr4, rax)?)
}

/// A supervisor call into a user page, which returns at once.
fn call_user_page(c: &mut Code<'_>) -> Done {
    c.mov(eax, tables::USER)?;
    c.call(rax)?;
    c.cmp(eax, tables::USER)?;
    check_zero_flag(c)
}

fn flip_nxe(c: &mut Code<'_>) -> Done {
    c.mov(ecx, IA32_EFER)?;
    c.rdmsr()?;
    c.xor(eax, Efer::NXE as u32)?;
    Ok(c.wrmsr()?)
}

fn nxe_loop(c: &mut Code<'_>) -> Done {
    let mut next = c.create_label();
    c.xor(ebp, ebp)?;
    c.mov(ebx, tables::signature(0))?;
    c.set_label(&mut next)?;
    flip_nxe(c)?;
    count_wrong(c, tables::IDENTITY)?;
    c.dec(r12d)?;
    c.jne(next)?;
    Ok(())
}

/// Without NXE the execute-disable bit is reserved; with it, it forbids fetches only.
fn nxe_checks(c: &mut Code<'_>) -> Done {
    let reload = |c: &mut Code<'_>| -> Done {
        c.mov(rax, cr3)?;
        Ok(c.mov(cr3, rax)?)
    };
    flip_nxe(c)?;
    reload(c)?;
    check_page_fault(c, 9, tables::NO_EXECUTE, |c| Ok(c.mov(eax, dword_ptr(tables::NO_EXECUTE))?))?;
    flip_nxe(c)?;
    reload(c)?;
    c.movzx(eax, byte_ptr(tables::NO_EXECUTE))?;
    check(c, eax, 0xc3)?;
    check_page_fault(c, 0x11, tables::NO_EXECUTE, |c| {
        c.mov(eax, tables::NO_EXECUTE)?;
        Ok(c.jmp(rax)?)
    })
}

/// R12D trips through 32-bit code, which returns to `trip return`.
pub fn trip_loop(c: &mut Code<'_>, far: &str) -> Done {
    let mut next = c.create_label();
    let (trips, wrong) = (c.dword(TRIPS), c.dword(WRONG));
    c.mov(trips, r12d)?;
    c.mov(wrong, 0)?;
    c.set_label(&mut next)?;
    let back = format!("back from {far}");
    let (far, back_at) = (c.address(far), c.address(&back));
    let resume = c.dword(variable::RESUME);
    c.mov(resume, back_at)?;
    c.jmp(fword_ptr(far))?;
    c.name(&back)?;
    c.dec(trips)?;
    c.jne(next)?;
    Ok(c.mov(ebp, wrong)?)
}

/// Where 32-bit code re-enters 64-bit code: goes on at the address in the resume variable.
pub fn trip_return(c: &mut Code<'_>) -> Done {
    c.name("trip return")?;
    let resume = c.dword(variable::RESUME);
    c.mov(eax, resume)?;
    Ok(c.jmp(rax)?)
}

/// The 32-bit halves of the trips.
pub fn trips32(c: &mut Code<'_>) -> Done {
    c.name("trip pae")?;
    leave_paging(c)?;
    clear_lme(c)?;
    enter_pae(c)?;
    end_of_trip(c, tables::PAE_INDEX)?;
    c.name("trip 2-level")?;
    leave_paging(c)?;
    clear_lme(c)?;
    enter_two_level(c)?;
    end_of_trip(c, tables::TWO_LEVEL_INDEX)
}

/// Looks at what is mapped, counts a wrong read, returns to 64-bit code.
fn end_of_trip(c: &mut Code<'_>, index: u32) -> Done {
    let mut right = c.create_label();
    c.cmp(dword_ptr(tables::IDENTITY), tables::signature(index))?;
    c.je(right)?;
    let wrong = c.dword(WRONG);
    c.inc(wrong)?;
    c.set_label(&mut right)?;
    leave_paging(c)?;
    enter_four_level(c)?;
    let back = c.address("trip return");
    Ok(c.jmp_far(selector::CODE64, back)?)
}
