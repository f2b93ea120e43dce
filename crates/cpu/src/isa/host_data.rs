//! Rows that the host executes: MMX, SSE, AVX and x87 data instructions.
//!
//! The memory operand is loaded through the MMU into a buffer, the instruction runs in
//! [`HostExec`](umbra_hostexec::HostExec), and a stored operand goes out last. What must hold before, such as
//! CR0.TS, is a [`Unit`].

use crate::core::Core;
use crate::decode::Form;
use crate::flags::Flags;
use crate::op::{ExecFn, FOP_AT, Flow, Op};
use iced_x86::{CpuidFeature, Encoder, OpKind};
use umbra_arch::control::{Cr0, Cr4};
use umbra_arch::cpuid::{CpuidProfile, Feature};
use umbra_arch::fpu::xcr0;
use umbra_arch::paging::AccessKind;
use umbra_arch::{Bus, Fault, Gva};
use umbra_hostexec::{Class, HostOp, MemBuf, Outcome, Prepared};

/// One row per mnemonic, executed by the host.
macro_rules! host_rows {
    ($($mnemonic:ident)*) => { &[$(Row::new(M::$mnemonic, stringify!($mnemonic), select)),*] };
}
pub(super) use host_rows;

/// [`Op::aux`] above the [`HostOp`]: status flags go in and out.
const USES_FLAGS: u64 = 1 << 40;
/// The destination's writability is checked before anything changes.
const PROBES: u64 = 1 << 41;
/// Alignment of the memory operand as a shift count, 3 bits.
const ALIGN_AT: u32 = 42;
const _: () = assert!(HostOp::BITS <= 40);

/// Selects the function of a row that the host executes.
pub fn select(form: &mut Form) -> Option<ExecFn> {
    if form.i.has_lock_prefix() || !is_offered(form.i.code().cpuid_features(), form.profile) {
        return None;
    }
    let prepared = form.host.prepare(form.i).ok()?;
    form.aux = pack(&prepared, form);
    let with_xmm =
        (0..form.i.op_count()).any(|k| form.i.op_kind(k) == OpKind::Register && form.i.op_register(k).is_xmm());
    match prepared.class {
        Class::Sse if prepared.enters_mmx => shape::<MmxXmm>(&prepared),
        Class::Sse => shape::<Sse>(&prepared),
        Class::Avx => shape::<Avx>(&prepared),
        Class::Mmx if with_xmm => shape::<MmxXmm>(&prepared),
        Class::Mmx => shape::<Mmx>(&prepared),
        Class::X87 => shape::<X87>(&prepared),
        Class::Integer => None,
    }
}

fn pack(p: &Prepared, form: &Form) -> u64 {
    let flags = if p.flags_read || p.flags_written != 0 { USES_FLAGS } else { 0 };
    let probes = if p.mxcsr || p.enters_mmx || p.class == Class::X87 { PROBES } else { 0 };
    let fop = if p.class == Class::X87 { x87_opcode(form) } else { 0 };
    let align = u64::from(p.mem_align.trailing_zeros());
    p.op.to_bits() | flags | probes | align << ALIGN_AT | fop << FOP_AT
}

/// "Fopcode": low bits of the first opcode byte, then ModRM.
fn x87_opcode(form: &Form) -> u64 {
    let mut encoder = Encoder::new(form.size as u32);
    if encoder.encode(form.i, form.i.ip()).is_err() {
        return 0;
    }
    let bytes = encoder.take_buffer();
    let at = bytes.iter().position(|b| (0xd8..=0xdf).contains(b)).unwrap_or(0);
    let byte = |n: usize| u64::from(bytes.get(n).copied().unwrap_or(0));
    (byte(at) & 7) << 8 | byte(at + 1)
}

