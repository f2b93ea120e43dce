//! The local APIC's timer ("APIC Timer").

use super::LAPIC_HZ;
use super::registers::lvt;
use serde::{Deserialize, Serialize};
use umbra_arch::VirtualTime;
use umbra_arch::time::TSC_HZ;

const _: () = assert!(LAPIC_HZ == TSC_HZ, "deadlines and counts share one tick");

/// Timer mode field of the LVT timer register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// Counts down once.
    OneShot,
    /// Counts down again and again.
    Periodic,
    /// Fires when the TSC reaches IA32_TSC_DEADLINE.
    TscDeadline,
}

/// What the timer's registers say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Registers {
    pub mode: Mode,
    pub initial: u32,
    pub current: u32,
    pub divide: u32,
    pub deadline: u64,
}

/// The timer's count, all times in ticks since virtual time 0 so that periods never drift.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timer {
    mode: Mode,
    initial: u32,
    divide: u32,
    /// Bus clock tick at which the count reaches 0 or the deadline is due; the TSC ticks alike.
    expires: Option<u64>,
    /// IA32_TSC_DEADLINE, 0 when disarmed.
    deadline: u64,
    /// TSC minus virtual time's ticks.
    tsc_offset: u64,
}

impl Mode {
    /// The mode in the LVT timer register `value`.
    pub fn of_lvt(value: u32) -> Self {
        match (value & lvt::TIMER_MODE) >> 17 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            _ => Self::TscDeadline,
        }
    }
}

impl Timer {
    /// A timer after reset with the TSC at `tsc_offset` from virtual time.
    pub fn new(tsc_offset: u64) -> Self {
        Self { mode: Mode::OneShot, initial: 0, divide: 0, expires: None, deadline: 0, tsc_offset }
    }

    /// A timer as its registers say: with a count of 0 it stands still.
    pub fn of_registers(now: VirtualTime, registers: &Registers, tsc_offset: u64) -> Self {
        let Registers { mode, initial, current, divide, deadline } = *registers;
        let mut timer = Self { mode, initial, divide: divide & 0xb, ..Self::new(tsc_offset) };
        match mode {
            Mode::TscDeadline => timer.set_deadline(now, deadline),
            Mode::Periodic | Mode::OneShot => timer.start(now, current),
        }
        timer
    }

    /// Goes on to `now`; true if the timer fired, once however often it did.
    #[must_use]
    pub fn advance(&mut self, now: VirtualTime) -> bool {
        let tick = now.ticks(LAPIC_HZ);
        let Some(expires) = self.expires.filter(|&expires| expires <= tick) else { return false };
        self.deadline = 0;
        self.expires = (self.mode == Mode::Periodic && self.initial != 0).then(|| {
            let period = u64::from(self.initial) << self.shift();
            expires.saturating_add(((tick - expires) / period).saturating_add(1).saturating_mul(period))
        });
        true
    }

    /// When the timer fires next.
    pub fn next_event(&self) -> Option<VirtualTime> {
        self.expires.map(|tick| VirtualTime::of_ticks(tick, LAPIC_HZ))
    }

    /// Timer mode of the LVT timer register; a change to or from TSC-deadline mode disarms.
    pub fn set_mode(&mut self, mode: Mode) {
        if (mode == Mode::TscDeadline) != (self.mode == Mode::TscDeadline) {
            self.expires = None;
            self.deadline = 0;
            self.initial = 0;
        }
        self.mode = mode;
    }

    /// Initial count register.
    pub fn initial(&self) -> u32 {
        self.initial
    }

    /// Writes the initial count: starts the timer, or stops it with 0.
    pub fn set_initial(&mut self, now: VirtualTime, value: u32) {
        if self.mode != Mode::TscDeadline {
            self.initial = value;
            self.start(now, value);
        }
    }

    /// Current count register.
    pub fn current(&self, now: VirtualTime) -> u32 {
        let Some(expires) = self.expires.filter(|_| self.mode != Mode::TscDeadline) else { return 0 };
        let left = expires.saturating_sub(now.ticks(LAPIC_HZ));
        left.div_ceil(1 << self.shift()) as u32
    }

    /// Divide configuration register.
    pub fn divide(&self) -> u32 {
        self.divide
    }

    /// Writes the divide configuration; a running count goes on from where it is.
    pub fn set_divide(&mut self, now: VirtualTime, value: u32) {
        let left = self.current(now);
        self.divide = value & 0xb;
        if left != 0 {
            self.start(now, left);
        }
    }

