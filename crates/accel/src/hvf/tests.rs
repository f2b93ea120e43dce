//! The engine over a stand-in for the framework.

use super::controls;
use super::exits::{Exit as Decoded, PortAccess, decode};
use super::framework::{Capability, Framework, HvfError, Register};
use super::vcpu::HvfVcpu;
use super::vmcs::*;
use crate::handover::{Accelerator, StopAt};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use umbra_arch::control::{Cr0, Cr3, Cr4, Efer};
use umbra_arch::exit::RefusalKind;
use umbra_arch::segment::{Attr, Segment, TableRegister};
use umbra_arch::state::Shadow;
use umbra_arch::{AccessWidth, Bus, CpuState, Exit, Fault, Gpa, GpaPage, Reply, Slice, Vcpu, VirtualTime, rflags};
use umbra_memory::{GuestMemory, PageFlags};

/// Registers that remember, and exits from a list.
#[derive(Default)]
struct StandIn {
    registers: BTreeMap<Register, u64>,
    fields: BTreeMap<u32, u64>,
    /// Reason, qualification, instruction length.
    exits: VecDeque<(u64, u64, u64)>,
    /// Controls that VMX doesn't offer.
    lacks: u64,
}

impl Framework for StandIn {
    fn read_register(&self, register: Register) -> Result<u64, HvfError> {
        Ok(self.registers.get(&register).copied().unwrap_or(0))
    }
    fn write_register(&mut self, register: Register, value: u64) -> Result<(), HvfError> {
        self.registers.insert(register, value);
        Ok(())
    }
    fn read_vmcs(&self, field: u32) -> Result<u64, HvfError> {
        self.fields.get(&field).copied().ok_or(HvfError { call: "hv_vmx_vcpu_read_vmcs", code: field })
    }
    fn write_vmcs(&mut self, field: u32, value: u64) -> Result<(), HvfError> {
        self.fields.insert(field, value);
        Ok(())
    }
    fn capability(&self, of: Capability) -> Result<u64, HvfError> {
        let must = if of == Capability::Processor { 0x0401_e172 } else { 0 };
        Ok((0xffff_ffff & !self.lacks) << 32 | must)
    }
    fn run(&mut self, _: u64) -> Result<(), HvfError> {
        let (reason, qualification, length) =
            self.exits.pop_front().ok_or(HvfError { call: "hv_vcpu_run_until", code: 1 })?;
        let fields = [EXIT_REASON, EXIT_QUALIFICATION, EXIT_INSTRUCTION_LENGTH];
        self.fields.extend(fields.into_iter().zip([reason, qualification, length]));
        Ok(())
    }
}

#[derive(Default)]
struct Ports {
    written: Vec<(u16, AccessWidth, u32)>,
    interrupt: Option<u8>,
}

impl Bus for Ports {
    fn mmio_read(&mut self, _: VirtualTime, _: Gpa, width: AccessWidth) -> Reply<u64> {
        Reply::quiet(width.mask())
    }
    fn mmio_write(&mut self, _: VirtualTime, _: Gpa, _: AccessWidth, _: u64) -> Reply<()> {
        Reply::quiet(())
    }
    fn port_read(&mut self, _: VirtualTime, port: u16, _: AccessWidth) -> Reply<u32> {
        Reply::quiet(0xaabb_0000 | u32::from(port))
    }
    fn port_write(&mut self, _: VirtualTime, port: u16, width: AccessWidth, value: u32) -> Reply<()> {
        self.written.push((port, width, value));
        Reply { value: (), cost: 0, attention: true }
    }
    fn apic_msr_read(&mut self, _: VirtualTime, _: u32) -> Result<Reply<u64>, Fault> {
        Err(Fault::GP0)
    }
    fn apic_msr_write(&mut self, _: VirtualTime, _: u32, _: u64) -> Result<Reply<()>, Fault> {
        Err(Fault::GP0)
    }
    fn read_cr8(&mut self) -> u8 {
        0
    }
    fn write_cr8(&mut self, _: VirtualTime, _: u8) -> Reply<()> {
        Reply::quiet(())
    }
    fn interrupt_pending(&mut self) -> bool {
        self.interrupt.is_some()
    }
    fn interrupt_acknowledge(&mut self, _: VirtualTime) -> Option<u8> {
        self.interrupt.take()
    }
    fn take_nmi(&mut self) -> bool {
        false
    }
}

const SLICE: Slice = Slice { now: VirtualTime(0), until: VirtualTime(60_000_000_000) };

fn engine(exits: &[(u64, u64, u64)]) -> HvfVcpu<StandIn> {
    let memory = Arc::new(GuestMemory::new(2 << 20).unwrap());
    HvfVcpu::new(StandIn { exits: exits.iter().copied().collect(), ..StandIn::default() }, memory)
}

#[test]
fn a_state_comes_back_and_vmx_bits_stay_hidden() {
    let mut s = CpuState::reset();
    s.gpr = std::array::from_fn(|i| 0x1111 * (i as u64 + 1));
    (s.rip, s.rflags) = (0x1234, rflags::FIXED | rflags::IF);
    for (i, segment) in s.seg.iter_mut().enumerate() {
        let attr = Attr(0xc093 + ((i as u32 & 3) << 5));
        *segment = Segment { base: 0x1000 * i as u64, limit: 0xffff + i as u32, attr, selector: 8 * i as u16 };
    }
    (s.gdtr, s.idtr) = (TableRegister { base: 0x5000, limit: 0x7f }, TableRegister { base: 0x6000, limit: 0xff });
    (s.cr0, s.cr3) = (Cr0::new(Cr0::PE | Cr0::ET), Cr3::new(0x8000));
    (s.cr4, s.efer, s.dr7) = (Cr4::new(Cr4::PAE), Efer::new(Efer::NXE), 0x401);
    s.pdpte = [1, 2, 3, 4];
    (s.shadow, s.nmi_blocked, s.cpl) = (Shadow::MovSs, true, 2);
    let mut engine = engine(&[]);
    engine.set_state(&s);
    assert_eq!(engine.state(), s);
}

