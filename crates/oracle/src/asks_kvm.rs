//! Ring-0 sequences of a fuzzer asked of KVM, too, where there is one: whether it takes and refuses what we do.

use crate::campaign::Verdict;
use crate::case::Case;
use crate::engine::Engine;
use crate::engines;
use crate::random::Random;
use crate::ring0::control::{self, Features};
use std::hash::{DefaultHasher, Hash, Hasher};
use umbra_accel::Backend;

/// One input in so many: a software backend takes a millisecond and more for each.
const ONE_IN: u64 = 8;

/// KVM, or why there is none, and how often it was asked.
pub struct AsksKvm {
    engines: Result<Vec<Box<dyn Engine>>, String>,
    count: Count,
}

/// Inputs chosen for KVM.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Count {
    /// All of them.
    pub chosen: u64,
    /// Those in which KVM and the interpreter agree; the rest has no answer.
    pub same: u64,
}

impl Default for AsksKvm {
    /// An interpreter and KVM, as the CPU that both can be.
    fn default() -> Self {
        let engines = engines::make_all(&["interp", "kvm"]).map_err(|error| error.to_string());
        Self { engines, count: Count::default() }
    }
}

impl AsksKvm {
    /// Whether this input is one for KVM: decided by the input alone, so that a finding repeats.
    pub fn is_chosen(data: &[u8]) -> bool {
        let mut hasher = DefaultHasher::new();
        data.hash(&mut hasher);
        hasher.finish().is_multiple_of(ONE_IN)
    }

    /// Hands the sequence of `data` and both engines to `judge` if the input is chosen and KVM is there. Says how many
    /// were so far whenever that is a power of two.
    pub fn ask(&mut self, data: &[u8], judge: impl FnOnce(&mut [Box<dyn Engine>], &Case) -> Verdict) {
        if !Self::is_chosen(data) {
            return;
        }
        self.count.chosen += 1;
        if let Ok(engines) = &mut self.engines {
            // Of the rest, software knows next to nothing.
            let features = if Backend::of_kvm().is_hardware() { Features::All } else { Features::Plain };
            let verdict = judge(engines, &control::case_of(features, &mut Random::of(data)));
            self.count.same += u64::from(verdict == Verdict::Same);
        }
        if self.count.chosen.is_power_of_two() {
            eprintln!("{}", self.summary());
        }
    }

    /// How often it was asked and answered.
    pub fn count(&self) -> Count {
        self.count
    }

    /// The same as text; where there is no KVM, why.
    pub fn summary(&self) -> String {
        let Count { chosen, same } = self.count;
        match &self.engines {
            Ok(_) => format!("{}: {chosen} sequences, {same} the same, the rest without an answer", Backend::of_kvm()),
            Err(why) => format!("SKIPPED for {chosen} sequences, which weren't compared with KVM: {why}"),
        }
    }
}
