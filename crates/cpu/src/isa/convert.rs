//! Moves that change the width, and bit counts: a destination register from a source of its own width.

use super::Row;
use crate::core::Core;
use crate::flags::Flags;
use crate::op::{Flow, Op};
use crate::operand::{Convert, convert};
use crate::word::Word;
use iced_x86::Mnemonic as M;
use umbra_arch::Bus;
use umbra_arch::cpuid::Feature;
use umbra_arch::rflags::{AF, CF, OF, PF, SF};

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Movzx, "MOVZX-Move With Zero-Extend", |f| convert::<Zero>(f)),
    Row::new(M::Movsx, "MOVSX/MOVSXD-Move With Sign-Extension", |f| convert::<Sign>(f)),
    Row::new(M::Movsxd, "MOVSX/MOVSXD-Move With Sign-Extension", |f| convert::<Sign>(f)),
    Row::new(M::Bsf, "BSF-Bit Scan Forward", |f| convert::<Bsf>(f)).undefined(CF | OF | SF | AF | PF),
    Row::new(M::Bsr, "BSR-Bit Scan Reverse", |f| convert::<Bsr>(f)).undefined(CF | OF | SF | AF | PF),
    Row::new(M::Tzcnt, "TZCNT-Count the Number of Trailing Zero Bits", |f| match f.profile.has(Feature::Bmi1) {
        true => convert::<Tzcnt>(f),
        // The prefix means nothing to older processors.
        false => convert::<Bsf>(f),
    })
    .undefined(OF | SF | AF | PF),
    Row::new(M::Lzcnt, "LZCNT-Count the Number of Leading Zero Bits", |f| match f.profile.has(Feature::Lzcnt) {
        true => convert::<Lzcnt>(f),
        false => convert::<Bsr>(f),
    })
    .undefined(OF | SF | AF | PF),
    Row::new(M::Popcnt, "POPCNT-Return the Count of Number of Bits Set to 1", |f| convert::<Popcnt>(f))
        .needs(Feature::Popcnt),
    Row::new(M::Cbw, "CBW/CWDE/CDQE-Convert", |_| Some(|c, _, _| widen::<u16, u8>(c))),
    Row::new(M::Cwde, "CBW/CWDE/CDQE-Convert", |_| Some(|c, _, _| widen::<u32, u16>(c))),
    Row::new(M::Cdqe, "CBW/CWDE/CDQE-Convert", |_| Some(|c, _, _| widen::<u64, u32>(c))),
    Row::new(M::Cwd, "CWD/CDQ/CQO-Convert", |_| Some(|c, _, _| spread::<u16>(c))),
    Row::new(M::Cdq, "CWD/CDQ/CQO-Convert", |_| Some(|c, _, _| spread::<u32>(c))),
    Row::new(M::Cqo, "CWD/CDQ/CQO-Convert", |_| Some(|c, _, _| spread::<u64>(c))),
    Row::new(M::Bswap, "BSWAP-Byte Swap", |f| match f.bytes {
        4 => Some(bswap::<u32>),
        8 => Some(bswap::<u64>),
        // Undefined; processors give 0.
        2 => Some(bswap::<u16>),
        _ => None,
    }),
];

macro_rules! conversion {
    ($name:ident, $D:ident, $S:ident, $src:ident, $f:ident => $body:expr) => {
        conversion!($name, false, $D, $S, $src, $f => $body);
    };
    ($name:ident, $keeps:literal, $D:ident, $S:ident, $src:ident, $f:ident => $body:expr) => {
        struct $name;
        impl Convert for $name {
            const ZERO_KEEPS: bool = $keeps;
            #[inline(always)]
            fn apply<$D: Word, $S: Word>($src: u64, $f: &mut Flags) -> u64 {
                $body
            }
        }
    };
}

conversion!(Zero, D, S, src, _f => src);
conversion!(Sign, D, S, src, _f => S::sext(src) & D::MASK);
// With a zero source BSF and BSR leave the destination alone and set only ZF: AMD's rule, and what
// Intel's processors do.
conversion!(Bsf, true, D, S, src, f => {
    f.set_zf(src == 0);
    u64::from(src.trailing_zeros())
});
conversion!(Bsr, true, D, S, src, f => {
    f.set_zf(src == 0);
    63u64.wrapping_sub(u64::from(src.leading_zeros()))
});
conversion!(Tzcnt, D, S, src, f => {
    let r = u64::from(src.trailing_zeros().min(S::BITS));
    f.set_cf(src == 0);
    f.set_zf(r == 0);
    r
});
conversion!(Lzcnt, D, S, src, f => {
    let r = u64::from(src.leading_zeros() - S::TOP);
    f.set_cf(src == 0);
    f.set_zf(r == 0);
    r
});
conversion!(Popcnt, D, S, src, f => {
    // Everything but ZF is cleared.
    *f = Flags { zero: src, parity: 1, ..Flags::default() };
    u64::from(src.count_ones())
});

fn widen<D: Word, S: Word>(c: &mut Core) -> Flow {
    let value = S::sext(c.gpr[0]) & D::MASK;
    c.set_reg::<D>(0, value);
    Ok(())
}

fn spread<W: Word>(c: &mut Core) -> Flow {
    let sign = if c.gpr[0] & W::SIGN != 0 { W::MASK } else { 0 };
    c.set_reg::<W>(2, sign);
    Ok(())
}

fn bswap<W: Word>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let value = if W::BITS == 16 { 0 } else { c.reg::<W>(op.dst).swap_bytes() >> W::TOP };
    c.set_reg::<W>(op.dst, value);
    Ok(())
}
