//! Accesses of a block, or of those that a trace has in a row, that are checked together: those by the same base register, near
//! each other, with no operation's function between them. The first one's check covers all, so that the others can't miss or
//! fault.

use crate::memory_path::Access;
use crate::native::writes_first;
use crate::plan::{Kind, Step, has_memory, slot, width, written_registers};
use crate::ranges::MARGIN;
use crate::registers::guest;
use crate::traces::Each;
use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic as M, OpKind, Register};
use smallvec::SmallVec;
use umbra_arch::segment::Seg;
use umbra_cpu::op::{CODE_BASE, NO_REG, Op};

/// Registers that addresses are made with: the general ones and [`CODE_BASE`].
pub const BASES: usize = CODE_BASE as usize + 1;
/// Bytes from a group's first to its last.
const WIDEST: i32 = MARGIN as i32;

/// Bytes that an access concerns: from a register's value on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reach {
    pub base: u8,
    pub disp: i32,
    pub bytes: u32,
    pub access: Access,
}

impl Reach {
    /// Whether `other` is a part of it.
    pub fn covers(&self, other: &Self) -> bool {
        let ends = |reach: &Self| i64::from(reach.disp) + i64::from(reach.bytes);
        let within = self.base == other.base && self.disp <= other.disp && ends(other) <= ends(self);
        within && (self.access == Access::Write || other.access == Access::Read)
    }
}

/// How an access is checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Check {
    /// By itself.
    Own,
    /// With all accesses of the group of this number, which concern these bytes.
    First(u8, Reach),
    /// It is in the group of this number and not its first.
    Covered(u8, Reach),
}

/// Lookups of an operation at most.
const LOOKUPS: usize = 2;

/// The groups of a block.
#[derive(Clone, Default)]
pub struct Groups {
    /// By operation and lookup.
    checks: Vec<[Check; LOOKUPS]>,
    /// Operations, by bits, that lie between a group's first and last access: one whose function was called can't go
    /// on with the next one's code.
    inside: u64,
    /// Operations, by bits, all of whose lookups are covered.
    covered: u64,
}

impl Groups {
    /// How lookup number `nth` of operation `op` is checked.
    pub fn check(&self, op: usize, nth: usize) -> Check {
        self.checks.get(op).and_then(|checks| checks.get(nth)).copied().unwrap_or(Check::Own)
    }

    /// Whether what was checked before operation `op` is relied on behind it.
    pub fn are_open_behind(&self, op: usize) -> bool {
        self.inside >> op & 1 != 0
    }

    /// Those of operations `start` to `end`, as a block of their own.
    fn part(&self, start: usize, end: usize) -> Self {
        let of = |set: u64| set.checked_shr(start as u32).unwrap_or(0);
        Self { checks: self.checks[start..end].to_vec(), inside: of(self.inside), covered: of(self.covered) }
    }

    /// Whether `op` looks memory up, and all of it is covered.
    pub fn cover(&self, op: usize) -> bool {
        self.covered >> op & 1 != 0
    }
}

/// A group that can still grow. Positions count from the value that its base had at the first block's start.
#[derive(Clone, Copy)]
struct Open {
    number: u8,
    first: (usize, usize),
    /// What its base had been moved by at its first access.
    moved: i32,
    from: i32,
    to: i32,
    access: Access,
    /// A block has ended since: one behind it may not be come to, so that its writes aren't checked here.
    settled: bool,
    last: usize,
}

/// A block whose groups are planned.
#[derive(Clone, Copy)]
pub struct Member<'a> {
    pub instructions: &'a [Instruction],
    pub ops: &'a [Op],
    pub steps: &'a [Step],
    /// Bases, by bits, whose accesses are checked each by itself.
    pub alone: u32,
}

/// Something of each operation.
type OfOps<T> = SmallVec<[T; u64::BITS as usize]>;

