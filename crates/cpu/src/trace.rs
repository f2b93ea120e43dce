//! Traces: instructions, exceptions, device accesses and changes of address space, in text.
//!
//! Off, each costs one test of a pointer where something rare happens anyway. Instructions are traced by
//! running them one at a time; time, counters and results stay what they are.

use crate::core::Core;
use crate::deliver::Event;
use crate::isa;
use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use umbra_arch::control::Effects;
use umbra_arch::paging::{Access, AccessKind};
use umbra_arch::segment::Seg;
use umbra_arch::{AccessWidth, Bus, Fault, Gpa, GpaPage, Gva, PageAnswer, PageContext, Reply, VirtualTime};
use umbra_memory::Backing;

/// Branches kept.
const KEPT: usize = 16;

/// The last branches that were noticed without looking for them: those into blocks that no link led to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Recent {
    ring: [(u64, u64); KEPT],
    next: usize,
    last: u64,
}

impl Recent {
    /// Notes a branch.
    #[inline]
    pub fn push(&mut self, from: u64, to: u64) {
        self.ring[self.next % KEPT] = (from, to);
        self.next = self.next.wrapping_add(1);
        self.last = to;
    }

    /// Notes where execution goes on after an exception, an interrupt or the like.
    #[inline]
    pub fn enter(&mut self, to: u64) {
        if self.last != to {
            self.push(self.last, to);
        }
    }

    /// From and to, oldest first.
    pub fn list(&self) -> Vec<(u64, u64)> {
        let known = self.next.min(KEPT);
        (self.next - known..self.next).map(|n| self.ring[n % KEPT]).collect()
    }
}

/// What to trace.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct What {
    /// Every instruction, disassembled, before it runs.
    pub instructions: bool,
    /// Exceptions and interrupts, when they are delivered.
    pub exceptions: bool,
    /// Port and device-memory accesses.
    pub io: bool,
    /// Commits of control registers, and what they mean to the MMU.
    pub mmu: bool,
}

/// One traced event.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// The CPU, from 0.
    pub cpu: u32,
    /// When.
    pub time: VirtualTime,
    /// Its kind: "insn", "exc", "io" or "mmu".
    pub kind: &'static str,
    /// In words.
    pub text: &'a str,
    /// In fields, where it is the MMU's.
    pub event: Option<&'a umbra_mmu::Event>,
}

