//! Delivering exceptions and interrupts ("Interrupt and Exception Handling").

use crate::core::Core;
use crate::debug::DR7_GD;
use crate::frame::Frame;
use crate::loaded::{Place, Rules};
use crate::op::{Flow, Stop};
use crate::segments::selector_code;
use crate::taskswitch::Cause;
use umbra_arch::descriptor::{Gate, system};
use umbra_arch::exit::{TripleFault, Unsupported};
use umbra_arch::fault::vector;
use umbra_arch::segment::{Seg, Segment};
use umbra_arch::state::{Activity, reg};
use umbra_arch::{Bus, Exit, Fault, rflags};

/// Ticks that delivering an exception or interrupt takes. Not 0: a handler that faults at once would stop time.
pub(crate) const DELIVERY_COST: u32 = 1;

/// What is being delivered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A fault of the instruction at the return address.
    Fault(Fault),
    /// A trap: #DB after an instruction.
    Trap(Fault),
    /// A maskable or non-maskable interrupt.
    External(u8),
    /// INT n: the gate's DPL is checked, in virtual-8086 mode IOPL too.
    Software(u8),
    /// INT3, INTO: the gate's DPL is checked.
    Short(u8),
    /// INT1 (ICEBP): a software-made #DB without the DPL check.
    Icebp,
}

impl Event {
    #[inline(always)]
    pub(crate) fn vector(self) -> u8 {
        match self {
            Self::Fault(f) | Self::Trap(f) => f.vector,
            Self::External(v) | Self::Software(v) | Self::Short(v) => v,
            Self::Icebp => vector::DB,
        }
    }
    #[inline(always)]
    pub(crate) fn code(self) -> Option<u32> {
        match self {
            Self::Fault(f) | Self::Trap(f) => f.code,
            _ => None,
        }
    }
    /// The EXT bit of error codes raised by this delivery.
    fn ext(self) -> u32 {
        u32::from(!self.asks_for_privilege())
    }
    /// The gate's DPL is checked.
    #[inline(always)]
    pub(crate) fn asks_for_privilege(self) -> bool {
        matches!(self, Self::Software(_) | Self::Short(_))
    }
    /// RFLAGS.RF is set in the frame.
    #[inline(always)]
    pub(crate) fn resumes(self) -> bool {
        matches!(self, Self::Fault(_))
    }
}

/// "Benign, contributory, page fault" classes for double faults ("Interrupt 8-Double Fault Exception (#DF)").
fn makes_double_fault(first: u8, second: u8) -> bool {
    let contributory = |v: u8| matches!(v, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP | vector::CP);
    contributory(first) && contributory(second) || first == vector::PF && (contributory(second) || second == vector::PF)
}

impl Core {
    /// Delivers `event` with return address `rip`; follows double faults. On success `next_rip` is the
    /// handler's address.
    #[inline(never)]
    pub fn deliver(&mut self, bus: &mut dyn Bus, event: Event, rip: u64) -> Flow {
        if self.is_entered_at_once(event, rip) {
            self.clock = self.clock.plus(DELIVERY_COST.into());
            return Ok(());
        }
        self.deliver_in_steps(bus, event, rip)
    }

    /// As [`deliver`](Self::deliver) for the fault that the instruction at `rip` has raised.
    #[inline(always)]
    pub fn deliver_raised(&mut self, bus: &mut dyn Bus, rip: u64) -> Flow {
        let event = self.raised();
        if !self.s.efer.lma() {
            return self.deliver(bus, event, rip);
        }
        self.deliver_raised_in_steps(bus, rip)
    }

    /// Enters the handler of the fault raised by the instruction at `rip`, if that can be done [at once](crate::at_once):
    /// all of its delivery but what it takes of time.
    #[inline(always)]
    pub(crate) fn is_raised_entered_at_once(&mut self, rip: u64) -> bool {
        self.is_entered_at_once(self.raised(), rip)
    }

    /// The fault raised, field by field, as they were stored a moment ago.
    #[inline(always)]
    fn raised(&self) -> Event {
        let Fault { vector, ref code, address } = self.fault;
        Event::Fault(Fault { vector, code: code.as_ref().copied(), address })
    }

