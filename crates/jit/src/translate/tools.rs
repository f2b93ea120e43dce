//! What is of use from one translation to the next.

use super::slow::Slow;
use super::{Code, Exit, Part};
use crate::emitter::Emitter;
use crate::memory_path::Cold;
use crate::plan::{Kind, Step};
use iced_x86::{Instruction, InstructionInfoFactory};

/// Tools and buffers.
pub struct Tools {
    pub(super) info: InstructionInfoFactory,
    pub(super) emitter: Emitter,
    /// Empty lists.
    pub(super) instructions: Vec<Instruction>,
    pub(super) steps: Vec<Step>,
    starts: Vec<(usize, Option<Kind>)>,
    exits: Vec<Exit>,
    pub(super) rare: Vec<Rare>,
}

/// Lists of what a block rarely executes.
#[derive(Default)]
pub(super) struct Rare {
    pub slow: Vec<Slow>,
    pub cold: Vec<Cold>,
}

impl Default for Tools {
    fn default() -> Self {
        Self {
            info: InstructionInfoFactory::new(),
            emitter: Emitter::default(),
            instructions: Vec::new(),
            steps: Vec::new(),
            starts: Vec::new(),
            exits: Vec::new(),
            rare: Vec::new(),
        }
    }
}

impl Tools {
    /// Takes back what a translation was made in.
    pub fn take_back(&mut self, code: Code) {
        let Code { bytes, starts, exits, .. } = code;
        (self.emitter.bytes, self.starts, self.exits) = (bytes, starts, exits);
    }

    pub(super) fn code(&mut self, parts: &[Part<'_>]) -> Code {
        let (mut starts, mut exits) = (std::mem::take(&mut self.starts), std::mem::take(&mut self.exits));
        starts.clear();
        exits.clear();
        Code {
            parts: parts.len(),
            charge: parts.first().map_or(0, |part| part.charge),
            starts,
            exits,
            ..Code::default()
        }
    }
}
