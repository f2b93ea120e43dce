//! Edits of tables: of every width, of upper levels, of pages that are tables twice or no longer.

use super::*;
use umbra_arch::control::Cr0;

const GIB_PAGES: u32 = 1 << 26;
/// The second 2 MiB, which the directory of root 0 doesn't map otherwise.
const LARGE: u32 = 0x20_0000;
const LARGE_ENTRY: u32 = DIRECTORY_ENTRY + 8;
/// [`PAGE`]'s entry as seen in a table of its own, and the page in the second 2 MiB.
const SECOND: u32 = LARGE + PAGE % LARGE;
const INDEX: u32 = (PAGE % LARGE) >> 12;
/// Entry 1 of root 0's PDPT: the second GiB.
const SECOND_GIB: u32 = root(0) + 0x1000 + 8;
const GIB: u32 = 0x4000_0000;

pub fn all(c: &mut Code<'_>) -> Done {
    section(c, "60, 68: tables that come, go and come back", come_and_go)?;
    section(c, "64: one directory by two ways", two_ways)?;
    section(c, "65, 66: a large page and a table in turn", large_or_table)?;
    section(c, "10: two large pages of one frame", two_large)?;
    section(c, "67: entries written in pieces", pieces)?;
    section(c, "69: a table that maps itself", recursive)?;
    section(c, "74: reserved bits above and below", reserved)?;
    with(c, Word::Edx80000001, GIB_PAGES, "75: pages of 1 GiB", gib_page)
}

/// The table in [`SPARE`] 0 has one entry, for [`SECOND`].
fn second_table(c: &mut Code<'_>, frame: u32) -> Done {
    set(c, SPARE[0] + INDEX * 8, frame | P | W, 0)?;
    set(c, LARGE_ENTRY, SPARE[0] | P | W, 0)
}

fn come_and_go(c: &mut Code<'_>) -> Done {
    let faults = |c: &mut Code<'_>| check_page_fault(c, 0, SECOND, |c| Ok(c.mov(ebx, dword_ptr(SECOND))?));
    faults(c)?;
    second_table(c, FRAME)?;
    reads(c, SECOND, FRAME)?;
    // Unlinked, changed, linked again.
    set(c, LARGE_ENTRY, 0, 0)?;
    c.invlpg(byte_ptr(SECOND))?;
    faults(c)?;
    c.mov(dword_ptr(SPARE[0] + INDEX * 8), OTHER_FRAME | P | W)?;
    set(c, LARGE_ENTRY, SPARE[0] | P | W, 0)?;
    reads(c, SECOND, OTHER_FRAME)?;
    // Written to like data, then a table again.
    set(c, LARGE_ENTRY, 0, 0)?;
    c.invlpg(byte_ptr(SECOND))?;
    for value in [u32::MAX, 0] {
        c.mov(edi, SPARE[0])?;
        c.mov(ecx, 1024)?;
        c.mov(eax, value)?;
        c.rep().stosd()?;
    }
    faults(c)?;
    second_table(c, FRAME)?;
    reads(c, SECOND, FRAME)?;
    // The same page as a directory: under the second GiB it leads to the table in SPARE 1.
    set(c, LARGE_ENTRY, 0, 0)?;
    c.invlpg(byte_ptr(SECOND))?;
    set(c, SPARE[0] + INDEX * 8, 0, 0)?;
    set(c, SPARE[0], SPARE[1] | P | W, 0)?;
    set(c, SPARE[1] + INDEX * 8, OTHER_FRAME | P | W, 0)?;
    set(c, SECOND_GIB, SPARE[0] | P | W, 0)?;
    reads(c, GIB + PAGE, OTHER_FRAME)?;
    set(c, SECOND_GIB, 0, 0)?;
    set(c, SPARE[0], 0, 0)?;
    reload(c)?;
    check_page_fault(c, 0, GIB + PAGE, |c| Ok(c.mov(ebx, dword_ptr(GIB + PAGE))?))
}

/// A PDPTE without W beside one with W, to the same directory, in either order of the first touch.
fn two_ways(c: &mut Code<'_>) -> Done {
    map(c, P | W, 0)?;
    set(c, SECOND_GIB, (root(0) + 0x2000) | P, 0)?;
    let second_faults =
        |c: &mut Code<'_>| check_page_fault(c, 3, GIB + PAGE, |c| Ok(c.mov(dword_ptr(GIB + PAGE), FRAME)?));
    for first_way_first in [true, false] {
        map(c, P | W, 0)?;
        c.mov(eax, GIB + PAGE)?;
        c.invlpg(byte_ptr(rax))?;
        if first_way_first {
            write(c)?;
            second_faults(c)?;
        } else {
            second_faults(c)?;
            write(c)?;
        }
        reads(c, GIB + PAGE, FRAME)?;
        second_faults(c)?;
        write(c)?;
    }
    set(c, SECOND_GIB, 0, 0)?;
    reload(c)
}

