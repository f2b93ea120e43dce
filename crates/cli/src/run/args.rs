//! The arguments of `umbra run`.

use crate::exit_code;
use crate::size::{parse_address, parse_duration, parse_latency, parse_range, parse_size};
use clap::{Args as ClapArgs, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;
use umbra_cpu::EngineOptions;
use umbra_jit::{JitOptions, Mechanism, Mechanisms};
use umbra_mmu::{MmuMode, MmuOptions};

/// Run a guest. Its first serial port is on stdout; everything else goes to stderr. When stdin is a
/// terminal it becomes the guest's keyboard on that port: Ctrl-A x leaves, Ctrl-A Ctrl-A sends Ctrl-A.
#[derive(ClapArgs, Debug, Clone)]
#[group(id = "run")]
#[command(after_help = exit_code::TABLE)]
pub struct Args {
    /// Kernel: bzImage, ELF with PVH entry, Multiboot 1 or boot sector, told apart by content [default: the embedded guest]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk, or the kernel's one module
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line, for example "console=ttyS0"
    #[arg(long, value_name = "STRING")]
    pub append: Option<String>,
    /// Guest RAM, for example 512M or 1G; a bare number is MiB
    #[arg(short = 'm', long = "memory", value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub memory: u64,
    /// Fill RAM from this file as the guest comes to it; offsets are physical addresses, RAM beyond its end is zero
    #[arg(long, value_name = "FILE")]
    pub memory_file: Option<PathBuf>,
    /// Guest time that a page takes to arrive from it, for example 100us or 2ms; the guest is told by KVM's
    /// asynchronous page faults unless --cpu says -kvm-asyncpf
    #[arg(long, value_name = "TIME", default_value = "100us", value_parser = parse_latency, requires = "memory_file")]
    pub memory_latency: u64,
    /// Keep at most so much of the file's RAM present, as a host that swaps: what was sent away has to arrive again
    #[arg(long, value_name = "SIZE", value_parser = parse_size, requires = "memory_file")]
    pub memory_resident: Option<u64>,
    /// Number of virtual CPUs, 1 to 32; they take turns, deterministically
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=32))]
    pub smp: u32,
    /// CPU model, with changes as in umbra-v3,-avx2: umbra-v3, umbra-v2 or max
    #[arg(long, value_name = "NAME", default_value = umbra_arch::cpuid::PROFILE_NAMES[0])]
    pub cpu: String,
    /// End the run after this many seconds of host time (exit code 124)
    #[arg(long, value_name = "SECONDS", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
    /// End the run with exit code 0 when this appears on the serial port; 123 if the guest ends first
    #[arg(long, value_name = "STRING")]
    pub expect: Option<String>,
    /// Print counters on stderr at the end (always with the embedded guest)
    #[arg(long)]
    pub stats: bool,
    /// Print the report on stderr as one JSON object
    #[arg(long)]
    pub json: bool,
    /// Seed of everything the guest sees as random
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// What paces guest time [default: real when stdin is the guest's terminal, else virtual]
    #[arg(long, value_enum, value_name = "CLOCK")]
    pub clock: Option<ClockChoice>,
    /// What executes the guest; results are always the same [default: jit where the host can, interp under KVM]
    #[arg(long, value_enum, value_name = "ENGINE")]
    pub engine: Option<EngineChoice>,
    #[command(flatten)]
    pub jit: JitArgs,
    #[command(flatten)]
    pub mmu: MmuArgs,
    #[command(flatten)]
    pub accel: AccelArgs,
    #[command(flatten)]
    pub tracing: TraceArgs,
    /// Feed stdin to the serial port although it is no terminal
    #[arg(long)]
    pub serial_stdin: bool,
}

/// `--clock`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum ClockChoice {
    /// Guest time follows executed instructions; HLT skips to the next event
    Virtual,
    /// The same, but the guest never runs ahead of the host's clock
    Real,
}

/// `--engine`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum EngineChoice {
    /// The interpreter
    Interp,
    /// The interpreter, and host code for what is hot
    Jit,
}

/// What belongs to the translator; no result changes.
#[derive(ClapArgs, Debug, Clone, Default)]
#[group(id = "translator")]
pub struct JitArgs {
    /// Translate at most so many blocks, to find by bisection one that is translated wrongly
    #[arg(long, value_name = "N")]
    pub jit_limit: Option<u64>,
    #[command(flatten)]
    pub without: JitOffArgs,
    /// Run the guest on the interpreter, too, and compare registers, flags, counts and time after every N blocks [default
    /// N: 1, or a trace of blocks that are translated together], and memory now and then; the first difference ends the run
    /// with exit code 121
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "1",
        value_parser = clap::value_parser!(u64).range(1..), conflicts_with_all = ["serial_stdin", "clock", "trace"])]
    pub lockstep: Option<u64>,
    /// Write every translation to a file: guest instructions, the way each is done, host instructions
    #[arg(long, value_name = "FILE")]
    pub dump_blocks: Option<PathBuf>,
    /// Tell perf what translations are, in jit-PID.dump: perf record -k mono, then perf inject --jit
    #[arg(long)]
    pub jitdump: bool,
}

