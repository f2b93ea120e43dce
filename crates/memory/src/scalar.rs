//! The integer widths that an access can have.

mod sealed {
    pub trait Sealed {}
}

/// An integer that guest memory can load, store and exchange. Sealed: every bit pattern is a value.
pub trait Scalar: Copy + Eq + Default + sealed::Sealed + 'static {}

macro_rules! scalar {
    ($($t:ty)*) => {$(
        impl sealed::Sealed for $t {}
        impl Scalar for $t {}
    )*};
}

scalar!(u8 u16 u32 u64 u128);
