//! A campaign: many cases of one generator on several engines, counted; in shards, with mergeable results.

use crate::case::Case;
use crate::compare::{Comparison, compare};
use crate::engine::{Answer, Engine, Outcome};
use crate::engines;
use crate::programs;
use crate::random::Random;
use crate::ring0::{control, shapes};
use crate::rows::Rows;
use crate::trace::{self, Kernel, TraceError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Cases between two looks at memory that no case declares.
const BATCH: u64 = 256;
/// Findings that are kept; more are only counted.
const KEPT: usize = 50;

/// Makes the cases of a generator.
pub enum Generator {
    /// Random forms and operands of the instruction rows.
    Rows(Box<Rows>),
    /// Loops of such instructions in 64-bit code.
    Programs(Box<Rows>),
    /// Control-register sequences.
    Control(control::Features),
    /// Page-table shapes.
    Shapes,
    /// Instructions of a booting kernel.
    Trace(Vec<Case>),
}

impl Generator {
    /// Names of all generators, with what they make.
    pub const NAMES: [(&str, &str); 5] = [
        ("rows", "one ring-3 instruction of any row, with edge values, in 16-, 32- and 64-bit code"),
        ("programs", "loops of random 32- and 64-bit ring-3 instructions, for engines that do several at once"),
        ("control", "ring-0 sequences of control-register and EFER writes, page-table edits and accesses"),
        (
            "control-plain",
            "the same in 64-bit mode, without SMEP, SMAP and protection keys: what poor backends have too",
        ),
        ("shapes", "one access through page tables of any shape, under any rights"),
    ];

    /// Instructions that `kernel` executes while it boots.
    ///
    /// # Errors
    /// [`TraceError`] when it can't be booted.
    pub fn trace(kernel: &Kernel, seed: u64) -> Result<Self, TraceError> {
        let mut r = Random::new(seed);
        let cases: Vec<_> = trace::samples(kernel, seed)?.iter().filter_map(|s| trace::case(s, &mut r)).collect();
        if cases.is_empty() {
            return Err(TraceError::Nothing("nothing that the host can run".into()));
        }
        Ok(Generator::Trace(cases))
    }

    /// The generator of that name.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "rows" => Generator::Rows(Box::new(Rows::new(&engines::profile()))),
            "programs" => Generator::Programs(Box::new(Rows::new(&engines::profile()))),
            "control" => Generator::Control(control::Features::All),
            "control-plain" => Generator::Control(control::Features::Plain),
            "shapes" => Generator::Shapes,
            _ => return None,
        })
    }

    /// Case number `index` of a seed.
    pub fn case(&self, seed: u64, index: u64) -> Case {
        let mut r = Random::new(seed);
        let mut r = Random::new(r.next() ^ index.wrapping_mul(0xd134_2543_de82_ef95));
        match self {
            Generator::Rows(rows) => rows.case(&mut r),
            Generator::Programs(rows) => programs::case(rows, &mut r),
            Generator::Control(features) => control::case_of(*features, &mut r),
            Generator::Shapes => shapes::case(&mut r),
            Generator::Trace(cases) => cases[index as usize % cases.len()].clone(),
        }
    }
}

/// What the engines say of one case.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// All that answered agree, and two did.
    Same,
    /// They differ, in this.
    Different(String),
    /// Too few answered; each with its reason.
    CannotAnswer(Vec<String>),
}

/// Runs `case` on all engines and compares each with the first that answers.
pub fn judge(engines: &mut [Box<dyn Engine>], case: &Case) -> Verdict {
    let mut reasons = Vec::new();
    let mut outcomes: Vec<(usize, Outcome)> = Vec::new();
    for (n, engine) in engines.iter_mut().enumerate() {
        match engine.run(case) {
            Answer::Outcome(outcome) => outcomes.push((n, outcome)),
            Answer::CannotAnswer(why) => reasons.push(format!("{}: {why}", engine.name())),
        }
    }
    let mut agreed = 0;
    let Some(((first, reference), others)) = outcomes.split_first() else { return Verdict::CannotAnswer(reasons) };
    for (n, outcome) in others {
        let (a, b) = (&engines[*first], &engines[*n]);
        match compare(case, (a.name(), reference), (b.name(), outcome)) {
            Comparison::Same => agreed += 1,
            Comparison::Free(why) => reasons.push(format!("undefined: {why}")),
            Comparison::Different(text) => {
                let excuse = [(a, reference, outcome), (b, outcome, reference)]
                    .into_iter()
                    .find_map(|(e, ours, theirs)| Some(format!("{}: {}", e.name(), e.excuse(case, ours, theirs)?)));
                match excuse {
                    Some(excuse) => reasons.push(excuse),
                    None => return Verdict::Different(text),
                }
            }
        }
    }
    if agreed > 0 { Verdict::Same } else { Verdict::CannotAnswer(reasons) }
}

