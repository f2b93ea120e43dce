//! Several CPUs on one memory: code that one patches and another runs, tables that one edits and another
//! walks, against plain arrays.

mod bus;
mod long_mode;

use long_mode::{Guest, OneInterrupt};
use proptest::prelude::*;
use umbra_arch::cpuid::{CpuidProfile, Feature};
use umbra_arch::state::Activity;
use umbra_arch::{Exit, Gpa, Slice, Vcpu, VirtualTime};
use umbra_cpu::{EngineOptions, Interpreter};

const CPUS: usize = 3;
/// `mov [rdi], rsi; hlt`, the same through a locked instruction, `mov rax, [rdi]; hlt`, `call rdi; hlt`,
/// `monitor; mwait; hlt`.
const ROUTINES: [(u64, &[u8]); 5] = [
    (STORE, &[0x48, 0x89, 0x37, 0xf4]),
    (EXCHANGE, &[0x48, 0x87, 0x37, 0xf4]),
    (LOAD, &[0x48, 0x8b, 0x07, 0xf4]),
    (CALL, &[0xff, 0xd7, 0xf4]),
    (WAIT, &[0x0f, 0x01, 0xc8, 0x0f, 0x01, 0xc9, 0xf4]),
];
const STORE: u64 = 0x10_0000;
const EXCHANGE: u64 = 0x10_0100;
const LOAD: u64 = 0x10_0200;
const CALL: u64 = 0x10_0300;
const WAIT: u64 = 0x10_0400;
/// Functions of 16 bytes that load a constant and return: four share a line.
const FUNCTIONS: u64 = 0x12_0000;
const SLOTS: usize = 6;
/// A table of small pages for 400000h and on, in a page that also holds data.
const TABLE: u64 = 0x13_0000;
const WINDOW: u64 = 0x40_0000;
const PAGES: usize = 4;
/// Frames for them, each with a value at its start. The last two are the table's and the functions' pages.
const FRAMES: [u64; 5] = [0x14_0000, 0x14_1000, 0x14_2000, TABLE, FUNCTIONS];
const PAGE_FAULT: u8 = 14;

#[derive(Clone, Copy, Debug)]
enum Op {
    /// Patches a function's constant, plainly or locked.
    Patch { slot: usize, value: u32, locked: bool },
    /// Calls it.
    Call { slot: usize },
    /// Maps a page to a frame, or nowhere.
    Map { page: usize, frame: Option<usize> },
    /// Reads the last eight bytes of a page's frame.
    Read { page: usize },
    /// Writes them through the mapping.
    Write { page: usize, value: u64 },
    /// A device writes them.
    Dma { frame: usize, value: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0..SLOTS, any::<u32>(), any::<bool>()).prop_map(|(slot, value, locked)| Op::Patch { slot, value, locked }),
        (0..SLOTS).prop_map(|slot| Op::Call { slot }),
        (0..PAGES, prop::option::weighted(0.8, 0..FRAMES.len())).prop_map(|(page, frame)| Op::Map { page, frame }),
        (0..PAGES).prop_map(|page| Op::Read { page }),
        (0..PAGES, any::<u64>()).prop_map(|(page, value)| Op::Write { page, value }),
        (0..FRAMES.len(), any::<u64>()).prop_map(|(frame, value)| Op::Dma { frame, value }),
    ]
}

/// The last eight bytes of each frame: neither entries in use nor functions.
const AT: u64 = 0xff8;

struct Rig {
    guest: Guest,
    cpus: Vec<Interpreter>,
}

impl Rig {
    fn new() -> Self {
        let guest = Guest::new();
        for (at, bytes) in ROUTINES {
            guest.write(at, bytes);
        }
        for slot in 0..SLOTS as u64 {
            // mov eax, 0; ret
            guest.write(FUNCTIONS + 16 * slot, &[0xb8, 0, 0, 0, 0, 0xc3, 0x90, 0x90, 0x90]);
        }
        guest.write(0x3000 + 16, &(TABLE | 7).to_le_bytes());
        let mut profile = CpuidProfile::default();
        profile.features.insert(Feature::Monitor);
        let cpu = |id| Interpreter::new(guest.mem.clone(), &profile, id, &EngineOptions::default()).unwrap();
        let cpus = (0..CPUS as u32).map(cpu).collect();
        Self { guest, cpus }
    }

    /// One CPU waits for a store to the line of `at`.
    fn wait(&mut self, cpu: usize, at: u64) {
        let mut s = self.guest.s.clone();
        (s.rip, s.gpr[0], s.gpr[1], s.activity) = (WAIT, at, 0, Activity::Running);
        let cpu = &mut self.cpus[cpu];
        cpu.set_state(&s);
        let stopped = cpu.run(&mut OneInterrupt::default(), Slice { now: VirtualTime(0), until: VirtualTime(1000) });
        assert_eq!((stopped.exit, cpu.state().activity), (Exit::Halted, Activity::Waiting));
    }

