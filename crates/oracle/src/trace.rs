//! The generator `trace`: instructions that a booting kernel executes, with the registers and the memory operand they
//! had there, moved into a window where the host can run them.

use crate::case::Case;
use crate::random::Random;
use crate::rows;
use std::sync::Arc;
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::fpu::FpState;
use umbra_arch::paging::{Access, AccessKind};
use umbra_arch::{CpuState, Gva, VirtualTime};
use umbra_cpu::{EngineError, EngineOptions, Interpreter};
use umbra_hostexec::native::Mode;
use umbra_machine::boot::{self, BootError, BootRequest};
use umbra_machine::{End, Host, Machine, MachineConfig, MachineError, guest_memory};

/// Guest RAM in bytes.
const MEMORY: u64 = 512 << 20;
/// Instructions that are kept.
const SAMPLES: usize = 20_000;
/// Most ticks between two of them.
const GAP: u64 = 40_000;

/// A kernel that can't be traced.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The image.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Nothing to compare was seen.
    #[error("the kernel ended ({0}) before anything could be sampled")]
    Nothing(String),
}

/// What is booted.
#[derive(Clone, Debug, Default)]
pub struct Kernel {
    /// The kernel file.
    pub image: Vec<u8>,
    /// The initial RAM disk.
    pub initrd: Option<Vec<u8>>,
    /// The command line.
    pub command_line: String,
}

/// One executed instruction.
pub struct Sample {
    pub(crate) mode: Mode,
    pub(crate) bytes: Vec<u8>,
    pub(crate) gpr: [u64; 16],
    pub(crate) rflags: u64,
    pub(crate) fp: FpState,
    /// What its memory operand held.
    pub(crate) data: Option<[u8; 64]>,
}

/// A host that the guest doesn't notice.
struct Deaf;

impl Host for Deaf {
    fn serial(&mut self, _: &[u8]) {}
}

/// Samples the boot of a kernel; the seed decides when.
///
/// # Errors
/// [`TraceError`].
pub fn samples(kernel: &Kernel, seed: u64) -> Result<Vec<Sample>, TraceError> {
    let mut machine = booted(kernel)?;
    let mut r = Random::new(seed);
    let (mut all, mut now) = (Vec::new(), 0);
    while all.len() < SAMPLES {
        now += 1 + r.below(GAP);
        match machine.run(&mut Deaf, Some(VirtualTime(now))) {
            End::Limit | End::Mark(_) => {}
            end if all.is_empty() => return Err(TraceError::Nothing(format!("{end:?}"))),
            _ => break,
        }
        all.extend(machine.vcpu(0).and_then(sample));
    }
    Ok(all)
}

fn booted(kernel: &Kernel) -> Result<Machine<Interpreter>, TraceError> {
    let profile = CpuidProfile::default();
    let memory = guest_memory(MEMORY)?;
    let engine = Interpreter::new(Arc::clone(&memory), &profile, 0, &EngineOptions::default())?;
    let mut machine = Machine::new(memory, &MachineConfig { profile, rtc_start: 0 }, vec![engine])?;
    let map = machine.map().clone();
    let request = BootRequest {
        kernel: &kernel.image,
        initrd: kernel.initrd.as_deref(),
        command_line: &kernel.command_line,
        map: &map,
        rsdp: machine.rsdp(),
    };
    machine.boot(&boot::plan(&request)?);
    Ok(machine)
}

/// The instruction that comes next.
fn sample(engine: &Interpreter) -> Option<Sample> {
    let s = umbra_arch::Vcpu::state(engine);
    let cs = &s.seg[1];
    let (mode, base) = if s.is_64bit_code() {
        (Mode::Bits64, 0)
    } else if s.cr0.pe() && cs.attr.is_big() {
        (Mode::Bits32, cs.base)
    } else {
        (Mode::Bits16, cs.base)
    };
    let mut bytes = read::<15>(engine, &s, base.wrapping_add(s.rip), AccessKind::Fetch)?.to_vec();
    let i = rows::decoded(mode, &bytes);
    bytes.truncate(i.len());
    let flat = |r: iced_x86::Register, _: usize, _: usize| {
        Some(if r.is_gpr() { s.gpr[r.full_register().number() & 15] & u64::MAX >> (64 - 8 * r.size()) } else { 0 })
    };
    let operand = (0..i.op_count()).find(|&k| i.op_kind(k) == iced_x86::OpKind::Memory);
    let data = operand.and_then(|k| read::<64>(engine, &s, i.virtual_address(k, 0, flat)?, AccessKind::Read));
    Some(Sample { mode, bytes, gpr: s.gpr, rflags: s.rflags, fp: s.fp, data })
}

/// Bytes at a linear address, if they are in one page of RAM.
fn read<const N: usize>(engine: &Interpreter, s: &CpuState, at: u64, kind: AccessKind) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let core = engine.core();
    let start = core.mmu.peek(Gva::new(at), Access::explicit(kind, s.cpl)).ok()?;
    (start.gpa.offset() as usize + N <= 4096).then(|| core.mem.read(start.gpa, &mut bytes))?;
    Some(bytes)
}

/// A case of a sample; `None` where it isn't one that the host can run.
pub fn case(sample: &Sample, r: &mut Random) -> Option<Case> {
    rows::moved(sample, r)
}
