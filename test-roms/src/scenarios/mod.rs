//! What a guest can see of an MMU that keeps roots, shadow pages and translations over changes of control registers and
//! tables. Sections name their scenarios by the numbers of the project's list of MMU scenarios.

mod address_spaces;
mod legacy;
mod rights;
mod rings;
mod tables;
mod trips;

use crate::Rom;
use crate::embedded::protected::{change_efer, clear_lme};
use crate::embedded::tables::{ABSENT, DEMAND_FRAME, root, root_leaves};
use crate::link::{Code, Linker};
use crate::pc::STACK_TOP;
use crate::report::{check, check_page_fault, check_raises, section};
use crate::stages::{Done, Stages, build, nothing};
use iced_x86::code_asm::*;
use umbra_arch::control::Efer;
use umbra_arch::fault::vector;

/// Name and expectation.
pub const ROM: Rom = Rom {
    name: "scenarios",
    about: "stale roots, tables and translations: WP, SMEP, SMAP, keys, NXE, PCIDs, global pages, modes, edits of tables",
    expect: "Result: PASS",
    build: || build(&STAGES),
};

const STAGES: Stages = Stages { title: "Umbra scenarios", real: nothing, protected, long, data };

/// The page whose entry the checks change.
const PAGE: u32 = ABSENT;
/// Its entry under 4-level root 0.
const ENTRY: u32 = root_leaves(0).entry(PAGE);
/// The entry of the page directory above it.
const DIRECTORY_ENTRY: u32 = root(0) + 0x2000;
/// The frame that it maps, which holds its own address; a RET at [`CODE`].
const FRAME: u32 = DEMAND_FRAME;
/// Another frame likewise.
const OTHER_FRAME: u32 = 0x4_8000;
/// Frames for tables.
const SPARE: [u32; 4] = [0x4_9000, 0x4_a000, 0x4_b000, 0x4_c000];
/// Offset of the RET.
const CODE: u32 = 0x800;

const P: u32 = 1;
const W: u32 = 2;
const U: u32 = 4;
const A: u32 = 0x20;
const D: u32 = 0x40;
const PS: u32 = 0x80;
const G: u32 = 0x100;
/// Execute-disable in an entry's high half.
const XD: u32 = 1 << 31;

fn protected(c: &mut Code<'_>) -> Done {
    for frame in [FRAME, OTHER_FRAME] {
        c.mov(dword_ptr(frame), frame)?;
        c.mov(byte_ptr(frame + CODE), 0xc3u32)?;
    }
    change_efer(c, 0, Efer::NXE)?;
    legacy::all(c)?;
    trips::protected(c)?;
    clear_lme(c)
}

fn long(c: &mut Code<'_>) -> Done {
    rights::all(c)?;
    address_spaces::all(c)?;
    tables::all(c)?;
    trips::long(c)?;
    rings::all(c)
}

fn data(l: &mut Linker) -> Done {
    trips::data(l)?;
    rings::data(l)
}

/// Writes an entry's low half, then its high one, by way of no present entry.
fn set(c: &mut Code<'_>, at: u32, low: u32, high: u32) -> Done {
    c.mov(dword_ptr(at), 0)?;
    c.mov(dword_ptr(at + 4), high)?;
    Ok(c.mov(dword_ptr(at), low)?)
}

/// Maps [`PAGE`] to [`FRAME`] under root 0 and forgets what was.
fn map(c: &mut Code<'_>, bits: u32, high: u32) -> Done {
    set(c, ENTRY, FRAME | bits, high)?;
    Ok(c.invlpg(byte_ptr(PAGE))?)
}

/// Checks what a read finds.
fn reads(c: &mut Code<'_>, at: u32, value: u32) -> Done {
    c.mov(ebx, dword_ptr(at))?;
    check(c, ebx, value)
}

/// A write of what the frame holds.
fn write(c: &mut Code<'_>) -> Done {
    Ok(c.mov(dword_ptr(PAGE), FRAME)?)
}

fn read_faults(c: &mut Code<'_>, code: u32) -> Done {
    check_page_fault(c, code, PAGE, |c| Ok(c.mov(ebx, dword_ptr(PAGE))?))
}

fn write_faults(c: &mut Code<'_>, code: u32) -> Done {
    check_page_fault(c, code, PAGE, write)
}

/// Calls the RET in [`PAGE`].
fn fetch(c: &mut Code<'_>) -> Done {
    c.mov(eax, PAGE + CODE)?;
    if c.bits() == 64 {
        return Ok(c.call(rax)?);
    }
    Ok(c.call(eax)?)
}

fn fetch_faults(c: &mut Code<'_>, code: u32) -> Done {
    check_page_fault(c, code, PAGE + CODE, fetch)?;
    // The call's push stays behind.
    Ok(c.mov(esp, STACK_TOP)?)
}

/// Checks A and D of the entry at `at`.
fn marks(c: &mut Code<'_>, at: u32, expected: u32) -> Done {
    c.mov(eax, dword_ptr(at))?;
    c.and(eax, A | D)?;
    check(c, eax, expected)
}

fn general_protection(c: &mut Code<'_>, body: impl FnOnce(&mut Code<'_>) -> Done) -> Done {
    check_raises(c, vector::GP, body)
}

/// Clears and sets bits of CR4 in 64-bit code. Clobbers RAX.
fn cr4_bits(c: &mut Code<'_>, clear: u64, set: u64) -> Done {
    c.mov(rax, cr4)?;
    c.and(eax, !(clear as u32))?;
    c.or(eax, set as u32)?;
    Ok(c.mov(cr4, rax)?)
}

/// Clears and sets bits of CR0 in 64-bit code. Clobbers RAX.
fn cr0_bits(c: &mut Code<'_>, clear: u64, set: u64) -> Done {
    c.mov(rax, cr0)?;
    c.and(eax, !(clear as u32))?;
    c.or(eax, set as u32)?;
    Ok(c.mov(cr0, rax)?)
}

/// CR3 loaded with its own value: forgets what isn't global. Clobbers RAX.
fn reload(c: &mut Code<'_>) -> Done {
    c.mov(rax, cr3)?;
    Ok(c.mov(cr3, rax)?)
}

/// A register of CPUID's leaf 7, or of leaf 1 or 80000001h.
#[derive(Clone, Copy)]
enum Word {
    Ebx7,
    Ecx7,
    Ecx1,
    Edx80000001,
}

/// A section that is left out where CPUID lacks a feature.
fn with(c: &mut Code<'_>, word: Word, bits: u32, title: &str, body: impl FnOnce(&mut Code<'_>) -> Done) -> Done {
    let after = c.fresh_name();
    let target = c.address(&after);
    let leaf = match word {
        Word::Ebx7 | Word::Ecx7 => 7u32,
        Word::Ecx1 => 1,
        Word::Edx80000001 => 0x8000_0001,
    };
    c.mov(eax, leaf)?;
    c.xor(ecx, ecx)?;
    c.cpuid()?;
    let register = match word {
        Word::Ebx7 => ebx,
        Word::Ecx7 | Word::Ecx1 => ecx,
        Word::Edx80000001 => edx,
    };
    c.and(register, bits)?;
    c.cmp(register, bits)?;
    c.jne(u64::from(target))?;
    section(c, title, body)?;
    c.name(&after)?;
    Ok(c.nop()?)
}
