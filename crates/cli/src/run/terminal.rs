//! The host's terminal in raw mode, and back again whatever happens.

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
use std::io;
use std::os::fd::AsFd;

/// Raw mode for as long as this lives; dropped on return, error and panic alike. Signals end the run
/// first (see [`super::host`]), so they restore the terminal too.
#[derive(Debug)]
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Whether stdin is a terminal.
    pub fn is_there() -> bool {
        isatty(io::stdin().as_fd())
    }

    /// Switches stdin's terminal to raw mode.
    ///
    /// # Errors
    /// The terminal's refusal.
    pub fn enter() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Flush, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The process is about to end; there is nobody to tell.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}
