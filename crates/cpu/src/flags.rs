//! Status flags kept as the values they follow from; materialised only when something reads them.

use crate::word::Word;
use umbra_arch::rflags;

/// Lazy CF, PF, AF, ZF, SF and OF.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flags {
    /// ZF is 1 exactly when this is 0.
    pub zero: u64,
    /// SF is bit 63.
    pub sign: u64,
    /// CF is bit 63, OF is bit 63 xor bit 62: the top of the carry-out vector.
    pub carry: u64,
    /// AF is bit 4.
    pub aux: u8,
    /// PF is the parity of this byte.
    pub parity: u8,
}

impl Flags {
    /// From RFLAGS' status bits.
    #[inline(always)]
    pub fn from_rflags(value: u64) -> Self {
        let cf = value & rflags::CF;
        let of = value >> 11 & 1;
        Self {
            zero: u64::from(value & rflags::ZF == 0),
            sign: (value & rflags::SF) << 56,
            carry: cf << 63 | (cf ^ of) << 62,
            aux: (value & rflags::AF) as u8,
            parity: u8::from(value & rflags::PF == 0),
        }
    }

    /// RFLAGS' status bits, others 0.
    #[inline(always)]
    pub fn to_rflags(self) -> u64 {
        u64::from(self.cf())
            | u64::from(self.pf()) << 2
            | u64::from(self.aux & 0x10)
            | u64::from(self.zf()) << 6
            | u64::from(self.sf()) << 7
            | u64::from(self.of()) << 11
    }

    /// CF.
    #[inline(always)]
    pub fn cf(&self) -> bool {
        self.carry >> 63 != 0
    }
    /// PF.
    #[inline(always)]
    pub fn pf(&self) -> bool {
        self.parity.count_ones() & 1 == 0
    }
    /// AF.
    #[inline(always)]
    pub fn af(&self) -> bool {
        self.aux & 0x10 != 0
    }
    /// ZF.
    #[inline(always)]
    pub fn zf(&self) -> bool {
        self.zero == 0
    }
    /// SF.
    #[inline(always)]
    pub fn sf(&self) -> bool {
        self.sign >> 63 != 0
    }
    /// OF.
    #[inline(always)]
    pub fn of(&self) -> bool {
        (self.carry ^ self.carry << 1) >> 63 != 0
    }

    /// After `r = a + b (+ carry)`; all masked to the width.
    #[inline(always)]
    pub fn set_add<W: Word>(&mut self, a: u64, b: u64, r: u64) {
        self.carry = ((a & b) | ((a | b) & !r)) << W::TOP;
        self.aux = (a ^ b ^ r) as u8;
        self.set_result::<W>(r);
    }
    /// After `r = a - b (- borrow)`; all masked to the width.
    #[inline(always)]
    pub fn set_sub<W: Word>(&mut self, a: u64, b: u64, r: u64) {
        self.carry = ((!a & b) | (!(a ^ b) & r)) << W::TOP;
        self.aux = (a ^ b ^ r) as u8;
        self.set_result::<W>(r);
    }
    /// After AND, OR, XOR, TEST: CF, OF and (our choice of the undefined) AF are 0.
    #[inline(always)]
    pub fn set_logic<W: Word>(&mut self, r: u64) {
        self.carry = 0;
        self.aux = 0;
        self.set_result::<W>(r);
    }
    /// ZF, SF and PF from a result masked to the width.
    #[inline(always)]
    pub fn set_result<W: Word>(&mut self, r: u64) {
        self.zero = r;
        self.sign = r << W::TOP;
        self.parity = r as u8;
    }
    /// CF and OF alone.
    #[inline(always)]
    pub fn set_cf_of(&mut self, cf: bool, of: bool) {
        self.carry = u64::from(cf) << 63 | u64::from(cf ^ of) << 62;
    }
    /// CF alone; OF stays.
    #[inline(always)]
    pub fn set_cf(&mut self, cf: bool) {
        let of = self.of();
        self.set_cf_of(cf, of);
    }
    /// OF alone; CF stays.
    #[inline(always)]
    pub fn set_of(&mut self, of: bool) {
        let cf = self.cf();
        self.set_cf_of(cf, of);
    }
    /// AF alone.
    #[inline(always)]
    pub fn set_af(&mut self, af: bool) {
        self.aux = u8::from(af) << 4;
    }
    /// ZF alone.
    #[inline(always)]
    pub fn set_zf(&mut self, zf: bool) {
        self.zero = u64::from(!zf);
    }

    /// The condition of Jcc, SETcc and CMOVcc with encoding `CC` (0..16).
    #[inline(always)]
    pub fn condition<const CC: u8>(&self) -> bool {
        let value = match CC >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() || self.sf() != self.of(),
        };
        value != (CC & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_survives_the_round_trip() {
        for bits in 0..64u64 {
            let names = [rflags::CF, rflags::PF, rflags::AF, rflags::ZF, rflags::SF, rflags::OF];
            let value = (0..6).filter(|i| bits >> i & 1 != 0).map(|i| names[i]).fold(0, |a, b| a | b);
            let mut flags = Flags::from_rflags(value);
            assert_eq!(flags.to_rflags(), value);
            flags.set_cf(true);
            assert_eq!(flags.to_rflags(), value | rflags::CF);
            flags.set_of(false);
            assert_eq!(flags.to_rflags(), (value | rflags::CF) & !rflags::OF);
        }
    }

    #[test]
    fn byte_addition_and_subtraction_agree_with_plain_arithmetic() {
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                let mut f = Flags::default();
                let (r, carry) = a.overflowing_add(b);
                f.set_add::<u8>(a.into(), b.into(), r.into());
                assert_eq!((f.cf(), f.of()), (carry, (a as i8).overflowing_add(b as i8).1));
                assert_eq!((f.af(), f.zf(), f.sf()), ((a & 15) + (b & 15) > 15, r == 0, r >= 128));
                let (r, borrow) = a.overflowing_sub(b);
                f.set_sub::<u8>(a.into(), b.into(), r.into());
                assert_eq!((f.cf(), f.of()), (borrow, (a as i8).overflowing_sub(b as i8).1));
                assert_eq!((f.af(), f.pf()), (a & 15 < b & 15, r.count_ones() % 2 == 0));
            }
        }
    }
}
