//! The features that Umbra knows by name, each with its one place in CPUID.

use crate::control::{Cr4, Efer};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A CPUID output register.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are the manual's")]
pub enum Register {
    Eax = 0,
    Ebx = 1,
    Ecx = 2,
    Edx = 3,
}

/// Where CPUID enumerates a feature.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Place {
    /// EAX of the CPUID instruction.
    pub leaf: u32,
    /// ECX of the CPUID instruction.
    pub subleaf: u32,
    /// Output register.
    pub register: Register,
    /// Bit in it, 0..32.
    pub bit: u8,
}

macro_rules! features {
    ($($(#[$doc:meta])* $variant:ident $name:literal $leaf:literal : $subleaf:literal $register:ident $bit:literal;)*) => {
        /// A feature that CPUID enumerates by one bit ("CPUID-CPU Identification").
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        #[repr(u8)]
        #[allow(missing_docs, reason = "the names are the manual's")]
        pub enum Feature {
            $($(#[$doc])* $variant,)*
        }

        impl Feature {
            /// Every feature, in the order of the enumeration.
            pub const ALL: &'static [Feature] = &[$(Feature::$variant,)*];

            /// The name used on the command line, as QEMU and Linux spell it.
            pub const fn name(self) -> &'static str {
                match self { $(Feature::$variant => $name,)* }
            }

            /// Where CPUID enumerates it.
            pub const fn place(self) -> Place {
                match self {
                    $(Feature::$variant => Place { leaf: $leaf, subleaf: $subleaf, register: Register::$register, bit: $bit },)*
                }
            }
        }
    };
}

features! {
    Fpu "fpu" 0x1:0 Edx 0;
    Vme "vme" 0x1:0 Edx 1;
    De "de" 0x1:0 Edx 2;
    Pse "pse" 0x1:0 Edx 3;
    Tsc "tsc" 0x1:0 Edx 4;
    Msr "msr" 0x1:0 Edx 5;
    Pae "pae" 0x1:0 Edx 6;
    Mce "mce" 0x1:0 Edx 7;
    Cx8 "cx8" 0x1:0 Edx 8;
    Apic "apic" 0x1:0 Edx 9;
    Sep "sep" 0x1:0 Edx 11;
    Mtrr "mtrr" 0x1:0 Edx 12;
    Pge "pge" 0x1:0 Edx 13;
    Mca "mca" 0x1:0 Edx 14;
    Cmov "cmov" 0x1:0 Edx 15;
    Pat "pat" 0x1:0 Edx 16;
    Pse36 "pse36" 0x1:0 Edx 17;
    Clflush "clflush" 0x1:0 Edx 19;
    Mmx "mmx" 0x1:0 Edx 23;
    Fxsr "fxsr" 0x1:0 Edx 24;
    Sse "sse" 0x1:0 Edx 25;
    Sse2 "sse2" 0x1:0 Edx 26;
    SelfSnoop "ss" 0x1:0 Edx 27;
    Sse3 "sse3" 0x1:0 Ecx 0;
    Pclmulqdq "pclmulqdq" 0x1:0 Ecx 1;
    Monitor "monitor" 0x1:0 Ecx 3;
    Ssse3 "ssse3" 0x1:0 Ecx 9;
    Fma "fma" 0x1:0 Ecx 12;
    Cx16 "cx16" 0x1:0 Ecx 13;
    Pcid "pcid" 0x1:0 Ecx 17;
    Sse41 "sse4.1" 0x1:0 Ecx 19;
    Sse42 "sse4.2" 0x1:0 Ecx 20;
    X2apic "x2apic" 0x1:0 Ecx 21;
    Movbe "movbe" 0x1:0 Ecx 22;
    Popcnt "popcnt" 0x1:0 Ecx 23;
    TscDeadline "tsc-deadline" 0x1:0 Ecx 24;
    Aes "aes" 0x1:0 Ecx 25;
    Xsave "xsave" 0x1:0 Ecx 26;
    Avx "avx" 0x1:0 Ecx 28;
    F16c "f16c" 0x1:0 Ecx 29;
    Rdrand "rdrand" 0x1:0 Ecx 30;
    Hypervisor "hypervisor" 0x1:0 Ecx 31;
    /// The local-APIC timer runs in every C-state.
    Arat "arat" 0x6:0 Eax 2;
    Fsgsbase "fsgsbase" 0x7:0 Ebx 0;
    TscAdjust "tsc_adjust" 0x7:0 Ebx 1;
    Bmi1 "bmi1" 0x7:0 Ebx 3;
    Avx2 "avx2" 0x7:0 Ebx 5;
    Smep "smep" 0x7:0 Ebx 7;
    Bmi2 "bmi2" 0x7:0 Ebx 8;
    Erms "erms" 0x7:0 Ebx 9;
    Invpcid "invpcid" 0x7:0 Ebx 10;
    /// FPU CS and DS values are saved as 0.
    ZeroFcsFds "zero-fcs-fds" 0x7:0 Ebx 13;
    Rdseed "rdseed" 0x7:0 Ebx 18;
    Adx "adx" 0x7:0 Ebx 19;
    Smap "smap" 0x7:0 Ebx 20;
    Clflushopt "clflushopt" 0x7:0 Ebx 23;
    Clwb "clwb" 0x7:0 Ebx 24;
    Sha "sha" 0x7:0 Ebx 29;
    Umip "umip" 0x7:0 Ecx 2;
    Pku "pku" 0x7:0 Ecx 3;
    Waitpkg "waitpkg" 0x7:0 Ecx 5;
    /// CET's shadow stacks.
    Shstk "shstk" 0x7:0 Ecx 7;
    Gfni "gfni" 0x7:0 Ecx 8;
    Vaes "vaes" 0x7:0 Ecx 9;
    Vpclmulqdq "vpclmulqdq" 0x7:0 Ecx 10;
    La57 "la57" 0x7:0 Ecx 16;
    Rdpid "rdpid" 0x7:0 Ecx 22;
    Pks "pks" 0x7:0 Ecx 31;
    Fsrm "fsrm" 0x7:0 Edx 4;
    MdClear "md-clear" 0x7:0 Edx 10;
    /// IBRS and IBPB.
    SpecCtrl "spec-ctrl" 0x7:0 Edx 26;
    Stibp "stibp" 0x7:0 Edx 27;
    FlushL1d "flush-l1d" 0x7:0 Edx 28;
    ArchCapabilities "arch-capabilities" 0x7:0 Edx 29;
    Ssbd "ssbd" 0x7:0 Edx 31;
    /// IA32_SPEC_CTRL.BHI_DIS_S.
    BhiCtrl "bhi-ctrl" 0x7:2 Edx 4;
    Xsaveopt "xsaveopt" 0xd:1 Eax 0;
    Xsavec "xsavec" 0xd:1 Eax 1;
    Xgetbv1 "xgetbv1" 0xd:1 Eax 2;
    Xsaves "xsaves" 0xd:1 Eax 3;
    /// KVM's asynchronous page faults, for RAM that arrives on demand.
    KvmAsyncPf "kvm-asyncpf" 0x4000_0001:0 Eax 4;
    /// Their "page ready" interrupt, without which nothing is delivered.
    KvmAsyncPfInt "kvm-asyncpf-int" 0x4000_0001:0 Eax 14;
    /// LAHF and SAHF in 64-bit mode.
    LahfLm "lahf_lm" 0x8000_0001:0 Ecx 0;
    Lzcnt "lzcnt" 0x8000_0001:0 Ecx 5;
    Prefetchw "prefetchw" 0x8000_0001:0 Ecx 8;
    Syscall "syscall" 0x8000_0001:0 Edx 11;
    Nx "nx" 0x8000_0001:0 Edx 20;
    Pdpe1gb "pdpe1gb" 0x8000_0001:0 Edx 26;
    Rdtscp "rdtscp" 0x8000_0001:0 Edx 27;
    Lm "lm" 0x8000_0001:0 Edx 29;
    /// The TSC's rate never changes.
    InvariantTsc "invtsc" 0x8000_0007:0 Edx 8;
}

/// Known by name so that asking for them is answered clearly; never offered.
const NOT_IMPLEMENTED: &[Feature] = &[Feature::Vme, Feature::Waitpkg, Feature::Shstk];

/// Features whose instructions the host executes for the guest.
const LENT_BY_HOST: &[Feature] = &[
    Feature::Fpu,
    Feature::Mmx,
    Feature::Sse,
    Feature::Sse2,
    Feature::Sse3,
    Feature::Ssse3,
    Feature::Sse41,
    Feature::Sse42,
    Feature::Pclmulqdq,
    Feature::Aes,
    Feature::Avx,
    Feature::F16c,
    Feature::Fma,
    Feature::Avx2,
    Feature::Sha,
    Feature::Gfni,
    Feature::Vaes,
    Feature::Vpclmulqdq,
];

impl Feature {
    /// The feature of that name.
    pub fn from_name(name: &str) -> Option<Feature> {
        Self::ALL.iter().copied().find(|f| f.name() == name)
    }

    /// Whether any engine does what the feature promises.
    pub fn is_implemented(self) -> bool {
        !NOT_IMPLEMENTED.contains(&self)
    }

    /// Whether its instructions are executed by the host, so that the host must have it too.
    pub fn needs_host(self) -> bool {
        LENT_BY_HOST.contains(&self)
    }

    /// Features without which this one means nothing.
    pub const fn requires(self) -> &'static [Feature] {
        use Feature::*;
        match self {
            Sse2 => &[Sse],
            Sse => &[Fxsr],
            Sse3 => &[Sse2],
            Ssse3 => &[Sse3],
            Sse41 => &[Ssse3],
            Sse42 => &[Sse41],
            Pclmulqdq | Aes | Sha | Gfni => &[Sse2],
            Avx => &[Xsave, Sse42],
            Avx2 | Fma | F16c => &[Avx],
            Vaes => &[Avx, Aes],
            Vpclmulqdq => &[Avx, Pclmulqdq],
            Pku | Xsaveopt | Xsavec | Xgetbv1 => &[Xsave],
            Xsaves => &[Xsavec],
            X2apic | TscDeadline | Arat => &[Apic],
            KvmAsyncPf => &[Hypervisor, Apic],
            KvmAsyncPfInt => &[KvmAsyncPf],
            Pse36 => &[Pse],
            Mca => &[Mce],
            Lm => &[Pae, Fxsr, Sse2, Msr],
            La57 | Pcid | Pks | Syscall | LahfLm | Pdpe1gb | Fsgsbase => &[Lm],
            Rdtscp | TscAdjust | InvariantTsc => &[Tsc],
            _ => &[],
        }
    }

    /// CR4 bits that only a CPU with this feature accepts ("Control Registers").
    pub const fn cr4_bits(self) -> u64 {
        match self {
            Feature::Vme => Cr4::VME | Cr4::PVI,
            Feature::Tsc => Cr4::TSD,
            Feature::De => Cr4::DE,
            Feature::Pse => Cr4::PSE,
            Feature::Pae => Cr4::PAE,
            Feature::Mce => Cr4::MCE,
            Feature::Pge => Cr4::PGE,
            Feature::Fxsr => Cr4::OSFXSR,
            Feature::Sse => Cr4::OSXMMEXCPT,
            Feature::Umip => Cr4::UMIP,
            Feature::La57 => Cr4::LA57,
            Feature::Fsgsbase => Cr4::FSGSBASE,
            Feature::Pcid => Cr4::PCIDE,
            Feature::Xsave => Cr4::OSXSAVE,
            Feature::Smep => Cr4::SMEP,
            Feature::Smap => Cr4::SMAP,
            Feature::Pku => Cr4::PKE,
            Feature::Shstk => Cr4::CET,
            Feature::Pks => Cr4::PKS,
            _ => 0,
        }
    }

    /// EFER bits that only a CPU with this feature accepts ("Extended Feature Enable Register").
    pub const fn efer_bits(self) -> u64 {
        match self {
            Feature::Syscall => Efer::SCE,
            Feature::Lm => Efer::LME | Efer::LMA,
            Feature::Nx => Efer::NXE,
            _ => 0,
        }
    }

    const fn mask(self) -> u128 {
        1 << self as u8
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

const _: () = assert!(Feature::ALL.len() <= 128, "FeatureSet is one u128");

/// Each feature's place, as a table: CPUID is executed often by some guests.
static PLACES: [Place; Feature::ALL.len()] = {
    let mut places = [Feature::ALL[0].place(); Feature::ALL.len()];
    let mut i = 0;
    while i < places.len() {
        places[i] = Feature::ALL[i].place();
        i += 1;
    }
    places
};

/// A set of features.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct FeatureSet(u128);

impl FeatureSet {
    /// No feature.
    pub const EMPTY: FeatureSet = FeatureSet(0);

    /// The set of these features.
    pub const fn of(features: &[Feature]) -> Self {
        let (mut set, mut i) = (0, 0);
        while i < features.len() {
            set |= features[i].mask();
            i += 1;
        }
        Self(set)
    }

    /// Every feature that is implemented.
    pub fn implemented() -> Self {
        Feature::ALL.iter().copied().filter(|f| f.is_implemented()).collect()
    }

    /// Whether `feature` is in the set.
    #[inline]
    pub const fn has(&self, feature: Feature) -> bool {
        self.0 & feature.mask() != 0
    }

    /// The set with every feature of `other`.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Adds `feature` and what it requires.
    pub fn insert(&mut self, feature: Feature) {
        self.0 |= feature.mask();
        for &needed in feature.requires() {
            self.insert(needed);
        }
    }

    /// Removes `feature` and what requires it.
    pub fn remove(&mut self, feature: Feature) {
        self.0 &= !feature.mask();
        for &other in Feature::ALL {
            if self.has(other) && other.requires().contains(&feature) {
                self.remove(other);
            }
        }
    }

    /// The features in the set, in the order of the enumeration.
    pub fn iter(&self) -> impl Iterator<Item = Feature> + use<> {
        let set = *self;
        Feature::ALL.iter().copied().filter(move |&f| set.has(f))
    }

    /// The bits that the set gives in EAX, EBX, ECX and EDX of one leaf.
    pub fn registers(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let mut out = [0; 4];
        for (i, place) in PLACES.iter().enumerate() {
            if place.leaf == leaf && place.subleaf == subleaf {
                out[place.register as usize] |= ((self.0 >> i & 1) as u32) << place.bit;
            }
        }
        out
    }
}

impl FromIterator<Feature> for FeatureSet {
    fn from_iter<T: IntoIterator<Item = Feature>>(features: T) -> Self {
        Self(features.into_iter().fold(0, |set, f| set | f.mask()))
    }
}

impl fmt::Debug for FeatureSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(Feature::name)).finish()
    }
}
