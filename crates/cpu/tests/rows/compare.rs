//! Runs cases on both sides and compares everything.

use crate::form::{self, Wish};
use crate::guest::{self, Guest};
use crate::place::{self, CODE};
use crate::random::Random;
use crate::{excluded, processors, selectors, undefined};
use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic, OpKind, Register};
use std::collections::{BTreeMap, BTreeSet};
use umbra_arch::Fault;
use umbra_arch::fpu::FpState;
use umbra_arch::rflags;
use umbra_cpu::isa::{self, Row};
use umbra_hostexec::native::{self, Ended, Mode, NativeCpu, NativeFault, NativeState, PAGES, Until, WINDOW};

const WINDOW_BYTES: usize = PAGES * 4096;

/// What was seen of a code.
#[derive(Default, Clone, Copy)]
pub struct Seen {
    /// Cases compared.
    pub compared: usize,
    /// Cases in which it completed.
    pub completed: usize,
}

pub struct Comparison {
    mode: Mode,
    native: NativeCpu,
    guest: Guest,
    r: Random,
    pub seen: BTreeMap<Code, Seen>,
    differences: BTreeMap<Code, (usize, String)>,
    cases: usize,
}

impl Comparison {
    pub fn new(mode: Mode, seed: u64) -> Self {
        let native = NativeCpu::new().unwrap();
        let guest = Guest::new(&guest::profile(), mode);
        let mut new = Self {
            mode,
            native,
            guest,
            r: Random(seed),
            seen: BTreeMap::new(),
            differences: BTreeMap::new(),
            cases: 0,
        };
        for at in (0..WINDOW_BYTES).step_by(8) {
            let value = new.r.operand().to_le_bytes();
            new.write(at, &value);
        }
        new
    }

    /// `cases` instructions of every code of this mode that a row covers.
    pub fn all(&mut self, cases: usize, wanted: impl Fn(Code) -> bool) {
        for code in Code::values().filter(|&code| wanted(code)) {
            // From 16-bit code, a far call to 64-bit code would push at an address of the system's own.
            let far_call = code.mnemonic() == Mnemonic::Call && selectors::loads(code);
            if far_call && self.mode == Mode::Bits16 {
                continue;
            }
            if isa::row_of(code).is_none() || !form::exists(code, self.mode) || excluded::reason(code).is_some() {
                continue;
            }
            let mut left = cases;
            for _ in 0..20 * cases {
                if left > 0 && self.one(code).is_some() {
                    left -= 1;
                }
            }
        }
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        self.native.write(offset, data);
        self.guest.write(offset, data);
    }

    /// One random instruction with that code; `None` if none could be compared.
    fn one(&mut self, code: Code) -> Option<()> {
        let size = code.op_code().memory_size().size().clamp(2, 64) as u64;
        let target = place::target(size, &mut self.r);
        let rip = CODE + WINDOW - self.mode.base();
        let mut bytes = form::encode(code, &Wish { mode: self.mode, rip, target }, &mut self.r)?;
        if self.r.one_in(8) {
            bytes.insert(0, self.prefix());
        }
        let mut code_bytes = [0xcc; 32];
        code_bytes.get_mut(..bytes.len())?.copy_from_slice(&bytes);
        let i = native::decode(self.mode, &code_bytes, rip);
        let (_, row) = isa::row_of(i.code())?;
        if i.len() != bytes.len() || excluded::reason(i.code()).is_some() || processors::differ(&i, self.mode, &bytes) {
            return None;
        }
        let with_fp = uses_fp(i.code());
        let state = place::state(&i, self.mode, target, with_fp, &mut self.r)?;
        if undefined::result(&i, state.gpr[1]) || processors::differ_with(&i, &state) {
            return None;
        }
        self.write(CODE as usize, &code_bytes);
        self.fill(target, &i, &state);
        self.run(&i, row, &bytes, state, with_fp)
    }

    fn prefix(&mut self) -> u8 {
        let rex = 0x40 | self.r.below(16) as u8;
        let legacy = [0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x2e, 0x36, 0x3e, 0x26, 0x65];
        if self.mode == Mode::Bits64 && self.r.one_in(3) { rex } else { self.r.pick(&legacy) }
    }

