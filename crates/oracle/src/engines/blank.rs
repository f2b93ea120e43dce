//! Whole sequences on the interpreter, with its block cache, delivering exceptions.

use crate::case::{Case, Piece, RAM, Run};
use crate::devices::InputBus;
use crate::engine::{Answer, End, Outcome};
use crate::window;
use std::sync::Arc;
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::{Exit, Gpa, Slice, Vcpu, VirtualTime};
use umbra_cpu::{EngineOptions, Interpreter};
use umbra_jit::{Jit, JitOptions};
use umbra_memory::{GuestMemory, PageFlags};
use umbra_mmu::MmuOptions;

use super::window::WindowError;

/// Nothing is cold.
pub const EAGER: JitOptions = JitOptions {
    threshold: 0,
    hot_after: 0,
    code_bytes: 4 << 20,
    legacy: true,
    windows_after: Some(0),
    ..JitOptions::DEFAULT
};
/// Instructions and deliveries after which a single-instruction case hangs.
const SINGLE: u64 = 100_000;

/// An engine that has an interpreter inside, or is one.
pub trait Whole: Vcpu {
    /// The interpreter.
    fn interpreter(&self) -> &Interpreter;
    /// The interpreter, to be set up.
    fn interpreter_mut(&mut self) -> &mut Interpreter;
}

impl Whole for Interpreter {
    fn interpreter(&self) -> &Interpreter {
        self
    }

    fn interpreter_mut(&mut self) -> &mut Interpreter {
        self
    }
}

impl Whole for Jit {
    fn interpreter(&self) -> &Interpreter {
        self.interpreter()
    }

    fn interpreter_mut(&mut self) -> &mut Interpreter {
        self.interpreter_mut()
    }
}

/// An engine over memory that is zero between cases.
pub struct Blank<V = Interpreter> {
    engine: V,
    mem: Arc<GuestMemory>,
    audits: bool,
}

impl Blank<Jit> {
    /// A translator of this CPU model that translates everything at once.
    ///
    /// # Errors
    /// [`WindowError`].
    pub fn translating(profile: &CpuidProfile) -> Result<Self, WindowError> {
        let mem = Arc::new(GuestMemory::new(RAM)?);
        let engine = Jit::new(Arc::clone(&mem), profile, 0, &EngineOptions::default(), EAGER)?;
        Ok(Self { engine, mem, audits: false })
    }
}

impl Blank {
    /// An interpreter of this CPU model whose MMU is made with these options.
    ///
    /// # Errors
    /// [`WindowError`].
    pub fn new(profile: &CpuidProfile, mmu: MmuOptions) -> Result<Self, WindowError> {
        let mem = Arc::new(GuestMemory::new(RAM)?);
        let engine = Interpreter::new(Arc::clone(&mem), profile, 0, &EngineOptions { mmu })?;
        Ok(Self { engine, mem, audits: false })
    }
}

impl<V: Whole> Blank<V> {
    /// Compares the MMU's caches with the guest's tables after each case, too.
    pub fn audited(self) -> Self {
        Self { audits: true, ..self }
    }

    /// Runs a case up to HLT or a triple fault.
    pub fn run(&mut self, case: &Case) -> Answer {
        case.layout.pieces().iter().for_each(|piece| self.mem.write(Gpa::new(piece.gpa), &piece.bytes));
        case.pieces().for_each(|(gpa, bytes)| self.mem.write(Gpa::new(gpa), &bytes));
        let (start, at_most) = match case.run {
            Run::Halt { at_most } => (case.state.clone(), at_most),
            Run::Instruction(_) => (window::arm(case), SINGLE),
        };
        self.engine.set_state(&start);
        let slice = Slice { now: VirtualTime(0), until: VirtualTime(at_most) };
        let end = match self.engine.run(&mut InputBus::new(&[]), slice).exit {
            Exit::Halted => End::Halted,
            Exit::Shutdown(_) => End::Shutdown,
            Exit::Unsupported(what) => return self.cannot(what.what),
            _ => return self.cannot("ran too long".into()),
        };
        let mut state = Box::new(self.engine.state());
        let caught = match case.run {
            Run::Halt { .. } => Some(end),
            run => window::caught(run, &mut state, |gpa| self.quad(gpa)),
        };
        if self.audits
            && let Err(wrong) = self.engine.interpreter().core().mmu.audit()
        {
            return self.cannot(format!("audit: {wrong}"));
        }
        let Some(end) = caught else { return self.cannot("left the window's ring 0".into()) };
        let memory = case.watch.iter().map(|range| self.piece(range)).collect();
        self.clear();
        Answer::Outcome(Outcome { end, state: Some(state), memory })
    }

    fn cannot(&mut self, why: String) -> Answer {
        self.clear();
        Answer::cannot(why)
    }

    fn quad(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        self.mem.read(Gpa::new(gpa), &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn piece(&self, range: &std::ops::Range<u64>) -> Piece {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.mem.read(Gpa::new(range.start), &mut bytes);
        Piece { gpa: range.start, bytes }
    }

    /// Zeroes every page that was written.
    fn clear(&mut self) {
        for off in self.mem.pages().take((RAM >> 12) as usize) {
            if self.mem.page_flags(off).contains(PageFlags::DIRTY) {
                self.mem.write(Gpa::new(off.raw()), &[0; 4096]);
                self.engine.interpreter_mut().clean_page(off);
            }
        }
    }
}
