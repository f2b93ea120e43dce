//! Events and returns outside IA-32e mode that change neither segment nor privilege level, which most are: done if all
//! they need is found at once. Nothing is called on the way and nothing changed before that is known, so that whatever is
//! unusual is left to [`deliver`](crate::deliver) and [`returns`](crate::returns), from the start.

use crate::core::Core;
use crate::deliver::Event;
use crate::loaded::Rules;
use umbra_arch::descriptor::Gate;
use umbra_arch::fault::vector;
use umbra_arch::segment::{Seg, Segment};
use umbra_arch::state::reg;
use umbra_arch::{Gva, rflags};

impl Core {
    /// Enters the handler of `event` with return address `rip`, through a gate of 32 bits.
    #[inline(always)]
    pub(crate) fn enter_at_once(&mut self, event: Event, rip: u64) -> Option<()> {
        let v = event.vector();
        let unusual = !self.s.cr0.pe() || self.s.efer.lma() || self.s.is_v86() || v == vector::DB;
        if unusual || self.trace.is_some() {
            return None;
        }
        let gate = self.gate_at_once(v)?;
        let cpl = self.s.cpl;
        if event.asks_for_privilege() && gate.attr.dpl() < cpl {
            return None;
        }
        let cs = self.loaded.at(self.loaded_before_in(gate.selector, Rules::Handler(cpl), false)?);
        let level = if cs.attr.is_conforming() { cpl } else { cs.attr.dpl() };
        let entered = Segment { selector: cs.selector & !3 | u16::from(cpl), ..*cs };
        if level != cpl || entered != *self.s.segment(Seg::Cs) || gate.offset > u64::from(cs.limit) {
            return None;
        }
        let resume = if event.resumes() { rflags::RF } else { 0 };
        let values = [rip as u32, entered.selector.into(), (self.rflags() | resume) as u32];
        let esp = self.push_flat(values, event.code())?;
        let mut clear = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
        if gate.attr.kind() & 1 == 0 {
            clear |= rflags::IF;
        }
        self.set_flags_in_view(self.s.rflags & !clear);
        self.break_block = true;
        self.gpr[reg::RSP] = esp;
        self.next_rip = gate.offset;
        Some(())
    }

    /// Pushes an event's frame, its lowest value first, and the error code to a [flat stack](Self::is_flat_stack): the new ESP.
    #[inline(always)]
    fn push_flat(&self, values: [u32; 3], code: Option<u32>) -> Option<u64> {
        let below = if code.is_some() { 4 } else { 0 };
        let (top, total) = (self.gpr[reg::RSP] & 0xffff_ffff, 12 + below);
        // What CPL 3 pushes is no implicit access.
        if !self.is_flat_stack() || self.s.cpl == 3 || total > top {
            return None;
        }
        let at = top - total;
        let lin = self.seg_base[Seg::Ss as usize].wrapping_add(at) & 0xffff_ffff;
        let off = self.mmu.lookup_system_write(Gva::new(lin), total)?;
        if let Some(code) = code {
            self.mem.store(off, code);
        }
        self.mem.store_words(off.add(below), &values);
        Some(at)
    }

    /// The stack pointer has 32 bits, and any value of it may be used.
    #[inline(always)]
    fn is_flat_stack(&self) -> bool {
        self.stack_mask == 0xffff_ffff && self.seg_checked >> Seg::Ss as u8 & 1 == 0
    }

    /// The present interrupt or trap gate of 32 bits for vector `v`.
    #[inline(always)]
    fn gate_at_once(&self, v: u8) -> Option<Gate> {
        let at = u64::from(v) * 8;
        if at + 7 > u64::from(self.s.idtr.limit) {
            return None;
        }
        let base = self.s.idtr.base.wrapping_add(at) & 0xffff_ffff;
        let gate = Gate::legacy(self.mem.load(self.mmu.lookup_system_read(Gva::new(base), 8)?));
        (gate.attr.0 & 0x9e == 0x8e).then_some(gate)
    }

    /// IRETD to the present segment, its frame on a flat stack of 32 bits at least.
    #[inline(always)]
    pub(crate) fn return_at_once(&mut self) -> Option<()> {
        let old = self.s.rflags;
        let unusual = !self.s.cr0.pe() || self.s.efer.lma() || old & (rflags::VM | rflags::NT) != 0;
        let at = self.gpr[reg::RSP] & 0xffff_ffff;
        if unusual || !self.is_flat_stack() || at > 0xffff_ffff - 12 {
            return None;
        }
        let lin = self.seg_base[Seg::Ss as usize].wrapping_add(at) & 0xffff_ffff;
        let [eip, selector, flags] = self.mem.load_words::<u32, 3>(self.mmu.lookup_read(Gva::new(lin), 12)?);
        let (selector, flags) = (selector as u16, u64::from(flags));
        let mask = self.return_flags_mask(4);
        let new = old & !mask | flags & mask;
        if (selector & 3) as u8 != self.s.cpl || flags & rflags::VM != 0 || (old ^ new) & rflags::AC != 0 {
            return None;
        }
        let cs = self.loaded.at(self.loaded_before_in(selector, Rules::Return(self.s.cpl), false)?);
        if cs != self.s.segment(Seg::Cs) || u64::from(eip) > u64::from(cs.limit) {
            return None;
        }
        self.gpr[reg::RSP] = at + 12;
        self.next_rip = eip.into();
        self.flags = crate::flags::Flags::from_rflags(new);
        self.set_flags_in_view(new);
        self.returned();
        Some(())
    }
}
