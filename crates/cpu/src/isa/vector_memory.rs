//! Element by element: masked moves and gathers. Only selected elements are accessed, and only they fault.

use super::Row;
use super::host_data::{Avx, Mmx, Sse, Unit};
use crate::core::Core;
use crate::decode::{Form, Loc};
use crate::op::{ExecFn, Flow, Op, Stop};
use crate::segments::SegmentUse;
use iced_x86::{Mnemonic as M, OpKind};
use umbra_arch::Bus;
use umbra_arch::cpuid::Feature;
use umbra_arch::paging::AccessKind;
use umbra_arch::state::reg;

const MASKMOV: &str = "VMASKMOV-Conditional SIMD Packed Loads and Stores";
const PMASKMOV: &str = "VPMASKMOV-Conditional SIMD Integer Packed Loads and Stores";
const GATHER_FP: &str = "VGATHERDPD/VGATHERQPD-Gather Packed Double Precision Floating-Point Values";
const GATHER_INT: &str = "VPGATHERDD/VPGATHERQD-Gather Packed Dword Values Using Signed Dword/Qword Indices";

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Maskmovq, "MASKMOVQ-Store Selected Bytes of Quadword", |f| bytes_of(f, masked_bytes::<Mmx, 8>))
        .needs(Feature::Sse),
    Row::new(M::Maskmovdqu, "MASKMOVDQU-Store Selected Bytes of Double Quadword", |f| {
        bytes_of(f, masked_bytes::<Sse, 16>)
    })
    .needs(Feature::Sse2),
    Row::new(M::Vmaskmovdqu, "MASKMOVDQU-Store Selected Bytes of Double Quadword", |f| {
        bytes_of(f, masked_bytes::<Avx, 16>)
    })
    .needs(Feature::Avx),
    Row::new(M::Vmaskmovps, MASKMOV, masked::<4>).needs(Feature::Avx),
    Row::new(M::Vmaskmovpd, MASKMOV, masked::<8>).needs(Feature::Avx),
    Row::new(M::Vpmaskmovd, PMASKMOV, masked::<4>).needs(Feature::Avx2),
    Row::new(M::Vpmaskmovq, PMASKMOV, masked::<8>).needs(Feature::Avx2),
    Row::new(M::Vgatherdps, GATHER_FP, gather::<4, 4>).needs(Feature::Avx2),
    Row::new(M::Vgatherdpd, GATHER_FP, gather::<4, 8>).needs(Feature::Avx2),
    Row::new(M::Vgatherqps, GATHER_FP, gather::<8, 4>).needs(Feature::Avx2),
    Row::new(M::Vgatherqpd, GATHER_FP, gather::<8, 8>).needs(Feature::Avx2),
    Row::new(M::Vpgatherdd, GATHER_INT, gather::<4, 4>).needs(Feature::Avx2),
    Row::new(M::Vpgatherdq, GATHER_INT, gather::<4, 8>).needs(Feature::Avx2),
    Row::new(M::Vpgatherqd, GATHER_INT, gather::<8, 4>).needs(Feature::Avx2),
    Row::new(M::Vpgatherqq, GATHER_INT, gather::<8, 8>).needs(Feature::Avx2),
];

/// [`Op::aux`]: three register numbers and a count of elements, a byte each.
fn pack(registers: [usize; 3], elements: usize) -> u64 {
    let [a, b, c] = registers.map(|r| r as u64 & 15);
    a | b << 8 | c << 16 | (elements as u64) << 24
}

fn unpack(aux: u64) -> ([usize; 3], usize) {
    ([0, 8, 16].map(|at| (aux >> at & 15) as usize), (aux >> 24 & 0xff) as usize)
}

fn vector_number(form: &Form, k: u32) -> usize {
    form.i.op_register(k).number()
}

