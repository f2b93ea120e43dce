//! The guest's page tables: where they are, and the code that writes them.
//!
//! All formats map the first MiB to itself and give the pages from [`PROBES`] a meaning each.

use super::Done;
use crate::link::Code;
use iced_x86::code_asm::*;

/// Linear address of the first probe page.
pub const PROBES: u32 = 0x10_0000;
/// Says which tables are in force: maps another frame in each.
pub const IDENTITY: u32 = PROBES;
/// Not writable.
pub const READ_ONLY: u32 = PROBES + 0x1000;
/// Execute-disable, in 8-byte formats.
pub const NO_EXECUTE: u32 = PROBES + 0x2000;
/// A user page that holds code.
pub const USER: u32 = PROBES + 0x3000;
/// Global.
pub const GLOBAL: u32 = PROBES + 0x4000;
/// Not present.
pub const ABSENT: u32 = PROBES + 0x5000;

const P: u32 = 1;
const W: u32 = 2;
const U: u32 = 4;
const G: u32 = 0x100;

const START: u32 = 0x3_0000;
const END: u32 = 0x6_0000;
/// Page directory of 2-level paging; its table follows.
pub const TWO_LEVEL: u32 = 0x3_0000;
/// PDPTEs of PAE paging; directory and table follow.
pub const PAE: u32 = 0x3_2000;
/// Number of roots of 4-level paging.
pub const ROOTS: u32 = 4;

/// PML4 number `i`; PDPT, directory and table follow.
pub const fn root(i: u32) -> u32 {
    0x3_8000 + i * 0x4000
}

/// A table of last-level entries and the size of one.
#[derive(Clone, Copy)]
pub struct Leaves {
    table: u32,
    entry: u32,
}

/// The last level of 2-level paging.
pub const TWO_LEVEL_LEAVES: Leaves = Leaves { table: TWO_LEVEL + 0x1000, entry: 4 };
/// The last level of PAE paging.
pub const PAE_LEAVES: Leaves = Leaves { table: PAE + 0x2000, entry: 8 };

/// The last level of 4-level paging under root `i`.
pub const fn root_leaves(i: u32) -> Leaves {
    Leaves { table: root(i) + 0x3000, entry: 8 }
}

impl Leaves {
    /// Address of the entry that maps `linear` (below 2 MiB).
    pub const fn entry(self, linear: u32) -> u32 {
        self.table + (linear >> 12) * self.entry
    }
}

/// Frame behind [`IDENTITY`] under 4-level root `i`; 4 is PAE's, 5 is 2-level paging's.
const fn identity_frame(i: u32) -> u32 {
    0x5_0000 + i * 0x1000
}
/// Index of PAE paging's [`signature`].
pub const PAE_INDEX: u32 = ROOTS;
/// Index of 2-level paging's [`signature`].
pub const TWO_LEVEL_INDEX: u32 = ROOTS + 1;

/// What is read at [`IDENTITY`].
pub const fn signature(i: u32) -> u32 {
    0x5167_0000 + i
}

const READ_ONLY_FRAME: u32 = 0x5_6000;
const NO_EXECUTE_FRAME: u32 = 0x5_7000;
const USER_FRAME: u32 = 0x5_8000;
/// Frames behind [`GLOBAL`], the first at the start; each holds its own address.
pub const GLOBAL_FRAMES: [u32; 2] = [0x5_9000, 0x5_a000];
/// Frame for [`ABSENT`] once it is mapped.
pub const DEMAND_FRAME: u32 = 0x5_b000;

/// Entry that maps [`GLOBAL`] to one of its frames.
pub const fn global_entry(i: usize) -> u32 {
    GLOBAL_FRAMES[i] | P | W | G
}
/// Entry that maps [`ABSENT`].
pub const DEMAND_ENTRY: u32 = DEMAND_FRAME | P | W;

/// `build_tables`: writes all tables and probe frames. For 32-bit code without paging.
pub fn build(c: &mut Code<'_>) -> Done {
    c.name("build_tables")?;
    c.mov(edi, START)?;
    c.mov(ecx, (END - START - 0x1000) / 4)?;
    c.xor(eax, eax)?;
    c.rep().stosd()?;
    frames(c)?;
    link_down(c, TWO_LEVEL, TWO_LEVEL_LEAVES.table, P | W | U)?;
    leaves(c, TWO_LEVEL_LEAVES, TWO_LEVEL_INDEX)?;
    // PDPTEs have no rights.
    link_down(c, PAE, PAE + 0x1000, P)?;
    link_down(c, PAE + 0x1000, PAE_LEAVES.table, P | W | U)?;
    leaves(c, PAE_LEAVES, PAE_INDEX)?;
    for i in 0..ROOTS {
        for level in 0..3 {
            let table = root(i) + level * 0x1000;
            link_down(c, table, table + 0x1000, P | W | U)?;
        }
        leaves(c, root_leaves(i), i)?;
    }
    Ok(c.ret()?)
}

fn link_down(c: &mut Code<'_>, from: u32, to: u32, flags: u32) -> Done {
    Ok(c.mov(dword_ptr(from), to | flags)?)
}

fn frames(c: &mut Code<'_>) -> Done {
    for i in 0..=TWO_LEVEL_INDEX {
        c.mov(dword_ptr(identity_frame(i)), signature(i))?;
    }
    for frame in GLOBAL_FRAMES.into_iter().chain([READ_ONLY_FRAME, DEMAND_FRAME]) {
        c.mov(dword_ptr(frame), frame)?;
    }
    const RET: u32 = 0xc3;
    c.mov(dword_ptr(NO_EXECUTE_FRAME), RET)?;
    Ok(c.mov(dword_ptr(USER_FRAME), RET)?)
}

fn leaves(c: &mut Code<'_>, leaves: Leaves, index: u32) -> Done {
    let mut next = c.create_label();
    c.mov(edi, leaves.table)?;
    c.mov(eax, P | W)?;
    c.mov(ecx, PROBES >> 12)?;
    c.set_label(&mut next)?;
    c.mov(dword_ptr(edi), eax)?;
    c.add(edi, leaves.entry)?;
    c.add(eax, 0x1000)?;
    c.loop_(next)?;
    for (linear, entry) in [
        (IDENTITY, identity_frame(index) | P | W),
        (READ_ONLY, READ_ONLY_FRAME | P),
        (NO_EXECUTE, NO_EXECUTE_FRAME | P | W),
        (USER, USER_FRAME | P | W | U),
        (GLOBAL, global_entry(0)),
    ] {
        c.mov(dword_ptr(leaves.entry(linear)), entry)?;
    }
    if leaves.entry == 8 {
        c.mov(dword_ptr(leaves.entry(NO_EXECUTE) + 4), 0x8000_0000u32)?;
    }
    Ok(())
}
