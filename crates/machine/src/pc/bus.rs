//! The machine as one virtual CPU sees it.

use super::Pc;
use super::ports::PORT_NS;
use crate::events::Source;
use crate::memory_map::{HPET_BASE, IOAPIC_BASE};
use umbra_arch::msr::kvm_feature;
use umbra_arch::{
    AccessWidth, ApicBus, Bus, Fault, Gpa, GpaPage, PAGE_SIZE, PageAnswer, PageContext, Reply, VirtualTime,
};
use umbra_devices::{InterruptMessage, MmioDevice, hpet, test_device};

/// Virtual time of an access to a local APIC, in nanoseconds.
const LAPIC_NS: u32 = 20;
/// Virtual time of an access to other memory-mapped registers, in nanoseconds.
const MMIO_NS: u32 = 200;
/// Virtual time of a PAUSE while other CPUs run, in nanoseconds.
const PAUSE_NS: u32 = 50;
/// Addresses to which PCI devices write interrupt messages.
const MSI_WINDOW: std::ops::Range<u64> = 0xfee0_0000..0xfef0_0000;

/// [`Pc`] lent to virtual CPU `vcpu` for one slice.
#[derive(Debug)]
pub struct PcBus<'a> {
    pub(super) pc: &'a mut Pc,
    pub(super) vcpu: usize,
}

/// What a physical address outside RAM belongs to.
enum Region {
    Lapic(u64),
    IoApic(u64),
    Hpet(u64),
    Test(u64),
    Nobody,
}

impl<'a> PcBus<'a> {
    pub(super) fn new(pc: &'a mut Pc, vcpu: usize) -> Self {
        Self { pc, vcpu }
    }

    /// Devices see one order of time, whoever touches them.
    #[inline]
    pub(super) fn time(&mut self, now: VirtualTime) -> VirtualTime {
        self.pc.latest = self.pc.latest.max(now);
        self.pc.latest
    }

    #[inline]
    pub(super) fn reply<T>(&mut self, value: T, cost: u32) -> Reply<T> {
        Reply { value, cost, attention: std::mem::take(&mut self.pc.attention) }
    }

    #[inline]
    fn region(&self, gpa: Gpa) -> Region {
        let gpa = gpa.raw();
        let inside = |base: u64| gpa.checked_sub(base).filter(|&offset| offset < PAGE_SIZE);
        let lapic = self.pc.devices.lapics.get(self.vcpu).filter(|_| !self.pc.is_apic_lent());
        let lapic = lapic.and_then(|lapic| lapic.mmio_base());
        if let Some(offset) = lapic.and_then(inside) {
            Region::Lapic(offset)
        } else if let Some(offset) = inside(IOAPIC_BASE) {
            Region::IoApic(offset)
        } else if let Some(offset) = inside(HPET_BASE).filter(|&offset| offset < hpet::MMIO_SIZE) {
            Region::Hpet(offset)
        } else if let Some(offset) =
            gpa.checked_sub(test_device::WINDOW_BASE).filter(|&o| o < test_device::WINDOW_BYTES)
        {
            Region::Test(offset)
        } else {
            Region::Nobody
        }
    }

    fn lapic_source(&self) -> Source {
        Source::Lapic(self.vcpu as u32)
    }
}

