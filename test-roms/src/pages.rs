//! Supervisor accesses to pages of all rights, under all of WP, SMEP and SMAP, in PAE and 4-level paging.
//!
//! Which access faults, and with what error code, is predicted here from the manual's rules
//! ("Determination of Access Rights", "Page-Fault Exceptions").

use crate::Rom;
use crate::embedded::protected::{change_efer, clear_lme, enter_pae, leave_paging};
use crate::embedded::tables::{ABSENT, DEMAND_FRAME, Leaves, PAE_LEAVES, root_leaves};
use crate::link::Code;
use crate::pc::STACK_TOP;
use crate::report::{check, check_page_fault, section};
use crate::stages::{Done, Stages, build, no_data, nothing};
use iced_x86::code_asm::*;
use umbra_arch::control::{Cr0, Cr4, Efer};

/// Name and expectation.
pub const ROM: Rom = Rom {
    name: "pages",
    about: "page rights against WP, SMEP and SMAP in PAE and 4-level paging, accessed and dirty bits",
    expect: "Result: PASS",
    build: || build(&STAGES),
};

const STAGES: Stages = Stages { title: "Umbra pages", real: nothing, protected, long, data: no_data };

/// The page that changes its rights.
const PAGE: u32 = ABSENT;
const READ_DATA: u32 = DEMAND_FRAME;

/// What a leaf says.
#[derive(Clone, Copy)]
struct Leaf {
    write: bool,
    user: bool,
    no_execute: bool,
}

