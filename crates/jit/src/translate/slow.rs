//! Operations whose host code can't do it, done by their functions.

use super::Translator;
use crate::emitter::{Jump, cc};
use crate::recipes::Recipe;
use crate::registers::A;
use smallvec::SmallVec;

/// Operations of a block done by their functions after all, once or in part.
#[derive(Default)]
pub(super) struct Slow {
    pub op: usize,
    /// How the flags are found that aren't saved.
    pub recipe: Option<Recipe>,
    /// It works on the x87 state, which what follows wants in the host's registers.
    pub x87: bool,
    /// It ends its block and may forbid the x87 unit.
    pub forbids_x87: bool,
    pub jumps: SmallVec<[Jump; 2]>,
    /// Its host code may fault.
    pub faults: bool,
    /// Taken where all behind it must be done by functions, too, and the engine be told.
    pub tails: SmallVec<[Jump; 1]>,
    /// Where the block goes on; a branch's successor otherwise.
    pub back: Option<usize>,
    /// The host's flags are relied on there.
    pub flags: bool,
    /// Units whose registers what follows wants in the host's.
    pub vectors: u8,
    /// The last x87 operation before, whose pointers aren't in the core.
    pub pointers: Option<usize>,
}

impl Translator<'_> {
    /// `jump` is taken where the running operation must be done by its function, from its start.
    pub fn slow(&mut self, jump: Jump) {
        debug_assert!(self.has_slow, "an operation that can't give up does");
        if let Some(slow) = self.slow.last_mut() {
            slow.jumps.push(jump);
        }
    }

    /// The operation that a slow path belongs to.
    pub fn op_of(&self, slow: usize) -> usize {
        self.slow[slow].op
    }

    /// The running operation's slow path.
    pub fn slow_number(&self) -> usize {
        debug_assert!(self.has_slow, "an operation that can't give up does");
        self.slow.len() - 1
    }

    /// `jump` is taken where the operation of that slow path must be done by its function.
    pub fn slow_of(&mut self, number: usize, jump: Jump) {
        self.slow[number].jumps.push(jump);
    }

    /// As [`slow_of`](Self::slow_of) for all operations from there on.
    pub fn slow_tail(&mut self, number: usize, jump: Jump) {
        self.slow[number].tails.push(jump);
    }

    /// The guest's state as it is before the operation, as far as it isn't kept.
    fn recover(&mut self, slow: &Slow) {
        if let Some(recipe) = &slow.recipe {
            self.recover_flags(recipe);
        }
        if let Some(op) = slow.pointers {
            self.emit_pointers(op);
        }
    }

    /// The base register of an operation isn't in the region that it was looked for in, which others behind it take for
    /// granted.
    fn emit_tail(&mut self, slow: &Slow) {
        slow.tails.iter().for_each(|&jump| self.e.bind(jump));
        self.recover(slow);
        self.e.call(self.stubs.x87_store);
        self.call_at(slow.op, self.stubs.other_base);
    }

    pub(super) fn emit_slow(&mut self) {
        let mut all = std::mem::take(&mut self.slow);
        for slow in all.drain(..) {
            if !slow.tails.is_empty() {
                self.emit_tail(&slow);
            }
            self.slow_paths.push(self.e.here());
            if slow.jumps.is_empty() && !slow.faults {
                continue;
            }
            slow.jumps.iter().for_each(|&jump| self.e.bind(jump));
            self.recover(&slow);
            if slow.x87 || slow.forbids_x87 {
                self.e.call(self.stubs.x87_store);
            }
            if self.groups.are_open_behind(slow.op) {
                self.e.call(self.stubs.x87_store);
                self.call_at(slow.op, self.stubs.rest);
                continue;
            }
            self.helper(slow.op);
            if slow.x87 {
                self.e.call(self.stubs.x87_load);
                let unusable = self.e.jcc(cc::NOT_EQUAL);
                self.by_function(slow.op + 1, unusable);
            }
            if slow.vectors != 0 {
                self.load_vectors(slow.vectors, slow.op + 1);
            }
            if slow.flags {
                self.e.restore_flags();
            }
            self.e.jmp_to(slow.back.unwrap_or(self.stubs.dispatch));
        }
        self.slow = all;
    }

    /// `jump` is taken where operation `op` and those behind it must be done by their functions.
    pub fn by_function(&mut self, op: usize, jump: Jump) {
        self.by_function.push((op, jump));
    }

    pub(super) fn emit_by_function(&mut self) {
        let jumps = std::mem::take(&mut self.by_function);
        let Some(first) = jumps.iter().map(|&(op, _)| op).min() else { return };
        for op in first..=self.block.ops.len() {
            let here = || jumps.iter().filter(|&&(to, _)| to == op).map(|&(_, jump)| jump);
            here().for_each(|jump| self.e.bind(jump));
            match here().next() {
                None => {}
                Some(_) if op < self.block.ops.len() => {
                    self.e.call(self.stubs.x87_store);
                    self.call_at(op, self.stubs.tail);
                }
                Some(_) => self.e.jmp_to(self.stubs.dispatch),
            }
        }
    }

    /// Has a stub do operation `op` and those behind it by their functions and go on with another block.
    fn call_at(&mut self, op: usize, stub: usize) {
        self.give_back();
        self.e.mov_imm(A, self.site(op).into());
        self.e.call(stub);
    }
}
