//! Compares two outcomes of a case, leaving out what manuals leave undefined.

use crate::case::{Case, Layout, Piece};
use crate::engine::{End, Outcome};
use crate::rows::{self, processors, undefined};
use crate::window::PHYSICAL;
use iced_x86::Instruction;
use std::fmt::Write as _;
use std::ops::Range;
use umbra_arch::fpu::FpState;
use umbra_arch::state::Activity;
use umbra_arch::{CpuState, Fault, rflags};
use umbra_cpu::isa;
use umbra_hostexec::native::{Mode, WINDOW};

/// The result of a comparison.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Comparison {
    /// Nothing differs.
    Same,
    /// What differs, in words.
    Different(String),
    /// Several answers are right, for this reason.
    Free(&'static str),
}

/// What isn't compared.
struct Mask {
    rflags: u64,
    open: processors::Open,
    memory: Range<u64>,
    registers: u64,
}

/// Compares outcomes `a` and `b` of the engines with these names.
pub fn compare(case: &Case, (name_a, a): (&str, &Outcome), (name_b, b): (&str, &Outcome)) -> Comparison {
    let mut mask = Mask { rflags: 0, open: processors::Open::default(), memory: 0..0, registers: u64::MAX };
    if let Layout::Window(mode) = case.layout {
        let i = rows::instruction(case, mode);
        if let Some(reason) = free(&i, mode, a, b) {
            return Comparison::Free(reason);
        }
        mask = window_mask(&i, mode, case, a, b);
    }
    let mut text = String::new();
    let mut note = |what: &str, a: &dyn std::fmt::Debug, b: &dyn std::fmt::Debug| {
        let _ = write!(text, "{what}: {a:x?} {name_a}, {b:x?} {name_b}; ");
    };
    if plain(a.end) != plain(b.end) {
        note("ends with", &a.end, &b.end);
    }
    if let (Some(a), Some(b)) = (&a.state, &b.state)
        && a.activity != Activity::Shutdown
        && b.activity != Activity::Shutdown
    {
        states(a, b, case.layout, &mask, &mut note);
    }
    memory(&a.memory, &b.memory, &mask.memory, &mut note);
    if text.is_empty() { Comparison::Same } else { Comparison::Different(text) }
}

/// Exceptions without an error code and with 0 are the same.
fn plain(end: End) -> End {
    match end {
        End::Fault(fault) => End::Fault(Fault { code: Some(fault.code.unwrap_or(0)), ..fault }),
        end => end,
    }
}

fn free(i: &Instruction, mode: Mode, a: &Outcome, b: &Outcome) -> Option<&'static str> {
    if processors::free(i, &a.end, &b.end) {
        return Some("the order or presence of these exceptions is the processor's choice");
    }
    let changes = |o: &Outcome| o.state.as_ref().is_some_and(|s| processors::changes_width(mode, s));
    (changes(a) || changes(b)).then_some("the stack's width in a transfer to 64-bit code isn't defined")
}

fn window_mask(i: &Instruction, mode: Mode, case: &Case, a: &Outcome, b: &Outcome) -> Mask {
    let undefined = isa::row_of(i.code()).map_or(0, |(_, row)| undefined::flags(i, row, case.state.gpr[1]));
    let after = b.state.as_ref().or(a.state.as_ref());
    let mxcsr = after.map_or(0, |s| s.fp.mxcsr);
    let halved = after.is_some_and(|s| processors::leaves_64_bit(mode, s));
    let mut memory = 0..0;
    if let Some(s) = after
        && processors::pushes_selector(i)
    {
        let at = s.gpr[4].wrapping_add(mode.base()).wrapping_sub(WINDOW) & 0xffff;
        memory = PHYSICAL + at + 2..PHYSICAL + at + 4;
    }
    Mask {
        rflags: undefined | rflags::TF | rflags::RF,
        open: processors::open(i, &a.end, &b.end, mxcsr),
        memory,
        registers: if halved { Mode::Bits32.mask() } else { mode.mask() },
    }
}

type Note<'a> = dyn FnMut(&str, &dyn std::fmt::Debug, &dyn std::fmt::Debug) + 'a;

