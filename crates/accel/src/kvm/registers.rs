//! The whole state of a vCPU, in and out.
#![allow(unsafe_code, reason = "kvm-ioctls marks KVM_SET_XSAVE as unsafe")]

use super::convert;
use super::cpuid;
use super::error::{KvmError, failed};
use super::exits::{self, Event};
use super::ioctls;
use super::lapic_page;
use super::msrs::{self, MsrList};
use super::vm::Vm;
use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_sregs2};
use kvm_ioctls::VcpuFd;
use umbra_arch::cpuid::{CpuidProfile, Feature};
use umbra_arch::state::Activity;
use umbra_arch::{Bus, CpuState, Gpa, LocalApic, VirtualTime};

/// Longest instruction.
const LONGEST: u64 = 15;

/// A vCPU's descriptor and what is needed to read and write its registers.
pub(super) struct Registers {
    pub(super) fd: VcpuFd,
    msrs: MsrList,
    /// State components that the guest may enable.
    components: u64,
    has_deadline: bool,
    has_sregs2: bool,
}

/// The local APIC's registers that KVM keeps a copy of when the APIC isn't its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct ApicCopy {
    pub(super) cr8: u8,
    pub(super) base: u64,
}

impl Registers {
    /// vCPU `id` of `vm`, with a profile that KVM can hold.
    pub(super) fn new(vm: &Vm, profile: &CpuidProfile, id: u32) -> Result<Self, KvmError> {
        let fd = vm.fd.create_vcpu(id.into()).map_err(failed("KVM_CREATE_VCPU"))?;
        fd.set_cpuid2(&cpuid::entries(profile, id)?).map_err(failed("KVM_SET_CPUID2"))?;
        Ok(Self {
            fd,
            msrs: MsrList::of(profile),
            components: profile.xcr0_supported(),
            has_deadline: profile.has(Feature::TscDeadline),
            has_sregs2: vm.kvm.check_extension_raw(ioctls::CAP_SREGS2) > 0,
        })
    }

    /// Where kvm_run.immediate_exit lies; valid as long as this value.
    pub(super) fn immediate_exit(&mut self) -> *mut u8 {
        &raw mut self.fd.get_kvm_run().immediate_exit
    }

    pub(super) fn run(&mut self, bus: &mut dyn Bus, now: VirtualTime) -> Event {
        exits::run(&mut self.fd, bus, now)
    }

    fn sregs(&self) -> Result<kvm_sregs2, KvmError> {
        if self.has_sregs2 {
            return ioctls::get_sregs2(&self.fd);
        }
        self.fd.get_sregs().map(|sregs| convert::new_sregs(&sregs)).map_err(failed("KVM_GET_SREGS"))
    }

    fn set_sregs(&self, sregs: &kvm_sregs2) -> Result<(), KvmError> {
        if self.has_sregs2 {
            return ioctls::set_sregs2(&self.fd, sregs);
        }
        self.fd.set_sregs(&convert::old_sregs(sregs)).map_err(failed("KVM_SET_SREGS"))
    }

    /// Replaces everything but a local APIC in the kernel, for which `apic` is `None`. `tsc` is the time-stamp
    /// counter's value.
    ///
    /// # Errors
    /// [`KvmError::Request`] names the part that KVM doesn't take.
    pub(super) fn set(&self, s: &CpuState, apic: Option<ApicCopy>, tsc: u64) -> Result<(), KvmError> {
        let halted = apic.is_none() && s.activity == Activity::Halted;
        let mp_state = if halted { KVM_MP_STATE_HALTED } else { KVM_MP_STATE_RUNNABLE };
        self.fd.set_mp_state(kvm_mp_state { mp_state }).map_err(failed("KVM_SET_MP_STATE"))?;
        let apic = match apic {
            Some(copy) => copy,
            None => self.sregs().map(|sregs| ApicCopy { cr8: sregs.cr8 as u8, base: sregs.apic_base })?,
        };
        let sregs = convert::sregs_of(s, apic.cr8, apic.base);
        self.set_sregs(&sregs)?;
        if let Some(text) = convert::control_difference(&sregs, &self.sregs()?) {
            // Software backends drop bits that they can't do, without a word.
            return Err(KvmError::Request { request: "KVM_SET_SREGS", source: std::io::Error::other(text) });
        }
        self.fd.set_regs(&convert::regs_of(s)).map_err(failed("KVM_SET_REGS"))?;
        if self.components != 0 {
            self.fd.set_xcrs(&convert::xcrs_of(s)).map_err(failed("KVM_SET_XCRS"))?;
        }
        // SAFETY: no component that would need a larger area was ever enabled for this process.
        unsafe { self.fd.set_xsave(&convert::xsave_of(s, self.components)) }.map_err(failed("KVM_SET_XSAVE"))?;
        self.fd.set_debug_regs(&convert::debugregs_of(s)).map_err(failed("KVM_SET_DEBUGREGS"))?;
        self.fd.set_vcpu_events(&convert::events_of(s)).map_err(failed("KVM_SET_VCPU_EVENTS"))?;
        match self.msrs.set(&self.fd, &s.msr, tsc)? {
            None => Ok(()),
            Some(number) => {
                let source = std::io::Error::other(format!("MSR {number:#x} isn't taken"));
                Err(KvmError::Request { request: "KVM_SET_MSRS", source })
            }
        }
    }

