//! What executes guest code behind an accelerator's interface.

use std::fmt;
use std::path::Path;

/// Who runs the guest's instructions.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Backend {
    /// KVM on Intel's VMX.
    KvmVmx,
    /// KVM on AMD's SVM.
    KvmSvm,
    /// KVM on software: a module that runs user code natively and interprets or rewrites the rest.
    KvmPvm,
    /// KVM with neither extension visible and no known module: treated as software.
    KvmUnknown,
    /// macOS' Hypervisor.framework.
    Hypervisor,
}

impl Backend {
    /// What KVM runs on here, whether or not /dev/kvm can be opened.
    pub fn of_kvm() -> Self {
        let pvm = ["/sys/module/kvm_pvm", "/sys/module/pvm"].iter().any(|path| Path::new(path).exists());
        Self::from_host(pvm, &std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
    }

    /// As [`of_kvm`](Self::of_kvm), from whether PVM's module is there and /proc/cpuinfo's text.
    pub fn from_host(pvm: bool, cpuinfo: &str) -> Self {
        let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
        match (has("vmx"), has("svm")) {
            _ if pvm => Self::KvmPvm,
            (true, _) => Self::KvmVmx,
            (_, true) => Self::KvmSvm,
            _ => Self::KvmUnknown,
        }
    }

    /// The processor's own virtualization executes the guest.
    pub const fn is_hardware(self) -> bool {
        matches!(self, Self::KvmVmx | Self::KvmSvm | Self::Hypervisor)
    }

    /// The label that results carry.
    pub const fn label(self) -> &'static str {
        match self {
            Self::KvmVmx => "kvm (VMX)",
            Self::KvmSvm => "kvm (SVM)",
            Self::KvmPvm => "kvm (software: pvm)",
            Self::KvmUnknown => "kvm (unknown, taken for software)",
            Self::Hypervisor => "Hypervisor.framework",
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_module_wins_over_flags() {
        let intel = "processor : 0\nflags\t\t: fpu vmx sse\n";
        assert_eq!(Backend::from_host(false, intel), Backend::KvmVmx);
        assert_eq!(Backend::from_host(true, intel), Backend::KvmPvm);
        assert_eq!(Backend::from_host(false, "flags : fpu svm\n"), Backend::KvmSvm);
        assert_eq!(Backend::from_host(false, "flags : svm_lock\n"), Backend::KvmUnknown);
        assert!(!Backend::KvmUnknown.is_hardware() && !Backend::KvmPvm.is_hardware());
    }
}
