//! [`Engine`]: whatever can run a [`Case`] and say what came out, by name.

use crate::case::{Case, Piece};
use std::borrow::Cow;
use umbra_arch::{CpuState, Fault};
use umbra_test_roms::Rom;

/// How a case ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// The one instruction completed.
    Completed,
    /// The one instruction raised an exception, which wasn't delivered.
    Fault(Fault),
    /// HLT.
    Halted,
    /// A triple fault.
    Shutdown,
}

/// What came out of a case, as far as an engine knows it.
#[derive(Clone, PartialEq, Debug)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// The state then; `None` where the engine doesn't know it. Not compared after [`End::Shutdown`].
    pub state: Option<Box<CpuState>>,
    /// Memory of the ranges that the case watches, in their order; a model may know fewer.
    pub memory: Vec<Piece>,
}

/// An engine's answer to a case.
#[derive(Clone, PartialEq, Debug)]
pub enum Answer {
    /// It ran.
    Outcome(Outcome),
    /// This engine can't answer it, for this reason: no difference, but counted.
    CannotAnswer(Cow<'static, str>),
}

impl Answer {
    /// A reason for having no answer.
    pub fn cannot(reason: impl Into<Cow<'static, str>>) -> Self {
        Answer::CannotAnswer(reason.into())
    }
}

/// What a test ROM said.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RomAnswer {
    /// Its serial output, without carriage returns; how it ended, if not by powering off.
    Report(String),
    /// This engine can't run it, for this reason.
    CannotAnswer(Cow<'static, str>),
}

/// Something that runs cases.
pub trait Engine {
    /// Its name on the command line.
    fn name(&self) -> &'static str;

    /// Runs a case from its start; nothing of earlier cases is left.
    fn run(&mut self, case: &Case) -> Answer;

    /// An engine that restores only what cases declare checks here, now and then, that nothing else was written.
    ///
    /// # Errors
    /// Where memory differs from the layout, in words. It is repaired.
    fn settle(&mut self) -> Result<(), String> {
        Ok(())
    }

    /// Why a difference between this engine's outcome and another's is no finding: this processor or backend is
    /// known to do otherwise. The name of the defect or of the choice that manuals leave.
    fn excuse(&self, _case: &Case, _ours: &Outcome, _theirs: &Outcome) -> Option<Cow<'static, str>> {
        None
    }

    /// Runs a whole test ROM.
    fn run_rom(&mut self, _rom: &Rom) -> RomAnswer {
        RomAnswer::CannotAnswer("runs cases only".into())
    }
}
