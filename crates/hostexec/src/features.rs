//! What the host CPU can execute.

use iced_x86::CpuidFeature;
use std::arch::is_x86_feature_detected as detected;

macro_rules! host_features {
    ($($(#[$doc:meta])* $field:ident $name:tt [$($iced:ident)|*];)*) => {
        /// Instruction sets of the host CPU that guests' instructions can be run with.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub struct HostFeatures { $($(#[$doc])* pub $field: bool,)* }

        /// Asks the host CPU.
        pub fn host_features() -> HostFeatures {
            HostFeatures { $($field: detected!($name),)* }
        }

        impl HostFeatures {
            /// Every feature with its CPUID name.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, bool)> {
                [$(($name, self.$field)),*].into_iter()
            }
            /// `None`: this crate doesn't run that instruction set. Else its name and whether the host has it.
            pub(crate) fn lookup(&self, feature: CpuidFeature) -> Option<(&'static str, bool)> {
                match feature {
                    $($(CpuidFeature::$iced)|* => Some(($name, self.$field)),)*
                    _ => None,
                }
            }
        }
    };
}

host_features! {
    /// SSE; MMX, x87 and CMOV come with it.
    sse "sse" [SSE | MMX | FPU | FPU287 | FPU387 | CMOV | INTEL8086 | INTEL186 | INTEL286 | INTEL386 | INTEL486 | X64 | CX8];
    /// SSE2.
    sse2 "sse2" [SSE2];
    /// SSE3.
    sse3 "sse3" [SSE3];
    /// SSSE3.
    ssse3 "ssse3" [SSSE3];
    /// SSE4.1.
    sse4_1 "sse4.1" [SSE4_1];
    /// SSE4.2.
    sse4_2 "sse4.2" [SSE4_2];
    /// AES-NI.
    aes "aes" [AES];
    /// Carry-less multiplication.
    pclmulqdq "pclmulqdq" [PCLMULQDQ];
    /// SHA-1 and SHA-256.
    sha "sha" [SHA];
    /// Galois-field instructions.
    gfni "gfni" [GFNI];
    /// AVX.
    avx "avx" [AVX];
    /// AVX2.
    avx2 "avx2" [AVX2];
    /// Fused multiply-add.
    fma "fma" [FMA];
    /// Half-precision conversion.
    f16c "f16c" [F16C];
    /// AES on YMM registers.
    vaes "vaes" [VAES];
    /// Carry-less multiplication on YMM registers.
    vpclmulqdq "vpclmulqdq" [VPCLMULQDQ];
    /// MOVBE.
    movbe "movbe" [MOVBE];
    /// POPCNT.
    popcnt "popcnt" [POPCNT];
    /// LZCNT.
    lzcnt "lzcnt" [LZCNT];
    /// Bit manipulation 1.
    bmi1 "bmi1" [BMI1];
    /// Bit manipulation 2.
    bmi2 "bmi2" [BMI2];
    /// ADCX and ADOX.
    adx "adx" [ADX];
    /// CMPXCHG16B.
    cmpxchg16b "cmpxchg16b" [CMPXCHG16B];
    /// RDRAND (never run for a guest: it isn't deterministic).
    rdrand "rdrand" [RDRAND];
    /// RDSEED (never run for a guest: it isn't deterministic).
    rdseed "rdseed" [RDSEED];
}
