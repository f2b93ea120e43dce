//! What can go wrong on the host's side: each names the flag and the file, and says what to do.

use std::path::PathBuf;
use umbra_accel::kvm::KvmError;
use umbra_arch::cpuid::BadProfile;
use umbra_cpu::EngineError;
use umbra_firmware::FirmwareError;
use umbra_jit::JitError;
use umbra_machine::MachineError;
use umbra_machine::boot::BootError;
use umbra_test_roms::RomError;

/// A usage or host error: exit code 125.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// A file can't be read.
    #[error("{flag} {}: {source}: check the path", path.display())]
    Read {
        /// The flag that named it.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: std::io::Error,
    },
    /// The trace's file can't be made.
    #[error("--trace-file {}: {source}: check the path", path.display())]
    Trace {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: std::io::Error,
    },
    /// A file can't be made.
    #[error("{flag}: {}: {source}: check the path", path.display())]
    Write {
        /// The flag that asked for it.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: std::io::Error,
    },
    /// A directory or the like.
    #[error("{flag} {}: not a file: give the path of an image", path.display())]
    NotAFile {
        /// The flag that named it.
        flag: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// The guest is offered news of pages that arrive later, and none do.
    #[error("--cpu: +kvm-asyncpf means nothing without --memory-file: give one, or take it away")]
    NeedsMemoryFile,
    /// An accelerator reaches RAM without asking.
    #[error("--memory-file needs Umbra's own engine: leave --accel kvm away")]
    AccelMemoryFile,
    /// So few pages that a single instruction could need more.
    #[error("--memory-resident: {0} bytes are too few: give at least 4M")]
    TooLittleResident(u64),
    /// The file alone is larger than RAM.
    #[error("{flag} {}: the file is larger than the guest's RAM ({ram} bytes): enlarge it with -m", path.display())]
    LargerThanRam {
        /// The flag that named it.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// Bytes of RAM.
        ram: u64,
    },
    /// The image can't be booted.
    #[error("{subject}: {source}")]
    Boot {
        /// The flag and file that it is about.
        subject: String,
        /// Why.
        source: BootError,
    },
    /// A flag that only makes sense with another.
    #[error("{flag} needs --kernel: the embedded guest takes none")]
    NeedsKernel {
        /// The flag.
        flag: &'static str,
    },
    /// --expect with nothing to look for.
    #[error("--expect: the string is empty: give the text to wait for")]
    EmptyExpect,
    /// The CPU model.
    #[error("--cpu: {0}")]
    Cpu(#[from] BadProfile),
    /// The machine.
    #[error("-m: {0}")]
    Machine(#[from] MachineError),
    /// The engine.
    #[error("{0}")]
    Engine(#[from] EngineError),
    /// The accelerator.
    #[error("--accel kvm: {0}")]
    Kvm(#[from] KvmError),
    /// Several CPUs under KVM.
    #[error(
        "--accel kvm runs one CPU only, as all of a machine's CPUs share a host thread: leave out --smp, or use --accel soft"
    )]
    AccelCpus,
    /// A hand-over without an accelerator.
    #[error("--handover-at needs --accel kvm: there is nothing to hand over from")]
    NeedsAccel,
    /// A local APIC for no accelerator.
    #[error("--irqchip needs --accel kvm: Umbra's own engine has Umbra's local APICs")]
    IrqchipNeedsAccel,
    /// No local APIC in the kernel.
    #[error("--irqchip split: this host's KVM doesn't offer it: leave it away")]
    NoSplitIrqchip,
    /// The translator can't be made.
    #[error("--engine jit: {0}")]
    Jit(#[from] JitError),
    /// An option of the translator without it.
    #[error("{flag} needs --engine jit: the interpreter translates nothing")]
    NeedsJit {
        /// The flag.
        flag: &'static str,
    },
    /// Several CPUs in lockstep.
    #[error("--lockstep compares one CPU: leave out --smp")]
    LockstepCpus,
    /// Two engines.
    #[error("--engine jit is for --accel soft: a hand-over goes to the interpreter")]
    AccelEngine,
    /// The firmware.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    /// The embedded guest.
    #[error(transparent)]
    Rom(#[from] RomError),
    /// Terminal settings.
    #[error("the terminal can't be switched to raw mode: {0}: redirect stdin, for example from /dev/null")]
    Terminal(std::io::Error),
    /// Signal handlers.
    #[error("signal handlers can't be installed: {0}")]
    Signals(std::io::Error),
}
