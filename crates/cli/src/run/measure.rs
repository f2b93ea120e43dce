//! What the MMU did in each phase that a measured guest marks.

use umbra_mmu::MmuStats;
use umbra_test_roms::Phase;

/// A finished phase.
#[derive(Clone, Debug)]
pub struct PhaseReport {
    pub name: &'static str,
    /// Toggles, switches or trips made.
    pub count: u32,
    /// Counters that moved, by name.
    pub moved: Vec<(String, u64)>,
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
            let moved = moved.filter(|(_, difference)| *difference != 0).collect();
            self.done.push(PhaseReport { name: phase.name(), count: phase.count(), moved });
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
        assert_eq!(done[0].moved, [("walks".to_owned(), 2), ("refills".to_owned(), 1)]);
        assert!(done[1].moved.is_empty());
    }
}
