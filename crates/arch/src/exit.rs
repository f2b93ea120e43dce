//! Why an engine came back to the machine.

use crate::fault::Fault;

/// Why [`Vcpu::run`](crate::Vcpu::run) returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Virtual time reached the slice's end.
    BudgetSpent,
    /// A [`Bus`](crate::Bus) call asked for attention: events or interrupt lines may have changed.
    Attention,
    /// HLT or MWAIT: nothing to do until an interrupt (or NMI, INIT) arrives.
    Halted,
    /// Waiting for a start-up IPI after INIT ("Multiple-Processor (MP) Initialization").
    WaitForSipi,
    /// Triple fault: an exception while delivering #DF.
    Shutdown(TripleFault),
    /// The guest needs something this engine refuses to guess.
    Unsupported(Unsupported),
}

/// The chain of exceptions that ended in shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TripleFault {
    /// CS:RIP of the instruction that started the chain: CS base, then RIP.
    pub at: (u64, u64),
    /// The first exception.
    pub first: Fault,
    /// The one that made it a double fault.
    pub second: Fault,
    /// The one raised while delivering #DF.
    pub third: Fault,
}

/// A guest feature that isn't implemented and can't be refused by an exception.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported {
    /// What was asked for, in words.
    pub what: String,
    /// RIP of the instruction.
    pub rip: u64,
}
