//! Shifts by a constant.

use crate::emitter::cc;
use crate::frame::{frame_field, gpr};
use crate::memory_path::{Access, Address};
use crate::plan::{ShiftKind, has_memory, width};
use crate::registers::{A, Reg, home};
use crate::renaming::{Unencodable, host_operand};
use crate::translate::Translator;
use iced_x86::Instruction;
use umbra_cpu::op::Op;

impl Translator<'_> {
    /// OF follows the one-bit rule whatever the count, AF is cleared.
    pub fn shift(&mut self, i: &Instruction, op: &Op, kind: ShiftKind, live: bool) -> Result<(), Unencodable> {
        if live && kind == ShiftKind::Right && has_memory(i) {
            return self.shift_memory_right(i, op);
        }
        let renamed = self.silent(i, op)?;
        if live {
            let result = renamed.first().map_or(A, |result| result.host);
            self.shift_flags(kind, width(i), shift_count(i), result);
        }
        Ok(())
    }

    /// Saves the flags that a shift has left, `result` being what was shifted.
    pub fn shift_flags(&mut self, kind: ShiftKind, width: u32, count: u8, result: Reg) {
        self.e.save_flags_without_af_and_of();
        match kind {
            ShiftKind::Left => {
                // OF is SF xor CF: of these two bits of AH, an odd number.
                self.e.raw(&[0xf6, 0xc4, 0x81]);
                self.e.set_al(cc::ODD);
            }
            // The operand's sign bit, where it is now.
            ShiftKind::Right => self.overflow_is_bit(result, width as u8 * 8 - 1 - count),
            ShiftKind::Arithmetic => {}
        }
    }

    /// OF to AL from a bit of a register.
    fn overflow_is_bit(&mut self, register: Reg, bit: u8) {
        self.e.rr(true, &[0x0f, 0xba], 4, register); // bt
        self.e.raw(&[bit]);
        self.e.set_al(cc::BELOW);
    }

    /// SHR of memory by a constant, the flags being looked at: OF is the operand's sign bit.
    fn shift_memory_right(&mut self, i: &Instruction, op: &Op) -> Result<(), Unencodable> {
        let width = width(i);
        let place = self.lookup(&Address::of(op), width, Access::Write);
        match width {
            1 => self.e.rm(false, &[0x0f, 0xb6], place.free, place.mem),
            2 => self.e.rm(false, &[0x0f, 0xb7], place.free, place.mem),
            _ => self.e.rm(width == 8, &[0x8b], place.free, place.mem),
        }
        let mut host = *i;
        host_operand(&mut host, &place);
        self.e.instruction(&host)?;
        self.host_flags = false;
        self.e.save_flags_without_af_and_of();
        self.overflow_is_bit(place.free, width as u8 * 8 - 1);
        Ok(())
    }

    /// What an operation on a guest register begins with stays in the frame.
    pub fn keep(&mut self, guest: u8) {
        let register = home(guest).unwrap_or_else(|| {
            self.e.load(A, gpr(guest));
            A
        });
        self.e.store(frame_field!(kept), register);
    }
}

/// The count of a shift by a constant.
pub fn shift_count(i: &Instruction) -> u8 {
    i.immediate8() & if width(i) == 8 { 63 } else { 31 }
}