/// What control registers say.
#[derive(Clone, Copy)]
struct Control {
    wp: bool,
    smep: bool,
    smap: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Attempt {
    Read,
    Write,
    Fetch,
}

fn choices() -> impl Iterator<Item = (bool, bool, bool)> {
    (0..8u8).map(|n| (n & 1 != 0, n & 2 != 0, n & 4 != 0))
}

/// The error code of a supervisor access, if it faults. Fetches are told apart since EFER.NXE is set.
fn fault(leaf: Leaf, control: Control, attempt: Attempt) -> Option<u32> {
    let kept_out = control.smap && leaf.user;
    match attempt {
        Attempt::Read => kept_out.then_some(1),
        Attempt::Write => (kept_out || control.wp && !leaf.write).then_some(3),
        Attempt::Fetch => (leaf.no_execute || control.smep && leaf.user).then_some(0x11),
    }
}

fn protected(c: &mut Code<'_>) -> Done {
    fill_frame(c)?;
    change_efer(c, 0, Efer::NXE)?;
    enter_pae(c)?;
    matrix(c, "PAE paging", PAE_LEAVES)?;
    leave_paging(c)?;
    clear_lme(c)
}

fn long(c: &mut Code<'_>) -> Done {
    matrix(c, "4-level paging", root_leaves(0))
}

/// The frame holds its own address and, at its middle, a RET. Without paging.
fn fill_frame(c: &mut Code<'_>) -> Done {
    c.mov(dword_ptr(DEMAND_FRAME), READ_DATA)?;
    Ok(c.mov(byte_ptr(DEMAND_FRAME + 0x800), 0xc3u32)?)
}

fn matrix(c: &mut Code<'_>, name: &str, leaves: Leaves) -> Done {
    for (smep, smap) in [(false, false), (true, false), (false, true), (true, true)] {
        let after = c.fresh_name();
        if smep || smap {
            jump_without_features(c, &after)?;
        }
        let title = match (smep, smap) {
            (false, false) => format!("{name}, WP"),
            (true, false) => format!("{name}, WP, SMEP"),
            (false, true) => format!("{name}, WP, SMAP"),
            (true, true) => format!("{name}, WP, SMEP, SMAP"),
        };
        section(c, &title, |c| {
            for wp in [false, true] {
                select(c, Control { wp, smep, smap })?;
                for (write, user, no_execute) in choices() {
                    let leaf = Leaf { write, user, no_execute };
                    one_page(c, leaves, leaf, Control { wp, smep, smap })?;
                }
            }
            select(c, Control { wp: true, smep: false, smap: false })
        })?;
        c.name(&after)?;
        c.nop()?;
    }
    Ok(())
}

/// Jumps to `target` unless CPUID offers both SMEP and SMAP.
fn jump_without_features(c: &mut Code<'_>, target: &str) -> Done {
    const BOTH: u32 = 1 << 7 | 1 << 20;
    let target = c.address(target);
    c.mov(eax, 7)?;
    c.xor(ecx, ecx)?;
    c.cpuid()?;
    c.and(ebx, BOTH)?;
    c.cmp(ebx, BOTH)?;
    Ok(c.jne(u64::from(target))?)
}

fn select(c: &mut Code<'_>, control: Control) -> Done {
    let cr0_bits = if control.wp { Cr0::WP } else { 0 } as u32;
    let cr4_bits = if control.smep { Cr4::SMEP } else { 0 } as u32 | if control.smap { Cr4::SMAP } else { 0 } as u32;
    let cr4_mask = !((Cr4::SMEP | Cr4::SMAP) as u32);
    if c.bits() == 64 {
        c.mov(rax, cr0)?;
        c.and(eax, !(Cr0::WP as u32))?;
        c.or(eax, cr0_bits)?;
        c.mov(cr0, rax)?;
        c.mov(rax, cr4)?;
        c.and(eax, cr4_mask)?;
        c.or(eax, cr4_bits)?;
        return Ok(c.mov(cr4, rax)?);
    }
    c.mov(eax, cr0)?;
    c.and(eax, !(Cr0::WP as u32))?;
    c.or(eax, cr0_bits)?;
    c.mov(cr0, eax)?;
    c.mov(eax, cr4)?;
    c.and(eax, cr4_mask)?;
    c.or(eax, cr4_bits)?;
    Ok(c.mov(cr4, eax)?)
}

fn one_page(c: &mut Code<'_>, leaves: Leaves, leaf: Leaf, control: Control) -> Done {
    let entry = leaves.entry(PAGE);
    let bits = 1 | u32::from(leaf.write) << 1 | u32::from(leaf.user) << 2;
    c.mov(dword_ptr(entry), DEMAND_FRAME | bits)?;
    c.mov(dword_ptr(entry + 4), u32::from(leaf.no_execute) << 31)?;
    c.invlpg(byte_ptr(PAGE))?;
    for attempt in [Attempt::Read, Attempt::Fetch, Attempt::Write] {
        let (address, expected) = match attempt {
            Attempt::Fetch => (PAGE + 0x800, fault(leaf, control, attempt)),
            _ => (PAGE, fault(leaf, control, attempt)),
        };
        match expected {
            Some(code) => check_page_fault(c, code, address, |c| make(c, attempt))?,
            None => {
                make(c, attempt)?;
                if attempt == Attempt::Read {
                    check(c, ebx, READ_DATA)?;
                }
            }
        }
        c.mov(esp, STACK_TOP)?;
    }
    // Dirty if the write was allowed, accessed if anything was.
    let allowed = |attempt| fault(leaf, control, attempt).is_none();
    let accessed = allowed(Attempt::Read) || allowed(Attempt::Write) || allowed(Attempt::Fetch);
    let expected = u32::from(accessed) << 5 | u32::from(allowed(Attempt::Write)) << 6;
    c.mov(eax, dword_ptr(entry))?;
    c.and(eax, 0x60)?;
    check(c, eax, expected)
}

fn make(c: &mut Code<'_>, attempt: Attempt) -> Done {
    match attempt {
        Attempt::Read => Ok(c.mov(ebx, dword_ptr(PAGE))?),
        Attempt::Write => Ok(c.mov(dword_ptr(PAGE), READ_DATA)?),
        Attempt::Fetch => {
            c.mov(eax, PAGE + 0x800)?;
            if c.bits() == 64 {
                return Ok(c.call(rax)?);
            }
            Ok(c.call(eax)?)
        }
    }
}
