//! A local APIC in the kernel, which the machine's I/O APIC and 8259s send to (split irqchip). The 8259s get through where
//! LINT0 is open as ExtINT or the local APIC is off; LINT0 as a fixed interrupt or NMI is connected to nothing.

use super::error::{KvmError, failed};
use super::ioctls;
use super::irqchip::PINS;
use super::lapic_page;
use super::registers::Registers;
use super::vm::Vm;
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_msi,
};
use std::time::{Duration, Instant};
use umbra_arch::local_apic::ApicBus;
use umbra_arch::{ApicMessage, LocalApic, VirtualTime};

/// Message data: level-triggered.
const LEVEL: u32 = 1 << 15;

/// After so long what KVM was given has reached the guest, even where that takes hundreds of interpreted instructions.
const SURE_DELIVERY: Duration = Duration::from_millis(2);
/// As long as the guest has run so often, until it was kicked. (One kick may have come before KVM_RUN.)
const SURE_RUNS: u32 = 3;

/// Since something was seen on its way through KVM.
#[derive(Debug)]
struct Wait {
    since: Instant,
    runs: u32,
}

impl Default for Wait {
    fn default() -> Self {
        Self { since: Instant::now(), runs: 0 }
    }
}

impl Wait {
    fn is_over(&mut self, kicked: bool) -> bool {
        self.runs += u32::from(kicked);
        self.runs >= SURE_RUNS && self.since.elapsed() > SURE_DELIVERY
    }
}

/// What is to be known about it outside of the kernel.
#[derive(Default)]
pub(super) struct KernelApic {
    /// The machine's local APIC is in the kernel.
    is_held: bool,
    /// The level-triggered message that each pin sent last: KVM tells of the ends of these only.
    routes: [Option<ApicMessage>; PINS],
    /// A vector of the 8259s' that KVM hasn't taken yet.
    vector: Option<u8>,
    /// KVM was given a vector.
    on_its_way: Option<Wait>,
    /// The timer has expired, and it can't be seen whether KVM has made an interrupt of that.
    timer_at_end: Option<Wait>,
    /// Its state when there was nothing else to say.
    settled: Option<LocalApic>,
}

impl KernelApic {
    /// Fetches the machine's local APIC, unless that was done.
    pub(super) fn hold(
        &mut self,
        registers: &Registers,
        vm: &Vm,
        bus: &mut dyn ApicBus,
        now: VirtualTime,
    ) -> Result<(), KvmError> {
        if self.is_held {
            return Ok(());
        }
        self.is_held = true;
        let loan = bus.lend(now);
        registers.set_local_apic(&loan.apic)?;
        self.routes = [None; PINS];
        for message in &loan.unfinished {
            self.note_route(message);
        }
        self.set_routes(vm)
    }

    /// Gives the local APIC back as it was when [`settle`](Self::settle) was content with it.
    pub(super) fn give_back(&mut self, bus: &mut dyn ApicBus, now: VirtualTime) {
        if let Some(apic) = self.settled.take().filter(|_| self.is_held) {
            bus.take_back(now, &apic);
            *self = Self::default();
        }
    }

    /// Delivers what waits for the local APIC. `is_ready` says that KVM takes an interrupt of the 8259s' now; gives
    /// whether one waits for that.
    pub(super) fn feed(
        &mut self,
        registers: &Registers,
        vm: &Vm,
        bus: &mut dyn ApicBus,
        now: VirtualTime,
        is_ready: bool,
    ) -> Result<bool, KvmError> {
        while let Some(message) = bus.next_message() {
            if self.note_route(&message) {
                self.set_routes(vm)?;
            }
            let msi = kvm_msi { address_lo: message.address as u32, data: message.data, ..Default::default() };
            vm.fd.signal_msi(msi).map_err(failed("KVM_SIGNAL_MSI"))?;
        }
        if is_ready {
            self.vector = self.vector.or_else(|| bus.intr().then(|| bus.acknowledge_intr(now)));
            self.give_vector(registers)?;
        }
        Ok(self.vector.is_some() || bus.intr())
    }

    /// Whether its state says everything, though KVM has all vectors if possible: none is on its way to the guest, and
    /// no timer has expired that KVM may not have looked at. To be asked again and again while the guest runs in between;
    /// `kicked`: it did, until a kick.
    pub(super) fn settle(&mut self, registers: &Registers, kicked: bool) -> Result<bool, KvmError> {
        self.give_vector(registers)?;
        let apic = registers.local_apic()?;
        if !lapic_page::is_timer_at_end(&apic.registers) {
            self.timer_at_end = None;
        } else if self.timer_at_end.is_none() {
            self.timer_at_end = Some(Wait::default());
        }
        let mut waits = [&mut self.on_its_way, &mut self.timer_at_end].into_iter().flatten();
        let is_settled = waits.all(|wait| wait.is_over(kicked)) && self.vector.is_none();
        // A timer that expires from here on does so elsewhere.
        self.settled = Some(apic).filter(|_| is_settled);
        Ok(is_settled)
    }

    fn give_vector(&mut self, registers: &Registers) -> Result<(), KvmError> {
        if let Some(vector) = self.vector
            && ioctls::interrupt(&registers.fd, vector)?
        {
            (self.vector, self.on_its_way) = (None, Some(Wait::default()));
        }
        Ok(())
    }

    /// Whether it is news.
    fn note_route(&mut self, message: &ApicMessage) -> bool {
        let route = message.pin.and_then(|pin| self.routes.get_mut(usize::from(pin)));
        match route.filter(|_| message.data & LEVEL != 0) {
            Some(route) => route.replace(*message) != Some(*message),
            None => false,
        }
    }

    fn set_routes(&self, vm: &Vm) -> Result<(), KvmError> {
        let entries: Vec<_> = self.routes.iter().flatten().map(entry).collect();
        let routing =
            KvmIrqRouting::from_entries(&entries).map_err(|_| KvmError::Missing("room for the I/O APIC's pins"))?;
        vm.fd.set_gsi_routing(&routing).map_err(failed("KVM_SET_GSI_ROUTING"))
    }
}

fn entry(message: &ApicMessage) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi { address_lo: message.address as u32, data: message.data, ..Default::default() };
    kvm_irq_routing_entry {
        gsi: message.pin.unwrap_or(0).into(),
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}
