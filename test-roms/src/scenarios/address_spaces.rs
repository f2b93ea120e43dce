//! CR3, PCIDs, global pages and the instructions that invalidate.

use super::*;
use umbra_arch::control::{Cr0, Cr4};

const PCID: u32 = 1 << 17;
const INVPCID: u32 = 1 << 10;
/// INVPCID's operand.
const DESCRIPTOR: u32 = crate::pc::variable::SCRATCH + 64;
/// Two frames to tell apart.
const FRAMES: [u32; 2] = [FRAME, OTHER_FRAME];

pub fn all(c: &mut Code<'_>) -> Done {
    section(c, "24, 27, 38, 41, 44, 45: refused in 64-bit mode", refused)?;
    section(c, "49: CR3's reserved bits", cr3_bits)?;
    section(c, "56, 61, 62: reloads, INVLPG, changed rights", invalidated)?;
    section(c, "58, 59: global pages", global)?;
    section(c, "63: INVLPG of a non-canonical address", |c| {
        map(c, P | W, 0)?;
        reads(c, PAGE, FRAME)?;
        c.mov(rax, 0x8000_0000_0000_0000u64)?;
        c.invlpg(byte_ptr(rax))?;
        reads(c, PAGE, FRAME)
    })?;
    with(c, Word::Ecx1, PCID, "50-53, 55: PCIDs", pcids)?;
    with(c, Word::Ebx7, INVPCID, "54, 63: INVPCID", invpcid)?;
    map(c, P | W, 0)
}

fn refused(c: &mut Code<'_>) -> Done {
    general_protection(c, |c| cr0_bits(c, Cr0::PG, 0))?;
    general_protection(c, |c| cr4_bits(c, Cr4::PAE, 0))?;
    general_protection(c, |c| {
        c.mov(rax, cr4)?;
        c.xor(eax, Cr4::LA57 as u32)?;
        Ok(c.mov(cr4, rax)?)
    })?;
    general_protection(c, |c| {
        c.mov(rax, cr4)?;
        c.xor(eax, (Cr4::LA57 | Cr4::PSE) as u32)?;
        Ok(c.mov(cr4, rax)?)
    })?;
    general_protection(c, |c| change_efer(c, Efer::LME, 0))?;
    c.mov(ecx, umbra_arch::msr::IA32_EFER)?;
    c.rdmsr()?;
    c.and(eax, (Efer::LMA | Efer::LME) as u32)?;
    check(c, eax, (Efer::LMA | Efer::LME) as u32)?;
    map(c, P | W, 0)?;
    reads(c, PAGE, FRAME)
}

fn cr3_bits(c: &mut Code<'_>) -> Done {
    for bit in [55, 63] {
        general_protection(c, |c| {
            c.mov(rax, u64::from(root(1)) | 1 << bit)?;
            Ok(c.mov(cr3, rax)?)
        })?;
        c.mov(rax, cr3)?;
        check(c, eax, root(0))?;
    }
    Ok(())
}

fn invalidated(c: &mut Code<'_>) -> Done {
    map(c, P, 0)?;
    reads(c, PAGE, FRAME)?;
    c.mov(dword_ptr(ENTRY), OTHER_FRAME | P)?;
    reload(c)?;
    reads(c, PAGE, OTHER_FRAME)?;
    // More rights need nothing.
    write_faults(c, 3)?;
    c.mov(dword_ptr(ENTRY), OTHER_FRAME | P | W)?;
    c.mov(dword_ptr(PAGE), OTHER_FRAME)?;
    c.mov(dword_ptr(ENTRY), 0)?;
    c.invlpg(byte_ptr(PAGE))?;
    read_faults(c, 0)?;
    write_faults(c, 2)?;
    c.mov(dword_ptr(ENTRY), FRAME | P)?;
    reads(c, PAGE, FRAME)
}

fn global(c: &mut Code<'_>) -> Done {
    cr4_bits(c, 0, Cr4::PGE)?;
    for round in 0..2 {
        let (now, then) = (FRAMES[round], FRAMES[1 - round]);
        set(c, ENTRY, now | P | W | G, 0)?;
        c.invlpg(byte_ptr(PAGE))?;
        reads(c, PAGE, now)?;
        c.mov(dword_ptr(ENTRY), then | P | W | G)?;
        cr4_bits(c, if round == 0 { Cr4::PGE } else { 0 }, if round == 0 { 0 } else { Cr4::PGE })?;
        reads(c, PAGE, then)?;
    }
    // Under another root, INVLPG is for global entries too.
    set(c, ENTRY, FRAME | P | W | G, 0)?;
    c.invlpg(byte_ptr(PAGE))?;
    reads(c, PAGE, FRAME)?;
    c.mov(dword_ptr(ENTRY), OTHER_FRAME | P | W | G)?;
    load_cr3(c, 1, 0, false)?;
    c.invlpg(byte_ptr(PAGE))?;
    load_cr3(c, 0, 0, false)?;
    reads(c, PAGE, OTHER_FRAME)?;
    cr4_bits(c, Cr4::PGE, 0)
}

/// Root, PCID, and whether bit 63 is set.
fn load_cr3(c: &mut Code<'_>, number: u32, pcid: u32, keep: bool) -> Done {
    c.mov(rax, u64::from(root(number) | pcid) | u64::from(keep) << 63)?;
    Ok(c.mov(cr3, rax)?)
}

