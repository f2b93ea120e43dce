//! Guests for the tests of KVM, and a loud way to do without it.
#![allow(dead_code, reason = "each test file uses its part")]

use iced_x86::code_asm::{CodeAssembler, IcedError};
use std::sync::Arc;
use std::time::Duration;
use umbra_accel::kvm::{CaseLimit, CaseRunner, Fitted, Irqchip, fit};
use umbra_arch::control::{Cr0, Cr3, Cr4, Efer};
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::segment::{Attr, Seg, Segment, TableRegister};
use umbra_arch::{AccessWidth, Bus, CpuState, Fault, Gpa, Reply, VirtualTime};
use umbra_memory::GuestMemory;

pub const RAM: u64 = 2 << 20;
pub const CODE: u64 = 0x1_0000;
pub const STACK: u64 = 0x8_0000;
pub const TABLES: u64 = 0x2000;
pub const FREE: CaseLimit = CaseLimit { instructions: None, time: Duration::from_secs(10) };

/// The default profile as this host's KVM holds it; `None`, loudly, where there is no KVM.
pub fn kvm() -> Option<Fitted> {
    let profile = CpuidProfile::named("umbra-v3").expect("the default profile");
    match fit(&profile, Irqchip::User) {
        Ok(fitted) => Some(fitted),
        Err(error) => {
            eprintln!("SKIPPED, nothing was tested: {error}");
            None
        }
    }
}

/// A runner with empty memory.
pub fn runner() -> Option<CaseRunner> {
    let memory = Arc::new(GuestMemory::new(RAM).expect("memory"));
    kvm().map(|fitted| CaseRunner::new(memory, &fitted).expect("a runner"))
}

/// Assembles at [`CODE`] (or offset 0 of its segment in real mode) and loads.
pub fn load(memory: &GuestMemory, bits: u32, build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    let mut a = CodeAssembler::new(bits).expect("a bitness");
    build(&mut a).expect("instructions");
    let code = a.assemble(if bits == 16 { 0 } else { CODE }).expect("code");
    memory.write(Gpa::new(CODE), &code);
}

/// Real mode at CODE:0.
pub fn real() -> CpuState {
    let mut s = CpuState::reset();
    s.seg[Seg::Cs as usize] = Segment::real((CODE >> 4) as u16);
    s.rip = 0;
    s.gpr[4] = 0x8000;
    s
}

/// 64-bit ring 0 with the first 2 MiB mapped by one large page; tables at [`TABLES`].
pub fn long(memory: &GuestMemory) -> CpuState {
    for (at, value) in [(0, TABLES + 0x1003), (0x1000, TABLES + 0x2003), (0x2000, 0x83)] {
        memory.write(Gpa::new(TABLES + at), &u64::to_le_bytes(value));
    }
    let mut s = CpuState::reset();
    s.cr0 = Cr0::new(Cr0::PE | Cr0::PG | Cr0::ET | Cr0::NE | Cr0::WP);
    s.cr3 = Cr3::new(TABLES);
    s.cr4 = Cr4::new(Cr4::PAE | Cr4::OSFXSR);
    s.efer = Efer::new(Efer::LME | Efer::LMA | Efer::NXE);
    for seg in [Seg::Ds, Seg::Es, Seg::Ss, Seg::Fs, Seg::Gs] {
        s.seg[seg as usize] = Segment::flat_data(0x10, 0);
    }
    s.seg[Seg::Cs as usize] = Segment::code64(8, 0);
    s.seg[Seg::Tr as usize] = Segment { base: 0x1000, limit: 0x67, attr: Attr(0x8b), selector: 0x28 };
    s.gdtr = TableRegister { base: 0x1100, limit: 0x3f };
    s.idtr = TableRegister { base: 0x1200, limit: 0xfff };
    s.rip = CODE;
    s.gpr[4] = STACK;
    s
}

/// Records accesses; reads answer with the low byte of port or address.
#[derive(Default, Debug)]
pub struct Recorder {
    pub log: Vec<String>,
    pub interrupt: Option<u8>,
    pub nmi: bool,
    pub cr8: u8,
}

impl Bus for Recorder {
    fn mmio_read(&mut self, _: VirtualTime, gpa: Gpa, width: AccessWidth) -> Reply<u64> {
        self.log.push(format!("load {gpa} {}", width.bytes()));
        Reply::quiet(gpa.raw() & 0xff)
    }
    fn mmio_write(&mut self, _: VirtualTime, gpa: Gpa, width: AccessWidth, value: u64) -> Reply<()> {
        self.log.push(format!("store {gpa} {} {value:#x}", width.bytes()));
        Reply::quiet(())
    }
    fn port_read(&mut self, _: VirtualTime, port: u16, width: AccessWidth) -> Reply<u32> {
        self.log.push(format!("in {port:#x} {}", width.bytes()));
        Reply { value: (port & 0xff).into(), cost: 0, attention: true }
    }
    fn port_write(&mut self, _: VirtualTime, port: u16, width: AccessWidth, value: u32) -> Reply<()> {
        self.log.push(format!("out {port:#x} {} {value:#x}", width.bytes()));
        Reply::quiet(())
    }
    fn apic_msr_read(&mut self, _: VirtualTime, _: u32) -> Result<Reply<u64>, Fault> {
        Err(Fault::GP0)
    }
    fn apic_msr_write(&mut self, _: VirtualTime, _: u32, _: u64) -> Result<Reply<()>, Fault> {
        Err(Fault::GP0)
    }
    fn read_cr8(&mut self) -> u8 {
        self.cr8
    }
    fn write_cr8(&mut self, _: VirtualTime, value: u8) -> Reply<()> {
        self.cr8 = value;
        Reply::quiet(())
    }
    fn interrupt_pending(&mut self) -> bool {
        self.interrupt.is_some()
    }
    fn interrupt_acknowledge(&mut self, _: VirtualTime) -> Option<u8> {
        self.interrupt.take()
    }
    fn take_nmi(&mut self) -> bool {
        std::mem::take(&mut self.nmi)
    }
}