/// Vector register as eight dwords.
fn ymm(c: &Core, r: usize) -> [u64; 4] {
    let (low, high) = (c.s.fp.xmm[r & 15], c.s.fp.ymm_high[r & 15]);
    [low[0], low[1], high[0], high[1]]
}

fn set_ymm(c: &mut Core, r: usize, v: [u64; 4]) {
    c.s.fp.xmm[r & 15] = [v[0], v[1]];
    c.s.fp.ymm_high[r & 15] = [v[2], v[3]];
}

fn element<const BYTES: u64>(v: &[u64; 4], i: usize) -> u64 {
    match BYTES {
        8 => v[i & 3],
        _ => v[(i / 2) & 3] >> (32 * (i & 1)) & 0xffff_ffff,
    }
}

fn set_element<const BYTES: u64>(v: &mut [u64; 4], i: usize, value: u64) {
    match BYTES {
        8 => v[i & 3] = value,
        _ => {
            let shift = 32 * (i & 1);
            let quad = &mut v[(i / 2) & 3];
            *quad = *quad & !(0xffff_ffff << shift) | (value & 0xffff_ffff) << shift;
        }
    }
}

/// The top bit of an element selects.
fn selects<const BYTES: u64>(mask: &[u64; 4], i: usize) -> bool {
    element::<BYTES>(mask, i) >> (8 * BYTES - 1) & 1 != 0
}

/// Linear address of `offset` in the operand's segment.
fn address(c: &mut Core, op: &Op, offset: u64, bytes: u64, kind: AccessKind) -> Result<u64, Stop> {
    let offset = offset & op.ea_mask;
    if op.legacy {
        return c.segmented(op.seg, offset, bytes, SegmentUse::of(kind));
    }
    Ok(c.seg_base[op.seg as usize & 7].wrapping_add(offset))
}

fn load<const BYTES: u64>(c: &mut Core, bus: &mut dyn Bus, op: &Op, offset: u64) -> Result<u64, Stop> {
    let lin = address(c, op, offset, BYTES, AccessKind::Read)?;
    match BYTES {
        8 => c.read::<u64>(bus, op, lin),
        _ => c.read::<u32>(bus, op, lin),
    }
}

fn bytes_of(form: &mut Form, exec: ExecFn) -> Option<ExecFn> {
    form.aux = pack([0, vector_number(form, 1), vector_number(form, 2)], 0);
    Some(exec)
}

/// Stores the bytes of the second operand that the third's sign bits select to DS:rDI.
fn masked_bytes<U: Unit, const N: usize>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    U::ready(c)?;
    let ([_, data, mask], _) = unpack(op.aux);
    if N == 8 {
        enter_mmx(c);
    }
    let register = |c: &Core, r: usize| if N == 8 { [c.s.fp.st[r & 7][0], 0] } else { c.s.fp.xmm[r] };
    let (data, mask) = (register(c, data), register(c, mask));
    let byte = |v: [u64; 2], i: usize| (v[i / 8] >> (8 * (i % 8))) as u8;
    let selected = || (0..N).filter(|i| byte(mask, *i) & 0x80 != 0);
    let base = c.gpr[reg::RDI];
    for i in selected() {
        let lin = address(c, op, base.wrapping_add(i as u64), 1, AccessKind::Write)?;
        c.probe_write(op, lin, 1)?;
    }
    for i in selected() {
        let lin = address(c, op, base.wrapping_add(i as u64), 1, AccessKind::Write)?;
        c.write::<u8>(bus, op, lin, u64::from(byte(data, i)))?;
    }
    Ok(())
}

/// TOP 0, all registers valid; the stack order turns with TOP.
fn enter_mmx(c: &mut Core) {
    let fp = &mut c.s.fp;
    fp.st.rotate_right(usize::from(fp.fsw >> 11 & 7));
    fp.fsw &= !(7 << 11);
    fp.ftw = 0xff;
}

