//! Shifts and rotates.
//!
//! Flags the manual leaves undefined get the value that the one-bit rule would give (what Intel's
//! processors do for OF); AF is cleared by shifts.

use super::Row;
use crate::core::Core;
use crate::decode::{Form, Loc};
use crate::flags::Flags;
use crate::op::{ExecFn, Flow, Op};
use crate::word::Word;
use crate::{by_wide, by_width};
use iced_x86::Mnemonic as M;
use umbra_arch::Bus;
use umbra_arch::cpuid::Feature;
use umbra_arch::paging::AccessKind;
use umbra_arch::rflags::{AF, CF, OF};

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Shl, "SAL/SAR/SHL/SHR-Shift", |f| shift::<Shl>(f)).undefined(AF | OF | CF),
    Row::new(M::Sal, "SAL/SAR/SHL/SHR-Shift", |f| shift::<Shl>(f)).undefined(AF | OF | CF),
    Row::new(M::Shr, "SAL/SAR/SHL/SHR-Shift", |f| shift::<Shr>(f)).undefined(AF | OF | CF),
    Row::new(M::Sar, "SAL/SAR/SHL/SHR-Shift", |f| shift::<Sar>(f)).undefined(AF),
    Row::new(M::Rol, "RCL/RCR/ROL/ROR-Rotate", |f| shift::<Rol>(f)).undefined(OF),
    Row::new(M::Ror, "RCL/RCR/ROL/ROR-Rotate", |f| shift::<Ror>(f)).undefined(OF),
    Row::new(M::Rcl, "RCL/RCR/ROL/ROR-Rotate", |f| shift::<Rcl>(f)).undefined(OF),
    Row::new(M::Rcr, "RCL/RCR/ROL/ROR-Rotate", |f| shift::<Rcr>(f)).undefined(OF),
    Row::new(M::Shld, "SHLD-Double Precision Shift Left", double::<false>).undefined(AF | OF | CF),
    Row::new(M::Shrd, "SHRD-Double Precision Shift Right", double::<true>).undefined(AF | OF | CF),
    Row::new(M::Shlx, "SARX/SHLX/SHRX-Shift Without Affecting Flags", |f| three::<Shl>(f)).needs(Feature::Bmi2),
    Row::new(M::Shrx, "SARX/SHLX/SHRX-Shift Without Affecting Flags", |f| three::<Shr>(f)).needs(Feature::Bmi2),
    Row::new(M::Sarx, "SARX/SHLX/SHRX-Shift Without Affecting Flags", |f| three::<Sar>(f)).needs(Feature::Bmi2),
    Row::new(M::Rorx, "RORX-Rotate Right Logical Without Affecting Flags", |f| three::<Ror>(f)).needs(Feature::Bmi2),
];

/// A shift or rotate by a non-zero masked count (1..=31, or 63 for 64-bit operands).
trait Shift: 'static {
    fn apply<W: Word>(a: u64, count: u32, f: &mut Flags) -> u64;
}

struct Shl;
impl Shift for Shl {
    #[inline(always)]
    fn apply<W: Word>(a: u64, count: u32, f: &mut Flags) -> u64 {
        let wide = u128::from(a) << count;
        let r = wide as u64 & W::MASK;
        let cf = wide >> W::BITS & 1 != 0;
        f.set_logic::<W>(r);
        f.set_cf_of(cf, (r & W::SIGN != 0) != cf);
        r
    }
}

struct Shr;
impl Shift for Shr {
    #[inline(always)]
    fn apply<W: Word>(a: u64, count: u32, f: &mut Flags) -> u64 {
        let r = a >> count;
        f.set_logic::<W>(r);
        f.set_cf_of(a >> (count - 1) & 1 != 0, a & W::SIGN != 0);
        r
    }
}

