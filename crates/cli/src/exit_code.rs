//! What the process's exit code means. `--json` tells causes apart where codes meet.

use umbra_machine::{End, Stop};

/// Clean end, or the expected string appeared.
pub const CLEAN: u8 = 0;
/// The engines of --lockstep differ.
pub const DIFFERENT: u8 = 121;
/// No CPU will ever run again.
pub const HALTED: u8 = 122;
/// The guest ended without the expected string.
pub const NOT_SEEN: u8 = 123;
/// The wall-clock limit was reached.
pub const TIMEOUT: u8 = 124;
/// Usage or host error.
pub const HOST: u8 = 125;
/// The guest needs something that isn't implemented, or that the accelerator refuses.
pub const UNSUPPORTED: u8 = 126;
/// Triple fault.
pub const TRIPLE_FAULT: u8 = 127;
/// The user's escape key.
pub const USER: u8 = 130;

/// For `--help`.
pub const TABLE: &str = "\
Exit codes:
  0    the guest powered off or rebooted, or the string of --expect appeared
  N    the guest wrote V to the debug-exit port (0xf4): N is (V << 1) | 1, its low 8 bits
  121  the engines that --lockstep compares differ
  122  every CPU is halted for ever (HLT with interrupts off, or nothing left to wake it)
  123  the guest ended without the string of --expect, or the embedded guest's report says so
  124  timeout (--timeout)
  125  wrong usage, or the host lacks something
  126  the guest needs something that Umbra, or the accelerator, can't do
  127  triple fault
  130  the user left with Ctrl-A x
  128+S  signal S ended the run
Where codes meet, --json tells the causes apart.";

/// The exit code of a run. `expecting` says that a string was waited for.
pub fn of(end: &End, expecting: bool) -> u8 {
    match end {
        End::Expected => CLEAN,
        End::PowerOff | End::Reset | End::DebugExit(_) | End::HaltedForever(_) if expecting => NOT_SEEN,
        End::PowerOff | End::Reset => CLEAN,
        // As isa-debug-exit does; an exit status has 8 bits.
        End::DebugExit(value) => (value << 1 | 1) as u8,
        End::HaltedForever(_) => HALTED,
        End::TripleFault(_) | End::ShutdownUnseen(_) => TRIPLE_FAULT,
        End::Unsupported(_) | End::Refused(_) => UNSUPPORTED,
        End::Stopped(Stop::Timeout) => TIMEOUT,
        End::Stopped(Stop::User) => USER,
        End::Stopped(Stop::Signal(signal)) => 128u8.wrapping_add(*signal as u8),
        End::Stopped(Stop::Difference) => DIFFERENT,
        End::Stopped(Stop::OutputClosed | Stop::HandOver) | End::MemoryFile(_) | End::Limit | End::Mark(_) => HOST,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_exit_is_shifted_and_cut() {
        for (value, code) in [(0, 1), (1, 3), (0x10, 0x21), (0x80, 1), (u32::MAX, 0xff)] {
            assert_eq!(of(&End::DebugExit(value), false), code);
        }
    }

    #[test]
    fn expecting_turns_a_clean_end_into_a_failure() {
        assert_eq!(of(&End::PowerOff, false), CLEAN);
        assert_eq!(of(&End::PowerOff, true), NOT_SEEN);
        assert_eq!(of(&End::Expected, true), CLEAN);
        assert_eq!(of(&End::Stopped(Stop::Timeout), true), TIMEOUT);
    }

    #[test]
    fn every_constant_is_documented() {
        for code in [CLEAN, DIFFERENT, HALTED, NOT_SEEN, TIMEOUT, HOST, UNSUPPORTED, TRIPLE_FAULT, USER] {
            assert!(TABLE.contains(&format!("\n  {code:<4} ")), "{code}");
        }
    }
}
