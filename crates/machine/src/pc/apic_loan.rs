//! The local APIC lent to an accelerator: what stays, and the messages for what is away.

use super::{Pc, PcBus};
use crate::events::Source;
use std::collections::VecDeque;
use umbra_arch::local_apic::{ApicBus, ApicLoan, ApicMessage, LocalApic};
use umbra_arch::{Reply, VirtualTime};
use umbra_devices::{InterruptMessage, lapic};

/// Messages for a local APIC that is away.
pub(super) type Waiting = VecDeque<ApicMessage>;

fn message_of(message: &InterruptMessage, pin: Option<usize>) -> ApicMessage {
    let (address, data) = message.to_msi();
    ApicMessage { address, data, pin: pin.map(|pin| pin as u8) }
}

impl Pc {
    /// Whether an accelerator has the local APIC.
    pub(crate) fn is_apic_lent(&self) -> bool {
        self.lent.is_some()
    }

    /// Sends a message to the local APICs, or to where they are.
    pub(super) fn send(&mut self, message: &InterruptMessage, pin: Option<usize>) {
        match &mut self.lent {
            Some(waiting) => waiting.push_back(message_of(message, pin)),
            None => lapic::deliver(&mut self.devices.lapics, message),
        }
    }

    /// While the local APIC is away: whether the CPU would have to look after an interrupt.
    pub(super) fn has_waiting_interrupts(&self) -> Option<bool> {
        self.lent.as_ref().map(|waiting| !waiting.is_empty() || self.devices.pic.intr())
    }
}

impl ApicBus for PcBus<'_> {
    fn lend(&mut self, now: VirtualTime) -> ApicLoan {
        let now = self.time(now);
        let apic = self.pc.devices.lapics[self.vcpu].take_state(now);
        let unfinished = self.pc.devices.ioapic.unfinished();
        let unfinished = unfinished.map(|(pin, message)| message_of(&message, Some(pin))).collect();
        self.pc.lent = Some(Waiting::new());
        self.pc.settle(Source::Lapic(self.vcpu as u32));
        ApicLoan { apic, unfinished }
    }

    fn take_back(&mut self, now: VirtualTime, apic: &LocalApic) {
        let now = self.time(now);
        self.pc.devices.lapics[self.vcpu].set_state(now, apic);
        for waiting in self.pc.lent.take().into_iter().flatten() {
            self.pc.message_signalled(waiting.address, waiting.data);
        }
        self.pc.settle(Source::Lapic(self.vcpu as u32));
    }

    fn next_message(&mut self) -> Option<ApicMessage> {
        let message = self.pc.lent.as_mut()?.pop_front()?;
        self.pc.settle_interrupts();
        Some(message)
    }

    fn end_of_interrupt(&mut self, now: VirtualTime, vector: u8) -> Reply<()> {
        self.time(now);
        self.pc.devices.ioapic.eoi(vector);
        self.pc.settle_interrupts();
        self.reply((), 0)
    }

    fn intr(&mut self) -> bool {
        self.pc.devices.pic.intr()
    }

    fn acknowledge_intr(&mut self, now: VirtualTime) -> u8 {
        self.time(now);
        let vector = self.pc.devices.pic.acknowledge();
        self.pc.settle_interrupts();
        vector
    }
}
