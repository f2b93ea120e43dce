//! Near branches.

use crate::emitter::{Jump, Mem, cc};
use crate::frame::{code_base, frame_field};
use crate::jumps::Slot;
use crate::memory_path::{Access, Address};
use crate::plan::Kind;
use crate::registers::{A, B, Reg, guest, home};
use crate::stubs::{compare_slot, go};
use crate::translate::Translator;
use iced_x86::{Instruction, OpKind};
use std::mem::offset_of;
use umbra_cpu::op::Op;

/// An indirect branch whose target the jump table doesn't know.
pub struct Search {
    unknown: Jump,
    /// Where the branch goes on with the RIP in [`A`] and the slot's address in [`B`].
    back: usize,
    /// The slow path that it belongs to.
    slow: usize,
}

impl Translator<'_> {
    /// The block's last operation.
    pub fn branch(&mut self, at: usize, i: &Instruction, op: &Op, kind: Kind) {
        let next = op.next_rip(self.block.rip);
        match kind {
            Kind::Jcc => self.jcc(i, op.imm, next),
            Kind::Call => {
                let rip = self.push_return(next);
                if self.predicts_returns {
                    self.begin_pair(rip);
                    self.call(op.imm, next);
                } else {
                    self.exit(op.imm);
                }
            }
            Kind::CallIndirect => {
                self.indirect_target(i, op);
                self.find();
                // The push needs both scratch registers.
                self.e.store(frame_field!(scratch), B);
                let rip = self.push_return(next);
                if self.predicts_returns {
                    self.begin_pair(rip);
                }
                self.e.load(B, frame_field!(scratch));
                self.e.load(A, Mem::at(B, offset_of!(Slot, rip)));
                if self.predicts_returns { self.call_slot(next) } else { go(&mut self.e) }
            }
            Kind::JmpIndirect => {
                self.indirect_target(i, op);
                self.find();
                go(&mut self.e);
            }
            Kind::Ret => {
                let top = self.lookup(&Address::above(guest::RSP, 0), self.slot(), Access::Read);
                self.load_slot(A, top.mem);
                let bytes = self.slot() as i32 + (op.imm as i32 & 0xffff);
                if self.predicts_returns {
                    self.ret(bytes);
                } else {
                    self.find();
                    self.move_stack(bytes);
                    go(&mut self.e);
                }
            }
            Kind::System(system) => self.system_call(system, self.site(at), next),
            _ => self.goes(op.imm),
        }
    }

    fn jcc(&mut self, i: &Instruction, target: u64, next: u64) {
        self.need_flags();
        // iced-x86 numbers conditions as encodings do, from 1 on.
        self.ends(i.condition_code() as u8 - 1, target, next);
    }

    /// The target RIP to [`A`].
    fn indirect_target(&mut self, i: &Instruction, op: &Op) {
        if i.op0_kind() == OpKind::Memory {
            let place = self.lookup(&Address::of(op), self.slot(), Access::Read);
            self.load_slot(A, place.mem);
        } else if self.narrow {
            self.e.mov32(A, home(op.dst).unwrap_or(A));
        } else {
            self.guest_register(A, op.dst);
        }
    }

    /// Finds the RIP in [`A`] in the jump table: its slot's address to [`B`]. Where it isn't found the operation's
    /// function checks the target, too.
    fn find(&mut self) {
        let unknown = compare_slot(&mut self.e, self.half);
        self.searches.push(Search { unknown, back: self.e.here(), slow: self.slow_number() });
    }

    /// The code for RIPs that the jump table doesn't know.
    pub fn emit_searches(&mut self) {
        for search in std::mem::take(&mut self.searches) {
            self.e.bind(search.unknown);
            self.e.call(self.stubs.find);
            let nothing = self.e.jcc(cc::NOT_EQUAL);
            self.slow_of(search.slow, nothing);
            self.e.jmp_to(search.back);
        }
    }

    /// A RIP of the block's to a register, from where it counts from.
    pub fn rip(&mut self, to: Reg, rip: u64) {
        self.e.load(to, code_base());
        self.e.rm(!self.narrow, &[0x8d], to, Mem { base: Some(to), index: None, disp: rip as i32 }); // lea
    }

    /// Pushes a RIP of the block's, which is in the register then.
    fn push_return(&mut self, rip: u64) -> Reg {
        let down = -(self.slot() as i32);
        let top = self.lookup(&Address::above(guest::RSP, down), self.slot(), Access::Write);
        self.rip(top.free, rip);
        self.store_slot(top.mem, top.free);
        self.move_stack(down);
        top.free
    }
}
