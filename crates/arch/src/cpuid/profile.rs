//! Named CPU models.

use super::feature::{Feature, FeatureSet};
use crate::control::{ControlLimits, Cr4};
use crate::fpu::xcr0;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Who "made" the CPU.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub enum Vendor {
    /// GenuineIntel.
    #[default]
    Intel,
    /// AuthenticAMD.
    Amd,
}

impl Vendor {
    /// The 12 characters of leaf 0.
    pub const fn signature(self) -> &'static str {
        match self {
            Vendor::Intel => "GenuineIntel",
            Vendor::Amd => "AuthenticAMD",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Vendor::Intel, Vendor::Amd].into_iter().find(|v| v.signature() == name)
    }

    /// A family and model that no guest's list of broken or vulnerable models names.
    const fn family_model_stepping(self) -> (u16, u8, u8) {
        match self {
            Vendor::Intel => (6, 0x8f, 8),
            Vendor::Amd => (0x19, 0x11, 1),
        }
    }
}

/// What the host's CPU lends to engines that execute guest instructions on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HostOffer {
    /// Features that CPUID enumerates there.
    pub features: FeatureSet,
}

impl HostOffer {
    /// Reads the offer with `cpuid(leaf, subleaf)`, which answers EAX, EBX, ECX, EDX as the host does.
    pub fn from_cpuid(mut cpuid: impl FnMut(u32, u32) -> [u32; 4]) -> Self {
        let (basic, extended) = (cpuid(0, 0)[0], cpuid(0x8000_0000, 0)[0]);
        let features = Feature::ALL.iter().copied().filter(|f| {
            let p = f.place();
            let last = if p.leaf >= 0x8000_0000 { extended } else { basic };
            p.leaf <= last && cpuid(p.leaf, p.subleaf)[p.register as usize] >> p.bit & 1 != 0
        });
        Self { features: features.collect() }
    }
}

/// A feature of the profile that the host must have and hasn't.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("this host's CPU has no {feature}, which the guest CPU offers: choose --cpu umbra-v2 or add -{feature}")]
pub struct MissingFeature {
    /// The feature.
    pub feature: Feature,
}

/// A CPU model that can't be had.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadProfile {
    /// No model of that name.
    #[error("no CPU model {0:?}: choose one of {names}", names = PROFILE_NAMES.join(", "))]
    UnknownModel(String),
    /// No feature of that name.
    #[error("no CPU feature {0:?}")]
    UnknownFeature(String),
    /// Not `+feature`, `-feature` or `vendor=V`.
    #[error("{0:?} is not +feature, -feature or vendor=GenuineIntel|AuthenticAMD")]
    UnknownOption(String),
    /// Known but not implemented.
    #[error("the CPU feature {0} is not implemented")]
    NotImplemented(Feature),
    /// The host can't run it.
    #[error(transparent)]
    Host(#[from] MissingFeature),
}

/// The models that [`CpuidProfile::named`] knows; the first is the default.
pub const PROFILE_NAMES: [&str; 3] = ["umbra-v3", "umbra-v2", "max"];

/// A virtual CPU's model: everything that CPUID's answers derive from, apart from run-time state.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CpuidProfile {
    /// The model's name.
    pub name: String,
    /// Vendor.
    pub vendor: Vendor,
    /// Family, extended family added in.
    pub family: u16,
    /// Model, extended model included.
    pub model: u8,
    /// Stepping, 0..16.
    pub stepping: u8,
    /// Brand string of leaves 80000002h..80000004h, at most 47 bytes.
    pub brand: String,
    /// What it has.
    pub features: FeatureSet,
    /// MAXPHYADDR: physical-address bits.
    pub maxphyaddr: u8,
}

const V2: FeatureSet = {
    use Feature::*;
    FeatureSet::of(&[
        Fpu,
        De,
        Pse,
        Tsc,
        Msr,
        Pae,
        Mce,
        Cx8,
        Apic,
        Sep,
        Mtrr,
        Pge,
        Mca,
        Cmov,
        Pat,
        Pse36,
        Clflush,
        Mmx,
        Fxsr,
        Sse,
        Sse2,
        SelfSnoop,
        Sse3,
        Ssse3,
        Cx16,
        Pcid,
        Sse41,
        Sse42,
        X2apic,
        Popcnt,
        TscDeadline,
        Hypervisor,
        Arat,
        Fsgsbase,
        TscAdjust,
        Smep,
        Erms,
        Invpcid,
        ZeroFcsFds,
        Smap,
        Clflushopt,
        Clwb,
        Umip,
        Rdpid,
        Rdrand,
        Rdseed,
        SpecCtrl,
        Stibp,
        Ssbd,
        BhiCtrl,
        MdClear,
        FlushL1d,
        ArchCapabilities,
        LahfLm,
        Prefetchw,
        Syscall,
        Nx,
        Pdpe1gb,
        Rdtscp,
        Lm,
        InvariantTsc,
    ])
};