    /// Runs a routine on one CPU: RAX afterwards, or the vector of the fault.
    fn run(&mut self, cpu: usize, routine: u64, rdi: u64, rsi: u64) -> Result<u64, u8> {
        let mut s = self.guest.s.clone();
        (s.rip, s.gpr[7], s.gpr[6], s.activity) = (routine, rdi, rsi, Activity::Running);
        let cpu = &mut self.cpus[cpu];
        cpu.set_state(&s);
        let stopped = cpu.run(&mut OneInterrupt::default(), Slice { now: VirtualTime(0), until: VirtualTime(1000) });
        assert_eq!(stopped.exit, Exit::Halted);
        cpu.core().mmu.audit().expect("nothing stale after a run");
        let s = cpu.state();
        match s.rip.checked_sub(0x6001) {
            Some(handler) if handler < 512 => Err((handler / 16) as u8),
            _ => Ok(s.gpr[0]),
        }
    }
}

#[test]
fn a_store_to_the_line_ends_mwait() {
    let line = FRAMES[0] + 0x40;
    let mut rig = Rig::new();
    rig.wait(0, line + 8);
    rig.run(1, STORE, line - 8, 1).expect("mapped");
    rig.run(1, STORE, line + 64, 1).expect("mapped");
    rig.guest.write(line - 1, &[1]);
    assert!(!rig.cpus[0].wait_is_over(), "other lines of the page");
    rig.run(1, EXCHANGE, line + 56, 1).expect("mapped");
    assert!(rig.cpus[0].wait_is_over());
    // A device's, and one between a saved and a restored state.
    rig.wait(0, line);
    let waiting = rig.cpus[0].state();
    rig.guest.write(line + 63, &[1]);
    assert!(rig.cpus[0].wait_is_over());
    rig.cpus[2].set_state(&waiting);
    assert!(!rig.cpus[2].wait_is_over());
    rig.run(1, STORE, line - 4, 1).expect("mapped");
    assert!(rig.cpus[2].wait_is_over(), "across the line's start");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn each_sees_what_the_others_did(ops in prop::collection::vec((0..CPUS, op()), 1..150)) {
        let mut rig = Rig::new();
        let mut constants = [0u32; SLOTS];
        let mut mapped: [Option<usize>; PAGES] = [None; PAGES];
        let mut values = [0u64; FRAMES.len()];
        for (cpu, op) in ops {
            match op {
                Op::Patch { slot, value, locked } => {
                    let code = u64::from(value) | 0x9090_90c3 << 32;
                    let routine = if locked { EXCHANGE } else { STORE };
                    prop_assert!(rig.run(cpu, routine, FUNCTIONS + 16 * slot as u64 + 1, code).is_ok());
                    constants[slot] = value;
                }
                Op::Call { slot } => {
                    let rax = rig.run(cpu, CALL, FUNCTIONS + 16 * slot as u64, 0);
                    prop_assert_eq!(rax, Ok(constants[slot].into()));
                }
                Op::Map { page, frame } => {
                    let entry = frame.map_or(0, |frame| FRAMES[frame] | 7);
                    prop_assert!(rig.run(cpu, STORE, TABLE + 8 * page as u64, entry).is_ok());
                    mapped[page] = frame;
                }
                Op::Read { page } => {
                    let expected = mapped[page].map(|frame| values[frame]).ok_or(PAGE_FAULT);
                    prop_assert_eq!(rig.run(cpu, LOAD, WINDOW + page as u64 * 4096 + AT, 0), expected);
                }
                Op::Write { page, value } => {
                    let done = rig.run(cpu, STORE, WINDOW + page as u64 * 4096 + AT, value);
                    prop_assert_eq!(done.is_ok(), mapped[page].is_some());
                    if let Some(frame) = mapped[page] {
                        values[frame] = value;
                    }
                }
                Op::Dma { frame, value } => {
                    rig.guest.mem.write(Gpa::new(FRAMES[frame] + AT), &value.to_le_bytes());
                    values[frame] = value;
                }
            }
        }
    }
}

/// A shootdown without the interrupt: the target's next instruction sees the entry removed.
#[test]
fn edited_entries_reach_a_cpu_that_used_them() {
    let mut rig = Rig::new();
    for round in 0..4u64 {
        assert!(rig.run(0, STORE, TABLE, FRAMES[0] | 7).is_ok());
        for cpu in 0..CPUS {
            assert!(rig.run(cpu, STORE, WINDOW, round).is_ok());
            assert_eq!(rig.run(cpu, LOAD, WINDOW, 0), Ok(round), "CPU {cpu} has it in its fast table");
        }
        // Read-only, then gone.
        assert!(rig.run(1, STORE, TABLE, FRAMES[0] | 5).is_ok());
        rig.guest.s.cr0 = umbra_arch::control::Cr0::new(rig.guest.s.cr0.raw() | umbra_arch::control::Cr0::WP);
        for cpu in 0..CPUS {
            assert_eq!(rig.run(cpu, STORE, WINDOW, 99), Err(PAGE_FAULT));
            assert_eq!(rig.run(cpu, LOAD, WINDOW, 0), Ok(round));
        }
        assert!(rig.run(2, STORE, TABLE, 0).is_ok());
        for cpu in 0..CPUS {
            assert_eq!(rig.run(cpu, LOAD, WINDOW, 0), Err(PAGE_FAULT));
        }
    }
}
