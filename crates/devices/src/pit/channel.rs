//! One counter of the 8254.

use serde::{Deserialize, Serialize};

/// A counter in one of the six modes. Nothing counts down: the count and the output are functions of
/// the input clock's tick number, so any stretch of time costs the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Channel {
    /// Input clock tick the state is valid for.
    tick: u64,
    mode: u8,
    bcd: bool,
    access: Access,
    gate: bool,
    /// Whether the count is running or stopped within a run (mode set and count, for 1 and 5 also the
    /// trigger, seen).
    active: bool,
    /// The count in use, 1..=65536.
    count: u32,
    /// Ticks counted before `since`.
    counted: u64,
    /// Tick from which the counter runs; `None` while it stands.
    since: Option<u64>,
    /// A count written and not yet loaded.
    pending: Option<u32>,
    low_byte: Option<u8>,
    high_byte_next: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
    /// The output rose since the flag was taken.
    rose: bool,
}

/// Which bytes of the count are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Access {
    Low,
    High,
    LowThenHigh,
}

impl Channel {
    /// A counter after power-on, with its gate input at `gate`.
    pub fn new(gate: bool) -> Self {
        Self {
            tick: 0,
            mode: 0,
            bcd: false,
            access: Access::LowThenHigh,
            gate,
            active: false,
            count: 0x1_0000,
            counted: 0,
            since: None,
            pending: None,
            low_byte: None,
            high_byte_next: false,
            latched_count: None,
            latched_status: None,
            rose: false,
        }
    }

    /// Takes the registers of `fresh`, at the present tick.
    pub fn reset_to(&mut self, fresh: Self) {
        *self = Self { tick: self.tick, ..fresh };
    }

    /// Goes on to `tick`.
    pub fn advance(&mut self, tick: u64) {
        if let Some(at) = self.reload_tick().filter(|&at| at <= tick) {
            self.run_to(at);
            self.reload_periodic(at);
        }
        self.run_to(tick);
    }

    /// The next tick at which the output changes.
    pub fn next_change(&self) -> Option<u64> {
        let since = self.since?;
        if !self.active {
            return None;
        }
        let from = self.tick.max(since);
        let elapsed = self.elapsed_at(from);
        let n = u64::from(self.count);
        let after = |ticks: u64| Some(from.saturating_add(ticks));
        match self.mode {
            0 => (elapsed < n).then(|| from.saturating_add(n - elapsed)),
            1 if self.tick < since => Some(since),
            1 => (elapsed < n).then(|| from.saturating_add(n - elapsed)),
            2 => match self.period() - 1 - elapsed % self.period() {
                0 if from > self.tick => Some(from),
                0 => after(1),
                left => after(left),
            },
            3 => {
                let phase = elapsed % self.period();
                if phase < self.high_half() { after(self.high_half() - phase) } else { after(self.period() - phase) }
            }
            _ if elapsed < n => after(n - elapsed),
            _ if elapsed == n => after(1),
            _ => None,
        }
    }

    /// Level of the output.
    pub fn output(&self) -> bool {
        let running = self.active && self.since.is_some_and(|since| since <= self.tick);
        let elapsed = self.elapsed_at(self.tick);
        let n = u64::from(self.count);
        match self.mode {
            0 => self.active && elapsed >= n,
            1 => !running || elapsed >= n,
            2 => !running || elapsed % self.period() != self.period() - 1,
            3 => !running || elapsed % self.period() < self.high_half(),
            _ => !running || elapsed != n,
        }
    }

    /// Whether the output rose since the last call.
    pub fn take_rise(&mut self) -> bool {
        std::mem::take(&mut self.rose)
    }

    /// Sets the gate input.
    pub fn set_gate(&mut self, level: bool) {
        if level == self.gate {
            return;
        }
        self.gate = level;
        self.watch_output(|c| match (c.mode, level) {
            (0 | 4, true) => c.since = c.active.then_some(c.tick),
            (0 | 4, false) => c.stop(),
            (1 | 5, true) => {
                c.active = true;
                c.load_pending();
                c.restart();
            }
            (1 | 5, false) => {}
            (_, true) => {
                c.load_pending();
                if c.active {
                    c.restart();
                }
            }
            (_, false) => c.stop(),
        });
    }

    /// Control word for this counter, not a latch command.
    pub fn set_mode(&mut self, control: u8) {
        self.watch_output(|c| {
            c.access = match control >> 4 & 3 {
                1 => Access::Low,
                2 => Access::High,
                _ => Access::LowThenHigh,
            };
            c.mode = match control >> 1 & 7 {
                mode @ 0..6 => mode,
                mode => mode - 4,
            };
            c.bcd = control & 1 != 0;
            c.stop();
            c.active = false;
            c.pending = None;
            c.low_byte = None;
            c.high_byte_next = false;
            c.latched_count = None;
            c.latched_status = None;
        });
    }

    /// Writes the counter port.
    pub fn write(&mut self, byte: u8) {
        let raw = match (self.access, self.low_byte.take()) {
            (Access::Low, _) => u16::from(byte),
            (Access::High, _) => u16::from(byte) << 8,
            (Access::LowThenHigh, Some(low)) => u16::from(byte) << 8 | u16::from(low),
            (Access::LowThenHigh, None) => {
                self.low_byte = Some(byte);
                if self.mode == 0 {
                    // The first byte stops the count and lowers the output.
                    self.stop();
                    self.active = false;
                }
                return;
            }
        };
        let count = self.count_of(raw);
        self.watch_output(|c| c.set_count(count));
    }

