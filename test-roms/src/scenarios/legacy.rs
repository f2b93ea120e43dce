//! 2-level and PAE paging, and paging switched off and on, in 32-bit code.

use super::*;
use crate::embedded::protected::{change_cr0, change_cr4, enter_pae, enter_two_level, leave_paging};
use crate::embedded::tables::{PAE, PAE_LEAVES, TWO_LEVEL, TWO_LEVEL_LEAVES};
use umbra_arch::control::{Cr0, Cr4};

/// A page in the second 4 MiB: behind a 4 MiB page, or behind the table at the same address.
const LARGE: u32 = 0x40_0000;
const IN_LARGE: u32 = LARGE + FRAME;
const IN_LARGE_VALUE: u32 = 0x4d69_4234;

pub fn all(c: &mut Code<'_>) -> Done {
    section(c, "24, 26: paging that is refused", refused)?;
    section(c, "13, 39, 40: 2-level paging, PSE", page_size)?;
    section(c, "8, 28, 30: paging off and on", off_and_on)?;
    section(c, "34-36: PDPTEs", pdptes)
}

fn is_off(c: &mut Code<'_>) -> Done {
    c.mov(eax, cr0)?;
    c.and(eax, Cr0::PG as u32)?;
    check(c, eax, 0)?;
    c.mov(ecx, umbra_arch::msr::IA32_EFER)?;
    c.rdmsr()?;
    c.and(eax, Efer::LMA as u32)?;
    check(c, eax, 0)
}

fn refused(c: &mut Code<'_>) -> Done {
    // Long mode without PAE.
    change_cr4(c, Cr4::PAE, 0)?;
    change_efer(c, 0, Efer::LME)?;
    general_protection(c, |c| change_cr0(c, 0, Cr0::PG))?;
    is_off(c)?;
    change_efer(c, Efer::LME, 0)?;
    // A present PDPTE with reserved bits.
    for bit in [1, 2, 5, 6, 7, 8] {
        c.mov(dword_ptr(PAE + 16), P | 1 << bit)?;
        general_protection(c, enter_pae)?;
        is_off(c)?;
    }
    c.mov(dword_ptr(PAE + 16), P)?;
    c.mov(dword_ptr(PAE + 20), 1u32 << 31)?;
    general_protection(c, enter_pae)?;
    is_off(c)?;
    c.mov(dword_ptr(PAE + 16), 0x1e6)?;
    enter_pae(c)?;
    leave_paging(c)?;
    c.mov(dword_ptr(PAE + 16), 0)?;
    Ok(c.mov(dword_ptr(PAE + 20), 0)?)
}

fn page_size(c: &mut Code<'_>) -> Done {
    let reload = |c: &mut Code<'_>| -> Done {
        c.mov(eax, cr3)?;
        Ok(c.mov(cr3, eax)?)
    };
    c.mov(dword_ptr(IN_LARGE), IN_LARGE_VALUE)?;
    c.mov(dword_ptr(LARGE + (FRAME >> 12) * 4), FRAME | P | W)?;
    c.mov(dword_ptr(TWO_LEVEL + 4), LARGE | P | W | PS)?;
    enter_two_level(c)?;
    for _ in 0..2 {
        change_cr4(c, 0, Cr4::PSE)?;
        reload(c)?;
        reads(c, IN_LARGE, IN_LARGE_VALUE)?;
        change_cr4(c, Cr4::PSE, 0)?;
        reload(c)?;
        reads(c, IN_LARGE, FRAME)?;
    }
    // Bit 21 is reserved in a 4 MiB page's entry, and an address bit of a table's.
    c.mov(dword_ptr(TWO_LEVEL + 4), LARGE | 1 << 21 | P | W | PS)?;
    reload(c)?;
    check_page_fault(c, 0, IN_LARGE, |c| Ok(c.mov(ebx, dword_ptr(IN_LARGE))?))?;
    change_cr4(c, 0, Cr4::PSE)?;
    reload(c)?;
    check_page_fault(c, 9, IN_LARGE, |c| Ok(c.mov(ebx, dword_ptr(IN_LARGE))?))?;
    change_cr4(c, Cr4::PSE, 0)?;
    c.mov(dword_ptr(TWO_LEVEL + 4), 0)?;
    reload(c)?;
    // No execute-disable here: a fetch isn't told apart.
    fetch_faults(c, 0)?;
    leave_paging(c)
}

