//! Hostile device accesses without a CPU: any port and any device register, at any width and time.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::{AccessWidth, Bus, CpuState, Exit, Gpa, Slice, Stopped, Vcpu, VirtualTime};
use umbra_machine::{End, Host, Machine, MachineConfig, guest_memory};

const RAM: u64 = 4 << 20;
/// Virtual time that a script gets. Its PIT may interrupt every other microsecond, so minutes would take the fuzzer
/// seconds.
const LIMIT: u64 = 10_000_000_000;
/// Bytes of an operation.
const OP_BYTES: usize = 8;
/// Where devices have registers in memory, and where nothing is.
const WINDOWS: [u64; 6] = [0xfee0_0000, 0xfec0_0000, 0xfed0_0000, 0xfebf_0000, 0xa_0000, 0xfffc_0000];
/// Ports of the PC's devices, each with its neighbours.
const PORTS: [u16; 24] = [
    0x00, 0x20, 0x40, 0x60, 0x61, 0x64, 0x70, 0x80, 0x92, 0xa0, 0xb2, 0xc0, 0xe0, 0xe9, 0xf4, 0x2f8, 0x3f8, 0x402,
    0x4d0, 0x510, 0x600, 0xcf8, 0xcfc, 0xcf9,
];

/// What stands in for a CPU: it makes the input's accesses, and keeps what it was answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Script {
    ops: VecDeque<[u8; OP_BYTES]>,
    answers: u64,
    done: u64,
}

impl Script {
    fn new(data: &[u8]) -> Self {
        let ops = data.chunks_exact(OP_BYTES).take(2000).filter_map(|op| op.try_into().ok());
        Self { ops: ops.collect(), answers: 0, done: 0 }
    }

    fn note(&mut self, answer: u64) {
        self.answers = (self.answers.rotate_left(5) ^ answer).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    /// One access; how long it and what follows take.
    fn perform(&mut self, bus: &mut dyn Bus, now: VirtualTime, op: [u8; OP_BYTES]) -> (u64, bool) {
        let [kind, place, low, width, a, b, c, pause] = op;
        let value = u64::from(u32::from_le_bytes([a, b, c, a ^ b]));
        let width =
            [AccessWidth::Byte, AccessWidth::Word, AccessWidth::Dword, AccessWidth::Qword][usize::from(width & 3)];
        let port_width = if width == AccessWidth::Qword { AccessWidth::Dword } else { width };
        let port = PORTS[usize::from(place) % PORTS.len()].wrapping_add(u16::from(low & 15));
        let window = WINDOWS[usize::from(place) % WINDOWS.len()];
        let gpa = Gpa::new(window + u64::from(low) * 16 + u64::from(place & 15));
        let msr = 0x800 + u32::from(low & 0x7f);
        let (cost, attention) = match kind % 8 {
            0 => {
                let reply = bus.port_read(now, port, port_width);
                self.note(reply.value.into());
                (reply.cost, reply.attention)
            }
            1 | 2 => {
                let reply = bus.port_write(now, port, port_width, value as u32);
                (reply.cost, reply.attention)
            }
            3 => {
                let reply = bus.mmio_read(now, gpa, width);
                self.note(reply.value);
                (reply.cost, reply.attention)
            }
            4 | 5 => {
                let reply = bus.mmio_write(now, gpa, width, value);
                (reply.cost, reply.attention)
            }
            6 => match bus.apic_msr_read(now, if low == 0 { 0x1b } else { msr }) {
                Ok(reply) => {
                    self.note(reply.value);
                    (reply.cost, reply.attention)
                }
                Err(_) => (1, false),
            },
            _ if low & 1 == 0 => {
                let taken = if bus.interrupt_pending() { bus.interrupt_acknowledge(now) } else { None };
                self.note(taken.map_or(256, u64::from));
                (1, false)
            }
            _ => match bus.apic_msr_write(now, if low == 1 { 0x1b } else { msr }, value) {
                Ok(reply) => (reply.cost, reply.attention),
                Err(_) => (1, false),
            },
        };
        (u64::from(cost) + 1 + (u64::from(pause & 15) << (2 * (pause >> 4))), attention)
    }
}

impl Vcpu for Script {
    fn run(&mut self, bus: &mut dyn Bus, slice: Slice) -> Stopped {
        let mut now = slice.now;
        while now < slice.until {
            // As a CPU does between instructions, and before it goes on sleeping.
            if bus.take_nmi() {
                self.note(2);
            }
            let Some(op) = self.ops.pop_front() else {
                return Stopped { exit: Exit::Halted, now };
            };
            let (cost, attention) = self.perform(bus, now, op);
            self.done += 1;
            now = now.plus(cost);
            if attention {
                return Stopped { exit: Exit::Attention, now };
            }
        }
        Stopped { exit: Exit::BudgetSpent, now }
    }

    // The script travels in registers where a machine is saved.
    fn state(&self) -> CpuState {
        let mut s = CpuState::reset();
        (s.gpr[0], s.gpr[1]) = (self.answers, self.done);
        s
    }

    fn set_state(&mut self, state: &CpuState) {
        (self.answers, self.done) = (state.gpr[0], state.gpr[1]);
    }

    fn retired(&self) -> u64 {
        self.done
    }
}

/// Keeps what the guest prints.
#[derive(Default)]
struct Listener(Vec<u8>);

impl Host for Listener {
    fn serial(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }
    fn debug(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }
}

fn machine(script: Script) -> Machine<Script> {
    let memory = guest_memory(RAM).expect("4 MiB of RAM");
    let config = MachineConfig { profile: CpuidProfile::default(), rtc_start: 0 };
    Machine::new(memory, &config, vec![script]).expect("a machine of one CPU")
}

/// Runs until the script is through, or until `limit` (default: [`LIMIT`]).
fn run(machine: &mut Machine<Script>, listener: &mut Listener, limit: Option<u64>) -> Option<End> {
    let until = VirtualTime(limit.unwrap_or(LIMIT));
    Some(machine.run(listener, Some(until))).filter(|end| *end != End::Limit)
}

/// The property: no panic, and the same answers twice.
pub fn device_io(data: &[u8]) {
    let once = || {
        let mut machine = machine(Script::new(data));
        let mut listener = Listener::default();
        let end = run(&mut machine, &mut listener, None);
        (end, machine.vcpu(0).map(|script| script.answers), listener.0)
    };
    assert_eq!(once(), once(), "device accesses aren't answered the same twice");
}

/// The property: a machine that was saved and restored anywhere answers as if it hadn't been.
pub fn snapshot(data: &[u8]) {
    let [when, low, data @ ..] = data else { return };
    let limit = u64::from(u16::from_le_bytes([*low, *when])) << 4;
    let mut whole = machine(Script::new(data));
    let mut heard = Listener::default();
    if run(&mut whole, &mut heard, Some(limit)).is_some() {
        return;
    }
    let saved = whole.save().expect("a machine between accesses can be saved");
    let left = whole.vcpu(0).cloned().expect("one CPU");
    let mut other = machine(Script { answers: 0, done: 0, ..left });
    other.restore(&saved).expect("its own save file");
    assert!(other.save().expect("saved again") == saved, "a restored machine is saved otherwise");
    let mut also = Listener(heard.0.clone());
    let ends = (run(&mut whole, &mut heard, None), run(&mut other, &mut also, None));
    assert_eq!(ends.0, ends.1, "a restored machine ends otherwise");
    assert_eq!(whole.vcpu(0).map(|s| s.answers), other.vcpu(0).map(|s| s.answers), "and answers otherwise");
    assert_eq!(heard.0, also.0, "and prints otherwise");
}
