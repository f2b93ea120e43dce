//! RET far and IRET: returns to other segments and to outer privilege levels.

use crate::core::Core;
use crate::far::Transfer;
use crate::loaded::{Place, Rules};
use crate::op::{Flow, Op, Stop};
use crate::segments::{ACCESSED, selector_code};
use umbra_arch::segment::{Seg, Segment};
use umbra_arch::state::reg;
use umbra_arch::{Bus, Fault, Gva, rflags};

impl Core {
    fn pop_value(&mut self, bus: &mut dyn Bus, op: &Op, bytes: u64, skip: u64) -> Result<u64, Stop> {
        match bytes {
            2 => self.peek_stack::<u16>(bus, op, skip),
            4 => self.peek_stack::<u32>(bus, op, skip),
            _ => self.peek_stack::<u64>(bus, op, skip),
        }
    }

    /// RET far, dropping `extra` bytes of parameters.
    pub fn far_return(&mut self, bus: &mut dyn Bus, op: &Op, bytes: u64, extra: u64) -> Flow {
        let rip = self.pop_value(bus, op, bytes, 0)?;
        let selector = self.pop_value(bus, op, bytes, bytes)? as u16;
        if !self.s.cr0.pe() || self.s.is_v86() {
            if rip > u64::from(self.s.segment(Seg::Cs).limit) {
                return self.raise(Fault::GP0);
            }
            self.drop_stack(2 * bytes + extra);
            return self.far_real(bus, Transfer::Jump, selector, rip, bytes, 0);
        }
        let cs = self.return_segment(bus, selector)?;
        if cs.rpl() == self.s.cpl {
            self.check_entry(&cs, rip)?;
            self.drop_stack(2 * bytes + extra);
            self.s.seg[Seg::Cs as usize] = cs;
            self.segments_changed();
            self.next_rip = rip;
            self.break_block = true;
            return Ok(());
        }
        let rsp = self.pop_value(bus, op, bytes, 2 * bytes + extra)?;
        let ss = self.pop_value(bus, op, bytes, 3 * bytes + extra)? as u16;
        self.check_entry(&cs, rip)?;
        self.return_outer(bus, cs, rip, ss, rsp, bytes)?;
        self.drop_stack(extra);
        Ok(())
    }

    /// The code segment that a return goes to: its RPL is the new CPL.
    #[inline(always)]
    fn return_segment(&mut self, bus: &mut dyn Bus, selector: u16) -> Result<Segment, Stop> {
        let place = match self.loaded_before(selector, Rules::Return(self.s.cpl)) {
            Some(place) => place,
            None => self.read_return_segment(bus, selector)?,
        };
        Ok(*self.loaded.at(place))
    }

    #[inline(never)]
    fn read_return_segment(&mut self, bus: &mut dyn Bus, selector: u16) -> Result<Place, Stop> {
        if selector & 0xfffc == 0 {
            return self.raise(Fault::GP0);
        }
        let code = selector_code(selector);
        let d = self.read_descriptor(bus, selector, Fault::gp)?;
        let (attr, rpl) = (d.attr(), (selector & 3) as u8);
        let level = if attr.is_conforming() { attr.dpl() <= rpl } else { attr.dpl() == rpl };
        let both = self.s.efer.lma() && attr.is_long() && attr.is_big();
        if !attr.is_code() || rpl < self.s.cpl || !level || both {
            return self.raise(Fault::gp(code));
        }
        if !attr.is_present() {
            return self.raise(Fault::np(code));
        }
        self.mark_descriptor(bus, selector, d, ACCESSED)?;
        Ok(self.loads(selector, d, Rules::Return(self.s.cpl)))
    }

