//! The run loop: the earliest CPU runs until the next event, then the event happens.

use crate::machine::{Cpu, Machine, Rest};
use crate::outcome::{End, Halted, Stop};
use crate::pc::{CpuSignal, Request};
use std::collections::VecDeque;
use umbra_arch::control::Cr0;
use umbra_arch::segment::{Seg, Segment};
use umbra_arch::state::Activity;
use umbra_arch::{CpuState, Exit, Slice, Vcpu, VirtualTime, rflags};

/// Longest slice: the host's wishes are looked at this often, in virtual time.
const SLICE_NS: u64 = 1_000_000;
/// How far one CPU may run ahead of another.
const TURN_NS: u64 = 20_000;
/// How often the host's input is looked at.
const INPUT_NS: u64 = 1_000_000;
/// With every CPU halted and interrupts off, only an NMI could help, and what sends NMIs here does so
/// more often than this.
const MASKED_PATIENCE_NS: u64 = 2_000_000_000;
/// With interrupts on, a timer that wakes nobody for an hour wakes nobody ever.
const IDLE_PATIENCE_NS: u64 = 3_600_000_000_000;

/// The outside of the machine. Nothing here is asked in the middle of a slice. What isn't implemented never
/// interferes: no input, no end, no pace.
pub trait Host {
    /// The guest sent bytes on its first serial port.
    fn serial(&mut self, bytes: &[u8]);
    /// The guest wrote to the debug console.
    fn debug(&mut self, _bytes: &[u8]) {}
    /// Appends what arrived for the guest's serial port; called at event points only.
    fn input(&mut self, _into: &mut VecDeque<u8>) {}
    /// Whether input may come at all. Constant during a run.
    fn has_input(&self) -> bool {
        false
    }
    /// Whether the run must end for a reason outside the guest.
    fn stop(&mut self) -> Option<Stop> {
        None
    }
    /// Virtual time is about to be `now`: a host that paces it waits until then. `idle` says that no
    /// CPU runs: then an earlier time may be given if input came.
    fn pace(&mut self, now: VirtualTime, _idle: bool) -> VirtualTime {
        now
    }
}

impl<V: Vcpu> Machine<V> {
    /// Runs until something ends it. `limit` is a virtual time, for tests and snapshots: one CPU stops
    /// there exactly, several at the first change of turns at or after it, so that stopping and going
    /// on changes nothing in what they see of each other.
    pub fn run(&mut self, host: &mut dyn Host, limit: Option<VirtualTime>) -> End {
        if host.has_input() {
            self.pc.schedule_host_input(Some(self.now.plus(INPUT_NS)));
        }
        let end = loop {
            self.flush(host);
            if let Some(end) = self.requested() {
                break end;
            }
            if let Some(failure) = self.memory.page_failure() {
                break End::MemoryFile(failure.clone());
            }
            if let Some(stop) = host.stop() {
                break End::Stopped(stop);
            }
            self.take_signals();
            let end = match self.next_to_run() {
                Some(index) => self.turn(index, host, limit),
                None => self.idle(host, limit),
            };
            if let Some(end) = end {
                break end;
            }
        };
        if end.is_final() {
            // The slice that it came in isn't over, but nothing follows.
            self.now = self.now.max(self.furthest());
        }
        self.flush(host);
        end
    }

    /// The time that the CPU furthest ahead has reached.
    fn furthest(&self) -> VirtualTime {
        self.cpus.iter().map(|cpu| cpu.time).max().unwrap_or(self.now)
    }

    fn flush(&mut self, host: &mut dyn Host) {
        let serial = self.pc.serial_mut();
        if serial.is_empty() {
            return;
        }
        let (bytes, debug) = (serial.take(), serial.take_debug());
        if !bytes.is_empty() {
            host.serial(&bytes);
        }
        if !debug.is_empty() {
            host.debug(&debug);
        }
    }

    fn requested(&mut self) -> Option<End> {
        self.pc.take_request().map(|request| match request {
            Request::PowerOff => End::PowerOff,
            Request::Reset => End::Reset,
            Request::DebugExit(value) => End::DebugExit(value),
            Request::Expected => End::Expected,
            Request::Mark(id) => End::Mark(id),
            Request::Sleep(state) => End::Unsupported(umbra_arch::exit::Unsupported {
                what: format!("ACPI sleep state type {state}"),
                rip: self.cpus.first().map_or(0, |cpu| cpu.engine.state().rip),
            }),
        })
    }

