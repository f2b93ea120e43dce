//! Guest addresses to host addresses: one lookup in the MMU's fast table.

use crate::emitter::{Alu, Mem, cc};
use crate::frame::{frame_field, gpr, seg_base};
use crate::registers::{A, B, Reg, home};
use crate::translate::Translator;
use std::mem::offset_of;
use umbra_arch::segment::Seg;
use umbra_cpu::op::{NO_REG, Op};
use umbra_mmu::Entry;

/// A linear address: base register, index register and its shift count, displacement, segment.
#[derive(Clone, Copy)]
pub struct Address {
    base: Option<u8>,
    index: Option<(u8, u8)>,
    disp: u64,
    seg: Option<u8>,
}

/// Where an access goes on the host, and which scratch register isn't part of that.
#[derive(Clone, Copy)]
pub struct Place {
    pub mem: Mem,
    pub free: Reg,
}

impl Place {
    /// The address is in [`A`].
    pub const SCRATCH: Place = Place { mem: Mem { base: Some(A), index: None, disp: 0 }, free: B };
}

/// What an access does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Read,
    /// Writes, and perhaps reads before.
    Write,
}

impl Address {
    /// The memory operand of `op`.
    pub fn of(op: &Op) -> Self {
        let has_base = op.seg == Seg::Fs as u8 || op.seg == Seg::Gs as u8;
        Self {
            base: (op.base != NO_REG).then_some(op.base),
            index: (op.index != NO_REG).then_some((op.index, op.scale)),
            disp: op.disp,
            seg: has_base.then_some(op.seg),
        }
    }

    /// Without its segment's base: the effective address.
    pub fn effective(self) -> Self {
        Self { seg: None, ..self }
    }

    /// `disp` bytes above a guest register, in the stack segment.
    pub fn above(register: u8, disp: i32) -> Self {
        Self { base: Some(register), index: None, disp: disp as i64 as u64, seg: None }
    }
}

impl Translator<'_> {
    /// Finds the `bytes` bytes at `address` on the host; the operation's function does it all if they aren't in one
    /// page of the table. Clobbers [`A`], [`B`] and the host's flags.
    pub fn lookup(&mut self, address: &Address, bytes: u32, access: Access) -> Place {
        self.host_flags = false;
        self.linear(address);
        let e = &mut self.e;
        e.mov(B, A);
        e.shr(true, B, 12 - size_of::<Entry>().trailing_zeros() as u8);
        e.alu_mem(Alu::And, true, B, frame_field!(mask));
        e.alu_mem(Alu::Add, true, B, frame_field!(slots));
        if bytes > 1 {
            e.lea(A, Mem::at(A, bytes as usize - 1));
        }
        e.alu_imm(Alu::And, true, A, -4096);
        e.alu_mem(Alu::Or, true, A, frame_field!(generation));
        let tag = match access {
            Access::Read => offset_of!(Entry, tag_read),
            Access::Write => offset_of!(Entry, tag_write),
        };
        e.alu_mem(Alu::Cmp, true, A, Mem::at(B, tag));
        let miss = e.jcc(cc::NOT_EQUAL);
        self.slow(miss);
        self.host_place(address)
    }

    /// Linear address to [`A`]; clobbers [`B`] only if the index register is in memory.
    pub fn linear(&mut self, address: &Address) {
        let e = &mut self.e;
        if address.base.is_none() && address.index.is_none() {
            e.mov_imm(A, address.disp);
        } else {
            let mut resident = |n: u8, scratch: Reg| {
                home(n).unwrap_or_else(|| {
                    e.load(scratch, gpr(n));
                    scratch
                })
            };
            let base = address.base.map(|n| resident(n, A));
            let index = address.index.map(|(n, scale)| (resident(n, B), scale));
            e.lea(A, Mem { base, index, disp: address.disp as i32 });
        }
        if let Some(seg) = address.seg {
            e.alu_mem(Alu::Add, true, A, seg_base(seg));
        }
    }

    /// With the slot's address in [`B`]: where the access goes.
    fn host_place(&mut self, address: &Address) -> Place {
        let addend = Mem::at(B, offset_of!(Entry, addend));
        if let Address { base: Some(base), index: None, seg: None, disp } = *address
            && let Some(base) = home(base)
        {
            self.e.load(B, addend);
            self.e.alu_mem(Alu::Add, true, B, frame_field!(ram));
            let mem = Mem { base: Some(base), index: Some((B, 0)), disp: disp as i32 };
            return Place { mem, free: A };
        }
        if let Some((index, scale)) = address.index.filter(|&(n, _)| home(n).is_none()) {
            let e = &mut self.e;
            e.load(A, addend);
            e.load(B, gpr(index));
            e.lea(A, Mem { base: Some(A), index: Some((B, scale)), disp: address.disp as i32 });
            match address.base.map(|n| (n, home(n))) {
                Some((_, Some(r))) => e.alu(Alu::Add, true, A, r),
                Some((n, None)) => e.alu_mem(Alu::Add, true, A, gpr(n)),
                None => {}
            }
            if let Some(seg) = address.seg {
                e.alu_mem(Alu::Add, true, A, seg_base(seg));
            }
        } else {
            self.linear(address);
            self.e.alu_mem(Alu::Add, true, A, addend);
        }
        self.e.alu_mem(Alu::Add, true, A, frame_field!(ram));
        Place::SCRATCH
    }
}
