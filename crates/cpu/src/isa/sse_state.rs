//! MXCSR, FXSAVE and FXRSTOR, VZEROUPPER and VZEROALL.

use super::Row;
use super::host_data::{Avx, Sse, Unit};
use super::x87_env::refresh_summary;
use crate::core::{CodeSize, Core};
use crate::op::{Flow, Op};
use iced_x86::Mnemonic as M;
use umbra_arch::cpuid::Feature;
use umbra_arch::fpu::{FpState, MXCSR_MASK};
use umbra_arch::paging::AccessKind;
use umbra_arch::{Bus, Fault};

const FXSAVE: &str = "FXSAVE-Save x87 FPU, MMX Technology, and SSE State";
const FXRSTOR: &str = "FXRSTOR-Restore x87 FPU, MMX, XMM, and MXCSR State";

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Ldmxcsr, "LDMXCSR-Load MXCSR Register", |_| Some(ldmxcsr::<Sse>)).needs(Feature::Sse),
    Row::new(M::Stmxcsr, "STMXCSR-Store MXCSR Register State", |_| Some(stmxcsr::<Sse>)).needs(Feature::Sse),
    Row::new(M::Vldmxcsr, "LDMXCSR-Load MXCSR Register", |_| Some(ldmxcsr::<Avx>)).needs(Feature::Avx),
    Row::new(M::Vstmxcsr, "STMXCSR-Store MXCSR Register State", |_| Some(stmxcsr::<Avx>)).needs(Feature::Avx),
    Row::new(M::Fxsave, FXSAVE, |_| Some(fxsave::<false>)).needs(Feature::Fxsr),
    Row::new(M::Fxsave64, FXSAVE, |_| Some(fxsave::<true>)).needs(Feature::Fxsr),
    Row::new(M::Fxrstor, FXRSTOR, |_| Some(fxrstor::<false>)).needs(Feature::Fxsr),
    Row::new(M::Fxrstor64, FXRSTOR, |_| Some(fxrstor::<true>)).needs(Feature::Fxsr),
    Row::new(M::Vzeroupper, "VZEROUPPER-Zero Upper Bits of YMM and ZMM Registers", |_| Some(vzeroupper))
        .needs(Feature::Avx),
    Row::new(M::Vzeroall, "VZEROALL-Zero XMM, YMM, and ZMM Registers", |_| Some(vzeroall)).needs(Feature::Avx),
];

fn ldmxcsr<U: Unit>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    U::ready(c)?;
    let value = c.load_operand::<u32>(bus, op)? as u32;
    if value & !MXCSR_MASK != 0 {
        return c.raise(Fault::GP0);
    }
    c.s.fp.mxcsr = value;
    Ok(())
}

fn stmxcsr<U: Unit>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    U::ready(c)?;
    c.store_operand::<u32>(bus, op, u64::from(c.s.fp.mxcsr))
}

fn vzeroupper(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    Avx::ready(c)?;
    let n = c.vector_registers();
    c.s.fp.ymm_high[..n].fill([0; 2]);
    Ok(())
}

fn vzeroall(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    vzeroupper(c, bus, op)?;
    let n = c.vector_registers();
    c.s.fp.xmm[..n].fill([0; 2]);
    Ok(())
}

impl Core {
    /// XMM registers that exist in the running mode.
    pub(super) fn vector_registers(&self) -> usize {
        if self.code_size == CodeSize::Bits64 { 16 } else { 8 }
    }
}

/// Bytes of the legacy region before what is reserved or software's.
pub(super) const LEGACY: usize = 416;
/// Where its parts are.
const POINTERS: usize = 8;
const MXCSR_AT: usize = 24;
const ST_AT: usize = 32;
pub(super) const XMM_AT: usize = 160;

/// Bytes 0..24 and 32..160: x87. `wide`: pointers of 64 bits (REX.W).
pub(super) fn put_x87(fp: &FpState, image: &mut [u8; LEGACY], wide: bool) {
    image[0..2].copy_from_slice(&fp.fcw.to_le_bytes());
    image[2..4].copy_from_slice(&fp.fsw.to_le_bytes());
    image[4..6].copy_from_slice(&[fp.ftw, 0]);
    image[6..8].copy_from_slice(&fp.fop.to_le_bytes());
    // Selectors, which fill the upper halves of the narrow form, read as 0.
    let mask = if wide { u64::MAX } else { 0xffff_ffff };
    image[POINTERS..POINTERS + 8].copy_from_slice(&(fp.fip & mask).to_le_bytes());
    image[POINTERS + 8..POINTERS + 16].copy_from_slice(&(fp.fdp & mask).to_le_bytes());
    for (slot, st) in image[ST_AT..XMM_AT].chunks_exact_mut(16).zip(&fp.st) {
        slot[..8].copy_from_slice(&st[0].to_le_bytes());
        slot[8..].copy_from_slice(&(st[1] & 0xffff).to_le_bytes());
    }
}