/// A difference that was found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Finding {
    /// The case's number.
    pub index: u64,
    /// What differs.
    pub difference: String,
}

/// A campaign's result. Those of its shards add up.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    /// The engines.
    pub engines: Vec<String>,
    /// The generator.
    pub generator: String,
    /// The seed.
    pub seed: u64,
    /// Shards that are in here, as "i/n".
    pub shards: Vec<String>,
    /// Cases that were run.
    pub cases: u64,
    /// Cases without a difference.
    pub same: u64,
    /// Cases with one.
    pub different: u64,
    /// Cases that fewer than two engines answered.
    pub cannot_answer: u64,
    /// Why, and how often.
    pub reasons: BTreeMap<String, u64>,
    /// The first differences.
    pub findings: Vec<Finding>,
    /// Seconds that it took, summed over shards.
    pub seconds: f64,
}

/// Results that don't belong together.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// They are of different campaigns.
    #[error("results of different campaigns: {0} of one isn't that of the other")]
    Other(&'static str),
    /// One is there twice.
    #[error("shard {0} is there twice")]
    Twice(String),
}

impl Tally {
    /// Adds another shard's result.
    ///
    /// # Errors
    /// [`MergeError`] if they aren't shards of one campaign.
    pub fn merge(&mut self, other: &Tally) -> Result<(), MergeError> {
        let checks = [
            ("engines", self.engines == other.engines),
            ("generator", self.generator == other.generator),
            ("seed", self.seed == other.seed),
        ];
        if let Some((what, _)) = checks.into_iter().find(|(_, same)| !same) {
            return Err(MergeError::Other(what));
        }
        if let Some(shard) = other.shards.iter().find(|shard| self.shards.contains(shard)) {
            return Err(MergeError::Twice(shard.clone()));
        }
        self.shards.extend(other.shards.iter().cloned());
        self.cases += other.cases;
        self.same += other.same;
        self.different += other.different;
        self.cannot_answer += other.cannot_answer;
        self.seconds += other.seconds;
        for (reason, count) in &other.reasons {
            *self.reasons.entry(reason.clone()).or_default() += count;
        }
        self.findings.extend(other.findings.iter().cloned());
        self.findings.sort_by_key(|finding| finding.index);
        self.findings.truncate(KEPT);
        Ok(())
    }

    /// Whether more than half of the cases had no answer: such a campaign shows nothing.
    pub fn says_too_little(&self) -> bool {
        2 * self.cannot_answer > self.cases
    }

    /// No difference, and enough answers.
    pub fn is_good(&self) -> bool {
        self.different == 0 && !self.says_too_little()
    }

    fn count(&mut self, index: u64, verdict: Verdict) {
        self.cases += 1;
        match verdict {
            Verdict::Same => self.same += 1,
            Verdict::Different(difference) => {
                self.different += 1;
                if self.findings.len() < KEPT {
                    self.findings.push(Finding { index, difference });
                }
            }
            Verdict::CannotAnswer(reasons) => {
                self.cannot_answer += 1;
                for reason in reasons {
                    *self.reasons.entry(reason).or_default() += 1;
                }
            }
        }
    }
}

/// Runs the cases of `indices` and counts them. `go_on` is asked between batches.
pub fn run(
    engines: &mut [Box<dyn Engine>],
    generator: &Generator,
    indices: impl Iterator<Item = u64>,
    tally: &mut Tally,
    mut go_on: impl FnMut(&Tally) -> bool,
) {
    let mut indices = indices.peekable();
    while indices.peek().is_some() {
        let batch: Vec<u64> = indices.by_ref().take(BATCH as usize).collect();
        let mut counted = tally.clone();
        for &index in &batch {
            let case = generator.case(tally.seed, index);
            counted.count(index, judge(engines, &case));
        }
        if settle(engines).is_err() {
            // Somebody wrote where no case says so: once more, one by one.
            counted = tally.clone();
            for &index in &batch {
                let case = generator.case(tally.seed, index);
                let verdict = judge(engines, &case);
                counted.count(index, settle(engines).map_or_else(Verdict::Different, |()| verdict));
            }
        }
        *tally = counted;
        if !go_on(tally) {
            return;
        }
    }
}

/// Every engine's look at the memory that it keeps.
pub(crate) fn settle(engines: &mut [Box<dyn Engine>]) -> Result<(), String> {
    let mut result = Ok(());
    for engine in engines {
        // All of them repair their memory.
        let settled = engine.settle().map_err(|why| format!("{} {why}", engine.name()));
        result = result.and(settled);
    }
    result
}
