//! Near branches.

use crate::emitter::{Alu, Mem, cc};
use crate::frame::{frame_field, gpr};
use crate::memory_path::{Access, Address};
use crate::plan::Kind;
use crate::registers::{A, B, GUEST_RSP, guest, home};
use crate::stubs::hash;
use crate::translate::Translator;
use iced_x86::{Instruction, OpKind};
use umbra_cpu::op::Op;

impl Translator<'_> {
    /// The block's last operation.
    pub fn branch(&mut self, i: &Instruction, op: &Op, kind: Kind) {
        let next = op.next_rip(self.block.rip);
        match kind {
            Kind::Jcc => self.jcc(i, op.imm, next),
            Kind::Call => {
                self.push_return(next);
                self.exit(op.imm);
            }
            Kind::CallIndirect => {
                self.indirect_target(i, op);
                self.find();
                // The push needs both scratch registers.
                self.e.load(B, code());
                self.e.store(frame_field!(scratch), B);
                self.push_return(next);
                self.e.jmp_mem(frame_field!(scratch));
            }
            Kind::JmpIndirect => {
                self.indirect_target(i, op);
                self.find();
                self.e.jmp_mem(code());
            }
            Kind::Ret => {
                let top = self.lookup(&Address::above(guest::RSP, 0), 8, Access::Read);
                self.e.load(A, top.mem);
                self.find();
                self.e.lea(GUEST_RSP, Mem::at(GUEST_RSP, 8 + (op.imm as usize & 0xffff)));
                self.e.jmp_mem(code());
            }
            _ => self.exit(op.imm),
        }
    }

    fn jcc(&mut self, i: &Instruction, target: u64, next: u64) {
        if !self.host_flags {
            self.e.restore_flags();
        }
        // iced-x86 numbers conditions as encodings do, from 1 on.
        let taken = self.e.jcc(i.condition_code() as u8 - 1);
        self.exit(next);
        self.e.bind(taken);
        self.exit(target);
    }

    /// The target RIP to [`A`].
    fn indirect_target(&mut self, i: &Instruction, op: &Op) {
        if i.op0_kind() == OpKind::Memory {
            let place = self.lookup(&Address::of(op), 8, Access::Read);
            self.e.load(A, place.mem);
        } else {
            match home(op.dst) {
                Some(r) => self.e.mov(A, r),
                None => self.e.load(A, gpr(op.dst)),
            }
        }
    }

    /// Finds the RIP in [`A`] in the jump table: its slot's address to [`B`]. Where it isn't found the operation's
    /// function checks the target, too.
    fn find(&mut self) {
        hash(&mut self.e);
        self.e.alu_mem(Alu::Cmp, true, A, Mem::at(B, 0));
        let other = self.e.jcc(cc::NOT_EQUAL);
        self.slow(other);
        self.e.load32(A, frame_field!(context));
        self.e.alu_mem(Alu::Cmp, true, A, Mem::at(B, 8));
        let stale = self.e.jcc(cc::NOT_EQUAL);
        self.slow(stale);
    }

    fn push_return(&mut self, rip: u64) {
        let top = self.lookup(&Address::above(guest::RSP, -8), 8, Access::Write);
        match i32::try_from(rip as i64) {
            Ok(small) => self.e.store_imm(top.mem, small),
            Err(_) => {
                self.e.mov_imm(top.free, rip);
                self.e.store(top.mem, top.free);
            }
        }
        self.e.lea(GUEST_RSP, Mem { base: Some(GUEST_RSP), index: None, disp: -8 });
    }
}

/// The code of the slot at [`B`].
fn code() -> Mem {
    Mem::at(B, 16)
}
