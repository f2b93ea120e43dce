//! A small guest in 64-bit mode: identity-mapped memory, handlers that halt, no devices.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub use crate::bus::OneInterrupt;
use iced_x86::code_asm::CodeAssembler;
use std::sync::Arc;
use umbra_arch::control::{Cr0, Cr3, Cr4, Efer};
use umbra_arch::cpuid::{CpuidProfile, Feature};
use umbra_arch::segment::{Seg, Segment, TableRegister};
use umbra_arch::{CpuState, Exit, Gpa, Slice, Vcpu, VirtualTime};
use umbra_cpu::{EngineOptions, Interpreter};
use umbra_memory::GuestMemory;

/// Where code goes; 32 bytes a snippet.
pub const CODE: u64 = 0x10_0000;
/// Where data goes.
pub const DATA: u64 = 0x20_0000;
/// Not mapped.
pub const ABSENT: u64 = 0x40_0000;
const IDT: u64 = 0x4000;
const GDT: u64 = 0x5000;
const HANDLERS: u64 = 0x6000;
const STACK: u64 = 0x30_0000;

/// The guest; `s` is the state before and after each run.
pub struct Guest {
    cpu: Interpreter,
    pub mem: Arc<GuestMemory>,
    pub s: CpuState,
    /// Virtual nanoseconds that the last run took.
    pub took: u64,
    next_code: u64,
}

impl Guest {
    /// Everything on that user space and kernel need for SIMD.
    pub fn new() -> Self {
        Self::with(&EngineOptions::default())
    }

    /// As [`new`](Self::new), on an engine with options.
    pub fn with(options: &EngineOptions) -> Self {
        let mem = Arc::new(GuestMemory::new(16 << 20).unwrap());
        let quad = |at: u64, value: u64| mem.write(Gpa::new(at), &value.to_le_bytes());
        quad(0x1000, 0x2007);
        quad(0x2000, 0x3007);
        (0..2).for_each(|i| quad(0x3000 + 8 * i, i << 21 | 0x87));
        quad(GDT + 8, 0x00af_9b00_0000_ffff);
        quad(GDT + 16, 0x00cf_9300_0000_ffff);
        for vector in 0..32 {
            let handler = HANDLERS + 16 * vector;
            quad(IDT + 16 * vector, handler & 0xffff | 8 << 16 | 0x8e << 40 | handler >> 16 << 48);
            mem.write(Gpa::new(handler), &[0xf4]);
        }
        let mut profile = CpuidProfile::default();
        for feature in [Feature::Sha, Feature::Gfni, Feature::Vaes, Feature::Vpclmulqdq, Feature::Monitor] {
            profile.features.insert(feature);
        }
        let cpu = Interpreter::new(mem.clone(), &profile, 0, options).unwrap();
        Self { cpu, mem, s: initial(), took: 0, next_code: CODE }
    }

    /// Runs `code` and HLT from `self.s`, which becomes the state afterwards. The vector, if a fault came.
    pub fn run_bytes(&mut self, code: &[u8]) -> Option<u8> {
        assert!(code.len() < 4000);
        if self.next_code + 4096 > CODE + 0x8_0000 {
            self.next_code = CODE;
        }
        let at = self.next_code;
        self.next_code += (code.len() as u64 + 1).next_multiple_of(64);
        self.mem.write(Gpa::new(at), code);
        self.mem.write(Gpa::new(at + code.len() as u64), &[0xf4]);
        self.s.rip = at;
        self.s.activity = umbra_arch::state::Activity::Running;
        self.cpu.set_state(&self.s);
        let slice = Slice { now: VirtualTime(0), until: VirtualTime(1_000_000_000) };
        let stopped = self.cpu.run(&mut OneInterrupt::default(), slice);
        assert_eq!(stopped.exit, Exit::Halted, "{:x?}", code);
        self.took = stopped.now.0;
        self.s = self.cpu.state();
        let handler = self.s.rip.wrapping_sub(HANDLERS + 1);
        (handler < 512).then_some((handler / 16) as u8)
    }

    /// As [`run_bytes`](Self::run_bytes), assembled.
    pub fn run(&mut self, f: impl FnOnce(&mut CodeAssembler)) -> Option<u8> {
        let mut a = CodeAssembler::new(64).unwrap();
        f(&mut a);
        let code = a.assemble(self.next_code).unwrap();
        self.run_bytes(&code)
    }

    /// Instructions retired by all runs.
    pub fn retired(&self) -> u64 {
        self.cpu.retired()
    }

    /// Decoded blocks.
    pub fn blocks(&self) -> usize {
        self.cpu.blocks().live()
    }

    pub fn mmu_stats(&self) -> &umbra_mmu::MmuStats {
        self.cpu.mmu_stats()
    }

    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut out = [0; N];
        self.mem.read(Gpa::new(at), &mut out);
        out
    }

    pub fn write(&self, at: u64, data: &[u8]) {
        self.mem.write(Gpa::new(at), data);
    }
}

fn initial() -> CpuState {
    let mut s = CpuState::reset();
    s.cr0 = Cr0::new(Cr0::PE | Cr0::PG | Cr0::NE | Cr0::MP | Cr0::ET);
    s.cr4 = Cr4::new(Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE);
    s.efer = Efer::new(Efer::LME | Efer::LMA | Efer::NXE);
    s.cr3 = Cr3::new(0x1000);
    s.xcr0 = 7;
    s.seg[Seg::Cs as usize] = Segment::code64(8, 0);
    for seg in [Seg::Ss, Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs] {
        s.seg[seg as usize] = Segment::flat_data(16, 0);
    }
    s.gdtr = TableRegister { base: GDT, limit: 23 };
    s.idtr = TableRegister { base: IDT, limit: 511 };
    s.gpr[4] = STACK;
    s.fp.fcw = 0x37f;
    s.fp.ftw = 0;
    s
}
