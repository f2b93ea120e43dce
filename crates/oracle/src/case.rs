//! [`Case`]: one comparison, complete: what an engine starts from, what it runs and what is looked at afterwards.

use crate::ring0::{self, Paging};
use crate::window;
use std::ops::Range;
use std::sync::LazyLock;
use umbra_arch::CpuState;
use umbra_hostexec::native::{Mode, Until};

/// Bytes of RAM that every case has, from address 0.
pub const RAM: u64 = 4 << 20;

/// Bytes of guest-physical memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Where they lie.
    pub gpa: u64,
    /// What they are.
    pub bytes: Vec<u8>,
}

/// What memory holds before the case's own pieces are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// Zeros.
    Blank,
    /// Tables, handlers and data of [`ring0`].
    Ring0(Paging),
    /// Tables and pages of [`window`](crate::window): ring-3 code of this size between pages of all rights.
    Window(Mode),
}

impl Layout {
    /// Everything in memory that isn't 0.
    pub fn pieces(self) -> &'static [Piece] {
        static WINDOW: LazyLock<Vec<Piece>> = LazyLock::new(window::pieces);
        static RING0: LazyLock<[Vec<Piece>; 3]> = LazyLock::new(|| Paging::ALL.map(ring0::pieces));
        match self {
            Layout::Blank => &[],
            Layout::Ring0(paging) => &RING0[paging as usize],
            Layout::Window(_) => &WINDOW,
        }
    }

    /// What cases of this layout start from, but for what they say themselves.
    pub fn state(self) -> CpuState {
        match self {
            Layout::Blank => CpuState::reset(),
            Layout::Ring0(paging) => ring0::state(paging),
            Layout::Window(mode) => window::state(mode),
        }
    }

    /// Ring-3 code in a window.
    pub fn is_window(self) -> bool {
        matches!(self, Layout::Window(_))
    }
}

/// Code as a list of steps, so that it can be shortened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Code {
    /// Guest-physical address of the first step.
    pub gpa: u64,
    /// Position-independent pieces, one after the other.
    pub steps: Vec<Vec<u8>>,
    /// Each step starts with `mov ebp, the next step's address`, for handlers that go on with `jmp rbp`.
    pub linked: bool,
    /// What follows the last step.
    pub tail: Vec<u8>,
}

/// MOV EBP, imm32.
const LINK_BYTES: usize = 5;

impl Code {
    /// The bytes at [`gpa`](Self::gpa).
    pub fn bytes(&self) -> Vec<u8> {
        let mut all = Vec::with_capacity(self.len());
        for step in &self.steps {
            if self.linked {
                let next = self.gpa + (all.len() + LINK_BYTES + step.len()) as u64;
                all.push(0xbd);
                all.extend((next as u32).to_le_bytes());
            }
            all.extend(step);
        }
        all.extend(&self.tail);
        all
    }

    /// How many bytes.
    #[allow(clippy::len_without_is_empty, reason = "code is never empty")]
    pub fn len(&self) -> usize {
        let link = if self.linked { LINK_BYTES } else { 0 };
        self.steps.iter().map(|step| link + step.len()).sum::<usize>() + self.tail.len()
    }
}

/// How far a case runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Run {
    /// One ring-3 instruction in a window, all rounds of a repeated one. It ends before an exception is
    /// delivered; see [`window::arm`](crate::window::arm) for engines that can't stop there.
    Instruction(Until),
    /// Up to HLT or a triple fault. More instructions than this are a hang.
    Halt {
        /// Instructions.
        at_most: u64,
    },
}

/// One comparison.
#[derive(Clone, PartialEq, Debug)]
pub struct Case {
    /// What memory holds before `memory` and `code` are written.
    pub layout: Layout,
    /// The CPU's state at the start.
    pub state: CpuState,
    /// Memory at the start, over the layout.
    pub memory: Vec<Piece>,
    /// The code; its first step is where the state's RIP points.
    pub code: Code,
    /// How far to run.
    pub run: Run,
    /// Guest-physical ranges that are compared afterwards: all that the case may write.
    pub watch: Vec<Range<u64>>,
}

impl Case {
    /// The case's own memory, its code included: what is written over the layout's.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, std::borrow::Cow<'_, [u8]>)> {
        let own = self.memory.iter().map(|piece| (piece.gpa, piece.bytes.as_slice().into()));
        own.chain(std::iter::once((self.code.gpa, self.code.bytes().into())))
    }

    /// Where the case's own memory lies, and all that it may write; wraps where that is nonsense.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        let own = self.memory.iter().map(|piece| (piece.gpa, piece.bytes.len()));
        let own = own.chain(std::iter::once((self.code.gpa, self.code.len())));
        own.map(|(gpa, bytes)| gpa..gpa.wrapping_add(bytes as u64)).chain(self.watch.iter().cloned())
    }
}