    /// The CPU that is earliest among those that have something to do.
    fn next_to_run(&self) -> Option<usize> {
        let awake = |index: &usize| match self.cpus[*index].rest {
            Rest::Running => true,
            Rest::Halted { masked, nmi_blocked, watching } => {
                !nmi_blocked && self.pc.nmi_pending(*index)
                    || (!masked || watching) && self.pc.interrupt_pending(*index)
            }
            Rest::WaitForSipi => false,
        };
        (0..self.cpus.len()).filter(awake).min_by_key(|&index| (self.cpus[index].time, index))
    }

    /// One slice of one CPU, or the events before it.
    fn turn(&mut self, index: usize, host: &mut dyn Host, limit: Option<VirtualTime>) -> Option<End> {
        self.idle_since = None;
        let cpu = &mut self.cpus[index];
        if cpu.rest != Rest::Running {
            cpu.rest = Rest::Running;
            cpu.time = cpu.time.max(self.now).max(self.pc.latest);
        }
        let start = cpu.time;
        if limit.is_some_and(|limit| start >= limit) {
            self.now = self.now.max(start);
            return Some(End::Limit);
        }
        if self.pc.next_event().is_some_and(|event| event <= start) {
            self.happen(start, host);
            return None;
        }
        self.now = self.now.max(start);
        let until = self.slice_end(index, start, limit);
        let has_rivals = self.rivals(index).next().is_some();
        self.pc.set_rivals(has_rivals);
        let stopped = self.cpus[index].engine.run(&mut self.pc.bus(index, until), Slice { now: start, until });
        let now = stopped.now.max(start);
        self.wake_watchers(now);
        self.cpus[index].time = if self.pc.take_yield() { self.after_pause(index, now) } else { now };
        host.pace(now, false);
        self.after(index, stopped.exit)
    }

    /// CPUs that wait by MWAIT for what was stored before `now` go on.
    fn wake_watchers(&mut self, now: VirtualTime) {
        for cpu in self.cpus.iter_mut().filter(|cpu| matches!(cpu.rest, Rest::Halted { watching: true, .. })) {
            if cpu.engine.wait_is_over() {
                cpu.rest = Rest::Running;
                cpu.time = cpu.time.max(now);
            }
        }
    }

    fn slice_end(&self, index: usize, start: VirtualTime, limit: Option<VirtualTime>) -> VirtualTime {
        let watched = self.cpus.iter().any(|cpu| matches!(cpu.rest, Rest::Halted { watching: true, .. }));
        let turn = self.rivals(index).map(|time| time.max(start)).chain(watched.then_some(start)).min();
        let turn = turn.map(|time| time.plus(TURN_NS));
        let limit = limit.filter(|_| self.cpus.len() == 1);
        [Some(start.plus(SLICE_NS)), self.pc.next_event(), limit, turn].into_iter().flatten().min().unwrap_or(start)
    }

