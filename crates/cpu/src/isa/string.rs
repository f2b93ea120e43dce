//! String instructions.
//!
//! A repeated instruction works in chunks: a chunk ends where any operand reaches the end of its page
//! (or after one element that crosses it), where a compare decides, at a data breakpoint, and where a
//! device took time or asked for attention. Each chunk retires once; between chunks interrupts are taken.
//! MOVS and STOS take one tick for each eight bytes that a chunk moved, the others one for each element, at
//! least one tick. So time and the retired count follow from guest state alone, in every engine, and a
//! tick is a bounded amount of work.

use super::Row;
use crate::by_width;
use crate::core::Core;
use crate::decode::Form;
use crate::op::{ExecFn, Flow, Op, Stop};
use crate::word::Word;
use iced_x86::{Code, Mnemonic as M};
use umbra_arch::paging::AccessKind;
use umbra_arch::segment::Seg;
use umbra_arch::state::reg;
use umbra_arch::{Bus, PAGE_SIZE, rflags};

const MOVS: &str = "MOVS/MOVSB/MOVSW/MOVSD/MOVSQ-Move Data From String to String";
const CMPS: &str = "CMPS/CMPSB/CMPSW/CMPSD/CMPSQ-Compare String Operands";
const STOS: &str = "STOS/STOSB/STOSW/STOSD/STOSQ-Store String";
const LODS: &str = "LODS/LODSB/LODSW/LODSD/LODSQ-Load String";
const SCAS: &str = "SCAS/SCASB/SCASW/SCASD-Scan String";
const INS: &str = "INS/INSB/INSW/INSD-Input from Port to String";
const OUTS: &str = "OUTS/OUTSB/OUTSW/OUTSD-Output String to Port";

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Movsb, MOVS, string::<Movs>),
    Row::new(M::Movsw, MOVS, string::<Movs>),
    Row::new(M::Movsd, MOVS, string::<Movs>).only(|c| c == Code::Movsd_m32_m32),
    Row::new(M::Movsq, MOVS, string::<Movs>),
    Row::new(M::Cmpsb, CMPS, string::<Cmps>),
    Row::new(M::Cmpsw, CMPS, string::<Cmps>),
    Row::new(M::Cmpsd, CMPS, string::<Cmps>).only(|c| c == Code::Cmpsd_m32_m32),
    Row::new(M::Cmpsq, CMPS, string::<Cmps>),
    Row::new(M::Stosb, STOS, string::<Stos>),
    Row::new(M::Stosw, STOS, string::<Stos>),
    Row::new(M::Stosd, STOS, string::<Stos>),
    Row::new(M::Stosq, STOS, string::<Stos>),
    Row::new(M::Lodsb, LODS, string::<Lods>),
    Row::new(M::Lodsw, LODS, string::<Lods>),
    Row::new(M::Lodsd, LODS, string::<Lods>),
    Row::new(M::Lodsq, LODS, string::<Lods>),
    Row::new(M::Scasb, SCAS, string::<Scas>),
    Row::new(M::Scasw, SCAS, string::<Scas>),
    Row::new(M::Scasd, SCAS, string::<Scas>),
    Row::new(M::Scasq, SCAS, string::<Scas>),
    Row::new(M::Insb, INS, string::<Ins>).ends(),
    Row::new(M::Insw, INS, string::<Ins>).ends(),
    Row::new(M::Insd, INS, string::<Ins>).ends(),
    Row::new(M::Outsb, OUTS, string::<Outs>).ends(),
    Row::new(M::Outsw, OUTS, string::<Outs>).ends(),
    Row::new(M::Outsd, OUTS, string::<Outs>).ends(),
];

/// What MOVS and STOS move in a tick.
pub const BYTES_A_TICK: u64 = 8;

/// The segment of a string source, XLAT table or other implied operand.
pub fn segment_of(op: &Op) -> Seg {
    Seg::USER[usize::from(op.seg).min(5)]
}

/// One string instruction, element by element.
trait StringOp: 'static {
    /// Reads at (E/R)SI.
    const SOURCE: bool;
    /// Reads or writes at ES:(E/R)DI.
    const TARGET: bool;
    /// REPE and REPNE look at ZF.
    const COMPARES: bool = false;
    /// Chunks are single elements (port I/O).
    const SINGLE: bool = false;
    /// Time goes by bytes, [`BYTES_A_TICK`] a tick, rather than by elements.
    const STREAMS: bool = false;
    /// One element at the present pointers, which the caller moves.
    fn step<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow;
    /// `n` elements upwards at once, none of which crosses a page; `false` if it can't.
    fn bulk<W: Word>(_: &mut Core, _: &Op, _n: u64) -> bool {
        false
    }
}

fn string<O: StringOp>(form: &mut Form) -> Option<ExecFn> {
    let i = form.i;
    let repeated = i.has_rep_prefix() || i.has_repne_prefix();
    form.aux = u64::from(i.has_repne_prefix());
    let bytes = i.memory_size().size() as u64;
    if repeated { by_width!(bytes, W => repeat::<O, W>) } else { by_width!(bytes, W => once::<O, W>) }
}

