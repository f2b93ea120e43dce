//! What the MMU did in each phase that a measured guest marks.

use umbra_mmu::MmuStats;
use umbra_test_roms::Phase;

/// The counters that a kept root saves: a reader looks for their zeros.
const WORK: [&str; 5] = ["pages_allocated", "refills", "walks", "entries_dropped", "dropped_by_flush"];

/// A finished phase.
#[derive(Clone, Debug)]
pub struct PhaseReport {
    pub name: &'static str,
    /// Toggles, switches or trips made.
    pub count: u32,
    /// Counters that moved, by name, and those of [`WORK`] whether they did or not.
    pub counters: Vec<(String, u64)>,
}

/// The phases so far.
#[derive(Debug, Default)]
pub struct Measurements {
    open: Option<(Phase, MmuStats)>,
    done: Vec<PhaseReport>,
}

impl Measurements {
    /// A phase begins (its id) or ends (0).
    pub fn mark(&mut self, id: u8, stats: &MmuStats) {
        if let Some((phase, before)) = self.open.take() {
            let moved = stats.fields().zip(before.fields());
            let moved = moved.map(|((name, after), (_, before))| (name, after.wrapping_sub(before)));
            let counters = moved.filter(|(name, n)| *n != 0 || WORK.contains(&name.as_str())).collect();
            self.done.push(PhaseReport { name: phase.name(), count: phase.count(), counters });
        }
        self.open = Phase::from_id(id).map(|phase| (phase, stats.clone()));
    }

    /// All phases that ended.
    pub fn finish(self) -> Vec<PhaseReport> {
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_holds_what_moved_in_it() {
        let mut measurements = Measurements::default();
        let mut stats = MmuStats { walks: 5, ..MmuStats::default() };
        measurements.mark(Phase::WpToggles.id(), &stats);
        stats.walks = 7;
        stats.refills = 1;
        measurements.mark(0, &stats);
        stats.walks = 100;
        measurements.mark(Phase::PaeTrips.id(), &stats);
        measurements.mark(0, &stats);
        let done = measurements.finish();
        assert_eq!(done.len(), 2);
        let value = |phase: usize, name: &str| done[phase].counters.iter().find(|c| c.0 == name).map(|c| c.1);
        assert_eq!((value(0, "walks"), value(0, "refills")), (Some(2), Some(1)));
        for name in WORK {
            assert_eq!(value(1, name), Some(0), "{name} is an MMU counter and shows its zero");
        }
        assert_eq!(value(1, "role_changes"), None);
    }
}
