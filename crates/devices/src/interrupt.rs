//! Interrupt messages: what travels between I/O APIC, MSI sources and local APICs.

use serde::{Deserialize, Serialize};

/// Destination that means every local APIC, in physical mode.
pub const BROADCAST: u32 = u32::MAX;

/// How a local APIC treats a message ("Local Vector Table", "Interrupt Command Register").
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum DeliveryMode {
    /// The vector goes to all destinations.
    Fixed,
    /// The vector goes to one of the destinations, the one with the lowest priority.
    LowestPriority,
    /// System management interrupt.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT request.
    Init,
    /// Start-up IPI; the vector is the page to start at.
    StartUp,
    /// The vector is asked from the 8259.
    ExtInt,
}

impl DeliveryMode {
    /// The mode for the 3-bit field of ICR, LVT and redirection entries; `None` if reserved.
    pub const fn of_field(bits: u32) -> Option<Self> {
        Some(match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::ExtInt,
            _ => return None,
        })
    }

    /// The field of the mode.
    pub const fn field(self) -> u32 {
        match self {
            Self::Fixed => 0,
            Self::LowestPriority => 1,
            Self::Smi => 2,
            Self::Nmi => 4,
            Self::Init => 5,
            Self::StartUp => 6,
            Self::ExtInt => 7,
        }
    }
}

/// One interrupt message on the APIC bus.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct InterruptMessage {
    /// APIC id, or logical destination if `logical`. Sources with 8-bit ids give [`BROADCAST`] for a
    /// physical FFh.
    pub destination: u32,
    /// Logical destination mode.
    pub logical: bool,
    /// Delivery mode.
    pub mode: DeliveryMode,
    /// Vector.
    pub vector: u8,
    /// Level-triggered: the local APIC marks it in TMR and its EOI is broadcast.
    pub level: bool,
    /// Level is asserted; false only in the INIT level de-assert message.
    pub assert: bool,
}

impl InterruptMessage {
    /// The physical destination that an 8-bit field means.
    pub const fn destination8(id: u8, logical: bool) -> u32 {
        if id == 0xff && !logical { BROADCAST } else { id as u32 }
    }

    /// The message that a write of `data` to `address` (FEExxxxxh) makes ("Message Signalled
    /// Interrupts"); `None` for a reserved delivery mode.
    pub fn of_msi(address: u64, data: u32) -> Option<Self> {
        let logical = address & 4 != 0;
        Some(Self {
            destination: Self::destination8((address >> 12) as u8, logical),
            logical,
            mode: DeliveryMode::of_field(data >> 8)?,
            vector: data as u8,
            level: data & 0x8000 != 0,
            assert: data & 0x8000 == 0 || data & 0x4000 != 0,
        })
    }

    /// The write, address and data, that makes this message; its destination has 8 bits.
    pub const fn to_msi(&self) -> (u64, u32) {
        let address = 0xfee0_0000 | (self.destination as u64 & 0xff) << 12 | (self.logical as u64) << 2;
        let level = (self.level as u32) << 15 | ((self.level && self.assert) as u32) << 14;
        (address, level | self.mode.field() << 8 | self.vector as u32)
    }
}

/// Destination shorthand of the ICR.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Shorthand {
    /// The message's destination counts.
    None,
    /// The sender only.
    SelfOnly,
    /// Everybody.
    All,
    /// Everybody else.
    AllButSelf,
}

/// An inter-processor interrupt as the sender's ICR says it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ipi {
    /// What is sent.
    pub message: InterruptMessage,
    /// To whom, if not by the message's destination.
    pub shorthand: Shorthand,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msi_fields() {
        let m = InterruptMessage::of_msi(0xfee0_3000, 0x0041).unwrap();
        assert_eq!((m.destination, m.logical, m.vector, m.level), (3, false, 0x41, false));
        assert_eq!(m.mode, DeliveryMode::Fixed);
        let m = InterruptMessage::of_msi(0xfeef_f00c, 0xc130).unwrap();
        assert_eq!((m.destination, m.logical, m.level, m.assert), (0xff, true, true, true));
        assert_eq!(m.mode, DeliveryMode::LowestPriority);
        assert_eq!(InterruptMessage::of_msi(0xfeef_f000, 0).unwrap().destination, BROADCAST);
        assert_eq!(InterruptMessage::of_msi(0xfee0_0000, 0x300), None);
    }

    #[test]
    fn msi_and_back() {
        for address in (0..=0xffu64).flat_map(|id| [0, 4].map(|logical| 0xfee0_0000 | id << 12 | logical)) {
            for data in (0..0x800).flat_map(|low| [0, 0x8000, 0xc000].map(|level| level | low)) {
                if let Some(message) = InterruptMessage::of_msi(address, data) {
                    assert_eq!(message.to_msi(), (address, data), "{message:?}");
                }
            }
        }
    }
}
