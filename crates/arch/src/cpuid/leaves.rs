//! What CPUID answers ("CPUID-CPU Identification").

use super::feature::Feature;
use super::profile::{CpuidProfile, Vendor};
use super::xsave;
use crate::control::Cr4;
use crate::msr::MONITOR_ENABLED;
use crate::time::{CRYSTAL_HZ, TSC_HZ};

/// EBX, ECX, EDX of leaf 40000000h.
pub const HYPERVISOR_SIGNATURE: &[u8; 12] = b"UmbraUmbraUm";
/// The same where one of KVM's paravirtual features is offered ("KVM CPUID bits").
pub const KVM_SIGNATURE: &[u8; 12] = b"KVMKVMKVM\0\0\0";

const LAST_BASIC: u32 = 0x16;
const HYPERVISOR_BASE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
const HYPERVISOR_END: u32 = 0x4000_ffff;
const EXTENDED_BASE: u32 = 0x8000_0000;
const LAST_EXTENDED: u32 = 0x8000_0008;

/// Run-time state that CPUID shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CpuidDynamic {
    /// CR4: OSXSAVE and OSPKE mirror it.
    pub cr4: Cr4,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_XSS.
    pub xss: u64,
    /// IA32_MISC_ENABLE: MONITOR mirrors a bit of it.
    pub misc_enable: u64,
    /// Local APIC id of this CPU.
    pub apic_id: u32,
    /// IA32_APIC_BASE's global enable.
    pub apic_enabled: bool,
    /// Number of CPUs in the (only) package, at least 1. APIC ids are consecutive from 0.
    pub cpus: u32,
}

impl CpuidDynamic {
    /// Bits of an APIC id that number the CPUs of the package.
    fn id_bits(&self) -> u32 {
        self.cpus.max(1).next_power_of_two().trailing_zeros()
    }
}

fn text(bytes: &[u8], at: usize) -> u32 {
    let byte = |i: usize| bytes.get(at + i).copied().unwrap_or(0);
    u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
}

impl CpuidProfile {
    /// EAX, EBX, ECX, EDX of CPUID for `leaf` (EAX) and `subleaf` (ECX).
    pub fn cpuid(&self, leaf: u32, subleaf: u32, now: CpuidDynamic) -> [u32; 4] {
        match leaf {
            0..=LAST_BASIC => self.basic(leaf, subleaf, now),
            HYPERVISOR_BASE..=HYPERVISOR_END if self.has(Feature::Hypervisor) => self.hypervisor(leaf),
            EXTENDED_BASE..=LAST_EXTENDED => self.extended(leaf, now),
            // Intel answers a leaf that doesn't exist with the highest basic one, AMD with zeros.
            _ if self.vendor == Vendor::Intel => self.basic(LAST_BASIC, subleaf, now),
            _ => [0; 4],
        }
    }

    fn basic(&self, leaf: u32, subleaf: u32, now: CpuidDynamic) -> [u32; 4] {
        match leaf {
            0x0 => {
                let vendor = self.vendor.signature().as_bytes();
                [LAST_BASIC, text(vendor, 0), text(vendor, 8), text(vendor, 4)]
            }
            0x1 => self.version(now),
            // Cache and TLB descriptors: "see leaf 4", "see leaf 18h", 64-byte prefetch.
            0x2 if self.vendor == Vendor::Intel => [0x00fe_ff01, 0xf0, 0, 0],
            0x4 if self.vendor == Vendor::Intel => caches(subleaf, now),
            // Lines of 64 bytes; interrupts end MWAIT though IF is 0 (ECX bits 0 and 1); C1 has one state.
            0x5 if self.has(Feature::Monitor) => [64, 64, 3, 0x10],
            0x7 if subleaf == 0 => self.structured(now),
            0xb if self.has(Feature::X2apic) => topology(subleaf, now),
            0xd if self.has(Feature::Xsave) => self.xsave(subleaf, now),
            // TSC = crystal * EBX / EAX; the local APIC's timer counts the crystal.
            0x15 => [(CRYSTAL_HZ / RATIO_UNIT) as u32, (TSC_HZ / RATIO_UNIT) as u32, CRYSTAL_HZ as u32, 0],
            0x16 => [(TSC_HZ / 1_000_000) as u32, (TSC_HZ / 1_000_000) as u32, 100, 0],
            _ => self.plain(leaf, subleaf),
        }
    }

    /// A register set that is nothing but feature bits.
    fn plain(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.features.registers(leaf, subleaf)
    }

    fn version(&self, now: CpuidDynamic) -> [u32; 4] {
        let [_, _, mut ecx, mut edx] = self.plain(1, 0);
        if self.has(Feature::Xsave) && now.cr4.osxsave() {
            ecx |= 1 << 27;
        }
        if now.misc_enable & MONITOR_ENABLED == 0 {
            ecx &= !(1 << Feature::Monitor.place().bit);
        }
        if !now.apic_enabled {
            edx &= !(1 << Feature::Apic.place().bit);
        }
        if now.cpus > 1 {
            edx |= 1 << 28;
        }
        let clflush_line = 64 / 8;
        let ids = 1u32 << now.id_bits().min(7);
        [self.signature(), clflush_line << 8 | ids << 16 | now.apic_id << 24, ecx, edx]
    }

