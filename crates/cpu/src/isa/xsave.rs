//! XSAVE's family, XGETBV and XSETBV ("Managing State Using the XSAVE Feature Set").
//!
//! A component is in use unless it is exactly in its initial configuration. Nothing is remembered of earlier
//! XRSTORs, so XSAVEOPT and XSAVES only apply the init optimisation, never the modified one.

use super::Row;
use super::sse_state::{
    LEGACY, XMM_AT, get_mxcsr, get_vectors, get_x87, put_mxcsr, put_vectors, put_x87, quad, save_area,
};
use crate::core::Core;
use crate::op::{Flow, Op, Stop};
use iced_x86::Mnemonic as M;
use umbra_arch::control::{Cr0, Cr4};
use umbra_arch::cpuid::{Feature, xsave};
use umbra_arch::fpu::{FpState, MXCSR_RESET, xcr0};
use umbra_arch::paging::AccessKind;
use umbra_arch::state::reg;
use umbra_arch::{Bus, Fault};

const XSAVE: &str = "XSAVE-Save Processor Extended States";
const XSAVEOPT: &str = "XSAVEOPT-Save Processor Extended States Optimized";
const XSAVEC: &str = "XSAVEC-Save Processor Extended States With Compaction";
const XSAVES: &str = "XSAVES-Save Processor Extended States Supervisor";
const XRSTOR: &str = "XRSTOR-Restore Processor Extended States";
const XRSTORS: &str = "XRSTORS-Restore Processor Extended States Supervisor";

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Xsave, XSAVE, |_| Some(save::<PLAIN, false>)).needs(Feature::Xsave),
    Row::new(M::Xsave64, XSAVE, |_| Some(save::<PLAIN, true>)).needs(Feature::Xsave),
    Row::new(M::Xsaveopt, XSAVEOPT, |_| Some(save::<OPTIMIZED, false>)).needs(Feature::Xsaveopt),
    Row::new(M::Xsaveopt64, XSAVEOPT, |_| Some(save::<OPTIMIZED, true>)).needs(Feature::Xsaveopt),
    Row::new(M::Xsavec, XSAVEC, |_| Some(save::<COMPACT, false>)).needs(Feature::Xsavec),
    Row::new(M::Xsavec64, XSAVEC, |_| Some(save::<COMPACT, true>)).needs(Feature::Xsavec),
    Row::new(M::Xsaves, XSAVES, |_| Some(save::<SUPERVISOR, false>)).needs(Feature::Xsaves),
    Row::new(M::Xsaves64, XSAVES, |_| Some(save::<SUPERVISOR, true>)).needs(Feature::Xsaves),
    Row::new(M::Xrstor, XRSTOR, |_| Some(restore::<PLAIN, false>)).needs(Feature::Xsave),
    Row::new(M::Xrstor64, XRSTOR, |_| Some(restore::<PLAIN, true>)).needs(Feature::Xsave),
    Row::new(M::Xrstors, XRSTORS, |_| Some(restore::<SUPERVISOR, false>)).needs(Feature::Xsaves),
    Row::new(M::Xrstors64, XRSTORS, |_| Some(restore::<SUPERVISOR, true>)).needs(Feature::Xsaves),
    Row::new(M::Xgetbv, "XGETBV-Get Value of Extended Control Register", |_| Some(xgetbv)).needs(Feature::Xsave),
    Row::new(M::Xsetbv, "XSETBV-Set Extended Control Register", |_| Some(xsetbv)).needs(Feature::Xsave).ends(),
];

/// Kinds of saving.
const PLAIN: u8 = 0;
const OPTIMIZED: u8 = 1;
const COMPACT: u8 = 2;
const SUPERVISOR: u8 = 3;

const HEADER_AT: usize = 512;
/// XCOMP_BV: the area is compacted.
const COMPACTED: u64 = 1 << 63;
/// No area is longer: standard format with PKRU.
const MAX_AREA: usize = 2696;

fn requested(c: &Core) -> u64 {
    c.gpr[reg::RAX] & 0xffff_ffff | c.gpr[reg::RDX] << 32
}

fn ready(c: &mut Core) -> Flow {
    if c.s.cr4.raw() & Cr4::OSXSAVE == 0 {
        return c.raise(Fault::UNDEFINED);
    }
    Ok(())
}

/// #UD, #NM, and #GP(0) for supervisor forms above ring 0; gives the components that may be managed.
fn manageable<const KIND: u8>(c: &mut Core) -> Result<u64, Stop> {
    ready(c)?;
    if c.s.cr0.raw() & Cr0::TS != 0 {
        return c.raise(Fault::DEVICE_NOT_AVAILABLE);
    }
    if KIND == SUPERVISOR {
        if c.s.cpl != 0 {
            return c.raise(Fault::GP0);
        }
        return Ok(c.s.xcr0 | c.s.msr.xss);
    }
    Ok(c.s.xcr0)
}

