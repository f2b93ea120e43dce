//! The APIC bus: which local APICs a message is for.

use super::Lapic;
use crate::interrupt::{BROADCAST, DeliveryMode, InterruptMessage, Ipi, Shorthand};

impl Lapic {
    /// Whether the message's destination names this APIC ("Determining IPI Destination").
    pub fn is_destination(&self, destination: u32, logical: bool) -> bool {
        if self.mmio_base().is_none() && !self.is_x2apic() {
            return false;
        }
        if !logical {
            return destination == BROADCAST || destination == self.config.id;
        }
        if self.is_x2apic() {
            let own = self.logical_id();
            return destination == BROADCAST || (destination >> 16 == own >> 16 && destination & own & 0xffff != 0);
        }
        let own = self.ldr >> 24;
        match self.dfr >> 28 {
            0xf => destination & own & 0xff != 0,
            0 => {
                let cluster = destination >> 4 & 0xf;
                (cluster == own >> 4 || cluster == 0xf) && destination & own & 0xf != 0
            }
            _ => false,
        }
    }

    /// Acts on a message that is for this APIC.
    pub fn receive(&mut self, message: &InterruptMessage) {
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => self.accept(message.vector, message.level),
            DeliveryMode::Nmi => self.nmi = true,
            DeliveryMode::Init if message.assert => self.init_requested = true,
            DeliveryMode::StartUp => self.startup = Some(message.vector),
            // Neither SMM nor ExtINT by message is modelled; the 8259 reaches the CPU by LINT0.
            DeliveryMode::Init | DeliveryMode::Smi | DeliveryMode::ExtInt => {}
        }
    }
}

/// Delivers a message from an I/O APIC or an MSI to those it is for.
pub fn deliver(lapics: &mut [Lapic], message: &InterruptMessage) {
    deliver_where(lapics, message, |_, lapic| lapic.is_destination(message.destination, message.logical));
}

/// Delivers an IPI that `lapics[from]` sent.
pub fn deliver_ipi(lapics: &mut [Lapic], from: usize, ipi: &Ipi) {
    let message = &ipi.message;
    match ipi.shorthand {
        Shorthand::None => deliver(lapics, message),
        Shorthand::SelfOnly => deliver_where(lapics, message, |n, _| n == from),
        Shorthand::All => deliver_where(lapics, message, |_, _| true),
        Shorthand::AllButSelf => deliver_where(lapics, message, |n, _| n != from),
    }
}

fn deliver_where(lapics: &mut [Lapic], message: &InterruptMessage, is_for: impl Fn(usize, &Lapic) -> bool) {
    let targets = lapics.iter_mut().enumerate().filter(|(n, lapic)| lapic.is_enabled() && is_for(*n, lapic));
    if message.mode == DeliveryMode::LowestPriority {
        let willing = targets.filter(|(_, lapic)| lapic.is_software_enabled());
        if let Some((_, lapic)) = willing.min_by_key(|(n, lapic)| (lapic.processor_priority(), *n)) {
            lapic.receive(message);
        }
    } else {
        for (_, lapic) in targets {
            lapic.receive(message);
        }
    }
}
