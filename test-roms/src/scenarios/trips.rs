//! Trips from 64-bit code through other paging modes and back, and what 32-bit paging modes say of CR4 and CR0.

use super::*;
use crate::embedded::protected::{change_cr0, change_cr4, enter_four_level, enter_pae, enter_two_level, leave_paging};
use crate::embedded::tables::{IDENTITY, PAE, PAE_INDEX, PAE_LEAVES, TWO_LEVEL, TWO_LEVEL_LEAVES, signature};
use crate::pc::selector;
use umbra_arch::control::{Cr0, Cr4};

const SMEP: u32 = 1 << 7;
const SMAP: u32 = 1 << 20;
const PKU: u32 = 1 << 3;
const LA57: u32 = 1 << 16;
const GIB: u32 = 0x4000_0000;
const LARGE: u32 = 0x20_0000;

/// A trip's name and what it does, in 32-bit code without paging, with EFER.LME clear.
type Trip = (&'static str, fn(&mut Code<'_>) -> Done);

const TRIPS: [Trip; 4] =
    [("pae", pae_trip), ("pae edit", pae_edit_trip), ("undo", undo_trip), ("five levels", five_level_trip)];

/// The sections in 32-bit code without paging.
pub fn protected(c: &mut Code<'_>) -> Done {
    section(c, "33: PDPTEs changed in memory", changed_pdptes)?;
    with(c, Word::Ebx7, SMEP | SMAP, "33: ... and SMEP, SMAP", |c| {
        let (smep, smap) = (|c: &mut Code<'_>| flip(c, Cr4::SMEP), |c: &mut Code<'_>| flip(c, Cr4::SMAP));
        second_gib(c, |c| {
            stays(c, smap)?;
            loads(c, smep)?;
            loads(c, smep)
        })
    })?;
    with(c, Word::Ecx7, PKU, "33: ... and PKE", |c| second_gib(c, |c| stays(c, |c| flip(c, Cr4::PKE))))?;
    section(c, "37: PAE with paging on", pae_under_paging)
}

pub fn long(c: &mut Code<'_>) -> Done {
    section(c, "31: to PAE paging and back", |c| {
        for frame in [FRAME, OTHER_FRAME, FRAME] {
            set(c, ENTRY, frame | P | W, 0)?;
            c.invlpg(byte_ptr(PAGE))?;
            reads(c, PAGE, frame)?;
            go(c, "pae")?;
            reads(c, PAGE, frame)?;
            reads(c, IDENTITY, signature(0))?;
        }
        map(c, P | W, 0)
    })?;
    section(c, "32: a topmost entry changed without paging", |c| {
        for _ in 0..2 {
            reads(c, IDENTITY, signature(0))?;
            go(c, "pae edit")?;
            reads(c, IDENTITY, signature(1))?;
            read_faults(c, 0)?;
            go(c, "undo")?;
            reads(c, IDENTITY, signature(0))?;
            reads(c, PAGE, FRAME)?;
        }
        Ok(())
    })?;
    with(c, Word::Ecx7, LA57, "42: 4-level and 5-level paging by one table", |c| {
        go(c, "five levels")?;
        reads(c, IDENTITY, signature(0))
    })
}

/// Makes a trip; execution goes on behind it in 64-bit code under root 0.
fn go(c: &mut Code<'_>, name: &str) -> Done {
    let back = c.fresh_name();
    let (far, back_at) = (c.address(&format!("far trip {name}")), c.address(&back));
    c.mov(dword_ptr(crate::pc::variable::RESUME), back_at)?;
    c.jmp(fword_ptr(far))?;
    c.name(&back)?;
    let idtr = c.address("idtr.64");
    Ok(c.lidt(fword_ptr(idtr))?)
}

pub fn data(l: &mut Linker) -> Done {
    for (name, body) in TRIPS {
        l.code(32, |c| {
            c.name(&format!("trip {name}"))?;
            // Checks of faults put another address there.
            c.mov(ebp, dword_ptr(crate::pc::variable::RESUME))?;
            leave_paging(c)?;
            clear_lme(c)?;
            body(c)?;
            enter_four_level(c)?;
            let back = c.address("back from trips");
            Ok(c.jmp_far(selector::CODE64, back)?)
        })?;
        let mut far = l.address(&format!("trip {name}")).to_le_bytes().to_vec();
        far.extend_from_slice(&selector::CODE32.to_le_bytes());
        l.data(&format!("far trip {name}"), &far)?;
    }
    l.code(64, |c| {
        c.name("back from trips")?;
        c.mov(eax, ebp)?;
        Ok(c.jmp(rax)?)
    })
}