    /// Operands in memory; half of the compare-and-exchange instructions find what they expect.
    fn fill(&mut self, target: u64, i: &Instruction, state: &NativeState) {
        let around = |at: u64| (at.wrapping_sub(WINDOW) as usize).min(WINDOW_BYTES - 64);
        let mut data = [0; 64];
        for chunk in data.chunks_exact_mut(16) {
            let lane = if uses_fp(i.code()) { self.r.lane() } else { [self.r.operand(), self.r.operand()] };
            chunk[..8].copy_from_slice(&lane[0].to_le_bytes());
            chunk[8..].copy_from_slice(&lane[1].to_le_bytes());
        }
        if self.r.one_in(2) {
            let (low, high) = (state.gpr[0].to_le_bytes(), state.gpr[2].to_le_bytes());
            match i.mnemonic() {
                Mnemonic::Cmpxchg => data[..8].copy_from_slice(&low),
                Mnemonic::Cmpxchg8b => {
                    data[..4].copy_from_slice(&low[..4]);
                    data[4..8].copy_from_slice(&high[..4]);
                }
                Mnemonic::Cmpxchg16b => {
                    data[..8].copy_from_slice(&low);
                    data[8..16].copy_from_slice(&high);
                }
                _ => {}
            }
        }
        if selectors::uses(i.code()) {
            // A selector alone, or behind an offset that is in most segments.
            let size = i.memory_size().size();
            data[..8].copy_from_slice(&(self.r.operand() >> self.r.below(60)).to_le_bytes());
            let at = size.saturating_sub(2).min(16);
            data[at..at + 2].copy_from_slice(&selectors::random(&mut self.r).to_le_bytes());
        }
        self.write(around(target), &data);
        let mut stack = [0; 64];
        for chunk in stack.chunks_exact_mut(8) {
            chunk.copy_from_slice(&self.r.operand().to_le_bytes());
        }
        if selectors::loads(i.code()) {
            let offset = self.r.below(0x1800);
            let at = match i.mnemonic() {
                Mnemonic::Retf => far_return_bytes(i.code()),
                _ => 0,
            };
            stack[..8].copy_from_slice(&offset.to_le_bytes());
            stack[at..at + 2].copy_from_slice(&selectors::random(&mut self.r).to_le_bytes());
        }
        let rsp = state.gpr[4].wrapping_add(self.mode.base());
        let narrow = if self.mode == Mode::Bits16 { WINDOW + (state.gpr[4] & 0xffff) } else { rsp };
        if i.is_stack_instruction() {
            self.write(around(narrow), &stack);
        }
    }

    fn run(&mut self, i: &Instruction, row: &Row, bytes: &[u8], before: NativeState, with_fp: bool) -> Option<()> {
        let repeated = i.is_string_instruction() && (i.has_rep_prefix() || i.has_repne_prefix());
        let shows_flags = matches!(i.mnemonic(), Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq);
        // A gather may take the trap flag's exception between two elements.
        // Loading SS holds the trap flag's exception back.
        let stack_segment = before_shadow(i);
        let until =
            if stack_segment || repeated || shows_flags || i.is_vsib() { Until::Breakpoint } else { Until::Step };
        let (mut ours, mut theirs) = (before.clone(), before.clone());
        let ended = match self.native.run(i, self.mode, until, &mut theirs, with_fp) {
            Ended::Done => Ok(()),
            Ended::Fault(fault) => Err(fault),
            Ended::Refused(_) => return None,
        };
        let flow = self.guest.run(bytes, &mut ours, with_fp).map_err(as_native);
        if processors::free(i, &flow, &ended) || processors::changes_width(self.mode, &theirs) {
            self.memory_difference();
            return None;
        }
        processors::even_out(i, &ended, &mut ours, &mut theirs);
        if processors::pushes_selector(i) && flow.is_ok() {
            let at = (ours.gpr[4].wrapping_add(self.mode.base()).wrapping_sub(WINDOW) & 0xffff) as usize;
            self.write(at + 2, &[0; 2]);
        }
        let seen = self.seen.entry(i.code()).or_default();
        seen.compared += 1;
        seen.completed += usize::from(ended.is_ok());
        self.cases += 1;
        let undefined = undefined::flags(i, row, before.gpr[1]);
        let mut difference = differences(&normal(&ours, undefined, self.mode), &normal(&theirs, undefined, self.mode));
        if flow != ended {
            difference = format!("ends with {flow:x?} here, {ended:x?} there; {difference}");
        }
        difference += &self.memory_difference();
        if !difference.is_empty() {
            let note = format!(
                "{:?} {bytes:02x?}: {difference}\n      before: {:x?} flags {:x}",
                i.code(),
                before.gpr,
                before.rflags
            );
            self.differences.entry(i.code()).or_insert((0, note)).0 += 1;
        }
        Some(())
    }

    /// Describes and repairs differences in the window.
    fn memory_difference(&mut self) -> String {
        let (mut ours, mut theirs) = (vec![0; WINDOW_BYTES], vec![0; WINDOW_BYTES]);
        self.guest.read(0, &mut ours);
        self.native.read(0, &mut theirs);
        if ours == theirs {
            return String::new();
        }
        let at = ours.iter().zip(&theirs).position(|(a, b)| a != b).unwrap_or(0);
        let end = (at + 16).min(WINDOW_BYTES);
        self.guest.write(0, &theirs);
        format!("memory at {at:#x}: {:02x?} here, {:02x?} there; ", &ours[at..end], &theirs[at..end])
    }