    #[inline(never)]
    fn deliver_raised_in_steps(&mut self, bus: &mut dyn Bus, rip: u64) -> Flow {
        let event = self.raised();
        self.deliver_in_steps(bus, event, rip)
    }

    #[inline(always)]
    fn is_entered_at_once(&mut self, event: Event, rip: u64) -> bool {
        if self.resume_at.is_some() || self.enter_at_once(event, rip).is_none() {
            return false;
        }
        self.note_address(event);
        true
    }

    #[inline(always)]
    fn deliver_in_steps(&mut self, bus: &mut dyn Bus, event: Event, rip: u64) -> Flow {
        let rip = self.resume_at.take().unwrap_or(rip);
        let start = (self.s.segment(Seg::Cs).base, rip);
        match self.attempt(bus, event, rip) {
            Err(Stop::Fault) => self.deliver_fault_of(bus, event, start),
            flow => flow,
        }
    }

    /// The address of a page fault goes to CR2.
    #[inline(always)]
    fn note_address(&mut self, event: Event) {
        if let Event::Fault(Fault { vector: vector::PF, address, .. }) = event {
            self.s.cr2 = address;
        }
    }

    #[inline(always)]
    fn attempt(&mut self, bus: &mut dyn Bus, event: Event, rip: u64) -> Flow {
        self.note_address(event);
        if self.trace.is_some() {
            self.trace_event(event, rip);
        }
        self.deliver_once(bus, event, rip)?;
        self.clock = self.clock.plus(DELIVERY_COST.into());
        Ok(())
    }

    /// Delivering `event`, due at `start`, has faulted: delivers that fault, or a double fault.
    #[cold]
    #[inline(never)]
    fn deliver_fault_of(&mut self, bus: &mut dyn Bus, event: Event, start: (u64, u64)) -> Flow {
        let (mut event, mut rip) = (event, start.1);
        let mut chain: [Option<Fault>; 2] = [None, None];
        loop {
            rip = self.resume_at.take().unwrap_or(rip);
            let second = self.fault;
            let now = match event {
                Event::Fault(f) | Event::Trap(f) => Some(f),
                _ => None,
            };
            let first = now.unwrap_or(Fault { vector: event.vector(), code: None, address: 0 });
            if first.vector == vector::DF && now.is_some() {
                let triple = TripleFault {
                    at: start,
                    first: chain[0].unwrap_or(first),
                    second: chain[1].unwrap_or(first),
                    third: second,
                };
                self.s.activity = Activity::Shutdown;
                self.exit = Some(Exit::Shutdown(Box::new(triple)));
                return Err(Stop::Exit);
            }
            event = if now.is_some() && makes_double_fault(first.vector, second.vector) {
                chain = [Some(first), Some(second)];
                Event::Fault(Fault { vector: vector::DF, code: Some(0), address: 0 })
            } else {
                Event::Fault(second)
            };
            match self.attempt(bus, event, rip) {
                Err(Stop::Fault) => {}
                flow => return flow,
            }
        }
    }

