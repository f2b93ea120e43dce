//! Why an engine came back to the machine.

use crate::fault::Fault;

/// Why [`Vcpu::run`](crate::Vcpu::run) returned. Small: engines hand it through on their way from block to block.
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
    Shutdown(Box<TripleFault>),
    /// Triple fault under an accelerator that doesn't say what led to it.
    ShutdownUnseen {
        /// RIP as the accelerator shows it then.
        rip: u64,
    },
    /// The guest needs something this engine refuses to guess.
    Unsupported(Box<Unsupported>),
    /// An accelerator can't execute the next instruction. The state is the one before it, so that another
    /// engine can.
    Refused(Box<Refusal>),
}

/// What an accelerator could not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RefusalKind {
    /// Its emulator doesn't know the instruction, or not in this mode.
    Emulation,
    /// An exception or interrupt could not be delivered.
    Delivery,
    /// It doesn't take the state that it was to start from.
    State,
    /// The backend lost the guest for another reason.
    Backend,
    /// The host refused a request.
    Host,
}

impl RefusalKind {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Emulation => "the instruction can't be emulated",
            Self::Delivery => "an exception or interrupt can't be delivered",
            Self::State => "the state isn't accepted",
            Self::Backend => "the backend gave up",
            Self::Host => "the host refused",
        }
    }
}

/// An accelerator gave no answer: nobody's mistake, and no difference between engines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What could not be done.
    pub kind: RefusalKind,
    /// The backend and its own code or message.
    pub detail: String,
    /// RIP of the instruction that was next.
    pub rip: u64,
    /// Its bytes as far as they could be read, at most 15.
    pub bytes: Vec<u8>,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}) at rip {:#x}", self.kind.name(), self.detail, self.rip)?;
        if !self.bytes.is_empty() {
            f.write_str(", bytes")?;
        }
        self.bytes.iter().try_for_each(|byte| write!(f, " {byte:02x}"))
    }
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
