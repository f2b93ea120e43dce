//! Bit tests and bit-field instructions.

use super::Row;
use crate::by_wide;
use crate::core::Core;
use crate::decode::{Form, Loc, register_index};
use crate::flags::Flags;
use crate::op::{ExecFn, Flow, Op};
use crate::word::Word;
use iced_x86::{Mnemonic as M, OpKind};
use umbra_arch::Bus;
use umbra_arch::cpuid::Feature;
use umbra_arch::paging::AccessKind;
use umbra_arch::rflags::{AF, OF, PF, SF};

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Bt, "BT-Bit Test", test::<0>).undefined(OF | SF | AF | PF),
    Row::new(M::Bts, "BTS-Bit Test and Set", test::<1>).undefined(OF | SF | AF | PF),
    Row::new(M::Btr, "BTR-Bit Test and Reset", test::<2>).undefined(OF | SF | AF | PF),
    Row::new(M::Btc, "BTC-Bit Test and Complement", test::<3>).undefined(OF | SF | AF | PF),
    Row::new(M::Andn, "ANDN-Logical AND NOT", |f| vex::<Andn>(f)).undefined(AF | PF).needs(Feature::Bmi1),
    Row::new(M::Bextr, "BEXTR-Bit Field Extract", |f| vex::<Bextr>(f)).undefined(AF | SF | PF).needs(Feature::Bmi1),
    Row::new(M::Bzhi, "BZHI-Zero High Bits Starting with Specified Bit Position", |f| vex::<Bzhi>(f))
        .undefined(AF | PF)
        .needs(Feature::Bmi2),
    Row::new(M::Pdep, "PDEP-Parallel Bits Deposit", |f| vex::<Pdep>(f)).needs(Feature::Bmi2),
    Row::new(M::Pext, "PEXT-Parallel Bits Extract", |f| vex::<Pext>(f)).needs(Feature::Bmi2),
    Row::new(M::Blsi, "BLSI-Extract Lowest Set Isolated Bit", |f| vex::<Blsi>(f))
        .undefined(AF | PF)
        .needs(Feature::Bmi1),
    Row::new(M::Blsr, "BLSR-Reset Lowest Set Bit", |f| vex::<Blsr>(f)).undefined(AF | PF).needs(Feature::Bmi1),
    Row::new(M::Blsmsk, "BLSMSK-Get Mask Up to Lowest Set Bit", |f| vex::<Blsmsk>(f))
        .undefined(AF | PF)
        .needs(Feature::Bmi1),
];

fn test<const KIND: u8>(form: &mut Form) -> Option<ExecFn> {
    match (form.dst, form.src) {
        (Loc::Reg, Loc::Reg) => by_wide!(form.bytes, W => test_reg::<W, KIND, false>),
        (Loc::Reg, Loc::Imm) => by_wide!(form.bytes, W => test_reg::<W, KIND, true>),
        (Loc::Mem, Loc::Reg) => by_wide!(form.bytes, W => test_mem::<W, KIND, false>),
        (Loc::Mem, Loc::Imm) => by_wide!(form.bytes, W => test_mem::<W, KIND, true>),
        _ => None,
    }
}

#[inline(always)]
fn changed<const KIND: u8>(a: u64, bit: u64) -> u64 {
    match KIND {
        0 => a,
        1 => a | 1 << bit,
        2 => a & !(1 << bit),
        _ => a ^ 1 << bit,
    }
}

fn test_reg<W: Word, const KIND: u8, const IMM: bool>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let bit = if IMM { op.imm } else { c.reg::<W>(op.src) } & u64::from(W::BITS - 1);
    let a = c.reg::<W>(op.dst);
    c.flags.set_cf(a >> bit & 1 != 0);
    if KIND != 0 {
        c.set_reg::<W>(op.dst, changed::<KIND>(a, bit));
    }
    Ok(())
}

/// A register bit offset is signed and reaches outside the operand ("Bit(BitBase, BitOffset)").
fn test_mem<W: Word, const KIND: u8, const IMM: bool>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let mut at = *op;
    let offset = if IMM { op.imm & u64::from(W::BITS - 1) } else { W::sext(c.reg::<W>(op.src)) };
    if !IMM {
        let words = (offset as i64) >> W::BITS.trailing_zeros();
        at.disp = at.disp.wrapping_add((words as u64).wrapping_mul(W::BYTES));
    }
    let bit = offset & u64::from(W::BITS - 1);
    let cf = if KIND == 0 {
        c.load_operand::<W>(bus, &at)? >> bit & 1 != 0
    } else {
        let lin = c.linear(&at, W::BYTES, AccessKind::Write)?;
        c.modify::<W, bool>(bus, &at, lin, |_, a| (changed::<KIND>(a, bit), a >> bit & 1 != 0))?
    };
    c.flags.set_cf(cf);
    Ok(())
}

