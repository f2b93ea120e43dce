//! Where the local APIC of a guest under KVM is.

use super::error::{KvmError, failed};
use crate::{Backend, defects};
use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm, VmFd};
use std::fmt;

/// Pins of the I/O APIC, which stays outside.
pub(super) const PINS: usize = 24;
/// Flag of KVM_CAP_X2APIC_API: the local APIC doesn't offer to keep ends of interrupts to itself, nor does the machine's.
const DISABLE_SUPPRESS_EOI_BROADCAST: u64 = 1 << 3;

/// Whose local APIC a guest has. I/O APIC and 8259s are the machine's in any case.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Irqchip {
    /// KVM's own, with x2APIC and TSC deadline: its timer and what a CPU sends to itself cost no way out of the kernel.
    Split,
    /// The machine's.
    User,
}

impl Irqchip {
    /// The best that this host's KVM can do.
    ///
    /// # Errors
    /// [`KvmError`] when there is no usable KVM.
    pub fn offered() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|error| KvmError::Open(error.into()))?;
        let needed = [Cap::SplitIrqchip, Cap::SignalMsi, Cap::IrqRouting, Cap::MpState];
        if !needed.into_iter().all(|cap| kvm.check_extension(cap)) {
            return Ok(Self::User);
        }
        let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        // A backend may list what it can't do.
        let has_lapic = Self::Split
            .make(&kvm, &vm)
            .and_then(|()| vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU")))
            .and_then(|vcpu| vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC")));
        Ok(if has_lapic.is_ok() { Self::Split } else { Self::User })
    }

    /// What is used where nobody says otherwise: [`Split`](Self::Split) where it is offered by a backend that has it right.
    ///
    /// # Errors
    /// [`KvmError`] when there is no usable KVM.
    pub fn preferred() -> Result<Self, KvmError> {
        let is_spoiled = defects::of_split_irqchip(Backend::of_kvm()).is_some();
        Self::offered().map(|offered| if is_spoiled { Self::User } else { offered })
    }

    /// Makes KVM's part of it, before there is a CPU.
    pub(super) fn make(self, kvm: &Kvm, vm: &VmFd) -> Result<(), KvmError> {
        if self == Self::User {
            return Ok(());
        }
        let enable = |cap, arg| {
            let cap = kvm_enable_cap { cap, args: [arg, 0, 0, 0], ..Default::default() };
            vm.enable_cap(&cap).map_err(failed("KVM_ENABLE_CAP"))
        };
        enable(KVM_CAP_SPLIT_IRQCHIP, PINS as u64)?;
        let flags = kvm.check_extension_raw(KVM_CAP_X2APIC_API.into()) as u64;
        if flags & DISABLE_SUPPRESS_EOI_BROADCAST != 0 {
            enable(KVM_CAP_X2APIC_API, DISABLE_SUPPRESS_EOI_BROADCAST)?;
        }
        Ok(())
    }
}

impl fmt::Display for Irqchip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Split => "split",
            Self::User => "user",
        })
    }
}
