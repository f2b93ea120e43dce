//! CPUID: what of a profile KVM can hold, and its leaves.

use super::error::{KvmError, failed};
use super::irqchip::Irqchip;
use super::probe;
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use umbra_arch::control::Cr4;
use umbra_arch::cpuid::{CpuidDynamic, CpuidProfile, Feature, HostOffer, xsave};
use umbra_arch::fpu::xcr0;
use umbra_arch::msr::MONITOR_ENABLED;

/// Features that need KVM's own local APIC.
const NOT_WITHOUT_IRQCHIP: [Feature; 2] = [Feature::X2apic, Feature::TscDeadline];
/// Features that are ours alone to give, whatever KVM lists.
const OURS: [Feature; 3] = [Feature::Apic, Feature::Arat, Feature::Hypervisor];
/// Leaves that describe the TSC's frequency, which is the host's.
const TSC_LEAVES: [u32; 2] = [0x15, 0x16];
/// Last leaves of the three ranges.
const RANGES: [(u32, u32); 3] = [(0, 0x16), (0x4000_0000, 0x4000_0000), (0x8000_0000, 0x8000_0008)];

/// A profile as far as KVM can hold it.
#[derive(Clone, Debug)]
pub struct Fitted {
    /// What the guest sees, and what engines must have that are to continue or to be compared with it.
    pub profile: CpuidProfile,
    /// What of the profile asked for had to go.
    pub dropped: Vec<Feature>,
    /// What KVM doesn't list as supported and the guest sees nevertheless: a backend without a way to intercept
    /// CPUID shows the host's features.
    pub shown: Vec<Feature>,
    /// Where the local APIC is.
    pub irqchip: Irqchip,
    /// What KVM is told to offer.
    pub(super) offered: CpuidProfile,
}

impl Fitted {
    /// What KVM says that it can do: less than the guest sees where CPUID can't be intercepted.
    pub fn offered(&self) -> &CpuidProfile {
        &self.offered
    }

    /// A profile that a guest is taken to see as it is.
    pub(super) fn exactly(profile: CpuidProfile, irqchip: Irqchip) -> Self {
        Self { offered: profile.clone(), profile, dropped: Vec::new(), shown: Vec::new(), irqchip }
    }
}

/// Takes out of `profile` what KVM on this host doesn't have, with such a local APIC.
///
/// # Errors
/// [`KvmError`] when there is no usable KVM.
pub fn fit(profile: &CpuidProfile, irqchip: Irqchip) -> Result<Fitted, KvmError> {
    let kvm = Kvm::new().map_err(|error| KvmError::Open(error.into()))?;
    let has_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    let mut fitted = fit_to(profile, &answers(supported.as_slice()), irqchip, has_deadline);
    fitted.profile.features = probe::seen(&fitted.offered)?;
    fitted.shown = fitted.profile.features.iter().filter(|feature| !fitted.offered.has(*feature)).collect();
    fitted.dropped = profile.features.iter().filter(|feature| !fitted.profile.has(*feature)).collect();
    Ok(fitted)
}

type Answer = ((u32, u32), [u32; 4]);

fn answers(entries: &[kvm_cpuid_entry2]) -> Vec<Answer> {
    entries.iter().map(|e| ((e.function, e.index), [e.eax, e.ebx, e.ecx, e.edx])).collect()
}

fn fit_to(profile: &CpuidProfile, supported: &[Answer], irqchip: Irqchip, has_deadline: bool) -> Fitted {
    let answer = |leaf, subleaf| {
        supported.iter().find(|(at, _)| *at == (leaf, subleaf)).map_or([0; 4], |(_, registers)| *registers)
    };
    let offer = HostOffer::from_cpuid(answer);
    // With XSAVE the guest sees the processor's own layout of the area.
    let same_layout = xsave::component(9).is_none_or(|pkru| answer(0xd, 9)[1] == pkru.offset);
    let lacks = |feature: Feature| {
        irqchip == Irqchip::User && NOT_WITHOUT_IRQCHIP.contains(&feature)
            || match feature {
                // Older kernels list it elsewhere only.
                Feature::TscDeadline => !has_deadline,
                // A TSC of our frequency: never.
                Feature::InvariantTsc => true,
                Feature::Pku if !same_layout => true,
                _ => !OURS.contains(&feature) && !offer.features.has(feature),
            }
    };
    let mut fitted = profile.clone();
    profile.features.iter().filter(|feature| lacks(*feature)).for_each(|feature| fitted.features.remove(feature));
    Fitted::exactly(fitted, irqchip)
}

/// The leaves of a profile, for KVM_SET_CPUID2. KVM itself keeps the bits that mirror control registers.
pub(super) fn entries(profile: &CpuidProfile, apic_id: u32) -> Result<CpuId, KvmError> {
    let dynamic = CpuidDynamic {
        cr4: Cr4::new(0),
        xcr0: xcr0::X87,
        xss: 0,
        misc_enable: MONITOR_ENABLED,
        apic_id,
        apic_enabled: true,
        cpus: 1,
    };
    let mut entries = Vec::new();
    for (first, last) in RANGES {
        for leaf in (first..=last).filter(|leaf| !TSC_LEAVES.contains(leaf)) {
            for subleaf in subleaves(leaf) {
                let [eax, ebx, ecx, edx] = profile.cpuid(leaf, *subleaf, dynamic);
                let flags = if subleaves(leaf).len() > 1 { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
                entries.push(kvm_cpuid_entry2 {
                    function: leaf,
                    index: *subleaf,
                    flags,
                    eax,
                    ebx,
                    ecx,
                    edx,
                    ..Default::default()
                });
            }
        }
    }
    CpuId::from_entries(&entries).map_err(|_| KvmError::Missing("room for the CPUID profile's leaves"))
}

fn subleaves(leaf: u32) -> &'static [u32] {
    match leaf {
        0x4 => &[0, 1, 2, 3, 4],
        0x7 => &[0, 1, 2],
        0xb => &[0, 1],
        0xd => &[0, 1, 2, 9],
        _ => &[0],
    }
}
