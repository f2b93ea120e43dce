//! The engine of one virtual CPU, as `--accel` chooses it.

use super::args::{Accel, AccelArgs, HandOverAt};
use crate::error::CliError;
use std::sync::Arc;
use umbra_accel::handover::{Side, StopAt};
use umbra_accel::kvm::{KvmVcpu, fit};
use umbra_accel::{Backend, HandOver};
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::{Bus, CpuState, Slice, Stopped, Vcpu};
use umbra_cpu::Interpreter;
use umbra_jit::{Jit, JitOptions, JitStats};
use umbra_memory::GuestMemory;

/// Umbra's own engine, with or without its translator, or an accelerator that can hand over to it.
pub enum Engine {
    Soft(Box<Interpreter>),
    Translated(Jit),
    Accelerated(Box<HandOver<KvmVcpu, Interpreter>>),
}

/// What `--accel` comes to on this host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Choice {
    Soft,
    Kvm,
}

impl Choice {
    /// `auto` takes KVM only where a processor executes the guest, this user may use it and the machine has
    /// one CPU.
    ///
    /// # Errors
    /// For a hand-over that nothing could be handed over from.
    pub fn of(args: &AccelArgs, cpus: u32) -> Result<Self, CliError> {
        if args.accel == Accel::Soft && !args.handover_at.is_empty() {
            return Err(CliError::NeedsAccel);
        }
        let can = || cpus == 1 && Backend::of_kvm().is_hardware() && std::fs::File::open("/dev/kvm").is_ok();
        Ok(match args.accel {
            Accel::Soft => Self::Soft,
            Accel::Kvm => Self::Kvm,
            Accel::Auto if can() => Self::Kvm,
            Accel::Auto => Self::Soft,
        })
    }
}

/// The profile as the chosen engine can offer it, with the names of what had to go.
///
/// # Errors
/// When there is no usable KVM, or more CPUs than it can have.
pub fn fitted(choice: Choice, profile: CpuidProfile, cpus: u32) -> Result<(CpuidProfile, Vec<String>), CliError> {
    if choice == Choice::Soft {
        return Ok((profile, Vec::new()));
    }
    if cpus > 1 {
        return Err(CliError::AccelCpus);
    }
    let fitted = fit(&profile)?;
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
    if choice == Choice::Soft {
        return Ok(match translation {
            None => Engine::Soft(Box::new(soft)),
            Some(options) => Engine::Translated(Jit::around(soft, options)?),
        });
    }
    let accelerator = KvmVcpu::new(Arc::clone(memory), &fit(profile)?)?;
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
    Ok(Engine::Accelerated(Box::new(pair)))
}

impl Engine {
    /// Umbra's own engine, which may not be the one that runs.
    pub fn soft(&self) -> &Interpreter {
        match self {
            Engine::Soft(engine) => engine,
            Engine::Translated(engine) => engine.interpreter(),
            Engine::Accelerated(pair) => pair.soft(),
        }
    }

    /// The translator's counters.
    pub fn jit_stats(&self) -> Option<JitStats> {
        match self {
            Engine::Translated(engine) => Some(engine.stats()),
            Engine::Soft(_) | Engine::Accelerated(_) => None,
        }
    }

    /// Whether an accelerator holds the state.
    pub fn is_accelerated(&self) -> bool {
        matches!(self, Engine::Accelerated(pair) if pair.side() == Side::Accelerator)
    }

    /// Leaves the accelerator, if there is one, before the next instruction.
    pub fn hand_over(&mut self) {
        if let Engine::Accelerated(pair) = self {
            pair.hand_over(Side::Soft);
        }
    }

    /// The accelerator's backend, if there is one.
    pub fn backend(&self) -> Option<Backend> {
        match self {
            Engine::Soft(_) | Engine::Translated(_) => None,
            Engine::Accelerated(pair) => Some(pair.accelerator().backend()),
        }
    }

    /// The changes of engines so far, in words.
    pub fn switches(&self) -> Vec<String> {
        match self {
            Engine::Soft(_) | Engine::Translated(_) => Vec::new(),
            Engine::Accelerated(pair) => pair.switches().iter().map(ToString::to_string).collect(),
        }
    }
}

impl Vcpu for Engine {
    fn run(&mut self, bus: &mut dyn Bus, slice: Slice) -> Stopped {
        match self {
            Engine::Soft(engine) => engine.run(bus, slice),
            Engine::Translated(engine) => engine.run(bus, slice),
            Engine::Accelerated(pair) => pair.run(bus, slice),
        }
    }

    fn state(&self) -> CpuState {
        match self {
            Engine::Soft(engine) => engine.state(),
            Engine::Translated(engine) => engine.state(),
            Engine::Accelerated(pair) => pair.state(),
        }
    }

    fn set_state(&mut self, state: &CpuState) {
        match self {
            Engine::Soft(engine) => engine.set_state(state),
            Engine::Translated(engine) => engine.set_state(state),
            Engine::Accelerated(pair) => pair.set_state(state),
        }
    }

    fn retired(&self) -> u64 {
        match self {
            Engine::Soft(engine) => engine.retired(),
            Engine::Translated(engine) => engine.retired(),
            Engine::Accelerated(pair) => pair.retired(),
        }
    }

    fn wait_is_over(&mut self) -> bool {
        match self {
            Engine::Soft(engine) => engine.wait_is_over(),
            Engine::Translated(engine) => engine.wait_is_over(),
            Engine::Accelerated(pair) => pair.wait_is_over(),
        }
    }
}
