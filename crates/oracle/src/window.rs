//! The layout of single-instruction cases: ring-3 code of one size between pages of all rights, as
//! [`native`](umbra_hostexec::native) has them in the host's own address space, and a ring 0 that catches what
//! the instruction raises.

use crate::case::{Case, Piece, Run};
use crate::engine::End;
use crate::random::Random;
use crate::rows::selectors;
use std::sync::LazyLock;
use umbra_arch::control::{Cr0, Cr3, Cr4, Efer};
use umbra_arch::fault::vector;
use umbra_arch::segment::{Attr, Seg, Segment, TableRegister};
use umbra_arch::{CpuState, Fault, rflags};
use umbra_hostexec::native::{Mode, PAGES, PROTECTION, Protection, SEGMENT_G, Until, WINDOW};

/// Guest-physical address of the window.
pub const PHYSICAL: u64 = 0x10_0000;
/// Bytes of the window.
pub const BYTES: usize = PAGES * 4096;
/// Offset of the code in the window.
pub const CODE: u64 = 0x800;

/// Linear address of the pages that user code can't reach: descriptor tables, then IDT, TSS and stubs, then the stack.
const SYSTEM: u64 = WINDOW + 0x10_0000;
/// Where they are in physical memory.
const SYSTEM_AT: u64 = 0x5000;
const IDT: u64 = 0x1000;
const TSS: u64 = 0x1400;
/// One HLT for each vector, 16 bytes apart.
const STUBS: u64 = 0x1800;
const STACK_END: u64 = 0x3000;
/// Kernel code, as [`selectors`] has it.
pub(crate) const KERNEL_CS: u64 = 0x10;

/// Places for an image's starting code.
pub(crate) struct Launch {
    pub(crate) enter: u64,
    pub(crate) linear: u64,
    pub(crate) physical: u64,
    pub(crate) fp: (u64, u64),
    pub(crate) scaffold: u64,
}

pub(crate) fn launch() -> Launch {
    const AT: u64 = 0x1b00;
    const FP: u64 = 0x2000;
    Launch {
        enter: 0xa000,
        linear: SYSTEM + AT,
        physical: SYSTEM_AT + AT,
        fp: (SYSTEM + FP, SYSTEM_AT + FP),
        scaffold: 0x3000,
    }
}

/// End of the ring-0 stack.
pub(crate) fn stack_end() -> u64 {
    SYSTEM + STACK_END
}

static BACKGROUND: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut r = Random::new(1);
    (0..BYTES / 8).flat_map(|_| r.operand().to_le_bytes()).collect()
});

/// What the window holds before a case's own memory is written.
pub fn background() -> &'static [u8] {
    &BACKGROUND
}

/// All memory of the layout: page tables, system structures, the window.
pub fn pieces() -> Vec<Piece> {
    let mut all = Vec::new();
    let mut quad = |gpa: u64, value: u64| all.push(Piece { gpa, bytes: value.to_le_bytes().to_vec() });
    quad(0x1000, 0x2067);
    quad(0x2000 + 8 * (WINDOW >> 30), 0x3067);
    quad(0x3000 + 8 * (WINDOW >> 21 & 511), 0x4067);
    for (page, protection) in (0..).zip(PROTECTION) {
        let bits = match protection {
            Protection::Absent => continue,
            Protection::Write => 0x67,
            Protection::Read | Protection::Execute => 0x65,
        };
        quad(0x4000 + 8 * page, (PHYSICAL + (page << 12)) | bits);
    }
    for page in 0..3 {
        quad(0x4000 + 8 * (((SYSTEM - WINDOW) >> 12) + page), (SYSTEM_AT + (page << 12)) | 0x63);
    }
    for (selector, segment) in selectors::descriptors() {
        let table = if selector & 4 != 0 { 0x800 } else { 0 };
        quad(SYSTEM_AT + table + u64::from(selector & !7), selectors::encode(&segment));
    }
    for n in 0..32 {
        let offset = SYSTEM + STUBS + 16 * n;
        let dpl = if n == u64::from(vector::BP) || n == u64::from(vector::OF) { 0xee } else { 0x8e };
        quad(SYSTEM_AT + IDT + 16 * n, offset & 0xffff | KERNEL_CS << 16 | dpl << 40 | (offset >> 16 & 0xffff) << 48);
        quad(SYSTEM_AT + IDT + 16 * n + 8, offset >> 32);
        quad(SYSTEM_AT + STUBS + 16 * n, 0x00fd_ebf4);
    }
    quad(SYSTEM_AT + TSS + 4, SYSTEM + STACK_END);
    // No I/O permission bitmap.
    quad(SYSTEM_AT + TSS + 96, 0xffff << 48);
    all.push(Piece { gpa: PHYSICAL, bytes: background().to_vec() });
    all
}

