//! The loops, each with one quantity.

use super::timed;
use crate::embedded::switches::trip_loop;
use crate::embedded::tables::{ABSENT, DEMAND_ENTRY, GLOBAL, GLOBAL_FRAMES, IDENTITY, global_entry, root, root_leaves};
use crate::link::Code;
use crate::pc::variable;
use crate::report::print;
use crate::stages::Done;
use iced_x86::code_asm::*;
use umbra_arch::control::{Cr0, Cr4, Efer};
use umbra_arch::fault::vector;
use umbra_arch::msr::IA32_EFER;

/// PML4s beyond the embedded guest's: copies that lead to the same tables.
const MANY_ROOTS: u32 = 0x20_0000;
/// How many.
const MOST: u32 = 64;
/// PML4, PDPT, directory and table that a "fork" copies into.
const FORK: u32 = 0x4_8000;
/// A table for 2..4 MiB.
const COLD: u32 = 0x4_c000;
const COLD_AT: u32 = 0x20_0000;
/// Entries of a table.
const ENTRIES: u32 = 512;
/// P, R/W.
const PW: u32 = 3;

/// Tables of the ROM's own. In protected mode without paging.
pub fn prepare(c: &mut Code<'_>) -> Done {
    let mut next = c.create_label();
    c.mov(edi, MANY_ROOTS)?;
    c.mov(ecx, MOST * 0x1000 / 4)?;
    c.xor(eax, eax)?;
    c.rep().stosd()?;
    c.mov(edi, MANY_ROOTS)?;
    c.set_label(&mut next)?;
    c.mov(dword_ptr(edi), (root(0) + 0x1000) | PW)?;
    c.add(edi, 0x1000)?;
    c.cmp(edi, MANY_ROOTS + MOST * 0x1000)?;
    Ok(c.jb(next)?)
}

/// The rest of them, under the first root.
pub fn enter(c: &mut Code<'_>) -> Done {
    c.mov(edi, FORK)?;
    c.mov(ecx, (COLD + 0x1000 - FORK) / 4)?;
    c.xor(eax, eax)?;
    c.rep().stosd()?;
    for level in 0..3 {
        let table = FORK + level * 0x1000;
        c.mov(dword_ptr(table), (table + 0x1000) | PW)?;
    }
    Ok(c.mov(dword_ptr(root(0) + 0x2000 + 8), COLD | PW)?)
}

/// All loops.
pub fn all(c: &mut Code<'_>) -> Done {
    timed(c, "wp", 1_000_000, |c| flip_cr0(c, Cr0::WP))?;
    for roots in [2, 4, 16, 64] {
        timed(c, &format!("cr3-{roots}"), 500_000, |c| switch(c, roots, 0))?;
    }
    first_root(c)?;
    pcid(c)?;
    timed(c, "invlpg", 500_000, |c| {
        c.invlpg(byte_ptr(IDENTITY))?;
        Ok(c.mov(ebx, dword_ptr(IDENTITY))?)
    })?;
    timed(c, "pte-touch", 300_000, edit_and_touch)?;
    timed(c, "pf", 300_000, page_fault)?;
    timed(c, "pf-map", 300_000, page_fault_that_maps)?;
    timed(c, "pge", 200_000, |c| flip_cr4(c, Cr4::PGE))?;
    timed(c, "nxe", 200_000, flip_nxe)?;
    trips(c, "pae", 100_000)?;
    trips(c, "2-level", 100_000)?;
    timed(c, "fork", 5_000, fork)?;
    timed(c, "cold-512-pages", 1_000, cold)
}

fn flip_cr0(c: &mut Code<'_>, bit: u64) -> Done {
    c.mov(rax, cr0)?;
    c.xor(eax, bit as u32)?;
    Ok(c.mov(cr0, rax)?)
}

fn flip_cr4(c: &mut Code<'_>, bit: u64) -> Done {
    c.mov(rax, cr4)?;
    c.xor(eax, bit as u32)?;
    c.mov(cr4, rax)?;
    Ok(c.mov(ebx, dword_ptr(GLOBAL))?)
}

/// To one of `roots`, in turn; `low` goes into CR3's low bits with the root's number.
fn switch(c: &mut Code<'_>, roots: u32, low: u32) -> Done {
    c.mov(eax, r13d)?;
    c.and(eax, roots - 1)?;
    c.shl(eax, 12)?;
    c.add(eax, MANY_ROOTS | low)?;
    c.mov(cr3, rax)?;
    Ok(c.mov(ebx, dword_ptr(IDENTITY))?)
}

fn first_root(c: &mut Code<'_>) -> Done {
    c.mov(eax, root(0))?;
    Ok(c.mov(cr3, rax)?)
}

