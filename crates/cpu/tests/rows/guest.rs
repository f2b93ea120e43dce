//! The interpreted side: a core whose window of memory has the native one's addresses, protections and segments.

use crate::bus::OneInterrupt;
use crate::selectors;
use iced_x86::Instruction;
use std::sync::Arc;
use umbra_arch::control::{Cr0, Cr3, Cr4, Efer};
use umbra_arch::cpuid::{CpuidProfile, HostOffer};
use umbra_arch::segment::{Attr, Seg, Segment, TableRegister};
use umbra_arch::{CpuState, Fault, Gpa};
use umbra_cpu::core::CodeSize;
use umbra_cpu::op::Stop;
use umbra_cpu::{Core, EngineOptions, decode};
use umbra_hostexec::native::{Mode, NativeState, PAGES, PROTECTION, Protection, SEGMENT_G, WINDOW};
use umbra_memory::GuestMemory;

/// Guest-physical address of the window.
const PHYSICAL: u64 = 0x10_0000;
/// Linear address of the descriptor tables, which user code can't reach.
const TABLES: u64 = WINDOW + 0x10_0000;

pub struct Guest {
    pub core: Core,
    mode: Mode,
}

/// The richest CPU that this host can compare.
pub fn profile() -> CpuidProfile {
    let host = HostOffer::from_cpuid(|leaf, subleaf| {
        let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
        [r.eax, r.ebx, r.ecx, r.edx]
    });
    CpuidProfile::parse("max", &host).unwrap()
}

impl Guest {
    pub fn new(profile: &CpuidProfile, mode: Mode) -> Self {
        let mem = Arc::new(GuestMemory::new(4 << 20).unwrap());
        let quad = |at: u64, value: u64| mem.write(Gpa::new(at), &value.to_le_bytes());
        quad(0x1000, 0x2067);
        quad(0x2000 + 8 * (WINDOW >> 30), 0x3067);
        quad(0x3000 + 8 * (WINDOW >> 21 & 511), 0x4067);
        for (page, protection) in (0..).zip(PROTECTION) {
            let bits = match protection {
                Protection::Absent => continue,
                Protection::Write => 0x67,
                Protection::Read | Protection::Execute => 0x65,
            };
            quad(0x4000 + 8 * page, (PHYSICAL + (page << 12)) | bits);
        }
        quad(0x4000 + 8 * ((TABLES - WINDOW) >> 12), 0x5063);
        for (selector, segment) in selectors::descriptors() {
            let table = if selector & 4 != 0 { 0x5800 } else { 0x5000 };
            quad(table + u64::from(selector & !7), selectors::encode(&segment));
        }
        let core = Core::new(mem, profile, 0, &EngineOptions::default()).unwrap();
        let mut guest = Self { core, mode };
        guest.core.set_state(&initial(mode));
        guest
    }

    pub fn write(&self, offset: usize, data: &[u8]) {
        self.core.mem.write(Gpa::new(PHYSICAL + offset as u64), data);
    }

    pub fn read(&self, offset: usize, out: &mut [u8]) {
        self.core.mem.read(Gpa::new(PHYSICAL + offset as u64), out);
    }

    /// Executes the instruction in `bytes`, all rounds of it, as if it lay at `state.rip`.
    pub fn run(&mut self, bytes: &[u8], state: &mut NativeState, with_fp: bool) -> Result<(), Fault> {
        let size = match self.mode {
            Mode::Bits16 => CodeSize::Bits16,
            Mode::Bits32 => CodeSize::Bits32,
            Mode::Bits64 => CodeSize::Bits64,
        };
        state.selectors = std::array::from_fn(|n| self.core.s.seg[n].selector);
        let Ok(i) = decode::decode(bytes, state.rip, size) else { return Err(Fault::UNDEFINED) };
        let op = decode::resolve(&i, size, &self.core.profile, &mut self.core.host).op;
        let c = &mut self.core;
        c.gpr[..16].copy_from_slice(&state.gpr);
        c.set_rflags(state.rflags);
        if with_fp {
            c.s.fp = state.fp;
        }
        (c.block_rip, c.next_rip) = (state.rip, next_rip(&i, self.mode));
        let flow = loop {
            match (op.exec)(c, &mut OneInterrupt::default(), &op) {
                Err(Stop::Again) => {}
                flow => break flow,
            }
        };
        state.gpr.copy_from_slice(&c.gpr[..16]);
        state.rflags = c.rflags();
        if with_fp {
            state.fp = c.s.fp;
        }
        state.selectors = std::array::from_fn(|n| c.s.seg[n].selector);
        let end = match flow {
            Ok(()) => {
                state.rip = c.next_rip;
                Ok(())
            }
            Err(Stop::Fault) => Err(c.fault),
            Err(stop) => panic!("{i:?}: {stop:?}"),
        };
        if selectors::loads(i.code()) {
            c.set_state(&initial(self.mode));
        }
        end
    }
}

fn next_rip(i: &Instruction, mode: Mode) -> u64 {
    i.next_ip() & mode.mask()
}

fn initial(mode: Mode) -> CpuState {
    let mut s = CpuState::reset();
    s.cr0 = Cr0::new(Cr0::PE | Cr0::PG | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::MP | Cr0::AM);
    s.cr3 = Cr3::new(0x1000);
    s.cr4 = Cr4::new(Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE | Cr4::FSGSBASE);
    s.efer = Efer::new(Efer::LME | Efer::LMA);
    s.xcr0 = 7;
    s.seg[Seg::Cs as usize] = mode.code();
    for seg in [Seg::Ds, Seg::Es, Seg::Ss] {
        s.seg[seg as usize] = mode.data();
    }
    s.seg[Seg::Gs as usize] = SEGMENT_G;
    s.seg[Seg::Fs as usize] = Segment::null(0);
    // No I/O permission bitmap.
    s.seg[Seg::Tr as usize].limit = 0x66;
    s.cpl = 3;
    s.gdtr = TableRegister { base: TABLES, limit: 0x7f };
    s.seg[Seg::Ldtr as usize] = Segment { base: TABLES + 0x800, limit: 7 * 8 - 1, attr: Attr(0x82), selector: 0x50 };
    s
}

const _: () = assert!(PAGES == 16);
