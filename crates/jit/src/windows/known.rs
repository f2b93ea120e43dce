//! What is known of base registers where host code is written: the region that each was found in, if it has changed by
//! little since.

use crate::plan::{Kind, has_memory, written_first};
use crate::registers::guest;
use crate::windows::BASES;
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};
use umbra_cpu::decode::register_index;
use umbra_cpu::op::{NO_REG, Op};

/// The most that a register may change by in one operation; a trace has few enough of them that windows' margins cover
/// it all.
const LITTLE: i64 = 1 << 20;

/// By base register: its region.
#[derive(Clone, Copy, Default)]
pub struct Known([Option<u8>; BASES]);

impl Known {
    pub fn region(&self, base: u8) -> Option<u8> {
        self.0.get(usize::from(base)).copied().flatten()
    }

    pub fn found(&mut self, base: u8, region: u8) {
        if let Some(known) = self.0.get_mut(usize::from(base)) {
            *known = Some(region);
        }
    }

    /// After an operation.
    pub fn follow(&mut self, i: &Instruction, kind: Kind) {
        let rsp = self.0[usize::from(guest::RSP)];
        match kind {
            Kind::Push | Kind::Nop | Kind::Jcc | Kind::Jmp => return,
            Kind::Leave => {
                self.0[usize::from(guest::RSP)] = self.0[usize::from(guest::RBP)].take();
                return;
            }
            Kind::Helper => return *self = Self::default(),
            _ => {}
        }
        let written = match kind {
            Kind::Pop => only(i.op0_register()),
            _ => written_first(i).or_else(|| only(i.op0_register()).filter(|_| writes_first_alone(i, kind))),
        };
        let Some(written) = written else {
            *self = Self::default();
            let touches_stack = (0..i.op_count()).any(|n| is_stack(i.op_register(n)));
            self.0[usize::from(guest::RSP)] = rsp.filter(|_| !touches_stack);
            return;
        };
        if let (Some(to), Some(from)) = (one(written), little_from(i)) {
            self.0[to] = self.0[from];
            return;
        }
        (0..16).filter(|n| written >> n & 1 != 0).for_each(|n: usize| self.0[n] = None);
    }
}

/// Of general registers.
fn writes_first_alone(i: &Instruction, kind: Kind) -> bool {
    let data = matches!(kind, Kind::Move | Kind::Silent | Kind::Shift(_) | Kind::Turn(_) | Kind::Imul | Kind::BitTest);
    (data || matches!(kind, Kind::Vector | Kind::X87 | Kind::Arithmetic)) && i.mnemonic() != M::Xadd
}

fn is_stack(register: Register) -> bool {
    register.is_gpr() && register_index(register.full_register()) == guest::RSP
}

fn only(register: Register) -> Option<u16> {
    Some(if register.is_gpr() { 1 << register_index(register.full_register()) } else { 0 })
}

fn one(written: u16) -> Option<usize> {
    written.is_power_of_two().then(|| written.trailing_zeros() as usize)
}

/// The register that the first operand is little away from afterwards.
fn little_from(i: &Instruction) -> Option<usize> {
    let number = |register: Register| register.is_gpr64().then(|| usize::from(register_index(register)));
    let to = number(i.op0_register())?;
    if i.op0_kind() != OpKind::Register {
        return None;
    }
    match i.mnemonic() {
        M::Inc | M::Dec => Some(to),
        M::Add | M::Sub if is_immediate(i) => {
            (i.immediate(1) as i64).checked_abs().filter(|n| *n <= LITTLE).map(|_| to)
        }
        M::And if is_immediate(i) => (-4096..0).contains(&(i.immediate(1) as i64)).then_some(to),
        M::Mov if i.op1_kind() == OpKind::Register => number(i.op1_register()),
        M::Lea if i.memory_index() == Register::None => {
            let little = (i.memory_displacement64() as i64).checked_abs().is_some_and(|n| n <= LITTLE);
            number(i.memory_base()).filter(|_| little)
        }
        _ => None,
    }
}

fn is_immediate(i: &Instruction) -> bool {
    matches!(i.op1_kind(), OpKind::Immediate8to64 | OpKind::Immediate32to64)
}

/// Whether the region that operation `at` finds its base register in is of use to others in its block.
pub fn is_of_use(at: usize, base: u8, ops: &[Op], instructions: &[Instruction]) -> bool {
    if base == guest::RSP {
        return true;
    }
    let behind = instructions.iter().zip(ops).skip(at);
    let mut known = Known::default();
    known.found(base, 0);
    behind.skip(1).any(|(i, op)| {
        let uses = known.region(op.base).is_some() && op.index == NO_REG && has_memory(i) && i.mnemonic() != M::Lea;
        known.follow(i, Kind::Move);
        uses
    })
}
