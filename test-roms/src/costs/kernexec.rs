//! A context-switching load, with and without KERNEXEC's habit: CR0.WP is cleared around each of the kernel's
//! writes to data that is otherwise read-only.

use super::timed;
use crate::embedded::tables::{READ_ONLY, root};
use crate::link::Code;
use crate::report::COUNTED_INTERRUPT;
use crate::stages::Done;
use iced_x86::code_asm::*;
use umbra_arch::control::Cr0;

/// Switches of each variant.
const SWITCHES: u32 = 20_000;
/// The kernel's writes to protected data in a switch.
const WRITES: u32 = 2;
/// Rounds of the load's loop in a switch: about 5,000 instructions.
const ROUNDS: u32 = 800;
/// What is copied, as ptrace copies registers.
const BUFFER: u32 = 0x4_d000;

/// Both variants.
pub fn all(c: &mut Code<'_>) -> Done {
    // The plain kernel's data is writable: WP is off throughout.
    set_wp(c, false)?;
    timed(c, "switches-plain", SWITCHES, |c| switch(c, false))?;
    set_wp(c, true)?;
    timed(c, "switches-kernexec", SWITCHES, |c| switch(c, true))
}

fn set_wp(c: &mut Code<'_>, on: bool) -> Done {
    c.mov(rax, cr0)?;
    if on {
        c.or(eax, Cr0::WP as u32)?;
    } else {
        c.and(eax, !(Cr0::WP as u32))?;
    }
    Ok(c.mov(cr0, rax)?)
}

/// Into the kernel, some work, the other process.
fn switch(c: &mut Code<'_>, kernexec: bool) -> Done {
    c.int(COUNTED_INTERRUPT)?;
    for _ in 0..WRITES {
        if kernexec {
            set_wp(c, false)?;
        }
        c.mov(dword_ptr(READ_ONLY), r13d)?;
        if kernexec {
            set_wp(c, true)?;
        }
    }
    c.mov(esi, BUFFER)?;
    c.mov(edi, BUFFER + 0x800)?;
    c.mov(ecx, 64)?;
    c.rep().movsq()?;
    work(c)?;
    c.mov(eax, r13d)?;
    c.and(eax, 1)?;
    c.shl(eax, 14)?;
    c.add(eax, root(0))?;
    Ok(c.mov(cr3, rax)?)
}

/// Loads, stores and branches as a scheduler's.
fn work(c: &mut Code<'_>) -> Done {
    let (mut next, mut odd) = (c.create_label(), c.create_label());
    c.mov(ecx, ROUNDS)?;
    c.xor(edx, edx)?;
    c.set_label(&mut next)?;
    c.mov(eax, ecx)?;
    c.and(eax, 0xff)?;
    c.add(edx, dword_ptr(rax * 4 + BUFFER as i32))?;
    c.test(ecx, 1)?;
    c.jne(odd)?;
    c.mov(dword_ptr(rax * 4 + (BUFFER as i32 + 0x400)), edx)?;
    c.set_label(&mut odd)?;
    c.dec(ecx)?;
    Ok(c.jne(next)?)
}
