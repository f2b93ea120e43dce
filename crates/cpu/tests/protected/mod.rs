//! A small guest in 32-bit protected mode without paging: two tasks, handlers that halt, one interrupt.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub use crate::bus::OneInterrupt;
use std::sync::Arc;
use umbra_arch::control::Cr0;
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::segment::{Attr, Seg, Segment, TableRegister};
use umbra_arch::{CpuState, Exit, Gpa, Slice, Vcpu, VirtualTime};
use umbra_cpu::{EngineOptions, Interpreter};
use umbra_memory::GuestMemory;

pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
/// Sixteen bytes a vector, HLT first.
pub const HANDLERS: u64 = 0x4000;
pub const TSS_A: u64 = 0x6000;
pub const TSS_B: u64 = 0x6100;
pub const CODE_A: u64 = 0x1_0000;
pub const CODE_B: u64 = 0x1_1000;
pub const STACK_A: u64 = 0x2_0000;
pub const STACK_B: u64 = 0x3_0000;
pub const CODE: u16 = 0x08;
pub const DATA: u16 = 0x10;
pub const TASK_A: u16 = 0x18;
pub const TASK_B: u16 = 0x20;
pub const GATE_B: u16 = 0x28;

/// The guest; `s` is the state before and after each run.
pub struct Guest {
    cpu: Interpreter,
    pub mem: Arc<GuestMemory>,
    pub bus: OneInterrupt,
    pub s: CpuState,
}

impl Guest {
    pub fn new() -> Self {
        let mem = Arc::new(GuestMemory::new(16 << 20).unwrap());
        let cpu = Interpreter::new(mem.clone(), &CpuidProfile::default(), 0, &EngineOptions::default()).unwrap();
        let g = Self { cpu, mem, bus: OneInterrupt::default(), s: initial() };
        g.descriptor(CODE, 0x00cf_9b00_0000_ffff);
        g.descriptor(DATA, 0x00cf_9300_0000_ffff);
        g.descriptor(TASK_A, tss(TSS_A, 0x8b, 0x67));
        g.descriptor(TASK_B, tss(TSS_B, 0x89, 0x67));
        g.descriptor(GATE_B, u64::from(TASK_B) << 16 | 0x85 << 40);
        for vector in 0..256 {
            let handler = HANDLERS + 16 * vector;
            g.write(IDT + 8 * vector, &(handler & 0xffff | u64::from(CODE) << 16 | 0x8e << 40).to_le_bytes());
            g.write(handler, &[0xf4]);
        }
        g.task_b(0x20, CODE_B as u32);
        g.task_b(0x24, 2);
        g.task_b(0x38, STACK_B as u32);
        for (at, selector) in [(0x48, DATA), (0x4c, CODE), (0x50, DATA), (0x54, DATA), (0x58, 0), (0x5c, DATA)] {
            g.task_b(at, selector.into());
        }
        g
    }

    pub fn descriptor(&self, selector: u16, value: u64) {
        self.write(GDT + u64::from(selector & 0xfff8), &value.to_le_bytes());
    }

    /// Writes a field of task B's TSS.
    pub fn task_b(&self, at: u64, value: u32) {
        self.write(TSS_B + at, &value.to_le_bytes());
    }

    pub fn write(&self, at: u64, data: &[u8]) {
        self.mem.write(Gpa::new(at), data);
    }

    pub fn u32(&self, at: u64) -> u32 {
        let mut raw = [0; 4];
        self.mem.read(Gpa::new(at), &mut raw);
        u32::from_le_bytes(raw)
    }

    /// The type byte of a descriptor: 89h is an available TSS, 8Bh a busy one.
    pub fn kind(&self, selector: u16) -> u32 {
        self.u32(GDT + u64::from(selector & 0xfff8) + 4) >> 8 & 0xff
    }

    /// Runs from `self.s` to a HLT; the vector whose handler it was in, if any.
    pub fn run(&mut self) -> Option<u8> {
        self.s.activity = umbra_arch::state::Activity::Running;
        self.cpu.set_state(&self.s);
        let slice = Slice { now: VirtualTime(0), until: VirtualTime(1_000_000) };
        let stopped = self.cpu.run(&mut self.bus, slice);
        assert_eq!(stopped.exit, Exit::Halted);
        self.s = self.cpu.state();
        let handler = self.s.rip.wrapping_sub(HANDLERS + 1);
        (handler < 0x1000).then_some((handler / 16) as u8)
    }

    /// Runs `code` at CODE_A.
    pub fn run_a(&mut self, code: &[u8]) -> Option<u8> {
        self.write(CODE_A, code);
        self.run()
    }
}

/// A TSS descriptor with access byte `access`.
pub fn tss(base: u64, access: u64, limit: u64) -> u64 {
    limit | base << 16 | access << 40
}

fn initial() -> CpuState {
    let mut s = CpuState::reset();
    s.cr0 = Cr0::new(Cr0::PE | Cr0::NE | Cr0::ET);
    s.seg[Seg::Cs as usize] = Segment::flat_code32(CODE, 0);
    for seg in [Seg::Ss, Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs] {
        s.seg[seg as usize] = Segment::flat_data(DATA, 0);
    }
    s.seg[Seg::Ldtr as usize] = Segment::null(0);
    s.seg[Seg::Tr as usize] = Segment { base: TSS_A, limit: 0x67, attr: Attr(0x8b), selector: TASK_A };
    s.gdtr = TableRegister { base: GDT, limit: 0x2f };
    s.idtr = TableRegister { base: IDT, limit: 0x7ff };
    s.gpr[4] = STACK_A;
    s.rip = CODE_A;
    s
}
