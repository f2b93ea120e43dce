//! Events and returns outside IA-32e mode that change neither segment nor privilege level, which most are: done if all
//! they need is found at once. Nothing is called on the way and nothing changed before that is known, so that whatever is
//! unusual is left to [`deliver`](crate::deliver) and [`returns`](crate::returns), from the start.

use crate::core::Core;
use crate::deliver::Event;
use umbra_arch::fault::vector;
use umbra_arch::segment::Seg;
use umbra_arch::state::reg;
use umbra_arch::{Gva, rflags};
use umbra_memory::RamOffset;

impl Core {
    /// Enters the handler of `event` with return address `rip`, through a gate of 32 bits.
    #[inline(always)]
    pub(crate) fn enter_at_once(&mut self, event: Event, rip: u64) -> Option<()> {
        let v = event.vector();
        let unusual = !self.s.cr0.pe() || self.s.efer.lma() || self.s.is_v86() || v == vector::DB;
        if unusual || self.trace.is_some() {
            return None;
        }
        let (gate, cpl) = (self.gate_at_once(v)?, self.s.cpl);
        if self.loaded.entrance(v, gate, cpl).is_none() {
            self.learn_entrance(v, gate)?;
        }
        let way = self.loaded.entrance(v, gate, cpl)?;
        if event.asks_for_privilege() && way.dpl < cpl || way.handler != *self.s.segment(Seg::Cs) {
            return None;
        }
        if self.descriptor_at_once(way.index)? != way.descriptor {
            return self.loaded.forget_entrance(v);
        }
        let (offset, new) = (way.offset, self.s.rflags & way.keep);
        let (code, selector) = (event.code(), way.handler.selector);
        let (esp, off) = self.flat_frame(if code.is_some() { 16 } else { 12 })?;
        let resume = if event.resumes() { rflags::RF } else { 0 };
        let flags = self.rflags() | resume;
        let values = [rip as u32, selector.into(), flags as u32];
        let [a, b, c] = values;
        match code {
            Some(code) => self.mem.store_words(off, &[code, a, b, c]),
            None => self.mem.store_words(off, &values),
        }
        self.set_flags_in_view(new);
        self.break_block = true;
        self.gpr[reg::RSP] = esp;
        self.next_rip = offset;
        Some(())
    }

    /// Where an event's frame of so many bytes goes on a [flat stack](Self::is_flat_stack): the new ESP, and in RAM.
    #[inline(always)]
    fn flat_frame(&self, bytes: u64) -> Option<(u64, RamOffset)> {
        let top = self.gpr[reg::RSP] & 0xffff_ffff;
        // What CPL 3 pushes is no implicit access.
        if !self.is_flat_stack() || self.s.cpl == 3 || bytes > top {
            return None;
        }
        let at = top - bytes;
        let lin = self.seg_base[Seg::Ss as usize].wrapping_add(at) & 0xffff_ffff;
        Some((at, self.mmu.lookup_system_write(Gva::new(lin), bytes)?))
    }

    /// The stack pointer has 32 bits, and any value of it may be used.
    #[inline(always)]
    fn is_flat_stack(&self) -> bool {
        self.stack_mask == 0xffff_ffff && self.seg_checked >> Seg::Ss as u8 & 1 == 0
    }

    /// The bytes of the gate for vector `v`.
    #[inline(always)]
    fn gate_at_once(&self, v: u8) -> Option<u64> {
        let at = u64::from(v) * 8;
        if at + 7 > u64::from(self.s.idtr.limit) {
            return None;
        }
        let base = self.s.idtr.base.wrapping_add(at) & 0xffff_ffff;
        Some(self.mem.load(self.mmu.lookup_system_read(Gva::new(base), 8)?))
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
        if flags & rflags::VM != 0 || (old ^ new) & rflags::AC != 0 {
            return None;
        }
        let cpl = self.s.cpl;
        if self.loaded.way_back(selector, cpl).is_none() {
            self.learn_way_back(selector)?;
        }
        let way = self.loaded.way_back(selector, cpl)?;
        if way.segment != *self.s.segment(Seg::Cs) || u64::from(eip) > u64::from(way.segment.limit) {
            return None;
        }
        if self.descriptor_at_once(selector & 0xfff8)? != way.descriptor {
            return self.loaded.forget_way_back();
        }
        self.gpr[reg::RSP] = at + 12;
        self.next_rip = eip.into();
        self.flags = crate::flags::Flags::from_rflags(new);
        self.set_flags_in_view(new);
        self.returned();
        Some(())
    }
}
