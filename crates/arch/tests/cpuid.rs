//! CPUID profiles: one source of truth for leaves, control registers, MSRs and XCR0.

use std::collections::BTreeSet;
use umbra_arch::control::{ControlRegs, Cr0, Cr4};
use umbra_arch::cpuid::{
    BadProfile, CpuidDynamic, CpuidProfile, Feature, HYPERVISOR_SIGNATURE, HostOffer, MissingFeature, PROFILE_NAMES,
    xsave,
};
use umbra_arch::msr::MONITOR_ENABLED;
use umbra_arch::time::{CRYSTAL_HZ, TSC_HZ};

fn at_reset() -> CpuidDynamic {
    CpuidDynamic {
        cr4: Cr4::new(0),
        xcr0: 1,
        xss: 0,
        misc_enable: MONITOR_ENABLED,
        apic_id: 0,
        apic_enabled: true,
        cpus: 1,
    }
}

fn profile(name: &str) -> CpuidProfile {
    CpuidProfile::named(name).expect("a listed name")
}

fn full_host() -> HostOffer {
    HostOffer { features: Feature::ALL.iter().copied().collect() }
}

fn shows(p: &CpuidProfile, feature: Feature, now: CpuidDynamic) -> bool {
    let place = feature.place();
    p.cpuid(place.leaf, place.subleaf, now)[place.register as usize] >> place.bit & 1 != 0
}

#[test]
fn no_two_features_share_a_name_or_a_place() {
    let names: BTreeSet<_> = Feature::ALL.iter().map(|f| f.name()).collect();
    let places: BTreeSet<_> = Feature::ALL.iter().map(|f| f.place()).collect();
    assert_eq!((names.len(), places.len()), (Feature::ALL.len(), Feature::ALL.len()));
    for &f in Feature::ALL {
        assert_eq!(Feature::from_name(f.name()), Some(f));
    }
}

#[test]
fn every_feature_shows_exactly_where_its_place_says() {
    for vendor in ["GenuineIntel", "AuthenticAMD"] {
        for &feature in Feature::ALL {
            let host = full_host();
            let with = CpuidProfile { features: [feature].into_iter().collect(), ..profile("umbra-v2") };
            let mut with = with;
            with.vendor = CpuidProfile::parse(&format!("umbra-v2,vendor={vendor}"), &host).expect("a vendor").vendor;
            // Leaf 0Dh exists with XSAVE only.
            if feature.place().leaf == 0xd {
                with.features = [feature, Feature::Xsave].into_iter().collect();
            }
            // Leaf 40000001h exists with what it is about only.
            if feature.place().leaf == 0x4000_0001 {
                with.features.insert(feature);
            }
            assert!(shows(&with, feature, at_reset()), "{feature}");
            let mut without = with.clone();
            without.features.remove(feature);
            assert!(!shows(&without, feature, at_reset()), "{feature}");
        }
    }
}

#[test]
fn profiles_are_closed_under_requirements_and_offer_what_is_implemented() {
    for name in PROFILE_NAMES {
        for feature in profile(name).features.iter() {
            assert!(feature.is_implemented(), "{name}: {feature}");
            for &needed in feature.requires() {
                assert!(profile(name).has(needed), "{name}: {feature} needs {needed}");
            }
        }
    }
}

#[test]
fn the_default_is_an_x86_64_v3_cpu_and_v2_is_a_v2() {
    use Feature::*;
    let v2 = [Cx16, LahfLm, Popcnt, Sse3, Sse41, Sse42, Ssse3, Lm, Nx, Syscall];
    let v3 = [Avx, Avx2, Bmi1, Bmi2, F16c, Fma, Lzcnt, Movbe, Xsave];
    assert_eq!(CpuidProfile::default(), profile("umbra-v3"));
    for f in v2 {
        assert!(profile("umbra-v2").has(f) && profile("umbra-v3").has(f), "{f}");
    }
    for f in v3 {
        assert!(!profile("umbra-v2").has(f) && profile("umbra-v3").has(f), "{f}");
    }
    for name in PROFILE_NAMES {
        assert!(!profile(name).has(La57) && !profile(name).has(Monitor), "{name}");
    }
}