/// XINUSE: the components that are not in their initial configuration.
pub fn in_use(c: &Core) -> u64 {
    let fp = &c.s.fp;
    let x87 = (fp.fcw, fp.fsw, fp.ftw, fp.fop, fp.fip, fp.fdp) != (0x37f, 0, 0, 0, 0, 0)
        || fp.st.iter().any(|st| *st != [0; 2]);
    let vectors = |v: &[[u64; 2]]| v.iter().any(|v| *v != [0; 2]);
    let bit = |yes: bool, bit: u64| if yes { bit } else { 0 };
    bit(x87, xcr0::X87)
        | bit(vectors(&fp.xmm), xcr0::SSE)
        | bit(vectors(&fp.ymm_high), xcr0::AVX)
        | bit(c.s.pkru != 0, xcr0::PKRU)
}

fn offset_of(kind_is_compact: bool, xcomp: u64, bit: u32) -> usize {
    if kind_is_compact {
        return xsave::compacted_offset(xcomp, bit) as usize;
    }
    xsave::component(bit).map_or(MAX_AREA, |component| component.offset as usize)
}

fn save<const KIND: u8, const WIDE: bool>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let compact = KIND >= COMPACT;
    let mask = requested(c) & manageable::<KIND>(c)?;
    let size = if compact { xsave::compacted_size(mask) } else { xsave::standard_size(mask) };
    let lin = save_area(c, op, u64::from(size), 64, AccessKind::Write)?;
    c.probe_write(op, lin, u64::from(size))?;
    let mut in_use = in_use(c) & mask;
    if compact && mask & xcr0::SSE != 0 && c.s.fp.mxcsr != MXCSR_RESET {
        in_use |= xcr0::SSE;
    }
    let written = if KIND == PLAIN { mask } else { in_use };
    write_legacy::<WIDE>(c, bus, op, lin, written, compact, mask)?;
    if written & xcr0::AVX != 0 {
        let mut image = [0; 256];
        let n = c.vector_registers();
        put_vectors(&c.s.fp.ymm_high[..n], &mut image);
        let at = offset_of(compact, mask, 2) as u64;
        c.write_bytes(bus, op, lin.wrapping_add(at), &image[..16 * n])?;
    }
    if written & xcr0::PKRU != 0 {
        let at = offset_of(compact, mask, 9) as u64;
        c.write_bytes(bus, op, lin.wrapping_add(at), &u64::from(c.s.pkru).to_le_bytes())?;
    }
    write_header(c, bus, op, lin, mask, in_use, compact)
}

/// Parts of the legacy region, each on its own: what isn't saved isn't written.
fn write_legacy<const WIDE: bool>(
    c: &mut Core,
    bus: &mut dyn Bus,
    op: &Op,
    lin: u64,
    written: u64,
    compact: bool,
    mask: u64,
) -> Flow {
    let mut image = [0; LEGACY];
    if written & xcr0::X87 != 0 {
        put_x87(&c.s.fp, &mut image, WIDE);
        c.write_bytes(bus, op, lin, &image[..24])?;
        c.write_bytes(bus, op, lin.wrapping_add(32), &image[32..XMM_AT])?;
    }
    let mxcsr = if compact { written & xcr0::SSE } else { mask & (xcr0::SSE | xcr0::AVX) };
    if mxcsr != 0 {
        put_mxcsr(&c.s.fp, &mut image);
        c.write_bytes(bus, op, lin.wrapping_add(24), &image[24..32])?;
    }
    if written & xcr0::SSE != 0 {
        let n = c.vector_registers();
        put_vectors(&c.s.fp.xmm[..n], &mut image[XMM_AT..]);
        c.write_bytes(bus, op, lin.wrapping_add(XMM_AT as u64), &image[XMM_AT..XMM_AT + 16 * n])?;
    }
    Ok(())
}

fn write_header(c: &mut Core, bus: &mut dyn Bus, op: &Op, lin: u64, mask: u64, in_use: u64, compact: bool) -> Flow {
    let at = lin.wrapping_add(HEADER_AT as u64);
    if compact {
        let mut header = [0; 16];
        header[..8].copy_from_slice(&in_use.to_le_bytes());
        header[8..].copy_from_slice(&(mask | COMPACTED).to_le_bytes());
        return c.write_bytes(bus, op, at, &header);
    }
    let old = c.read::<u64>(bus, op, at)?;
    c.write::<u64>(bus, op, at, old & !mask | in_use)
}

/// A save area as XRSTOR sees it: header checked, components read.
struct Area {
    xstate: u64,
    xcomp: u64,
    legacy: [u8; LEGACY],
}