/// A VEX-encoded operation on general registers: `apply(first source, second source)`. For the
/// one-source forms (BLSI ...) the first source is 0.
trait Vex: 'static {
    fn apply<W: Word>(a: u64, b: u64, f: &mut Flags) -> u64;
}

/// Operand order: aux bits 7:0 first source register, 15:8 second source register, bit 16: first source is
/// the memory operand, bit 17: second source is.
fn vex<O: Vex>(form: &mut Form) -> Option<ExecFn> {
    let i = form.i;
    let mut aux = 0;
    let (first, second) = if i.op_count() == 3 { (Some(1), 2) } else { (None, 1) };
    aux |= match first {
        Some(n) if i.op_kind(n) == OpKind::Memory => 1 << 16,
        Some(n) => u64::from(register_index(i.op_register(n))),
        None => u64::from(crate::op::NO_REG),
    };
    aux |= if i.op_kind(second) == OpKind::Memory {
        1 << 17
    } else {
        u64::from(register_index(i.op_register(second))) << 8
    };
    form.aux = aux;
    by_wide!(form.bytes, W => vex_any::<O, W>)
}

fn vex_any<O: Vex, W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let a = if op.aux >> 16 & 1 != 0 { c.load_operand::<W>(bus, op)? } else { c.reg::<W>(op.aux as u8) };
    let b = if op.aux >> 17 & 1 != 0 { c.load_operand::<W>(bus, op)? } else { c.reg::<W>((op.aux >> 8) as u8) };
    let r = O::apply::<W>(a, b, &mut c.flags);
    c.set_reg::<W>(op.dst, r);
    Ok(())
}

macro_rules! vex_op {
    ($name:ident, $W:ident, $a:ident, $b:ident, $f:ident => $body:expr) => {
        struct $name;
        impl Vex for $name {
            #[inline(always)]
            fn apply<$W: Word>($a: u64, $b: u64, $f: &mut Flags) -> u64 {
                $body
            }
        }
    };
}

vex_op!(Andn, W, a, b, f => {
    let r = !a & b & W::MASK;
    f.set_logic::<W>(r);
    r
});
vex_op!(Bextr, W, a, b, f => {
    let (start, len) = (b & 0xff, b >> 8 & 0xff);
    let shifted = if start < 64 { a >> start } else { 0 };
    let r = if len < 64 { shifted & ((1 << len) - 1) } else { shifted };
    f.set_logic::<W>(r);
    r
});
vex_op!(Bzhi, W, a, b, f => {
    let n = b & 0xff;
    let r = if n < u64::from(W::BITS) { a & ((1 << n) - 1) } else { a };
    f.set_logic::<W>(r);
    f.set_cf(n > u64::from(W::BITS) - 1);
    r
});
vex_op!(Pdep, W, a, b, _f => {
    let (mut r, mut mask, mut k) = (0, b, 0);
    while mask != 0 {
        r |= (a >> k & 1) << mask.trailing_zeros();
        mask &= mask - 1;
        k += 1;
    }
    r
});
vex_op!(Pext, W, a, b, _f => {
    let (mut r, mut mask, mut k) = (0, b, 0);
    while mask != 0 {
        r |= (a >> mask.trailing_zeros() & 1) << k;
        mask &= mask - 1;
        k += 1;
    }
    r
});
vex_op!(Blsi, W, _a, b, f => {
    let r = b & b.wrapping_neg() & W::MASK;
    f.set_logic::<W>(r);
    f.set_cf(b != 0);
    r
});
vex_op!(Blsr, W, _a, b, f => {
    let r = b & b.wrapping_sub(1) & W::MASK;
    f.set_logic::<W>(r);
    f.set_cf(b == 0);
    r
});
vex_op!(Blsmsk, W, _a, b, f => {
    let r = (b ^ b.wrapping_sub(1)) & W::MASK;
    f.set_logic::<W>(r);
    f.set_cf(b == 0);
    r
});
