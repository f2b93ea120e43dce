//! Operand widths as types, so that each row's function is compiled once per width.

use umbra_arch::AccessWidth;

/// An unsigned integer as wide as an operand.
pub trait Word: Copy + 'static + umbra_memory::Scalar {
    /// Width in bits.
    const BITS: u32;
    /// Width in bytes.
    const BYTES: u64 = Self::BITS as u64 / 8;
    /// All bits set.
    const MASK: u64 = u64::MAX >> (64 - Self::BITS);
    /// The sign bit.
    const SIGN: u64 = 1 << (Self::BITS - 1);
    /// How far a value is shifted left to bring its sign to bit 63.
    const TOP: u32 = 64 - Self::BITS;
    /// The bus width.
    const ACCESS: AccessWidth;
    /// Low bits of a register or immediate.
    fn of(value: u64) -> Self;
    /// Zero-extended.
    fn zext(self) -> u64;
    /// Sign extension of the low bits of `value`.
    #[inline(always)]
    fn sext(value: u64) -> u64 {
        ((value << Self::TOP) as i64 >> Self::TOP) as u64
    }
}

macro_rules! word {
    ($($t:ty, $access:ident;)*) => {$(
        impl Word for $t {
            const BITS: u32 = <$t>::BITS;
            const ACCESS: AccessWidth = AccessWidth::$access;
            #[inline(always)]
            fn of(value: u64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn zext(self) -> u64 {
                self as u64
            }
        }
    )*};
}
word! { u8, Byte; u16, Word; u32, Dword; u64, Qword; }

/// Instantiates an expression for the width of `bytes` bytes: `by_width!(form.bytes, W => rr::<O, W>)`.
#[macro_export]
macro_rules! by_width {
    ($bytes:expr, $W:ident => $e:expr) => {
        match $bytes {
            1 => {
                type $W = u8;
                Some($e)
            }
            wide => $crate::by_wide!(wide, $W => $e),
        }
    };
}

/// The same without 8-bit operands.
#[macro_export]
macro_rules! by_wide {
    ($bytes:expr, $W:ident => $e:expr) => {
        match $bytes {
            2 => {
                type $W = u16;
                Some($e)
            }
            4 => {
                type $W = u32;
                Some($e)
            }
            8 => {
                type $W = u64;
                Some($e)
            }
            _ => None,
        }
    };
}