#[inline(always)]
fn source(c: &Core, op: &Op) -> u64 {
    c.gpr[reg::RSI] & op.ea_mask
}

#[inline(always)]
fn target(c: &Core, op: &Op) -> u64 {
    c.gpr[reg::RDI] & op.ea_mask
}

#[inline(always)]
fn move_pointer(c: &mut Core, op: &Op, r: usize, by: u64) {
    let new = c.gpr[r].wrapping_add(by);
    match op.ea_mask {
        0xffff => c.set_reg::<u16>(r as u8, new),
        0xffff_ffff => c.set_reg::<u32>(r as u8, new),
        _ => c.gpr[r] = new,
    }
}

#[inline(always)]
fn advance<O: StringOp, W: Word>(c: &mut Core, op: &Op, n: u64) {
    let size = n.wrapping_mul(W::BYTES);
    let by = if c.s.rflags & rflags::DF != 0 { size.wrapping_neg() } else { size };
    if O::SOURCE {
        move_pointer(c, op, reg::RSI, by);
    }
    if O::TARGET {
        move_pointer(c, op, reg::RDI, by);
    }
}

fn once<O: StringOp, W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    O::step::<W>(c, bus, op)?;
    advance::<O, W>(c, op, 1);
    Ok(())
}

/// Elements at `at` before one would cross the page in the direction of DF; at least 1.
fn room(at: u64, bytes: u64, down: bool) -> u64 {
    let offset = at & (PAGE_SIZE - 1);
    let n = if down { offset / bytes + 1 } else { (PAGE_SIZE - offset) / bytes };
    n.max(1)
}

fn repeat<O: StringOp, W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let count = c.gpr[reg::RCX] & op.ea_mask;
    if count == 0 {
        return Ok(());
    }
    let down = c.s.rflags & rflags::DF != 0;
    let stepped = O::SINGLE || c.s.rflags & rflags::TF != 0;
    let mut n = if stepped { 1 } else { count };
    if O::SOURCE {
        n = n.min(room(c.seg_base[op.seg as usize & 7].wrapping_add(source(c, op)), W::BYTES, down));
    }
    if O::TARGET {
        n = n.min(room(c.seg_base[Seg::Es as usize].wrapping_add(target(c, op)), W::BYTES, down));
    }
    if at_once::<O, W>(c, op, count, n) {
        charge::<O, W>(c, n);
        return if n == count { Ok(()) } else { Err(Stop::Again) };
    }
    elements::<O, W>(c, bus, op, count, n)
}

/// The first `n` of `count` elements at once; `false` if that can't be.
#[inline(always)]
fn at_once<O: StringOp, W: Word>(c: &mut Core, op: &Op, count: u64, n: u64) -> bool {
    let plain = !op.legacy || c.seg_checked & (1 << (op.seg & 7) | 1) == 0;
    let up = c.s.rflags & rflags::DF == 0;
    let all = up && n > 1 && plain && O::bulk::<W>(c, op, n);
    if all {
        advance::<O, W>(c, op, n);
        c.set_counter(op, count - n);
    }
    all
}

/// Charges what `n` elements of a chunk take beyond the chunk's own tick.
#[inline(always)]
fn charge<O: StringOp, W: Word>(c: &mut Core, n: u64) {
    let ticks = if O::STREAMS { (n * W::BYTES).div_ceil(BYTES_A_TICK) } else { n };
    if ticks > 1 {
        c.extra_cost += ticks - 1;
        c.break_block = true;
    }
}

fn elements<O: StringOp, W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op, count: u64, n: u64) -> Flow {
    let mut done = 0;
    let flow = chunk::<O, W>(c, bus, op, count, n, &mut done);
    charge::<O, W>(c, done);
    flow
}

/// Up to `n` of `count` elements, one by one; counts them in `done`.
fn chunk<O: StringOp, W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op, count: u64, n: u64, done: &mut u64) -> Flow {
    let before = c.extra_cost;
    while *done < n {
        O::step::<W>(c, bus, op)?;
        advance::<O, W>(c, op, 1);
        *done += 1;
        c.set_counter(op, count - *done);
        if O::COMPARES && c.flags.zf() == (op.aux != 0) {
            return Ok(());
        }
        // Not for `break_block`: what is decoded and cached must not decide where a chunk ends.
        if c.attention || c.extra_cost != before || c.watch.has_hit() {
            break;
        }
        // The first stores may have ended that the page is watched.
        if done.is_power_of_two() && at_once::<O, W>(c, op, count - *done, n - *done) {
            *done = n;
        }
    }
    if *done == count { Ok(()) } else { Err(Stop::Again) }
}