struct Sar;
impl Shift for Sar {
    #[inline(always)]
    fn apply<W: Word>(a: u64, count: u32, f: &mut Flags) -> u64 {
        let wide = W::sext(a) as i64;
        let r = (wide >> count) as u64 & W::MASK;
        f.set_logic::<W>(r);
        f.set_cf_of(wide >> (count - 1) & 1 != 0, false);
        r
    }
}

struct Rol;
impl Shift for Rol {
    #[inline(always)]
    fn apply<W: Word>(a: u64, count: u32, f: &mut Flags) -> u64 {
        let n = count & (W::BITS - 1);
        let r = if n == 0 { a } else { (a << n | a >> (W::BITS - n)) & W::MASK };
        f.set_cf_of(r & 1 != 0, (r & W::SIGN != 0) != (r & 1 != 0));
        r
    }
}

struct Ror;
impl Shift for Ror {
    #[inline(always)]
    fn apply<W: Word>(a: u64, count: u32, f: &mut Flags) -> u64 {
        let n = count & (W::BITS - 1);
        let r = if n == 0 { a } else { (a >> n | a << (W::BITS - n)) & W::MASK };
        let top = r & W::SIGN != 0;
        f.set_cf_of(top, top != (r & W::SIGN >> 1 != 0));
        r
    }
}

struct Rcl;
impl Shift for Rcl {
    #[inline(always)]
    fn apply<W: Word>(a: u64, count: u32, f: &mut Flags) -> u64 {
        let n = count % (W::BITS + 1);
        if n == 0 {
            return a;
        }
        let wide = u128::from(a) | u128::from(f.cf()) << W::BITS;
        let turned = wide << n | wide >> (W::BITS + 1 - n);
        let r = turned as u64 & W::MASK;
        let cf = turned >> W::BITS & 1 != 0;
        f.set_cf_of(cf, (r & W::SIGN != 0) != cf);
        r
    }
}

struct Rcr;
impl Shift for Rcr {
    #[inline(always)]
    fn apply<W: Word>(a: u64, count: u32, f: &mut Flags) -> u64 {
        let n = count % (W::BITS + 1);
        if n == 0 {
            return a;
        }
        let wide = u128::from(a) | u128::from(f.cf()) << W::BITS;
        let turned = wide >> n | wide << (W::BITS + 1 - n);
        let r = turned as u64 & W::MASK;
        let cf = turned >> W::BITS & 1 != 0;
        f.set_cf_of(cf, (r & W::SIGN != 0) != (r & W::SIGN >> 1 != 0));
        r
    }
}

const fn count_mask(bits: u32) -> u32 {
    if bits == 64 { 63 } else { 31 }
}

fn shift<O: Shift>(form: &Form) -> Option<ExecFn> {
    match (form.dst, form.src) {
        (Loc::Reg, Loc::Imm) => by_width!(form.bytes, W => shift_reg::<O, W, true>),
        (Loc::Reg, Loc::Reg) => by_width!(form.bytes, W => shift_reg::<O, W, false>),
        (Loc::Mem, Loc::Imm) => by_width!(form.bytes, W => shift_mem::<O, W, true>),
        (Loc::Mem, Loc::Reg) => by_width!(form.bytes, W => shift_mem::<O, W, false>),
        _ => None,
    }
}

#[inline(always)]
fn count<W: Word, const IMM: bool>(c: &Core, op: &Op) -> u32 {
    (if IMM { op.imm } else { c.gpr[1] }) as u32 & count_mask(W::BITS)
}

fn shift_reg<O: Shift, W: Word, const IMM: bool>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let n = count::<W, IMM>(c, op);
    let a = c.reg::<W>(op.dst);
    let r = if n == 0 { a } else { O::apply::<W>(a, n, &mut c.flags) };
    c.set_reg::<W>(op.dst, r);
    Ok(())
}

fn shift_mem<O: Shift, W: Word, const IMM: bool>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let n = count::<W, IMM>(c, op);
    let lin = c.linear(op, W::BYTES, AccessKind::Write)?;
    c.modify::<W, ()>(bus, op, lin, |c, a| (if n == 0 { a } else { O::apply::<W>(a, n, &mut c.flags) }, ()))
}

