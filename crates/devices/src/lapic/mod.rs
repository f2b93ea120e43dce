//! Local APICs: xAPIC and x2APIC ("Advanced Programmable Interrupt Controller").
//!
//! Choices where the manual leaves room: the APIC id cannot be changed by software; version 14h, six
//! LVT entries, no EOI-broadcast suppression; the trigger mode of fixed IPIs is edge; lowest-priority
//! delivery goes to the lowest processor priority, among equals to the lowest-numbered vCPU.

mod delivery;
mod exchange;
mod msr;
mod registers;
mod timer;
mod vectors;

pub use delivery::{deliver, deliver_ipi};
pub use umbra_arch::local_apic::index;

use self::msr::base;
use self::registers::{SVR_ENABLE, error, lvt};
use self::timer::Timer;
use self::vectors::VectorSet;
use crate::interrupt::{DeliveryMode, InterruptMessage, Ipi, Shorthand};
use crate::{Device, MmioDevice, regmap};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// Frequency in hertz at which the timer counts before its divider: the crystal of CPUID leaf 15h,
/// which is the TSC's, too.
pub const LAPIC_HZ: u64 = umbra_arch::time::TSC_HZ;
/// Address of the registers after reset.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;
/// Bytes of the register page.
pub const MMIO_SIZE: u64 = 0x1000;

/// What distinguishes one local APIC from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicConfig {
    /// APIC id, as in CPUID leaves 1 and 0Bh and the MADT.
    pub id: u32,
    /// Bootstrap processor.
    pub bsp: bool,
    /// MAXPHYADDR, for the reserved bits of IA32_APIC_BASE.
    pub physical_bits: u32,
    /// CPUID offers x2APIC.
    pub x2apic: bool,
    /// CPUID offers the TSC-deadline timer.
    pub tsc_deadline: bool,
}

/// The local APIC of one vCPU.
///
/// Writing a register may make an IPI or an EOI broadcast; the machine takes them with
/// [`take_ipi`](Self::take_ipi) and [`take_eoi`](Self::take_eoi) after each write and hands the first
/// to [`deliver_ipi`], the second to the I/O APICs. Requests for the CPU other than vectors (NMI, INIT,
/// start-up) wait in their own flags.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lapic {
    config: LapicConfig,
    base: u64,
    tpr: u8,
    ldr: u32,
    dfr: u32,
    svr: u32,
    requests: VectorSet,
    in_service: VectorSet,
    trigger_mode: VectorSet,
    /// ESR as software sees it.
    error_status: u32,
    /// Errors since ESR was written.
    errors: u32,
    icr: u64,
    /// Timer, thermal, performance, LINT0, LINT1, error.
    lvt: [u32; 6],
    timer: Timer,
    lint_lines: [bool; 2],
    ipi: Option<Ipi>,
    eoi: Option<u8>,
    nmi: bool,
    init_requested: bool,
    startup: Option<u8>,
}

impl Lapic {
    /// A local APIC after power-on.
    pub fn new(config: LapicConfig) -> Self {
        Self {
            config,
            base: DEFAULT_BASE | base::EN | if config.bsp { base::BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            requests: VectorSet::default(),
            in_service: VectorSet::default(),
            trigger_mode: VectorSet::default(),
            error_status: 0,
            errors: 0,
            icr: 0,
            lvt: [lvt::MASKED; 6],
            timer: Timer::new(0),
            lint_lines: [false; 2],
            ipi: None,
            eoi: None,
            nmi: false,
            init_requested: false,
            startup: None,
        }
    }

    /// Programs what a BIOS leaves behind: software-enabled, LINT0 = ExtINT (open on the bootstrap
    /// processor only), LINT1 = NMI.
    pub fn set_virtual_wire(&mut self) {
        self.svr |= SVR_ENABLE;
        self.lvt[3] = 0x700 | if self.config.bsp { 0 } else { lvt::MASKED };
        self.lvt[4] = 0x400;
    }

    /// APIC id.
    pub fn id(&self) -> u32 {
        self.config.id
    }

    /// IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.base
    }

    /// Whether IA32_APIC_BASE.EN is set; CPUID.1:EDX.APIC follows it.
    pub fn is_enabled(&self) -> bool {
        self.base & base::EN != 0
    }

    /// Whether it is in x2APIC mode.
    pub fn is_x2apic(&self) -> bool {
        self.base & base::MODE == base::MODE
    }

    /// Physical address of the register page if there is one: enabled and not in x2APIC mode.
    pub fn mmio_base(&self) -> Option<u64> {
        (self.base & base::MODE == base::EN).then_some(self.base & !0xfff)
    }