/// Between 16 PCIDs without a flush. Optional: without PCID in CPUID nothing is printed.
fn pcid(c: &mut Code<'_>) -> Done {
    let mut absent = c.create_label();
    c.mov(eax, 1)?;
    c.cpuid()?;
    c.test(ecx, 1u32 << 17)?;
    c.je(absent)?;
    flip_cr4(c, Cr4::PCIDE)?;
    timed(c, "pcid-16", 500_000, |c| {
        c.mov(eax, r13d)?;
        c.and(eax, 15)?;
        c.mov(ecx, eax)?;
        c.shl(eax, 12)?;
        c.lea(eax, dword_ptr(rax + rcx + MANY_ROOTS as i32))?;
        c.bts(rax, 63)?;
        c.mov(cr3, rax)?;
        Ok(c.mov(ebx, dword_ptr(IDENTITY))?)
    })?;
    first_root(c)?;
    flip_cr4(c, Cr4::PCIDE)?;
    c.set_label(&mut absent)?;
    Ok(c.nop()?)
}

/// Another frame behind a page.
fn edit_and_touch(c: &mut Code<'_>) -> Done {
    let entry = root_leaves(0).entry(GLOBAL);
    c.mov(eax, r13d)?;
    c.and(eax, 1)?;
    c.shl(eax, 12)?;
    c.add(eax, global_entry(0).min(global_entry(1)))?;
    c.mov(dword_ptr(entry), eax)?;
    c.invlpg(byte_ptr(GLOBAL))?;
    const _: () = assert!(GLOBAL_FRAMES[0] ^ GLOBAL_FRAMES[1] != 0);
    Ok(c.mov(ebx, dword_ptr(GLOBAL))?)
}

/// Into the handler and on behind the access.
fn page_fault(c: &mut Code<'_>) -> Done {
    let after = c.fresh_name();
    let at = c.address(&after);
    let (resume, expect) = (c.dword(variable::RESUME), c.dword(variable::EXPECT));
    c.mov(resume, at)?;
    c.mov(expect, u32::from(vector::PF))?;
    c.mov(ebx, dword_ptr(ABSENT))?;
    c.name(&after)?;
    Ok(c.nop()?)
}

/// Into the handler, which maps the page, and back to the access; then the page goes.
fn page_fault_that_maps(c: &mut Code<'_>) -> Done {
    let entry = root_leaves(0).entry(ABSENT);
    let (map_at, map_value) = (c.dword(variable::MAP_AT), c.dword(variable::MAP_VALUE));
    c.mov(map_value, DEMAND_ENTRY)?;
    c.mov(map_at, entry)?;
    c.mov(ebx, dword_ptr(ABSENT))?;
    c.mov(dword_ptr(entry), 0)?;
    Ok(c.invlpg(byte_ptr(ABSENT))?)
}

fn flip_nxe(c: &mut Code<'_>) -> Done {
    c.mov(ecx, IA32_EFER)?;
    c.rdmsr()?;
    c.xor(eax, Efer::NXE as u32)?;
    c.wrmsr()?;
    Ok(c.mov(ebx, dword_ptr(IDENTITY))?)
}

/// Long mode, 32-bit paging, long mode.
fn trips(c: &mut Code<'_>, mode: &str, count: u32) -> Done {
    c.mov(r12d, count)?;
    trip_loop(c, &format!("far trip {mode}"))?;
    print(c, &format!("@@U trip-{mode} {count}\n"))
}

/// Copies a table of 512 entries, goes to the copy's root, reads through it, returns.
fn fork(c: &mut Code<'_>) -> Done {
    c.mov(esi, root_leaves(0).entry(0))?;
    c.mov(edi, FORK + 0x3000)?;
    c.mov(ecx, ENTRIES)?;
    c.rep().movsq()?;
    c.mov(eax, FORK)?;
    c.mov(cr3, rax)?;
    for page in 0..8 {
        c.mov(ebx, dword_ptr(0x1_0000 + page * 0x1000))?;
    }
    first_root(c)
}

/// Writes a table anew and reads through each of its entries.
fn cold(c: &mut Code<'_>) -> Done {
    let (mut write, mut read) = (c.create_label(), c.create_label());
    c.mov(edi, COLD)?;
    c.mov(ecx, ENTRIES)?;
    c.xor(eax, eax)?;
    c.rep().stosq()?;
    c.mov(eax, COLD_AT | PW)?;
    c.mov(edi, COLD)?;
    c.set_label(&mut write)?;
    c.mov(dword_ptr(edi), eax)?;
    c.add(eax, 0x1000)?;
    c.add(edi, 8)?;
    c.cmp(edi, COLD + 0x1000)?;
    c.jb(write)?;
    c.mov(rax, cr3)?;
    c.mov(cr3, rax)?;
    c.mov(edi, COLD_AT)?;
    c.set_label(&mut read)?;
    c.mov(ebx, dword_ptr(edi))?;
    c.add(edi, 0x1000)?;
    c.cmp(edi, COLD_AT + ENTRIES * 0x1000)?;
    Ok(c.jb(read)?)
}