fn states(a: &CpuState, b: &CpuState, layout: Layout, mask: &Mask, note: &mut Note<'_>) {
    let registers = if matches!(layout, Layout::Window(Mode::Bits16 | Mode::Bits32)) { 8 } else { 16 };
    for n in 0..registers {
        let open = if mask.open.gpr.0 == n { mask.open.gpr.1 } else { 0 };
        let keep = mask.registers & !open;
        if (a.gpr[n] ^ b.gpr[n]) & keep != 0 {
            note(&format!("register {n}"), &a.gpr[n], &b.gpr[n]);
        }
    }
    if (a.rip ^ b.rip) & mask.registers != 0 {
        note("rip", &a.rip, &b.rip);
    }
    if (a.rflags ^ b.rflags) & !mask.rflags != 0 {
        note("rflags", &a.rflags, &b.rflags);
    }
    let selectors = |s: &CpuState| -> [u16; 6] {
        // Returning from a kernel clears the RPL of null selectors.
        std::array::from_fn(|n| if s.seg[n].selector < 4 { 0 } else { s.seg[n].selector })
    };
    if selectors(a) != selectors(b) {
        note("selectors", &selectors(a), &selectors(b));
    }
    if !layout.is_window() {
        system(a, b, note);
    }
    if a.fp != b.fp {
        floating(&comparable(&a.fp, mask.open.mxcsr), &comparable(&b.fp, mask.open.mxcsr), note);
    }
}

/// What ring 0 can see besides.
fn system(a: &CpuState, b: &CpuState, note: &mut Note<'_>) {
    let registers = |s: &CpuState| [s.cr0.raw(), s.cr2, s.cr3.raw(), s.cr4.raw(), s.efer.raw(), s.pkru.into()];
    for (n, name) in ["cr0", "cr2", "cr3", "cr4", "efer", "pkru"].into_iter().enumerate() {
        if registers(a)[n] != registers(b)[n] {
            note(name, &registers(a)[n], &registers(b)[n]);
        }
    }
    if a.cpl != b.cpl {
        note("cpl", &a.cpl, &b.cpl);
    }
}

/// Without instruction and data pointers, padding, and MXCSR bits that are left open.
fn comparable(fp: &FpState, open: u32) -> FpState {
    let mxcsr = fp.mxcsr & !open;
    let mut fp = FpState { fop: 0, fip: 0, fdp: 0, tail: [0; 12], reserved: 0, mxcsr_mask: 0, mxcsr, ..*fp };
    fp.st.iter_mut().for_each(|st| st[1] &= 0xffff);
    fp
}

fn floating(a: &FpState, b: &FpState, note: &mut Note<'_>) {
    let words = |fp: &FpState| [fp.fcw.into(), fp.fsw.into(), fp.ftw.into(), fp.mxcsr];
    if words(a) != words(b) {
        note("FCW, FSW, FTW, MXCSR", &words(a), &words(b));
    }
    let sets = [("st", &a.st[..], &b.st[..]), ("xmm", &a.xmm, &b.xmm), ("upper half of ymm", &a.ymm_high, &b.ymm_high)];
    for (name, a, b) in sets {
        for (n, (a, b)) in a.iter().zip(b).enumerate().filter(|(_, (a, b))| a != b) {
            note(&format!("{name}{n}"), a, b);
        }
    }
}

/// Compares ranges that both know.
fn memory(a: &[Piece], b: &[Piece], ignored: &Range<u64>, note: &mut Note<'_>) {
    for (a, b) in a.iter().filter_map(|a| Some((a, b.iter().find(|b| b.gpa == a.gpa)?))) {
        if a.bytes == b.bytes {
            continue;
        }
        let differs = |n: &usize| a.bytes.get(*n) != b.bytes.get(*n) && !ignored.contains(&(a.gpa + *n as u64));
        if let Some(at) = (0..a.bytes.len().max(b.bytes.len())).find(differs) {
            let at8 = at & !7;
            let quad = |bytes: &[u8]| bytes.get(at8..bytes.len().min(at8 + 8)).map(<[u8]>::to_vec).unwrap_or_default();
            note(&format!("memory at {:#x}", a.gpa + at8 as u64), &quad(&a.bytes), &quad(&b.bytes));
        }
    }
}
