//! The engine of one virtual CPU, as `--accel` chooses it.

use super::args::{Accel, AccelArgs, HandOverAt, IrqchipChoice};
use crate::error::CliError;
use std::sync::Arc;
use umbra_accel::handover::{Side, StopAt};
use umbra_accel::kvm::{Irqchip, KvmVcpu, fit};
use umbra_accel::{Backend, HandOver};
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::{Bus, CpuState, Slice, Stopped, Vcpu, VirtualTime};
use umbra_cpu::Interpreter;
use umbra_jit::{Jit, JitOptions, JitStats};
use umbra_memory::GuestMemory;

/// A virtual CPU's engine.
pub struct Engine {
    kind: Kind,
    pace: Pace,
}

/// How much of a slice an engine runs at a time.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// All of it.
    Slice,
    /// So many blocks; an accelerator knows of none.
    Blocks(u64),
    /// What comes before this time.
    Until(VirtualTime),
}

/// Umbra's own engine, with or without its translator, or an accelerator that can hand over to it.
enum Kind {
    Soft(Box<Interpreter>),
    Translated(Jit),
    Accelerated(Box<HandOver<KvmVcpu, Interpreter>>),
}

/// What `--accel` comes to on this host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Choice {
    Soft,
    Kvm(Irqchip),
}

impl Choice {
    /// `auto` takes KVM only where a processor executes the guest, this user may use it and the machine has
    /// one CPU.
    ///
    /// # Errors
    /// For a hand-over that nothing could be handed over from, for more CPUs or another local APIC than KVM can have.
    pub fn of(args: &AccelArgs, cpus: u32) -> Result<Self, CliError> {
        if args.accel == Accel::Soft {
            return match (&args.handover_at[..], args.irqchip) {
                ([], IrqchipChoice::Auto) => Ok(Self::Soft),
                ([], _) => Err(CliError::IrqchipNeedsAccel),
                _ => Err(CliError::NeedsAccel),
            };
        }
        let can = || cpus == 1 && Backend::of_kvm().is_hardware() && std::fs::File::open("/dev/kvm").is_ok();
        match args.accel {
            Accel::Kvm if cpus > 1 => Err(CliError::AccelCpus),
            Accel::Kvm => irqchip(args.irqchip).map(Self::Kvm),
            Accel::Auto if can() => irqchip(args.irqchip).map(Self::Kvm),
            Accel::Soft | Accel::Auto => Ok(Self::Soft),
        }
    }
}

fn irqchip(choice: IrqchipChoice) -> Result<Irqchip, CliError> {
    match choice {
        IrqchipChoice::Auto => Ok(Irqchip::preferred()?),
        IrqchipChoice::User => Ok(Irqchip::User),
        IrqchipChoice::Split if Irqchip::offered()? == Irqchip::User => Err(CliError::NoSplitIrqchip),
        IrqchipChoice::Split => Ok(Irqchip::Split),
    }
}

/// The profile as the chosen engine can offer it, with the names of what had to go.
///
/// # Errors
/// When there is no usable KVM.
pub fn fitted(choice: Choice, profile: CpuidProfile) -> Result<(CpuidProfile, Vec<String>), CliError> {
    let Choice::Kvm(irqchip) = choice else { return Ok((profile, Vec::new())) };
    let fitted = fit(&profile, irqchip)?;
    Ok((fitted.profile, fitted.dropped.iter().map(ToString::to_string).collect()))
}

/// Makes the chosen engine of `soft`; `profile` is what [`fitted`] gave.
///
/// # Errors
/// When there is no usable KVM, or the host can't run translated code.
pub fn make(
    choice: Choice,
    args: &AccelArgs,
    translation: Option<JitOptions>,
    memory: &Arc<GuestMemory>,
    profile: &CpuidProfile,
    soft: Interpreter,
) -> Result<Engine, CliError> {
    let Choice::Kvm(irqchip) = choice else {
        return Ok(Engine::of(match translation {
            None => Kind::Soft(Box::new(soft)),
            Some(options) => Kind::Translated(Jit::around(soft, options)?),
        }));
    };
    let accelerator = KvmVcpu::new(Arc::clone(memory), &fit(profile, irqchip)?)?;
    let mut pair = HandOver::new(accelerator, soft);
    for at in &args.handover_at {
        match at {
            HandOverAt::Refusal => pair.set_at_refusal(true),
            HandOverAt::Address(address) => pair.stop_at(StopAt::Address(*address)),
            HandOverAt::Instructions(count) => pair.stop_at(StopAt::Instructions(*count)),
            // The machine's host listens to the serial port.
            HandOverAt::Serial(_) => {}
        }
    }
    Ok(Engine::of(Kind::Accelerated(Box::new(pair))))
}

