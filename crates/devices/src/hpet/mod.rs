//! High precision event timer ("IA-PC HPET Specification"): one main counter, three comparators.

mod timer;

use self::timer::Timer;
use crate::{Device, MmioDevice};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// Usual base address.
pub const DEFAULT_BASE: u64 = 0xfed0_0000;
/// Bytes of the register block.
pub const MMIO_SIZE: u64 = 0x400;
/// Frequency of the main counter in hertz.
pub const HPET_HZ: u64 = 100_000_000;
/// Comparators.
pub const TIMERS: usize = 3;

/// Period of the main counter in femtoseconds, as the capability register says it.
const PERIOD_FS: u64 = 1_000_000_000_000_000 / HPET_HZ;
/// Revision 1, three timers, 64 bits, legacy replacement, vendor 8086h; the low half of the
/// capability register, which is also the ACPI table's event timer block id.
pub const BLOCK_ID: u32 = 0x8086_a201;

/// Register offsets.
mod offset {
    pub const CAPABILITIES: u64 = 0x000;
    pub const CONFIGURATION: u64 = 0x010;
    pub const STATUS: u64 = 0x020;
    pub const COUNTER: u64 = 0x0f0;
    pub const TIMERS: u64 = 0x100;
}
/// General configuration bits.
const ENABLE: u64 = 1 << 0;
const LEGACY_REPLACEMENT: u64 = 1 << 1;

/// The HPET.
///
/// Interrupt outputs are masks with a bit for each global interrupt: I/O APIC pins 20 to 23, and in
/// legacy replacement mode 0 (timer 0 in place of the PIT) and 8 (timer 1 in place of the RTC).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hpet {
    configuration: u64,
    /// Level-triggered interrupts that are active, a bit for each timer.
    status: u64,
    /// Main counter at tick `since`, or for good while it is halted.
    counter: u64,
    since: u64,
    timers: [Timer; TIMERS],
    tick: u64,
    pulses: u32,
}

impl Default for Hpet {
    fn default() -> Self {
        Self::new()
    }
}

impl Hpet {
    /// An HPET after reset, halted.
    pub fn new() -> Self {
        Self { configuration: 0, status: 0, counter: 0, since: 0, timers: Default::default(), tick: 0, pulses: 0 }
    }

    /// Whether timers 0 and 1 replace the PIT at IRQ 0 and the RTC at IRQ 8, whose own lines are then
    /// disconnected.
    pub fn replaces_legacy(&self) -> bool {
        self.configuration & LEGACY_REPLACEMENT != 0
    }

    /// Edge-triggered interrupts since the last call.
    pub fn take_pulses(&mut self) -> u32 {
        std::mem::take(&mut self.pulses)
    }

    /// Level-triggered interrupts that are asserted.
    pub fn levels(&self) -> u32 {
        (0..TIMERS)
            .filter(|&n| self.status >> n & 1 != 0 && self.timers[n].enabled())
            .map(|n| self.line(n))
            .fold(0, |a, b| a | b)
    }

    fn runs(&self) -> bool {
        self.configuration & ENABLE != 0
    }

    fn main_counter(&self) -> u64 {
        if self.runs() { self.counter.wrapping_add(self.tick.wrapping_sub(self.since)) } else { self.counter }
    }

    /// Output mask of timer `n`.
    fn line(&self, n: usize) -> u32 {
        match (self.replaces_legacy(), n, self.timers[n].route()) {
            (true, 0, _) => 1 << 0,
            (true, 1, _) => 1 << 8,
            (_, _, 0) => 0,
            (_, _, pin) => 1 << pin,
        }
    }

    fn advance_to(&mut self, tick: u64) {
        self.tick = self.tick.max(tick);
        for n in 0..TIMERS {
            if !self.timers[n].advance(self.tick) || !self.timers[n].enabled() {
                continue;
            }
            if self.timers[n].is_level() {
                self.status |= 1 << n;
            } else {
                self.pulses |= self.line(n);
            }
        }
    }

    fn aim(&mut self, n: usize) {
        let counter = self.runs().then(|| self.main_counter());
        self.timers[n].aim(self.tick, counter);
    }

    fn read_register(&self, register: u64) -> u64 {
        match register {
            offset::CAPABILITIES => PERIOD_FS << 32 | u64::from(BLOCK_ID),
            offset::CONFIGURATION => self.configuration,
            offset::STATUS => self.status,
            offset::COUNTER => self.main_counter(),
            _ => match self.timer_register(register) {
                Some((n, 0x00)) => self.timers[n].configuration(),
                Some((n, 0x08)) => self.timers[n].comparator(),
                _ => 0,
            },
        }
    }

    fn timer_register(&self, register: u64) -> Option<(usize, u64)> {
        let place = register.checked_sub(offset::TIMERS)?;
        let n = (place / 0x20) as usize;
        (n < TIMERS).then_some((n, place % 0x20))
    }

    /// Writes the bits of a register in `lane`.
    fn write_register(&mut self, register: u64, value: u64, lane: u64) {
        let merged = self.read_register(register) & !lane | value & lane;
        match register {
            offset::CONFIGURATION => self.configure(merged & (ENABLE | LEGACY_REPLACEMENT)),
            offset::STATUS => self.status &= !(value & lane),
            offset::COUNTER => {
                self.counter = merged;
                self.since = self.tick;
                (0..TIMERS).for_each(|n| self.aim(n));
            }
            _ => match self.timer_register(register) {
                Some((n, 0x00)) => {
                    self.timers[n].configure(merged);
                    if !self.timers[n].is_level() {
                        self.status &= !(1 << n);
                    }
                    self.aim(n);
                }
                Some((n, 0x08)) => {
                    self.timers[n].set_comparator(value, lane);
                    self.aim(n);
                }
                _ => {}
            },
        }
    }

    fn configure(&mut self, value: u64) {
        self.counter = self.main_counter();
        self.since = self.tick;
        let started = (self.configuration ^ value) & ENABLE != 0;
        self.configuration = value;
        if started {
            (0..TIMERS).for_each(|n| self.aim(n));
        }
    }
}

impl Device for Hpet {
    fn advance(&mut self, now: VirtualTime) {
        self.advance_to(now.ticks(HPET_HZ));
    }
    fn next_event(&self) -> Option<VirtualTime> {
        let quiet = |n: usize| !self.timers[n].enabled() || self.timers[n].is_level() && self.status >> n & 1 != 0;
        let next = (0..TIMERS).filter(|&n| !quiet(n)).filter_map(|n| self.timers[n].matches_at()).min()?;
        Some(VirtualTime::of_ticks(next, HPET_HZ))
    }
    fn reset(&mut self) {
        *self = Self { tick: self.tick, since: self.tick, ..Self::new() };
    }
}

/// Registers are 64 bits wide; aligned double words reach their halves, other accesses nothing.
impl MmioDevice for Hpet {
    fn mmio_read(&mut self, now: VirtualTime, offset: u64, width: AccessWidth) -> u64 {
        self.advance(now);
        if width < AccessWidth::Dword || !offset.is_multiple_of(width.bytes()) {
            return 0;
        }
        self.read_register(offset & !7) >> (8 * (offset & 7)) & width.mask()
    }
    fn mmio_write(&mut self, now: VirtualTime, offset: u64, width: AccessWidth, value: u64) {
        self.advance(now);
        if width < AccessWidth::Dword || !offset.is_multiple_of(width.bytes()) {
            return;
        }
        let shift = 8 * (offset & 7);
        self.write_register(offset & !7, (value & width.mask()) << shift, width.mask() << shift);
        self.advance(now);
    }
}

#[cfg(test)]
mod tests;