    /// TSC minus virtual time's ticks modulo 2^64: what IA32_TSC_DEADLINE is relative to. To be called
    /// when the guest writes IA32_TIME_STAMP_COUNTER or IA32_TSC_ADJUST.
    pub fn set_tsc_offset(&mut self, now: VirtualTime, offset: u64) {
        self.advance(now);
        self.timer.set_tsc_offset(now, offset);
        self.advance(now);
    }

    /// CR8: the task priority class.
    pub fn cr8(&self) -> u8 {
        self.tpr >> 4
    }

    /// MOV to CR8.
    pub fn set_cr8(&mut self, value: u8) {
        self.tpr = value << 4;
    }

    /// Processor priority register: the higher of task priority and interrupt in service.
    pub fn processor_priority(&self) -> u8 {
        let serving = self.in_service.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= serving { self.tpr } else { serving }
    }

    /// Whether a request outranks the processor priority. (The 8259's INTR is the machine's to add, if
    /// [`accepts_extint`](Self::accepts_extint).)
    #[inline]
    pub fn interrupt_pending(&self) -> bool {
        self.deliverable().is_some()
    }

    /// The CPU takes the interrupt: its vector, which goes in service, or the spurious vector if
    /// nothing outranks the processor priority any more.
    pub fn acknowledge(&mut self) -> u8 {
        let Some(vector) = self.deliverable() else { return self.svr as u8 };
        self.requests.set(vector, false);
        self.in_service.set(vector, true);
        vector
    }

    /// A fixed interrupt arrives. Vectors below 16 are an error; a software-disabled APIC takes none.
    pub fn accept(&mut self, vector: u8, level: bool) {
        if !self.takes_vectors() {
            return;
        }
        if vector < 16 {
            return self.record_error(error::RECEIVE_ILLEGAL_VECTOR);
        }
        self.requests.set(vector, true);
        self.trigger_mode.set(vector, level);
    }

    /// Whether the 8259's INTR reaches the CPU: the APIC is off, or LINT0 is open as ExtINT.
    pub fn accepts_extint(&self) -> bool {
        !self.is_enabled() || self.lvt[3] & (lvt::MASKED | 0x700) == 0x700
    }

    /// Level of a local interrupt pin: 0 is the 8259's INTR, 1 is NMI.
    pub fn set_lint(&mut self, pin: usize, level: bool) {
        let Some(line) = self.lint_lines.get_mut(pin) else { return };
        let rose = level && !*line;
        *line = level;
        let entry = self.lvt[3 + pin];
        if !self.is_enabled() {
            self.nmi |= rose && pin == 1;
            return;
        }
        if entry & lvt::MASKED != 0 {
            return;
        }
        match DeliveryMode::of_field(entry >> 8) {
            Some(DeliveryMode::Fixed) if entry & lvt::LEVEL != 0 => self.raise_level_lint(pin),
            Some(DeliveryMode::Fixed) if rose => self.accept(entry as u8, false),
            Some(DeliveryMode::Nmi) => self.nmi |= rose,
            Some(DeliveryMode::Init) => self.init_requested |= rose,
            _ => {}
        }
    }

    /// The IPI that the last write made.
    pub fn take_ipi(&mut self) -> Option<Ipi> {
        self.ipi.take()
    }

    /// The level-triggered vector that the last write ended, for the I/O APICs.
    pub fn take_eoi(&mut self) -> Option<u8> {
        self.eoi.take()
    }

    /// Whether an NMI waits.
    pub fn nmi_pending(&self) -> bool {
        self.nmi
    }

    /// Takes a waiting NMI.
    pub fn take_nmi(&mut self) -> bool {
        std::mem::take(&mut self.nmi)
    }

    /// Whether an INIT waits.
    pub fn init_pending(&self) -> bool {
        self.init_requested
    }

    /// Takes a waiting INIT; the machine resets the CPU's state and calls [`init`](Self::init).
    pub fn take_init(&mut self) -> bool {
        std::mem::take(&mut self.init_requested)
    }

    /// Whether a start-up IPI waits.
    pub fn startup_pending(&self) -> bool {
        self.startup.is_some()
    }

    /// Takes a start-up IPI's vector. One that comes while the CPU does not wait for it is to be
    /// taken and dropped.
    pub fn take_startup(&mut self) -> Option<u8> {
        self.startup.take()
    }

    /// INIT reset: as after power-on, but id, IA32_APIC_BASE and a start-up IPI that came later stay.
    pub fn init(&mut self) {
        self.reset_registers();
        self.init_requested = false;
        self.nmi = false;
    }

    /// Whether it takes vectors at all: enabled in IA32_APIC_BASE and in its spurious-interrupt register.
    pub fn takes_vectors(&self) -> bool {
        self.is_enabled() && self.is_software_enabled()
    }

