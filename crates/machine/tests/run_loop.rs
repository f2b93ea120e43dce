//! The run loop with a scripted CPU: ends, events, halts, and a host that interferes.

use std::collections::VecDeque;
use std::sync::Arc;
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::exit::{TripleFault, Unsupported};
use umbra_arch::{AccessWidth, Bus, CpuState, Exit, Fault, Slice, Stopped, Vcpu, VirtualTime, rflags};
use umbra_machine::{End, Halted, Host, Machine, MachineConfig, Stop, guest_memory};

/// One instruction of the script; each takes a nanosecond besides what it says.
#[derive(Clone, Debug)]
enum Step {
    Out(u16, u8),
    Spin(u64),
    Hlt,
    Sti,
    Cli,
    Exit(Exit),
    /// Writes the vectors taken so far to COM1, as text.
    Tell,
    Jump(usize),
}
use Step::*;

/// A CPU that runs a script and takes interrupts between its steps.
#[derive(Debug)]
struct Script {
    steps: Vec<Step>,
    at: usize,
    spun: u64,
    halted: bool,
    enabled: bool,
    vectors: Vec<(u8, u64)>,
    retired: u64,
}

impl Script {
    fn new(steps: &[Step]) -> Self {
        let steps = steps.to_vec();
        Self { steps, at: 0, spun: 0, halted: false, enabled: false, vectors: Vec::new(), retired: 0 }
    }

    fn step(&mut self, bus: &mut dyn Bus, now: &mut VirtualTime, until: VirtualTime) -> Option<Exit> {
        let mut attention = false;
        let mut out = |bus: &mut dyn Bus, now: &mut VirtualTime, port, value: u8| {
            let reply = bus.port_write(*now, port, AccessWidth::Byte, value.into());
            *now = now.plus(reply.cost.into());
            attention |= reply.attention;
        };
        match self.steps.get(self.at).cloned().unwrap_or(Step::Exit(Exit::Halted)) {
            Out(port, value) => out(bus, now, port, value),
            Tell => {
                let text = format!("{:x?};", self.vectors.iter().map(|v| v.0).collect::<Vec<_>>());
                text.bytes().for_each(|byte| out(bus, now, 0x3f8, byte));
            }
            Spin(ns) => {
                let run = (ns - self.spun).min(until.since(*now).max(1));
                self.spun += run;
                *now = now.plus(run - 1);
                if self.spun < ns {
                    *now = now.plus(1);
                    return None;
                }
                self.spun = 0;
            }
            Hlt => self.halted = true,
            Sti => self.enabled = true,
            Cli => self.enabled = false,
            Jump(to) => self.at = to.wrapping_sub(1),
            Exit(exit) => return Some(exit),
        }
        *now = now.plus(1);
        self.retired += 1;
        self.at = self.at.wrapping_add(1);
        attention.then_some(umbra_arch::Exit::Attention)
    }
}

impl Vcpu for Script {
    fn run(&mut self, bus: &mut dyn Bus, slice: Slice) -> Stopped {
        let mut now = slice.now;
        loop {
            if self.enabled
                && bus.interrupt_pending()
                && let Some(vector) = bus.interrupt_acknowledge(now)
            {
                self.vectors.push((vector, now.0));
                self.halted = false;
                bus.port_write(now, 0x20, AccessWidth::Byte, 0x20);
            }
            if self.halted {
                return Stopped { exit: umbra_arch::Exit::Halted, now };
            }
            if now >= slice.until {
                return Stopped { exit: umbra_arch::Exit::BudgetSpent, now };
            }
            if let Some(exit) = self.step(bus, &mut now, slice.until) {
                return Stopped { exit, now };
            }
        }
    }
    fn state(&self) -> CpuState {
        let mut state = CpuState::reset();
        state.rip = self.at as u64;
        state.rflags |= if self.enabled { rflags::IF } else { 0 };
        state
    }
    fn set_state(&mut self, _: &CpuState) {}
    fn retired(&self) -> u64 {
        self.retired
    }
}

