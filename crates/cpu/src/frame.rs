//! Frames that far transfers and events push.

use crate::core::Core;
use crate::op::{Flow, Stop};
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
        let ss = *c.s.segment(Seg::Ss);
        let long = c.s.is_64bit_code();
        Self {
            pointer: c.gpr[reg::RSP],
            base: if long { 0 } else { ss.base },
            mask: c.stack_mask,
            cpl: c.s.cpl,
            limit: (!long).then_some(ss),
        }
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

    /// Pushes `values`, the first one first. Where all of them lie in one page they are found by one lookup.
    pub fn push_all(&mut self, c: &mut Core, bus: &mut dyn Bus, bytes: u64, values: &[u64]) -> Flow {
        let (top, total) = (self.pointer & self.mask, bytes * values.len() as u64);
        let at = top.wrapping_sub(total);
        if self.cpl < 3
            && total <= top
            && self.allows(at, total)
            && let Some(off) = c.mmu.lookup_system_write(Gva::new(self.linear(at)), total)
        {
            for (n, &value) in values.iter().rev().enumerate() {
                let off = off.add(bytes * n as u64);
                match bytes {
                    2 => c.mem.store::<u16>(off, value as u16),
                    4 => c.mem.store::<u32>(off, value as u32),
                    _ => c.mem.store::<u64>(off, value),
                }
            }
            self.pointer = self.pointer & !self.mask | at;
            return Ok(());
        }
        values.iter().try_for_each(|&value| self.push(c, bus, bytes, value))
    }

    /// Makes the pushes real: RSP (SP, ESP) gets the frame's pointer.
    pub fn commit_pointer(&self, c: &mut Core) {
        c.set_stack_pointer(self.pointer & self.mask);
    }
}

impl Core {
    /// Pushes `values`, the first one first, and an error code as an event in IA-32e mode does; `pointer` is aligned. The
    /// new stack pointer. A frame that lies in one page is found by one lookup.
    #[inline(always)]
    pub(crate) fn push_long_frame(
        &mut self,
        bus: &mut dyn Bus,
        pointer: u64,
        cpl: u8,
        values: &[u64; 5],
        code: Option<u32>,
    ) -> Result<u64, Stop> {
        let below = if code.is_some() { 8 } else { 0 };
        let bottom = pointer.wrapping_sub(40 + below);
        if cpl < 3
            && let Some(off) = self.mmu.lookup_system_write(Gva::new(bottom), 40 + below)
        {
            if let Some(code) = code {
                self.mem.store::<u64>(off, u64::from(code));
            }
            let [ss, rsp, flags, cs, rip] = *values;
            self.mem.store_words(off.add(below), &[rip, cs, flags, rsp, ss]);
            return Ok(bottom);
        }
        let mut frame = Frame { pointer, base: 0, mask: u64::MAX, cpl, limit: None };
        frame.push_all(self, bus, 8, values)?;
        if let Some(code) = code {
            frame.push(self, bus, 8, u64::from(code))?;
        }
        Ok(frame.pointer)
    }

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
