//! Whether KVM has a local APIC of its own for a machine that keeps its I/O APIC and 8259s.

use super::error::{KvmError, failed};
use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm};

/// Pins of the I/O APIC that stays outside.
const PINS: u64 = 24;

/// Tries it in a virtual machine of its own: a backend may list what it can't do. [`KvmVcpu`](super::KvmVcpu) doesn't use it:
/// its interrupts come from the machine's own local APIC, so that a guest can change to another engine at any time.
///
/// # Errors
/// [`KvmError`] when there is no usable KVM.
pub fn offers_split_irqchip() -> Result<bool, KvmError> {
    let kvm = Kvm::new().map_err(|error| KvmError::Open(error.into()))?;
    if !kvm.check_extension(Cap::SplitIrqchip) {
        return Ok(false);
    }
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    let split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: [PINS, 0, 0, 0], ..Default::default() };
    let has_lapic = || vm.enable_cap(&split).and_then(|()| vm.create_vcpu(0)).and_then(|vcpu| vcpu.get_lapic());
    Ok(has_lapic().is_ok())
}