    /// Reads the counter port: latched status, latched count or the running count.
    pub fn read(&mut self) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let value = self.latched_count.unwrap_or_else(|| self.value());
        let (byte, last) = match self.access {
            Access::Low => (value as u8, true),
            Access::High => ((value >> 8) as u8, true),
            Access::LowThenHigh if self.high_byte_next => ((value >> 8) as u8, true),
            Access::LowThenHigh => (value as u8, false),
        };
        self.high_byte_next = !last;
        if last {
            self.latched_count = None;
        }
        byte
    }

    /// Latches the count unless one is latched already.
    pub fn latch_count(&mut self) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.value());
        }
    }

    /// Latches the status byte unless one is latched already.
    pub fn latch_status(&mut self) {
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::LowThenHigh => 3u8,
        };
        let null = self.pending.is_some() || !self.active || self.since.is_some_and(|since| since > self.tick);
        let status =
            u8::from(self.output()) << 7 | u8::from(null) << 6 | access << 4 | self.mode << 1 | u8::from(self.bcd);
        self.latched_status.get_or_insert(status);
    }

    /// Number of values the counter runs through.
    fn modulus(&self) -> u32 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    fn count_of(&self, raw: u16) -> u32 {
        let count = if self.bcd {
            (0..4).rev().fold(0, |sum, digit| sum * 10 + u32::from(raw >> (4 * digit) & 0xf))
        } else {
            u32::from(raw)
        };
        if count == 0 { self.modulus() } else { count }
    }

    /// Period of modes 2 and 3, where a count of 1 is not allowed.
    fn period(&self) -> u64 {
        u64::from(self.count).max(2)
    }

    fn high_half(&self) -> u64 {
        self.period().div_ceil(2)
    }

    fn elapsed_at(&self, tick: u64) -> u64 {
        self.counted.saturating_add(self.since.map_or(0, |since| tick.saturating_sub(since)))
    }

    /// The counting element as software sees it.
    fn value(&self) -> u16 {
        let elapsed = self.elapsed_at(self.tick);
        let modulus = u64::from(self.modulus());
        let value = match self.mode {
            2 => self.period() - elapsed % self.period(),
            3 => {
                let (n, half) = (self.period(), self.high_half());
                let phase = elapsed % n;
                let step = if phase < half { phase } else { phase - half };
                (n & !1).saturating_sub(2 * step)
            }
            _ => u64::from(self.count) + modulus - elapsed % modulus,
        } % modulus;
        if self.bcd { to_bcd(value as u16) } else { value as u16 }
    }

    fn stop(&mut self) {
        self.counted = self.elapsed_at(self.tick);
        self.since = None;
    }

    /// Starts over at the next clock.
    fn restart(&mut self) {
        self.counted = 0;
        self.since = Some(self.tick.saturating_add(1));
    }

    fn load_pending(&mut self) {
        if let Some(count) = self.pending.take() {
            self.count = count;
        }
    }

    fn set_count(&mut self, count: u32) {
        match self.mode {
            0 | 4 => {
                self.count = count;
                self.active = true;
                self.restart();
                if !self.gate {
                    self.since = None;
                }
            }
            1 | 5 => self.pending = Some(count),
            _ if self.active => self.pending = Some(count),
            _ => {
                self.count = count;
                self.active = true;
                self.restart();
                if !self.gate {
                    self.since = None;
                }
            }
        }
    }

    /// When a pending count replaces the running one: modes 2 and 3 at the end of the (half) period.
    fn reload_tick(&self) -> Option<u64> {
        let since = self.since?;
        self.pending?;
        let from = self.tick.max(since);
        let elapsed = self.elapsed_at(from);
        match self.mode {
            2 => Some(from.saturating_add(self.period() - elapsed % self.period())),
            3 => self.next_change(),
            _ => None,
        }
    }

    fn reload_periodic(&mut self, tick: u64) {
        let low_half_follows = self.mode == 3 && !self.output();
        self.load_pending();
        self.counted = if low_half_follows { self.high_half() } else { 0 };
        self.since = Some(tick);
    }

    /// Moves on within one count, noting a rising edge on the way.
    fn run_to(&mut self, tick: u64) {
        if tick <= self.tick {
            return;
        }
        if self.last_rise(tick).is_some_and(|at| at > self.tick) {
            self.rose = true;
        }
        self.tick = tick;
    }

    /// The last tick up to `tick` at which the running count raised the output.
    fn last_rise(&self, tick: u64) -> Option<u64> {
        let since = self.since.filter(|&since| self.active && since <= tick)?;
        let elapsed = self.elapsed_at(tick);
        let n = u64::from(self.count);
        let at = match self.mode {
            0 | 1 => n,
            2 | 3 if elapsed < self.period() => return None,
            2 | 3 => elapsed - elapsed % self.period(),
            _ => n + 1,
        };
        let back = elapsed.checked_sub(at)?;
        tick.checked_sub(back).filter(|&rise| rise >= since)
    }

    fn watch_output(&mut self, change: impl FnOnce(&mut Self)) {
        let before = self.output();
        change(self);
        self.rose |= !before && self.output();
    }
}

fn to_bcd(value: u16) -> u16 {
    (value % 10) | ((value / 10 % 10) << 4) | (value / 100 % 10) << 8 | (value / 1000 % 10) << 12
}
