//! Frames that far transfers and events push.

use crate::core::Core;
use crate::op::{Flow, Stop};
use crate::word::Word;
use umbra_arch::paging::{Access, AccessKind};
use umbra_arch::segment::{Seg, Segment};
use umbra_arch::state::reg;
use umbra_arch::{Bus, Fault, Gva};

/// A stack under construction: pushed to before anything is committed.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// Stack pointer, full width.
    pub pointer: u64,
    /// Base of the stack segment.
    pub base: u64,
    /// Width of the stack pointer as a mask.
    pub mask: u64,
    /// Privilege level the pushes belong to.
    pub cpl: u8,
    /// The new stack segment, if its limit must be checked.
    pub limit: Option<Segment>,
}

impl Frame {
    /// The present stack.
    pub fn on_current_stack(c: &Core) -> Self {
        if c.s.is_64bit_code() {
            return Self { pointer: c.gpr[reg::RSP], base: 0, mask: c.stack_mask, cpl: c.s.cpl, limit: None };
        }
        Self::on_checked_stack(c)
    }

    /// The present stack outside 64-bit mode.
    #[inline(always)]
    pub fn on_checked_stack(c: &Core) -> Self {
        let ss = *c.s.segment(Seg::Ss);
        Self { pointer: c.gpr[reg::RSP], base: ss.base, mask: c.stack_mask, cpl: c.s.cpl, limit: Some(ss) }
    }

    /// Pushes the low `bytes` (2, 4, 8) of `value`.
    pub fn push(&mut self, c: &mut Core, bus: &mut dyn Bus, bytes: u64, value: u64) -> Flow {
        let at = self.pointer.wrapping_sub(bytes) & self.mask;
        if !self.allows(at, bytes) {
            return c.raise(Fault::SS0);
        }
        c.write_as(bus, self.linear(at), bytes, value, self.cpl)?;
        self.pointer = self.pointer & !self.mask | at;
        Ok(())
    }

    /// Whether `bytes` bytes at offset `at` are in the stack segment.
    #[inline(always)]
    fn allows(&self, at: u64, bytes: u64) -> bool {
        let Some(ss) = &self.limit else { return true };
        if ss.attr.is_expand_down() { at > u64::from(ss.limit) } else { at + bytes - 1 <= u64::from(ss.limit) }
    }

    #[inline(always)]
    fn linear(&self, at: u64) -> u64 {
        let lin = self.base.wrapping_add(at);
        if self.limit.is_some() { lin & 0xffff_ffff } else { lin }
    }

    /// Pushes `values`, the first one first, then an event's error code. The new stack pointer, within the stack's width.
    #[inline(always)]
    pub fn push_event<W: Word, const N: usize>(
        self,
        c: &mut Core,
        bus: &mut dyn Bus,
        values: [u64; N],
        code: Option<u32>,
    ) -> Result<u64, Stop> {
        match self.push_at_once::<W, N>(c, values, code) {
            Some(pointer) => Ok(pointer),
            None => self.push_each(c, bus, W::BYTES, &values, code),
        }
    }

    /// As [`push_event`](Self::push_event), if one lookup finds where all of it goes.
    #[inline(always)]
    pub fn push_at_once<W: Word, const N: usize>(&self, c: &Core, values: [u64; N], code: Option<u32>) -> Option<u64> {
        let below = if code.is_some() { W::BYTES } else { 0 };
        let (top, total) = (self.pointer & self.mask, W::BYTES * N as u64 + below);
        let at = top.wrapping_sub(total);
        if self.cpl == 3 || total > top || !self.allows(at, total) {
            return None;
        }
        let off = c.mmu.lookup_system_write(Gva::new(self.linear(at)), total)?;
        if let Some(code) = code {
            c.mem.store::<W>(off, W::of(code.into()));
        }
        let words: [W; N] = std::array::from_fn(|n| W::of(values[N - 1 - n]));
        c.mem.store_words(off.add(below), &words);
        Some(at)
    }

    /// As [`push_event`](Self::push_event), value by value.
    #[cold]
    #[inline(never)]
    pub fn push_each(
        mut self,
        c: &mut Core,
        bus: &mut dyn Bus,
        bytes: u64,
        values: &[u64],
        code: Option<u32>,
    ) -> Result<u64, Stop> {
        let mut all = values.iter().copied().chain(code.map(u64::from));
        all.try_for_each(|value| self.push(c, bus, bytes, value))?;
        Ok(self.pointer & self.mask)
    }

    /// Makes the pushes real: RSP (SP, ESP) gets the frame's pointer.
    pub fn commit_pointer(&self, c: &mut Core) {
        c.set_stack_pointer(self.pointer & self.mask);
    }
}

impl Core {
    /// A push by privilege level `cpl`: below 3 it is an implicit supervisor access.
    fn write_as(&mut self, bus: &mut dyn Bus, lin: u64, bytes: u64, value: u64, cpl: u8) -> Flow {
        if cpl == 3 {
            let access = Access::explicit(AccessKind::Write, 3);
            for at in [lin, lin.wrapping_add(bytes - 1)] {
                if self.s.efer.lma() && !Gva::new(at).is_canonical(self.s.linear_bits()) {
                    return self.raise(Fault::SS0);
                }
                // An absent page is loaded by the write itself.
                let probe = self.mmu.translate(Gva::new(at), access);
                self.check(probe)?;
            }
        } else if self.s.efer.lma() && !Gva::new(lin).is_canonical(self.s.linear_bits()) {
            return self.raise(Fault::SS0);
        }
        match bytes {
            2 => self.write_system::<u16>(bus, lin, value),
            4 => self.write_system::<u32>(bus, lin, value),
            _ => self.write_system::<u64>(bus, lin, value),
        }
    }
}