/// Whether the guest's CPU has the instruction sets.
pub fn is_offered(sets: &[CpuidFeature], profile: &CpuidProfile) -> bool {
    sets.iter().all(|set| {
        let feature = match set {
            CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 => Feature::Fpu,
            CpuidFeature::CMOV => Feature::Cmov,
            CpuidFeature::MMX => Feature::Mmx,
            CpuidFeature::SSE => Feature::Sse,
            CpuidFeature::SSE2 => Feature::Sse2,
            CpuidFeature::SSE3 => Feature::Sse3,
            CpuidFeature::SSSE3 => Feature::Ssse3,
            CpuidFeature::SSE4_1 => Feature::Sse41,
            CpuidFeature::SSE4_2 => Feature::Sse42,
            CpuidFeature::AES => Feature::Aes,
            CpuidFeature::PCLMULQDQ => Feature::Pclmulqdq,
            CpuidFeature::SHA => Feature::Sha,
            CpuidFeature::GFNI => Feature::Gfni,
            CpuidFeature::AVX => Feature::Avx,
            CpuidFeature::AVX2 => Feature::Avx2,
            CpuidFeature::FMA => Feature::Fma,
            CpuidFeature::F16C => Feature::F16c,
            CpuidFeature::VAES => Feature::Vaes,
            CpuidFeature::VPCLMULQDQ => Feature::Vpclmulqdq,
            _ => return false,
        };
        profile.has(feature)
    })
}

/// What must hold before an instruction of a kind.
pub trait Unit: 'static {
    /// x87: last instruction and data pointers are kept.
    const X87: bool = false;
    /// #UD, #NM or #MF in the manual's order.
    fn ready(c: &mut Core) -> Flow;
}

/// Legacy SSE.
pub struct Sse;
/// VEX-encoded.
pub struct Avx;
/// MMX registers only.
pub struct Mmx;
/// MMX and XMM registers.
pub struct MmxXmm;
/// x87.
pub struct X87;

impl Unit for Sse {
    #[inline(always)]
    fn ready(c: &mut Core) -> Flow {
        if c.s.cr0.raw() & (Cr0::EM | Cr0::TS) != 0 || c.s.cr4.raw() & Cr4::OSFXSR == 0 {
            return sse_unready(c);
        }
        Ok(())
    }
}

#[cold]
fn sse_unready(c: &mut Core) -> Flow {
    let undefined = c.s.cr0.raw() & Cr0::EM != 0 || c.s.cr4.raw() & Cr4::OSFXSR == 0;
    c.raise(if undefined { Fault::UNDEFINED } else { Fault::DEVICE_NOT_AVAILABLE })
}

impl Unit for Avx {
    #[inline(always)]
    fn ready(c: &mut Core) -> Flow {
        const COMPONENTS: u64 = xcr0::SSE | xcr0::AVX;
        let protected = c.s.cr0.raw() & Cr0::PE != 0 && !c.s.is_v86();
        if !protected || c.s.cr4.raw() & Cr4::OSXSAVE == 0 || c.s.xcr0 & COMPONENTS != COMPONENTS {
            return c.raise(Fault::UNDEFINED);
        }
        if c.s.cr0.raw() & Cr0::TS != 0 {
            return c.raise(Fault::DEVICE_NOT_AVAILABLE);
        }
        Ok(())
    }
}

impl Unit for Mmx {
    #[inline(always)]
    fn ready(c: &mut Core) -> Flow {
        if c.s.cr0.raw() & Cr0::EM != 0 {
            return c.raise(Fault::UNDEFINED);
        }
        if c.s.cr0.raw() & Cr0::TS != 0 {
            return c.raise(Fault::DEVICE_NOT_AVAILABLE);
        }
        c.check_x87_pending()
    }
}

impl Unit for MmxXmm {
    #[inline(always)]
    fn ready(c: &mut Core) -> Flow {
        Sse::ready(c)?;
        c.check_x87_pending()
    }
}

impl Unit for X87 {
    const X87: bool = true;
    #[inline(always)]
    fn ready(c: &mut Core) -> Flow {
        c.check_x87_available()?;
        c.check_x87_pending()
    }
}

impl Core {
    /// #NM if x87 instructions are emulated or another task's.
    #[inline(always)]
    pub fn check_x87_available(&mut self) -> Flow {
        if self.s.cr0.raw() & (Cr0::EM | Cr0::TS) != 0 {
            return self.raise(Fault::DEVICE_NOT_AVAILABLE);
        }
        Ok(())
    }

    /// #MF if an unmasked x87 exception is pending. With CR0.NE clear it would be an external interrupt; it is
    /// ignored instead, as with IGNNE# asserted.
    #[inline(always)]
    pub fn check_x87_pending(&mut self) -> Flow {
        if self.s.fp.fsw & 0x80 != 0 && self.s.cr0.raw() & Cr0::NE != 0 {
            return self.raise(Fault::X87);
        }
        Ok(())
    }
}