#[test]
fn each_control_bit_follows_its_feature() {
    // (feature, CR4 bits, EFER bits), from the manual's descriptions of the registers.
    use Feature::*;
    let expected: &[(Feature, u64, u64)] = &[
        (Vme, 0x3, 0),
        (Tsc, 1 << 2, 0),
        (De, 1 << 3, 0),
        (Pse, 1 << 4, 0),
        (Pae, 1 << 5, 0),
        (Mce, 1 << 6, 0),
        (Pge, 1 << 7, 0),
        (Fxsr, 1 << 9, 0),
        (Sse, 1 << 10, 0),
        (Umip, 1 << 11, 0),
        (La57, 1 << 12, 0),
        (Fsgsbase, 1 << 16, 0),
        (Pcid, 1 << 17, 0),
        (Xsave, 1 << 18, 0),
        (Smep, 1 << 20, 0),
        (Smap, 1 << 21, 0),
        (Pku, 1 << 22, 0),
        (Shstk, 1 << 23, 0),
        (Pks, 1 << 24, 0),
        (Syscall, 0, 1),
        (Lm, 0, 0x500),
        (Nx, 0, 0x800),
    ];
    let pce = 1 << 8;
    for &feature in Feature::ALL {
        let only = CpuidProfile { features: [feature].into_iter().collect(), ..CpuidProfile::default() };
        let limits = only.control_limits();
        let (cr4, efer) = expected.iter().find(|e| e.0 == feature).map_or((0, 0), |e| (e.1, e.2));
        assert_eq!((limits.cr4_allowed, limits.efer_allowed), (cr4 | pce, efer), "{feature}");
    }
}

#[test]
fn control_writes_obey_the_profile() {
    let v2 = profile("umbra-v2").control_limits();
    let v3 = profile("umbra-v3").control_limits();
    let regs = ControlRegs { cr0: Cr0::RESET, ..ControlRegs::default() };
    let osxsave = |limits| regs.write_cr4(Cr4::OSXSAVE, limits, &mut |_| [0; 4]).is_ok();
    assert!(osxsave(&v3) && !osxsave(&v2));
}

#[test]
fn osxsave_ospke_and_the_apic_bit_mirror_the_state() {
    let p = profile("umbra-v3");
    for bits in 0..8u64 {
        let cr4 = Cr4::new((bits & 1) << 18 | (bits >> 1 & 1) << 22);
        let now = CpuidDynamic { cr4, apic_enabled: bits & 4 != 0, ..at_reset() };
        assert_eq!(u64::from(p.cpuid(1, 0, now)[2] >> 27 & 1), bits & 1);
        assert_eq!(u64::from(p.cpuid(7, 0, now)[2] >> 4 & 1), bits >> 1 & 1);
        assert_eq!(u64::from(p.cpuid(1, 0, now)[3] >> 9 & 1), bits >> 2);
    }
}

#[test]
fn xsave_sizes_follow_the_enabled_components() {
    let p = profile("umbra-v3");
    // (XCR0, standard size, compacted size): legacy 512 + header 64, AVX 256, PKRU 8 at 2688.
    for (xcr0, standard, compacted) in
        [(1, 576, 576), (3, 576, 576), (7, 832, 832), (0x203, 2696, 584), (0x207, 2696, 840)]
    {
        let now = CpuidDynamic { xcr0, ..at_reset() };
        assert_eq!(p.cpuid(0xd, 0, now), [0x207, standard, 2696, 0], "XCR0 {xcr0:#x}");
        assert_eq!(p.cpuid(0xd, 1, now), [0xf, compacted, 0, 0], "XCR0 {xcr0:#x}");
    }
    for sub in 2..70 {
        let expected = match sub {
            2 => [256, 576, 0, 0],
            9 => [8, 2688, 0, 0],
            _ => [0; 4],
        };
        assert_eq!(p.cpuid(0xd, sub, at_reset()), expected, "sub-leaf {sub}");
    }
    assert_eq!(profile("umbra-v2").cpuid(0xd, 0, at_reset()), [0; 4]);
    assert_eq!((p.xcr0_supported(), profile("umbra-v2").xcr0_supported()), (0x207, 0));
    assert_eq!((xsave::compacted_offset(0x207, 9), xsave::compacted_offset(0x203, 9)), (832, 576));
}