/// A host that collects output and stops every `stop_every` questions.
#[derive(Default)]
struct Recorder {
    serial: Vec<u8>,
    stop_every: Option<u32>,
    asked: u32,
    keys: VecDeque<u8>,
    input: bool,
}

impl Host for Recorder {
    fn serial(&mut self, bytes: &[u8]) {
        self.serial.extend_from_slice(bytes);
    }
    fn input(&mut self, into: &mut VecDeque<u8>) {
        into.append(&mut self.keys);
    }
    fn has_input(&self) -> bool {
        self.input
    }
    fn stop(&mut self) -> Option<Stop> {
        self.asked += 1;
        self.stop_every.filter(|every| self.asked.is_multiple_of(*every)).map(|_| Stop::Timeout)
    }
}

fn machine(steps: &[Step]) -> Machine<Script> {
    let profile = CpuidProfile::named("umbra-v2").unwrap();
    let memory = guest_memory(4 << 20).unwrap();
    Machine::new(Arc::clone(&memory), &MachineConfig { profile, rtc_start: 0 }, vec![Script::new(steps)]).unwrap()
}

fn run(steps: &[Step]) -> (End, Vec<u8>, u64) {
    let (mut machine, mut host) = (machine(steps), Recorder::default());
    let end = machine.run(&mut host, None);
    (end, host.serial, machine.now().0)
}

/// 8254 with a period of 1193 ticks, about a millisecond; then 8259s at 20h and 28h with only IRQ 0 open.
/// In this order, since choosing the 8254's mode raises its output.
fn timer() -> Vec<Step> {
    let pics = [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xfe), (0xa1, 0xff)];
    let pit = [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)];
    pit.into_iter().chain(pics).map(|(port, value)| Out(port, value)).collect()
}

#[test]
fn each_exit_is_an_end() {
    assert_eq!(run(&[Out(0xf4, 0x10)]).0, End::DebugExit(0x10));
    assert_eq!(run(&[Out(0x605, 0x20), Spin(1000)]).0, End::PowerOff);
    assert_eq!(run(&[Out(0xcf9, 6)]).0, End::Reset);
    let fault = TripleFault { at: (0, 0x1234), first: Fault::GP0, second: Fault::GP0, third: Fault::GP0 };
    assert_eq!(run(&[Step::Exit(umbra_arch::Exit::Shutdown(Box::new(fault)))]).0, End::TripleFault(fault));
    let what = Unsupported { what: "VMX".into(), rip: 1 };
    assert_eq!(run(&[Step::Exit(umbra_arch::Exit::Unsupported(Box::new(what.clone())))]).0, End::Unsupported(what));
}

#[test]
fn the_end_has_the_time_of_its_instruction() {
    let fault = TripleFault { at: (0, 0), first: Fault::GP0, second: Fault::GP0, third: Fault::GP0 };
    let shutdown = Step::Exit(umbra_arch::Exit::Shutdown(Box::new(fault)));
    for spin in [1, 700, 1_000_500, 3_000_000] {
        assert_eq!(run(&[Spin(spin), shutdown.clone()]).2, spin);
        let cost = run(&[Out(0xf4, 0x10)]).2;
        assert!(cost > 0);
        assert_eq!(run(&[Spin(spin), Out(0xf4, 0x10)]).2, spin + cost);
    }
}

#[test]
fn halt_with_interrupts_off_is_found_even_if_a_timer_runs() {
    let masked = |rip| End::HaltedForever(Halted { rip, interrupts_enabled: false });
    assert_eq!(run(&[Cli, Hlt]).0, masked(2));
    let mut steps = timer();
    steps.extend([Cli, Hlt]);
    let (end, _, now) = run(&steps);
    assert_eq!(end, masked(steps.len() as u64));
    assert!(now < 10_000_000_000, "found after {now} ns");
}

#[test]
fn halt_that_nothing_can_end_is_found() {
    assert_eq!(run(&[Sti, Hlt]).0, End::HaltedForever(Halted { rip: 2, interrupts_enabled: true }));
}