    /// The times of the other CPUs that run.
    fn rivals(&self, index: usize) -> impl Iterator<Item = VirtualTime> + '_ {
        let running = move |&(i, cpu): &(usize, &Cpu<V>)| i != index && cpu.rest == Rest::Running;
        self.cpus.iter().enumerate().filter(running).map(|(_, cpu)| cpu.time)
    }

    /// A CPU that paused at `now` waits for the earliest other one, but never past an event.
    fn after_pause(&self, index: usize, now: VirtualTime) -> VirtualTime {
        let other = self.rivals(index).min().unwrap_or(now);
        let event = self.pc.next_event().unwrap_or(other);
        now.max(other.min(event))
    }

    /// Lets the events up to `now` happen, the host's input among them.
    fn happen(&mut self, now: VirtualTime, host: &mut dyn Host) {
        self.now = self.now.max(now);
        if self.pc.deliver_due(now) {
            host.input(&mut self.input);
            while let Some(&byte) = self.input.front() {
                if !self.pc.receive_serial(byte) {
                    break;
                }
                self.input.pop_front();
            }
            self.pc.schedule_host_input(Some(now.plus(INPUT_NS)));
        }
        self.wake_watchers(now);
    }

    fn after(&mut self, index: usize, exit: Exit) -> Option<End> {
        let Cpu { engine, rest, .. } = &mut self.cpus[index];
        match exit {
            Exit::BudgetSpent | Exit::Attention => None,
            Exit::Halted => {
                let state = engine.state();
                *rest = Rest::Halted {
                    masked: state.rflags & rflags::IF == 0,
                    nmi_blocked: state.nmi_blocked,
                    watching: state.activity == Activity::Waiting,
                };
                None
            }
            Exit::WaitForSipi => {
                *rest = Rest::WaitForSipi;
                None
            }
            Exit::Shutdown(fault) => Some(End::TripleFault(*fault)),
            Exit::ShutdownUnseen { rip } => Some(End::ShutdownUnseen(rip)),
            Exit::Unsupported(what) => Some(End::Unsupported(*what)),
            Exit::Refused(refusal) => Some(End::Refused(*refusal)),
        }
    }

    /// No CPU has anything to do: time goes on to the next event.
    fn idle(&mut self, host: &mut dyn Host, limit: Option<VirtualTime>) -> Option<End> {
        // The CPUs' own times may be ahead of the events': what they did lies in the past now.
        self.now = self.now.max(self.furthest());
        let since = *self.idle_since.get_or_insert(self.now);
        let patience = if self.deaf() { MASKED_PATIENCE_NS } else { IDLE_PATIENCE_NS };
        let next = self.pc.next_event().map(|event| event.max(self.now));
        let hopeless = next.is_none() || self.now.since(since) > patience && (self.deaf() || !host.has_input());
        if hopeless {
            return Some(End::HaltedForever(self.halted()));
        }
        let next = next.unwrap_or(self.now);
        if let Some(limit) = limit.filter(|&limit| next >= limit) {
            self.now = self.now.max(limit);
            self.cpus.iter_mut().for_each(|cpu| cpu.time = cpu.time.max(limit));
            return Some(End::Limit);
        }
        let reached = host.pace(next, true);
        if reached < next {
            // Input came while waiting: it enters now.
            self.pc.schedule_host_input(Some(reached.max(self.now)));
        }
        self.happen(reached.min(next).max(self.now), host);
        None
    }

    /// Whether nothing but an NMI could wake a CPU.
    fn deaf(&self) -> bool {
        use Rest::{Halted, Running};
        let hears = |rest| matches!(rest, Running | Halted { masked: false, .. } | Halted { watching: true, .. });
        !self.cpus.iter().any(|cpu| hears(cpu.rest))
    }

    fn halted(&self) -> Halted {
        let state = self.cpus.first().map(|cpu| cpu.engine.state());
        Halted { rip: state.as_ref().map_or(0, |state| state.rip), interrupts_enabled: !self.deaf() }
    }

    /// INIT and start-up requests that arrived at the local APICs.
    fn take_signals(&mut self) {
        for index in 0..self.cpus.len() {
            let Some(signal) = self.pc.take_cpu_signal(index) else { continue };
            let signature = self.profile.signature();
            let cpu = &mut self.cpus[index];
            let old = cpu.engine.state();
            match signal {
                CpuSignal::Init => {
                    cpu.rest = if index == 0 { Rest::Running } else { Rest::WaitForSipi };
                    cpu.time = cpu.time.max(self.pc.latest);
                    cpu.engine.set_state(&after_init(&old, signature, index == 0));
                }
                CpuSignal::StartUp(page) if cpu.rest == Rest::WaitForSipi => {
                    cpu.rest = Rest::Running;
                    cpu.time = cpu.time.max(self.now).max(self.pc.latest);
                    cpu.engine.set_state(&after_startup(old, page));
                }
                CpuSignal::StartUp(_) => {}
            }
        }
    }
}

/// "Processor State After Reset", column INIT: x87, SSE, MSRs and the time-stamp counter survive.
fn after_init(old: &CpuState, signature: u32, bootstrap: bool) -> CpuState {
    let mut state = CpuState::reset();
    state.cr0 = Cr0::new(old.cr0.raw() & (Cr0::CD | Cr0::NW) | Cr0::ET);
    state.gpr[umbra_arch::state::reg::RDX] = signature.into();
    state.msr = old.msr.clone();
    state.fp = old.fp;
    state.xcr0 = old.xcr0;
    state.activity = if bootstrap { Activity::Running } else { Activity::WaitForSipi };
    state
}

/// "Typical BSP Initialization Sequence": the vector is the number of the page to start at.
fn after_startup(mut state: CpuState, page: u8) -> CpuState {
    state.seg[Seg::Cs as usize] =
        Segment { base: u64::from(page) << 12, selector: u16::from(page) << 8, ..Segment::real(0) };
    state.rip = 0;
    state.activity = Activity::Running;
    state
}
