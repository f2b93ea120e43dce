//! Several scripted CPUs: start-up, turns, interrupts between them, pauses, limits.

use std::cell::RefCell;
use std::rc::Rc;
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::segment::Seg;
use umbra_arch::state::Activity;
use umbra_arch::{AccessWidth, Bus, CpuState, Exit, Gpa, Slice, Stopped, Vcpu, VirtualTime, rflags};
use umbra_machine::{End, Host, Machine, MachineConfig, Stop, guest_memory};

/// Longest time one CPU may be ahead of another that runs, in nanoseconds: a turn and an access.
const AHEAD: u64 = 20_000 + 2_000;
const ICR_LOW: u64 = 0xfee0_0300;
const ICR_HIGH: u64 = 0xfee0_0310;
const SVR: u64 = 0xfee0_00f0;
const EOI: u64 = 0xfee0_00b0;
const INIT: u64 = 0x4500;
const STARTUP: u64 = 0x4600;
const ALL_BUT_SELF: u64 = 0xc_0000;

/// What all CPUs share: their memory, and who did what when.
#[derive(Default, Debug, Clone, PartialEq)]
struct World {
    flags: [u64; 8],
    log: Vec<(u32, &'static str, u64)>,
}

#[derive(Clone, Debug)]
enum Step {
    Mmio(u64, u64),
    Spin(u64),
    Hlt,
    /// Waits as MWAIT does, until the flag has reached the value.
    Mwait(usize, u64),
    Sti,
    Log(&'static str),
    Add(usize),
    /// PAUSE until the flag has reached the value.
    Await(usize, u64),
    /// As `Await`, without PAUSE.
    Burn(usize, u64),
    /// Logs RDTSC.
    Tsc,
    Jump(usize),
    Out(u16, u8),
}
use Step::*;

#[derive(Debug)]
struct Script {
    id: u32,
    steps: Vec<Step>,
    world: Rc<RefCell<World>>,
    at: usize,
    spun: u64,
    halted: bool,
    watching: Option<(usize, u64)>,
    enabled: bool,
    waiting: bool,
    retired: u64,
}

impl Script {
    fn log(&self, what: &'static str, now: VirtualTime) {
        self.world.borrow_mut().log.push((self.id, what, now.0));
    }

    /// One step; whether attention was asked for.
    fn step(&mut self, bus: &mut dyn Bus, now: &mut VirtualTime, until: VirtualTime) -> bool {
        let mut attention = false;
        let mut settle = |now: &mut VirtualTime, reply: umbra_arch::Reply<()>| {
            *now = now.plus(reply.cost.into());
            attention |= reply.attention;
        };
        let step = self.steps.get(self.at).cloned().unwrap_or(Hlt);
        let mut again = false;
        match step {
            Mmio(gpa, value) => settle(now, bus.mmio_write(*now, Gpa::new(gpa), AccessWidth::Dword, value)),
            Out(port, value) => settle(now, bus.port_write(*now, port, AccessWidth::Byte, value.into())),
            Spin(ns) => {
                let run = (ns - self.spun).min(until.since(*now).max(1));
                self.spun += run;
                *now = now.plus(run - 1);
                again = self.spun < ns;
            }
            Hlt => self.halted = true,
            Mwait(flag, value) => self.watching = Some((flag, value)),
            Sti => self.enabled = true,
            Log(what) => self.log(what, *now),
            Add(flag) => self.world.borrow_mut().flags[flag] += 1,
            Await(flag, value) => {
                again = self.world.borrow().flags[flag] < value;
                if again {
                    settle(now, bus.pause(*now));
                }
            }
            Burn(flag, value) => again = self.world.borrow().flags[flag] < value,
            Tsc => {
                let shown = bus.shared_time(*now);
                self.log("tsc", shown);
            }
            Jump(to) => self.at = to.wrapping_sub(1),
        }
        *now = now.plus(1);
        self.retired += 1;
        if !again {
            self.spun = 0;
            self.at = self.at.wrapping_add(1);
        }
        attention
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
                self.world.borrow_mut().flags[7] += 1;
                self.log(if vector == 0x40 { "ipi" } else { "other" }, now);
                self.halted = false;
                bus.mmio_write(now, Gpa::new(EOI), AccessWidth::Dword, 0);
            }
            if self.halted || self.watching.is_some() {
                return Stopped { exit: Exit::Halted, now };
            }
            if now >= slice.until {
                return Stopped { exit: Exit::BudgetSpent, now };
            }
            if self.step(bus, &mut now, slice.until) {
                return Stopped { exit: Exit::Attention, now };
            }
        }
    }
    fn state(&self) -> CpuState {
        let mut state = CpuState::reset();
        state.rip = self.at as u64;
        state.rflags |= if self.enabled { rflags::IF } else { 0 };
        state.activity = match (self.waiting, self.watching) {
            (true, _) => Activity::WaitForSipi,
            (_, Some(_)) => Activity::Waiting,
            _ => Activity::Running,
        };
        state
    }
    fn set_state(&mut self, state: &CpuState) {
        self.waiting = state.activity == Activity::WaitForSipi;
        if !self.waiting && self.id > 0 {
            let cs = state.segment(Seg::Cs);
            assert_eq!((cs.base, u64::from(cs.selector), state.rip), (0x9_a000, 0x9a00, 0), "the page of the vector");
            self.at = 0;
        }
    }
    fn retired(&self) -> u64 {
        self.retired
    }
    fn wait_is_over(&mut self) -> bool {
        self.watching = self.watching.filter(|&(flag, value)| self.world.borrow().flags[flag] < value);
        self.watching.is_none()
    }
}

