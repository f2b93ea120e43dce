//! How blocks end, and what is due then: faults, shadows, traps, attention, pages that aren't there.

use super::Interpreter;
use crate::deliver::DELIVERY_COST;
use crate::op::Stop;
use umbra_arch::state::Shadow;
use umbra_arch::{Bus, Exit, Fault, PageAnswer, PageContext, rflags};

impl Interpreter {
    /// A block ended with its operation `last`: charges what retired and finds where to go on.
    #[inline(never)]
    pub(crate) fn ended(&mut self, bus: &mut dyn Bus, number: u32, last: usize) -> Option<Exit> {
        self.retired += last as u64 + 1;
        self.stop_in_block(number, last + 1, last + 1);
        self.after_block(bus)
    }

    /// A block ended with its last operation, as [`ended`](Self::ended).
    #[inline(never)]
    pub(super) fn ended_whole(&mut self, bus: &mut dyn Bus, number: u32) -> Option<Exit> {
        self.ended(bus, number, self.cache.block(number).ops.len().saturating_sub(1))
    }

    /// A block ended in its operation `last`, which has raised a fault, outside IA-32e mode.
    #[inline(never)]
    pub(super) fn faulted(&mut self, bus: &mut dyn Bus, number: u32, last: usize) -> Option<Exit> {
        if self.is_faulted_at_once(number, last) {
            return None;
        }
        self.ended_by(bus, number, last, Stop::Fault)
    }

    /// Delivers the fault of operation `last`, if that can be done at once, and ends the block there.
    #[inline(always)]
    fn is_faulted_at_once(&mut self, number: u32, last: usize) -> bool {
        let c = &mut self.core;
        let Some(op) = self.cache.block(number).ops.get(last) else { return false };
        let rip = c.block_rip.wrapping_add(u64::from(op.start));
        if !c.is_raised_entered_at_once(rip) {
            return false;
        }
        c.charge(op.prefix + DELIVERY_COST);
        self.retired += last as u64;
        c.shadow_next = Shadow::None;
        c.s.shadow = Shadow::None;
        c.forget_hits();
        c.check_events |= self.single;
        true
    }

    /// A block ended in its operation `last`, which has stopped.
    #[inline(never)]
    pub(crate) fn ended_by(&mut self, bus: &mut dyn Bus, number: u32, last: usize, stop: Stop) -> Option<Exit> {
        if stop == Stop::Again {
            self.retired += last as u64 + 1;
            self.stop_in_block(number, last + 1, last);
            return self.after_block(bus);
        }
        self.retired += last as u64;
        let rip = self.stop_in(number, last);
        self.core.shadow_next = Shadow::None;
        if stop == Stop::Absent {
            // It starts again under the shadow that it started under.
            self.core.forget_hits();
            return self.page_absent(bus, rip);
        }
        self.failed(bus, stop, rip)
    }

    /// Charges the operations of a block before operation `last`, which comes next: its address.
    #[inline(always)]
    fn stop_in(&mut self, number: u32, last: usize) -> u64 {
        let c = &mut self.core;
        let Some(op) = self.cache.block(number).ops.get(last) else { return c.next_rip };
        c.charge(op.prefix);
        c.next_rip = c.block_rip.wrapping_add(u64::from(op.start));
        c.next_rip
    }

    /// Charges the first `retired` operations of a block, and the next one's address is that of operation `next`, if
    /// there is such.
    #[inline(always)]
    pub(crate) fn stop_in_block(&mut self, number: u32, retired: usize, next: usize) -> u64 {
        let c = &mut self.core;
        let block = self.cache.block(number);
        let cost = block.ops.get(retired).map_or(block.cost, |op| op.prefix);
        c.charge(cost);
        let rip = block.ops.get(next).map_or(c.next_rip, |op| c.block_rip.wrapping_add(u64::from(op.start)));
        c.next_rip = rip;
        rip
    }

    /// After a block that ran to its end: shadows, traps, attention.
    #[inline(never)]
    pub(crate) fn after(&mut self, bus: &mut dyn Bus) -> Option<Exit> {
        self.after_block(bus)
    }

    /// After a block whose last operation retired: shadows, traps, attention.
    #[inline(always)]
    pub(super) fn after_block(&mut self, bus: &mut dyn Bus) -> Option<Exit> {
        self.core.s.shadow = std::mem::take(&mut self.core.shadow_next);
        match self.core.after_instruction() {
            0 => self.attention(),
            debug => self.trapped(bus, debug),
        }
    }

    #[cold]
    #[inline(never)]
    fn trapped(&mut self, bus: &mut dyn Bus, debug: u64) -> Option<Exit> {
        self.debug_trap(bus, debug).map_or_else(Some, |()| self.attention())
    }

    #[inline(always)]
    pub(super) fn attention(&mut self) -> Option<Exit> {
        if std::mem::take(&mut self.core.attention) {
            self.core.check_events = true;
            return Some(Exit::Attention);
        }
        None
    }

    /// The instruction at `rip` has stopped for another reason than an absent page.
    #[inline(always)]
    pub(crate) fn failed(&mut self, bus: &mut dyn Bus, stop: Stop, rip: u64) -> Option<Exit> {
        self.core.s.shadow = Shadow::None;
        self.core.forget_hits();
        self.stopped(bus, stop, rip)
    }

    /// Delivers a fault of the instruction at `rip`, or hands out an exit.
    pub(super) fn stopped(&mut self, bus: &mut dyn Bus, stop: Stop, rip: u64) -> Option<Exit> {
        if stop == Stop::Absent {
            return self.page_absent(bus, rip);
        }
        let c = &mut self.core;
        if stop == Stop::Fault {
            // Besides this, only the flags that the handler starts with can change what is due.
            c.check_events |= self.single;
            match c.deliver_raised(bus, rip) {
                Ok(()) => return None,
                Err(_) => c.next_rip = rip,
            }
        }
        Some(c.exit.take().unwrap_or(Exit::Attention))
    }

    /// The instruction at `rip` needs a page that has yet to arrive: it starts again when the bus says so.
    #[cold]
    fn page_absent(&mut self, bus: &mut dyn Bus, rip: u64) -> Option<Exit> {
        let c = &mut self.core;
        c.check_events = true;
        let interruptible = c.s.rflags & rflags::IF != 0 && c.s.shadow == Shadow::None;
        let context = PageContext { cpl: c.s.cpl, paging: c.s.cr0.pg(), interruptible };
        match bus.page_absent(c.clock, c.absent, context) {
            PageAnswer::Now => {
                c.mem.page_arrived(c.absent);
                return None;
            }
            PageAnswer::Wait(time) => c.clock = c.clock.max(time.min(self.until)),
            PageAnswer::Event(token) => {
                c.fault = Fault::page(token.into(), 0);
                // The bus may have written where the frame goes, or to a table.
                if c.mmu.watcher().is_pending() {
                    self.memory_changed();
                }
                if let Some(exit) = self.stopped(bus, Stop::Fault, rip) {
                    return Some(exit);
                }
            }
        }
        // There is a new event to come.
        Some(Exit::Attention)
    }

    /// Raises a #DB before the next instruction.
    pub(super) fn debug_trap(&mut self, bus: &mut dyn Bus, bits: u64) -> Result<(), Exit> {
        let next = self.core.next_rip;
        match self.core.debug_trap(bus, bits, next) {
            Ok(()) => Ok(()),
            Err(stop) => self.stopped(bus, stop, next).map_or(Ok(()), Err),
        }
    }
}
