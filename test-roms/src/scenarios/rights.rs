//! Rights that control registers, keys and upper entries decide about, and A and D.

use super::*;
use umbra_arch::control::{Cr0, Cr4};

const SMEP: u32 = 1 << 7;
const SMAP: u32 = 1 << 20;
const PKU: u32 = 1 << 3;

pub fn all(c: &mut Code<'_>) -> Done {
    section(c, "3, 4: WP off, a write, WP on", write_protect)?;
    section(c, "11, 12: NXE and bit 63", no_execute)?;
    with(c, Word::Ebx7, SMEP, "5, 6, 13-16: SMEP", smep)?;
    with(c, Word::Ebx7, SMEP, "21: U of upper entries", upper_user)?;
    with(c, Word::Ebx7, SMAP, "7, 17, 18, 20: SMAP, STAC, CLAC", smap)?;
    with(c, Word::Ecx7, PKU, "22, 23: protection keys", keys)?;
    section(c, "72: accessed and dirty", accessed_dirty)?;
    map(c, P | W, 0)
}

fn write_protect(c: &mut Code<'_>) -> Done {
    map(c, P | U, 0)?;
    for _ in 0..2 {
        write_faults(c, 3)?;
        cr0_bits(c, Cr0::WP, 0)?;
        write(c)?;
        reads(c, PAGE, FRAME)?;
        cr0_bits(c, 0, Cr0::WP)?;
    }
    write_faults(c, 3)?;
    marks(c, ENTRY, A | D)
}

fn no_execute(c: &mut Code<'_>) -> Done {
    map(c, P | W, XD)?;
    for _ in 0..2 {
        reads(c, PAGE, FRAME)?;
        fetch_faults(c, 0x11)?;
        change_efer(c, Efer::NXE, 0)?;
        reload(c)?;
        read_faults(c, 9)?;
        write_faults(c, 0xb)?;
        // Reserved bits make no translation: nothing to flush.
        change_efer(c, 0, Efer::NXE)?;
    }
    reads(c, PAGE, FRAME)
}

fn smep(c: &mut Code<'_>) -> Done {
    // A user page that was written with WP off.
    map(c, P | U, 0)?;
    cr0_bits(c, Cr0::WP, 0)?;
    write(c)?;
    fetch(c)?;
    cr4_bits(c, 0, Cr4::SMEP)?;
    fetch_faults(c, 0x11)?;
    write(c)?;
    fetch_faults(c, 0x11)?;
    cr0_bits(c, 0, Cr0::WP)?;
    fetch_faults(c, 0x11)?;
    cr4_bits(c, Cr4::SMEP, 0)?;
    fetch(c)?;
    // I/D of the error code: NXE or SMEP.
    map(c, 0, 0)?;
    fetch_faults(c, 0x10)?;
    change_efer(c, Efer::NXE, 0)?;
    fetch_faults(c, 0)?;
    cr4_bits(c, 0, Cr4::SMEP)?;
    fetch_faults(c, 0x10)?;
    cr4_bits(c, Cr4::SMEP, 0)?;
    change_efer(c, 0, Efer::NXE)
}

/// One U that is clear makes a supervisor page.
fn upper_user(c: &mut Code<'_>) -> Done {
    cr4_bits(c, 0, Cr4::SMEP)?;
    map(c, P | W | U, 0)?;
    fetch_faults(c, 0x11)?;
    c.and(dword_ptr(DIRECTORY_ENTRY), !(U as i32))?;
    reload(c)?;
    fetch(c)?;
    c.or(dword_ptr(DIRECTORY_ENTRY), U)?;
    reload(c)?;
    fetch_faults(c, 0x11)?;
    map(c, P | W, 0)?;
    fetch(c)?;
    cr4_bits(c, Cr4::SMEP, 0)
}

fn smap(c: &mut Code<'_>) -> Done {
    map(c, P | U, 0)?;
    cr0_bits(c, Cr0::WP, 0)?;
    write(c)?;
    cr4_bits(c, 0, Cr4::SMAP)?;
    reload(c)?;
    read_faults(c, 1)?;
    write_faults(c, 3)?;
    fetch(c)?;
    for _ in 0..2 {
        c.stac()?;
        reads(c, PAGE, FRAME)?;
        write(c)?;
        c.clac()?;
        read_faults(c, 1)?;
    }
    cr0_bits(c, 0, Cr0::WP)?;
    c.stac()?;
    reads(c, PAGE, FRAME)?;
    write_faults(c, 3)?;
    cr4_bits(c, Cr4::SMAP, 0)?;
    c.clac()?;
    reads(c, PAGE, FRAME)
}

/// Key 2 in an entry's upper half.
pub(super) const KEY: u32 = 2 << 27;

/// Writes PKRU.
pub(super) fn set_pkru(c: &mut Code<'_>, value: u32) -> Done {
    c.mov(eax, value)?;
    c.xor(ecx, ecx)?;
    c.xor(edx, edx)?;
    Ok(c.wrpkru()?)
}

/// Key 2: PKRU's bits 4 (access) and 5 (write).
fn keys(c: &mut Code<'_>) -> Done {
    cr4_bits(c, 0, Cr4::PKE)?;
    set_pkru(c, 0)?;
    map(c, P | W | U, KEY)?;
    reads(c, PAGE, FRAME)?;
    write(c)?;
    set_pkru(c, 0x20)?;
    reads(c, PAGE, FRAME)?;
    write_faults(c, 0x23)?;
    cr0_bits(c, Cr0::WP, 0)?;
    write(c)?;
    cr0_bits(c, 0, Cr0::WP)?;
    write_faults(c, 0x23)?;
    set_pkru(c, 0x10)?;
    read_faults(c, 0x21)?;
    fetch(c)?;
    cr4_bits(c, Cr4::PKE, 0)?;
    reads(c, PAGE, FRAME)?;
    cr4_bits(c, 0, Cr4::PKE)?;
    read_faults(c, 0x21)?;
    // A supervisor page has no use for PKRU.
    map(c, P | W, KEY)?;
    reads(c, PAGE, FRAME)?;
    // Reserved: the key isn't looked at.
    map(c, P | W | U, KEY | XD)?;
    change_efer(c, Efer::NXE, 0)?;
    read_faults(c, 9)?;
    change_efer(c, 0, Efer::NXE)?;
    set_pkru(c, 0)?;
    cr4_bits(c, Cr4::PKE, 0)
}

fn accessed_dirty(c: &mut Code<'_>) -> Done {
    map(c, P, 0)?;
    write_faults(c, 3)?;
    map(c, P | W, 0)?;
    reads(c, PAGE, FRAME)?;
    marks(c, ENTRY, A)?;
    write(c)?;
    marks(c, ENTRY, A | D)?;
    for _ in 0..2 {
        c.and(dword_ptr(ENTRY), !(D as i32))?;
        c.invlpg(byte_ptr(PAGE))?;
        reads(c, PAGE, FRAME)?;
        marks(c, ENTRY, A)?;
        write(c)?;
        marks(c, ENTRY, A | D)?;
    }
    // All levels on a read.
    for level in 0..3 {
        c.and(dword_ptr(root(0) + level * 0x1000), !(A as i32))?;
    }
    c.and(dword_ptr(ENTRY), !((A | D) as i32))?;
    reload(c)?;
    reads(c, PAGE, FRAME)?;
    marks(c, ENTRY, A)?;
    for level in 0..3 {
        c.mov(eax, dword_ptr(root(0) + level * 0x1000))?;
        c.and(eax, A)?;
        check(c, eax, A)?;
    }
    Ok(())
}
