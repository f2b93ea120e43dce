//! Far transfers: JMP, CALL, RET and IRET between segments and privilege levels, call gates.

use crate::core::Core;
use crate::op::{Flow, Op, Stop};
use crate::segments::{ACCESSED, selector_code};
use crate::taskswitch::Cause;
use umbra_arch::descriptor::{Descriptor, Gate, system};
use umbra_arch::paging::{Access, AccessKind};
use umbra_arch::segment::{Seg, Segment};
use umbra_arch::state::reg;
use umbra_arch::{Bus, Fault, Gva, rflags};

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
        if let Some(ss) = self.limit {
            let outside =
                if ss.attr.is_expand_down() { at <= u64::from(ss.limit) } else { at + bytes - 1 > u64::from(ss.limit) };
            if outside {
                return c.raise(Fault::SS0);
            }
        }
        let mut lin = self.base.wrapping_add(at);
        if self.limit.is_some() {
            lin &= 0xffff_ffff;
        }
        c.write_as(bus, lin, bytes, value, self.cpl)?;
        self.pointer = self.pointer & !self.mask | at;
        Ok(())
    }

    /// Makes the pushes real: RSP (SP, ESP) gets the frame's pointer.
    pub fn commit_pointer(&self, c: &mut Core) {
        c.set_stack_pointer(self.pointer & self.mask);
    }
}