/// The directory's entry is a leaf of the frame at 0 or of the one at 2 MiB, or leads to a table.
fn large_or_table(c: &mut Code<'_>) -> Done {
    const IN_LARGE: u32 = LARGE + FRAME;
    set(c, SPARE[0] + (FRAME >> 12) * 8, OTHER_FRAME | P | W, 0)?;
    for _ in 0..2 {
        set(c, LARGE_ENTRY, P | W | PS, 0)?;
        c.invlpg(byte_ptr(IN_LARGE))?;
        reads(c, IN_LARGE, FRAME)?;
        reads(c, LARGE + OTHER_FRAME, OTHER_FRAME)?;
        marks(c, LARGE_ENTRY, A)?;
        set(c, LARGE_ENTRY, LARGE | P | W | PS, 0)?;
        c.invlpg(byte_ptr(IN_LARGE))?;
        c.mov(dword_ptr(IN_LARGE), 0x1234_5678)?;
        reads(c, IN_LARGE, 0x1234_5678)?;
        c.mov(dword_ptr(LARGE + OTHER_FRAME), 7)?;
        reads(c, LARGE + OTHER_FRAME, 7)?;
        marks(c, LARGE_ENTRY, A | D)?;
        set(c, LARGE_ENTRY, SPARE[0] | P | W, 0)?;
        c.invlpg(byte_ptr(IN_LARGE))?;
        reads(c, IN_LARGE, OTHER_FRAME)?;
        check_page_fault(c, 0, LARGE + OTHER_FRAME, |c| Ok(c.mov(ebx, dword_ptr(LARGE + OTHER_FRAME))?))?;
    }
    // A write by the small page shows in the large one of the same frame.
    set(c, SPARE[0] + (FRAME >> 12) * 8, 0, 0)?;
    set(c, LARGE_ENTRY, 0, 0)?;
    reload(c)
}

/// Read-only and clean, both; a write by either marks its own entry.
fn two_large(c: &mut Code<'_>) -> Done {
    const FIRST: u32 = LARGE + OTHER_FRAME;
    const SECOND: u32 = 2 * LARGE + OTHER_FRAME;
    for _ in 0..2 {
        for entry in [LARGE_ENTRY, LARGE_ENTRY + 8] {
            set(c, entry, LARGE | P | PS, 0)?;
        }
        reload(c)?;
        for (now, other, value) in [(FIRST, SECOND, 1), (SECOND, FIRST, 2)] {
            check_page_fault(c, 3, now, |c| Ok(c.mov(dword_ptr(now), 0)?))?;
            cr0_bits(c, Cr0::WP, 0)?;
            c.mov(dword_ptr(now), value)?;
            marks(c, LARGE_ENTRY + if now == FIRST { 0 } else { 8 }, A | D)?;
            reads(c, other, value)?;
            cr0_bits(c, 0, Cr0::WP)?;
            if now == FIRST {
                marks(c, LARGE_ENTRY + 8, A)?;
            }
        }
    }
    for entry in [LARGE_ENTRY, LARGE_ENTRY + 8] {
        set(c, entry, 0, 0)?;
    }
    reload(c)
}

