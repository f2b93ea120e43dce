//! The generator `rows`: random forms and operands of every instruction row, one instruction a case, in 16-, 32-
//! and 64-bit ring-3 code.

pub mod excluded;
pub mod form;
pub mod place;
pub mod processors;
pub mod selectors;
pub mod touched;
pub mod undefined;

use crate::case::{Case, Code as CaseCode, Layout, Piece, Run};
use crate::random::Random;
use crate::trace::Sample;
use crate::window::{self, BYTES, CODE, PHYSICAL};
use form::Wish;
use iced_x86::{Code, CpuidFeature, FlowControl, Instruction, Mnemonic};
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::{CpuState, rflags};
use umbra_cpu::isa;
use umbra_hostexec::native::{self, Mode, Until, WINDOW};

/// Attempts to make an instruction with a code before it counts as impossible.
const ATTEMPTS: usize = 40;

/// Every code that a row covers and that can be compared, by mode.
pub struct Rows {
    codes: Vec<(Mode, Code)>,
    /// Those of string instructions.
    strings: Vec<(Mode, Code)>,
}

impl Rows {
    /// Rows that `profile` offers.
    pub fn new(profile: &CpuidProfile) -> Self {
        let mut codes = Vec::new();
        for mode in Mode::ALL {
            let mut r = Random::new(2);
            let mut possible = |&code: &Code| (0..ATTEMPTS).any(|_| case(mode, code, &mut r).is_some());
            let all = Code::values().filter(|&code| is_comparable(mode, code) && is_offered(code, profile));
            codes.extend(all.filter(&mut possible).map(|code| (mode, code)));
        }
        let strings = codes.iter().copied().filter(|(_, code)| code.is_string_instruction()).collect();
        Self { codes, strings }
    }

    /// A random instruction of one mode.
    pub fn case_in(&self, mode: Mode, r: &mut Random) -> Case {
        one_in(&self.codes, mode, r)
    }

    /// A random string instruction of one mode.
    pub fn string_in(&self, mode: Mode, r: &mut Random) -> Case {
        one_in(&self.strings, mode, r)
    }

    /// A random instruction.
    pub fn case(&self, r: &mut Random) -> Case {
        one(&self.codes, r)
    }
}

fn one(codes: &[(Mode, Code)], r: &mut Random) -> Case {
    loop {
        let (mode, code) = r.pick(codes);
        if let Some(case) = case(mode, code, r) {
            return case;
        }
    }
}

fn one_in(codes: &[(Mode, Code)], mode: Mode, r: &mut Random) -> Case {
    loop {
        let case = one(codes, r);
        if case.layout == Layout::Window(mode) {
            return case;
        }
    }
}

/// Whether user code of this mode can run the code and its outcome is the same on all processors.
pub fn is_comparable(mode: Mode, code: Code) -> bool {
    // From 16-bit code, a far call to 64-bit code would push at an address of the system's own.
    let far_call = code.mnemonic() == Mnemonic::Call && selectors::loads(code) && mode == Mode::Bits16;
    isa::row_of(code).is_some() && form::exists(code, mode) && excluded::reason(code).is_none() && !far_call
}

/// Whether a CPU has it; sets that every x86-64 CPU has aren't asked for.
pub fn is_offered(code: Code, profile: &CpuidProfile) -> bool {
    let row = isa::row_of(code).map(|(_, row)| row);
    let vector = !uses_fp(code) || isa::host_data::is_offered(code.cpuid_features(), profile);
    vector && row.is_some_and(|row| row.needs.is_none_or(|feature| profile.has(feature)))
}

/// A random instruction with that code; `None` if this attempt gave none that can be compared.
pub fn case(mode: Mode, code: Code, r: &mut Random) -> Option<Case> {
    let size = code.op_code().memory_size().size().clamp(2, 64) as u64;
    let target = place::target(size, r);
    let rip = CODE + WINDOW - mode.base();
    let mut bytes = form::encode(code, &Wish { mode, rip, target }, r)?;
    if r.one_in(8) {
        bytes.insert(0, prefix(mode, r));
    }
    let i = decoded(mode, &bytes);
    if !may_compare(&i, mode, &bytes) {
        return None;
    }
    let state = place::state(&i, mode, target, uses_fp(i.code()), r)?;
    if undefined::result(&i, state.gpr[1]) || processors::differ_with(&i, &state) {
        return None;
    }
    let memory = fill(mode, target, &i, &state, r);
    Some(assemble(mode, &i, bytes, state, memory))
}

/// A sampled instruction with its registers, its operands moved into the window.
pub(crate) fn moved(sample: &Sample, r: &mut Random) -> Option<Case> {
    let Sample { mode, bytes, gpr, rflags, fp, data } = sample;
    let i = decoded(*mode, bytes);
    if !is_comparable(*mode, i.code()) || !may_compare(&i, *mode, bytes) {
        return None;
    }
    let target = place::target(i.memory_size().size().clamp(2, 64) as u64, r);
    let mut state = window::state(*mode);
    state.gpr = *gpr;
    state.rflags |= rflags & (rflags::STATUS | rflags::DF);
    if uses_fp(i.code()) {
        state.fp = *fp;
    }
    place::stack_pointer(*mode, &mut state, r);
    let state = place::put(&i, *mode, target, state, r)?;
    if undefined::result(&i, state.gpr[1]) || processors::differ_with(&i, &state) {
        return None;
    }
    let mut memory = fill(*mode, target, &i, &state, r);
    if let (Some(data), Some(operand)) = (data, memory.first_mut()) {
        *operand = around(target, *data);
    }
    Some(assemble(*mode, &i, bytes.clone(), state, memory))
}