fn shape<U: Unit>(p: &Prepared) -> Option<ExecFn> {
    match (p.mem_read, p.mem_write) {
        (0, 0) => Some(registers::<U>),
        (1, 0) => Some(load::<U, 1>),
        (2, 0) => Some(load::<U, 2>),
        (4, 0) => Some(load::<U, 4>),
        (8, 0) => Some(load::<U, 8>),
        (10, 0) => Some(load::<U, 10>),
        (16, 0) => Some(load::<U, 16>),
        (32, 0) => Some(load::<U, 32>),
        (0, 1) => Some(store::<U, 1>),
        (0, 2) => Some(store::<U, 2>),
        (0, 4) => Some(store::<U, 4>),
        (0, 8) => Some(store::<U, 8>),
        (0, 10) => Some(store::<U, 10>),
        (0, 16) => Some(store::<U, 16>),
        (0, 32) => Some(store::<U, 32>),
        _ => None,
    }
}

fn registers<U: Unit>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    U::ready(c)?;
    let mut mem = MemBuf::default();
    execute::<U>(c, op, &mut mem)?;
    Ok(())
}

fn load<U: Unit, const N: usize>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    U::ready(c)?;
    let mut mem = MemBuf::default();
    let lin = c.linear(op, N as u64, AccessKind::Read)?;
    check_alignment(c, op, lin)?;
    match c.mmu.lookup_read(Gva::new(lin), N as u64) {
        Some(off) => c.mem.load_bytes(off, &mut mem.0[..N]),
        None => c.read_bytes(bus, op, lin, &mut mem.0[..N])?,
    }
    execute::<U>(c, op, &mut mem)?;
    if U::X87 {
        c.s.fp.fdp = c.effective(op);
    }
    Ok(())
}

fn store<U: Unit, const N: usize>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    U::ready(c)?;
    let mut mem = MemBuf::default();
    let lin = c.linear(op, N as u64, AccessKind::Write)?;
    check_alignment(c, op, lin)?;
    if op.aux & PROBES != 0 {
        c.probe_write(op, lin, N as u64)?;
    }
    let complete = execute::<U>(c, op, &mut mem)?;
    if U::X87 {
        c.s.fp.fdp = c.effective(op);
    }
    if !complete {
        return Ok(());
    }
    match c.mmu.lookup_write(Gva::new(lin), N as u64) {
        Some(off) => {
            c.mem.store_bytes(off, &mem.0[..N]);
            Ok(())
        }
        None => c.write_bytes(bus, op, lin, &mem.0[..N]),
    }
}

/// #GP(0) for a misaligned operand of an instruction that requires alignment.
#[inline(always)]
fn check_alignment(c: &mut Core, op: &Op, lin: u64) -> Flow {
    let mask = (1u64 << (op.aux >> ALIGN_AT & 7)) - 1;
    if lin & mask != 0 {
        return c.raise(Fault::GP0);
    }
    Ok(())
}

/// Runs the stub; whether a memory operand is to be stored.
#[inline(always)]
fn execute<U: Unit>(c: &mut Core, op: &Op, mem: &mut MemBuf) -> Result<bool, crate::op::Stop> {
    let uses_flags = op.aux & USES_FLAGS != 0;
    let mut flags = if uses_flags { c.rflags() } else { 0 };
    let Some(gpr) = c.gpr.first_chunk_mut::<16>() else { return c.raise(Fault::UNDEFINED) };
    let outcome = c.host.run(HostOp::from_bits(op.aux), &mut c.s.fp, gpr, &mut flags, mem);
    if uses_flags {
        c.flags = Flags::from_rflags(flags);
    }
    if U::X87 {
        c.s.fp.fip = c.block_rip.wrapping_add(u64::from(op.start));
        c.s.fp.fop = op.x87_opcode();
    }
    match outcome {
        Outcome::Done => Ok(true),
        Outcome::Suppressed => Ok(false),
        Outcome::DivideError => c.raise(Fault::DIVIDE),
        Outcome::SimdException if c.s.cr4.raw() & Cr4::OSXMMEXCPT != 0 => c.raise(Fault::SIMD),
        Outcome::SimdException => c.raise(Fault::UNDEFINED),
    }
}
