//! VMX controls ("VM-Execution Control Fields", "VM-Exit Control Fields", "VM-Entry Control Fields"): what must leave
//! the guest so that [`HvfVcpu`](super::HvfVcpu) sees it.

use super::framework::{Capability, Framework, HvfError};
use super::vmcs::*;
use umbra_arch::control::{Cr0, Cr4};

const INTERRUPT_WINDOW: u64 = 1 << 2;
const HLT_EXITING: u64 = 1 << 7;
const CR8_EXITING: u64 = 3 << 19;
const IO_EXITING: u64 = 1 << 24;
const HAS_SECONDARY: u64 = 1 << 31;
const PROCESSOR: u64 = HLT_EXITING | CR8_EXITING | IO_EXITING | HAS_SECONDARY;
const UNRESTRICTED_GUEST: u64 = 1 << 7;
const HOST_64_BIT: u64 = 1 << 9;
const EXIT_EFER: u64 = 3 << 20;
const IA32E_GUEST: u64 = 1 << 9;
const ENTRY_EFER: u64 = 1 << 15;

/// Sets all that never changes. The guest may write each bit of CR0 and CR4 but those that VMX needs.
pub(super) fn install(hv: &mut impl Framework) -> Result<(), HvfError> {
    write(hv, PIN_CONTROLS, Capability::Pin, 0)?;
    write(hv, SECONDARY_CONTROLS, Capability::Secondary, UNRESTRICTED_GUEST)?;
    write(hv, EXIT_CONTROLS, Capability::Exit, HOST_64_BIT | EXIT_EFER)?;
    hv.write_vmcs(EXCEPTION_BITMAP, 0)?;
    hv.write_vmcs(CR0_MASK, Cr0::NE)?;
    hv.write_vmcs(CR4_MASK, Cr4::VMXE)?;
    ask_for_window(hv, false)
}

/// Whether the guest is left as soon as it can take an interrupt.
pub(super) fn ask_for_window(hv: &mut impl Framework, yes: bool) -> Result<(), HvfError> {
    let window = if yes { INTERRUPT_WINDOW } else { 0 };
    write(hv, PROCESSOR_CONTROLS, Capability::Processor, PROCESSOR | window)
}

/// The guest goes on with or without EFER.LMA.
pub(super) fn set_long_mode(hv: &mut impl Framework, lma: bool) -> Result<(), HvfError> {
    write(hv, ENTRY_CONTROLS, Capability::Entry, ENTRY_EFER | if lma { IA32E_GUEST } else { 0 })
}

/// Writes a field of controls with the bits that must be set; an error if one that is wanted can't be
/// ("VMX Capability Reporting Facility": the lower half must be set, the upper one may be).
fn write(hv: &mut impl Framework, field: u32, of: Capability, wanted: u64) -> Result<(), HvfError> {
    let capability = hv.capability(of)?;
    let (must, may) = (capability & 0xffff_ffff, capability >> 32);
    if wanted & !may != 0 {
        return Err(HvfError { call: "hv_vmx_read_capability (controls not offered)", code: (wanted & !may) as u32 });
    }
    hv.write_vmcs(field, wanted | must)
}
