//! Decimal adjustment and BOUND, which don't exist in 64-bit mode.

use super::Row;
use crate::by_wide;
use crate::core::Core;
use crate::flags::Flags;
use crate::op::{ExecFn, Flow, Op};
use crate::segments::SegmentUse;
use crate::word::Word;
use iced_x86::Mnemonic as M;

use umbra_arch::rflags::{AF, CF, OF, PF, SF, ZF};
use umbra_arch::state::reg;
use umbra_arch::{Bus, Fault};

/// The rows. Undefined flags: OF, and with AAM and AAD also CF and AF, become 0; AAA and AAS set SF, ZF and PF
/// from AL.
pub const ROWS: &[Row] = &[
    Row::new(M::Daa, "DAA-Decimal Adjust AL After Addition", |_| Some(packed::<false>)).undefined(OF),
    Row::new(M::Das, "DAS-Decimal Adjust AL After Subtraction", |_| Some(packed::<true>)).undefined(OF),
    Row::new(M::Aaa, "AAA-ASCII Adjust After Addition", |_| Some(unpacked::<false>)).undefined(OF | SF | ZF | PF),
    Row::new(M::Aas, "AAS-ASCII Adjust AL After Subtraction", |_| Some(unpacked::<true>)).undefined(OF | SF | ZF | PF),
    Row::new(M::Aam, "AAM-ASCII Adjust AX After Multiply", |_| Some(aam)).undefined(OF | AF | CF),
    Row::new(M::Aad, "AAD-ASCII Adjust AX Before Division", |_| Some(aad)).undefined(OF | AF | CF),
    Row::new(M::Bound, "BOUND-Check Array Index Against Bounds", |f| -> Option<ExecFn> {
        by_wide!(f.bytes, W => bound::<W>)
    }),
];

/// AL, CF and AF after DAA or DAS.
fn adjust_packed(al: u8, cf: bool, af: bool, subtract: bool) -> (u8, bool, bool) {
    let step = |value: u8, by: u8| if subtract { value.overflowing_sub(by) } else { value.overflowing_add(by) };
    let (mut result, mut carry) = (al, false);
    let low = al & 15 > 9 || af;
    if low {
        let (adjusted, out) = step(al, 6);
        (result, carry) = (adjusted, cf || out);
    }
    let high = al > 0x99 || cf;
    if high {
        result = step(result, 0x60).0;
    }
    // DAS keeps the borrow of the low adjustment, DAA forgets its carry unless the high one follows.
    let low = low && (subtract || !cfg!(umbra_mutant = "daa-clears-af"));
    (result, high || subtract && carry, low)
}

/// AX and CF = AF after AAA or AAS.
fn adjust_unpacked(ax: u16, af: bool, subtract: bool) -> (u16, bool) {
    let adjust = ax & 15 > 9 || af;
    let ax = match (adjust, subtract) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        (true, true) => ax.wrapping_sub(0x106),
    };
    (ax & 0xff0f, adjust)
}

fn set_flags(f: &mut Flags, al: u8, cf: bool, af: bool) {
    f.set_result::<u8>(u64::from(al));
    f.set_cf_of(cf, false);
    f.set_af(af);
}

fn packed<const SUBTRACT: bool>(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    let al = c.reg::<u8>(reg::RAX as u8) as u8;
    let (al, cf, af) = adjust_packed(al, c.flags.cf(), c.flags.af(), SUBTRACT);
    c.set_reg::<u8>(reg::RAX as u8, u64::from(al));
    set_flags(&mut c.flags, al, cf, af);
    Ok(())
}

fn unpacked<const SUBTRACT: bool>(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    let ax = c.reg::<u16>(reg::RAX as u8) as u16;
    let (ax, adjusted) = adjust_unpacked(ax, c.flags.af(), SUBTRACT);
    c.set_reg::<u16>(reg::RAX as u8, u64::from(ax));
    set_flags(&mut c.flags, ax as u8, adjusted, adjusted);
    Ok(())
}

fn aam(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let (al, base) = (c.reg::<u8>(reg::RAX as u8) as u8, op.imm as u8);
    let (Some(tens), Some(units)) = (al.checked_div(base), al.checked_rem(base)) else {
        return c.raise(Fault::DIVIDE);
    };
    c.set_reg::<u16>(reg::RAX as u8, u64::from(tens) << 8 | u64::from(units));
    set_flags(&mut c.flags, units, false, false);
    Ok(())
}

fn aad(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let [al, ah] = (c.reg::<u16>(reg::RAX as u8) as u16).to_le_bytes();
    let al = al.wrapping_add(ah.wrapping_mul(op.imm as u8));
    c.set_reg::<u16>(reg::RAX as u8, u64::from(al));
    set_flags(&mut c.flags, al, false, false);
    Ok(())
}

/// #BR unless lower <= index <= upper, signed. The bounds lie side by side, but are two operands: the address of the upper
/// one wraps as any does.
fn bound<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let mut bound = |c: &mut Core, distance: u64| {
        let offset = c.effective(op).wrapping_add(distance) & op.ea_mask;
        let lin = c.segmented(op.seg, offset, W::BYTES, SegmentUse::Read)?;
        c.read::<W>(bus, op, lin).map(|value| W::sext(value) as i64)
    };
    let (lower, upper) = (bound(c, 0)?, bound(c, W::BYTES)?);
    let index = W::sext(c.reg::<W>(op.dst)) as i64;
    if index < lower || index > upper {
        return c.raise(Fault::BOUND);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bcd(n: u8) -> u8 {
        ((n / 10) << 4) + n % 10
    }

    /// Packed decimal numbers add and subtract like numbers.
    #[test]
    fn packed_decimals_compute() {
        for a in 0..100 {
            for b in 0..100 {
                let (x, y) = (bcd(a), bcd(b));
                let (sum, carry) = x.overflowing_add(y);
                let (result, cf, _) = adjust_packed(sum, carry, (x & 15) + (y & 15) > 15, false);
                assert_eq!((result, cf), (bcd((a + b) % 100), a + b > 99), "{a} + {b}");
                let (difference, borrow) = x.overflowing_sub(y);
                let (result, cf, _) = adjust_packed(difference, borrow, x & 15 < y & 15, true);
                assert_eq!((result, cf), (bcd((100 + a - b) % 100), a < b), "{a} - {b}");
            }
        }
    }

    #[test]
    fn unpacked_decimals_compute() {
        for a in 0..10u8 {
            for b in 0..10u8 {
                // ASCII digits with the tens in AH.
                let (x, y) = (b'0' + a, b'0' + b);
                let sum = u16::from(x.wrapping_add(y));
                let (ax, carry) = adjust_unpacked(sum, (x & 15) + (y & 15) > 15, false);
                let n = a + b;
                assert_eq!((ax, carry), (u16::from(n / 10) << 8 | u16::from(n % 10), n > 9));
                let difference = 0x500 | u16::from(x.wrapping_sub(y));
                let (ax, borrow) = adjust_unpacked(difference, x & 15 < y & 15, true);
                let wrapped = (10 + a - b) % 10;
                // The borrow out of AL's 6 takes one more from AH only where AL went below zero.
                assert_eq!((ax as u8, borrow), (wrapped, a < b));
            }
        }
    }
}
