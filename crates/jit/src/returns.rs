//! CALL and RET by the host's own, whose predictor knows where a RET goes.
//!
//! The host's stack holds a pair for each CALL that hasn't been returned from: the RIP behind it, and the address, by the
//! host's CALL, of code that goes on there. RET compares that RIP with the one that it finds in the guest's memory. If
//! they differ, or more are called than [`DEPTH`], the stack is emptied and the jump table is asked: so a pair is only ever
//! used in the context that it was made in, as leaving generated code and all that changes the context there empty
//! the stack, too.

use crate::emitter::{Alu, Emitter, Jump, Mem, cc};
use crate::frame::{code_base, frame_field};
use crate::jumps::Slot;
use crate::registers::{A, B, RSP, Reg};
use crate::stubs::{compare_slot, go, pop, push, take_base};
use crate::translate::Translator;
use std::mem::offset_of;

/// Pairs at most.
const DEPTH: i32 = 1024;
/// Size of a pair.
const PAIR: i32 = 16;

/// A RET to another place than that of the last pair.
pub struct Elsewhere {
    jump: Jump,
    /// What the operation takes from the stack.
    bytes: i32,
    /// Its slow path.
    slow: usize,
}

/// A CALL of too many.
pub struct TooDeep {
    jump: Jump,
    back: usize,
}

/// No CALL is to be returned from.
pub fn empty(e: &mut Emitter) {
    e.load(RSP, frame_field!(calls));
}

/// The bottom of the stack, a pair for RIP 0, which leads to what [`emit_absolute`] has written at offset `in_any_context`.
pub fn begin(e: &mut Emitter, in_any_context: usize) {
    e.raw(&[0x6a, 0]); // push 0
    let begun = e.call_ahead();
    e.jmp_to(in_any_context);
    e.bind(begun);
    e.store(frame_field!(calls), RSP);
    e.lea(B, Mem { base: Some(RSP), index: None, disp: -DEPTH * PAIR });
    e.store(frame_field!(deepest_call), B);
}

/// Jumped to with a RIP in [`A`], where what it means may have changed: empties the stack and goes to the stub at offset
/// `absolute`.
pub fn emit_absolute(e: &mut Emitter, absolute: usize) -> usize {
    let here = e.here();
    empty(e);
    e.jmp_to(absolute);
    here
}

/// Takes all of it from the host's stack.
pub fn end(e: &mut Emitter) {
    empty(e);
    e.alu_imm(Alu::Add, true, RSP, PAIR);
}

impl Translator<'_> {
    /// The first half of a pair, the RIP behind a CALL: the host's CALL follows.
    pub fn begin_pair(&mut self, rip: Reg) {
        self.e.alu_mem(Alu::Cmp, true, RSP, frame_field!(deepest_call));
        let jump = self.e.jcc(cc::BELOW);
        self.too_deep.push(TooDeep { jump, back: self.e.here() });
        push(&mut self.e, rip);
    }

    /// Behind the host's CALL: goes on behind the guest's, at `next`.
    pub fn return_here(&mut self, next: u64) {
        pop(&mut self.e, A);
        self.e.lea(A, Mem { base: Some(A), index: None, disp: -(next as i32) });
        self.e.store(code_base(), A);
        self.exit(next);
    }

    /// Calls the translation of the RIP in [`A`], whose slot is at [`B`], to go on at `next`.
    pub fn call_slot(&mut self, next: u64) {
        take_base(&mut self.e);
        self.e.call_mem(Mem::at(B, offset_of!(Slot, code)));
        self.return_here(next);
    }

    /// RET to the RIP in [`A`], taking so many `bytes` from the stack.
    pub fn ret(&mut self, bytes: i32) {
        self.e.alu_mem(Alu::Cmp, true, A, Mem::at(RSP, 8));
        let jump = self.e.jcc(cc::NOT_EQUAL);
        self.elsewhere.push(Elsewhere { jump, bytes, slow: self.slow_number() });
        self.move_stack(bytes);
        self.e.raw(&[0xc3]);
    }

    /// The code of what the host's stack doesn't know.
    pub fn emit_returns(&mut self) {
        for TooDeep { jump, back } in std::mem::take(&mut self.too_deep) {
            self.e.bind(jump);
            empty(&mut self.e);
            self.e.jmp_to(back);
        }
        for Elsewhere { jump, bytes, slow } in std::mem::take(&mut self.elsewhere) {
            self.e.bind(jump);
            empty(&mut self.e);
            let unknown = compare_slot(&mut self.e, self.half);
            let found = self.e.here();
            self.move_stack(bytes);
            go(&mut self.e);
            self.e.bind(unknown);
            self.e.call(self.stubs.find);
            let nothing = self.e.jcc(cc::NOT_EQUAL);
            self.slow_of(slow, nothing);
            self.e.jmp_to(found);
        }
    }
}