#[test]
fn the_time_leaves_agree_with_the_clocks() {
    let p = CpuidProfile::default();
    let [denominator, numerator, crystal, _] = p.cpuid(0x15, 0, at_reset()).map(u64::from);
    assert_eq!(crystal, CRYSTAL_HZ);
    assert_eq!(crystal * numerator / denominator, TSC_HZ);
    assert_eq!(u64::from(p.cpuid(0x16, 0, at_reset())[0]) * 1_000_000, TSC_HZ);
    assert!(shows(&p, Feature::InvariantTsc, at_reset()));
}

#[test]
fn topology_apic_ids_and_counts_agree() {
    let p = CpuidProfile::default();
    for cpus in 1..=9u32 {
        for apic_id in 0..cpus {
            let now = CpuidDynamic { apic_id, cpus, ..at_reset() };
            let version = p.cpuid(1, 0, now);
            assert_eq!(version[1] >> 24, apic_id);
            assert_eq!(version[3] >> 28 & 1, u32::from(cpus > 1));
            let core = p.cpuid(0xb, 1, now);
            assert_eq!((core[1], core[2], core[3]), (cpus, 0x201, apic_id));
            assert!(1 << core[0] >= cpus && (cpus == 1 || 1 << (core[0] - 1) < cpus));
            assert_eq!(p.cpuid(0xb, 2, now), [0, 0, 2, apic_id]);
            let per_package = (p.cpuid(4, 3, now)[0] >> 26) + 1;
            assert!(per_package >= cpus && per_package == version[1] >> 16 & 0xff);
        }
    }
}

fn characters(registers: &[u32]) -> String {
    let bytes = registers.iter().flat_map(|r| r.to_le_bytes()).filter(|&b| b != 0);
    String::from_utf8(bytes.collect()).expect("ASCII")
}

#[test]
fn names_read_back() {
    let p = CpuidProfile::default();
    let now = at_reset();
    let [max, b, c, d] = p.cpuid(0, 0, now);
    assert_eq!((max, characters(&[b, d, c]).as_str()), (0x16, "GenuineIntel"));
    let [_, b, c, d] = p.cpuid(0x4000_0000, 0, now);
    assert_eq!(characters(&[b, c, d]).as_bytes(), HYPERVISOR_SIGNATURE);
    let brand: Vec<u32> = (0x8000_0002..=0x8000_0004).flat_map(|l| p.cpuid(l, 0, now)).collect();
    assert_eq!(characters(&brand), "Umbra virtual CPU (umbra-v3)");
    assert_eq!(p.signature(), 0x806f8);
    assert_eq!(p.cpuid(0x8000_0008, 0, now)[0], 48 << 8 | 46);
}

#[test]
fn kvm_is_named_only_where_a_feature_of_its_is_offered() {
    use Feature::{Hypervisor, KvmAsyncPf, KvmAsyncPfInt};
    for name in PROFILE_NAMES {
        assert!(!profile(name).has(KvmAsyncPf) && !profile(name).has(KvmAsyncPfInt), "{name}");
        assert_eq!(profile(name).cpuid(0x4000_0001, 0, at_reset()), [0; 4], "{name}");
    }
    let p = CpuidProfile::parse("umbra-v3,+kvm-asyncpf-int", &full_host()).expect("offered");
    assert_eq!(p.cpuid(0x4000_0000, 0, at_reset()), [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]);
    assert_eq!(p.cpuid(0x4000_0001, 0, at_reset()), [1 << 4 | 1 << 14, 0, 0, 0]);
    for off in ["kvm-asyncpf", "hypervisor"] {
        let p = CpuidProfile::parse(&format!("umbra-v3,+kvm-asyncpf-int,-{off}"), &full_host()).expect("taken away");
        assert!(!p.has(KvmAsyncPf) && !p.has(KvmAsyncPfInt) && p.has(Hypervisor) == (off == "kvm-asyncpf"), "{off}");
    }
}

#[test]
fn absent_leaves_answer_as_the_vendor_does() {
    let intel = CpuidProfile::default();
    let amd = CpuidProfile::parse("umbra-v3,vendor=AuthenticAMD", &full_host()).expect("an AMD");
    for leaf in [0x17, 0x1f, 0x3fff_ffff, 0x8000_0009, u32::MAX] {
        assert_eq!(intel.cpuid(leaf, 0, at_reset()), intel.cpuid(0x16, 0, at_reset()), "{leaf:#x}");
        assert_eq!(amd.cpuid(leaf, 0, at_reset()), [0; 4], "{leaf:#x}");
    }
    let bare = CpuidProfile::parse("umbra-v3,-hypervisor", &full_host()).expect("a bare machine");
    assert_eq!(bare.cpuid(0x4000_0000, 0, at_reset()), bare.cpuid(0x16, 0, at_reset()));
}