pub(super) fn get_x87(fp: &mut FpState, image: &[u8; LEGACY], wide: bool) {
    fp.fcw = word(image, 0) & 0x1f3f | 0x40;
    fp.fsw = word(image, 2);
    fp.ftw = image[4];
    fp.fop = word(image, 6) & 0x7ff;
    let mask = if wide { u64::MAX } else { 0xffff_ffff };
    fp.fip = quad(image, POINTERS) & mask;
    fp.fdp = quad(image, POINTERS + 8) & mask;
    for (i, st) in fp.st.iter_mut().enumerate() {
        *st = [quad(image, ST_AT + 16 * i), quad(image, ST_AT + 16 * i + 8) & 0xffff];
    }
    refresh_summary(fp);
}

pub(super) fn put_mxcsr(fp: &FpState, image: &mut [u8; LEGACY]) {
    image[MXCSR_AT..MXCSR_AT + 4].copy_from_slice(&fp.mxcsr.to_le_bytes());
    image[MXCSR_AT + 4..MXCSR_AT + 8].copy_from_slice(&MXCSR_MASK.to_le_bytes());
}

/// `None`: reserved bits are set, #GP(0).
pub(super) fn get_mxcsr(image: &[u8; LEGACY]) -> Option<u32> {
    let value = quad(image, MXCSR_AT) as u32;
    (value & !MXCSR_MASK == 0).then_some(value)
}

pub(super) fn put_vectors(vectors: &[[u64; 2]], image: &mut [u8]) {
    for (slot, v) in image.chunks_exact_mut(16).zip(vectors) {
        slot[..8].copy_from_slice(&v[0].to_le_bytes());
        slot[8..].copy_from_slice(&v[1].to_le_bytes());
    }
}

pub(super) fn get_vectors(vectors: &mut [[u64; 2]], image: &[u8]) {
    for (slot, v) in image.chunks_exact(16).zip(vectors) {
        *v = [quad(slot, 0), quad(slot, 8)];
    }
}

fn word(image: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([image[at], image[at + 1]])
}

pub(super) fn quad(image: &[u8], at: usize) -> u64 {
    image[at..].first_chunk().map_or(0, |raw| u64::from_le_bytes(*raw))
}

/// Linear address of a save area of `size` bytes, aligned to `align` or #GP(0).
pub(super) fn save_area(
    c: &mut Core,
    op: &Op,
    size: u64,
    align: u64,
    kind: AccessKind,
) -> Result<u64, crate::op::Stop> {
    let lin = c.linear(op, size, kind)?;
    if lin & (align - 1) != 0 {
        return c.raise(Fault::GP0);
    }
    Ok(lin)
}

fn fxsave<const WIDE: bool>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    c.check_x87_available()?;
    let lin = save_area(c, op, 512, 16, AccessKind::Write)?;
    let mut image = [0; LEGACY];
    let n = c.vector_registers();
    put_x87(&c.s.fp, &mut image, WIDE);
    put_mxcsr(&c.s.fp, &mut image);
    put_vectors(&c.s.fp.xmm[..n], &mut image[XMM_AT..]);
    c.write_bytes(bus, op, lin, &image[..XMM_AT + 16 * n])
}

fn fxrstor<const WIDE: bool>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    c.check_x87_available()?;
    let lin = save_area(c, op, 512, 16, AccessKind::Read)?;
    let mut image = [0; LEGACY];
    c.read_bytes(bus, op, lin, &mut image)?;
    let Some(mxcsr) = get_mxcsr(&image) else { return c.raise(Fault::GP0) };
    let n = c.vector_registers();
    get_x87(&mut c.s.fp, &image, WIDE);
    c.s.fp.mxcsr = mxcsr;
    get_vectors(&mut c.s.fp.xmm[..n], &image[XMM_AT..]);
    Ok(())
}