const V3: FeatureSet = {
    use Feature::*;
    V2.union(FeatureSet::of(&[
        Pclmulqdq, Fma, Movbe, Aes, Xsave, Avx, F16c, Bmi1, Avx2, Bmi2, Adx, Pku, Xsaveopt, Xsavec, Xgetbv1, Xsaves,
        Lzcnt,
    ]))
};

impl Default for CpuidProfile {
    fn default() -> Self {
        Self::of("umbra-v3", V3)
    }
}

impl CpuidProfile {
    fn of(name: &str, features: FeatureSet) -> Self {
        let vendor = Vendor::Intel;
        let (family, model, stepping) = vendor.family_model_stepping();
        let brand = format!("Umbra virtual CPU ({name})");
        Self { name: name.to_owned(), vendor, family, model, stepping, brand, features, maxphyaddr: 46 }
    }

    /// The model of that name: `umbra-v3` (x86-64-v3 and the system features of its time), `umbra-v2` (the
    /// same without AVX and XSAVE), `max` (everything implemented; see [`CpuidProfile::limit_to`]).
    pub fn named(name: &str) -> Option<Self> {
        let features = match name {
            "umbra-v3" => V3,
            "umbra-v2" => V2,
            "max" => {
                let mut all = FeatureSet::implemented();
                // LA57 makes a kernel leave long mode during boot; it is there for who names it.
                all.remove(Feature::La57);
                // A guest that idles by HLT wakes for its own interrupts only.
                all.remove(Feature::Monitor);
                // Means something only where pages arrive on demand.
                all.remove(Feature::KvmAsyncPf);
                all
            }
            _ => return None,
        };
        Some(Self::of(name, features))
    }

