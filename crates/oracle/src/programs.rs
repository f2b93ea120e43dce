//! The generator `programs`: loops of random instructions in 32- and 64-bit ring-3 code, for engines that do several
//! instructions at once. Every operand in memory is in the window when its instruction is reached; what an instruction
//! leaves in registers, flags and memory is what the next ones find.

use crate::case::{Case, Code, Layout, Run};
use crate::random::Random;
use crate::rows::{self, Rows};
use crate::window::{self, BYTES, CODE, PHYSICAL};
use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, Register};
use umbra_arch::CpuState;
use umbra_arch::segment::{Seg, Segment};
use umbra_hostexec::native::{Mode, WINDOW};

/// Most instructions of a loop.
const LONGEST: u64 = 10;
/// Instructions and deliveries after which a program hangs: a repeated instruction counts each of its chunks.
const AT_MOST: u64 = 100_000;
/// The loop's counter, at the end of a writable page.
const COUNTER: u64 = WINDOW + 0xaff8;
/// One instruction of so many is a string's: they are too few of all, and have host code of their own.
const STRINGS: u64 = 8;
/// Attempts to find an instruction.
const ATTEMPTS: usize = 200;

/// A random program.
pub fn case(rows: &Rows, r: &mut Random) -> Case {
    let mode = if r.one_in(2) { Mode::Bits32 } else { Mode::Bits64 };
    case_in(mode, rows, r)
}

fn case_in(mode: Mode, rows: &Rows, r: &mut Random) -> Case {
    let mut state = window::state(mode);
    let mut memory = Vec::new();
    let mut steps: Vec<Vec<u8>> = Vec::new();
    for n in 0..=r.below(LONGEST) {
        let Some((bytes, one)) = (0..ATTEMPTS).find_map(|_| step(mode, rows, r)) else { break };
        if n == 0 {
            state = one.state.clone();
        }
        memory.extend(one.memory);
        let mut pieces = Vec::new();
        if mode == Mode::Bits32 && r.one_in(8) {
            pieces.push(load_segment(r));
        }
        if r.one_in(8) {
            // A function's.
            pieces.extend([vec![0xe8, 2, 0, 0, 0, 0xeb, bytes.len() as u8 + 1], bytes, vec![0xc3]]);
        } else {
            pieces.push(bytes);
        }
        // Now and then it is jumped over, by what flags say then.
        if r.one_in(6) {
            let len = pieces.iter().map(Vec::len).sum::<usize>();
            steps.push(vec![0x0f, 0x80 + r.below(16) as u8, len as u8, 0, 0, 0]);
        }
        steps.extend(pieces);
    }
    if mode == Mode::Bits32 {
        narrow_state(&mut state, r);
    }
    let gpa = PHYSICAL + CODE;
    let mut code = Code { gpa, steps, linked: false, tail: Vec::new() };
    code.tail = again(mode, code.bytes().len() as u32);
    memory
        .push(crate::case::Piece { gpa: COUNTER - WINDOW + PHYSICAL, bytes: (1 + r.below(4)).to_le_bytes().to_vec() });
    let watch = std::iter::once(PHYSICAL..PHYSICAL + BYTES as u64).collect();
    Case { layout: Layout::Window(mode), state, memory, code, run: Run::Halt { at_most: AT_MOST }, watch }
}

/// An instruction behind what loads its addresses, and the case that it comes from.
fn step(mode: Mode, rows: &Rows, r: &mut Random) -> Option<(Vec<u8>, Case)> {
    let strings = r.one_in(STRINGS);
    let case = if strings { rows.string_in(mode, r) } else { rows.case_in(mode, r) };
    let i = rows::instruction(&case, mode);
    if i.flow_control() != FlowControl::Next || i.is_ip_rel_memory_operand() {
        return None;
    }
    let mut bytes = Vec::new();
    for register in addresses(&i) {
        let number = register.number() as u8;
        let value = case.state.gpr[usize::from(number)];
        bytes.extend(load(mode, number, value));
    }
    bytes.extend(case.code.steps.concat());
    Some((bytes, case))
}

/// MOV of a constant to a general register.
fn load(mode: Mode, number: u8, value: u64) -> Vec<u8> {
    if mode == Mode::Bits64 {
        [&[0x48 | number >> 3, 0xb8 | number & 7][..], &value.to_le_bytes()].concat()
    } else {
        [&[0xb8 | number][..], &(value as u32).to_le_bytes()].concat()
    }
}

/// Loads DS, ES or FS in a way that leaves the program running: most often with the flat segment, else ES or FS with none.
fn load_segment(r: &mut Random) -> Vec<u8> {
    let flat = Mode::Bits32.data().selector;
    let (number, selector) = match r.below(6) {
        0 => (0, 0),
        1 => (4, 0),
        2 => (3, flat),
        3 => (4, flat),
        _ => (0, flat),
    };
    [load(Mode::Bits32, 0, selector.into()), vec![0x8e, 0xc0 | number << 3]].concat()
}

/// GS and FS without a limit, so that they are only added; upper halves of registers, as 64-bit code may leave them.
fn narrow_state(state: &mut CpuState, r: &mut Random) {
    if r.one_in(2) {
        let gs = &mut state.seg[Seg::Gs as usize];
        *gs = Segment { limit: u32::MAX, attr: Mode::Bits32.data().attr, ..*gs };
        let base = if r.one_in(2) { 0 } else { r.operand() };
        state.seg[Seg::Fs as usize] = Segment { base, ..Mode::Bits32.data() };
    }
    if r.one_in(4) {
        state.gpr[..8].iter_mut().for_each(|value| *value |= r.operand() << 32);
    }
}

/// General registers that addresses and counts are made of.
fn addresses(i: &Instruction) -> Vec<Register> {
    let mut factory = InstructionInfoFactory::new();
    let used = factory.info(i).used_memory().iter().flat_map(|memory| [memory.base(), memory.index()]);
    let repeated = i.has_rep_prefix() || i.has_repne_prefix();
    let mut all: Vec<Register> = used.chain(repeated.then_some(Register::RCX)).map(Register::full_register).collect();
    all.retain(|register| register.is_gpr64());
    all.sort_unstable();
    all.dedup();
    all
}

/// Goes back to the start, `distance` bytes before, as long as the counter lasts; then INT3.
fn again(mode: Mode, distance: u32) -> Vec<u8> {
    let mut code = load(mode, 0, COUNTER);
    code.extend([0xff, 0x08, 0x0f, 0x85]);
    let back = 0u32.wrapping_sub(distance + code.len() as u32 + 4);
    code.extend(back.to_le_bytes());
    code.push(0xcc);
    code
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{Answer, Engine};
    use crate::engines::{self, make};

    #[test]
    fn most_programs_come_to_their_end() {
        let rows = Rows::new(&engines::profile());
        let mut engine = make("interp").unwrap();
        for mode in [Mode::Bits32, Mode::Bits64] {
            most_end(mode, &rows, &mut *engine);
        }
    }

    fn most_end(mode: Mode, rows: &Rows, engine: &mut dyn Engine) {
        let (mut ended, mut steps) = (0, 0);
        for seed in 0..200 {
            let case = case_in(mode, rows, &mut Random::new(seed));
            let Answer::Outcome(outcome) = engine.run(&case) else { continue };
            steps += case.code.steps.len();
            // The counter was counted down.
            let at = (COUNTER - WINDOW) as usize;
            ended += usize::from(outcome.memory[0].bytes[at..at + 8] == [0; 8]);
        }
        assert!(ended > 60 && steps > 800, "{ended} of 200 programs ended, {steps} steps");
    }
}
