//! The layout of ring-0 sequences, and two generators of them.
//!
//! The low 2 or 4 MiB are mapped one to one, so that code goes on when paging is switched; tables, data and the
//! log lie there. A case's *arena* is what its tables map otherwise, and what it accesses. Exceptions are logged
//! (vector, error code, CR2, RIP, RCX) and the next step is taken, so one case sees many.

pub mod control;
pub mod model;
pub mod shapes;
pub mod step;
pub mod tables;

use crate::case::{Case, Code, Layout, Piece, Run};
use std::ops::Range;
use umbra_arch::control::{Cr0, Cr3, Cr4, Efer};
use umbra_arch::descriptor::encode;
use umbra_arch::segment::{Attr, Seg, Segment, TableRegister};
use umbra_arch::{CpuState, rflags};

/// The GDT.
pub const GDT: u64 = 0x1000;
/// The IDT.
pub const IDT: u64 = 0x1800;
/// The TSS.
pub const TSS: u64 = 0x1c00;
/// Exception handlers.
pub const HANDLERS: u64 = 0x2000;
/// End of the ring-0 stack.
pub const STACK_END: u64 = 0x4000;
/// What the handlers and reading steps log.
pub const LOG: u64 = 0x4000;
/// Ring-3 code, and the end of its stack in the same page.
pub const USER: u64 = 0x7000;
/// Page tables.
pub const TABLES: u64 = 0x8000;
/// Their end.
pub const TABLES_END: u64 = 0x1_1000;
/// The first step.
pub const CODE: u64 = 0x1_2000;
/// Eight data pages.
pub const DATA: u64 = 0x1_8000;
/// Their end.
pub const DATA_END: u64 = 0x2_0000;
/// Where large pages can lie: the offset of the data in them is the same.
pub const LARGE: u64 = 0x20_0000;

/// Ring-0 code.
pub const KERNEL_CS: u16 = 0x08;
/// Ring-0 data: the stack.
pub const DATA_SELECTOR: u16 = 0x10;
/// Ring-3 code.
pub const USER_CS: u16 = 0x1b;
/// Ring-3 data: DS, ES, FS and GS.
pub const USER_DATA: u16 = 0x23;
const TSS_SELECTOR: u16 = 0x28;
/// The first LDT's selector; each takes 16 bytes.
pub const LDTS: u16 = 0x40;
/// Selector, in such an LDT, of a descriptor that is marked as accessed; the next one isn't.
pub const IN_LDT: u16 = 0xc;
/// Offset of the LDT in a data page.
pub const LDT_OFFSET: u64 = 0x100;

/// Paging that a case starts in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Paging {
    /// 2-level, 32-bit code.
    TwoLevel,
    /// PAE, 32-bit code.
    Pae,
    /// 4-level, 64-bit code.
    Long,
}

impl Paging {
    /// All of them.
    pub const ALL: [Paging; 3] = [Paging::TwoLevel, Paging::Pae, Paging::Long];

    /// 64-bit code.
    pub fn is_long(self) -> bool {
        self == Paging::Long
    }
}

/// The state that sequences start from: ring 0, paging on, handlers installed.
pub fn state(paging: Paging) -> CpuState {
    let mut s = CpuState::reset();
    let long = paging.is_long();
    s.cr0 = Cr0::new(Cr0::PE | Cr0::PG | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::MP);
    s.cr3 = Cr3::new(TABLES);
    s.cr4 = Cr4::new(if paging == Paging::TwoLevel { Cr4::PSE } else { Cr4::PAE });
    s.efer = Efer::new(if long { Efer::LME | Efer::LMA } else { 0 });
    let cs = if long { Segment::code64(KERNEL_CS, 0) } else { Segment::flat_code32(KERNEL_CS, 0) };
    s.seg[Seg::Cs as usize] = cs;
    s.seg[Seg::Ss as usize] = Segment::flat_data(DATA_SELECTOR, 0);
    // Ring 3 keeps these.
    for seg in [Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs] {
        s.seg[seg as usize] = Segment::flat_data(USER_DATA, 3);
    }
    s.seg[Seg::Tr as usize] = Segment { base: TSS, limit: 0x67, attr: Attr(0x8b), selector: TSS_SELECTOR };
    s.seg[Seg::Ldtr as usize] = Segment { base: 0, limit: 0, attr: Attr(0x1_0000), selector: 0 };
    s.gdtr = TableRegister { base: GDT, limit: 0x3ff };
    s.idtr = TableRegister { base: IDT, limit: if long { 0x1ff } else { 0xff } };
    s.rip = CODE;
    s.gpr = [0; 16];
    s.gpr[4] = STACK_END;
    s.gpr[7] = LOG;
    s.rflags = rflags::FIXED;
    s
}

/// All memory of the layout: both roots' fixed parts, system structures and data.
pub fn pieces(paging: Paging) -> Vec<Piece> {
    let mut all = system(paging.is_long());
    all.extend([0, 1].into_iter().flat_map(|number| tables::Root::new(paging, number).fixed()));
    all.extend((DATA..DATA_END).step_by(0x1000).map(data));
    all.push(data(LARGE + DATA));
    all
}

