//! Interrupt lines and messages: from devices' outputs to the CPUs.

use super::{CpuSignal, Pc, Request};
use crate::acpi::{SCI_IRQ, TIMER_PIN};
use crate::events::Source;
use umbra_arch::VirtualTime;
use umbra_devices::uart::COM1_IRQ;
use umbra_devices::{Device, lapic, test_device};

const TIMER_IRQ: u8 = 0;
const KEYBOARD_IRQ: u8 = 1;
const CASCADE: u8 = 2;
const RTC_IRQ: u8 = 8;
const MOUSE_IRQ: u8 = 12;
const ISA_IRQS: u8 = 16;
/// I/O APIC pins that HPET timers can be routed to.
const HPET_PINS: std::ops::Range<u8> = 20..24;
/// Local interrupt pin that the 8259's INTR is wired to.
const LINT0: usize = 0;

impl Pc {
    /// Reads the outputs of one device, passes on what changed and enters its next event.
    #[inline]
    pub(super) fn settle(&mut self, source: Source) {
        let devices = &mut self.devices;
        let next = match source {
            Source::Pit => {
                let (level, rise) = (devices.pit.irq0(), devices.pit.take_irq0_rise());
                if !devices.hpet.replaces_legacy() {
                    self.pulse(TIMER_IRQ, rise, level);
                }
                self.devices.pit.next_event()
            }
            Source::Rtc => {
                let level = devices.rtc.irq();
                if !devices.hpet.replaces_legacy() {
                    self.set_line(RTC_IRQ, level);
                }
                self.devices.rtc.next_event()
            }
            Source::Com1 => {
                let level = devices.com1.irq();
                self.set_line(COM1_IRQ, level);
                self.collect_serial();
                self.devices.com1.next_event()
            }
            Source::Keyboard => {
                let (keyboard, mouse, reset) =
                    (devices.keyboard.irq1(), devices.keyboard.irq12(), devices.keyboard.take_reset_request());
                self.set_line(KEYBOARD_IRQ, keyboard);
                self.set_line(MOUSE_IRQ, mouse);
                if reset {
                    self.ask(Request::Reset);
                }
                self.devices.keyboard.next_event()
            }
            Source::AcpiPm => {
                let level = devices.acpi_pm.sci();
                self.set_line(SCI_IRQ, level);
                self.poll_power();
                self.devices.acpi_pm.next_event()
            }
            Source::Hpet => {
                self.settle_hpet();
                self.devices.hpet.next_event()
            }
            Source::Lapic(n) => {
                self.settle_interrupts();
                self.devices.lapics.get(n as usize).and_then(Device::next_event).filter(|_| !self.is_apic_lent())
            }
            Source::Pages => devices.arrivals.next_event(),
            Source::HostInput => return,
        };
        self.enter(source, next);
    }

    fn enter(&mut self, source: Source, next: Option<VirtualTime>) {
        let next = next.filter(|&time| time != VirtualTime::NEVER);
        self.events.schedule(source, next.map(|time| time.max(self.latest)));
        self.attention |= next.is_some_and(|time| time < self.slice_end);
    }

    /// The HPET's own pins, and in legacy replacement mode the PIT's and the RTC's lines.
    fn settle_hpet(&mut self) {
        let hpet = &mut self.devices.hpet;
        let (pulses, levels, legacy) = (hpet.take_pulses(), hpet.levels(), hpet.replaces_legacy());
        for line in HPET_PINS {
            self.set_hpet_line(line, pulses, levels);
        }
        if legacy {
            self.set_hpet_line(TIMER_IRQ, pulses, levels);
            self.set_hpet_line(RTC_IRQ, pulses, levels);
        } else {
            self.held &= !(1 << TIMER_IRQ | 1 << RTC_IRQ);
            let (timer, clock) = (self.devices.pit.irq0(), self.devices.rtc.irq());
            self.set_line(TIMER_IRQ, timer);
            self.set_line(RTC_IRQ, clock);
        }
    }

    /// An edge stays on its line until the next one: an 8259 forgets a request whose line falls before
    /// it is acknowledged.
    fn set_hpet_line(&mut self, line: u8, pulses: u32, levels: u32) {
        let bit = 1 << line;
        if pulses & bit != 0 {
            self.held |= bit;
            self.pulse(line, true, true);
        } else if levels & bit != 0 {
            self.held &= !bit;
            self.set_line(line, true);
        } else if self.held & bit == 0 {
            self.set_line(line, false);
        }
    }

