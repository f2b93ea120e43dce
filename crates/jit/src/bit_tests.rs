//! BT, BTS, BTR and BTC: of all flags CF alone changes.

use crate::emitter::Alu;
use crate::memory_path::{Access, Address};
use crate::plan::width;
use crate::registers::{A, B, FLAGS, home};
use crate::renaming::Unencodable;
use crate::translate::Translator;
use iced_x86::{Instruction, Mnemonic as M, OpKind};
use umbra_cpu::decode::register_index;
use umbra_cpu::op::Op;

/// Whether it is a bit of a string in memory, by a register that lives in the host's.
pub fn is_in_string(i: &Instruction) -> bool {
    i.op1_kind() == OpKind::Register && width(i) >= 4 && home(register_index(i.op1_register())).is_some()
}

impl Translator<'_> {
    /// A bit of a register, or by a constant of a word in memory.
    pub fn bit_test(&mut self, i: &Instruction, op: &Op, live: bool) -> Result<(), Unencodable> {
        self.silent(i, op)?;
        if live {
            self.carry_alone();
        }
        Ok(())
    }

    /// A bit of a string in memory, any distance from its address.
    pub fn bit_string(&mut self, i: &Instruction, op: &Op, live: bool) {
        let Some(bit) = home(register_index(i.op1_register())) else { return };
        let (opcode, access) = match i.mnemonic() {
            M::Bt => (0xa3, Access::Read),
            M::Bts => (0xab, Access::Write),
            M::Btr => (0xb3, Access::Write),
            _ => (0xbb, Access::Write),
        };
        let (bytes, wide) = (width(i), width(i) == 8);
        self.host_flags = false;
        self.linear(&Address::of(op));
        // The word's distance in bytes.
        if wide {
            self.e.mov(B, bit);
        } else {
            self.e.rr(true, &[0x63], B, bit); // movsxd
        }
        self.e.sar(true, B, 3);
        self.e.alu_imm(Alu::And, true, B, -(bytes as i32));
        self.e.alu(Alu::Add, !self.narrow, A, B);
        self.find_linear(bytes, access);
        self.e.rm(wide, &[0x8b], A, Self::AT_B);
        self.e.rr(wide, &[0x0f, opcode], bit, A);
        if access == Access::Write {
            self.e.rm(wide, &[0x89], A, Self::AT_B);
        }
        if live {
            self.carry_alone();
        }
    }

    /// The host's CF to that in AH. Clobbers [`B`].
    fn carry_alone(&mut self) {
        self.e.rr(false, &[0x0f, 0x92], 0, B); // setc
        self.e.rr(false, &[0x0f, 0xb6], B, B); // movzx
        self.e.shl(false, B, 8);
        self.e.alu_imm(Alu::And, false, FLAGS, !0x100);
        self.e.alu(Alu::Or, false, FLAGS, B);
    }
}