/// PAE paging maps the page to the other frame than the root does.
fn pae_trip(c: &mut Code<'_>) -> Done {
    let idtr = c.address("idtr.32");
    c.lidt(fword_ptr(idtr))?;
    c.mov(dword_ptr(PAE_LEAVES.entry(PAGE)), OTHER_FRAME | P)?;
    for _ in 0..2 {
        enter_pae(c)?;
        reads(c, PAGE, OTHER_FRAME)?;
        reads(c, IDENTITY, signature(PAE_INDEX))?;
        write_faults(c, 3)?;
        leave_paging(c)?;
    }
    Ok(c.mov(dword_ptr(PAE_LEAVES.entry(PAGE)), 0)?)
}

/// The root's topmost entry leads to root 1's tables afterwards.
fn pae_edit_trip(c: &mut Code<'_>) -> Done {
    pae_trip(c)?;
    Ok(c.mov(dword_ptr(root(0)), (root(1) + 0x1000) | P | W | U)?)
}

fn undo_trip(c: &mut Code<'_>) -> Done {
    Ok(c.mov(dword_ptr(root(0)), (root(0) + 0x1000) | P | W | U)?)
}

/// One table is the topmost one of 4 levels and of 5. Its first entry leads to a second one, whose first entry leads to
/// a third one, whose entries are pages of 2 MiB, or of 1 GiB, at 0.
fn five_level_trip(c: &mut Code<'_>) -> Done {
    const TOP: u32 = SPARE[0];
    const HIGH: u32 = LARGE + FRAME;
    c.mov(dword_ptr(TOP), SPARE[1] | P | W)?;
    c.mov(dword_ptr(SPARE[1]), SPARE[2] | P | W)?;
    for at in 0..2 {
        c.mov(dword_ptr(SPARE[2] + 8 * at), P | W | PS)?;
    }
    c.mov(dword_ptr(HIGH), 0x5700_5700)?;
    let idtr = c.address("idtr.64");
    c.lidt(fword_ptr(idtr))?;
    change_efer(c, 0, Efer::LME)?;
    for _ in 0..3 {
        for levels in [4, 5] {
            let la57 = Cr4::LA57;
            change_cr4(c, if levels == 4 { la57 } else { 0 }, if levels == 5 { la57 | Cr4::PAE } else { Cr4::PAE })?;
            c.mov(eax, TOP)?;
            c.mov(cr3, eax)?;
            change_cr0(c, 0, Cr0::PG)?;
            reads(c, FRAME, FRAME)?;
            let (second, absent) = if levels == 4 { (FRAME, GIB + FRAME) } else { (0x5700_5700, 2 * GIB + FRAME) };
            reads(c, HIGH, second)?;
            check_page_fault(c, 0, absent, |c| Ok(c.mov(ebx, dword_ptr(absent))?))?;
            if levels == 5 {
                reads(c, GIB + FRAME, FRAME)?;
            }
            // What it is for the other number of levels doesn't matter here.
            c.invlpg(byte_ptr(GIB + FRAME))?;
            c.invlpg(byte_ptr(HIGH))?;
            reads(c, HIGH, second)?;
            leave_paging(c)?;
        }
    }
    change_cr4(c, Cr4::LA57, 0)?;
    for at in [TOP, SPARE[1], SPARE[2], SPARE[2] + 8] {
        c.mov(dword_ptr(at), 0)?;
    }
    clear_lme(c)
}

/// Flips bits of CR4.
fn flip(c: &mut Code<'_>, bits: u64) -> Done {
    c.mov(eax, cr4)?;
    c.xor(eax, bits as u32)?;
    Ok(c.mov(cr4, eax)?)
}

