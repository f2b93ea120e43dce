//! CMPXCHG and CMPXCHG16B to memory: nobody else's store can come between.

use crate::emitter::{Alu, Mem, cc};
use crate::frame::gpr;
use crate::memory_path::{Access, Address};
use crate::plan::width;
use crate::registers::{FLAGS, GUEST_RAX, RBX, RCX, RDX, home};
use crate::translate::Translator;
use iced_x86::Instruction;
use umbra_cpu::op::Op;

/// ZF in the register of flags.
const ZF: i32 = 0x4000;

impl Translator<'_> {
    /// CMPXCHG of 4 or 8 bytes.
    pub fn compare_exchange(&mut self, i: &Instruction, op: &Op, live: bool) {
        let wide = width(i) == 8;
        let place = self.lookup(&Address::of(op), width(i), Access::Write);
        self.e.rm(wide, &[0x8b], place.free, place.mem);
        self.e.alu(Alu::Cmp, wide, GUEST_RAX, place.free);
        self.host_flags = live;
        if live {
            self.e.save_flags();
        }
        let different = self.e.jcc(cc::NOT_EQUAL);
        let new = home(op.src).unwrap_or_else(|| {
            self.e.load(place.free, gpr(op.src));
            place.free
        });
        self.e.rm(wide, &[0x89], new, place.mem);
        let done = self.e.jmp();
        self.e.bind(different);
        self.e.rr(wide, &[0x8b], GUEST_RAX, place.free);
        self.e.bind(done);
    }

    /// CMPXCHG16B: of all flags ZF alone changes.
    pub fn compare_exchange_16(&mut self, op: &Op, live: bool) {
        let place = self.lookup(&Address::of(op), 16, Access::Write);
        let at = place.free;
        self.e.lea(at, place.mem);
        self.e.rr(false, &[0xf6], 0, at); // test
        self.e.raw(&[15]);
        let unaligned = self.e.jcc(cc::NOT_EQUAL);
        self.slow(unaligned);
        let halves = [(GUEST_RAX, RBX, Mem::at(at, 0)), (RDX, RCX, Mem::at(at, 8))];
        let different = halves.map(|(old, _, half)| {
            self.e.alu_mem(Alu::Cmp, true, old, half);
            self.e.jcc(cc::NOT_EQUAL)
        });
        halves.iter().for_each(|&(_, new, half)| self.e.store(half, new));
        if live {
            self.e.alu_imm(Alu::Or, false, FLAGS, ZF);
        }
        let done = self.e.jmp();
        different.into_iter().for_each(|jump| self.e.bind(jump));
        halves.iter().for_each(|&(old, _, half)| self.e.load(old, half));
        if live {
            self.e.alu_imm(Alu::And, false, FLAGS, !ZF);
        }
        self.e.bind(done);
        self.host_flags = false;
    }
}