    /// A model with changes, as in `umbra-v3,+la57,-avx2,vendor=AuthenticAMD`, for a host: `max` becomes
    /// what the host can run, and any other model is refused if the host can't run it.
    ///
    /// # Errors
    /// [`BadProfile`] names the part that can't be had.
    pub fn parse(text: &str, host: &HostOffer) -> Result<Self, BadProfile> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        let mut profile = Self::named(name).ok_or_else(|| BadProfile::UnknownModel(name.to_owned()))?;
        if name == "max" {
            profile.limit_to(host);
        }
        for part in parts {
            profile.apply(part)?;
        }
        profile.restrict_to(host)?;
        Ok(profile)
    }

    fn apply(&mut self, option: &str) -> Result<(), BadProfile> {
        let feature = |name: &str| Feature::from_name(name).ok_or_else(|| BadProfile::UnknownFeature(name.to_owned()));
        if let Some(name) = option.strip_prefix('+') {
            let feature = feature(name)?;
            if !feature.is_implemented() {
                return Err(BadProfile::NotImplemented(feature));
            }
            self.features.insert(feature);
        } else if let Some(name) = option.strip_prefix('-') {
            self.features.remove(feature(name)?);
        } else {
            let vendor = option.strip_prefix("vendor=").and_then(Vendor::from_name);
            self.vendor = vendor.ok_or_else(|| BadProfile::UnknownOption(option.to_owned()))?;
            (self.family, self.model, self.stepping) = self.vendor.family_model_stepping();
        }
        Ok(())
    }

    /// Takes away what the host would have to lend and can't.
    pub fn limit_to(&mut self, host: &HostOffer) {
        while let Err(MissingFeature { feature }) = self.restrict_to(host) {
            self.features.remove(feature);
        }
    }

    /// Checks that the host has every feature whose instructions it executes for the guest.
    ///
    /// # Errors
    /// The first feature that is missing.
    pub fn restrict_to(&self, host: &HostOffer) -> Result<(), MissingFeature> {
        match self.features.iter().find(|f| f.needs_host() && !host.features.has(*f)) {
            Some(feature) => Err(MissingFeature { feature }),
            None => Ok(()),
        }
    }

    /// Whether the CPU has `feature`.
    #[inline]
    pub const fn has(&self, feature: Feature) -> bool {
        self.features.has(feature)
    }

    /// Linear-address bits that leaf 80000008h reports: 48, or 57 with LA57.
    pub const fn linear_bits(&self) -> u8 {
        if self.has(Feature::La57) { 57 } else { 48 }
    }

    /// CPUID.1:EAX, and RDX after reset.
    pub const fn signature(&self) -> u32 {
        let (family, extended) = if self.family > 15 { (15, self.family as u32 - 15) } else { (self.family as u32, 0) };
        self.stepping as u32
            | (self.model as u32 & 15) << 4
            | family << 8
            | (self.model as u32 >> 4) << 16
            | extended << 20
    }

    /// What control registers accept.
    pub fn control_limits(&self) -> ControlLimits {
        let bits = |of: fn(Feature) -> u64| self.features.iter().fold(0, |bits, f| bits | of(f));
        ControlLimits {
            maxphyaddr: self.maxphyaddr,
            // RDPMC itself exists since long before CPUID says anything about counters.
            cr4_allowed: bits(Feature::cr4_bits) | Cr4::PCE,
            efer_allowed: bits(Feature::efer_bits),
        }
    }

    /// XCR0 bits that XSETBV accepts; 0 without XSAVE.
    pub const fn xcr0_supported(&self) -> u64 {
        if !self.has(Feature::Xsave) {
            return 0;
        }
        let avx = if self.has(Feature::Avx) { xcr0::AVX } else { 0 };
        let pkru = if self.has(Feature::Pku) { xcr0::PKRU } else { 0 };
        xcr0::X87 | xcr0::SSE | avx | pkru
    }

    /// IA32_XSS bits that WRMSR accepts: no supervisor state component exists.
    pub const fn xss_supported(&self) -> u64 {
        0
    }

    /// IA32_ARCH_CAPABILITIES; 0 where the MSR doesn't exist. An emulator has none of the flaws that
    /// guests would work around at a price ("IA32_ARCH_CAPABILITIES").
    pub const fn arch_capabilities(&self) -> u64 {
        if self.has(Feature::ArchCapabilities) { arch_capability::FLAWLESS } else { 0 }
    }

    /// IA32_SPEC_CTRL bits that WRMSR accepts; 0 where the MSR doesn't exist. BHI_DIS_S is there for guests that
    /// otherwise run a loop in each SYSCALL, whatever IA32_ARCH_CAPABILITIES.BHI_NO says.
    pub const fn spec_ctrl_supported(&self) -> u64 {
        self.has(Feature::SpecCtrl) as u64
            | (self.has(Feature::Stibp) as u64) << 1
            | (self.has(Feature::Ssbd) as u64) << 2
            | (self.has(Feature::BhiCtrl) as u64) << 10
    }
}

impl fmt::Display for CpuidProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.vendor.signature())?;
        self.features.iter().try_for_each(|feature| write!(f, " {feature}"))
    }
}

/// Bits of IA32_ARCH_CAPABILITIES.
mod arch_capability {
    const RDCL_NO: u64 = 1 << 0;
    const IBRS_ALL: u64 = 1 << 1;
    const SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
    const SSB_NO: u64 = 1 << 4;
    const MDS_NO: u64 = 1 << 5;
    const IF_PSCHANGE_MC_NO: u64 = 1 << 6;
    const TAA_NO: u64 = 1 << 8;
    const SBDR_SSDP_NO: u64 = 1 << 13;
    const FBSDP_NO: u64 = 1 << 14;
    const PSDP_NO: u64 = 1 << 15;
    const BHI_NO: u64 = 1 << 20;
    const PBRSB_NO: u64 = 1 << 24;
    const GDS_NO: u64 = 1 << 26;
    const RFDS_NO: u64 = 1 << 27;
    const ITS_NO: u64 = 1 << 62;

    /// Not vulnerable to anything, and enhanced IBRS instead of retpolines.
    pub const FLAWLESS: u64 = RDCL_NO
        | IBRS_ALL
        | SKIP_L1DFL_VMENTRY
        | SSB_NO
        | MDS_NO
        | IF_PSCHANGE_MC_NO
        | TAA_NO
        | SBDR_SSDP_NO
        | FBSDP_NO
        | PSDP_NO
        | BHI_NO
        | PBRSB_NO
        | GDS_NO
        | RFDS_NO
        | ITS_NO;
}