/// BMI2 shifts: `dst = src shift count`, no flags.
fn three<O: Shift>(form: &mut Form) -> Option<ExecFn> {
    let i = form.i;
    let by_register = i.op2_kind() == iced_x86::OpKind::Register;
    form.aux = if by_register { u64::from(crate::decode::register_index(i.op2_register())) } else { 0x100 };
    match form.src {
        Loc::Reg => by_wide!(form.bytes, W => three_reg::<O, W>),
        Loc::Mem => by_wide!(form.bytes, W => three_mem::<O, W>),
        _ => None,
    }
}

#[inline(always)]
fn three_any<O: Shift, W: Word>(c: &mut Core, op: &Op, a: u64) -> Flow {
    let raw = if op.aux & 0x100 != 0 { op.imm } else { c.gpr[op.aux as usize & 15] };
    let n = raw as u32 & count_mask(W::BITS);
    let mut scratch = c.flags;
    let r = if n == 0 { a } else { O::apply::<W>(a, n, &mut scratch) };
    c.set_reg::<W>(op.dst, r);
    Ok(())
}

fn three_reg<O: Shift, W: Word>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let a = c.reg::<W>(op.src);
    three_any::<O, W>(c, op, a)
}

fn three_mem<O: Shift, W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let a = c.load_operand::<W>(bus, op)?;
    three_any::<O, W>(c, op, a)
}

fn double<const RIGHT: bool>(form: &mut Form) -> Option<ExecFn> {
    form.aux = u64::from(form.i.op2_kind() == iced_x86::OpKind::Register);
    match form.dst {
        Loc::Reg => by_wide!(form.bytes, W => double_reg::<W, RIGHT>),
        Loc::Mem => by_wide!(form.bytes, W => double_mem::<W, RIGHT>),
        _ => None,
    }
}

#[inline(always)]
fn double_count<W: Word>(c: &Core, op: &Op) -> u32 {
    (if op.aux != 0 { c.gpr[1] } else { op.imm }) as u32 & count_mask(W::BITS)
}

/// SHLD and SHRD. A 16-bit count above 16 is undefined; like Intel's processors we then shift in the
/// destination's own bits again.
fn double_shift<W: Word, const RIGHT: bool>(a: u64, b: u64, n: u32, f: &mut Flags) -> u64 {
    let (bits, a128, b128) = (W::BITS, u128::from(a), u128::from(b));
    let (r, cf) = if RIGHT {
        let again = if bits == 16 { a128 << 32 } else { 0 };
        let wide = again | b128 << bits | a128;
        ((wide >> n) as u64 & W::MASK, wide >> (n - 1) & 1 != 0)
    } else {
        let (wide, total) =
            if bits == 16 { (a128 << 32 | b128 << 16 | a128, 48) } else { (a128 << bits | b128, 2 * bits) };
        ((wide << n >> (total - bits)) as u64 & W::MASK, wide >> (total - n) & 1 != 0)
    };
    f.set_logic::<W>(r);
    f.set_cf_of(cf, (r ^ a) & W::SIGN != 0);
    r
}

fn double_reg<W: Word, const RIGHT: bool>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let n = double_count::<W>(c, op);
    let (a, b) = (c.reg::<W>(op.dst), c.reg::<W>(op.src));
    let r = if n == 0 { a } else { double_shift::<W, RIGHT>(a, b, n, &mut c.flags) };
    c.set_reg::<W>(op.dst, r);
    Ok(())
}

fn double_mem<W: Word, const RIGHT: bool>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let n = double_count::<W>(c, op);
    let b = c.reg::<W>(op.src);
    let lin = c.linear(op, W::BYTES, AccessKind::Write)?;
    c.modify::<W, ()>(bus, op, lin, |c, a| {
        (if n == 0 { a } else { double_shift::<W, RIGHT>(a, b, n, &mut c.flags) }, ())
    })
}