/// Stops at every n-th question.
struct Interfering(u32, u32);

impl Host for Interfering {
    fn serial(&mut self, _: &[u8]) {}
    fn stop(&mut self) -> Option<Stop> {
        self.1 += 1;
        (self.0 != 0 && self.1.is_multiple_of(self.0)).then_some(Stop::Timeout)
    }
}

fn machine(scripts: &[Vec<Step>]) -> (Machine<Script>, Rc<RefCell<World>>) {
    let world = Rc::new(RefCell::new(World::default()));
    let cpu = |(id, steps): (usize, &Vec<Step>)| Script {
        id: id as u32,
        steps: steps.clone(),
        world: Rc::clone(&world),
        at: 0,
        spun: 0,
        halted: false,
        watching: None,
        enabled: false,
        waiting: false,
        retired: 0,
    };
    let profile = CpuidProfile::named("umbra-v2").unwrap();
    let config = MachineConfig { profile, rtc_start: 0 };
    let engines = scripts.iter().enumerate().map(cpu).collect();
    (Machine::new(guest_memory(4 << 20).unwrap(), &config, engines).unwrap(), world)
}

/// The first CPU starts the others as the manual says, then goes on with `steps`.
fn starting(steps: &[Step]) -> Vec<Step> {
    let mut all = vec![Mmio(ICR_LOW, ALL_BUT_SELF | INIT), Spin(10_000)];
    for _ in 0..2 {
        all.extend([Mmio(ICR_LOW, ALL_BUT_SELF | STARTUP | 0x9a), Spin(200)]);
    }
    all.extend_from_slice(steps);
    all.push(Out(0xf4, 0));
    all
}

fn run(scripts: &[Vec<Step>]) -> World {
    let (mut machine, world) = machine(scripts);
    assert_eq!(machine.run(&mut Interfering(0, 0), None), End::DebugExit(0));
    drop(machine);
    Rc::try_unwrap(world).unwrap().into_inner()
}

/// When `cpu` logged `what` first.
fn when(world: &World, cpu: u32, what: &str) -> u64 {
    world.log.iter().find(|entry| entry.0 == cpu && entry.1 == what).unwrap_or_else(|| panic!("{world:?}")).2
}

#[test]
fn others_wait_for_their_start_up_interrupt() {
    let world =
        run(&[starting(&[Log("sent"), Spin(100_000)]), vec![Log("up"), Add(0), Hlt], vec![Log("up"), Add(0), Hlt]]);
    assert_eq!(world.flags[0], 2, "the second start-up interrupt is ignored");
    for cpu in [1, 2] {
        assert!((10_000..when(&world, 0, "sent") + 100).contains(&when(&world, cpu, "up")), "{world:?}");
    }
}

#[test]
fn an_interrupt_wakes_a_halted_cpu_at_once() {
    let send = [Mmio(ICR_HIGH, 1 << 24), Log("sent"), Mmio(ICR_LOW, 0x40), Spin(5_000_000)];
    let world = run(&[starting(&[&[Spin(300_000)], &send[..]].concat()), vec![Mmio(SVR, 0x1ff), Sti, Hlt, Hlt]]);
    let late = when(&world, 1, "ipi") - when(&world, 0, "sent");
    assert!(late < 100, "after {late} ns");
}

