//! Builds the machine that the arguments describe, with its image loaded.

use super::args::{Accel, Args, EngineChoice, JitArgs};
use super::engine::{self, Choice, Engine};
use super::image;
use super::rom::Options;
use super::translations::Readers;
use crate::error::CliError;
use std::sync::Arc;
use umbra_arch::PAGE_SIZE;
use umbra_arch::cpuid::{CpuidProfile, Feature, HostOffer};
use umbra_cpu::Interpreter;
use umbra_jit::{Jit, JitOptions, JitStats};
use umbra_machine::boot::{self, BootRequest, Concern, ImageKind};
use umbra_machine::{Machine, MachineConfig, MachineError, guest_memory};
use umbra_memory::{GuestMemory, PageFlags};
use umbra_mmu::MmuStats;
use umbra_test_roms::Rom;

/// 1 January 2026, 00:00 UTC: what the clock shows at the start of every run.
const RTC_START: i64 = 1_767_225_600;

/// Fewest bytes of RAM that must be allowed to stay present.
const MIN_RESIDENT: u64 = 4 << 20;

/// A machine ready to run.
pub struct Guest {
    pub machine: Machine<Engine>,
    /// CPU features that the accelerator can't offer.
    pub dropped: Vec<String>,
    /// The image's format; `None` started at the reset vector.
    pub kind: Option<ImageKind>,
    pub is_embedded: bool,
    /// A line that must be in the output of a guest that checks itself.
    pub verdict: Option<&'static str>,
}

impl Guest {
    /// The counters of all CPUs' MMUs, summed.
    pub fn mmu_stats(&self) -> MmuStats {
        let mut sum = MmuStats::default();
        self.machine.vcpus().for_each(|engine| sum.add(engine.soft().mmu_stats()));
        sum
    }

    /// The counters of all CPUs' translators, summed.
    pub fn jit_stats(&self) -> Option<JitStats> {
        self.machine.vcpus().filter_map(Engine::jit_stats).reduce(|mut sum, stats| {
            sum.add(&stats);
            sum
        })
    }

    /// Bytes of guest memory in pages that were ever written.
    pub fn written_bytes(&self) -> u64 {
        self.machine.memory().pages_with(PageFlags::DIRTY).count() as u64 * PAGE_SIZE
    }
}

/// Builds and loads.
///
/// # Errors
/// [`CliError`] names the argument that has to change.
pub fn build(args: &Args) -> Result<Guest, CliError> {
    if args.expect.as_deref() == Some("") {
        return Err(CliError::EmptyExpect);
    }
    if let Some(bytes) = args.memory_resident.filter(|&bytes| bytes < MIN_RESIDENT) {
        return Err(CliError::TooLittleResident(bytes));
    }
    let choice = choice(args)?;
    let translation = translation(args.engine, &args.jit, choice)?;
    let (profile, dropped) = engine::fitted(choice, lazy_profile(args)?)?;
    let memory = guest_memory(args.memory)?;
    if let Some(path) = &args.memory_file {
        memory.set_page_source(Box::new(image::open_source(path)?)).map_err(MachineError::from)?;
    }
    let readers = Readers::of(&args.jit)?;
    let mut traces = super::trace::of(&args.tracing, args.smp)?.into_iter();
    let engine = |id| {
        let mut soft = interpreter(args, &memory, &profile, id)?;
        soft.set_trace(traces.next());
        let mut engine = engine::make(choice, &args.accel, translation, &memory, &profile, soft)?;
        if let Some(jit) = engine.translator_mut() {
            readers.attach(jit);
        }
        Ok(engine)
    };
    let engines: Result<Vec<_>, CliError> = (0..args.smp).map(engine).collect();
    let engines = engines?;
    let config = MachineConfig { profile, rtc_start: RTC_START };
    let mut machine = Machine::new(memory, &config, engines)?;
    machine.pc_mut().set_page_latency(args.memory_latency);
    machine.pc_mut().set_resident_pages(args.memory_resident.map(|bytes| bytes / PAGE_SIZE));
    let kind = match &args.kernel {
        Some(_) => load_kernel(args, &mut machine)?,
        None => {
            load_embedded(args, &mut machine)?;
            None
        }
    };
    if let Some(text) = &args.expect {
        machine.pc_mut().serial_mut().expect(text.as_bytes());
    }
    let is_embedded = args.kernel.is_none();
    let verdict = is_embedded.then(|| umbra_test_roms::embedded_guest().expect);
    Ok(Guest { machine, dropped, kind, is_embedded, verdict })
}

/// The engine, which must be Umbra's own where pages come from a file: an accelerator reaches RAM without asking.
fn choice(args: &Args) -> Result<Choice, CliError> {
    match Choice::of(&args.accel, args.smp)? {
        choice @ Choice::Kvm(_) if args.memory_file.is_none() => Ok(choice),
        Choice::Kvm(_) if args.accel.accel == Accel::Kvm => Err(CliError::AccelMemoryFile),
        _ => Ok(Choice::Soft),
    }
}

