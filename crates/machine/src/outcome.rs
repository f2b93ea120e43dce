//! How a run ended.

use serde::Serialize;
use umbra_arch::exit::{Refusal, TripleFault, Unsupported};
use umbra_memory::PageFailure;

/// Why a run ended. All but [`End::Stopped`] and [`End::MemoryFile`] depend on the guest alone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset: a reboot ends the run.
    Reset,
    /// The guest wrote this to the debug-exit port.
    DebugExit(u32),
    /// The expected string appeared on the serial line.
    Expected,
    /// A measured guest begins (its id) or ends (0) a phase; run on.
    Mark(u8),
    /// No CPU will ever run again.
    HaltedForever(Halted),
    /// A CPU shut down.
    TripleFault(TripleFault),
    /// A CPU shut down under an accelerator, at this RIP.
    ShutdownUnseen(u64),
    /// The guest needs something that isn't implemented.
    Unsupported(Unsupported),
    /// An accelerator can't execute the next instruction.
    Refused(Refusal),
    /// RAM that should have come from a file didn't.
    MemoryFile(PageFailure),
    /// The virtual time limit was reached.
    Limit,
    /// The host ended the run.
    Stopped(Stop),
}

impl End {
    /// Whether nothing runs afterwards.
    pub fn is_final(&self) -> bool {
        match self {
            Self::PowerOff
            | Self::Reset
            | Self::DebugExit(_)
            | Self::HaltedForever(_)
            | Self::TripleFault(_)
            | Self::ShutdownUnseen(_)
            | Self::Unsupported(_)
            | Self::Refused(_) => true,
            Self::Expected | Self::Mark(_) | Self::MemoryFile(_) | Self::Limit | Self::Stopped(_) => false,
        }
    }
}

/// A machine in which nothing can happen any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Halted {
    /// RIP after the HLT of the first CPU.
    pub rip: u64,
    /// Whether RFLAGS.IF was set: then no device had an interrupt to send.
    pub interrupts_enabled: bool,
}

/// Why the host ended a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// The wall-clock limit.
    Timeout,
    /// The user asked for it.
    User,
    /// A signal asked for it.
    Signal(i32),
    /// The guest's output can't be written any more.
    OutputClosed,
    /// Another engine is to take over; run on.
    HandOver,
    /// Two engines did different things.
    Difference,
}