    /// Reads everything that KVM holds into `s`; gives the TSC.
    pub(super) fn get(&self, s: &mut CpuState) -> Result<u64, KvmError> {
        self.get_without_msrs(s)?;
        self.msrs.get(&self.fd, &mut s.msr)
    }

    /// As [`get`](Self::get), but cheaper.
    pub(super) fn get_without_msrs(&self, s: &mut CpuState) -> Result<(), KvmError> {
        convert::regs_into(&self.fd.get_regs().map_err(failed("KVM_GET_REGS"))?, s);
        convert::sregs_into(&self.sregs()?, s);
        if self.components != 0 {
            convert::xcrs_into(&self.fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?, s);
        }
        let xsave = self.fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))?;
        convert::xsave_into(&xsave, s, self.components);
        convert::debugregs_into(&self.fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?, s);
        let events = self.fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
        convert::events_into(&events, s);
        Ok(())
    }

    /// Whether KVM holds an event that a state can't hold.
    pub(super) fn is_event_pending(&self) -> Result<bool, KvmError> {
        let events = self.fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
        Ok(convert::is_event_pending(&events))
    }

    /// Changes the local APIC's base in KVM's copy.
    pub(super) fn set_apic_base(&self, base: u64) -> Result<(), KvmError> {
        let sregs = self.sregs()?;
        if sregs.apic_base == base { Ok(()) } else { self.set_sregs(&kvm_sregs2 { apic_base: base, ..sregs }) }
    }

    /// Gives a local APIC in the kernel its state.
    ///
    /// # Errors
    /// [`KvmError::Request`] names a register that KVM doesn't take.
    pub(super) fn set_local_apic(&self, apic: &LocalApic) -> Result<(), KvmError> {
        self.set_apic_base(apic.base)?;
        let page = lapic_page::page_of(apic);
        self.fd.set_lapic(&page).map_err(failed("KVM_SET_LAPIC"))?;
        let found = self.fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
        if let Some(text) = lapic_page::difference(&page, &found) {
            return Err(KvmError::Request { request: "KVM_SET_LAPIC", source: std::io::Error::other(text) });
        }
        if apic.tsc_deadline != 0 {
            msrs::set_tsc_deadline(&self.fd, apic.tsc_deadline)?;
        }
        if apic.nmi { self.fd.nmi().map_err(failed("KVM_NMI")) } else { Ok(()) }
    }

    /// The state of a local APIC in the kernel.
    pub(super) fn local_apic(&self) -> Result<LocalApic, KvmError> {
        let base = self.sregs()?.apic_base;
        let events = self.fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
        let page = self.fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
        Ok(LocalApic {
            base,
            registers: lapic_page::registers_of(&page, base),
            tsc_deadline: if self.has_deadline { msrs::tsc_deadline(&self.fd)? } else { 0 },
            nmi: events.nmi.pending != 0,
        })
    }

    /// Whether KVM holds the CPU in HLT, as it only does with a local APIC in the kernel.
    pub(super) fn is_halted(&self) -> Result<bool, KvmError> {
        let mp_state = self.fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
        Ok(mp_state.mp_state == KVM_MP_STATE_HALTED)
    }

    /// RIP, and the bytes there as far as they are mapped.
    pub(super) fn next_instruction(&self, vm: &Vm) -> (u64, Vec<u8>) {
        let (Ok(regs), Ok(sregs)) = (self.fd.get_regs(), self.sregs()) else { return (0, Vec::new()) };
        let linear = sregs.cs.base.wrapping_add(regs.rip);
        let byte = |at: u64| {
            let found = self.fd.translate_gva(linear.wrapping_add(at)).ok().filter(|found| found.valid != 0)?;
            let mut byte = [0];
            vm.memory().read(Gpa::new(found.physical_address), &mut byte);
            Some(byte[0])
        };
        (regs.rip, (0..LONGEST).map_while(byte).collect())
    }
}