fn read_area<const KIND: u8>(c: &mut Core, bus: &mut dyn Bus, op: &Op, lin: u64, allowed: u64) -> Result<Area, Stop> {
    let mut header = [0; 64];
    c.read_bytes(bus, op, lin.wrapping_add(HEADER_AT as u64), &mut header)?;
    let (xstate, xcomp) = (quad(&header, 0), quad(&header, 8));
    let compact = xcomp & COMPACTED != 0;
    let offered = c.profile.has(Feature::Xsavec);
    let legal = if compact {
        let components = xcomp & !COMPACTED;
        offered && components & !allowed == 0 && xstate & !components == 0 && header[16..].iter().all(|b| *b == 0)
    } else {
        KIND == PLAIN && xstate & !allowed == 0 && header[8..24].iter().all(|b| *b == 0)
    };
    if !legal {
        return c.raise(Fault::GP0);
    }
    let mut legacy = [0; LEGACY];
    c.read_bytes(bus, op, lin, &mut legacy)?;
    Ok(Area { xstate, xcomp, legacy })
}

fn restore<const KIND: u8, const WIDE: bool>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let allowed = manageable::<KIND>(c)?;
    let mask = requested(c) & allowed;
    let lin = save_area(c, op, u64::from(xsave::BASE_SIZE), 64, AccessKind::Read)?;
    let area = read_area::<KIND>(c, bus, op, lin, allowed)?;
    let compact = area.xcomp & COMPACTED != 0;
    let loaded = mask & area.xstate;
    // All that can fault comes before the first change.
    let mut high = [0; 256];
    if loaded & xcr0::AVX != 0 {
        let at = offset_of(compact, area.xcomp, 2) as u64;
        c.read_bytes(bus, op, lin.wrapping_add(at), &mut high)?;
    }
    let mut pkru = 0;
    if loaded & xcr0::PKRU != 0 {
        let at = offset_of(compact, area.xcomp, 9) as u64;
        pkru = c.read::<u32>(bus, op, lin.wrapping_add(at))? as u32;
    }
    let mxcsr = if compact { loaded & xcr0::SSE } else { mask & (xcr0::SSE | xcr0::AVX) };
    if mxcsr != 0 {
        let Some(value) = get_mxcsr(&area.legacy) else { return c.raise(Fault::GP0) };
        c.s.fp.mxcsr = value;
    } else if mask & xcr0::SSE != 0 {
        c.s.fp.mxcsr = MXCSR_RESET;
    }
    let n = c.vector_registers();
    restore_registers::<WIDE>(&mut c.s.fp, &area, &high, mask, n);
    if mask & xcr0::PKRU != 0 {
        c.s.pkru = pkru;
        c.mmu.set_pkru(pkru);
        c.break_block = true;
    }
    Ok(())
}

fn restore_registers<const WIDE: bool>(fp: &mut FpState, area: &Area, high: &[u8], mask: u64, n: usize) {
    let loaded = mask & area.xstate;
    if loaded & xcr0::X87 != 0 {
        get_x87(fp, &area.legacy, WIDE);
    } else if mask & xcr0::X87 != 0 {
        (fp.fcw, fp.fsw, fp.ftw, fp.fop, fp.fip, fp.fdp) = (0x37f, 0, 0, 0, 0, 0);
        fp.st = [[0; 2]; 8];
    }
    if loaded & xcr0::SSE != 0 {
        get_vectors(&mut fp.xmm[..n], &area.legacy[XMM_AT..]);
    } else if mask & xcr0::SSE != 0 {
        fp.xmm[..n].fill([0; 2]);
    }
    // Not loaded, `high` is all zero: the initial configuration.
    if mask & xcr0::AVX != 0 {
        get_vectors(&mut fp.ymm_high[..n], high);
    }
}

fn xgetbv(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    ready(c)?;
    let value = match c.gpr[reg::RCX] as u32 {
        0 => c.s.xcr0,
        1 if c.profile.has(Feature::Xgetbv1) => {
            let sse = if c.s.fp.mxcsr != MXCSR_RESET { xcr0::SSE } else { 0 };
            c.s.xcr0 & (in_use(c) | sse)
        }
        _ => return c.raise(Fault::GP0),
    };
    c.gpr[reg::RAX] = value & 0xffff_ffff;
    c.gpr[reg::RDX] = value >> 32;
    Ok(())
}

fn xsetbv(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    ready(c)?;
    let value = requested(c);
    let supported = c.profile.xcr0_supported();
    let illegal = value & !supported != 0 || value & xcr0::X87 == 0 || value & (xcr0::SSE | xcr0::AVX) == xcr0::AVX;
    if c.s.cpl != 0 || c.gpr[reg::RCX] as u32 != 0 || illegal {
        return c.raise(Fault::GP0);
    }
    c.s.xcr0 = value;
    c.break_block = true;
    Ok(())
}