#[test]
fn no_flaw_is_left_for_the_guest_to_work_around() {
    let caps = CpuidProfile::default().arch_capabilities();
    for (bit, name) in [
        (0, "RDCL_NO"),
        (1, "IBRS_ALL"),
        (3, "SKIP_L1DFL"),
        (4, "SSB_NO"),
        (5, "MDS_NO"),
        (6, "PSCHANGE_MC_NO"),
        (8, "TAA_NO"),
        (20, "BHI_NO"),
        (26, "GDS_NO"),
    ] {
        assert!(caps >> bit & 1 != 0, "{name}");
    }
    // Some guests don't believe BHI_NO, but set BHI_DIS_S where there is one.
    let profile = CpuidProfile::default();
    assert_eq!(profile.cpuid(7, 0, at_reset())[0], 2);
    assert_eq!(profile.cpuid(7, 2, at_reset()), [0, 0, 0, 1 << 4]);
    assert!(profile.spec_ctrl_supported() & 1 << 10 != 0);
    let without = CpuidProfile::parse("umbra-v3,-bhi-ctrl", &full_host()).expect("one without");
    assert_eq!((without.cpuid(7, 0, at_reset())[0], without.spec_ctrl_supported() & 1 << 10), (0, 0));
    // RSBA and TSX_CTRL would ask for work.
    assert_eq!(caps & (1 << 2 | 1 << 7), 0);
    let without = CpuidProfile::parse("umbra-v3,-arch-capabilities", &full_host()).expect("a flawed one");
    assert_eq!(without.arch_capabilities(), 0);
}

#[test]
fn options_add_with_requirements_and_remove_with_dependents() {
    let parse = |text: &str| CpuidProfile::parse(text, &full_host());
    let p = parse("umbra-v2,+avx2,+la57").expect("legal");
    assert!(p.has(Feature::Avx) && p.has(Feature::Xsave) && p.has(Feature::La57));
    assert_eq!(p.linear_bits(), 57);
    let p = parse("umbra-v3,-xsave").expect("legal");
    for gone in [Feature::Avx, Feature::Avx2, Feature::Fma, Feature::Pku, Feature::Xsaves] {
        assert!(!p.has(gone), "{gone}");
    }
    assert_eq!(p.xcr0_supported(), 0);
    assert!(matches!(parse("pentium"), Err(BadProfile::UnknownModel(_))));
    assert!(matches!(parse("umbra-v3,+mpx"), Err(BadProfile::UnknownFeature(_))));
    assert!(matches!(parse("umbra-v3,avx"), Err(BadProfile::UnknownOption(_))));
    assert_eq!(parse("umbra-v3,+vme"), Err(BadProfile::NotImplemented(Feature::Vme)));
    assert!(parse("umbra-v3,+monitor").expect("legal").has(Feature::Monitor));
}

#[test]
fn a_missing_host_feature_is_refused_by_name_or_left_out_of_max() {
    let mut host = full_host();
    host.features.remove(Feature::Avx2);
    let refused = CpuidProfile::parse("umbra-v3", &host);
    assert_eq!(refused, Err(BadProfile::Host(MissingFeature { feature: Feature::Avx2 })));
    assert!(refused.expect_err("refused").to_string().contains("avx2"));
    let max = CpuidProfile::parse("max", &host).expect("max adapts");
    assert!(!max.has(Feature::Avx2) && max.has(Feature::Avx) && max.has(Feature::Sha));
    // What the interpreter does itself needs no host.
    host.features.remove(Feature::Smap);
    assert!(CpuidProfile::parse("umbra-v2", &host).expect("SMAP is software").has(Feature::Smap));
}

#[test]
fn the_host_offer_is_read_from_cpuid() {
    let source = profile("umbra-v3");
    let offer = HostOffer::from_cpuid(|leaf, sub| source.cpuid(leaf, sub, at_reset()));
    assert_eq!(offer.features, source.features);
}
