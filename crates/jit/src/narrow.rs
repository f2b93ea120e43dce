//! What has 32 bits in 32-bit code: addresses, the stack pointer, what is pushed.

use crate::emitter::{Alu, Mem, cc};
use crate::frame::{seg_base, seg_checked};
use crate::memory_path::Address;
use crate::registers::{A, GUEST_RSP, Reg, home};
use crate::translate::Translator;

impl Translator<'_> {
    /// Bytes of what CALL pushes.
    pub fn slot(&self) -> u32 {
        if self.narrow { 4 } else { 8 }
    }

    /// A value as wide as the stack's from memory.
    pub fn load_slot(&mut self, to: Reg, mem: Mem) {
        self.e.rm(!self.narrow, &[0x8b], to, mem);
    }

    /// Likewise to memory.
    pub fn store_slot(&mut self, mem: Mem, from: Reg) {
        self.e.rm(!self.narrow, &[0x89], from, mem);
    }

    /// RSP becomes what is at a distance from `register`. Leaves flags alone.
    pub fn set_stack_from(&mut self, register: Reg, by: i32) {
        self.e.rm(!self.narrow, &[0x8d], GUEST_RSP, Mem { base: Some(register), index: None, disp: by }); // lea
    }

    /// Moves RSP.
    pub fn move_stack(&mut self, by: i32) {
        self.set_stack_from(GUEST_RSP, by);
    }

    /// The operation's function does it all if an access by the address' segment may be refused.
    pub fn unchecked_segment(&mut self, address: &Address) {
        if let Some(seg) = address.seg {
            self.e.rm(false, &[0xf6], 0, seg_checked()); // test byte
            self.e.raw(&[1 << seg]);
            let checked = self.e.jcc(cc::NOT_EQUAL);
            self.slow(checked);
        }
    }

    /// As [`linear`](Self::linear) where all of it has 32 bits, and no segment is looked at: all registers are resident.
    pub fn narrow_linear(&mut self, address: &Address) {
        let base = address.base.and_then(home);
        let index = address.index.and_then(|(n, scale)| Some((home(n)?, scale)));
        match (base, index, address.disp as i32) {
            (None, None, disp) => self.e.mov_imm32(A, disp as u32),
            (Some(base), None, 0) => self.e.mov32(A, base),
            (base, index, disp) => self.e.lea32(A, Mem { base, index, disp }),
        }
        if let Some(seg) = address.seg {
            self.e.alu_mem(Alu::Add, false, A, seg_base(seg));
        }
    }
}