/// Mechanisms of the translator that are left out.
#[derive(ClapArgs, Debug, Clone, Default)]
#[group(id = "without")]
pub struct JitOffArgs {
    /// Do without a mechanism of the translator, to see whether it is wrong or what it gains; comma-separated
    #[arg(long, value_enum, value_name = "FLAG", value_delimiter = ',')]
    jit_off: Vec<JitOff>,
}

impl JitOffArgs {
    /// The translator's options.
    pub fn options(&self) -> JitOptions {
        let off = self.jit_off.iter().fold(Mechanisms::NONE, |off, flag| off.with(flag.mechanism()));
        JitOptions { off, ..JitOptions::DEFAULT }
    }
}

impl JitArgs {
    /// The translator's options.
    pub fn options(&self) -> JitOptions {
        JitOptions { limit: self.jit_limit.unwrap_or(u64::MAX), ..self.without.options() }
    }

    /// The first of these options that was given.
    pub fn given(&self) -> Option<&'static str> {
        let limit = self.jit_limit.map(|_| "--jit-limit");
        let off = self.without.jit_off.first().map(|_| "--jit-off");
        let lockstep = self.lockstep.map(|_| "--lockstep");
        let dump = self.dump_blocks.as_ref().map(|_| "--dump-blocks");
        limit.or(off).or(lockstep).or(dump).or(self.jitdump.then_some("--jitdump"))
    }
}

/// `--jit-off`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum JitOff {
    /// Host code for operations: each is a call
    Native,
    /// Host code for SSE and AVX
    Vectors,
    /// Host code for x87
    X87,
    /// Host code for MOVS and STOS with REP
    Strings,
    /// Changes of CPL, RFLAGS.AC and CR0.WP in generated code
    Views,
    /// Memory operands looked up in generated code
    Memory,
    /// Range registers: each access looks into the MMU's table
    Ranges,
    /// Having the host's MMU translate for programs that run for long
    Windows,
    /// Checking neighbouring accesses together
    Groups,
    /// Saving status flags only where something looks at them
    Flags,
    /// Translating blocks together
    Traces,
    /// One charge for all of a trace
    Budgets,
    /// Jumps from block to block
    Links,
    /// Finding blocks by address in generated code
    Jumps,
    /// CALL and RET by the host's own
    Returns,
}

impl JitOff {
    fn mechanism(self) -> Mechanism {
        match self {
            Self::Native => Mechanism::Native,
            Self::Vectors => Mechanism::Vectors,
            Self::X87 => Mechanism::X87,
            Self::Strings => Mechanism::Strings,
            Self::Views => Mechanism::Views,
            Self::Memory => Mechanism::Memory,
            Self::Ranges => Mechanism::Ranges,
            Self::Windows => Mechanism::Windows,
            Self::Groups => Mechanism::Groups,
            Self::Flags => Mechanism::Flags,
            Self::Traces => Mechanism::Traces,
            Self::Budgets => Mechanism::Budgets,
            Self::Links => Mechanism::Links,
            Self::Jumps => Mechanism::Jumps,
            Self::Returns => Mechanism::Returns,
        }
    }
}

/// How the MMU works; no result changes.
#[derive(ClapArgs, Debug, Clone, Copy)]
#[group(id = "caches")]
pub struct MmuArgs {
    /// What the MMU's caches do when control registers change; results are always the same
    #[arg(long, value_enum, value_name = "MODE", default_value_t = MmuChoice::NoUnload)]
    pub mmu: MmuChoice,
    /// What the MMU's tables are keyed by; results are always the same
    #[arg(long, value_enum, value_name = "KEYS", default_value_t = RoleChoice::Raw)]
    pub mmu_role: RoleChoice,
}

impl MmuArgs {
    /// The options of an engine that draws at random from `seed`.
    pub fn options(self, seed: u64) -> EngineOptions {
        let mode = match self.mmu {
            MmuChoice::NoUnload => MmuMode::NoUnload,
            MmuChoice::UnloadAlways => MmuMode::UnloadAlways,
            MmuChoice::DropAtRandom => MmuMode::DropAtRandom(seed),
        };
        EngineOptions { mmu: MmuOptions { mode, kvm_role: self.mmu_role == RoleChoice::Kvm, ..MmuOptions::default() } }
    }
}