#[test]
fn exits_are_decoded() {
    let port = |port, width, is_in| Decoded::Port(PortAccess { port, width, is_in });
    for (reason, qualification, expected) in [
        (1, 0, Decoded::Interrupted),
        (52, 0, Decoded::Interrupted),
        (2, 0, Decoded::TripleFault),
        (7, 0, Decoded::Window),
        (12, 0, Decoded::Halt),
        (30, 0x3f8_0000, port(0x3f8, AccessWidth::Byte, false)),
        (30, 0x60_0009, port(0x60, AccessWidth::Word, true)),
        (30, 0xcfc_0003, port(0xcfc, AccessWidth::Dword, false)),
        (30, 0x60_0018, Decoded::Other(30)),
        (48, 0, Decoded::Other(48)),
        (1 << 31 | 33, 0, Decoded::Other(33)),
    ] {
        assert_eq!(decode(reason, qualification), expected, "{reason} {qualification:#x}");
    }
}

#[test]
fn ports_halts_and_interrupts() {
    let mut engine = engine(&[(30, 0x60_0009, 2), (30, 0x3f8_0000, 1), (12, 0, 1), (2, 0, 0)]);
    let mut s = engine.state();
    (s.gpr[0], s.rip, s.rflags) = (0x1_0000_1234, 0x100, rflags::FIXED | rflags::IF);
    engine.set_state(&s);
    let mut bus = Ports::default();
    assert_eq!(engine.run(&mut bus, SLICE).exit, Exit::Attention, "after the write");
    assert_eq!(bus.written, [(0x3f8, AccessWidth::Byte, 0x60)]);
    assert_eq!((engine.state().gpr[0], engine.state().rip), (0x1_0000_0060, 0x103));
    assert_eq!(engine.run(&mut bus, SLICE).exit, Exit::Halted);
    assert_eq!(engine.run(&mut bus, SLICE).exit, Exit::Halted, "nothing woke it");
    bus.interrupt = Some(0x31);
    assert_eq!(engine.run(&mut bus, SLICE).exit, Exit::ShutdownUnseen { rip: 0x104 });
    assert_eq!(bus.interrupt, None, "taken before the guest went on");
}

#[test]
fn what_it_cannot_do_is_refused_with_a_reason() {
    let mut other = engine(&[(48, 0, 0)]);
    let Exit::Refused(refusal) = other.run(&mut Ports::default(), SLICE).exit else { panic!("an EPT violation") };
    assert_eq!(refusal.kind, RefusalKind::Backend);
    assert!(refusal.detail.contains("VM exit 48"), "{refusal}");
    let Exit::Refused(refusal) = other.run(&mut Ports::default(), SLICE).exit else { panic!("the call fails") };
    assert_eq!(refusal.kind, RefusalKind::Host);
    other.stop_at(StopAt::Address(1));
    assert!(matches!(other.run(&mut Ports::default(), SLICE).exit, Exit::Refused(_)));
}

#[test]
fn leaving_says_that_all_ram_may_have_changed() {
    let memory = Arc::new(GuestMemory::new(2 << 20).unwrap());
    let mut engine = HvfVcpu::new(StandIn::default(), Arc::clone(&memory));
    engine.leave(&mut Ports::default()).unwrap();
    for page in [0, 0x9f, 0xc0, 0x1ff] {
        let off = memory.map(GpaPage::new(page)).readable().unwrap();
        assert!(memory.page_flags(off).contains(PageFlags::DIRTY), "{page:#x}");
    }
}

#[test]
fn controls_have_what_must_be_and_what_is_wanted() {
    let mut hv = StandIn::default();
    controls::install(&mut hv).unwrap();
    // HLT, ports, CR8, secondary controls, and what VMX insists on.
    assert_eq!(hv.fields[&PROCESSOR_CONTROLS], 1 << 7 | 1 << 24 | 3 << 19 | 1 << 31 | 0x0401_e172);
    assert_eq!((hv.fields[&CR0_MASK], hv.fields[&CR4_MASK]), (Cr0::NE, Cr4::VMXE));
    for (lma, bit) in [(true, 1 << 9), (false, 0)] {
        controls::set_long_mode(&mut hv, lma).unwrap();
        assert_eq!(hv.fields[&ENTRY_CONTROLS] & 1 << 9, bit);
    }
    let poor = StandIn { lacks: 1 << 7, ..StandIn::default() };
    let mut engine = HvfVcpu::new(poor, Arc::new(GuestMemory::new(2 << 20).unwrap()));
    let Exit::Refused(refusal) = engine.run(&mut Ports::default(), SLICE).exit else { panic!("nothing stops HLT") };
    assert_eq!(refusal.kind, RefusalKind::Host);
}

#[test]
fn an_interrupt_that_cannot_be_taken_asks_for_the_window() {
    let window = |engine: &HvfVcpu<StandIn>| engine.framework().fields[&PROCESSOR_CONTROLS] & 1 << 2 != 0;
    let mut engine = engine(&[(2, 0, 0)]);
    let mut bus = Ports { interrupt: Some(0x31), ..Ports::default() };
    assert!(matches!(engine.run(&mut bus, SLICE).exit, Exit::ShutdownUnseen { .. }));
    assert!(bus.interrupt.is_some() && window(&engine), "RFLAGS.IF is 0");
}
