//! Integer addition, subtraction, logic and comparison.

use super::Row;
use crate::flags::Flags;
use crate::operand::{Binary, Unary, binary, unary};
use crate::word::Word;
use iced_x86::Mnemonic as M;
use umbra_arch::cpuid::Feature;
use umbra_arch::rflags::AF;

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Add, "ADD-Add", |f| binary::<Add>(f)),
    Row::new(M::Adc, "ADC-Add With Carry", |f| binary::<Adc>(f)),
    Row::new(M::Sub, "SUB-Subtract", |f| binary::<Sub>(f)),
    Row::new(M::Sbb, "SBB-Integer Subtraction With Borrow", |f| binary::<Sbb>(f)),
    Row::new(M::Cmp, "CMP-Compare Two Operands", |f| binary::<Cmp>(f)),
    Row::new(M::And, "AND-Logical AND", |f| binary::<And>(f)).undefined(AF),
    Row::new(M::Or, "OR-Logical Inclusive OR", |f| binary::<Or>(f)).undefined(AF),
    Row::new(M::Xor, "XOR-Logical Exclusive OR", |f| binary::<Xor>(f)).undefined(AF),
    Row::new(M::Test, "TEST-Logical Compare", |f| binary::<Test>(f)).undefined(AF),
    Row::new(M::Adcx, "ADCX-Unsigned Integer Addition of Two Operands With Carry Flag", |f| binary::<Adcx>(f))
        .needs(Feature::Adx),
    Row::new(M::Adox, "ADOX-Unsigned Integer Addition of Two Operands With Overflow Flag", |f| binary::<Adox>(f))
        .needs(Feature::Adx),
    Row::new(M::Inc, "INC-Increment by 1", |f| unary::<Inc>(f)),
    Row::new(M::Dec, "DEC-Decrement by 1", |f| unary::<Dec>(f)),
    Row::new(M::Neg, "NEG-Two's Complement Negation", |f| unary::<Neg>(f)),
    Row::new(M::Not, "NOT-One's Complement Negation", |f| unary::<Not>(f)),
];

macro_rules! binary_op {
    ($name:ident, $W:ident, $a:ident, $b:ident, $f:ident => $body:expr) => {
        binary_op!($name, true, $W, $a, $b, $f => $body);
    };
    ($name:ident, $writes:literal, $W:ident, $a:ident, $b:ident, $f:ident => $body:expr) => {
        /// The pure function of the row of this name.
        pub struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn apply<$W: Word>($a: u64, $b: u64, $f: &mut Flags) -> u64 {
                $body
            }
        }
    };
}

binary_op!(Add, W, a, b, f => {
    let r = a.wrapping_add(b) & W::MASK;
    f.set_add::<W>(a, b, r);
    r
});
binary_op!(Adc, W, a, b, f => {
    let r = a.wrapping_add(b).wrapping_add(u64::from(f.cf())) & W::MASK;
    f.set_add::<W>(a, b, r);
    r
});
binary_op!(Sub, W, a, b, f => {
    let r = a.wrapping_sub(b) & W::MASK;
    f.set_sub::<W>(a, b, r);
    r
});
binary_op!(Sbb, W, a, b, f => {
    let r = a.wrapping_sub(b).wrapping_sub(u64::from(f.cf())) & W::MASK;
    f.set_sub::<W>(a, b, r);
    r
});
binary_op!(Cmp, false, W, a, b, f => {
    let r = a.wrapping_sub(b) & W::MASK;
    f.set_sub::<W>(a, b, r);
    r
});
binary_op!(And, W, a, b, f => {
    f.set_logic::<W>(a & b);
    a & b
});
binary_op!(Or, W, a, b, f => {
    f.set_logic::<W>(a | b);
    a | b
});
binary_op!(Xor, W, a, b, f => {
    f.set_logic::<W>(a ^ b);
    a ^ b
});
binary_op!(Test, false, W, a, b, f => {
    f.set_logic::<W>(a & b);
    a & b
});
binary_op!(Adcx, W, a, b, f => {
    let sum = u128::from(a) + u128::from(b) + u128::from(f.cf());
    f.set_cf(sum >> W::BITS != 0);
    sum as u64 & W::MASK
});
binary_op!(Adox, W, a, b, f => {
    let sum = u128::from(a) + u128::from(b) + u128::from(f.of());
    f.set_of(sum >> W::BITS != 0);
    sum as u64 & W::MASK
});

macro_rules! unary_op {
    ($name:ident, $W:ident, $a:ident, $f:ident => $body:expr) => {
        /// The pure function of the row of this name.
        pub struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn apply<$W: Word>($a: u64, $f: &mut Flags) -> u64 {
                $body
            }
        }
    };
}

unary_op!(Inc, W, a, f => {
    let r = a.wrapping_add(1) & W::MASK;
    let cf = f.cf();
    f.set_add::<W>(a, 1, r);
    f.set_cf_of(cf, r == W::SIGN);
    r
});
unary_op!(Dec, W, a, f => {
    let r = a.wrapping_sub(1) & W::MASK;
    let cf = f.cf();
    f.set_sub::<W>(a, 1, r);
    f.set_cf_of(cf, a == W::SIGN);
    r
});
unary_op!(Neg, W, a, f => {
    let r = a.wrapping_neg() & W::MASK;
    f.set_sub::<W>(0, a, r);
    r
});
unary_op!(Not, W, a, _f => !a & W::MASK);