    /// Sets a line to `level`, by way of a low and a high if it has risen in between.
    fn pulse(&mut self, line: u8, rise: bool, level: bool) {
        if rise {
            self.set_line(line, false);
            self.set_line(line, true);
        }
        self.set_line(line, level);
    }

    /// Sets an ISA interrupt line at the 8259s and the I/O APIC, or a further pin of the I/O APIC.
    fn set_line(&mut self, irq: u8, level: bool) {
        let bit = 1u32 << irq;
        if (self.lines & bit != 0) == level {
            return;
        }
        self.lines ^= bit;
        if irq < ISA_IRQS {
            self.devices.pic.set_line(irq, level);
        }
        match irq {
            TIMER_IRQ => self.devices.ioapic.set_line(TIMER_PIN, level),
            CASCADE => {}
            other => self.devices.ioapic.set_line(other.into(), level),
        }
        self.settle_interrupts();
    }

    /// After a write to the test device: if it was a line's port, that line has the level written.
    pub(super) fn settle_test_line(&mut self, port: u16) {
        let line = port.wrapping_sub(test_device::LINES_PORT);
        if line < test_device::LINES {
            let level = self.devices.test.lines() >> line & 1 != 0;
            self.set_line(line as u8, level);
        }
    }

    /// Moves messages until all is quiet, then looks which CPUs have something to do.
    pub(super) fn settle_interrupts(&mut self) {
        let devices = &mut self.devices;
        for from in 0..devices.lapics.len() {
            while let Some(ipi) = devices.lapics[from].take_ipi() {
                lapic::deliver_ipi(&mut devices.lapics, from, &ipi);
            }
            while let Some(vector) = devices.lapics[from].take_eoi() {
                devices.ioapic.eoi(vector);
            }
        }
        while let Some((pin, message)) = self.devices.ioapic.take_from_pin() {
            self.send(&message, Some(pin));
        }
        if let Some(waiting) = self.has_waiting_interrupts() {
            // The accelerator looks for itself after each access, and between slices only a sleeper has to be woken.
            return self.pending.fill(waiting);
        }
        let devices = &mut self.devices;
        let intr = devices.pic.intr();
        for (lapic, pending) in devices.lapics.iter_mut().zip(&mut self.pending) {
            lapic.set_lint(LINT0, intr);
            let now_pending = lapic.interrupt_pending() || intr && lapic.accepts_extint();
            self.attention |= now_pending && !*pending || lapic.nmi_pending();
            self.attention |= lapic.init_pending() || lapic.startup_pending();
            *pending = now_pending;
        }
    }

    /// Whether an external interrupt waits for this CPU.
    #[inline]
    pub fn interrupt_pending(&self, vcpu: usize) -> bool {
        self.pending.get(vcpu).copied().unwrap_or(false)
    }

    /// Whether an NMI waits for this CPU.
    pub fn nmi_pending(&self, vcpu: usize) -> bool {
        self.devices.lapics.get(vcpu).is_some_and(|lapic| lapic.nmi_pending())
    }

    /// The CPU takes its interrupt. The 8259 comes first, as its vector doesn't pass the local APIC's
    /// priority logic.
    pub(super) fn acknowledge(&mut self, vcpu: usize) -> Option<u8> {
        let lapic = self.devices.lapics.get_mut(vcpu)?;
        let vector = if self.devices.pic.intr() && lapic.accepts_extint() {
            Some(self.devices.pic.acknowledge())
        } else if lapic.interrupt_pending() {
            Some(lapic.acknowledge())
        } else {
            None
        };
        self.settle_interrupts();
        vector
    }

    /// Takes an INIT or start-up request for this CPU; the caller changes the CPU's state.
    pub fn take_cpu_signal(&mut self, vcpu: usize) -> Option<CpuSignal> {
        let lapic = self.devices.lapics.get_mut(vcpu)?;
        if lapic.take_init() {
            lapic.init();
            if let Some(apf) = self.devices.async_pf.get_mut(vcpu) {
                apf.init();
            }
            self.settle(Source::Lapic(vcpu as u32));
            return Some(CpuSignal::Init);
        }
        lapic.take_startup().map(CpuSignal::StartUp)
    }
}