    fn structured(&self, now: CpuidDynamic) -> [u32; 4] {
        let [_, ebx, mut ecx, edx] = self.plain(7, 0);
        if self.has(Feature::Pku) && now.cr4.pke() {
            ecx |= 1 << 4;
        }
        let last_subleaf = if self.has(Feature::BhiCtrl) { 2 } else { 0 };
        [last_subleaf, ebx, ecx, edx]
    }

    fn xsave(&self, subleaf: u32, now: CpuidDynamic) -> [u32; 4] {
        let (user, supervisor) = (self.xcr0_supported(), self.xss_supported());
        match subleaf {
            0 => [user as u32, xsave::standard_size(now.xcr0), xsave::standard_size(user), (user >> 32) as u32],
            1 => {
                let [features, ..] = self.plain(0xd, 1);
                let compacts = self.has(Feature::Xsavec) || self.has(Feature::Xsaves);
                let size = if compacts { xsave::compacted_size(now.xcr0 | now.xss) } else { 0 };
                [features, size, supervisor as u32, (supervisor >> 32) as u32]
            }
            2..64 if (user | supervisor) >> subleaf & 1 != 0 => match xsave::component(subleaf) {
                Some(c) => [c.size, c.offset, 0, 0],
                None => [0; 4],
            },
            _ => [0; 4],
        }
    }

    fn hypervisor(&self, leaf: u32) -> [u32; 4] {
        let kvm = self.has(Feature::KvmAsyncPf);
        let (last, signature) =
            if kvm { (KVM_FEATURES, KVM_SIGNATURE) } else { (HYPERVISOR_BASE, HYPERVISOR_SIGNATURE) };
        match leaf {
            HYPERVISOR_BASE => [last, text(signature, 0), text(signature, 4), text(signature, 8)],
            KVM_FEATURES if kvm => self.plain(leaf, 0),
            _ => [0; 4],
        }
    }

    fn extended(&self, leaf: u32, now: CpuidDynamic) -> [u32; 4] {
        let vendor = self.vendor.signature().as_bytes();
        let amd = self.vendor == Vendor::Amd;
        match leaf {
            0x8000_0000 if amd => [LAST_EXTENDED, text(vendor, 0), text(vendor, 8), text(vendor, 4)],
            0x8000_0000 => [LAST_EXTENDED, 0, 0, 0],
            0x8000_0001 => {
                let [_, _, ecx, edx] = self.plain(leaf, 0);
                if !amd {
                    return [0, 0, ecx, edx];
                }
                // AMD repeats these bits of leaf 1's EDX here.
                [self.signature(), 0, ecx, edx | self.version(now)[3] & 0x0183_f3ff]
            }
            0x8000_0002..=0x8000_0004 => {
                let at = (leaf - 0x8000_0002) as usize * 16;
                [0, 4, 8, 12].map(|i| text(&self.brand.as_bytes()[..self.brand.len().min(47)], at + i))
            }
            // L1 caches, AMD only: 32 KiB, 8 ways, 64-byte lines each.
            0x8000_0005 if amd => [0, 0, 0x2008_0140, 0x2008_0140],
            // L2: 1 MiB, 16 ways, 64-byte lines.
            0x8000_0006 => [0, 0, 0x0400_8040, 0],
            0x8000_0007 => self.plain(leaf, 0),
            0x8000_0008 => {
                let sizes = u32::from(self.linear_bits()) << 8 | u32::from(self.maxphyaddr);
                let cores = if amd { now.id_bits() << 12 | now.cpus.saturating_sub(1) & 0xff } else { 0 };
                [sizes, 0, cores, 0]
            }
            _ => [0; 4],
        }
    }
}

/// Both clocks are whole multiples of it, so that leaf 15h's ratio fits.
const RATIO_UNIT: u64 = 1_000_000;
const _: () = assert!(
    CRYSTAL_HZ.is_multiple_of(RATIO_UNIT) && TSC_HZ.is_multiple_of(RATIO_UNIT) && CRYSTAL_HZ <= u32::MAX as u64
);

/// Leaf 4: (type, level, ways, sets) of each cache; lines are 64 bytes.
fn caches(subleaf: u32, now: CpuidDynamic) -> [u32; 4] {
    const CACHES: [(u32, u32, u32, u32); 4] = [(1, 1, 8, 64), (2, 1, 8, 64), (3, 2, 16, 1024), (3, 3, 16, 16384)];
    let Some(&(kind, level, ways, sets)) = CACHES.get(subleaf as usize) else {
        return [0; 4];
    };
    let ids = (1u32 << now.id_bits().min(6)) - 1;
    let sharing = if level == 3 { ids } else { 0 };
    let self_initialising = 1 << 8;
    [kind | level << 5 | self_initialising | sharing << 14 | ids << 26, 63 | (ways - 1) << 22, sets - 1, 0]
}

/// Leaf 0Bh: one thread a core, all cores in one package.
fn topology(subleaf: u32, now: CpuidDynamic) -> [u32; 4] {
    let (shift, cpus, kind) = match subleaf {
        0 => (0, 1, 1),
        1 => (now.id_bits(), now.cpus.max(1), 2),
        _ => (0, 0, 0),
    };
    [shift, cpus, kind << 8 | subleaf & 0xff, now.apic_id]
}