/// What `--engine` and its companions come to: the translator unless something stands against it.
fn translation(engine: Option<EngineChoice>, args: &JitArgs, choice: Choice) -> Result<Option<JitOptions>, CliError> {
    let is_soft = choice == Choice::Soft;
    let default = if is_soft && Jit::runs_on_this_host() { EngineChoice::Jit } else { EngineChoice::Interp };
    match engine.unwrap_or(default) {
        EngineChoice::Interp => match args.given() {
            Some(flag) => Err(CliError::NeedsJit { flag }),
            None => Ok(None),
        },
        EngineChoice::Jit if is_soft => Ok(Some(args.options())),
        EngineChoice::Jit => Err(CliError::AccelEngine),
    }
}

/// The CPU model, which offers asynchronous page faults where pages come from a file.
fn lazy_profile(args: &Args) -> Result<CpuidProfile, CliError> {
    if args.memory_file.is_none() {
        let profile = profile(&args.cpu)?;
        return if profile.has(Feature::KvmAsyncPf) { Err(CliError::NeedsMemoryFile) } else { Ok(profile) };
    }
    // Behind the model's name, so that what the user says has the last word.
    let (model, changes) = args.cpu.split_once(',').map_or((&*args.cpu, None), |(model, rest)| (model, Some(rest)));
    let offered = format!("{model},+{}", Feature::KvmAsyncPfInt);
    profile(&changes.map_or(offered.clone(), |changes| format!("{offered},{changes}")))
}

/// The CPU model of that name, as far as this host can execute it.
fn profile(name: &str) -> Result<CpuidProfile, CliError> {
    let host = HostOffer::from_cpuid(|leaf, subleaf| {
        let answer = std::arch::x86_64::__cpuid_count(leaf, subleaf);
        [answer.eax, answer.ebx, answer.ecx, answer.edx]
    });
    Ok(CpuidProfile::parse(name, &host)?)
}

/// A machine that starts a test ROM.
///
/// # Errors
/// [`CliError`] when the CPU model or memory can't be had.
pub fn rom_machine(rom: &Rom, memory: u64, options: &Options<'_>) -> Result<Machine<Engine>, CliError> {
    let &Options { cpu, engine, mmu, accel, tracing } = options;
    let choice = Choice::of(accel, 1)?;
    let translation = translation(engine, &JitArgs::default(), choice)?;
    let (profile, _) = engine::fitted(choice, profile(cpu)?)?;
    let memory = guest_memory(memory)?;
    let mut soft = Interpreter::new(Arc::clone(&memory), &profile, 0, &mmu.options(0))?;
    soft.set_trace(super::trace::of(tracing, 1)?.pop());
    let engine = engine::make(choice, accel, translation, &memory, &profile, soft)?;
    let mut machine = Machine::new(memory, &MachineConfig { profile, rtc_start: RTC_START }, vec![engine])?;
    load_rom(rom, &mut machine)?;
    Ok(machine)
}

/// Virtual CPU `id`.
fn interpreter(
    args: &Args,
    memory: &Arc<GuestMemory>,
    profile: &CpuidProfile,
    id: u32,
) -> Result<Interpreter, CliError> {
    let mut engine = Interpreter::new(Arc::clone(memory), profile, id, &args.mmu.options(seed_of(args, id)))?;
    engine.set_cpus(args.smp);
    engine.set_random_seed(seed_of(args, id));
    Ok(engine)
}

/// Each CPU draws from a sequence of its own.
fn seed_of(args: &Args, id: u32) -> u64 {
    args.seed ^ u64::from(id).rotate_right(16)
}

fn load_kernel(args: &Args, machine: &mut Machine<Engine>) -> Result<Option<ImageKind>, CliError> {
    let Some(path) = &args.kernel else { return Ok(None) };
    let kernel = image::read("--kernel", path, args.memory)?;
    let initrd = match &args.initrd {
        Some(path) => Some(image::read("--initrd", path, args.memory)?),
        None => None,
    };
    let map = machine.map().clone();
    let request = BootRequest {
        kernel: &kernel,
        initrd: initrd.as_deref(),
        command_line: args.append.as_deref().unwrap_or_default(),
        map: &map,
        rsdp: machine.rsdp(),
    };
    let plan =
        boot::plan(&request).map_err(|source| CliError::Boot { subject: subject(args, source.concern()), source })?;
    machine.boot(&plan);
    Ok(plan.kind)
}

/// The flag and file that a boot error is about.
fn subject(args: &Args, concern: Concern) -> String {
    let (flag, path) = match concern {
        Concern::Kernel => ("--kernel", &args.kernel),
        Concern::Initrd => ("--initrd", &args.initrd),
        Concern::CommandLine => return "--append".into(),
    };
    path.as_ref().map_or(flag.into(), |path| format!("{flag} {}", path.display()))
}

fn load_embedded(args: &Args, machine: &mut Machine<Engine>) -> Result<(), CliError> {
    for (flag, given) in [("--initrd", args.initrd.is_some()), ("--append", args.append.is_some())] {
        if given {
            return Err(CliError::NeedsKernel { flag });
        }
    }
    load_rom(umbra_test_roms::embedded_guest(), machine)
}

fn load_rom(rom: &Rom, machine: &mut Machine<Engine>) -> Result<(), CliError> {
    machine.add_reset_rom(&umbra_firmware::reset_image()?)?;
    machine.memory().write(rom.load(), &rom.image()?);
    machine.pc_mut().set_measurement_port(umbra_test_roms::MEASUREMENT_PORT);
    machine.boot(&boot::reset_plan());
    Ok(())
}
