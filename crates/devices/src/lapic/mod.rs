//! Local APIC.

use crate::{Device, InterruptMessage, Ipi, MmioDevice};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, Fault, VirtualTime};

/// Frequency the timer counts at before its divider: the crystal of CPUID leaf 15h, which is the TSC's.
pub const LAPIC_HZ: u64 = umbra_arch::time::TSC_HZ;
/// Address of the registers after reset.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;

/// What distinguishes one local APIC from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicConfig {
    /// Initial APIC id, as in CPUID leaves 1 and 0Bh.
    pub id: u32,
    /// Bootstrap processor.
    pub bsp: bool,
    /// MAXPHYADDR.
    pub physical_bits: u32,
    /// CPUID offers x2APIC.
    pub x2apic: bool,
    /// CPUID offers the TSC-deadline timer.
    pub tsc_deadline: bool,
}

/// Local APIC.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lapic {
    config: LapicConfig,
}

impl Lapic {
    /// A local APIC after power-on.
    pub fn new(config: LapicConfig) -> Self {
        Self { config }
    }
    /// Programs what a BIOS leaves behind: software-enabled, LINT0 = ExtINT and (on the bootstrap
    /// processor) open, LINT1 = NMI.
    pub fn set_virtual_wire(&mut self) {}
    /// Initial APIC id.
    pub fn id(&self) -> u32 {
        self.config.id
    }
    /// Base address of the xAPIC registers if they are mapped (globally enabled, not x2APIC mode).
    pub fn mmio_base(&self) -> Option<u64> {
        Some(DEFAULT_BASE)
    }
    /// TSC minus virtual time in ns, wrapping: what IA32_TSC_DEADLINE is relative to.
    pub fn set_tsc_offset(&mut self, _now: VirtualTime, _offset: u64) {}
    /// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE and the x2APIC range.
    pub fn msr_read(&mut self, _now: VirtualTime, _msr: u32) -> Result<u64, Fault> {
        Err(Fault::GP0)
    }
    /// WRMSR of the same.
    pub fn msr_write(&mut self, _now: VirtualTime, _msr: u32, _value: u64) -> Result<(), Fault> {
        Err(Fault::GP0)
    }
    /// CR8.
    pub fn cr8(&self) -> u8 {
        0
    }
    /// MOV to CR8.
    pub fn set_cr8(&mut self, _value: u8) {}
    /// Whether this APIC has an interrupt for the CPU.
    pub fn interrupt_pending(&self) -> bool {
        false
    }
    /// The CPU takes the interrupt: its vector, or the spurious one.
    pub fn acknowledge(&mut self) -> u8 {
        0xff
    }
    /// A fixed interrupt arrives.
    pub fn accept(&mut self, _vector: u8, _level: bool) {}
    /// Whether the 8259's INTR reaches the CPU (globally disabled, or LINT0 open as ExtINT).
    pub fn accepts_extint(&self) -> bool {
        true
    }
    /// Level of a local interrupt pin: 0 = 8259's INTR, 1 = NMI.
    pub fn set_lint(&mut self, _pin: usize, _level: bool) {}
    /// The IPI that the last ICR write made; ask after each write.
    pub fn take_ipi(&mut self) -> Option<Ipi> {
        None
    }
    /// The vector whose EOI the I/O APICs must hear; ask after each write.
    pub fn take_eoi(&mut self) -> Option<u8> {
        None
    }
    /// Takes a waiting NMI.
    pub fn take_nmi(&mut self) -> bool {
        false
    }
    /// Whether an NMI waits.
    pub fn nmi_pending(&self) -> bool {
        false
    }
    /// Takes an INIT request; the machine resets the CPU, then calls [`init`](Self::init).
    pub fn take_init(&mut self) -> bool {
        false
    }
    /// Takes the vector of a start-up IPI.
    pub fn take_startup(&mut self) -> Option<u8> {
        None
    }
    /// INIT reset: like power-on, but the id and IA32_APIC_BASE stay.
    pub fn init(&mut self) {}
}

/// Delivers a message to those it is for. Index in the slice = vCPU number.
pub fn deliver(_lapics: &mut [Lapic], _message: &InterruptMessage) {}

/// Delivers an IPI that the local APIC `from` sent.
pub fn deliver_ipi(_lapics: &mut [Lapic], _from: usize, _ipi: &Ipi) {}

impl Device for Lapic {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {}
}

impl MmioDevice for Lapic {
    fn mmio_read(&mut self, _now: VirtualTime, _offset: u64, _width: AccessWidth) -> u64 {
        0
    }
    fn mmio_write(&mut self, _now: VirtualTime, _offset: u64, _width: AccessWidth, _value: u64) {}
}
