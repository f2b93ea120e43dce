//! Multiplication and division.

use super::Row;
use crate::core::Core;
use crate::decode::{Form, Loc, register_index};
use crate::op::{ExecFn, Flow, Op};
use crate::word::Word;
use crate::{by_wide, by_width};
use iced_x86::Mnemonic as M;
use umbra_arch::cpuid::Feature;
use umbra_arch::rflags::{AF, PF, SF, STATUS, ZF};
use umbra_arch::{Bus, Fault};

const UNDEFINED: u64 = SF | ZF | AF | PF;

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Mul, "MUL-Unsigned Multiply", |f| accumulator::<Mul>(f)).undefined(UNDEFINED),
    Row::new(M::Imul, "IMUL-Signed Multiply", imul).undefined(UNDEFINED),
    Row::new(M::Div, "DIV-Unsigned Divide", |f| accumulator::<Div>(f)).undefined(STATUS),
    Row::new(M::Idiv, "IDIV-Signed Divide", |f| accumulator::<Idiv>(f)).undefined(STATUS),
    Row::new(M::Mulx, "MULX-Unsigned Multiply Without Affecting Flags", mulx).needs(Feature::Bmi2),
];

/// An operation on the accumulator pair (AX, DX:AX, EDX:EAX, RDX:RAX) with one explicit operand.
trait Accumulator: 'static {
    /// `high:low` and the operand give the new `high:low`, or #DE.
    fn apply<W: Word>(c: &mut Core, high: u64, low: u64, b: u64) -> Option<(u64, u64)>;
}

fn accumulator<O: Accumulator>(form: &Form) -> Option<ExecFn> {
    match form.dst {
        Loc::Reg => by_width!(form.bytes, W => accumulator_reg::<O, W>),
        Loc::Mem => by_width!(form.bytes, W => accumulator_mem::<O, W>),
        _ => None,
    }
}

#[inline(always)]
fn accumulate<O: Accumulator, W: Word>(c: &mut Core, b: u64) -> Flow {
    let low = c.reg::<W>(0);
    let high = if W::BITS == 8 { c.gpr[0] >> 8 & 0xff } else { c.reg::<W>(2) };
    let Some((high, low)) = O::apply::<W>(c, high, low, b) else { return c.raise(Fault::DIVIDE) };
    if W::BITS == 8 {
        c.set_reg::<u16>(0, high << 8 | low & 0xff);
    } else {
        c.set_reg::<W>(0, low);
        c.set_reg::<W>(2, high);
    }
    Ok(())
}

fn accumulator_reg<O: Accumulator, W: Word>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let b = c.reg::<W>(op.dst);
    accumulate::<O, W>(c, b)
}

fn accumulator_mem<O: Accumulator, W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let b = c.load_operand::<W>(bus, op)?;
    accumulate::<O, W>(c, b)
}

struct Mul;
impl Accumulator for Mul {
    #[inline(always)]
    fn apply<W: Word>(c: &mut Core, _: u64, low: u64, b: u64) -> Option<(u64, u64)> {
        let wide = u128::from(low) * u128::from(b);
        let (high, low) = ((wide >> W::BITS) as u64 & W::MASK, wide as u64 & W::MASK);
        c.flags.set_result::<W>(low);
        c.flags.set_af(false);
        c.flags.set_cf_of(high != 0, high != 0);
        Some((high, low))
    }
}

struct ImulWide;
impl Accumulator for ImulWide {
    #[inline(always)]
    fn apply<W: Word>(c: &mut Core, _: u64, low: u64, b: u64) -> Option<(u64, u64)> {
        let wide = i128::from(W::sext(low) as i64) * i128::from(W::sext(b) as i64);
        let low = wide as u64 & W::MASK;
        imul_flags::<W>(c, wide, low);
        Some(((wide >> W::BITS) as u64 & W::MASK, low))
    }
}

#[inline(always)]
fn imul_flags<W: Word>(c: &mut Core, wide: i128, low: u64) {
    let lost = i128::from(W::sext(low) as i64) != wide;
    c.flags.set_result::<W>(low);
    c.flags.set_af(false);
    c.flags.set_cf_of(lost, lost);
}

struct Div;
impl Accumulator for Div {
    #[inline(always)]
    fn apply<W: Word>(_: &mut Core, high: u64, low: u64, b: u64) -> Option<(u64, u64)> {
        // The quotient fits exactly when high < b; b = 0 fails too.
        if high >= b {
            return None;
        }
        if high == 0 {
            return Some((low % b, low / b));
        }
        if W::BITS <= 32 {
            let wide = high << W::BITS | low;
            return Some((wide % b, wide / b));
        }
        let wide = u128::from(high) << W::BITS | u128::from(low);
        Some(((wide % u128::from(b)) as u64, (wide / u128::from(b)) as u64))
    }
}

struct Idiv;
impl Accumulator for Idiv {
    #[inline(always)]
    fn apply<W: Word>(_: &mut Core, high: u64, low: u64, b: u64) -> Option<(u64, u64)> {
        let wide = i128::from(W::sext(high) as i64) << W::BITS | i128::from(low);
        let b = i128::from(W::sext(b) as i64);
        let quotient = wide.checked_div(b)?;
        let fits = quotient == i128::from(W::sext(quotient as u64) as i64);
        fits.then(|| ((wide % b) as u64 & W::MASK, quotient as u64 & W::MASK))
    }
}

fn imul(form: &mut Form) -> Option<ExecFn> {
    if form.src == Loc::None {
        return accumulator::<ImulWide>(form);
    }
    let three = form.i.op_count() == 3;
    match (form.src, three) {
        (Loc::Reg, false) => by_wide!(form.bytes, W => imul_reg::<W, false>),
        (Loc::Mem, false) => by_wide!(form.bytes, W => imul_mem::<W, false>),
        (Loc::Reg, true) => by_wide!(form.bytes, W => imul_reg::<W, true>),
        (Loc::Mem, true) => by_wide!(form.bytes, W => imul_mem::<W, true>),
        _ => None,
    }
}

#[inline(always)]
fn imul_any<W: Word, const IMM: bool>(c: &mut Core, op: &Op, b: u64) -> Flow {
    let a = if IMM { op.imm & W::MASK } else { c.reg::<W>(op.dst) };
    let wide = i128::from(W::sext(a) as i64) * i128::from(W::sext(b) as i64);
    let low = wide as u64 & W::MASK;
    imul_flags::<W>(c, wide, low);
    c.set_reg::<W>(op.dst, low);
    Ok(())
}

fn imul_reg<W: Word, const IMM: bool>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let b = c.reg::<W>(op.src);
    imul_any::<W, IMM>(c, op, b)
}

fn imul_mem<W: Word, const IMM: bool>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let b = c.load_operand::<W>(bus, op)?;
    imul_any::<W, IMM>(c, op, b)
}

fn mulx(form: &mut Form) -> Option<ExecFn> {
    let register = form.i.op2_kind() == iced_x86::OpKind::Register;
    form.aux = u64::from(register) << 8 | u64::from(register_index(form.i.op2_register()));
    by_wide!(form.bytes, W => mulx_any::<W>)
}

fn mulx_any<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let b = if op.aux >> 8 != 0 { c.reg::<W>(op.aux as u8) } else { c.load_operand::<W>(bus, op)? };
    let wide = u128::from(c.reg::<W>(2)) * u128::from(b);
    // With equal destinations the high half stays.
    c.set_reg::<W>(op.src, wide as u64);
    c.set_reg::<W>(op.dst, (wide >> W::BITS) as u64 & W::MASK);
    Ok(())
}