    /// Commits a return to an outer (or, by IRET in 64-bit mode, the same) level with a new stack.
    #[inline(always)]
    fn return_outer(&mut self, bus: &mut dyn Bus, cs: Segment, rip: u64, ss: u16, rsp: u64, bytes: u64) -> Flow {
        let cpl = cs.rpl();
        let stack = if ss & 0xfffc == 0 {
            let long = self.s.efer.lma() && cs.attr.is_long();
            if !long || cpl == 3 || (ss & 3) as u8 != cpl {
                return self.raise(Fault::GP0);
            }
            Segment::null_stack(cpl)
        } else {
            self.stack_segment(bus, ss, cpl, Fault::gp)?
        };
        let (old_cpl, from64) = (self.s.cpl, self.s.is_64bit_code());
        self.s.seg[Seg::Cs as usize] = cs;
        self.s.seg[Seg::Ss as usize] = stack;
        self.s.cpl = cpl;
        if cpl > old_cpl {
            self.drop_inner_segments(from64);
            self.view_changed();
        }
        self.segments_changed();
        self.set_stack_pointer(if bytes == 8 { rsp } else { rsp & (u64::MAX >> (64 - 8 * bytes)) });
        self.next_rip = rip;
        self.break_block = true;
        Ok(())
    }

    /// Data segments that the new level may not use become null ("RET-Return From Procedure"). From 64-bit mode,
    /// which doesn't look at them, only the selectors do: a kernel that goes on to legacy mode without
    /// reloading DS finds its flat segment there, as it does under other emulators.
    #[inline(never)]
    fn drop_inner_segments(&mut self, from64: bool) {
        for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
            let s = &mut self.s.seg[seg as usize];
            let private = s.attr.is_code_or_data() && !s.attr.is_conforming() && s.attr.dpl() < self.s.cpl;
            if private && !s.attr.is_unusable() {
                *s = if from64 { Segment { selector: 0, ..*s } } else { Segment { base: s.base, ..Segment::null(0) } };
            }
        }
    }

    /// IRET, IRETD, IRETQ.
    #[inline(always)]
    pub fn interrupt_return(&mut self, bus: &mut dyn Bus, op: &Op, bytes: u64) -> Flow {
        match bytes {
            4 if self.return_at_once().is_some() => Ok(()),
            4 => self.short_interrupt_return(bus, op),
            _ => self.interrupt_return_in_steps(bus, op, bytes),
        }
    }

    #[inline(never)]
    fn short_interrupt_return(&mut self, bus: &mut dyn Bus, op: &Op) -> Flow {
        self.interrupt_return_in_steps(bus, op, 4)
    }

    #[inline(always)]
    fn interrupt_return_in_steps(&mut self, bus: &mut dyn Bus, op: &Op, bytes: u64) -> Flow {
        if !self.s.cr0.pe() {
            return self.return_real(bus, op, bytes);
        }
        if self.s.is_v86() {
            if self.s.rflags & rflags::IOPL != rflags::IOPL {
                return self.raise(Fault::GP0);
            }
            return self.return_real(bus, op, bytes);
        }
        if self.s.rflags & rflags::NT != 0 {
            if self.s.efer.lma() {
                return self.raise(Fault::GP0);
            }
            return self.task_return(bus, op.next_rip(self.block_rip));
        }
        if bytes == 8
            && self.s.is_64bit_code()
            && let Some([rip, selector, flags, rsp, ss]) = self.interrupt_frame()
        {
            let cs = self.return_segment(bus, selector as u16)?;
            let mask = self.return_flags_mask(bytes);
            self.check_entry(&cs, rip)?;
            self.return_outer(bus, cs, rip, ss as u16, rsp, bytes)?;
            self.after_return(flags, mask);
            return Ok(());
        }
        self.return_by_parts(bus, op, bytes)
    }

    /// Commits IRET outside 64-bit mode to the same level.
    #[inline(always)]
    fn return_inside(&mut self, cs: Segment, rip: u64, flags: u64, bytes: u64) -> Flow {
        self.check_entry(&cs, rip)?;
        self.drop_stack(3 * bytes);
        self.set_code_segment(cs);
        self.next_rip = rip;
        self.after_return(flags, self.return_flags_mask(bytes));
        Ok(())
    }

    /// IRET in protected mode and IA-32e mode, its frame read value by value.
    #[inline(never)]
    fn return_by_parts(&mut self, bus: &mut dyn Bus, op: &Op, bytes: u64) -> Flow {
        let from64 = self.s.is_64bit_code();
        let rip = self.pop_value(bus, op, bytes, 0)?;
        let selector = self.pop_value(bus, op, bytes, bytes)? as u16;
        let flags = self.pop_value(bus, op, bytes, 2 * bytes)?;
        if flags & rflags::VM != 0 && self.s.cpl == 0 && !self.s.efer.lma() && bytes == 4 {
            return self.return_to_v86(bus, op, rip, selector, flags);
        }
        let cs = self.return_segment(bus, selector)?;
        if cs.rpl() == self.s.cpl && !from64 {
            return self.return_inside(cs, rip, flags, bytes);
        }
        let mask = self.return_flags_mask(bytes);
        let rsp = self.pop_value(bus, op, bytes, 3 * bytes)?;
        let ss = self.pop_value(bus, op, bytes, 4 * bytes)? as u16;
        self.check_entry(&cs, rip)?;
        self.return_outer(bus, cs, rip, ss, rsp, bytes)?;
        self.after_return(flags, mask);
        Ok(())
    }

    /// What IRETQ takes off the stack in 64-bit mode, if one lookup finds all of it.
    #[inline(always)]
    fn interrupt_frame(&self) -> Option<[u64; 5]> {
        let off = self.mmu.lookup_read(Gva::new(self.gpr[reg::RSP]), 40)?;
        Some(self.mem.load_words(off))
    }

    /// RFLAGS bits that IRET changes at the present CPL: all status flags and some others.
    #[inline]
    pub(crate) fn return_flags_mask(&self, bytes: u64) -> u64 {
        let mut mask = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
        if bytes > 2 {
            mask |= rflags::RF | rflags::AC | rflags::ID;
        }
        if self.s.cpl == 0 {
            mask |= rflags::IOPL;
            if bytes > 2 {
                mask |= rflags::VIF | rflags::VIP;
            }
        }
        if u64::from(self.s.cpl) <= self.s.rflags >> 12 & 3 {
            mask |= rflags::IF;
        }
        mask
    }

    #[inline(always)]
    fn after_return(&mut self, flags: u64, mask: u64) {
        self.set_rflags(self.s.rflags & !mask | flags & mask);
        self.returned();
    }

    /// What follows from IRET once RFLAGS is loaded.
    #[inline(always)]
    pub(crate) fn returned(&mut self) {
        self.watch.keep_rf = true;
        self.check_events |= self.s.nmi_blocked;
        self.s.nmi_blocked = false;
        self.break_block = true;
    }

    fn return_real(&mut self, bus: &mut dyn Bus, op: &Op, bytes: u64) -> Flow {
        let rip = self.pop_value(bus, op, bytes, 0)?;
        let selector = self.pop_value(bus, op, bytes, bytes)? as u16;
        let flags = self.pop_value(bus, op, bytes, 2 * bytes)?;
        if rip > u64::from(self.s.segment(Seg::Cs).limit) {
            return self.raise(Fault::GP0);
        }
        self.drop_stack(3 * bytes);
        let mut mask = self.return_flags_mask(bytes) | rflags::IF;
        if !self.s.cr0.pe() {
            mask |= rflags::IOPL;
        }
        self.far_real(bus, Transfer::Jump, selector, rip, bytes, 0)?;
        self.after_return(flags, mask);
        Ok(())
    }

    fn return_to_v86(&mut self, bus: &mut dyn Bus, op: &Op, rip: u64, selector: u16, flags: u64) -> Flow {
        let mut values = [0u64; 6];
        for (n, value) in values.iter_mut().enumerate() {
            *value = self.pop_value(bus, op, 4, 12 + 4 * n as u64)?;
        }
        let [esp, ss, es, ds, fs, gs] = values;
        self.set_rflags(flags);
        let selectors =
            [(Seg::Cs, u64::from(selector)), (Seg::Ss, ss), (Seg::Es, es), (Seg::Ds, ds), (Seg::Fs, fs), (Seg::Gs, gs)];
        for (seg, value) in selectors {
            self.s.seg[seg as usize] = crate::segments::v86_segment(value as u16);
        }
        self.s.cpl = 3;
        self.segments_changed();
        self.view_changed();
        self.gpr[reg::RSP] = esp;
        self.next_rip = rip & 0xffff;
        self.watch.keep_rf = true;
        self.s.nmi_blocked = false;
        self.check_events = true;
        self.break_block = true;
        Ok(())
    }
}