fn masked<const BYTES: u64>(form: &mut Form) -> Option<ExecFn> {
    let wide = form.i.op_register(1).is_ymm();
    let elements = if wide { 32 } else { 16 } / BYTES as usize;
    let (other, exec): (u32, ExecFn) = match form.dst {
        Loc::Mem => (2, masked_store::<BYTES>),
        _ => (0, masked_load::<BYTES>),
    };
    form.aux = pack([vector_number(form, other), vector_number(form, 1), 0], elements);
    Some(exec)
}

fn masked_load<const BYTES: u64>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    Avx::ready(c)?;
    let ([dst, mask, _], elements) = unpack(op.aux);
    let mask = ymm(c, mask);
    let base = c.effective(op);
    let mut result = [0; 4];
    for i in (0..elements).filter(|i| selects::<BYTES>(&mask, *i)) {
        let value = load::<BYTES>(c, bus, op, base.wrapping_add(i as u64 * BYTES))?;
        set_element::<BYTES>(&mut result, i, value);
    }
    set_ymm(c, dst, result);
    Ok(())
}

fn masked_store<const BYTES: u64>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    Avx::ready(c)?;
    let ([src, mask, _], elements) = unpack(op.aux);
    let (data, mask) = (ymm(c, src), ymm(c, mask));
    let base = c.effective(op);
    let selected = || (0..elements).filter(|i| selects::<BYTES>(&mask, *i));
    for i in selected() {
        let lin = address(c, op, base.wrapping_add(i as u64 * BYTES), BYTES, AccessKind::Write)?;
        c.probe_write(op, lin, BYTES)?;
    }
    for i in selected() {
        let lin = address(c, op, base.wrapping_add(i as u64 * BYTES), BYTES, AccessKind::Write)?;
        match BYTES {
            8 => c.write::<u64>(bus, op, lin, element::<8>(&data, i))?,
            _ => c.write::<u32>(bus, op, lin, element::<4>(&data, i))?,
        }
    }
    Ok(())
}

/// Index elements of INDEX bytes, data elements of DATA bytes.
fn gather<const INDEX: u64, const DATA: u64>(form: &mut Form) -> Option<ExecFn> {
    let index = form.i.memory_index();
    let index_bytes = if index.is_ymm() { 32 } else { 16 };
    let data_bytes = if form.i.op_register(0).is_ymm() { 32 } else { 16 };
    let elements = (index_bytes / INDEX).min(data_bytes / DATA) as usize;
    let registers = [vector_number(form, 0), index.number(), vector_number(form, 2)];
    let [dst, vector, mask] = registers;
    if form.i.op2_kind() != OpKind::Register || dst == vector || dst == mask || vector == mask {
        return None;
    }
    form.aux = pack(registers, elements);
    Some(gather_elements::<INDEX, DATA>)
}

/// A fault leaves the elements gathered so far in place and their mask elements clear.
fn gather_elements<const INDEX: u64, const DATA: u64>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    Avx::ready(c)?;
    let ([dst, index, mask], elements) = unpack(op.aux);
    let indices = ymm(c, index);
    let base = c.effective(op);
    for i in 0..elements {
        let selectors = ymm(c, mask);
        if selects::<DATA>(&selectors, i) {
            let raw = element::<INDEX>(&indices, i);
            let signed = if INDEX == 4 { raw as i32 as u64 } else { raw };
            let value = load::<DATA>(c, bus, op, base.wrapping_add(signed << (op.scale & 3)))?;
            let mut result = ymm(c, dst);
            set_element::<DATA>(&mut result, i, value);
            set_ymm(c, dst, result);
        }
        let mut left = selectors;
        set_element::<DATA>(&mut left, i, 0);
        set_ymm(c, mask, left);
    }
    let mut result = ymm(c, dst);
    for i in elements..32 / DATA as usize {
        set_element::<DATA>(&mut result, i, 0);
    }
    set_ymm(c, dst, result);
    set_ymm(c, mask, [0; 4]);
    Ok(())
}
