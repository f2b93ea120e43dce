//! How far a comparison is, on stderr, and its counts at the end, on stdout.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};
use umbra_oracle::campaign::Tally;

/// Reasons that are listed; the rest is summed.
const REASONS: usize = 20;

/// The line of progress.
pub struct Progress {
    start: Instant,
    last: Instant,
    total: u64,
    is_terminal: bool,
}

impl Progress {
    /// For `total` cases.
    pub fn new(start: Instant, total: u64) -> Self {
        Self { start, last: start, total, is_terminal: std::io::stderr().is_terminal() }
    }

    /// Now and then, a line.
    pub fn show(&mut self, tally: &Tally) {
        let pause = Duration::from_secs(if self.is_terminal { 1 } else { 10 });
        if self.last.elapsed() < pause {
            return;
        }
        self.last = Instant::now();
        let rate = tally.cases as f64 / self.start.elapsed().as_secs_f64();
        let (start, end) = if self.is_terminal { ("\r", "  ") } else { ("", "\n") };
        let text = format!(
            "{start}{} of {} cases, {rate:.0} a second, {} differ, {} not answered{end}",
            tally.cases, self.total, tally.different, tally.cannot_answer
        );
        // Progress isn't worth failing for.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }

    /// The counts.
    pub fn end(&self, tally: &Tally) {
        if self.is_terminal {
            eprintln!();
        }
        summary(tally);
    }
}

/// Prints the counts of a campaign.
pub fn summary(tally: &Tally) {
    println!("{} on {}, seed {}", tally.generator, tally.engines.join(", "), tally.seed);
    let rate = if tally.seconds > 0.0 { tally.cases as f64 / tally.seconds } else { 0.0 };
    println!("{} cases in {:.1} s, {rate:.0} a second", tally.cases, tally.seconds);
    println!("{} same, {} different, {} not answered", tally.same, tally.different, tally.cannot_answer);
    let mut reasons: Vec<_> = tally.reasons.iter().collect();
    reasons.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    for (reason, count) in reasons.iter().take(REASONS) {
        println!("{count:>10}  {reason}");
    }
    let rest: u64 = reasons.iter().skip(REASONS).map(|(_, count)| **count).sum();
    if rest > 0 {
        println!("{rest:>10}  for other reasons");
    }
    if tally.says_too_little() {
        println!("more than half of the cases were not answered: this shows nothing");
    }
}