/// PAE paging with the second GiB like the first one, by an entry that is not in memory any more.
fn second_gib(c: &mut Code<'_>, body: impl FnOnce(&mut Code<'_>) -> Done) -> Done {
    c.mov(dword_ptr(PAE_LEAVES.entry(PAGE)), FRAME | P | W)?;
    change(c, true)?;
    enter_pae(c)?;
    reads(c, GIB + PAGE, FRAME)?;
    body(c)?;
    leave_paging(c)?;
    change(c, false)?;
    Ok(c.mov(dword_ptr(PAE_LEAVES.entry(PAGE)), 0)?)
}

/// Writes the second PDPTE.
fn change(c: &mut Code<'_>, present: bool) -> Done {
    Ok(c.mov(dword_ptr(PAE + 8), if present { (PAE + 0x1000) | P } else { 0 })?)
}

fn is_there(c: &mut Code<'_>, there: bool) -> Done {
    if there {
        return reads(c, GIB + PAGE, FRAME);
    }
    check_page_fault(c, 0, GIB + PAGE, |c| Ok(c.mov(ebx, dword_ptr(GIB + PAGE))?))
}

/// `what`, done twice, leaves the processor's PDPTEs alone, and is undone.
fn stays(c: &mut Code<'_>, what: impl Fn(&mut Code<'_>) -> Done) -> Done {
    change(c, false)?;
    is_there(c, true)?;
    for _ in 0..2 {
        what(c)?;
        is_there(c, true)?;
    }
    change(c, true)
}

/// `what` loads the PDPTEs, and doing it again does.
fn loads(c: &mut Code<'_>, what: impl Fn(&mut Code<'_>) -> Done) -> Done {
    for there in [false, true] {
        change(c, there)?;
        is_there(c, !there)?;
        what(c)?;
        is_there(c, there)?;
    }
    Ok(())
}

fn changed_pdptes(c: &mut Code<'_>) -> Done {
    second_gib(c, |c| {
        stays(c, |c| {
            c.mov(eax, cr0)?;
            c.xor(eax, Cr0::WP as u32)?;
            Ok(c.mov(cr0, eax)?)
        })?;
        stays(c, |c| Ok(c.invlpg(byte_ptr(GIB + PAGE))?))?;
        loads(c, |c| {
            // NW alone is refused.
            c.mov(eax, cr0)?;
            c.xor(eax, (Cr0::CD | Cr0::NW) as u32)?;
            Ok(c.mov(cr0, eax)?)
        })?;
        loads(c, |c| flip(c, Cr4::PGE))?;
        loads(c, |c| flip(c, Cr4::PSE))
    })
}

/// CR3 names a directory of 2-level paging, and PDPTEs within it.
fn pae_under_paging(c: &mut Code<'_>) -> Done {
    /// Entries of the last MiBs, which nothing uses.
    const POINTERS: u32 = 0xfe0;
    c.mov(dword_ptr(TWO_LEVEL_LEAVES.entry(PAGE)), FRAME | P | W)?;
    c.mov(dword_ptr(PAE_LEAVES.entry(PAGE)), OTHER_FRAME | P | W)?;
    enter_two_level(c)?;
    c.mov(eax, TWO_LEVEL | POINTERS)?;
    c.mov(cr3, eax)?;
    for _ in 0..2 {
        reads(c, PAGE, FRAME)?;
        c.mov(dword_ptr(TWO_LEVEL + POINTERS), (PAE + 0x1000) | P | W)?;
        general_protection(c, |c| change_cr4(c, 0, Cr4::PAE))?;
        c.mov(eax, cr4)?;
        c.and(eax, Cr4::PAE as u32)?;
        check(c, eax, 0)?;
        reads(c, PAGE, FRAME)?;
        c.mov(dword_ptr(TWO_LEVEL + POINTERS), (PAE + 0x1000) | P)?;
        change_cr4(c, 0, Cr4::PAE)?;
        reads(c, PAGE, OTHER_FRAME)?;
        reads(c, IDENTITY, signature(PAE_INDEX))?;
        change_cr4(c, Cr4::PAE, 0)?;
    }
    reads(c, PAGE, FRAME)?;
    leave_paging(c)?;
    for at in [TWO_LEVEL + POINTERS, TWO_LEVEL_LEAVES.entry(PAGE), PAE_LEAVES.entry(PAGE)] {
        c.mov(dword_ptr(at), 0)?;
    }
    Ok(())
}
