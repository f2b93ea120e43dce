//! The run's outside: stdout, stdin, the clock, the timeout and signals.

use super::args::{Args, ClockChoice};
use super::clock::RealClock;
use super::escape::Escape;
use super::stdin::Stdin;
use super::terminal::RawTerminal;
use crate::error::CliError;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use umbra_arch::VirtualTime;
use umbra_machine::{Host, Stop};

/// Longest wait without a look at signals and the timeout.
const NAP: Duration = Duration::from_millis(50);
/// Running CPUs are held back only when they are ahead by this much: a sleep has its own price.
const SLACK: Duration = Duration::from_millis(2);
/// Bytes of host input taken at one event.
const INPUT_BYTES: usize = 256;
/// As much of the output's end as a verdict can be looked for in.
const KEPT_OUTPUT: usize = 4096;

/// The process's standard streams as the guest's console.
pub struct ConsoleHost {
    stdin: Option<Stdin>,
    escape: Option<Escape>,
    clock: Option<RealClock>,
    deadline: Option<Instant>,
    signal: Arc<AtomicUsize>,
    stop: Option<Stop>,
    quiet: bool,
    /// The last bytes sent.
    sent: VecDeque<u8>,
    /// Text at which another engine is to take over.
    awaited: Option<Vec<u8>>,
    /// The text was there.
    is_hand_over_due: bool,
    /// Restores the terminal when it is dropped.
    raw: Option<RawTerminal>,
}

impl ConsoleHost {
    /// Takes over the terminal if stdin is one.
    ///
    /// # Errors
    /// The host's refusals.
    pub fn new(args: &Args) -> Result<Self, CliError> {
        let signal = Arc::new(AtomicUsize::new(0));
        for number in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register_usize(number, Arc::clone(&signal), number as usize)
                .map_err(CliError::Signals)?;
        }
        // Two machines can't share a terminal.
        let terminal = RawTerminal::is_there() && args.jit.lockstep.is_none();
        let raw = terminal.then(RawTerminal::enter).transpose().map_err(CliError::Terminal)?;
        let default = if terminal { ClockChoice::Real } else { ClockChoice::Virtual };
        let now = Instant::now();
        Ok(Self {
            stdin: (terminal || args.serial_stdin).then(Stdin::default),
            escape: terminal.then(Escape::default),
            clock: (args.clock.unwrap_or(default) == ClockChoice::Real).then(|| RealClock::new(now)),
            deadline: args.timeout.and_then(|limit| now.checked_add(limit)),
            signal,
            stop: None,
            quiet: args.json,
            sent: VecDeque::new(),
            awaited: args.accel.serial_text().map(|text| text.as_bytes().to_vec()),
            is_hand_over_due: false,
            raw,
        })
    }

    /// Whether the last few kilobytes of serial output hold `text`.
    pub fn has_sent(&mut self, text: &[u8]) -> bool {
        self.sent.make_contiguous().windows(text.len().max(1)).any(|window| window == text)
    }

    /// Why the run is over, if it is.
    fn ended(&mut self) -> Option<Stop> {
        let signal = self.signal.load(Ordering::Relaxed);
        if self.stop.is_none() && signal != 0 {
            self.stop = Some(Stop::Signal(signal as i32));
        }
        if self.stop.is_none() && self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            self.stop = Some(Stop::Timeout);
        }
        self.stop
    }

    /// Waits for at most `limit`; says whether input came.
    fn wait(&self, limit: Duration) -> bool {
        match &self.stdin {
            Some(stdin) => stdin.wait(limit),
            None => {
                std::thread::sleep(limit);
                false
            }
        }
    }
}

impl Drop for ConsoleHost {
    /// What we say next starts on a line of its own.
    fn drop(&mut self) {
        if self.raw.is_some() && self.sent.back().is_some_and(|&byte| byte != b'\n') {
            eprint!("\r\n");
        }
    }
}

impl Host for ConsoleHost {
    fn serial(&mut self, bytes: &[u8]) {
        let mut stdout = io::stdout().lock();
        if stdout.write_all(bytes).and_then(|()| stdout.flush()).is_err() {
            self.stop.get_or_insert(Stop::OutputClosed);
        }
        self.sent.extend(bytes);
        let excess = self.sent.len().saturating_sub(KEPT_OUTPUT);
        self.sent.drain(..excess);
        if let Some(text) = self.awaited.take() {
            if self.has_sent(&text) {
                self.is_hand_over_due = true;
            } else {
                self.awaited = Some(text);
            }
        }
    }

    fn debug(&mut self, bytes: &[u8]) {
        if !self.quiet {
            // A closed stderr must not end the guest.
            let _ = io::stderr().write_all(bytes);
        }
    }

    fn input(&mut self, into: &mut VecDeque<u8>) {
        let Some(stdin) = &mut self.stdin else { return };
        for byte in stdin.take(INPUT_BYTES) {
            match &mut self.escape {
                Some(escape) => {
                    if escape.feed(byte, into).is_err() {
                        self.stop.get_or_insert(Stop::User);
                    }
                }
                None => into.push_back(byte),
            }
        }
    }

    fn has_input(&self) -> bool {
        self.stdin.is_some()
    }

    fn stop(&mut self) -> Option<Stop> {
        self.ended().or_else(|| std::mem::take(&mut self.is_hand_over_due).then_some(Stop::HandOver))
    }

    fn pace(&mut self, now: VirtualTime, idle: bool) -> VirtualTime {
        loop {
            let host = Instant::now();
            let Some(clock) = &mut self.clock else { return now };
            let ahead = clock.ahead(host, now);
            if ahead.is_zero() || !idle && ahead < SLACK {
                return now;
            }
            let early = clock.at(host);
            if self.ended().is_some() || self.wait(ahead.min(NAP)) && idle {
                return early.min(now);
            }
        }
    }
}