/// Descriptor tables, handlers, user code.
fn system(long: bool) -> Vec<Piece> {
    let mut all = vec![descriptors(long), handlers(long), user()];
    let gates = (0..32u64).flat_map(|n| {
        let offset = HANDLERS + 16 * n;
        let low = offset & 0xffff | u64::from(KERNEL_CS) << 16 | 0x8e << 40;
        [low, 0].into_iter().take(if long { 2 } else { 1 })
    });
    all.push(Piece { gpa: IDT, bytes: gates.flat_map(u64::to_le_bytes).collect() });
    // RSP0, or ESP0 and SS0.
    let mut tss = vec![0; 0x68];
    tss[4..8].copy_from_slice(&(STACK_END as u32).to_le_bytes());
    if !long {
        tss[8..10].copy_from_slice(&DATA_SELECTOR.to_le_bytes());
    }
    tss[0x66..].copy_from_slice(&[0xff; 2]);
    all.push(Piece { gpa: TSS, bytes: tss });
    all
}

fn descriptors(long: bool) -> Piece {
    let cs = Attr(if long { 0xa09b } else { 0xc09b });
    let flat = |attr| encode(0, u32::MAX, attr);
    let mut gdt = vec![0, flat(cs), flat(Attr(0xc093)), flat(cs.with_dpl(3)), flat(Attr(0xc0f3))];
    gdt.extend([encode(TSS as u32, 0x67, Attr(0x8b)), 0, 0]);
    for page in 0..8u32 {
        gdt.extend([encode(tables::ARENA_LOW as u32 + (page << 12) + LDT_OFFSET as u32, 0x1f, Attr(0x82)), 0]);
    }
    Piece { gpa: GDT, bytes: gdt.into_iter().flat_map(u64::to_le_bytes).collect() }
}

/// Each vector's entry, and what all go on with: log, and jump to the next step.
fn handlers(long: bool) -> Piece {
    let common = HANDLERS + 0x200;
    let mut bytes = Vec::new();
    for vector in 0..32u64 {
        let at = bytes.len();
        if !matches!(vector, 8 | 10..=14 | 17 | 21) {
            bytes.extend([0x6a, 0]); // push 0
        }
        bytes.extend([0x6a, vector as u8]); // push vector
        bytes.push(0xe9); // jmp common
        let after = HANDLERS + bytes.len() as u64 + 4;
        bytes.extend(((common - after) as u32).to_le_bytes());
        bytes.resize(at + 16, 0x90);
    }
    let wide: &[u8] = if long { &[0x48] } else { &[] };
    let mut put = |parts: &[&[u8]]| parts.iter().for_each(|part| bytes.extend(*part));
    put(&[&[0x58, 0x89, 0x07]]); // pop rax; mov [rdi], eax
    put(&[&[0x58, 0x89, 0x47, 4]]); // pop rax; mov [rdi+4], eax
    put(&[&[0x0f, 0x20, 0xd0], wide, &[0x89, 0x47, 8]]); // mov rax, cr2; mov [rdi+8], rax
    put(&[&[0x58], wide, &[0x89, 0x47, 16]]); // pop rax; mov [rdi+16], rax
    put(&[wide, &[0x89, 0x4f, 24]]); // mov [rdi+24], rcx
    put(&[&[0x83, 0xc7, 32]]); // add edi, 32
    put(&[&[0xbc], &(STACK_END as u32).to_le_bytes()]); // mov esp, STACK_END
    put(&[&[0xff, 0xe5]]); // jmp rbp
    Piece { gpa: HANDLERS, bytes }
}

/// Ring-3 accesses to [rbx], 16 bytes apart, each ended by HLT's #GP.
fn user() -> Piece {
    let mut bytes = Vec::new();
    for snippet in [&[0x8b, 0x0b, 0xf4][..], &[0x89, 0x0b, 0xf4], &[0xff, 0xd3, 0xf4]] {
        let at = bytes.len();
        bytes.extend(snippet);
        bytes.resize(at + 16, 0xf4);
    }
    Piece { gpa: USER, bytes }
}

/// Data pages: RET at the start of each (where fetches go), and descriptors everywhere else.
fn data(gpa: u64) -> Piece {
    let mut bytes: Vec<u8> = 0x00cf_9300_0000_ffff_u64.to_le_bytes().repeat(512);
    bytes[..8].fill(0xc3);
    let unaccessed = LDT_OFFSET as usize + 16;
    bytes[unaccessed + 5] = 0x92;
    Piece { gpa, bytes }
}

/// A case of these steps.
pub fn case(paging: Paging, state: CpuState, memory: Vec<Piece>, steps: Vec<Vec<u8>>, watch: Vec<Range<u64>>) -> Case {
    // add eax, 0: all flags defined; hlt
    let code = Code { gpa: CODE, steps, linked: true, tail: vec![0x83, 0xc0, 0, 0xf4] };
    Case { layout: Layout::Ring0(paging), state, memory, code, run: Run::Halt { at_most: 100_000 }, watch }
}
