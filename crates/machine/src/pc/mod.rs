//! The classic PC: which device answers where, and whose interrupt line goes where.
//!
//! [`Pc`] owns the devices and the agenda; [`bus::PcBus`] lends it to one virtual CPU as its
//! [`Bus`](umbra_arch::Bus). After each access the outputs of the device that was touched are read
//! and passed on; nothing calls back.

mod apic_loan;
mod bus;
mod interrupts;
mod lazy;
mod ports;
mod serial;

pub use bus::PcBus;
pub(crate) use lazy::LazyRam;
pub use lazy::PageStats;
pub use serial::SerialOutput;

use crate::events::{Events, Source};
use serde::{Deserialize, Serialize};
use umbra_arch::VirtualTime;
use umbra_arch::cpuid::{CpuidProfile, Feature};
use umbra_devices::{
    AcpiPm, AsyncPf, DebugConsole, DebugExit, Device, FwCfg, Hpet, I8042, IoApic, Lapic, LapicConfig, PageArrivals,
    PciBus, PicPair, Pit, Port92, PortDevice, PostPort, PowerRequest, ResetControl, Rtc, TestDevice, Uart, fw_cfg,
    uart,
};

/// Something that ends or restarts the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// ACPI S5.
    PowerOff,
    /// Another ACPI sleep state, which we don't have.
    Sleep(u8),
    /// One of the reset lines: keyboard controller, port 92h, CF9h.
    Reset,
    /// A write to the debug-exit port.
    DebugExit(u32),
    /// The expected string appeared on the serial line.
    Expected,
    /// A measured guest begins (its id) or ends (0) a phase.
    Mark(u8),
}

/// What another CPU or itself did to a CPU through the local APICs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CpuSignal {
    /// INIT.
    Init,
    /// A start-up IPI with this vector.
    StartUp(u8),
}

/// Every device, each in its own section of a save file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Devices {
    pub(crate) pic: PicPair,
    pub(crate) pit: Pit,
    pub(crate) rtc: Rtc,
    pub(crate) com1: Uart,
    pub(crate) keyboard: I8042,
    pub(crate) acpi_pm: AcpiPm,
    pub(crate) hpet: Hpet,
    pub(crate) pci: PciBus,
    pub(crate) port92: Port92,
    pub(crate) reset_control: ResetControl,
    pub(crate) debug_exit: DebugExit,
    pub(crate) debug_console: DebugConsole,
    pub(crate) post: PostPort,
    pub(crate) test: TestDevice,
    pub(crate) fw_cfg: FwCfg,
    pub(crate) ioapic: IoApic,
    pub(crate) lapics: Vec<Lapic>,
    pub(crate) async_pf: Vec<AsyncPf>,
    pub(crate) arrivals: PageArrivals,
}

/// How a [`Pc`] is built.
#[derive(Clone, Debug)]
pub struct PcConfig<'a> {
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// The CPUs' CPUID profile.
    pub profile: &'a CpuidProfile,
    /// What the clock shows at virtual time 0, in seconds since 1970 (UTC).
    pub rtc_start: i64,
    /// RAM below and above 4 GiB, in bytes.
    pub ram: (u64, u64),
}

/// The machine without CPUs and RAM.
#[derive(Clone, Debug)]
pub struct Pc {
    pub(crate) devices: Devices,
    pub(crate) events: Events,
    pub(crate) serial: SerialOutput,
    /// No access is earlier than this: virtual CPUs take turns, devices see one order.
    pub(crate) latest: VirtualTime,
    /// Levels of the interrupt lines as last passed on: ISA interrupts 0 to 15, then I/O APIC pins from 16.
    lines: u32,
    /// Lines that an HPET timer's edge holds high.
    held: u32,
    /// RAM, where it arrives on demand.
    pub(crate) lazy: Option<LazyRam>,
    /// While an accelerator has the local APIC: the messages for it.
    lent: Option<apic_loan::Waiting>,
    /// Per CPU: an interrupt waits.
    pending: Vec<bool>,
    /// End of the running slice: an event before it needs attention.
    slice_end: VirtualTime,
    /// The running engine must come back.
    attention: bool,
    /// Other CPUs run besides the one whose slice it is.
    has_rivals: bool,
    /// The running CPU gave up the rest of its turn.
    yielded: bool,
    a20: bool,
    request: Option<Request>,
    measurement_port: Option<u16>,
}