    /// INT n and its kin: the gate is entered with return address `back`. A fault on the way is the
    /// instruction's own and is raised like any other.
    pub fn software_interrupt(&mut self, bus: &mut dyn Bus, event: Event, back: u64) -> Flow {
        if self.enter_at_once(event, back).is_none() {
            if self.trace.is_some() {
                self.trace_event(event, back);
            }
            self.deliver_once(bus, event, back)?;
        }
        // TF was cleared on the way; no trap before the handler's first instruction.
        self.watch.no_step = true;
        if event == Event::Icebp {
            self.s.pending_debug = 0;
        }
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn through_task_gate(&mut self, bus: &mut dyn Bus, event: Event, gate: Gate, rip: u64) -> Flow {
        let rf = self.s.rflags & rflags::RF;
        if matches!(event, Event::Fault(_)) {
            self.s.rflags |= rflags::RF;
        }
        let switched = self.task_switch(bus, Cause::Event(event.ext()), gate.selector, rip);
        if switched.is_err() && self.resume_at.is_none() {
            self.s.rflags = self.s.rflags & !rflags::RF | rf;
        }
        switched?;
        match event.code() {
            Some(code) => self.push_task_code(bus, code),
            None => Ok(()),
        }
    }

    #[inline(always)]
    fn deliver_once(&mut self, bus: &mut dyn Bus, event: Event, rip: u64) -> Flow {
        if !self.s.cr0.pe() {
            return self.deliver_real(bus, event.vector(), rip);
        }
        if let Event::Software(_) = event
            && self.s.is_v86()
            && self.s.rflags & rflags::IOPL != rflags::IOPL
        {
            return self.raise(Fault::GP0);
        }
        if self.s.efer.lma() {
            let gate = self.read_gate::<true>(bus, event)?;
            self.through_gate::<true>(bus, event, gate, rip)?;
        } else {
            self.deliver_legacy(bus, event, rip)?;
        }
        let debug =
            Event::Icebp == event || matches!(event, Event::Fault(f) | Event::Trap(f) if f.vector == vector::DB);
        if debug {
            self.s.dr7 &= !DR7_GD;
        }
        Ok(())
    }

    #[inline(always)]
    fn deliver_legacy(&mut self, bus: &mut dyn Bus, event: Event, rip: u64) -> Flow {
        let gate = self.read_gate::<false>(bus, event)?;
        if gate.attr.kind() == system::TASK_GATE {
            self.through_task_gate(bus, event, gate, rip)
        } else {
            self.through_gate::<false>(bus, event, gate, rip)
        }
    }

    /// Leaves the engine with "this guest needs what isn't implemented".
    pub fn unsupported(&mut self, what: &str, rip: u64) -> Flow {
        self.exit = Some(Exit::Unsupported(Box::new(Unsupported { what: what.to_owned(), rip })));
        Err(Stop::Exit)
    }

    /// Real-address mode: the IVT ("Interrupt and Exception Handling" in real-address mode).
    fn deliver_real(&mut self, bus: &mut dyn Bus, vector: u8, rip: u64) -> Flow {
        let at = u64::from(vector) * 4;
        if at + 3 > u64::from(self.s.idtr.limit) {
            return self.raise(Fault::gp(u32::from(vector) * 8 + 2));
        }
        let entry = self.read_system::<u32>(bus, self.s.idtr.base.wrapping_add(at))?;
        let mut frame = Frame::on_current_stack(self);
        frame.push(self, bus, 2, self.rflags())?;
        frame.push(self, bus, 2, u64::from(self.s.segment(Seg::Cs).selector))?;
        frame.push(self, bus, 2, rip)?;
        frame.commit_pointer(self);
        self.set_rflags(self.rflags() & !(rflags::IF | rflags::TF | rflags::AC | rflags::RF));
        let cs = &mut self.s.seg[Seg::Cs as usize];
        cs.selector = (entry >> 16) as u16;
        cs.base = u64::from(cs.selector) << 4;
        self.segments_changed();
        self.next_rip = entry & 0xffff;
        Ok(())
    }

    /// The gate of `event`, checked; `LONG` is IA-32e mode.
    #[inline(always)]
    fn read_gate<const LONG: bool>(&mut self, bus: &mut dyn Bus, event: Event) -> Result<Gate, Stop> {
        let v = event.vector();
        let code = u32::from(v) * 8 + 2 + event.ext();
        let size = if LONG { 16 } else { 8 };
        let at = u64::from(v) * size;
        if at + size - 1 > u64::from(self.s.idtr.limit) {
            return self.raise(Fault::gp(code));
        }
        let base = self.s.idtr.base.wrapping_add(at);
        let gate = if !LONG {
            Gate::legacy(self.read_system::<u64>(bus, base)?)
        } else if let Some(off) = self.mmu.lookup_system_read(umbra_arch::Gva::new(base), 16) {
            let [low, high] = self.mem.load_words(off);
            Gate::long(low, high)
        } else {
            let low = self.read_system::<u64>(bus, base)?;
            Gate::long(low, self.read_system::<u64>(bus, base.wrapping_add(8))?)
        };
        let refused = event.asks_for_privilege() && gate.attr.dpl() < self.s.cpl;
        // Nearly always: present, an interrupt or trap gate of 32 or 64 bits.
        if gate.attr.0 & 0x9e == 0x8e && !refused {
            return Ok(gate);
        }
        let fits = match gate.attr.kind() {
            system::INTERRUPT_GATE | system::TRAP_GATE => true,
            system::INTERRUPT_GATE16 | system::TRAP_GATE16 | system::TASK_GATE => !LONG,
            _ => false,
        };
        if !fits || gate.attr.is_code_or_data() || refused {
            return self.raise(Fault::gp(code));
        }
        if !gate.attr.is_present() {
            return self.raise(Fault::np(code));
        }
        Ok(gate)
    }

    #[inline(always)]
    fn through_gate<const LONG: bool>(&mut self, bus: &mut dyn Bus, event: Event, gate: Gate, rip: u64) -> Flow {
        let ext = event.ext();
        let cs = self.handler_segment(bus, gate.selector, ext)?;
        let old_cpl = self.s.cpl;
        let new_cpl = if cs.attr.is_conforming() { old_cpl } else { cs.attr.dpl() };
        let v86 = !LONG && self.s.is_v86();
        if v86 && new_cpl != 0 {
            return self.raise(Fault::gp(selector_code(gate.selector) | ext));
        }
        let resume = if event.resumes() { rflags::RF } else { 0 };
        let values = [
            u64::from(self.s.segment(Seg::Ss).selector),
            self.gpr[reg::RSP],
            self.rflags() | resume,
            u64::from(self.s.segment(Seg::Cs).selector),
            rip,
        ];
        let code = event.code();
        let inner = new_cpl < old_cpl;
        let (rsp, ss) = if LONG {
            let rsp = self.long_stack(bus, gate.ist, new_cpl, inner, ext)?;
            let frame = Frame { pointer: rsp, base: 0, mask: u64::MAX, cpl: new_cpl, limit: None };
            let rsp = frame.push_event::<u64, 5>(self, bus, values, code)?;
            (rsp, inner.then(|| Segment::null_stack(new_cpl)))
        } else {
            let wide = gate.attr.kind() & 8 != 0;
            if inner {
                let (esp, ss) = self.push_inner_frame(bus, new_cpl, wide, values, (code, ext))?;
                (esp, Some(ss))
            } else {
                let frame = Frame::on_checked_stack(self);
                (frame.push_each(self, bus, if wide { 4 } else { 2 }, &values[2..], code)?, None)
            }
        };
        let reachable = if LONG {
            umbra_arch::Gva::new(gate.offset).is_canonical(self.s.linear_bits())
        } else {
            gate.offset <= u64::from(cs.limit)
        };
        if !reachable {
            return self.raise(Fault::gp(ext));
        }
        // Nothing can fail any more.
        self.s.cpl = new_cpl;
        let mut clear = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
        if gate.attr.kind() & 1 == 0 {
            clear |= rflags::IF;
        }
        self.set_system_flags(self.s.rflags & !clear);
        let cs = Segment { selector: cs.selector & !3 | u16::from(new_cpl), ..cs };
        match ss {
            None => self.set_code_segment(cs),
            Some(ss) => self.enter_segments(cs, ss, v86),
        }
        self.set_stack_pointer(rsp);
        if inner {
            self.view_changed();
        }
        self.next_rip = gate.offset;
        Ok(())
    }

    /// The frame of an inner level's handler outside IA-32e mode: the new ESP and SS.
    #[inline(never)]
    fn push_inner_frame(
        &mut self,
        bus: &mut dyn Bus,
        cpl: u8,
        wide: bool,
        values: [u64; 5],
        (code, ext): (Option<u32>, u32),
    ) -> Result<(u64, Segment), Stop> {
        let (mut frame, ss) = self.inner_stack(bus, cpl, ext)?;
        if self.s.is_v86() {
            for seg in [Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es] {
                let selector = self.s.segment(seg).selector;
                frame.push(self, bus, if wide { 4 } else { 2 }, u64::from(selector))?;
            }
        }
        let esp = if wide {
            frame.push_event::<u32, 5>(self, bus, values, code)?
        } else {
            frame.push_event::<u16, 5>(self, bus, values, code)?
        };
        Ok((esp, ss))
    }

    /// The segments of an inner level's handler.
    #[inline(always)]
    fn enter_segments(&mut self, cs: Segment, ss: Segment, from_v86: bool) {
        if from_v86 {
            for seg in [Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es] {
                self.s.seg[seg as usize] = Segment::null(0);
            }
        }
        self.s.seg[Seg::Cs as usize] = cs;
        self.s.seg[Seg::Ss as usize] = ss;
        self.segments_changed();
    }

    #[inline(always)]
    fn handler_segment(&mut self, bus: &mut dyn Bus, selector: u16, ext: u32) -> Result<Segment, Stop> {
        let place = match self.loaded_before(selector, Rules::Handler(self.s.cpl)) {
            Some(place) => place,
            None => self.read_handler_segment(bus, selector, ext)?,
        };
        Ok(*self.loaded.at(place))
    }

    #[inline(never)]
    fn read_handler_segment(&mut self, bus: &mut dyn Bus, selector: u16, ext: u32) -> Result<Place, Stop> {
        if selector & 0xfffc == 0 {
            return self.raise(Fault::gp(ext));
        }
        let code = selector_code(selector) | ext;
        let read = self.read_descriptor(bus, selector, Fault::gp);
        if read.is_err() && self.fault.vector == vector::GP {
            self.fault.code = Some(code);
        }
        let d = read?;
        let attr = d.attr();
        let wrong_size = self.s.efer.lma() && (!attr.is_long() || attr.is_big());
        if !attr.is_code() || attr.dpl() > self.s.cpl || wrong_size {
            return self.raise(Fault::gp(code));
        }
        if !attr.is_present() {
            return self.raise(Fault::np(code));
        }
        self.mark_descriptor(bus, selector, d, crate::segments::ACCESSED)?;
        Ok(self.loads(selector, d, Rules::Handler(self.s.cpl)))
    }

    /// "64-Bit Mode Stack Frame", "Interrupt Stack Table": the new RSP, aligned to 16 bytes.
    fn long_stack(&mut self, bus: &mut dyn Bus, ist: u8, cpl: u8, inner: bool, ext: u32) -> Result<u64, Stop> {
        let rsp = if ist != 0 {
            self.tss_pointer(bus, 0x24 + 8 * u64::from(ist - 1), ext)?
        } else if inner {
            self.tss_pointer(bus, 4 + 8 * u64::from(cpl), ext)?
        } else {
            self.gpr[reg::RSP]
        };
        Ok(rsp & !15)
    }

    fn tss_pointer(&mut self, bus: &mut dyn Bus, offset: u64, ext: u32) -> Result<u64, Stop> {
        let tr = *self.s.segment(Seg::Tr);
        if offset + 7 > u64::from(tr.limit) {
            return self.raise(Fault::ts(selector_code(tr.selector) | ext));
        }
        self.read_system::<u64>(bus, tr.base.wrapping_add(offset))
    }

    /// SS:ESP of ring `cpl` from a 32- or 16-bit TSS, checked ("Stack Switching").
    pub fn inner_stack(&mut self, bus: &mut dyn Bus, cpl: u8, ext: u32) -> Result<(Frame, Segment), Stop> {
        let tr = *self.s.segment(Seg::Tr);
        let wide = tr.attr.kind() & 8 != 0;
        let (at, bytes) = if wide { (4 + 8 * u64::from(cpl), 8) } else { (2 + 4 * u64::from(cpl), 4) };
        if tr.attr.is_unusable() || at + bytes - 1 > u64::from(tr.limit) {
            return self.raise(Fault::ts(selector_code(tr.selector) | ext));
        }
        let (esp, ss) = if wide {
            let esp = self.read_system::<u32>(bus, tr.base.wrapping_add(at))?;
            (esp, self.read_system::<u16>(bus, tr.base.wrapping_add(at + 4))?)
        } else {
            let sp = self.read_system::<u16>(bus, tr.base.wrapping_add(at))?;
            (sp, self.read_system::<u16>(bus, tr.base.wrapping_add(at + 2))?)
        };
        let segment = self.stack_segment(bus, ss as u16, cpl, Fault::ts);
        if segment.is_err() && matches!(self.fault.vector, vector::TS | vector::SS) {
            self.fault.code = self.fault.code.map(|code| code | ext);
        }
        let segment = segment?;
        let mask = if segment.attr.is_big() { 0xffff_ffff } else { 0xffff };
        Ok((Frame { pointer: esp, base: segment.base, mask, cpl, limit: Some(segment) }, segment))
    }
}
