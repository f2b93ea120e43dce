//! Shifts and rotates of registers whose flags are looked at, where the count isn't known or is no matter of CF
//! and OF alone. OF follows the one-bit rule whatever the count, AF is cleared; a count of 0 changes no flags.

use crate::emitter::Alu;
use crate::emitter::cc;
use crate::frame::{frame_field, gpr};
use crate::plan::{has_memory, width};
use crate::registers::{B, FLAGS, home};
use crate::renaming::Unencodable;
use crate::translate::Translator;
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};
use umbra_cpu::op::Op;

/// What is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    Left,
    Right,
    Arithmetic,
    RotateLeft,
    RotateRight,
    /// SHLD or SHRD.
    Double,
}

impl Turn {
    /// What `i` is, if it is in a register and its count isn't known to be 0.
    pub fn of(i: &Instruction) -> Option<Self> {
        let last = i.op_count().checked_sub(1)?;
        let mask = if width(i) == 8 { 63 } else { 31 };
        // The count is looked at afterwards, too.
        let turns = match i.op_kind(last) {
            OpKind::Register => i.op0_register().full_register() != Register::RCX,
            _ => i.immediate(last) & mask != 0,
        };
        if has_memory(i) || !turns {
            return None;
        }
        let turn = match i.mnemonic() {
            M::Shl | M::Sal => Some(Self::Left),
            M::Shr => Some(Self::Right),
            M::Sar => Some(Self::Arithmetic),
            M::Rol => Some(Self::RotateLeft),
            M::Ror => Some(Self::RotateRight),
            M::Shld | M::Shrd => Some(Self::Double),
            _ => None,
        };
        // A shift of less may be by more than there is.
        turn.filter(|turn| turn.rotates() || width(i) >= 4)
    }

    fn rotates(self) -> bool {
        matches!(self, Self::RotateLeft | Self::RotateRight)
    }
}

impl Translator<'_> {
    /// One whose flags are looked at.
    pub fn turn(&mut self, i: &Instruction, op: &Op, turn: Turn) -> Result<(), Unencodable> {
        let by_cl = i.op_kind(i.op_count() - 1) == OpKind::Register;
        let top = width(i) * 8 - 1;
        if by_cl || turn.rotates() {
            self.e.store32(frame_field!(flags), FLAGS);
        }
        match turn {
            Turn::Right | Turn::Double => {
                match home(op.dst) {
                    Some(r) => self.e.rr(true, &[0x0f, 0xba], 4, r), // bt
                    None => self.e.rm(true, &[0x0f, 0xba], 4, gpr(op.dst)),
                }
                self.e.raw(&[top as u8]);
                self.e.set_al(cc::BELOW);
            }
            Turn::Arithmetic => self.e.raw(&[0xb0, 0]), // mov al, 0
            _ => {}
        }
        let renamed = self.silent(i, op)?;
        let Some(result) = renamed.first().map(|r| r.host) else { return Ok(()) };
        let bit = |t: &mut Self, n: u32| {
            t.e.rr(true, &[0x0f, 0xba], 4, result); // bt
            t.e.raw(&[n as u8]);
        };
        if turn.rotates() {
            self.e.raw(&[0x0f, 0x92, 0xc4]); // setc ah
            bit(self, if turn == Turn::RotateLeft { top } else { top - 1 });
            self.e.set_al(cc::BELOW);
            self.e.raw(&[0x30, 0xe0]); // xor al, ah
            self.e.load32(B, frame_field!(flags));
            self.e.alu_imm(Alu::And, false, B, 0xfe00);
            self.e.alu_imm(Alu::And, false, FLAGS, 0x0101);
            self.e.alu(Alu::Or, false, FLAGS, B);
        } else {
            self.e.raw(&[0x9f, 0x25, 0xff, 0xef, 0x00, 0x00]); // lahf; and eax, 0xefff
            match turn {
                // OF is SF xor CF: of these two bits of AH, an odd number.
                Turn::Left => {
                    self.e.raw(&[0xf6, 0xc4, 0x81]); // test ah, 0x81
                    self.e.set_al(cc::ODD);
                }
                // It is whether the sign has changed.
                Turn::Double => {
                    bit(self, top);
                    self.e.raw(&[0x14, 0, 0x24, 1]); // adc al, 0; and al, 1
                }
                _ => {}
            }
        }
        if by_cl {
            self.e.raw(&[0xf6, 0xc1, if width(i) == 8 { 63 } else { 31 }]); // test cl
            self.e.rm(false, &[0x0f, 0x40 | cc::EQUAL], FLAGS, frame_field!(flags)); // cmovz
        }
        Ok(())
    }
}