impl Bus for PcBus<'_> {
    fn mmio_read(&mut self, now: VirtualTime, gpa: Gpa, width: AccessWidth) -> Reply<u64> {
        let now = self.time(now);
        match self.region(gpa) {
            Region::Lapic(offset) => {
                let value = match self.pc.devices.lapics.get_mut(self.vcpu) {
                    Some(lapic) => lapic.mmio_read(now, offset, width),
                    None => width.mask(),
                };
                self.pc.settle(self.lapic_source());
                self.reply(value, LAPIC_NS)
            }
            Region::IoApic(offset) => {
                let value = self.pc.devices.ioapic.mmio_read(now, offset, width);
                self.reply(value, MMIO_NS)
            }
            Region::Hpet(offset) => {
                let value = self.pc.devices.hpet.mmio_read(now, offset, width);
                self.pc.settle(Source::Hpet);
                self.reply(value, MMIO_NS)
            }
            Region::Test(offset) => {
                let value = self.pc.devices.test.mmio_read(now, offset, width);
                self.reply(value, MMIO_NS)
            }
            Region::Nobody => self.reply(width.mask(), MMIO_NS),
        }
    }

    fn mmio_write(&mut self, now: VirtualTime, gpa: Gpa, width: AccessWidth, value: u64) -> Reply<()> {
        let now = self.time(now);
        match self.region(gpa) {
            Region::Lapic(offset) => {
                if let Some(lapic) = self.pc.devices.lapics.get_mut(self.vcpu) {
                    lapic.mmio_write(now, offset, width, value);
                }
                self.pc.settle(self.lapic_source());
                self.reply((), LAPIC_NS)
            }
            Region::IoApic(offset) => {
                self.pc.devices.ioapic.mmio_write(now, offset, width, value);
                self.pc.settle_interrupts();
                self.reply((), MMIO_NS)
            }
            Region::Hpet(offset) => {
                self.pc.devices.hpet.mmio_write(now, offset, width, value);
                self.pc.settle(Source::Hpet);
                self.reply((), MMIO_NS)
            }
            Region::Test(offset) => {
                self.pc.devices.test.mmio_write(now, offset, width, value);
                self.reply((), MMIO_NS)
            }
            Region::Nobody => self.reply((), MMIO_NS),
        }
    }

    fn port_read(&mut self, now: VirtualTime, port: u16, width: AccessWidth) -> Reply<u32> {
        let now = self.time(now);
        let value = self.pc.read_port(now, port, width);
        self.reply(value, PORT_NS)
    }

    fn port_write(&mut self, now: VirtualTime, port: u16, width: AccessWidth, value: u32) -> Reply<()> {
        let now = self.time(now);
        self.pc.write_port(now, port, width, value);
        self.reply((), PORT_NS)
    }

    fn apic_msr_read(&mut self, now: VirtualTime, msr: u32) -> Result<Reply<u64>, Fault> {
        let now = self.time(now);
        if kvm_feature(msr).is_some() {
            return self.pc.async_pf_read(self.vcpu, msr);
        }
        let lapic = self.pc.devices.lapics.get_mut(self.vcpu).ok_or(Fault::GP0)?;
        let value = lapic.msr_read(now, msr)?;
        self.pc.settle(self.lapic_source());
        Ok(self.reply(value, LAPIC_NS))
    }

    fn apic_msr_write(&mut self, now: VirtualTime, msr: u32, value: u64) -> Result<Reply<()>, Fault> {
        let now = self.time(now);
        if kvm_feature(msr).is_some() {
            return self.pc.async_pf_write(self.vcpu, msr, value);
        }
        let lapic = self.pc.devices.lapics.get_mut(self.vcpu).ok_or(Fault::GP0)?;
        lapic.msr_write(now, msr, value)?;
        self.pc.settle(self.lapic_source());
        Ok(self.reply((), LAPIC_NS))
    }

    fn read_cr8(&mut self) -> u8 {
        self.pc.devices.lapics.get(self.vcpu).map_or(0, |lapic| lapic.cr8())
    }

    fn write_cr8(&mut self, now: VirtualTime, value: u8) -> Reply<()> {
        self.time(now);
        if let Some(lapic) = self.pc.devices.lapics.get_mut(self.vcpu) {
            lapic.set_cr8(value);
        }
        self.pc.settle_interrupts();
        self.reply((), 0)
    }

    /// Only the only CPU's local APIC is lent: what one CPU sends to another doesn't leave the kernel.
    fn apic_bus(&mut self) -> Option<&mut dyn ApicBus> {
        if self.pc.devices.lapics.len() == 1 { Some(self) } else { None }
    }

    #[inline]
    fn interrupt_pending(&mut self) -> bool {
        self.pc.interrupt_pending(self.vcpu)
    }

    fn interrupt_acknowledge(&mut self, now: VirtualTime) -> Option<u8> {
        self.time(now);
        self.pc.acknowledge(self.vcpu)
    }

    fn take_nmi(&mut self) -> bool {
        self.pc.devices.lapics.get_mut(self.vcpu).is_some_and(|lapic| lapic.take_nmi())
    }

    fn shared_time(&mut self, now: VirtualTime) -> VirtualTime {
        self.time(now)
    }

    fn tsc_moved(&mut self, now: VirtualTime, offset: u64) -> Reply<()> {
        let now = self.time(now);
        if let Some(lapic) = self.pc.devices.lapics.get_mut(self.vcpu) {
            lapic.set_tsc_offset(now, offset);
        }
        self.pc.settle(self.lapic_source());
        self.reply((), 0)
    }

    fn page_absent(&mut self, now: VirtualTime, page: GpaPage, context: PageContext) -> PageAnswer {
        let now = self.time(now);
        self.pc.need_page(self.vcpu, now, page, context)
    }

    fn pause(&mut self, _: VirtualTime) -> Reply<()> {
        if !self.pc.has_rivals {
            return Reply::quiet(());
        }
        self.pc.yielded = true;
        Reply { value: (), cost: PAUSE_NS, attention: true }
    }

    fn a20(&self) -> bool {
        self.pc.a20
    }
}

impl Pc {
    /// A device writes an interrupt message to memory ("Message Signalled Interrupts").
    pub fn message_signalled(&mut self, address: u64, data: u32) {
        if !MSI_WINDOW.contains(&address) {
            return;
        }
        if let Some(message) = InterruptMessage::of_msi(address, data) {
            self.send(&message, None);
            self.settle_interrupts();
        }
    }
}