#[test]
fn timer_wakes_a_halted_cpu_at_its_time() {
    let mut steps = timer();
    steps.push(Sti);
    steps.extend([Hlt, Hlt, Hlt, Tell, Out(0xf4, 0)]);
    let mut machine = machine(&steps);
    let mut host = Recorder::default();
    assert_eq!(machine.run(&mut host, None), End::DebugExit(0));
    assert_eq!(host.serial, b"[20, 20, 20];");
    let times: Vec<u64> = machine.vcpu(0).unwrap().vectors.iter().map(|v| v.1).collect();
    for pair in times.windows(2) {
        let period = pair[1] - pair[0];
        assert!((999_800..1_000_000).contains(&period), "1193 ticks of 1.193182 MHz, not {period}");
    }
}

#[test]
fn busy_cpu_is_interrupted_at_the_event() {
    let mut steps = timer();
    steps.extend([Sti, Spin(3_500_000), Tell, Out(0xf4, 0)]);
    assert_eq!(run(&steps).1, b"[20, 20, 20];");
}

#[test]
fn expected_string_ends_the_run_at_its_last_byte() {
    let mut machine = machine(&[Out(0x3f8, b'o'), Out(0x3f8, b'k'), Out(0x3f8, b'!'), Out(0xf4, 0)]);
    machine.pc_mut().serial_mut().expect(b"ok");
    let mut host = Recorder::default();
    assert_eq!(machine.run(&mut host, None), End::Expected);
    assert_eq!(host.serial, b"ok");
}

#[test]
fn limit_stops_where_it_says() {
    let mut machine = machine(&[Spin(1_000_000_000)]);
    let mut host = Recorder::default();
    assert_eq!(machine.run(&mut host, Some(VirtualTime(12_345_678))), End::Limit);
    assert_eq!(machine.now().0, 12_345_678);
}

/// The wall clock is looked at between slices only: stopping and going on changes nothing.
#[test]
fn host_stops_change_nothing_that_a_guest_sees() {
    let mut steps = timer();
    let start = steps.len() + 1;
    steps.extend([Sti, Hlt, Spin(700_000), Tell, Out(0x3f8, b'\n')]);
    steps.push(Jump(start));
    let observe = |stop_every| {
        let mut machine = machine(&steps);
        let mut host = Recorder { stop_every, ..Recorder::default() };
        let limit = Some(VirtualTime(30_000_000));
        while machine.run(&mut host, limit) != End::Limit {}
        (host.serial, machine.retired(), machine.now(), machine.vcpu(0).unwrap().vectors.clone())
    };
    let undisturbed = observe(None);
    assert!(undisturbed.0.len() > 100);
    for every in 2..9 {
        assert_eq!(observe(Some(every)), undisturbed, "stopping at every {every}th question");
    }
}

#[test]
fn typed_bytes_arrive_in_order_and_none_is_lost() {
    // IRQ 4 open, receiver interrupt on, FIFO off: one byte an interrupt, read and echoed.
    let mut steps: Vec<Step> = [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xef), (0xa1, 0xff)]
        .into_iter()
        .chain([(0x3fc, 8), (0x3f9, 1)])
        .map(|(port, value)| Out(port, value))
        .collect();
    steps.extend([Sti, Hlt, Tell, Out(0xf4, 0)]);
    let mut machine = machine(&steps);
    let mut host = Recorder { input: true, keys: VecDeque::from(b"hello".to_vec()), ..Recorder::default() };
    assert_eq!(machine.run(&mut host, None), End::DebugExit(0));
    assert_eq!(host.serial, b"[24];", "typing woke the CPU");
}

#[test]
fn impossible_machines_are_refused() {
    let profile = CpuidProfile::named("umbra-v2").unwrap();
    let memory = guest_memory(4 << 20).unwrap();
    let config = MachineConfig { profile, rtc_start: 0 };
    for count in [0, 33] {
        let engines = (0..count).map(|_| Script::new(&[])).collect();
        let error = Machine::<Script>::new(Arc::clone(&memory), &config, engines).unwrap_err();
        assert!(error.to_string().contains("use 1 to 32"), "{error}");
    }
    assert!(guest_memory(1 << 20).unwrap_err().to_string().contains("-m"));
}