    fn is_software_enabled(&self) -> bool {
        self.svr & SVR_ENABLE != 0
    }

    fn logical_id(&self) -> u32 {
        if self.is_x2apic() { (self.config.id >> 4) << 16 | 1 << (self.config.id & 0xf) } else { self.ldr }
    }

    /// The highest request if its class outranks the processor priority's.
    fn deliverable(&self) -> Option<u8> {
        let vector = self.requests.highest()?;
        (self.is_enabled() && vector >> 4 > self.processor_priority() >> 4).then_some(vector)
    }

    fn end_of_interrupt(&mut self) {
        let Some(vector) = self.in_service.highest() else { return };
        self.in_service.set(vector, false);
        if !self.trigger_mode.contains(vector) {
            return;
        }
        self.eoi = Some(vector);
        for pin in 0..2 {
            let entry = &mut self.lvt[3 + pin];
            if *entry & lvt::REMOTE_IRR != 0 && *entry & lvt::VECTOR == vector.into() {
                *entry &= !lvt::REMOTE_IRR;
                self.raise_level_lint(pin);
            }
        }
    }

    /// Requests a level-triggered local interrupt whose line is up and which is not being served.
    fn raise_level_lint(&mut self, pin: usize) {
        let entry = self.lvt[3 + pin];
        let fixed_level = entry & (lvt::LEVEL | 0x700) == lvt::LEVEL;
        if self.lint_lines[pin] && fixed_level && entry & (lvt::MASKED | lvt::REMOTE_IRR) == 0 {
            self.lvt[3 + pin] |= lvt::REMOTE_IRR;
            self.accept(entry as u8, true);
        }
    }

    fn send_self(&mut self, vector: u8) {
        if vector < 16 {
            return self.record_error(error::SEND_ILLEGAL_VECTOR);
        }
        self.ipi = Some(Ipi {
            message: InterruptMessage {
                destination: self.config.id,
                logical: false,
                mode: DeliveryMode::Fixed,
                vector,
                level: false,
                assert: true,
            },
            shorthand: Shorthand::SelfOnly,
        });
    }

    /// Notes an error and raises the error interrupt, whose own illegal vector raises nothing more.
    fn record_error(&mut self, bit: u32) {
        if self.errors & bit != 0 {
            return;
        }
        self.errors |= bit;
        let entry = self.lvt[5];
        if entry & lvt::MASKED != 0 {
            return;
        }
        if entry & lvt::VECTOR < 16 {
            self.errors |= error::RECEIVE_ILLEGAL_VECTOR;
        } else {
            self.accept(entry as u8, false);
        }
    }

    /// Everything but identity, base, pin levels and the TSC's offset.
    fn reset_registers(&mut self) {
        *self = Self {
            base: self.base,
            lint_lines: self.lint_lines,
            timer: Timer::new(self.timer.tsc_offset()),
            nmi: self.nmi,
            init_requested: self.init_requested,
            startup: self.startup,
            ..Self::new(self.config)
        };
    }
}

impl Device for Lapic {
    fn advance(&mut self, now: VirtualTime) {
        if self.timer.advance(now) && self.lvt[0] & lvt::MASKED == 0 {
            self.accept(self.lvt[0] as u8, false);
        }
    }
    fn next_event(&self) -> Option<VirtualTime> {
        self.timer.next_event().filter(|_| self.lvt[0] & lvt::MASKED == 0)
    }
    fn reset(&mut self) {
        let timer = Timer::new(self.timer.tsc_offset());
        *self = Self { lint_lines: self.lint_lines, timer, ..Self::new(self.config) };
    }
}

/// The xAPIC page. Registers are 32 bits wide at multiples of 16; narrower reads see their bytes,
/// other writes are ignored.
impl MmioDevice for Lapic {
    fn mmio_read(&mut self, now: VirtualTime, offset: u64, width: AccessWidth) -> u64 {
        self.advance(now);
        let Some(value) = self.read_register(now, (offset as u16 & 0xfff) >> 4) else {
            self.record_error(error::ILLEGAL_REGISTER);
            return 0;
        };
        if offset & 0xf < 4 { regmap::extract(value, offset as u32 & 3, width).into() } else { 0 }
    }
    fn mmio_write(&mut self, now: VirtualTime, offset: u64, width: AccessWidth, value: u64) {
        self.advance(now);
        if offset & 0xf != 0 || width != AccessWidth::Dword {
            return;
        }
        if !self.write_register(now, (offset as u16 & 0xfff) >> 4, value as u32) {
            self.record_error(error::ILLEGAL_REGISTER);
        }
        self.advance(now);
    }
}

#[cfg(test)]
mod tests;
