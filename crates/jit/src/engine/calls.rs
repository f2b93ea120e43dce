//! What generated code calls: operations done by their rows' functions.

use super::{Engine, ROOM};
use crate::flags::{pack, unpack};
use crate::frame::{Reason, stamps};
use crate::registers::guest;
use crate::stubs::{Flow, Functions};
use crate::translate::{OP_BITS, of_site};
use std::panic::{AssertUnwindSafe, catch_unwind};
use umbra_arch::{Bus, VirtualTime, rflags};
use umbra_cpu::op::{NO_REG, Stop};

impl Engine {
    /// Does the operation at `site`, which missed its group, and those behind it.
    fn rest(&mut self, site: u32) -> Flow {
        let (number, first) = of_site(site);
        let base = self.interp.blocks().block(number).ops[first].base;
        // Without a base register it is the stack that was missed.
        let bases = if base == NO_REG { 1 << guest::RSP } else { 1 << base };
        if self.misses.rest(number, bases, self.frame.now()) {
            self.frame.leave_soon();
        }
        self.tail(site)
    }

    /// As [`tail`](Self::tail); the operation's base register isn't in the region that was guessed.
    fn other_base(&mut self, site: u32) -> Flow {
        let (number, at) = of_site(site);
        let base = self.interp.blocks().block(number).ops[at].base;
        let base = if base == NO_REG { guest::RSP } else { base };
        let gva = self.interp.core().gpr[usize::from(base)];
        if self.windows.learn(site, gva) {
            self.misses.translate_again(number);
        } else {
            self.misses.give_up(site);
        }
        self.frame.leave_soon();
        self.tail(site)
    }

    /// Does the operation at `site` and those behind it.
    fn tail(&mut self, site: u32) -> Flow {
        let (number, _) = of_site(site);
        let last = (number << OP_BITS) + self.interp.blocks().block(number).ops.len() as u32 - 1;
        (site..last).map(|site| self.helper(site)).find(|&flow| flow != Flow::On).unwrap_or_else(|| {
            let flow = self.helper(last);
            if flow == Flow::On { Flow::Block } else { flow }
        })
    }

    /// Does the operation at `site`.
    fn helper(&mut self, site: u32) -> Flow {
        let (number, index) = of_site(site);
        let frame = &mut self.frame;
        let Some(bus) = frame.bus else { return Flow::Leave };
        let cost = i64::from(self.interp.blocks().block(number).cost);
        let clock = VirtualTime(frame.end - (frame.left() + cost) as u64);
        let core = self.interp.core_mut();
        frame.catch_up(core);
        let flags = unpack(frame.flags);
        core.flags = flags;
        frame.give_vectors(&mut core.s);
        // Each operation takes time, so that none of a block but its first can be the one.
        frame.give_resume(&mut core.s, clock.plus(index as u64));
        let nmi_blocked = core.s.nmi_blocked;
        self.stats.ops_by_helper += 1;
        // SAFETY: `run` has the bus borrowed for as long as the frame holds it, and nobody else uses it.
        let bus = unsafe { &mut *bus };
        let flow = self.interp.run_op(bus, number, index, clock);
        let core = self.interp.core();
        frame.interrupt = bus.interrupt_pending().into();
        if core.flags != flags {
            frame.flags = pack(core.flags);
        }
        frame.take_vectors(&core.s);
        frame.take_x87(&core.s);
        if flow == Err(Stop::Fault) {
            return self.fault(bus, number, index, clock);
        }
        // IRET ends the blocking of NMIs, one of which may wait.
        if matches!(flow, Ok(true) | Err(Stop::Again)) && !nmi_blocked {
            let room = frame.bank == 0 && frame.budget >= ROOM;
            let quiet = self.interp.end_quietly(bus, number, index, flow.is_err(), room);
            if let Some(quiet) = quiet {
                frame.budget += i64::from(quiet.unused) - quiet.extra as i64;
                frame.extra += quiet.extra;
                return self.another_block();
            }
        }
        if flow != Ok(false) {
            frame.reason = Reason::Op;
            frame.site = site;
            frame.stop = flow.err();
            return Flow::Leave;
        }
        let core = self.interp.core_mut();
        core.s.rflags &= !rflags::RF;
        self.saved.follow(frame, &core.mmu);
        if stamps(core) == frame.selected.stamps {
            frame.know_view(core);
        } else {
            frame.forget_views();
            frame.leave_soon();
        }
        if core.check_events {
            frame.leave_soon();
        }
        Flow::On
    }

    /// Delivers the fault that operation `index` of block `number`, whose first one started at `clock`, has raised.
    fn fault(&mut self, bus: &mut dyn Bus, number: u32, index: usize, clock: VirtualTime) -> Flow {
        let (exit, quiet) = self.interp.fault_in_block(bus, number, index);
        let spent = self.interp.core().clock.since(clock);
        self.frame.budget += i64::from(self.interp.blocks().block(number).cost) - spent as i64;
        self.frame.extra += spent - index as u64;
        if quiet {
            return self.another_block();
        }
        self.frame.reason = Reason::Event;
        self.frame.exit = exit;
        Flow::Leave
    }

    /// Generated code goes on with the block at the core's RIP.
    fn another_block(&mut self) -> Flow {
        let core = self.interp.core_mut();
        self.frame.take_resume(&mut core.s);
        self.frame.take_registers(core);
        self.frame.gates.look(core);
        if !self.frame.follow_view(core) {
            self.frame.follow_context(core, &mut self.contexts);
            self.saved.follow(&mut self.frame, &core.mmu);
            self.frame.know_view(core);
        }
        Flow::Block
    }
}

/// What generated code calls.
pub(super) fn functions() -> Functions {
    Functions {
        helper: run_helper as *const () as u64,
        rest: run_rest as *const () as u64,
        tail: run_tail as *const () as u64,
        other_base: run_other_base as *const () as u64,
    }
}

extern "sysv64" fn run_helper(engine: *mut Engine, site: u32) -> u32 {
    // SAFETY: generated code passes on the pointer that `execute` gave it, which uses nothing of the engine
    // meanwhile.
    let engine = unsafe { &mut *engine };
    guarded(engine, |engine| engine.helper(site))
}

extern "sysv64" fn run_rest(engine: *mut Engine, site: u32) -> u32 {
    // SAFETY: as in `run_helper`.
    let engine = unsafe { &mut *engine };
    guarded(engine, |engine| engine.rest(site))
}

extern "sysv64" fn run_tail(engine: *mut Engine, site: u32) -> u32 {
    // SAFETY: as in `run_helper`.
    let engine = unsafe { &mut *engine };
    guarded(engine, |engine| engine.tail(site))
}

extern "sysv64" fn run_other_base(engine: *mut Engine, site: u32) -> u32 {
    // SAFETY: as in `run_helper`.
    let engine = unsafe { &mut *engine };
    guarded(engine, |engine| engine.other_base(site))
}

/// A panic doesn't unwind generated code.
fn guarded(engine: &mut Engine, run: impl Fn(&mut Engine) -> Flow) -> u32 {
    match catch_unwind(AssertUnwindSafe(|| run(engine))) {
        Ok(flow) => {
            let core = engine.interp.core_mut();
            engine.windows.follow(&mut engine.frame, core);
            engine.windows.look(&mut engine.frame, core);
            flow as u32
        }
        Err(panic) => {
            engine.frame.panic = Some(panic);
            Flow::Leave as u32
        }
    }
}
