//! Far transfers: JMP and CALL between segments and privilege levels, call gates.

use crate::core::Core;
use crate::frame::Frame;
use crate::op::{Flow, Op, Stop};
use crate::segments::{ACCESSED, selector_code};
use crate::taskswitch::Cause;
use umbra_arch::descriptor::{Descriptor, Gate, system};
use umbra_arch::segment::{Seg, Segment};
use umbra_arch::state::reg;
use umbra_arch::{Bus, Fault, Gva};

/// How a far transfer was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transfer {
    /// JMP far.
    Jump,
    /// CALL far.
    Call,
}

impl Core {
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

    pub(crate) fn far_real(
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
    #[inline(always)]
    pub(crate) fn check_entry(&mut self, cs: &Segment, offset: u64) -> Flow {
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
            (Frame { pointer, base: 0, mask: u64::MAX, cpl, limit: None }, Segment::null_stack(cpl))
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
}
