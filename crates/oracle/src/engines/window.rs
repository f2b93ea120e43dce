//! Single instructions on the interpreter's core, without its block cache: what the rows themselves do.

use super::host::in_window;
use crate::case::{Case, Layout, Piece, RAM, Run};
use crate::devices::InputBus;
use crate::engine::{Answer, End, Outcome};
use crate::rows::{self, selectors};
use crate::window::{self, BYTES, PHYSICAL, background};
use std::sync::Arc;
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::{CpuState, Fault, Gpa};
use umbra_cpu::core::CodeSize;
use umbra_cpu::op::{CODE_BASE, Stop};
use umbra_cpu::{Core, EngineError, EngineOptions, decode};
use umbra_hostexec::native::Mode;
use umbra_memory::{GuestMemory, MemoryError};

/// A core in one mode's window.
pub struct Window {
    core: Core,
    mode: Mode,
    start: CpuState,
}

/// Why a window can't be made.
#[derive(Debug, thiserror::Error)]
pub enum WindowError {
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No core.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// No translator.
    #[error(transparent)]
    Jit(#[from] umbra_jit::JitError),
}

impl Window {
    /// A window whose CPU is `profile`.
    ///
    /// # Errors
    /// [`WindowError`].
    pub fn new(profile: &CpuidProfile, mode: Mode) -> Result<Self, WindowError> {
        let mem = Arc::new(GuestMemory::new(RAM)?);
        Layout::Window(mode).pieces().iter().for_each(|piece| mem.write(Gpa::new(piece.gpa), &piece.bytes));
        let mut core = Core::new(mem, profile, 0, &EngineOptions::default())?;
        let start = window::state(mode);
        core.set_state(&start);
        Ok(Self { core, mode, start })
    }

    /// The windows of all modes on one CPU model.
    ///
    /// # Errors
    /// [`WindowError`].
    pub fn all(profile: &CpuidProfile) -> Result<[Self; 3], WindowError> {
        let [a, b, c] = Mode::ALL;
        Ok([Self::new(profile, a)?, Self::new(profile, b)?, Self::new(profile, c)?])
    }

    /// Runs a single-instruction case of this mode.
    pub fn run(&mut self, case: &Case) -> Answer {
        if case.layout != Layout::Window(self.mode) || !matches!(case.run, Run::Instruction(_)) || !in_window(case) {
            return Answer::cannot("not a single instruction of this window");
        }
        for (gpa, bytes) in case.pieces() {
            self.core.mem.write(Gpa::new(gpa), &bytes);
        }
        let mut state = Box::new(case.state.clone());
        let end = self.execute(&case.code.bytes(), &mut state);
        let read = |range: &std::ops::Range<u64>| {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            self.core.mem.read(Gpa::new(range.start), &mut bytes);
            Piece { gpa: range.start, bytes }
        };
        let memory = case.watch.iter().map(read).collect();
        for range in case.ranges() {
            let (start, end) = ((range.start - PHYSICAL) as usize, (range.end - PHYSICAL) as usize);
            self.core.mem.write(Gpa::new(range.start), &background()[start..end]);
        }
        Answer::Outcome(Outcome { end, state: Some(state), memory })
    }

    /// Executes the first instruction in `bytes`, all rounds of it, as if it lay at `state.rip`.
    pub fn execute(&mut self, bytes: &[u8], state: &mut CpuState) -> End {
        let size = match self.mode {
            Mode::Bits16 => CodeSize::Bits16,
            Mode::Bits32 => CodeSize::Bits32,
            Mode::Bits64 => CodeSize::Bits64,
        };
        let Ok(i) = decode::decode(bytes, state.rip, size) else { return End::Fault(Fault::UNDEFINED) };
        let op = decode::resolve(&i, size, &self.core.profile, &mut self.core.host).op;
        let with_fp = rows::uses_fp(i.code());
        let c = &mut self.core;
        c.gpr[..16].copy_from_slice(&state.gpr);
        c.set_rflags(state.rflags);
        if with_fp {
            c.s.fp = state.fp;
        }
        (c.block_rip, c.next_rip) = (state.rip, i.next_ip() & self.mode.mask());
        c.gpr[usize::from(CODE_BASE)] = 0;
        let flow = loop {
            match (op.exec)(c, &mut InputBus::new(&[]), &op) {
                Err(Stop::Again) => {}
                flow => break flow,
            }
        };
        state.gpr.copy_from_slice(&c.gpr[..16]);
        state.rflags = c.rflags();
        if with_fp {
            state.fp = c.s.fp;
        }
        state.seg = c.s.seg;
        let end = match flow {
            Ok(()) => {
                state.rip = c.next_rip;
                End::Completed
            }
            Err(Stop::Fault) => End::Fault(c.fault),
            // Single instructions of user code have no other end; if one had, it would differ from everything.
            Err(_) => End::Shutdown,
        };
        if selectors::loads(i.code()) {
            c.set_state(&self.start);
        }
        end
    }

    /// Whether the window is as it was made; repairs it.
    ///
    /// # Errors
    /// Where it isn't.
    pub fn settle(&mut self) -> Result<(), String> {
        let mut now = vec![0; BYTES];
        self.core.mem.read(Gpa::new(PHYSICAL), &mut now);
        if now == background() {
            return Ok(());
        }
        let at = now.iter().zip(background()).position(|(a, b)| a != b).unwrap_or(0);
        self.core.mem.write(Gpa::new(PHYSICAL), background());
        Err(format!("wrote at window offset {at:#x}, which the case doesn't declare"))
    }
}