fn may_compare(i: &Instruction, mode: Mode, bytes: &[u8]) -> bool {
    let code = i.code();
    i.len() == bytes.len()
        && isa::row_of(code).is_some()
        && excluded::reason(code).is_none()
        && !processors::differ(i, mode, bytes)
}

/// The case that runs `i` from this state with this memory.
pub fn assemble(mode: Mode, i: &Instruction, bytes: Vec<u8>, state: CpuState, memory: Vec<Piece>) -> Case {
    let watch = touched::ranges(i, mode, &state);
    let tail = vec![0xcc; 32usize.saturating_sub(bytes.len())];
    let code = CaseCode { gpa: PHYSICAL + CODE, steps: vec![bytes], linked: false, tail };
    Case { layout: Layout::Window(mode), state, memory, code, run: Run::Instruction(until(i)), watch }
}

/// The instruction of a window's case.
pub fn instruction(case: &Case, mode: Mode) -> Instruction {
    let mut bytes = [0xcc; 16];
    let all = case.code.steps.iter().flatten();
    bytes.iter_mut().zip(all).for_each(|(to, from)| *to = *from);
    native::decode(mode, &bytes, case.state.rip)
}

pub(crate) fn decoded(mode: Mode, bytes: &[u8]) -> Instruction {
    let mut padded = [0xcc; 32];
    padded.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    native::decode(mode, &padded, CODE + WINDOW - mode.base())
}

/// How the end of `i` is noticed natively: by the INT3 that follows it, unless it may go elsewhere or load the trap
/// flag. A software hypervisor takes several times longer for the trap flag's exception; PUSHF would show the flag,
/// loading SS holds its exception back, and a gather may take it between two elements.
fn until(i: &Instruction) -> Until {
    let loads_flags = matches!(i.mnemonic(), Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq);
    if loads_flags || i.flow_control() != FlowControl::Next { Until::Step } else { Until::Breakpoint }
}

fn prefix(mode: Mode, r: &mut Random) -> u8 {
    let rex = 0x40 | r.below(16) as u8;
    let legacy = [0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x2e, 0x36, 0x3e, 0x26, 0x65];
    if mode == Mode::Bits64 && r.one_in(3) { rex } else { r.pick(&legacy) }
}

/// Bytes around a linear address, moved into the window.
fn around(at: u64, bytes: [u8; 64]) -> Piece {
    let offset = at.wrapping_sub(WINDOW).min(BYTES as u64 - 64);
    Piece { gpa: PHYSICAL + offset, bytes: bytes.to_vec() }
}

/// Operands in memory; half of the compare-and-exchange instructions find what they expect.
fn fill(mode: Mode, target: u64, i: &Instruction, state: &CpuState, r: &mut Random) -> Vec<Piece> {
    let mut data = [0; 64];
    for chunk in data.chunks_exact_mut(16) {
        let lane = if uses_fp(i.code()) { r.lane() } else { [r.operand(), r.operand()] };
        chunk[..8].copy_from_slice(&lane[0].to_le_bytes());
        chunk[8..].copy_from_slice(&lane[1].to_le_bytes());
    }
    if r.one_in(2) {
        expect(i, state, &mut data);
    }
    if selectors::uses(i.code()) {
        // A selector alone, or behind an offset that is in most segments.
        let size = i.memory_size().size();
        data[..8].copy_from_slice(&(r.operand() >> r.below(60)).to_le_bytes());
        let at = size.saturating_sub(2).min(16);
        data[at..at + 2].copy_from_slice(&selectors::random(r).to_le_bytes());
    }
    let mut memory = vec![around(target, data)];
    let stack = stack(i, r);
    if i.is_stack_instruction() {
        let rsp = state.gpr[4].wrapping_add(mode.base());
        let at = if mode == Mode::Bits16 { WINDOW + (state.gpr[4] & 0xffff) } else { rsp };
        memory.push(around(at, stack));
    }
    memory
}

/// What a compare-and-exchange instruction compares with.
fn expect(i: &Instruction, state: &CpuState, data: &mut [u8; 64]) {
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

fn stack(i: &Instruction, r: &mut Random) -> [u8; 64] {
    let mut stack = [0; 64];
    for chunk in stack.chunks_exact_mut(8) {
        chunk.copy_from_slice(&r.operand().to_le_bytes());
    }
    if selectors::loads(i.code()) {
        let offset = r.below(0x1800);
        let at = match i.mnemonic() {
            Mnemonic::Retf => far_return_bytes(i.code()),
            _ => 0,
        };
        stack[..8].copy_from_slice(&offset.to_le_bytes());
        stack[at..at + 2].copy_from_slice(&selectors::random(r).to_le_bytes());
    }
    stack
}

/// Bytes of the offset, and with it of the selector, that RETF pops.
fn far_return_bytes(code: Code) -> usize {
    match code {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    }
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