fn pieces(c: &mut Code<'_>) -> Done {
    map(c, P | W, 0)?;
    write(c)?;
    // W by one byte.
    c.and(byte_ptr(ENTRY), !(W as i32))?;
    c.invlpg(byte_ptr(PAGE))?;
    write_faults(c, 3)?;
    c.or(byte_ptr(ENTRY), W)?;
    write(c)?;
    // Two halves: first execute-disable, then another frame.
    c.mov(dword_ptr(ENTRY + 4), XD)?;
    c.invlpg(byte_ptr(PAGE))?;
    fetch_faults(c, 0x11)?;
    c.mov(dword_ptr(ENTRY), OTHER_FRAME | P | W)?;
    c.mov(dword_ptr(ENTRY + 4), 0)?;
    c.invlpg(byte_ptr(PAGE))?;
    fetch(c)?;
    reads(c, PAGE, OTHER_FRAME)?;
    // The frame's number by one word in the middle.
    c.mov(word_ptr(ENTRY + 1), FRAME >> 8)?;
    c.invlpg(byte_ptr(PAGE))?;
    reads(c, PAGE, FRAME)?;
    // Eight bytes over two entries: this one's high half and the next one's low half.
    set(c, ENTRY + 8, OTHER_FRAME | P | W, 0)?;
    reads(c, PAGE + 0x1000, OTHER_FRAME)?;
    c.mov(rax, u64::from(FRAME | P) << 32 | u64::from(XD))?;
    c.mov(qword_ptr(ENTRY + 4), rax)?;
    c.invlpg(byte_ptr(PAGE))?;
    c.invlpg(byte_ptr(PAGE + 0x1000))?;
    fetch_faults(c, 0x11)?;
    reads(c, PAGE + 0x1000, FRAME)?;
    check_page_fault(c, 3, PAGE + 0x1000, |c| Ok(c.mov(dword_ptr(PAGE + 0x1000), 1)?))?;
    set(c, ENTRY + 8, 0, 0)?;
    c.invlpg(byte_ptr(PAGE + 0x1000))?;
    map(c, P | W, 0)
}

/// The last table maps its own frame at the page behind [`PAGE`]: its entries are written by that way.
fn recursive(c: &mut Code<'_>) -> Done {
    const TABLE: u32 = PAGE + 0x1000;
    const THROUGH: u32 = TABLE + ENTRY % 0x1000;
    map(c, P | W, 0)?;
    set(c, ENTRY + 8, (root(0) + 0x3000) | P | W, 0)?;
    for frame in [OTHER_FRAME, FRAME, OTHER_FRAME] {
        reads(c, PAGE, OTHER_FRAME ^ FRAME ^ frame)?;
        c.mov(dword_ptr(THROUGH), frame | P | W)?;
        c.invlpg(byte_ptr(PAGE))?;
        reads(c, PAGE, frame)?;
        c.mov(eax, dword_ptr(THROUGH))?;
        check(c, eax, frame | P | W | A)?;
    }
    // It unmaps itself.
    c.mov(dword_ptr(THROUGH + 8), 0)?;
    c.invlpg(byte_ptr(TABLE))?;
    check_page_fault(c, 0, TABLE, |c| Ok(c.mov(ebx, dword_ptr(TABLE))?))?;
    map(c, P | W, 0)
}

/// Top down: what the upper entry says comes first.
fn reserved(c: &mut Code<'_>) -> Done {
    let faults = |c: &mut Code<'_>, code| check_page_fault(c, code, SECOND, |c| Ok(c.mov(ebx, dword_ptr(SECOND))?));
    set(c, SPARE[0] + INDEX * 8, 0, 0)?;
    // A large page of an odd frame.
    set(c, LARGE_ENTRY, SPARE[0] | P | W | PS, 0)?;
    faults(c, 9)?;
    set(c, LARGE_ENTRY, 0, 0)?;
    set(c, SPARE[0] + INDEX * 8, FRAME | P | W, XD)?;
    change_efer(c, Efer::NXE, 0)?;
    faults(c, 0)?;
    set(c, LARGE_ENTRY, SPARE[0] | P | W, 0)?;
    faults(c, 9)?;
    set(c, LARGE_ENTRY, SPARE[0] | P | W, XD)?;
    set(c, SPARE[0] + INDEX * 8, 0, 0)?;
    faults(c, 9)?;
    set(c, LARGE_ENTRY, SPARE[0] | P | W, 0)?;
    faults(c, 0)?;
    change_efer(c, 0, Efer::NXE)?;
    set(c, LARGE_ENTRY, 0, 0)
}

fn gib_page(c: &mut Code<'_>) -> Done {
    const IN_GIB: u32 = GIB + FRAME;
    for _ in 0..2 {
        set(c, SECOND_GIB, P | W | PS, 0)?;
        reads(c, IN_GIB, FRAME)?;
        c.mov(dword_ptr(GIB + OTHER_FRAME), OTHER_FRAME)?;
        marks(c, SECOND_GIB, A | D)?;
        // Bit 13 is reserved in such an entry.
        set(c, SECOND_GIB, P | W | PS | 1 << 13, 0)?;
        reload(c)?;
        check_page_fault(c, 9, IN_GIB, |c| Ok(c.mov(ebx, dword_ptr(IN_GIB))?))?;
    }
    set(c, SECOND_GIB, 0, 0)?;
    reload(c)
}