/// What was changed while paging was off is seen when it is on again, in both formats in turn.
fn off_and_on(c: &mut Code<'_>) -> Done {
    let formats = [(true, PAE_LEAVES.entry(PAGE)), (false, TWO_LEVEL_LEAVES.entry(PAGE))];
    for (round, frame) in [(0, FRAME), (1, OTHER_FRAME), (2, FRAME)] {
        for (pae, entry) in formats {
            let rights = if round == 1 { P | G } else { P | W | G };
            c.mov(dword_ptr(entry), frame | rights)?;
            // Nothing of this says anything while paging is off.
            change_cr0(c, if round == 0 { Cr0::WP } else { 0 }, if round == 0 { 0 } else { Cr0::WP })?;
            change_cr4(c, 0, Cr4::PGE)?;
            reads(c, frame, frame)?;
            if pae {
                enter_pae(c)?
            } else {
                enter_two_level(c)?
            }
            reads(c, PAGE, frame)?;
            if round == 1 {
                write_faults(c, 3)?;
                change_cr0(c, Cr0::WP, 0)?;
                c.mov(dword_ptr(PAGE), frame)?;
            }
            leave_paging(c)?;
        }
    }
    change_cr4(c, Cr4::PGE, 0)?;
    for (_, entry) in formats {
        c.mov(dword_ptr(entry), 0)?;
    }
    Ok(())
}

/// The second PDPTE leads to the first one's directory, or to another.
fn pdptes(c: &mut Code<'_>) -> Done {
    const GIB: u32 = 0x4000_0000;
    /// A second set of PDPTEs in the same page.
    const OTHER: u32 = PAE + 0x20;
    const DIRECTORY: u32 = SPARE[0];
    const TABLE: u32 = SPARE[1];
    let faults = |c: &mut Code<'_>| check_page_fault(c, 0, GIB + PAGE, |c| Ok(c.mov(ebx, dword_ptr(GIB + PAGE))?));
    let load = |c: &mut Code<'_>, table: u32| -> Done {
        c.mov(eax, table)?;
        Ok(c.mov(cr3, eax)?)
    };
    c.mov(dword_ptr(PAE_LEAVES.entry(PAGE)), FRAME | P | W)?;
    c.mov(dword_ptr(DIRECTORY), TABLE | P | W)?;
    c.mov(dword_ptr(TABLE + (PAGE >> 12) * 8), OTHER_FRAME | P | W)?;
    c.mov(dword_ptr(OTHER), (PAE + 0x1000) | P)?;
    c.mov(dword_ptr(OTHER + 8), DIRECTORY | P)?;
    // PAE's pages map the first MiB only: the tables lie there.
    enter_pae(c)?;
    faults(c)?;
    // Seen with a load of CR3, even of the same value.
    c.mov(dword_ptr(PAE + 8), (PAE + 0x1000) | P)?;
    load(c, PAE)?;
    reads(c, GIB + PAGE, FRAME)?;
    load(c, OTHER)?;
    reads(c, GIB + PAGE, OTHER_FRAME)?;
    load(c, PAE)?;
    reads(c, GIB + PAGE, FRAME)?;
    // A bad one: nothing changes.
    c.mov(dword_ptr(OTHER + 8), DIRECTORY | P | 1 << 5)?;
    general_protection(c, |c| load(c, OTHER))?;
    c.mov(eax, cr3)?;
    check(c, eax, PAE)?;
    reads(c, GIB + PAGE, FRAME)?;
    c.mov(dword_ptr(OTHER + 8), DIRECTORY | P)?;
    load(c, OTHER)?;
    reads(c, GIB + PAGE, OTHER_FRAME)?;
    // A change of PGE loads them, too.
    c.mov(dword_ptr(OTHER + 8), (PAE + 0x1000) | P)?;
    change_cr4(c, 0, Cr4::PGE)?;
    reads(c, GIB + PAGE, FRAME)?;
    change_cr4(c, Cr4::PGE, 0)?;
    leave_paging(c)?;
    for at in [OTHER, OTHER + 8, PAE + 8, DIRECTORY, TABLE + (PAGE >> 12) * 8, PAE_LEAVES.entry(PAGE)] {
        c.mov(dword_ptr(at), 0)?;
    }
    Ok(())
}
