//! The engine `kvm`: /dev/kvm, whatever executes guests behind it.

use super::kvm_defects;
use crate::case::{Case, Piece, RAM, Run};
use crate::devices::InputBus;
use crate::engine::{Answer, End, Engine, Outcome, RomAnswer};
use crate::roms;
use crate::window;
use iced_x86::{Decoder, DecoderOptions};
use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;
use umbra_accel::defects;
use umbra_accel::kvm::{CaseEnd, CaseLimit, CaseRunner, Fitted, Irqchip, KvmError, KvmVcpu, fit};
use umbra_arch::control::Cr4;
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::exit::{Refusal, RefusalKind};
use umbra_arch::{CpuState, Gpa};
use umbra_memory::{GuestMemory, PageFlags};
use umbra_test_roms::Rom;

/// Host time after which a case hangs: a software backend executes millions of instructions in it.
const HANG: Duration = Duration::from_secs(2);

/// ROMs that a defect spoils.
const ROM_DEFECTS: [(&str, defects::Defect); 3] =
    [("pages", defects::LEGACY_PAGING), ("strings", defects::PARTIAL_WRITE), ("syscalls", defects::SYSRET_SHUTDOWN)];

/// KVM with one virtual machine for all cases.
pub struct Kvm {
    runner: CaseRunner,
    memory: Arc<GuestMemory>,
    fitted: Fitted,
}

impl Kvm {
    /// A virtual machine whose CPU is as much of `profile` as KVM can be.
    ///
    /// # Errors
    /// [`KvmError`] when there is no usable KVM.
    pub fn new(profile: &CpuidProfile) -> Result<Self, KvmError> {
        let fitted = fit(profile, Irqchip::User)?;
        let memory = Arc::new(GuestMemory::new(RAM)?);
        let runner = CaseRunner::new(Arc::clone(&memory), &fitted)?;
        Ok(Self { runner, memory, fitted })
    }

    fn execute(&mut self, case: &Case) -> Answer {
        let unknown = case.state.cr4.raw() & !self.fitted.offered().control_limits().cr4_allowed;
        if unknown != 0 {
            return self.cannot(format_args!("it doesn't offer {}", missing(unknown)));
        }
        let has_legacy_paging = case.state.cr0.pg() && !case.state.efer.lma();
        if has_legacy_paging && defects::LEGACY_PAGING.backend == self.runner.backend() {
            return self.cannot(format_args!("{}", defects::LEGACY_PAGING.name));
        }
        let start = match case.run {
            Run::Halt { .. } => case.state.clone(),
            Run::Instruction(_) => window::arm(case),
        };
        let limit = CaseLimit { instructions: None, time: HANG };
        let outcome = match self.runner.run(&start, &mut InputBus::new(&[]), limit) {
            Ok(outcome) => outcome,
            Err(error) => return Answer::cannot(error.to_string()),
        };
        let mut state = Box::new(outcome.state);
        let end = match outcome.end {
            CaseEnd::Halted => End::Halted,
            CaseEnd::Shutdown => End::Shutdown,
            CaseEnd::Refused(refusal) => return self.refused(&refusal, &state),
            CaseEnd::TimedOut | CaseEnd::Instructions => return self.cannot(format_args!("ran too long")),
        };
        let caught = match case.run {
            Run::Halt { .. } => Some(end),
            run => window::caught(run, &mut state, |gpa| self.quad(gpa)),
        };
        let Some(end) = caught else { return self.cannot(format_args!("left the window's ring 0")) };
        let memory = case.watch.iter().map(|range| self.piece(range)).collect();
        Answer::Outcome(Outcome { end, state: Some(state), memory })
    }

    fn cannot(&self, why: std::fmt::Arguments<'_>) -> Answer {
        Answer::cannot(format!("{}: {why}", self.runner.backend()))
    }

    /// Names the instruction, not its operands, so that reasons can be counted.
    fn refused(&self, refusal: &Refusal, state: &CpuState) -> Answer {
        if refusal.kind == RefusalKind::State {
            return self.cannot(format_args!("{}", refusal.kind.name()));
        }
        let bits = match (state.is_64bit_code(), state.segment(umbra_arch::segment::Seg::Cs).attr.is_big()) {
            (true, _) => 64,
            (false, true) => 32,
            (false, false) => 16,
        };
        let mnemonic = Decoder::new(bits, &refusal.bytes, DecoderOptions::NONE).decode().mnemonic();
        self.cannot(format_args!("{}: {mnemonic:?}", refusal.kind.name()))
    }

    fn quad(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read(Gpa::new(gpa), &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn piece(&self, range: &std::ops::Range<u64>) -> Piece {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.memory.read(Gpa::new(range.start), &mut bytes);
        Piece { gpa: range.start, bytes }
    }

    /// Zeroes every page that the case or its preparation wrote.
    fn clear(&self) {
        let dirty: Vec<_> = self.memory.pages_with(PageFlags::DIRTY).collect();
        for off in dirty {
            self.memory.store_bytes(off, &[0; 4096]);
            self.memory.clear_flags(off, PageFlags::DIRTY);
        }
    }
}

/// The first CR4 bit that is set, by its number.
fn missing(bits: u64) -> String {
    let names = [(Cr4::SMEP, "SMEP"), (Cr4::SMAP, "SMAP"), (Cr4::PKE, "PKE"), (Cr4::PCIDE, "PCIDE")];
    let known = names.iter().find(|(bit, _)| bits & bit != 0);
    known.map_or_else(|| format!("CR4 bit {}", bits.trailing_zeros()), |(_, name)| format!("CR4.{name}"))
}

impl Engine for Kvm {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn run_rom(&mut self, rom: &Rom) -> RomAnswer {
        let profile = self.fitted.profile.clone();
        let answer = roms::report(rom, profile, |memory| KvmVcpu::new(memory, &self.fitted));
        let known =
            ROM_DEFECTS.iter().find(|(name, defect)| *name == rom.name && defect.backend == self.runner.backend());
        match (answer, known) {
            (RomAnswer::Report(report), Some((_, defect))) if !report.contains(rom.expect) => {
                RomAnswer::CannotAnswer(format!("{}: {}", defect.name, defect.what).into())
            }
            // Its time is the host's: a slow backend reaches the limit where others don't.
            (RomAnswer::Report(report), _) if report.ends_with("(Limit)\n") => {
                RomAnswer::CannotAnswer(format!("{}: too slow for this ROM", self.runner.backend()).into())
            }
            (answer, _) => answer,
        }
    }

    fn excuse(&self, case: &Case, ours: &Outcome, theirs: &Outcome) -> Option<Cow<'static, str>> {
        let known = defects::DEFECTS.iter().any(|defect| defect.backend == self.runner.backend());
        known.then(|| kvm_defects::explain(case, ours, theirs)).flatten()
    }

    fn run(&mut self, case: &Case) -> Answer {
        case.layout.pieces().iter().for_each(|piece| self.memory.write(Gpa::new(piece.gpa), &piece.bytes));
        case.pieces().for_each(|(gpa, bytes)| self.memory.write(Gpa::new(gpa), &bytes));
        let answer = self.execute(case);
        self.clear();
        answer
    }
}