/// How a far transfer was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transfer {
    /// JMP far.
    Jump,
    /// CALL far.
    Call,
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

    /// JMP far and CALL far to `selector:offset`; `bytes` is the operand size.
    pub fn far_transfer(
        &mut self,
        bus: &mut dyn Bus,
        op: &Op,
        kind: Transfer,
        selector: u16,
        offset: u64,
        bytes: u64,
    ) -> Flow {
        let back = op.next_rip(self.block_rip);
        if !self.s.cr0.pe() || self.s.is_v86() {
            return self.far_real(bus, kind, selector, offset, bytes, back);
        }
        if selector & 0xfffc == 0 {
            return self.raise(Fault::GP0);
        }
        let d = self.read_descriptor(bus, selector, Fault::gp)?;
        let attr = d.attr();
        if attr.is_code() {
            let cs = self.direct_target(bus, d, selector)?;
            return self.enter_same_level(bus, kind, cs, offset, bytes, back);
        }
        let code = selector_code(selector);
        if attr.is_code_or_data() {
            return self.raise(Fault::gp(code));
        }
        match attr.kind() {
            system::CALL_GATE | system::CALL_GATE16 => self.through_call_gate(bus, kind, selector, d, back),
            system::TSS_AVAILABLE | system::TSS16_AVAILABLE | system::TASK_GATE if !self.s.efer.lma() => {
                let cause = if kind == Transfer::Call { Cause::Call } else { Cause::Jump };
                self.task_transfer(bus, cause, selector, d, back)
            }
            _ => self.raise(Fault::gp(code)),
        }
    }

    fn far_real(
        &mut self,
        bus: &mut dyn Bus,
        kind: Transfer,
        selector: u16,
        offset: u64,
        bytes: u64,
        back: u64,
    ) -> Flow {
        if offset > u64::from(self.s.segment(Seg::Cs).limit) {
            return self.raise(Fault::GP0);
        }
        if kind == Transfer::Call {
            let mut frame = Frame::on_current_stack(self);
            frame.push(self, bus, bytes, u64::from(self.s.segment(Seg::Cs).selector))?;
            frame.push(self, bus, bytes, back)?;
            frame.commit_pointer(self);
        }
        let cs = &mut self.s.seg[Seg::Cs as usize];
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
        self.segments_changed();
        self.next_rip = offset;
        Ok(())
    }

    /// Privilege and presence of a code segment that is the direct target of JMP or CALL.
    fn direct_target(&mut self, bus: &mut dyn Bus, d: Descriptor, selector: u16) -> Result<Segment, Stop> {
        let (attr, cpl, rpl) = (d.attr(), self.s.cpl, (selector & 3) as u8);
        let allowed = if attr.is_conforming() { attr.dpl() <= cpl } else { attr.dpl() == cpl && rpl <= cpl };
        let both = self.s.efer.lma() && attr.is_long() && attr.is_big();
        if !allowed || both {
            return self.raise(Fault::gp(selector_code(selector)));
        }
        if !attr.is_present() {
            return self.raise(Fault::np(selector_code(selector)));
        }
        self.mark_descriptor(bus, selector, d, ACCESSED)?;
        Ok(Descriptor(d.0 | ACCESSED).segment(selector & !3 | u16::from(cpl)))
    }

    /// Whether `offset` can be executed in `cs`.
    fn check_entry(&mut self, cs: &Segment, offset: u64) -> Flow {
        let fits = if self.s.efer.lma() && cs.attr.is_long() {
            Gva::new(offset).is_canonical(self.s.linear_bits())
        } else {
            offset <= u64::from(cs.limit)
        };
        if fits { Ok(()) } else { self.raise(Fault::GP0) }
    }

    fn enter_same_level(
        &mut self,
        bus: &mut dyn Bus,
        kind: Transfer,
        cs: Segment,
        offset: u64,
        bytes: u64,
        back: u64,
    ) -> Flow {
        self.check_entry(&cs, offset)?;
        if kind == Transfer::Call {
            let mut frame = Frame::on_current_stack(self);
            frame.push(self, bus, bytes, u64::from(self.s.segment(Seg::Cs).selector))?;
            frame.push(self, bus, bytes, back)?;
            frame.commit_pointer(self);
        }
        self.s.seg[Seg::Cs as usize] = cs;
        self.segments_changed();
        self.next_rip = offset;
        self.break_block = true;
        Ok(())
    }

    /// "Accessing a Code Segment Through a Call Gate".
    fn through_call_gate(
        &mut self,
        bus: &mut dyn Bus,
        kind: Transfer,
        selector: u16,
        d: Descriptor,
        back: u64,
    ) -> Flow {
        let long = self.s.efer.lma();
        let gate = if long {
            let (low, high) = self.read_descriptor16(bus, selector, Fault::gp)?;
            if high >> 40 & 0x1f != 0 {
                return self.raise(Fault::gp(selector_code(selector)));
            }
            Gate::long(low.0, high)
        } else {
            Gate::legacy(d.0)
        };
        let rpl = (selector & 3) as u8;
        let wide = gate.attr.kind() == system::CALL_GATE;
        if gate.attr.dpl() < self.s.cpl.max(rpl) || long && !wide {
            return self.raise(Fault::gp(selector_code(selector)));
        }
        if !gate.attr.is_present() {
            return self.raise(Fault::np(selector_code(selector)));
        }
        let cs = self.gate_target(bus, &gate, kind)?;
        let bytes = if long {
            8
        } else if wide {
            4
        } else {
            2
        };
        let inner = !cs.attr.is_conforming() && cs.attr.dpl() < self.s.cpl;
        if kind == Transfer::Call && inner {
            return self.call_inner(bus, gate, cs, bytes, back);
        }
        let cpl = self.s.cpl;
        let cs = Segment { selector: cs.selector & !3 | u16::from(cpl), ..cs };
        self.enter_same_level(bus, kind, cs, gate.offset, bytes, back)
    }

    fn gate_target(&mut self, bus: &mut dyn Bus, gate: &Gate, kind: Transfer) -> Result<Segment, Stop> {
        if gate.selector & 0xfffc == 0 {
            return self.raise(Fault::GP0);
        }
        let code = selector_code(gate.selector);
        let d = self.read_descriptor(bus, gate.selector, Fault::gp)?;
        let attr = d.attr();
        let allowed = match kind {
            Transfer::Jump if !attr.is_conforming() => attr.dpl() == self.s.cpl,
            _ => attr.dpl() <= self.s.cpl,
        };
        let wrong_size = self.s.efer.lma() && (!attr.is_long() || attr.is_big());
        if !attr.is_code() || !allowed || wrong_size {
            return self.raise(Fault::gp(code));
        }
        if !attr.is_present() {
            return self.raise(Fault::np(code));
        }
        self.mark_descriptor(bus, gate.selector, d, ACCESSED)?;
        Ok(Descriptor(d.0 | ACCESSED).segment(gate.selector))
    }

    fn call_inner(&mut self, bus: &mut dyn Bus, gate: Gate, cs: Segment, bytes: u64, back: u64) -> Flow {
        let long = self.s.efer.lma();
        let cpl = cs.attr.dpl();
        let (old_ss, old_rsp) = (*self.s.segment(Seg::Ss), self.gpr[reg::RSP]);
        let (mut frame, ss) = if long {
            let tr = *self.s.segment(Seg::Tr);
            let at = 4 + 8 * u64::from(cpl);
            if at + 7 > u64::from(tr.limit) {
                return self.raise(Fault::ts(selector_code(tr.selector)));
            }
            let pointer = self.read_system::<u64>(bus, tr.base.wrapping_add(at))?;
            let null =
                Segment { attr: umbra_arch::segment::Attr::UNUSABLE.with_dpl(cpl), ..Segment::null(u16::from(cpl)) };
            (Frame { pointer, base: 0, mask: u64::MAX, cpl, limit: None }, null)
        } else {
            self.inner_stack(bus, cpl, 0)?
        };
        frame.push(self, bus, bytes, u64::from(old_ss.selector))?;
        frame.push(self, bus, bytes, old_rsp)?;
        if !long {
            for n in (0..u64::from(gate.params)).rev() {
                let at = old_ss.base.wrapping_add(old_rsp.wrapping_add(n * bytes) & self.stack_mask) & 0xffff_ffff;
                let value = match bytes {
                    2 => self.read_system::<u16>(bus, at)?,
                    _ => self.read_system::<u32>(bus, at)?,
                };
                frame.push(self, bus, bytes, value)?;
            }
        }
        frame.push(self, bus, bytes, u64::from(self.s.segment(Seg::Cs).selector))?;
        frame.push(self, bus, bytes, back)?;
        self.check_entry(&cs, gate.offset)?;
        self.s.seg[Seg::Ss as usize] = ss;
        self.s.seg[Seg::Cs as usize] = Segment { selector: cs.selector & !3 | u16::from(cpl), ..cs };
        self.s.cpl = cpl;
        self.segments_changed();
        frame.commit_pointer(self);
        self.view_changed();
        self.next_rip = gate.offset;
        self.break_block = true;
        Ok(())
    }

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
    fn return_segment(&mut self, bus: &mut dyn Bus, selector: u16) -> Result<Segment, Stop> {
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
        Ok(Descriptor(d.0 | ACCESSED).segment(selector))
    }

    /// Commits a return to an outer (or, by IRET in 64-bit mode, the same) level with a new stack.
    fn return_outer(&mut self, bus: &mut dyn Bus, cs: Segment, rip: u64, ss: u16, rsp: u64, bytes: u64) -> Flow {
        let cpl = cs.rpl();
        let stack = if ss & 0xfffc == 0 {
            let long = self.s.efer.lma() && cs.attr.is_long();
            if !long || cpl == 3 || (ss & 3) as u8 != cpl {
                return self.raise(Fault::GP0);
            }
            Segment { attr: umbra_arch::segment::Attr::UNUSABLE.with_dpl(cpl), ..Segment::null(ss) }
        } else {
            self.stack_segment(bus, ss, cpl, Fault::gp)?
        };
        let (old_cpl, from64) = (self.s.cpl, self.s.is_64bit_code());
        self.s.seg[Seg::Cs as usize] = cs;
        self.s.seg[Seg::Ss as usize] = stack;
        self.s.cpl = cpl;
        if cpl > old_cpl {
            self.drop_inner_segments(from64);
        }
        self.segments_changed();
        self.view_changed();
        self.set_stack_pointer(if bytes == 8 { rsp } else { rsp & (u64::MAX >> (64 - 8 * bytes)) });
        self.next_rip = rip;
        self.break_block = true;
        Ok(())
    }

    /// Data segments that the new level may not use become null ("RET-Return From Procedure"). From 64-bit mode,
    /// which doesn't look at them, only the selectors do: a kernel that goes on to legacy mode without
    /// reloading DS finds its flat segment there, as it does under other emulators.
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
    pub fn interrupt_return(&mut self, bus: &mut dyn Bus, op: &Op, bytes: u64) -> Flow {
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
        let rip = self.pop_value(bus, op, bytes, 0)?;
        let selector = self.pop_value(bus, op, bytes, bytes)? as u16;
        let flags = self.pop_value(bus, op, bytes, 2 * bytes)?;
        if flags & rflags::VM != 0 && self.s.cpl == 0 && !self.s.efer.lma() && bytes == 4 {
            return self.return_to_v86(bus, op, rip, selector, flags);
        }
        let cs = self.return_segment(bus, selector)?;
        let mask = self.return_flags_mask(bytes);
        let from64 = self.s.is_64bit_code();
        if cs.rpl() == self.s.cpl && !from64 {
            self.check_entry(&cs, rip)?;
            self.drop_stack(3 * bytes);
            self.s.seg[Seg::Cs as usize] = cs;
            self.segments_changed();
            self.next_rip = rip;
        } else {
            let rsp = self.pop_value(bus, op, bytes, 3 * bytes)?;
            let ss = self.pop_value(bus, op, bytes, 4 * bytes)? as u16;
            self.check_entry(&cs, rip)?;
            self.return_outer(bus, cs, rip, ss, rsp, bytes)?;
        }
        self.after_return(flags, mask);
        Ok(())
    }

    /// RFLAGS bits that IRET changes at the present CPL.
    fn return_flags_mask(&self, bytes: u64) -> u64 {
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

    fn after_return(&mut self, flags: u64, mask: u64) {
        let old = self.rflags();
        self.set_rflags(old & !mask | flags & mask);
        self.watch.keep_rf = true;
        self.s.nmi_blocked = false;
        self.check_events = true;
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
