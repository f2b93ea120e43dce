//! One comparator of the HPET.

use serde::{Deserialize, Serialize};

/// Configuration bits.
pub mod config {
    /// Level-triggered.
    pub const LEVEL: u64 = 1 << 1;
    /// Interrupts are on.
    pub const ENABLE: u64 = 1 << 2;
    /// Periodic.
    pub const PERIODIC: u64 = 1 << 3;
    /// The next comparator write in periodic mode sets the comparator, too.
    pub const VALUE_SET: u64 = 1 << 6;
    /// 32-bit mode.
    pub const MODE_32: u64 = 1 << 8;
    /// Where the interrupt route starts, 5 bits.
    pub const ROUTE_SHIFT: u32 = 9;
    /// What software can change.
    pub const WRITABLE: u64 = LEVEL | ENABLE | PERIODIC | VALUE_SET | MODE_32 | 0x1f << ROUTE_SHIFT;
    /// Periodic capable, 64 bits wide.
    pub const CAPABILITIES: u64 = 1 << 4 | 1 << 5;
}

/// I/O APIC pins that a timer can be routed to.
pub const ROUTES: u32 = 0x00f0_0000;

/// A comparator and its configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timer {
    config: u64,
    comparator: u64,
    period: u64,
    /// Clock tick of the next match while the main counter runs.
    matches_at: Option<u64>,
}

impl Default for Timer {
    /// After reset the comparator is all ones.
    fn default() -> Self {
        Self { config: 0, comparator: u64::MAX, period: 0, matches_at: None }
    }
}

impl Timer {
    /// Configuration and capability register.
    pub fn configuration(&self) -> u64 {
        u64::from(ROUTES) << 32 | config::CAPABILITIES | self.config
    }

    /// Writes the configuration; the owner aims the timer anew.
    pub fn configure(&mut self, value: u64) {
        self.config = value & config::WRITABLE;
        if ROUTES >> self.route() & 1 == 0 {
            self.config &= !(0x1f << config::ROUTE_SHIFT);
        }
        if self.is_32() {
            self.comparator &= 0xffff_ffff;
            self.period &= 0xffff_ffff;
        }
    }

    /// Whether interrupts are on.
    pub fn enabled(&self) -> bool {
        self.config & config::ENABLE != 0
    }

    /// Whether the interrupt is level-triggered.
    pub fn is_level(&self) -> bool {
        self.config & config::LEVEL != 0
    }

    /// The I/O APIC pin it is routed to; 0 is none.
    pub fn route(&self) -> u8 {
        (self.config >> config::ROUTE_SHIFT & 0x1f) as u8
    }

    /// Comparator register.
    pub fn comparator(&self) -> u64 {
        self.comparator
    }

    /// Writes the comparator's bits in `lane`: the period in periodic mode, and the comparator itself
    /// unless that mode is on and VALUE_SET is not.
    pub fn set_comparator(&mut self, value: u64, lane: u64) {
        let lane = if self.is_32() { lane & 0xffff_ffff } else { lane };
        let merge = |old: u64| old & !lane | value & lane;
        if !self.is_periodic() || self.config & config::VALUE_SET != 0 {
            self.comparator = merge(self.comparator);
        }
        if self.is_periodic() {
            self.period = merge(self.period);
        }
        self.config &= !config::VALUE_SET;
    }

    /// Computes the next match: `counter` is the main counter's value at `tick`, `None` if it stands.
    /// A comparator that equals the counter matches now.
    pub fn aim(&mut self, tick: u64, counter: Option<u64>) {
        self.matches_at = counter.and_then(|counter| {
            let distance = self.comparator.wrapping_sub(counter);
            tick.checked_add(if self.is_32() { distance & 0xffff_ffff } else { distance })
        });
    }

    /// Clock tick of the next match.
    pub fn matches_at(&self) -> Option<u64> {
        self.matches_at
    }

    /// Goes on to `tick`; true if the comparator matched on the way.
    pub fn advance(&mut self, tick: u64) -> bool {
        let Some(at) = self.matches_at.filter(|&at| at <= tick) else { return false };
        let step = match (self.is_periodic() && self.period != 0, self.is_32()) {
            (true, _) => self.period,
            // Without a period it matches again when the counter has wrapped.
            (false, true) => 1 << 32,
            (false, false) => {
                self.matches_at = None;
                return true;
            }
        };
        let steps = ((tick - at) / step).saturating_add(1);
        self.matches_at = steps.checked_mul(step).and_then(|ticks| at.checked_add(ticks));
        self.comparator = self.comparator.wrapping_add(steps.wrapping_mul(step));
        if self.is_32() {
            self.comparator &= 0xffff_ffff;
        }
        true
    }

    fn is_periodic(&self) -> bool {
        self.config & config::PERIODIC != 0
    }

    fn is_32(&self) -> bool {
        self.config & config::MODE_32 != 0
    }
}