/// `--mmu`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum MmuChoice {
    /// Keep every root and shadow page
    NoUnload,
    /// Drop all roots at each change, as KVM does
    UnloadAlways,
    /// Drop caches at random moments, drawn from --seed
    DropAtRandom,
}

/// `--mmu-role`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum RoleChoice {
    /// What their entries depend on; WP, SMEP and SMAP are looked at when rights are judged
    Raw,
    /// WP, SMEP and SMAP too, as in KVM
    Kvm,
}

/// `--accel` and what belongs to it.
#[derive(ClapArgs, Debug, Clone)]
#[group(id = "acceleration")]
pub struct AccelArgs {
    /// What executes the guest
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = Accel::Soft)]
    pub accel: Accel,
    /// Whose local APIC the guest has under KVM
    #[arg(long, value_enum, value_name = "WHOSE", default_value_t = IrqchipChoice::Auto)]
    pub irqchip: IrqchipChoice,
    /// Go on in Umbra's own engine from here: refusal (an instruction that KVM can't execute), serial:TEXT (on the
    /// guest's serial port), insns:N (single-stepped, slow) or a linear address; may be given several times
    #[arg(long, value_name = "WHERE", value_parser = HandOverAt::parse)]
    pub handover_at: Vec<HandOverAt>,
}

/// `--accel`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Accel {
    /// Umbra's own engine: repeatable, needs nothing
    Soft,
    /// KVM, whatever executes the guest behind it
    Kvm,
    /// KVM where the processor's virtualization is behind it, else soft
    Auto,
}

/// `--irqchip`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum IrqchipChoice {
    /// split where KVM offers it and has it right, else user
    Auto,
    /// KVM's own, with x2APIC and TSC deadline; I/O APIC and 8259s stay Umbra's
    Split,
    /// Umbra's
    User,
}

/// `--handover-at`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum HandOverAt {
    Refusal,
    Serial(String),
    Instructions(u64),
    Address(u64),
}

impl HandOverAt {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "refusal" {
            return Ok(Self::Refusal);
        }
        match text.split_once(':') {
            Some(("serial", "")) => Err("serial: needs the text to wait for".into()),
            Some(("serial", wanted)) => Ok(Self::Serial(wanted.into())),
            Some(("insns", count)) => {
                count.parse().map(Self::Instructions).map_err(|_| format!("{count:?} is not a number of instructions"))
            }
            _ => parse_address(text)
                .map(Self::Address)
                .map_err(|_| format!("{text:?} is not refusal, serial:TEXT, insns:N or an address like 0x7c00")),
        }
    }
}

impl AccelArgs {
    /// The text on the serial port at which to hand over.
    pub fn serial_text(&self) -> Option<&str> {
        self.handover_at.iter().find_map(|at| match at {
            HandOverAt::Serial(text) => Some(text.as_str()),
            _ => None,
        })
    }
}

/// `--trace` and what belongs to it.
#[derive(ClapArgs, Debug, Clone)]
#[group(id = "tracing")]
pub struct TraceArgs {
    /// Trace to stderr, comma-separated; insn is slow, and none of them changes a result
    #[arg(long, value_enum, value_name = "WHAT", value_delimiter = ',')]
    pub trace: Vec<TraceChoice>,
    /// Trace only instructions and exceptions at these linear addresses, for example 0x1000..0x2000
    #[arg(long, value_name = "START..END", value_parser = parse_range)]
    pub trace_range: Option<std::ops::Range<u64>>,
    /// Write the trace to a file instead
    #[arg(long, value_name = "FILE")]
    pub trace_file: Option<PathBuf>,
    /// One JSON object a line; the MMU's events with their fields
    #[arg(long)]
    pub trace_json: bool,
}

/// `--trace`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum TraceChoice {
    /// Every instruction, disassembled; says why one is undefined
    Insn,
    /// Exceptions and interrupts as they are delivered
    Exc,
    /// Port and device-memory accesses
    Io,
    /// Commits of control registers, role changes, roots found and made, walks, flushes, table edits
    Mmu,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mechanism_can_be_left_out() {
        let offered: Vec<_> = JitOff::value_variants().iter().map(|flag| flag.mechanism()).collect();
        assert_eq!(offered, Mechanism::ALL);
    }

    #[test]
    fn places_of_a_hand_over() {
        for (text, at) in [
            ("refusal", HandOverAt::Refusal),
            ("serial:a:b", HandOverAt::Serial("a:b".into())),
            ("insns:12", HandOverAt::Instructions(12)),
            ("0x7c00", HandOverAt::Address(0x7c00)),
        ] {
            assert_eq!(HandOverAt::parse(text), Ok(at));
        }
        for wrong in ["serial:", "insns:x", "later", ""] {
            assert!(HandOverAt::parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