struct Movs;
impl StringOp for Movs {
    const SOURCE: bool = true;
    const TARGET: bool = true;
    const STREAMS: bool = true;
    #[inline(always)]
    fn step<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
        let from = c.linear_at(op, segment_of(op), source(c, op), W::BYTES, AccessKind::Read)?;
        let value = c.read::<W>(bus, op, from)?;
        let to = c.linear_at(op, Seg::Es, target(c, op), W::BYTES, AccessKind::Write)?;
        c.write::<W>(bus, op, to, value)
    }
    fn bulk<W: Word>(c: &mut Core, op: &Op, n: u64) -> bool {
        let len = n * W::BYTES;
        let from = c.seg_base[op.seg as usize & 7].wrapping_add(source(c, op));
        let to = c.seg_base[Seg::Es as usize].wrapping_add(target(c, op));
        let Some(from) = c.find_ram(op, from, len, AccessKind::Read) else { return false };
        let Some(to) = c.find_ram(op, to, len, AccessKind::Write) else { return false };
        if to.raw().abs_diff(from.raw()) < len {
            return false;
        }
        let mut buffer = [0u8; PAGE_SIZE as usize];
        let part = &mut buffer[..len as usize];
        c.mem.load_bytes(from, part);
        c.mem.store_bytes(to, part);
        true
    }
}

struct Stos;
impl StringOp for Stos {
    const SOURCE: bool = false;
    const TARGET: bool = true;
    const STREAMS: bool = true;
    #[inline(always)]
    fn step<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
        let to = c.linear_at(op, Seg::Es, target(c, op), W::BYTES, AccessKind::Write)?;
        let value = c.reg::<W>(0);
        c.write::<W>(bus, op, to, value)
    }
    fn bulk<W: Word>(c: &mut Core, op: &Op, n: u64) -> bool {
        let len = (n * W::BYTES) as usize;
        let to = c.seg_base[Seg::Es as usize].wrapping_add(target(c, op));
        let Some(to) = c.find_ram(op, to, len as u64, AccessKind::Write) else { return false };
        let mut buffer = [0u8; PAGE_SIZE as usize];
        let value = c.reg::<W>(0).to_le_bytes();
        for element in buffer[..len].chunks_exact_mut(W::BYTES as usize) {
            element.copy_from_slice(&value[..W::BYTES as usize]);
        }
        c.mem.store_bytes(to, &buffer[..len]);
        true
    }
}

struct Lods;
impl StringOp for Lods {
    const SOURCE: bool = true;
    const TARGET: bool = false;
    #[inline(always)]
    fn step<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
        let from = c.linear_at(op, segment_of(op), source(c, op), W::BYTES, AccessKind::Read)?;
        let value = c.read::<W>(bus, op, from)?;
        c.set_reg::<W>(0, value);
        Ok(())
    }
}

struct Cmps;
impl StringOp for Cmps {
    const SOURCE: bool = true;
    const TARGET: bool = true;
    const COMPARES: bool = true;
    #[inline(always)]
    fn step<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
        let from = c.linear_at(op, segment_of(op), source(c, op), W::BYTES, AccessKind::Read)?;
        let a = c.read::<W>(bus, op, from)?;
        let to = c.linear_at(op, Seg::Es, target(c, op), W::BYTES, AccessKind::Read)?;
        let b = c.read::<W>(bus, op, to)?;
        c.flags.set_sub::<W>(a, b, a.wrapping_sub(b) & W::MASK);
        Ok(())
    }
}

struct Scas;
impl StringOp for Scas {
    const SOURCE: bool = false;
    const TARGET: bool = true;
    const COMPARES: bool = true;
    #[inline(always)]
    fn step<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
        let at = c.linear_at(op, Seg::Es, target(c, op), W::BYTES, AccessKind::Read)?;
        let (a, b) = (c.reg::<W>(0), c.read::<W>(bus, op, at)?);
        c.flags.set_sub::<W>(a, b, a.wrapping_sub(b) & W::MASK);
        Ok(())
    }
}

struct Ins;
impl StringOp for Ins {
    const SOURCE: bool = false;
    const TARGET: bool = true;
    const SINGLE: bool = true;
    fn step<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
        let port = c.gpr[reg::RDX] as u16;
        c.check_port(bus, port, W::BYTES)?;
        let to = c.linear_at(op, Seg::Es, target(c, op), W::BYTES, AccessKind::Write)?;
        // The store must not fail after the port was read.
        c.probe_write(op, to, W::BYTES)?;
        let reply = bus.port_read(c.now(op.prefix), port, W::ACCESS);
        let value = c.settle(reply);
        c.write::<W>(bus, op, to, u64::from(value))
    }
}

struct Outs;
impl StringOp for Outs {
    const SOURCE: bool = true;
    const TARGET: bool = false;
    const SINGLE: bool = true;
    fn step<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
        let port = c.gpr[reg::RDX] as u16;
        c.check_port(bus, port, W::BYTES)?;
        let from = c.linear_at(op, segment_of(op), source(c, op), W::BYTES, AccessKind::Read)?;
        let value = c.read::<W>(bus, op, from)?;
        let reply = bus.port_write(c.now(op.prefix), port, W::ACCESS, value as u32);
        c.settle(reply);
        Ok(())
    }
}