/// Plans the groups of blocks of which each follows the one before, of 64 operations at most: those of each block. Their
/// numbers count from `next`.
pub fn groups(blocks: &[Member<'_>], next: &mut u8, info: &mut InstructionInfoFactory) -> Each<Groups> {
    let ops = blocks.iter().flat_map(|block| {
        let kinds = block.steps.iter().map(|step| step.kind);
        block.instructions.iter().zip(block.ops).zip(kinds).map(|((i, op), kind)| (i, op, kind))
    });
    let ops: OfOps<_> = ops.collect();
    debug_assert!(ops.len() <= u64::BITS as usize, "sets of operations are a number's bits");
    let ends = ends(blocks);
    let reaches: OfOps<_> = ops.iter().map(|&(i, op, kind)| reaches(i, op, kind)).collect();
    let mut used = [0u8; BASES];
    reaches.iter().flatten().flatten().flatten().for_each(|reach| used[reach.base as usize] += 1);
    if used.iter().all(|&uses| uses < 2) {
        return blocks.iter().map(|_| Groups::default()).collect();
    }
    let mut planner = Planner {
        groups: Groups { checks: vec![[Check::Own; LOOKUPS]; ops.len()], inside: 0, covered: 0 },
        open: [None; BASES],
        moved: [0; BASES],
        next: *next,
    };
    let mut members = blocks.iter().zip(&ends);
    let mut member = members.next();
    for (at, &(i, op, kind)) in ops.iter().enumerate() {
        let alone = member.map_or(0, |(block, _)| block.alone);
        for (nth, reach) in reaches[at].iter().enumerate() {
            if let Some(Some(reach)) = reach {
                planner.access(at, nth, *reach, alone);
            }
        }
        planner.pass(i, op, kind, info);
        if member.is_some_and(|(_, &end)| end == at + 1) {
            planner.settle();
            member = members.next();
        }
    }
    (0..BASES).for_each(|base| planner.close(base));
    *next = planner.next;
    let mut groups = planner.groups;
    for (at, reaches) in reaches.iter().enumerate() {
        let lookups = reaches.iter().flatten().count();
        let covered = groups.checks[at][..lookups].iter().all(|check| matches!(check, Check::Covered(..)));
        groups.covered |= u64::from(lookups > 0 && covered) << at;
    }
    let starts = std::iter::once(0).chain(ends.iter().copied());
    starts.zip(&ends).map(|(start, &end)| groups.part(start, end)).collect()
}

/// Where each block ends, as operations are counted through all of them.
fn ends(blocks: &[Member<'_>]) -> Each<usize> {
    let lengths = blocks.iter().map(|block| block.instructions.len());
    lengths
        .scan(0, |end, length| {
            *end += length;
            Some(*end)
        })
        .collect()
}

struct Planner {
    groups: Groups,
    open: [Option<Open>; BASES],
    /// What each register has been moved by since its last unknown value.
    moved: [i32; BASES],
    next: u8,
}

impl Planner {
    fn access(&mut self, at: usize, nth: usize, reach: Reach, alone: u32) {
        let base = reach.base as usize;
        if alone >> base & 1 != 0 {
            return self.close(base);
        }
        let from = reach.disp.saturating_add(self.moved[base]);
        let to = from.saturating_add(reach.bytes as i32);
        if let Some(open) = &mut self.open[base] {
            let (low, high) = (open.from.min(from), open.to.max(to));
            let allowed = !open.settled || open.access == Access::Write || reach.access == Access::Read;
            if allowed && high.saturating_sub(low) <= WIDEST {
                (open.from, open.to, open.last) = (low, high, at);
                if reach.access == Access::Write {
                    open.access = Access::Write;
                }
                self.groups.checks[at][nth] = Check::Covered(open.number, reach);
                return;
            }
            self.close(base);
        }
        let (number, moved) = (self.next, self.moved[base]);
        self.next += 1;
        self.open[base] =
            Some(Open { number, first: (at, nth), moved, from, to, access: reach.access, settled: false, last: at });
    }

    /// A block ends.
    fn settle(&mut self) {
        self.open.iter_mut().flatten().for_each(|open| open.settled = true);
    }

    fn close(&mut self, base: usize) {
        let Some(open) = self.open[base].take() else { return };
        let (at, nth) = open.first;
        let disp = open.from.saturating_sub(open.moved);
        if open.last > at || self.is_covered(at, 1 - nth, open.number) {
            let reach = Reach { base: base as u8, disp, bytes: (open.to - open.from) as u32, access: open.access };
            self.groups.checks[at][nth] = Check::First(open.number, reach);
            (at..open.last).for_each(|op| self.groups.inside |= 1 << op);
        }
    }

    fn is_covered(&self, at: usize, nth: usize, number: u8) -> bool {
        matches!(self.groups.checks[at][nth], Check::Covered(other, _) if other == number)
    }

    /// What an operation does to registers, and to what is known of memory.
    fn pass(&mut self, i: &Instruction, op: &Op, kind: Kind, info: &mut InstructionInfoFactory) {
        const RSP: usize = guest::RSP as usize;
        match kind {
            Kind::Helper | Kind::Repeated(_) => (0..BASES).for_each(|base| self.close(base)),
            Kind::System(system) if system.changes_view() => (0..BASES).for_each(|base| self.close(base)),
            Kind::Push => self.moved[RSP] = self.moved[RSP].saturating_sub(slot(op) as i32),
            Kind::Pop if op.dst != guest::RSP => {
                self.moved[RSP] = self.moved[RSP].saturating_add(slot(op) as i32);
                self.close(op.dst as usize);
            }
            _ => match moves_stack(i, op) {
                Some(by) => self.moved[RSP] = self.moved[RSP].saturating_add(by),
                None => self.close_written(i, info),
            },
        }
    }

    fn close_written(&mut self, i: &Instruction, info: &mut InstructionInfoFactory) {
        written_registers(i, info).for_each(|register| self.close(usize::from(register)));
    }
}

/// What ADD, SUB or LEA moves RSP by, all of it.
fn moves_stack(i: &Instruction, op: &Op) -> Option<i32> {
    let stack = if op.legacy { Register::ESP } else { Register::RSP };
    if i.op0_kind() != OpKind::Register || i.op0_register() != stack {
        return None;
    }
    let wide = matches!(i.op1_kind(), OpKind::Immediate8to64 | OpKind::Immediate32to64);
    let immediate = wide || op.legacy && matches!(i.op1_kind(), OpKind::Immediate8to32 | OpKind::Immediate32);
    match i.mnemonic() {
        M::Add if immediate => distance(i.immediate(1), op),
        M::Sub if immediate => distance(i.immediate(1), op)?.checked_neg(),
        M::Lea if i.memory_base() == stack && i.memory_index() == Register::None => {
            distance(i.memory_displacement64(), op)
        }
        _ => None,
    }
}

/// A number that is added to a register as wide as addresses are.
fn distance(value: u64, op: &Op) -> Option<i32> {
    if op.legacy { Some(value as i32) } else { i32::try_from(value as i64).ok() }
}

/// The lookups of an operation in their order, and what they concern if a group is any good for them.
fn reaches(i: &Instruction, op: &Op, kind: Kind) -> [Option<Option<Reach>>; LOOKUPS] {
    let (bytes, down) = (slot(op), -(slot(op) as i32));
    let stack = |disp, access| Some(Some(Reach { base: guest::RSP, disp, bytes, access }));
    let operand = |bytes, access| Some(operand(op, bytes, access));
    match kind {
        Kind::Helper | Kind::Nop | Kind::Jcc | Kind::Jmp | Kind::System(_) | Kind::Repeated(_) => [None; LOOKUPS],
        Kind::JmpIndirect if has_memory(i) => [operand(bytes, Access::Read), None],
        Kind::Push if has_memory(i) => [operand(bytes, Access::Read), stack(down, Access::Write)],
        Kind::CallIndirect if has_memory(i) => [operand(bytes, Access::Read), stack(down, Access::Write)],
        Kind::Push | Kind::Call | Kind::CallIndirect => [stack(down, Access::Write), None],
        Kind::Pop | Kind::Ret => [stack(0, Access::Read), None],
        Kind::Leave => [Some(Some(Reach { base: guest::RBP, disp: 0, bytes, access: Access::Read })), None],
        // It may be anywhere.
        Kind::BitString => [None; LOOKUPS],
        Kind::CompareExchange | Kind::CompareExchange16 => [operand(width(i), Access::Write), None],
        _ if !has_memory(i) || i.mnemonic() == M::Lea => [None; LOOKUPS],
        _ => {
            let writes = i.op0_kind() == OpKind::Memory && writes_first(i);
            let access = if writes { Access::Write } else { Access::Read };
            [operand(i.memory_size().size() as u32, access), None]
        }
    }
}

fn operand(op: &Op, bytes: u32, access: Access) -> Option<Reach> {
    let plain = op.index == NO_REG && op.base != NO_REG && op.seg != Seg::Fs as u8 && op.seg != Seg::Gs as u8;
    let disp = distance(op.disp, op)?;
    (plain && bytes as i32 <= WIDEST).then_some(Reach { base: op.base, disp, bytes, access })
}