    /// IA32_TSC_DEADLINE.
    pub fn deadline(&self) -> u64 {
        self.deadline
    }

    /// Writes IA32_TSC_DEADLINE; ignored in the other modes.
    pub fn set_deadline(&mut self, now: VirtualTime, value: u64) {
        if self.mode == Mode::TscDeadline {
            self.deadline = value;
            self.arm_deadline(now);
        }
    }

    /// TSC minus virtual time's ticks.
    pub fn tsc_offset(&self) -> u64 {
        self.tsc_offset
    }

    /// Sets TSC minus virtual time's ticks, modulo 2^64.
    pub fn set_tsc_offset(&mut self, now: VirtualTime, offset: u64) {
        self.tsc_offset = offset;
        if self.mode == Mode::TscDeadline {
            self.arm_deadline(now);
        }
    }

    fn arm_deadline(&mut self, now: VirtualTime) {
        let tick = now.ticks(TSC_HZ);
        let left = self.deadline.saturating_sub(tick.wrapping_add(self.tsc_offset));
        self.expires = (self.deadline != 0).then(|| tick.saturating_add(left));
    }

    fn start(&mut self, now: VirtualTime, count: u32) {
        let ticks = u64::from(count) << self.shift();
        self.expires = (count != 0).then(|| now.ticks(LAPIC_HZ).saturating_add(ticks));
    }

    /// log2 of the divider.
    fn shift(&self) -> u32 {
        ((self.divide & 3 | self.divide >> 1 & 4) + 1) & 7
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dividers() {
        for (divide, by) in [(0, 2u64), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
            let mut t = Timer::new(0);
            t.set_divide(VirtualTime(0), divide);
            t.set_initial(VirtualTime(7), 1000);
            assert_eq!(t.next_event(), Some(VirtualTime(7 + 1000 * by)), "divide by {by}");
            assert_eq!(t.current(VirtualTime(7)), 1000);
            assert_eq!(t.current(VirtualTime(7 + 10 * by)), 990);
            assert_eq!(t.current(VirtualTime(7 + 11 * by - 1)), 990);
            assert!(!t.advance(VirtualTime(7 + 1000 * by - 1)));
            assert!(t.advance(VirtualTime(7 + 1000 * by)));
            assert_eq!(t.current(VirtualTime(7 + 1000 * by)), 0);
            assert_eq!(t.next_event(), None);
        }
    }

    #[test]
    fn periods_do_not_drift_and_gaps_cost_nothing() {
        let mut t = Timer::new(0);
        t.set_mode(Mode::Periodic);
        t.set_initial(VirtualTime(3), 333);
        for k in 1..1000u64 {
            let due = VirtualTime(3 + k * 666);
            assert_eq!(t.next_event(), Some(due));
            assert!(t.advance(due));
            assert_eq!(t.current(due), 333);
        }
        let far = VirtualTime(1 << 60);
        assert!(t.advance(far));
        assert!(!t.advance(far));
        let next = t.next_event().unwrap();
        assert!(next > far && (next.0 - 3).is_multiple_of(666));
    }

    #[test]
    fn deadline_follows_the_tsc_offset() {
        let mut t = Timer::new(500);
        t.set_deadline(VirtualTime(0), 1000);
        assert_eq!(t.deadline(), 0, "not in this mode");
        t.set_mode(Mode::TscDeadline);
        t.set_deadline(VirtualTime(10), 1000);
        assert_eq!(t.next_event(), Some(VirtualTime(500)));
        t.set_tsc_offset(VirtualTime(20), 100);
        assert_eq!(t.next_event(), Some(VirtualTime(900)));
        assert!(!t.advance(VirtualTime(899)));
        assert!(t.advance(VirtualTime(900)));
        assert_eq!((t.deadline(), t.next_event()), (0, None));
        t.set_tsc_offset(VirtualTime(901), 0u64.wrapping_sub(50));
        t.set_deadline(VirtualTime(902), 1000);
        assert_eq!(t.next_event(), Some(VirtualTime(1050)));
        t.set_deadline(VirtualTime(903), u64::MAX);
        assert_eq!(t.next_event(), Some(VirtualTime::NEVER));
        t.set_deadline(VirtualTime(904), 1);
        assert!(t.advance(VirtualTime(904)), "a deadline in the past fires at once");
    }
}