fn pcids(c: &mut Code<'_>) -> Done {
    map(c, P | W, 0)?;
    general_protection(c, |c| {
        load_cr3(c, 0, 8, false)?;
        cr4_bits(c, 0, Cr4::PCIDE)
    })?;
    load_cr3(c, 0, 0, false)?;
    cr4_bits(c, 0, Cr4::PCIDE)?;
    // Bit 63 isn't stored.
    load_cr3(c, 0, 1, true)?;
    c.mov(rax, cr3)?;
    c.mov(rbx, rax)?;
    c.shr(rbx, 32)?;
    check(c, ebx, 0)?;
    check(c, eax, root(0) | 1)?;
    reads(c, PAGE, FRAME)?;
    // To another PCID and back, with the entry changed and invalidated meanwhile.
    for round in 0..4u32 {
        let frame = FRAMES[1 - round as usize % 2];
        load_cr3(c, 1, 2, true)?;
        c.mov(dword_ptr(ENTRY), frame | P | W)?;
        load_cr3(c, 0, 1, round % 2 == 0)?;
        if round % 2 == 0 {
            c.invlpg(byte_ptr(PAGE))?;
        }
        reads(c, PAGE, frame)?;
    }
    // PCIDE off and on forgets all PCIDs.
    load_cr3(c, 0, 0, false)?;
    c.mov(dword_ptr(ENTRY), OTHER_FRAME | P | W)?;
    cr4_bits(c, Cr4::PCIDE, 0)?;
    cr4_bits(c, 0, Cr4::PCIDE)?;
    load_cr3(c, 0, 1, true)?;
    reads(c, PAGE, OTHER_FRAME)?;
    // A root that was in use without PCIDs.
    load_cr3(c, 0, 0, false)?;
    cr4_bits(c, Cr4::PCIDE, 0)?;
    reads(c, PAGE, OTHER_FRAME)?;
    c.mov(dword_ptr(ENTRY), FRAME | P | W)?;
    load_cr3(c, 1, 0, false)?;
    cr4_bits(c, 0, Cr4::PCIDE)?;
    load_cr3(c, 0, 0, true)?;
    c.invlpg(byte_ptr(PAGE))?;
    reads(c, PAGE, FRAME)?;
    cr4_bits(c, Cr4::PCIDE, 0)
}

fn invalidate(c: &mut Code<'_>, kind: u32, pcid: u32, address: u64) -> Done {
    let at = qword_ptr(DESCRIPTOR);
    c.mov(rax, u64::from(pcid))?;
    c.mov(at, rax)?;
    c.mov(rax, address)?;
    c.mov(qword_ptr(DESCRIPTOR + 8), rax)?;
    c.mov(eax, kind)?;
    Ok(c.invpcid(rax, xmmword_ptr(DESCRIPTOR))?)
}

fn invpcid(c: &mut Code<'_>) -> Done {
    general_protection(c, |c| invalidate(c, 4, 0, 0))?;
    general_protection(c, |c| invalidate(c, 1, 0x1000, 0))?;
    general_protection(c, |c| invalidate(c, 0, 0, 0x8000_0000_0000_0000))?;
    // Without PCIDE there is PCID 0 only.
    general_protection(c, |c| invalidate(c, 1, 1, 0))?;
    general_protection(c, |c| invalidate(c, 0, 1, u64::from(PAGE)))?;
    for (kind, round) in [(0, 1), (1, 0), (2, 1), (3, 0)] {
        let (old, new): (u32, u32) = (FRAMES[1 - round], FRAMES[round]);
        map(c, P | W, 0)?;
        set(c, ENTRY, old | P | W, 0)?;
        reload(c)?;
        reads(c, PAGE, old)?;
        c.mov(dword_ptr(ENTRY), new | P | W)?;
        invalidate(c, kind, 0, u64::from(PAGE))?;
        reads(c, PAGE, new)?;
    }
    // Global entries go with type 2.
    cr4_bits(c, 0, Cr4::PGE)?;
    map(c, P | W | G, 0)?;
    reads(c, PAGE, FRAME)?;
    c.mov(dword_ptr(ENTRY), OTHER_FRAME | P | W | G)?;
    invalidate(c, 2, 0, 0)?;
    reads(c, PAGE, OTHER_FRAME)?;
    cr4_bits(c, Cr4::PGE, 0)?;
    // From another address space.
    cr4_bits(c, 0, Cr4::PCIDE)?;
    for (kind, frame) in [(0, FRAME), (1, OTHER_FRAME), (3, FRAME), (2, OTHER_FRAME)] {
        load_cr3(c, 0, 1, true)?;
        c.mov(ebx, dword_ptr(PAGE))?;
        load_cr3(c, 1, 2, true)?;
        c.mov(dword_ptr(ENTRY), frame | P | W)?;
        invalidate(c, kind, if kind < 2 { 1 } else { 0 }, if kind == 0 { u64::from(PAGE) } else { 0 })?;
        load_cr3(c, 0, 1, true)?;
        reads(c, PAGE, frame)?;
    }
    load_cr3(c, 0, 0, false)?;
    cr4_bits(c, Cr4::PCIDE, 0)
}
