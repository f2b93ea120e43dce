//! The measurement port: how a guest tells the machine which phase it is in.

/// Port to which a guest writes a phase's id when it begins and 0 when it ends. It is write-only, has no
/// effect a guest could see, and may be left without a device.
pub const MEASUREMENT_PORT: u16 = 0xf6;

/// A measured phase of the embedded guest. Before each one the guest has done the same things at least
/// twice, so that whatever an emulator caches is warm.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Phase {
    /// MOV to CR0 that flips WP, with a write to a read-only page now and then.
    WpToggles = 1,
    /// MOV to CR3, round robin over four roots, with a read that tells them apart.
    RootSwitches = 2,
    /// MOV to CR4 that flips PGE, with a read of a global page.
    PgeToggles = 3,
    /// MOV to CR4 that flips SMEP, with a read.
    SmepToggles = 4,
    /// WRMSR that flips EFER.NXE, with a read.
    NxeToggles = 5,
    /// Long mode to PAE paging and back.
    PaeTrips = 6,
    /// Long mode to 2-level paging and back.
    TwoLevelTrips = 7,
}

impl Phase {
    /// All phases, in the order in which they run.
    pub const ALL: [Phase; 7] = [
        Phase::WpToggles,
        Phase::RootSwitches,
        Phase::PgeToggles,
        Phase::SmepToggles,
        Phase::NxeToggles,
        Phase::PaeTrips,
        Phase::TwoLevelTrips,
    ];

    /// The value written to [`MEASUREMENT_PORT`].
    pub const fn id(self) -> u8 {
        self as u8
    }

    /// The phase with that id; `None` for 0 (the end of a phase) and unknown ids.
    pub fn from_id(id: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.id() == id)
    }

    /// In words, for reports.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::WpToggles => "CR0.WP toggles",
            Phase::RootSwitches => "CR3 switches",
            Phase::PgeToggles => "CR4.PGE toggles",
            Phase::SmepToggles => "CR4.SMEP toggles",
            Phase::NxeToggles => "EFER.NXE toggles",
            Phase::PaeTrips => "long-PAE-long trips",
            Phase::TwoLevelTrips => "long-2-level-long trips",
        }
    }

    /// How many toggles, switches or trips the phase makes.
    pub const fn count(self) -> u32 {
        match self {
            Phase::WpToggles => 1_000_000,
            Phase::RootSwitches => 100_000,
            Phase::PgeToggles | Phase::SmepToggles | Phase::NxeToggles => 10_000,
            Phase::PaeTrips | Phase::TwoLevelTrips => 1_000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_distinct_and_never_the_end_mark() {
        for p in Phase::ALL {
            assert_eq!(Phase::from_id(p.id()), Some(p));
        }
        assert_eq!(Phase::from_id(0), None);
        assert_eq!(Phase::from_id(8), None);
    }
}
