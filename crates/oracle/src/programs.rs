//! The generator `programs`: loops of random instructions in 64-bit ring-3 code, for engines that do several
//! instructions at once. Every operand in memory is in the window when its instruction is reached; what an instruction
//! leaves in registers, flags and memory is what the next ones find.

use crate::case::{Case, Code, Layout, Run};
use crate::random::Random;
use crate::rows::{self, Rows};
use crate::window::{self, BYTES, CODE, PHYSICAL};
use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, Register};
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
    let mut state = window::state(Mode::Bits64);
    let mut memory = Vec::new();
    let mut steps: Vec<Vec<u8>> = Vec::new();
    for n in 0..=r.below(LONGEST) {
        let Some((bytes, one)) = (0..ATTEMPTS).find_map(|_| step(rows, r)) else { break };
        if n == 0 {
            state = one.state.clone();
        }
        memory.extend(one.memory);
        // Now and then it is jumped over, by what flags say then.
        if r.one_in(6) {
            steps.push(vec![0x0f, 0x80 + r.below(16) as u8, bytes.len() as u8, 0, 0, 0]);
        }
        steps.push(bytes);
    }
    let gpa = PHYSICAL + CODE;
    let mut code = Code { gpa, steps, linked: false, tail: Vec::new() };
    code.tail = again(code.bytes().len() as u32);
    memory
        .push(crate::case::Piece { gpa: COUNTER - WINDOW + PHYSICAL, bytes: (1 + r.below(4)).to_le_bytes().to_vec() });
    let watch = std::iter::once(PHYSICAL..PHYSICAL + BYTES as u64).collect();
    Case { layout: Layout::Window(Mode::Bits64), state, memory, code, run: Run::Halt { at_most: AT_MOST }, watch }
}

/// An instruction behind what loads its addresses, and the case that it comes from.
fn step(rows: &Rows, r: &mut Random) -> Option<(Vec<u8>, Case)> {
    let strings = r.one_in(STRINGS);
    let case = if strings { rows.string_in(Mode::Bits64, r) } else { rows.case_in(Mode::Bits64, r) };
    let i = rows::instruction(&case, Mode::Bits64);
    if i.flow_control() != FlowControl::Next || i.is_ip_rel_memory_operand() {
        return None;
    }
    let mut bytes = Vec::new();
    for register in addresses(&i) {
        let number = register.number() as u8;
        bytes.extend([0x48 | number >> 3, 0xb8 | number & 7]);
        bytes.extend(case.state.gpr[usize::from(number)].to_le_bytes());
    }
    bytes.extend(case.code.steps.concat());
    Some((bytes, case))
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
fn again(distance: u32) -> Vec<u8> {
    let mut code = vec![0x48, 0xb8];
    code.extend(COUNTER.to_le_bytes());
    code.extend([0xff, 0x08, 0x0f, 0x85]);
    let back = 0u32.wrapping_sub(distance + code.len() as u32 + 4);
    code.extend(back.to_le_bytes());
    code.push(0xcc);
    code
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Answer;
    use crate::engines::{self, make};

    #[test]
    fn most_programs_come_to_their_end() {
        let rows = Rows::new(&engines::profile());
        let mut engine = make("interp").unwrap();
        let (mut ended, mut steps) = (0, 0);
        for seed in 0..200 {
            let case = case(&rows, &mut Random::new(seed));
            let Answer::Outcome(outcome) = engine.run(&case) else { continue };
            steps += case.code.steps.len();
            // The counter was counted down.
            let at = (COUNTER - WINDOW) as usize;
            ended += usize::from(outcome.memory[0].bytes[at..at + 8] == [0; 8]);
        }
        assert!(ended > 60 && steps > 800, "{ended} of 200 programs ended, {steps} steps");
    }
}