/// The state that cases of this mode start from, but for general and vector registers and flags.
pub fn state(mode: Mode) -> CpuState {
    let mut s = CpuState::reset();
    s.cr0 = Cr0::new(Cr0::PE | Cr0::PG | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::MP | Cr0::AM);
    s.cr3 = Cr3::new(0x1000);
    s.cr4 = Cr4::new(Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE | Cr4::FSGSBASE);
    s.efer = Efer::new(Efer::LME | Efer::LMA);
    s.xcr0 = 7;
    s.seg[Seg::Cs as usize] = mode.code();
    for seg in [Seg::Ds, Seg::Es, Seg::Ss] {
        s.seg[seg as usize] = mode.data();
    }
    s.seg[Seg::Gs as usize] = SEGMENT_G;
    s.seg[Seg::Fs as usize] = Segment::null(0);
    s.seg[Seg::Tr as usize] = Segment { base: SYSTEM + TSS, limit: 0x67, attr: Attr(0x8b), selector: 0x40 };
    s.seg[Seg::Ldtr as usize] = Segment { base: SYSTEM + 0x800, limit: 7 * 8 - 1, attr: Attr(0x82), selector: 0x50 };
    s.gdtr = TableRegister { base: SYSTEM, limit: 0x7f };
    s.idtr = TableRegister { base: SYSTEM + IDT, limit: 0x1ff };
    s.cpl = 3;
    s.rip = CODE + WINDOW - mode.base();
    s.rflags = rflags::FIXED | rflags::IF;
    s
}

/// The state from which an engine that delivers exceptions itself runs a single-instruction case: it does so
/// until HLT and then asks [`caught`].
pub fn arm(case: &Case) -> CpuState {
    let mut s = case.state.clone();
    if case.run == Run::Instruction(Until::Step) {
        s.rflags |= rflags::TF;
    }
    s
}

/// Linear addresses of the HLTs where such an engine ends.
pub fn stubs() -> impl Iterator<Item = u64> {
    (0..32).map(|n| SYSTEM + STUBS + 16 * n)
}

/// What ended a single-instruction case on such an engine: turns the state after HLT into the one before delivery.
/// `read` loads eight bytes of guest-physical memory. `None` if it isn't in one of the stubs.
pub fn caught(run: Run, s: &mut CpuState, mut read: impl FnMut(u64) -> u64) -> Option<End> {
    let offset = s.rip.wrapping_sub(SYSTEM + STUBS + 1);
    let number = u8::try_from(offset / 16).ok().filter(|n| *n < 32 && offset.is_multiple_of(16))?;
    let mut at = |n: u64| read(s.gpr[4].wrapping_add(8 * n).wrapping_sub(SYSTEM).wrapping_add(SYSTEM_AT));
    let coded = matches!(number, vector::DF | vector::TS..=vector::PF | vector::AC | vector::CP);
    let code = coded.then(|| at(0) as u32);
    let frame: [u64; 5] = std::array::from_fn(|n| at(n as u64 + u64::from(coded)));
    let address = if number == vector::PF { s.cr2 } else { 0 };
    s.rip = frame[0];
    s.seg[Seg::Cs as usize].selector = frame[1] as u16;
    s.rflags = frame[2] & !(rflags::TF | rflags::RF);
    s.gpr[4] = frame[3];
    s.seg[Seg::Ss as usize].selector = frame[4] as u16;
    s.cpl = frame[1] as u8 & 3;
    Some(match (number, run) {
        (vector::DB, Run::Instruction(Until::Step)) => End::Completed,
        (vector::BP, Run::Instruction(Until::Breakpoint)) => {
            s.rip = s.rip.wrapping_sub(1);
            End::Completed
        }
        _ => End::Fault(Fault { vector: number, code, address }),
    })
}

const _: () = assert!(PAGES == 16);