    /// Fails if anything differed; else the codes that were compared, most of them to completion.
    pub fn finish(self) -> BTreeSet<Code> {
        println!("{:?}: {} cases, {} codes", self.mode, self.cases, self.seen.len());
        for (code, (count, first)) in &self.differences {
            println!("{code:?}: {count} of {} differ\n   {first}", self.seen[code].compared);
        }
        assert!(self.differences.is_empty(), "{} codes differ", self.differences.len());
        let enough = |(code, seen): (Code, Seen)| (seen.completed > 1 || always_faults(code)).then_some(code);
        self.seen.into_iter().filter_map(enough).collect()
    }
}

/// User code can't complete it: that it faults alike is all there is to see.
fn always_faults(code: Code) -> bool {
    let port = matches!(
        code.mnemonic(),
        Mnemonic::In
            | Mnemonic::Out
            | Mnemonic::Insb
            | Mnemonic::Insw
            | Mnemonic::Insd
            | Mnemonic::Outsb
            | Mnemonic::Outsw
            | Mnemonic::Outsd
            | Mnemonic::Cli
            | Mnemonic::Sti
    );
    code.is_privileged() || port
}

/// Bytes of the offset, and with it of the selector, that RETF pops.
fn far_return_bytes(code: Code) -> usize {
    match code {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    }
}

/// Whether `i` loads SS.
fn before_shadow(i: &Instruction) -> bool {
    let first = i.op_count() > 0 && i.op_kind(0) == OpKind::Register && i.op0_register() == Register::SS;
    i.mnemonic() == Mnemonic::Lss || first && i.mnemonic() != Mnemonic::Push
}

fn as_native(fault: Fault) -> NativeFault {
    NativeFault { vector: fault.vector, code: fault.code.unwrap_or(0), address: fault.address }
}

/// Without what isn't comparable.
fn normal(state: &NativeState, undefined: u64, mode: Mode) -> NativeState {
    let mut s = state.clone();
    s.rflags &= !(undefined | rflags::TF | rflags::RF);
    s.gpr.iter_mut().for_each(|r| *r &= mode.mask());
    if mode != Mode::Bits64 {
        s.gpr[8..].fill(0);
    }
    s.rip &= mode.mask();
    // Returning from the system clears the RPL of null selectors.
    s.selectors.iter_mut().filter(|selector| **selector < 4).for_each(|selector| *selector = 0);
    s.fp = FpState { fop: 0, fip: 0, fdp: 0, tail: [0; 12], reserved: 0, mxcsr_mask: 0, ..s.fp };
    s.fp.st.iter_mut().for_each(|st| st[1] &= 0xffff);
    s
}

fn differences(ours: &NativeState, theirs: &NativeState) -> String {
    let mut text = String::new();
    for (r, (a, b)) in ours.gpr.iter().zip(&theirs.gpr).enumerate() {
        if a != b {
            text += &format!("register {r}: {a:x} here, {b:x} there; ");
        }
    }
    if ours.selectors != theirs.selectors {
        text += &format!("selectors: {:x?} here, {:x?} there; ", ours.selectors, theirs.selectors);
    }
    if ours.rip != theirs.rip {
        text += &format!("rip: {:x} here, {:x} there; ", ours.rip, theirs.rip);
    }
    if ours.rflags != theirs.rflags {
        text += &format!("rflags: {:x} here, {:x} there; ", ours.rflags, theirs.rflags);
    }
    if ours.fp != theirs.fp {
        text += &format!("fp: {}; ", fp_differences(&ours.fp, &theirs.fp));
    }
    text
}

fn fp_differences(ours: &FpState, theirs: &FpState) -> String {
    let words = |fp: &FpState| [fp.fcw.into(), fp.fsw.into(), fp.ftw.into(), fp.mxcsr];
    let mut text = format!("words {:x?} here, {:x?} there", words(ours), words(theirs));
    let sets = [
        ("st", &ours.st[..], &theirs.st[..]),
        ("xmm", &ours.xmm, &theirs.xmm),
        ("high", &ours.ymm_high, &theirs.ymm_high),
    ];
    for (name, a, b) in sets {
        for (n, (a, b)) in a.iter().zip(b).enumerate().filter(|(_, (a, b))| a != b) {
            text += &format!(", {name}{n} {a:x?} here, {b:x?} there");
        }
    }
    text
}

/// Whether vector or x87 registers take part.
pub fn uses_fp(code: Code) -> bool {
    use CpuidFeature as F;
    let sets = code.cpuid_features();
    sets.iter().any(|f| {
        matches!(
            f,
            F::FPU
                | F::FPU287
                | F::FPU387
                | F::MMX
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::AES
                | F::PCLMULQDQ
                | F::SHA
                | F::GFNI
                | F::AVX
                | F::AVX2
                | F::FMA
                | F::F16C
                | F::VAES
                | F::VPCLMULQDQ
        )
    })
}