impl Pc {
    /// A PC after power-on, with what a BIOS would have done to its interrupt controllers.
    pub fn new(config: &PcConfig<'_>) -> Self {
        let lapics = (0..config.vcpus).map(|id| lapic(id, config.profile)).collect::<Vec<_>>();
        let mut rtc = Rtc::new(config.rtc_start);
        rtc.set_memory_size(config.ram.0, config.ram.1);
        let events = Events::new(lapics.len());
        let pending = vec![false; lapics.len()];
        let devices = Devices {
            pic: PicPair::default(),
            pit: Pit::default(),
            rtc,
            com1: Uart::new(uart::COM1_BASE),
            keyboard: I8042::default(),
            acpi_pm: AcpiPm::default(),
            hpet: Hpet::default(),
            pci: PciBus::chipset(),
            port92: Port92::default(),
            reset_control: ResetControl::default(),
            debug_exit: DebugExit::default(),
            debug_console: DebugConsole::default(),
            post: PostPort::default(),
            test: TestDevice::default(),
            fw_cfg: firmware_configuration(config),
            ioapic: IoApic::new(crate::acpi::IOAPIC_ID),
            lapics,
            async_pf: (0..config.vcpus).map(AsyncPf::new).collect(),
            arrivals: PageArrivals::default(),
        };
        let mut pc = Self {
            devices,
            events,
            serial: SerialOutput::default(),
            latest: VirtualTime(0),
            lines: 0,
            held: 0,
            lazy: None,
            lent: None,
            pending,
            slice_end: VirtualTime(0),
            attention: false,
            has_rivals: false,
            yielded: false,
            a20: false,
            request: None,
            measurement_port: None,
        };
        pc.refresh();
        pc
    }

    /// Opens the A20 gate, as every boot loader does before it enters a kernel.
    pub fn open_a20(&mut self) {
        const FAST_A20: u32 = 2;
        self.devices.port92.port_write(self.latest, 0x92, umbra_arch::AccessWidth::Byte, FAST_A20);
        self.refresh();
    }

    /// Makes these byte writes to ports, which a BIOS would have made before it starts a kernel.
    pub fn write_ports(&mut self, writes: &[(u16, u8)]) {
        for &(port, value) in writes {
            self.write_port(self.latest, port, umbra_arch::AccessWidth::Byte, value.into());
        }
        self.refresh();
    }

    /// Makes `port` the measurement port, whoever owns it otherwise: a byte written there stops the run
    /// with [`Request::Mark`].
    pub fn set_measurement_port(&mut self, port: u16) {
        self.measurement_port = Some(port);
    }