#[test]
fn who_waits_with_mwait_goes_on_after_the_store() {
    let first = starting(&[Spin(300_000), Mwait(0, 1), Log("goes on")]);
    let world = run(&[first, vec![Spin(3_000_000), Add(0), Log("stored"), Spin(3_000_000), Hlt]]);
    assert!(when(&world, 0, "goes on").abs_diff(when(&world, 1, "stored")) < AHEAD, "{world:?}");
    let (mut alone, _) = machine(&[vec![Mwait(0, 1), Out(0xf4, 0)]]);
    let end = alone.run(&mut Interfering(0, 0), None);
    assert!(matches!(end, End::HaltedForever(_)), "nobody can store anything: {end:?}");
}

#[test]
fn an_interrupt_reaches_a_running_cpu_within_its_turn() {
    let send = [Mmio(ICR_HIGH, 1 << 24), Log("sent"), Mmio(ICR_LOW, 0x40), Spin(5_000_000)];
    let world =
        run(&[starting(&[&[Spin(300_000)], &send[..]].concat()), vec![Mmio(SVR, 0x1ff), Sti, Spin(2_000_000), Hlt]]);
    assert!(when(&world, 1, "ipi").abs_diff(when(&world, 0, "sent")) < AHEAD, "{world:?}");
}

#[test]
fn who_pauses_lets_the_other_run() {
    let world = |wait: Step| {
        let scripts = [starting(&[wait, Log("seen")]), vec![Spin(3_000_000), Add(0), Log("done"), Hlt]];
        let (mut machine, world) = machine(&scripts);
        assert_eq!(machine.run(&mut Interfering(0, 0), None), End::DebugExit(0));
        let retired = machine.vcpu(0).unwrap().retired();
        assert!(when(&world.borrow(), 0, "seen").abs_diff(when(&world.borrow(), 1, "done")) < AHEAD);
        retired
    };
    let (paused, burnt) = (world(Await(0, 1)), world(Burn(0, 1)));
    assert!(paused < 1000 && burnt > 1_000_000, "{paused} steps against {burnt}");
}

#[test]
fn nobody_runs_far_ahead_and_clocks_never_go_back() {
    let work = [Log("at"), Tsc, Spin(3_777), Add(1), Jump(0)];
    let first = [Log("at"), Tsc, Spin(1_234), Jump(6)];
    let (mut machine, world) = machine(&[starting(&first), work.to_vec(), work.to_vec(), work.to_vec()]);
    assert_eq!(machine.run(&mut Interfering(0, 0), Some(VirtualTime(3_000_000))), End::Limit);
    let world = world.borrow();
    let mut latest = 0;
    let mut tsc = 0;
    for &(cpu, what, time) in world.log.iter().filter(|entry| entry.2 > 20_000) {
        if what == "tsc" {
            assert!(time >= tsc, "CPU {cpu} saw {time} after {tsc}");
            tsc = time;
        } else {
            assert!(time + AHEAD >= latest, "CPU {cpu} at {time} after {latest}");
            latest = latest.max(time);
        }
    }
    assert!(world.flags[1] > 2000 && world.log.iter().any(|entry| entry.0 == 3));
}

/// Neither the host's stops nor limits change who sees what when.
#[test]
fn interruptions_change_nothing() {
    let race =
        |n| vec![Mmio(SVR, 0x1ff), Sti, Log("at"), Add(n), Spin(711 + n as u64), Await(4, 3), Log("on"), Jump(2)];
    let first = [Add(4), Spin(50_000), Mmio(ICR_LOW, ALL_BUT_SELF | 0x40), Log("first"), Jump(6)];
    let scripts = [starting(&first), race(0), race(1), race(2)];
    let observe = |every: u32, step: u64| {
        let (mut machine, world) = machine(&scripts);
        let mut limit = step;
        while machine.now() < VirtualTime(2_000_000) {
            match machine.run(&mut Interfering(every, 0), Some(VirtualTime(limit.min(2_000_000)))) {
                End::Limit => limit += step,
                End::Stopped(_) => {}
                end => panic!("{end:?}"),
            }
        }
        (world.borrow().clone(), machine.now(), machine.retired())
    };
    let whole = observe(0, 2_000_000);
    assert!(whole.0.log.len() > 500 && whole.0.flags[7] > 50, "{}", whole.0.flags[7]);
    for (every, step) in [(0, 333_333), (7, 2_000_000), (0, 10_007), (3, 50_021), (2, 1_003)] {
        assert!(observe(every, step) == whole, "stops at every {every}th question, limits every {step} ns");
    }
}