impl Engine {
    fn of(kind: Kind) -> Self {
        Self { kind, pace: Pace::Slice }
    }

    /// From now on.
    pub fn set_pace(&mut self, pace: Pace) {
        self.pace = pace;
    }

    /// Umbra's own engine, which may not be the one that runs.
    pub fn soft(&self) -> &Interpreter {
        match &self.kind {
            Kind::Soft(engine) => engine,
            Kind::Translated(engine) => engine.interpreter(),
            Kind::Accelerated(pair) => pair.soft(),
        }
    }

    /// The translator.
    pub fn translator(&self) -> Option<&Jit> {
        match &self.kind {
            Kind::Translated(engine) => Some(engine),
            Kind::Soft(_) | Kind::Accelerated(_) => None,
        }
    }

    /// The translator, to be told whom to tell of translations.
    pub fn translator_mut(&mut self) -> Option<&mut Jit> {
        match &mut self.kind {
            Kind::Translated(engine) => Some(engine),
            Kind::Soft(_) | Kind::Accelerated(_) => None,
        }
    }

    /// The translator's counters.
    pub fn jit_stats(&self) -> Option<JitStats> {
        self.translator().map(Jit::stats)
    }

    /// Whether an accelerator holds the state.
    pub fn is_accelerated(&self) -> bool {
        matches!(&self.kind, Kind::Accelerated(pair) if pair.side() == Side::Accelerator)
    }

    /// Leaves the accelerator, if there is one, before the next instruction.
    pub fn hand_over(&mut self) {
        if let Kind::Accelerated(pair) = &mut self.kind {
            pair.hand_over(Side::Soft);
        }
    }

    /// The accelerator's backend and where it has its local APIC, if there is one.
    pub fn backend(&self) -> Option<(Backend, Irqchip)> {
        match &self.kind {
            Kind::Soft(_) | Kind::Translated(_) => None,
            Kind::Accelerated(pair) => Some((pair.accelerator().backend(), pair.accelerator().irqchip())),
        }
    }

    /// The changes of engines so far, in words.
    pub fn switches(&self) -> Vec<String> {
        match &self.kind {
            Kind::Soft(_) | Kind::Translated(_) => Vec::new(),
            Kind::Accelerated(pair) => pair.switches().iter().map(ToString::to_string).collect(),
        }
    }
}

impl Vcpu for Engine {
    fn run(&mut self, bus: &mut dyn Bus, slice: Slice) -> Stopped {
        let until = if let Pace::Until(time) = self.pace { slice.until.min(time.max(slice.now)) } else { slice.until };
        let slice = Slice { until, ..slice };
        match (&mut self.kind, self.pace) {
            (Kind::Soft(engine), Pace::Blocks(blocks)) => engine.run_blocks(bus, slice, blocks),
            (Kind::Translated(engine), Pace::Blocks(blocks)) => engine.run_blocks(bus, slice, blocks),
            (Kind::Soft(engine), _) => engine.run(bus, slice),
            (Kind::Translated(engine), _) => engine.run(bus, slice),
            (Kind::Accelerated(pair), _) => pair.run(bus, slice),
        }
    }

    fn state(&self) -> CpuState {
        match &self.kind {
            Kind::Soft(engine) => engine.state(),
            Kind::Translated(engine) => engine.state(),
            Kind::Accelerated(pair) => pair.state(),
        }
    }

    fn set_state(&mut self, state: &CpuState) {
        match &mut self.kind {
            Kind::Soft(engine) => engine.set_state(state),
            Kind::Translated(engine) => engine.set_state(state),
            Kind::Accelerated(pair) => pair.set_state(state),
        }
    }

    fn retired(&self) -> u64 {
        match &self.kind {
            Kind::Soft(engine) => engine.retired(),
            Kind::Translated(engine) => engine.retired(),
            Kind::Accelerated(pair) => pair.retired(),
        }
    }

    fn wait_is_over(&mut self) -> bool {
        match &mut self.kind {
            Kind::Soft(engine) => engine.wait_is_over(),
            Kind::Translated(engine) => engine.wait_is_over(),
            Kind::Accelerated(pair) => pair.wait_is_over(),
        }
    }
}
