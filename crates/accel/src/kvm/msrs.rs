//! The MSRs of [`CpuState`] as KVM numbers them.

use super::error::{KvmError, failed};
use kvm_bindings::{Msrs as MsrBatch, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use umbra_arch::cpuid::{CpuidProfile, Feature};
use umbra_arch::msr::*;
use umbra_arch::state::Msrs;

/// Where an MSR lives in the state.
type Place = fn(&mut Msrs) -> &mut u64;

/// Those that exist on every profile, then those that a feature brings.
const PLACES: [(u32, Option<Feature>, Place); 17] = [
    (IA32_STAR, None, |m| &mut m.star),
    (IA32_LSTAR, None, |m| &mut m.lstar),
    (IA32_CSTAR, None, |m| &mut m.cstar),
    (IA32_FMASK, None, |m| &mut m.fmask),
    (IA32_KERNEL_GS_BASE, None, |m| &mut m.kernel_gs_base),
    (IA32_SYSENTER_CS, None, |m| &mut m.sysenter_cs),
    (IA32_SYSENTER_ESP, None, |m| &mut m.sysenter_esp),
    (IA32_SYSENTER_EIP, None, |m| &mut m.sysenter_eip),
    (IA32_PAT, None, |m| &mut m.pat),
    (IA32_MISC_ENABLE, None, |m| &mut m.misc_enable),
    (IA32_MTRR_DEF_TYPE, Some(Feature::Mtrr), |m| &mut m.mtrr_def_type),
    (IA32_TSC_AUX, Some(Feature::Rdtscp), |m| &mut m.tsc_aux),
    (IA32_TSC_ADJUST, Some(Feature::TscAdjust), |m| &mut m.tsc_adjust),
    (IA32_SPEC_CTRL, Some(Feature::SpecCtrl), |m| &mut m.spec_ctrl),
    (IA32_XSS, Some(Feature::Xsaves), |m| &mut m.xss),
    (IA32_PKRS, Some(Feature::Pks), |m| &mut m.pkrs),
    (IA32_BIOS_SIGN_ID, None, |m| &mut m.bios_sign_id),
];

/// The MSRs that one vCPU exchanges. IA32_ARCH_CAPABILITIES, a constant, stays the host's.
pub(super) struct MsrList {
    known: Vec<(u32, Option<Feature>, Place)>,
    mtrrs: bool,
}

impl MsrList {
    pub(super) fn of(profile: &CpuidProfile) -> Self {
        let known = PLACES.iter().filter(|(_, feature, _)| feature.is_none_or(|f| profile.has(f))).copied();
        Self { known: known.collect(), mtrrs: profile.has(Feature::Mtrr) }
    }

    /// All numbers with their values in `state`.
    fn values(&self, state: &mut Msrs) -> Vec<(u32, u64)> {
        let mut values: Vec<_> = self.known.iter().map(|(number, _, place)| (*number, *place(state))).collect();
        if self.mtrrs {
            values.extend(mtrrs(state).map(|(number, value)| (number, *value)));
        }
        values
    }

    /// Sets all, and the TSC; gives the number of the first that KVM doesn't take.
    pub(super) fn set(&self, vcpu: &VcpuFd, state: &Msrs, tsc: u64) -> Result<Option<u32>, KvmError> {
        let mut values = self.values(&mut state.clone());
        values.push((IA32_TSC, tsc));
        let done = vcpu.set_msrs(&batch(&values)?).map_err(failed("KVM_SET_MSRS"))?;
        Ok(values.get(done).map(|(number, _)| *number))
    }

    /// Reads all into `state`; gives the TSC.
    pub(super) fn get(&self, vcpu: &VcpuFd, state: &mut Msrs) -> Result<u64, KvmError> {
        let mut values = self.values(state);
        values.insert(0, (IA32_TSC, 0));
        let mut read = batch(&values)?;
        let done = vcpu.get_msrs(&mut read).map_err(failed("KVM_GET_MSRS"))?;
        let read = &read.as_slice()[..done];
        for entry in read {
            if let Some((_, _, place)) = self.known.iter().find(|(number, ..)| *number == entry.index) {
                *place(state) = entry.data;
            }
        }
        for (number, value) in mtrrs(state) {
            if let Some(entry) = read.iter().find(|entry| entry.index == number) {
                *value = entry.data;
            }
        }
        Ok(read.first().map_or(0, |entry| entry.data))
    }
}

/// Arms the timer of a local APIC in the kernel, whose mode has been set.
pub(super) fn set_tsc_deadline(vcpu: &VcpuFd, deadline: u64) -> Result<(), KvmError> {
    vcpu.set_msrs(&batch(&[(IA32_TSC_DEADLINE, deadline)])?).map(|_| ()).map_err(failed("KVM_SET_MSRS"))
}

/// IA32_TSC_DEADLINE of a local APIC in the kernel.
pub(super) fn tsc_deadline(vcpu: &VcpuFd) -> Result<u64, KvmError> {
    let mut read = batch(&[(IA32_TSC_DEADLINE, 0)])?;
    vcpu.get_msrs(&mut read).map_err(failed("KVM_GET_MSRS"))?;
    Ok(read.as_slice().first().map_or(0, |entry| entry.data))
}

fn batch(values: &[(u32, u64)]) -> Result<MsrBatch, KvmError> {
    let entry = |&(index, data): &(u32, u64)| kvm_msr_entry { index, data, ..Default::default() };
    let entries: Vec<_> = values.iter().map(entry).collect();
    MsrBatch::from_entries(&entries).map_err(|_| KvmError::Missing("room for the MSRs"))
}

/// The range MTRRs with their numbers.
fn mtrrs(state: &mut Msrs) -> impl Iterator<Item = (u32, &mut u64)> {
    let fixed = [IA32_MTRR_FIX64K_00000, IA32_MTRR_FIX16K_80000, IA32_MTRR_FIX16K_A0000];
    let fixed = fixed.into_iter().chain(IA32_MTRR_FIX4K_C0000..=IA32_MTRR_FIX4K_F8000);
    let variable = (IA32_MTRR_PHYSBASE0..).zip(&mut state.mtrr_var);
    fixed.zip(&mut state.mtrr_fix).chain(variable)
}