/// Where records go; all CPUs share one.
pub type Sink = Arc<Mutex<dyn FnMut(&Record<'_>) + Send>>;

/// A trace in progress.
#[derive(Clone)]
pub struct Trace {
    /// What to trace.
    pub what: What,
    /// Linear addresses of the instructions that are traced; exceptions and instructions only.
    pub range: Range<u64>,
    /// The CPU's number, for the records.
    pub cpu: u32,
    /// Where records go.
    pub sink: Sink,
}

impl Trace {
    fn record(&self, time: VirtualTime, kind: &'static str, text: fmt::Arguments<'_>) {
        self.send(&Record { cpu: self.cpu, time, kind, text: &text.to_string(), event: None });
    }

    fn send(&self, record: &Record<'_>) {
        self.sink.lock().unwrap_or_else(PoisonError::into_inner)(record);
    }
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Trace({:?}, {:#x?})", self.what, self.range)
    }
}

impl Core {
    /// Whether instructions have to be run one at a time.
    #[inline]
    pub fn traces_instructions(&self) -> bool {
        self.trace.as_ref().is_some_and(|trace| trace.what.instructions)
    }

    fn linear_of(&self, rip: u64) -> u64 {
        self.seg_base[Seg::Cs as usize].wrapping_add(rip)
    }

    /// The instruction at `rip`, as far as it can be fetched.
    fn instruction_at(&self, rip: u64) -> Option<Instruction> {
        let lin = self.linear_of(rip);
        let access = Access::explicit(AccessKind::Fetch, self.s.cpl);
        let mut bytes = Vec::with_capacity(15);
        for n in 0..15 {
            let Ok(found) = self.mmu.peek(Gva::new(lin.wrapping_add(n)), access) else { break };
            if found.backing == Backing::Mmio {
                break;
            }
            let mut byte = [0];
            self.mem.peek(found.gpa, &mut byte);
            bytes.extend(byte);
        }
        let decoded = Decoder::with_ip(self.code_size as u32, &bytes, rip, DecoderOptions::NONE).decode();
        (!bytes.is_empty()).then_some(decoded)
    }

    /// Before the instruction at `rip`.
    #[cold]
    pub(crate) fn trace_instruction(&mut self, rip: u64) {
        if !self.traces_instructions() {
            return;
        }
        self.recent.enter(rip);
        let Some(trace) = self.trace.as_deref().filter(|t| t.range.contains(&self.linear_of(rip))) else { return };
        let Some(i) = self.instruction_at(rip) else { return };
        self.recent.last = i.next_ip();
        let cs = self.s.segment(Seg::Cs).selector;
        trace.record(self.clock, "insn", format_args!("{cs:04x}:{rip:016x} {}{}", text(&i), self.note(&i)));
    }

    /// Why an instruction will raise #UD, if it is because of what Umbra or the CPU model lacks.
    fn note(&self, i: &Instruction) -> String {
        if i.is_invalid() {
            return "  ; no valid instruction: #UD".into();
        }
        match isa::row_of(i.code()) {
            None => "  ; not implemented: #UD".into(),
            Some((_, row)) => match row.needs.filter(|&feature| !self.profile.has(feature)) {
                Some(feature) => format!("  ; not offered by --cpu ({feature}): #UD"),
                None => String::new(),
            },
        }
    }

    /// Before an event is delivered with return address `rip`.
    #[cold]
    pub(crate) fn trace_event(&self, event: Event, rip: u64) {
        let Some(trace) = self.trace.as_deref().filter(|t| t.what.exceptions) else { return };
        if !trace.range.contains(&self.linear_of(rip)) {
            return;
        }
        let cs = self.s.segment(Seg::Cs).selector;
        let at = format!("{cs:04x}:{rip:016x} cpl {}", self.s.cpl);
        let record = |text: fmt::Arguments<'_>| trace.record(self.clock, "exc", text);
        match event {
            Event::Fault(fault) | Event::Trap(fault) => {
                let what = match self.instruction_at(rip) {
                    Some(i) if fault == Fault::UNDEFINED => format!(" by {}{}", text(&i), self.note(&i)),
                    Some(i) if matches!(event, Event::Fault(_)) => format!(" by {}", text(&i)),
                    _ => String::new(),
                };
                record(format_args!("{at} {fault}{what}"));
            }
            Event::External(vector) => record(format_args!("{at} interrupt {vector:#x}")),
            Event::Software(vector) | Event::Short(vector) => record(format_args!("{at} int {vector:#x}")),
            Event::Icebp => record(format_args!("{at} int1")),
        }
    }

    /// After a commit of control registers.
    #[cold]
    pub(crate) fn trace_commit(&mut self, effects: &Effects) {
        let Some(trace) = self.trace.as_deref().filter(|t| t.what.mmu) else { return };
        let r = &effects.regs;
        trace.record(
            self.clock,
            "mmu",
            format_args!(
                "commit rip {:#x} cr0 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} {:?}",
                self.block_rip,
                r.cr0.raw(),
                r.cr3.raw(),
                r.cr4.raw(),
                r.efer.raw(),
                r.mode()
            ),
        );
        self.trace_mmu();
    }

    /// What the MMU has done since the last call.
    #[cold]
    pub(crate) fn trace_mmu(&mut self) {
        let Some(trace) = self.trace.as_deref().filter(|t| t.what.mmu) else { return };
        for event in self.mmu.take_events() {
            let text = event.to_string();
            trace.send(&Record { cpu: trace.cpu, time: self.clock, kind: "mmu", text: &text, event: Some(&event) });
        }
    }

    /// The trace of device accesses, if it is on.
    pub(crate) fn io_trace(&self) -> Option<IoTrace> {
        let trace = self.trace.as_deref().filter(|t| t.what.io)?;
        Some(IoTrace { trace: trace.clone() })
    }
}

fn text(i: &Instruction) -> String {
    let mut out = String::new();
    if i.is_invalid() {
        return "(bad)".into();
    }
    let mut formatter = IntelFormatter::new();
    formatter.options_mut().set_hex_prefix("0x");
    formatter.options_mut().set_hex_suffix("");
    formatter.format(i, &mut out);
    out
}

/// The trace of device accesses during a slice.
pub(crate) struct IoTrace {
    trace: Trace,
}

impl IoTrace {
    /// `bus`, with every access traced.
    pub(crate) fn over<'a>(&'a mut self, bus: &'a mut dyn Bus) -> TracedBus<'a> {
        TracedBus { trace: &self.trace, bus }
    }
}

/// A bus that writes down what passes.
pub(crate) struct TracedBus<'a> {
    trace: &'a Trace,
    bus: &'a mut dyn Bus,
}

impl Bus for TracedBus<'_> {
    fn mmio_read(&mut self, now: VirtualTime, gpa: Gpa, width: AccessWidth) -> Reply<u64> {
        let reply = self.bus.mmio_read(now, gpa, width);
        self.trace.record(now, "io", format_args!("read {gpa} {} = {:#x}", width.bytes(), reply.value));
        reply
    }

    fn mmio_write(&mut self, now: VirtualTime, gpa: Gpa, width: AccessWidth, value: u64) -> Reply<()> {
        self.trace.record(now, "io", format_args!("write {gpa} {} = {value:#x}", width.bytes()));
        self.bus.mmio_write(now, gpa, width, value)
    }

    fn port_read(&mut self, now: VirtualTime, port: u16, width: AccessWidth) -> Reply<u32> {
        let reply = self.bus.port_read(now, port, width);
        self.trace.record(now, "io", format_args!("in {port:#x} {} = {:#x}", width.bytes(), reply.value));
        reply
    }

    fn port_write(&mut self, now: VirtualTime, port: u16, width: AccessWidth, value: u32) -> Reply<()> {
        self.trace.record(now, "io", format_args!("out {port:#x} {} = {value:#x}", width.bytes()));
        self.bus.port_write(now, port, width, value)
    }

    fn apic_msr_read(&mut self, now: VirtualTime, msr: u32) -> Result<Reply<u64>, Fault> {
        let reply = self.bus.apic_msr_read(now, msr);
        self.trace.record(now, "io", format_args!("rdmsr {msr:#x} = {:x?}", reply.map(|r| r.value)));
        reply
    }

    fn apic_msr_write(&mut self, now: VirtualTime, msr: u32, value: u64) -> Result<Reply<()>, Fault> {
        self.trace.record(now, "io", format_args!("wrmsr {msr:#x} = {value:#x}"));
        self.bus.apic_msr_write(now, msr, value)
    }

    fn read_cr8(&mut self) -> u8 {
        self.bus.read_cr8()
    }

    fn write_cr8(&mut self, now: VirtualTime, value: u8) -> Reply<()> {
        self.bus.write_cr8(now, value)
    }

    fn interrupt_pending(&mut self) -> bool {
        self.bus.interrupt_pending()
    }

    fn interrupt_acknowledge(&mut self, now: VirtualTime) -> Option<u8> {
        self.bus.interrupt_acknowledge(now)
    }

    fn take_nmi(&mut self) -> bool {
        self.bus.take_nmi()
    }

    fn shared_time(&mut self, now: VirtualTime) -> VirtualTime {
        self.bus.shared_time(now)
    }

    fn tsc_moved(&mut self, now: VirtualTime, offset: u64) -> Reply<()> {
        self.bus.tsc_moved(now, offset)
    }

    fn page_absent(&mut self, now: VirtualTime, page: GpaPage, context: PageContext) -> PageAnswer {
        let answer = self.bus.page_absent(now, page, context);
        self.trace.record(now, "io", format_args!("absent {} = {answer:?}", page.base()));
        answer
    }

    fn pause(&mut self, now: VirtualTime) -> Reply<()> {
        self.bus.pause(now)
    }

    fn a20(&self) -> bool {
        self.bus.a20()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_last() {
        let mut recent = Recent::default();
        assert!(recent.list().is_empty());
        for n in 1..=20 {
            recent.push(n, n + 100);
        }
        let list = recent.list();
        assert_eq!((list.len(), list[0], list[15]), (16, (5, 105), (20, 120)));
        recent.enter(120);
        assert_eq!(recent.list(), list, "going on is no branch");
        recent.enter(7);
        assert_eq!(recent.list()[15], (120, 7));
    }
}
