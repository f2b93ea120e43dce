//! [`ApicBus`]: a machine's local APIC lent to an accelerator that has one of its own.

use crate::{Reply, VirtualTime};

/// Register indices ("Local APIC Register Address Map").
#[allow(missing_docs, reason = "the names are the manual's")]
pub mod index {
    pub const ID: u16 = 0x02;
    pub const VERSION: u16 = 0x03;
    pub const TPR: u16 = 0x08;
    pub const APR: u16 = 0x09;
    pub const PPR: u16 = 0x0a;
    pub const EOI: u16 = 0x0b;
    pub const RRD: u16 = 0x0c;
    pub const LDR: u16 = 0x0d;
    pub const DFR: u16 = 0x0e;
    pub const SVR: u16 = 0x0f;
    pub const ISR0: u16 = 0x10;
    pub const ISR7: u16 = 0x17;
    pub const TMR0: u16 = 0x18;
    pub const TMR7: u16 = 0x1f;
    pub const IRR0: u16 = 0x20;
    pub const IRR7: u16 = 0x27;
    pub const ESR: u16 = 0x28;
    pub const ICR_LOW: u16 = 0x30;
    pub const ICR_HIGH: u16 = 0x31;
    pub const LVT_TIMER: u16 = 0x32;
    pub const LVT_THERMAL: u16 = 0x33;
    pub const LVT_PERFORMANCE: u16 = 0x34;
    pub const LVT_LINT0: u16 = 0x35;
    pub const LVT_LINT1: u16 = 0x36;
    pub const LVT_ERROR: u16 = 0x37;
    pub const INITIAL_COUNT: u16 = 0x38;
    pub const CURRENT_COUNT: u16 = 0x39;
    pub const DIVIDE: u16 = 0x3e;
    pub const SELF_IPI: u16 = 0x3f;
}

/// Registers in the page of a local APIC.
pub const APIC_REGISTERS: usize = 64;

/// A local APIC's state as accelerators and machines exchange it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LocalApic {
    /// IA32_APIC_BASE.
    pub base: u64,
    /// The registers by their numbers ("Local APIC Register Address Map"): offset in the page / 16, MSR - 800h in
    /// x2APIC mode. The current count goes on from where it is; ICR's high half has its own number in both modes.
    pub registers: [u32; APIC_REGISTERS],
    /// IA32_TSC_DEADLINE; 0 when it isn't armed.
    pub tsc_deadline: u64,
    /// An NMI waits.
    pub nmi: bool,
}

/// An interrupt message as a write to memory ("Message Signalled Interrupts").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ApicMessage {
    /// FEExxxxxh.
    pub address: u64,
    /// What is written.
    pub data: u32,
    /// The I/O APIC's pin that sent it, if one did.
    pub pin: Option<u8>,
}

/// A local APIC that was lent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ApicLoan {
    /// Its state.
    pub apic: LocalApic,
    /// Level-triggered messages that were sent before and wait for their end of interrupt.
    pub unfinished: Vec<ApicMessage>,
}

/// What remains of the interrupt controllers while an accelerator has the local APIC: I/O APIC and 8259s.
pub trait ApicBus {
    /// Lends the local APIC: until it is taken back, messages for it wait in [`next_message`](Self::next_message).
    fn lend(&mut self, now: VirtualTime) -> ApicLoan;
    /// Takes the local APIC back, with the messages that still wait.
    fn take_back(&mut self, now: VirtualTime, apic: &LocalApic);
    /// Takes the next message for the local APIC.
    fn next_message(&mut self) -> Option<ApicMessage>;
    /// The local APIC tells of a level-triggered interrupt's end.
    fn end_of_interrupt(&mut self, now: VirtualTime, vector: u8) -> Reply<()>;
    /// Whether the 8259s assert INTR. Whether it gets through is the local APIC's to say.
    fn intr(&mut self) -> bool;
    /// Interrupt acknowledge by way of LINT0: the 8259s' vector.
    fn acknowledge_intr(&mut self, now: VirtualTime) -> u8;
}
