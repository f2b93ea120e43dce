//! Blocks that are translated together: behind a direct branch comes the block that it mostly goes to. What the
//! flags were then often needn't be saved: the blocks behind replace them.
//!
//! The first one's head charges the cost of all, but for a loop's two.

use crate::groups::groups;
use crate::mechanisms::{Mechanism, Mechanisms};
use crate::plan::Kind;
use crate::recipes;
use crate::translate::{End, Part};
use iced_x86::InstructionInfoFactory;
use smallvec::{SmallVec, smallvec};
use umbra_cpu::block::{Block, BlockCache};
use umbra_memory::{GuestMemory, RamOffset};

/// Blocks of a trace at most.
const LONGEST: usize = 4;
/// Operations of a trace at most.
const MOST_OPS: usize = 40;

/// Something of each block of a trace.
pub type Each<T> = SmallVec<[T; LONGEST]>;

/// The blocks that a trace from block `first` on has; a loop has its only block twice. `goes` says whether a block mostly goes
/// to its branch's target, if that is known.
pub fn trace(first: u32, blocks: &BlockCache, mem: &GuestMemory, goes: impl Fn(u32) -> Option<bool>) -> Each<u32> {
    let mut trace = smallvec![first];
    let (mut last, mut ops) = (first, blocks.block(first).ops.len());
    while trace.len() < LONGEST {
        let block = blocks.block(last);
        let Some(branch) = branch(block, mem) else { break };
        if branch.condition && branch.target == block.rip && trace.len() == 1 && 2 * ops <= MOST_OPS {
            return smallvec![first, first];
        }
        // Behind a loop comes what is seldom executed.
        let goes = !branch.condition || goes(last).unwrap_or(branch.target <= block.rip);
        let Some(next) = blocks.in_page(last, if goes { branch.target } else { block.end_rip }) else { break };
        ops += blocks.block(next).ops.len();
        if ops > MOST_OPS || trace.contains(&next) {
            break;
        }
        trace.push(next);
        last = next;
    }
    trace
}

/// A direct jump at a block's end.
struct Branch {
    target: u64,
    /// It is a Jcc.
    condition: bool,
}

fn branch(block: &Block, mem: &GuestMemory) -> Option<Branch> {
    let op = block.ops.last().filter(|_| block.is_relative() && !block.crosses())?;
    let mut bytes = [0; 2];
    let len = usize::from(op.len).min(bytes.len());
    mem.load_bytes(RamOffset::new(block.offset() + u64::from(op.start)), &mut bytes[..len]);
    let short = op.len == 2 && bytes[0] & 0xf0 == 0x70;
    let near = op.len == 6 && bytes[0] == 0x0f && bytes[1] & 0xf0 == 0x80;
    let always = (op.len, bytes[0]) == (2, 0xeb) || (op.len, bytes[0]) == (5, 0xe9);
    (short || near || always).then_some(Branch { target: op.imm, condition: !always })
}

/// Lets each part go on with the next one, as far as that is possible without the mechanisms that are `off`.
pub fn join(parts: &mut Each<Part<'_>>, off: Mechanisms, info: &mut InstructionInfoFactory) {
    let branches = |part: &Part<'_>| part.steps.last().is_some_and(|step| matches!(step.kind, Kind::Jcc | Kind::Jmp));
    let joined = parts.iter().take_while(|part| branches(part)).count() + 1;
    parts.truncate(joined);
    let loops = parts.len() == 2 && parts[0].block().rip == parts[1].block().rip;
    if loops && !branches(&parts[1]) {
        parts.truncate(1);
    }
    for at in 1..parts.len() {
        let falls = !loops && parts[at].block().rip == parts[at - 1].block().end_rip && parts[at - 1].may_fall();
        parts[at - 1].end = if falls { End::Falls } else { End::Enters };
    }
    if !loops && !off.has(Mechanism::Budgets) {
        charge(parts);
    }
    plan_groups(parts, loops, off, info);
    if !off.has(Mechanism::Flags) {
        recipes::plan(parts, info);
    }
    if let [first, second] = &mut parts[..]
        && loops
    {
        match (second.recipe, second.steps.len().checked_sub(2)) {
            (Some(_), Some(last)) => {
                second.steps[last].unsaved = true;
                second.end = End::Loops;
            }
            // Without that the loop is as good alone.
            _ => {
                first.end = End::Exits;
                parts.truncate(1);
            }
        }
    }
}

/// Has the first part's head charge the cost of all.
fn charge(parts: &mut [Part<'_>]) {
    let mut ahead = 0;
    for part in parts.iter_mut().rev() {
        part.ahead = ahead;
        ahead += std::mem::take(&mut part.charge);
    }
    parts[0].charge = ahead;
}

/// Plans which accesses are checked together: through all parts unless the last one is come to from itself, too.
fn plan_groups(parts: &mut [Part<'_>], loops: bool, off: Mechanisms, info: &mut InstructionInfoFactory) {
    if off.has(Mechanism::Groups) {
        return;
    }
    let mut next = 0;
    let together = if loops { 1 } else { parts.len() };
    for parts in parts.chunks_mut(together) {
        let groups = {
            let members: Each<_> = parts.iter().map(Part::member).collect();
            groups(&members, &mut next, info)
        };
        parts.iter_mut().zip(groups).for_each(|(part, groups)| part.take_groups(groups, off));
    }
}
