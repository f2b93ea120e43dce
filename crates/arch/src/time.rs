//! Virtual time.

use serde::{Deserialize, Serialize};

/// Frequency of the guest's TSC in hertz. One tick of the TSC is one nanosecond of virtual time.
pub const TSC_HZ: u64 = 1_000_000_000;

/// Frequency in hertz of the core crystal that CPUID leaf 15h reports. The local APIC's timer counts
/// exactly it (before its divider), else guests that trust the leaf scale every tick.
pub const CRYSTAL_HZ: u64 = 1_000_000_000;

/// Nanoseconds of virtual time since the machine was built. Every guest clock derives from it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
pub struct VirtualTime(pub u64);

impl VirtualTime {
    /// A time no machine reaches (584 years).
    pub const NEVER: VirtualTime = VirtualTime(u64::MAX);

    /// This time plus `ns`, saturating.
    #[inline(always)]
    pub const fn plus(self, ns: u64) -> Self {
        Self(self.0.saturating_add(ns))
    }
    /// Nanoseconds since `earlier`, 0 if that is later.
    #[inline(always)]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
    /// Ticks of a clock of `hz` since virtual time 0, rounded down, without overflow.
    pub const fn ticks(self, hz: u64) -> u64 {
        (self.0 as u128 * hz as u128 / 1_000_000_000) as u64
    }
    /// The first instant at which a clock of `hz` has counted `ticks`.
    pub const fn of_ticks(ticks: u64, hz: u64) -> Self {
        let ns = (ticks as u128 * 1_000_000_000).div_ceil(hz as u128);
        if ns > u64::MAX as u128 { Self::NEVER } else { Self(ns as u64) }
    }
}
