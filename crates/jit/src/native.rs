//! Data operations as host code: the guest's own instruction with registers renamed and its memory operand
//! replaced, or a short sequence where registers are implied or flags need care.

use crate::emitter::{Alu, cc};
use crate::frame::{frame_field, gpr};
use crate::memory_path::{Access, Address};
use crate::plan::{Kind, Step, has_memory, reads_flags, width};
use crate::registers::{A, B, FLAGS, GUEST_RAX, RDX, Reg, guest, home};
use crate::renaming::{Operands, Unencodable};
use crate::translate::Translator;
use iced_x86::{Instruction, Mnemonic as M, OpKind};
use umbra_cpu::op::Op;

impl Translator<'_> {
    /// An operation that isn't a branch. Its slow path is open.
    pub fn data(&mut self, i: &Instruction, op: &Op, step: Step) -> Result<(), Unencodable> {
        match step.kind {
            Kind::Move => {
                let renamed = self.in_core_or_renamed(i, op, reads_flags(i))?;
                self.put_high_byte(i, &renamed);
                Ok(())
            }
            Kind::Exchange => self.renamed(i, op, false).map(drop),
            Kind::Arithmetic => self.arithmetic(i, op, step),
            Kind::Silent => self.silent(i, op).map(drop),
            Kind::Shift(kind) => {
                if step.keeps {
                    self.keep(op.dst);
                }
                self.shift(i, op, kind, step.live)
            }
            Kind::Turn(turn) => self.turn(i, op, turn),
            Kind::Imul => self.imul(i, op, step),
            Kind::Bits(bits) => self.bits(i, op, bits, step.live),
            Kind::BitTest => self.bit_test(i, op, step.live),
            Kind::BitString => {
                self.bit_string(i, op, step.live);
                Ok(())
            }
            Kind::CompareExchange => {
                self.compare_exchange(i, op, step.live);
                Ok(())
            }
            Kind::CompareExchange16 => {
                self.compare_exchange_16(op, step.live);
                Ok(())
            }
            Kind::Multiply => self.multiply(i, op, step.live),
            Kind::Divide { signed } => self.divide(i, op, signed),
            Kind::Extend => {
                self.extend(i);
                Ok(())
            }
            Kind::Push => {
                self.push(i, op);
                Ok(())
            }
            Kind::Pop => {
                self.pop(op);
                Ok(())
            }
            Kind::Leave => {
                self.leave();
                Ok(())
            }
            Kind::Repeated(which) => {
                self.repeated(which);
                Ok(())
            }
            Kind::System(system) => {
                self.system(i, op, system);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The guest's flags are in the host's from here on.
    pub fn need_flags(&mut self) {
        if !self.host_flags {
            self.e.restore_flags();
            self.host_flags = true;
        }
    }

    /// As [`renamed`](Self::renamed) for one after which the host's flags say nothing.
    pub fn silent(&mut self, i: &Instruction, op: &Op) -> Result<Operands, Unencodable> {
        let renamed = self.renamed(i, op, false);
        self.host_flags = false;
        renamed
    }

    fn arithmetic(&mut self, i: &Instruction, op: &Op, step: Step) -> Result<(), Unencodable> {
        // INC and DEC need CF only to keep it.
        let needs = reads_flags(i) && (step.live || !matches!(i.mnemonic(), M::Inc | M::Dec));
        let renamed = self.in_core_or_renamed(i, op, needs)?;
        self.host_flags = step.live;
        if step.live && !step.unsaved {
            self.e.save_flags();
        }
        self.put_high_byte(i, &renamed);
        Ok(())
    }

    fn imul(&mut self, i: &Instruction, op: &Op, step: Step) -> Result<(), Unencodable> {
        let renamed = self.silent(i, op)?;
        if let (true, Some(result)) = (step.live, renamed.first()) {
            self.e.set_al(0);
            self.product_flags(result.host, width(i));
        }
        if step.keeps {
            self.e.rm(false, &[0x0f, 0x90], 0, frame_field!(kept)); // seto
        }
        Ok(())
    }

    /// CF and OF are in AL, the others follow from the low half.
    pub fn product_flags(&mut self, low: Reg, width: u32) {
        if width == 2 {
            self.e.raw(&[0x66]);
        }
        self.e.rr(width == 8, &[0x85], low, low); // test
        self.e.raw(&[0x9f, 0x08, 0xc4]); // lahf; or ah, al
    }

    /// The explicit operand of a one-operand instruction to a host register.
    fn operand(&mut self, i: &Instruction, op: &Op) -> Reg {
        if has_memory(i) {
            let width = width(i);
            let place = self.lookup(&Address::of(op), width, Access::Read);
            self.e.rm(width == 8, &[0x8b], A, place.mem);
            return A;
        }
        home(op.dst).unwrap_or_else(|| {
            self.e.load(A, gpr(op.dst));
            A
        })
    }

    fn multiply(&mut self, i: &Instruction, op: &Op, live: bool) -> Result<(), Unencodable> {
        let wide = width(i) == 8;
        let by = self.operand(i, op);
        self.host_flags = false;
        self.e.rr(wide, &[0x8b], FLAGS, GUEST_RAX);
        self.e.rr(wide, &[0xf7], if i.mnemonic() == M::Mul { 4 } else { 5 }, by);
        self.e.rr(wide, &[0x8b], GUEST_RAX, FLAGS);
        if live {
            self.e.set_al(0);
            self.product_flags(GUEST_RAX, width(i));
        }
        Ok(())
    }

    /// On the host only where it can't fault: a dividend whose upper half is less than the divisor, or if signed,
    /// one that fits into its lower half, by a positive divisor.
    fn divide(&mut self, i: &Instruction, op: &Op, signed: bool) -> Result<(), Unencodable> {
        let wide = width(i) == 8;
        let by = self.operand(i, op);
        self.host_flags = false;
        if signed {
            self.e.rr(wide, &[0x8b], B, GUEST_RAX);
            self.e.sar(wide, B, if wide { 63 } else { 31 });
            self.e.alu(Alu::Cmp, wide, B, RDX);
            let long = self.e.jcc(cc::NOT_EQUAL);
            self.slow(long);
            self.e.alu_imm(Alu::Cmp, wide, by, 0);
            let not_positive = self.e.jcc(cc::NOT_GREATER);
            self.slow(not_positive);
        } else {
            self.e.alu(Alu::Cmp, wide, RDX, by);
            let overflows = self.e.jcc(cc::NOT_BELOW);
            self.slow(overflows);
        }
        self.e.mov(B, FLAGS);
        self.e.rr(wide, &[0x8b], FLAGS, GUEST_RAX);
        self.e.rr(wide, &[0xf7], if signed { 7 } else { 6 }, by);
        self.e.rr(wide, &[0x8b], GUEST_RAX, FLAGS);
        self.e.mov(FLAGS, B);
        Ok(())
    }

    fn extend(&mut self, i: &Instruction) {
        match i.mnemonic() {
            M::Cdqe => self.e.rr(true, &[0x63], GUEST_RAX, GUEST_RAX),
            M::Cwde => self.e.rr(false, &[0x0f, 0xbf], GUEST_RAX, GUEST_RAX),
            other => {
                let wide = other == M::Cqo;
                self.e.rr(wide, &[0x8b], RDX, GUEST_RAX);
                self.e.sar(wide, RDX, if wide { 63 } else { 31 });
                self.host_flags = false;
            }
        }
    }

    fn push(&mut self, i: &Instruction, op: &Op) {
        if has_memory(i) {
            // The stack's place needs both scratch registers.
            let place = self.lookup(&Address::of(op), self.slot(), Access::Read);
            self.load_slot(A, place.mem);
            self.e.store(frame_field!(scratch), A);
        }
        let down = -(self.slot() as i32);
        let top = self.lookup(&Address::above(guest::RSP, down), self.slot(), Access::Write);
        if i.op0_kind() == OpKind::Register {
            let value = home(op.dst).unwrap_or_else(|| {
                self.e.load(top.free, gpr(op.dst));
                top.free
            });
            self.store_slot(top.mem, value);
        } else if has_memory(i) {
            self.e.load(top.free, frame_field!(scratch));
            self.store_slot(top.mem, top.free);
        } else if self.narrow {
            self.e.store_imm32(top.mem, op.imm as u32);
        } else {
            self.e.store_imm(top.mem, op.imm as i32);
        }
        self.move_stack(down);
    }

    fn pop(&mut self, op: &Op) {
        let top = self.lookup(&Address::above(guest::RSP, 0), self.slot(), Access::Read);
        // What POP RSP has loaded stays.
        let to = home(op.dst).filter(|_| op.dst != guest::RSP);
        self.load_slot(to.unwrap_or(A), top.mem);
        self.move_stack(self.slot() as i32);
        match home(op.dst) {
            _ if to.is_some() => {}
            Some(r) => self.e.mov(r, A),
            None => self.e.store(gpr(op.dst), A),
        }
    }

    fn leave(&mut self) {
        let saved = self.lookup(&Address::above(guest::RBP, 0), self.slot(), Access::Read);
        self.load_slot(A, saved.mem);
        // Guest RBP lives in the register of that name.
        self.set_stack_from(guest::RBP, self.slot() as i32);
        self.e.mov(guest::RBP, A);
    }
}

/// Whether the first operand is written.
pub fn writes_first(i: &Instruction) -> bool {
    !matches!(i.mnemonic(), M::Cmp | M::Test | M::Bt)
}