    /// The machine as seen by virtual CPU `vcpu` for a slice that ends at `until`.
    pub fn bus(&mut self, vcpu: usize, until: VirtualTime) -> PcBus<'_> {
        self.slice_end = until;
        self.attention = false;
        PcBus::new(self, vcpu)
    }

    /// Whether CPUs that pause shall make room for others, from the next slice on.
    pub(crate) fn set_rivals(&mut self, has_rivals: bool) {
        self.has_rivals = has_rivals;
        self.yielded = false;
    }

    /// Whether the CPU whose slice has just ended paused.
    pub(crate) fn take_yield(&mut self) -> bool {
        std::mem::take(&mut self.yielded)
    }

    /// Reads every output anew and passes it on; after construction and restore.
    pub(crate) fn refresh(&mut self) {
        for source in
            [Source::Pit, Source::Rtc, Source::Com1, Source::Keyboard, Source::AcpiPm, Source::Hpet, Source::Pages]
        {
            self.settle(source);
        }
        for n in 0..self.devices.lapics.len() {
            self.settle(Source::Lapic(n as u32));
        }
        self.update_a20();
        self.settle_interrupts();
    }

    /// The next event's time.
    pub fn next_event(&self) -> Option<VirtualTime> {
        self.events.earliest()
    }

    /// Lets everything happen that is due at `now`. Says whether the host's input is to be looked at.
    pub fn deliver_due(&mut self, now: VirtualTime) -> bool {
        let mut host_input = false;
        while let Some((time, source)) = self.events.pop_due(now) {
            let time = time.max(self.latest);
            self.latest = time;
            match source {
                Source::Pit => self.devices.pit.advance(time),
                Source::Rtc => self.devices.rtc.advance(time),
                Source::Com1 => self.devices.com1.advance(time),
                Source::Keyboard => self.devices.keyboard.advance(time),
                Source::AcpiPm => self.devices.acpi_pm.advance(time),
                Source::Hpet => self.devices.hpet.advance(time),
                Source::Pages => self.pages_arrive(time),
                Source::HostInput => host_input = true,
                Source::Lapic(n) => {
                    if let Some(lapic) = self.devices.lapics.get_mut(n as usize) {
                        lapic.advance(time);
                    }
                }
            }
            self.settle(source);
        }
        host_input
    }

    /// Enters or removes the event at which the host's input is looked at.
    pub fn schedule_host_input(&mut self, time: Option<VirtualTime>) {
        self.events.schedule(Source::HostInput, time);
    }

    /// A byte from the host for the first serial port; false if it has no room now.
    pub fn receive_serial(&mut self, byte: u8) -> bool {
        if !self.devices.com1.can_receive() {
            return false;
        }
        self.devices.com1.receive(self.latest, byte);
        self.settle(Source::Com1);
        true
    }

    /// Takes what ends the run, if anything does.
    pub fn take_request(&mut self) -> Option<Request> {
        self.request.take()
    }

    /// The serial line's output and what is looked for in it.
    pub fn serial_mut(&mut self) -> &mut SerialOutput {
        &mut self.serial
    }

    /// Levels of the lines, and those that an edge holds.
    pub(crate) fn lines(&self) -> (u32, u32) {
        (self.lines, self.held)
    }

    /// After a restore: the levels that the restored controllers have seen.
    pub(crate) fn set_lines(&mut self, lines: (u32, u32)) {
        (self.lines, self.held) = lines;
    }

    fn ask(&mut self, request: Request) {
        self.request.get_or_insert(request);
        self.attention = true;
    }

    fn update_a20(&mut self) {
        self.a20 = self.devices.port92.a20() || self.devices.keyboard.a20();
    }

    fn poll_power(&mut self) {
        if let Some(request) = self.devices.acpi_pm.take_request() {
            self.ask(match request {
                PowerRequest::PowerOff => Request::PowerOff,
                PowerRequest::Sleep(state) => Request::Sleep(state),
            });
        }
    }
}

/// What the firmware-configuration device tells. Its DMA isn't offered: port access does all.
fn firmware_configuration(config: &PcConfig<'_>) -> FwCfg {
    const PORT_INTERFACE: u32 = 1;
    let mut fw_cfg = FwCfg::new();
    fw_cfg.set_item(fw_cfg::key::ID, PORT_INTERFACE.to_le_bytes().to_vec());
    fw_cfg.set_item(fw_cfg::key::RAM_SIZE, (config.ram.0 + config.ram.1).to_le_bytes().to_vec());
    for key in [fw_cfg::key::CPUS, fw_cfg::key::MAX_CPUS] {
        fw_cfg.set_item(key, (config.vcpus as u16).to_le_bytes().to_vec());
    }
    fw_cfg
}

fn lapic(id: u32, profile: &CpuidProfile) -> Lapic {
    let mut lapic = Lapic::new(LapicConfig {
        id,
        bsp: id == 0,
        physical_bits: profile.maxphyaddr.into(),
        x2apic: profile.has(Feature::X2apic),
        tsc_deadline: profile.has(Feature::TscDeadline),
    });
    lapic.set_virtual_wire();
    lapic
}
