//! [`Hypervisor`]: the framework's own functions.
//!
//! **Never run**: type-checked with `cargo check --target x86_64-apple-darwin --features hvf` only. The program must be
//! signed with the entitlement com.apple.security.hypervisor.
#![allow(unsafe_code, reason = "C functions")]

use super::framework::{Capability, Framework, HvfError, Register};
use std::ffi::c_void;
use std::marker::PhantomData;
use std::sync::Arc;
use umbra_memory::GuestMemory;

/// hv_return_t, of which 0 is success.
type Return = u32;

const READ: u64 = 1;
const WRITE: u64 = 2;
const EXECUTE: u64 = 4;

/// mach_timebase_info_data_t: a tick of mach_absolute_time is numerator / denominator nanoseconds.
#[repr(C)]
#[derive(Default)]
struct Timebase {
    numerator: u32,
    denominator: u32,
}

#[link(name = "Hypervisor", kind = "framework")]
unsafe extern "C" {
    fn hv_vm_create(options: u64) -> Return;
    fn hv_vm_destroy() -> Return;
    fn hv_vm_map(host: *const c_void, gpa: u64, bytes: usize, flags: u64) -> Return;
    fn hv_vcpu_create(vcpu: *mut u32, options: u64) -> Return;
    fn hv_vcpu_destroy(vcpu: u32) -> Return;
    fn hv_vcpu_read_register(vcpu: u32, register: u32, value: *mut u64) -> Return;
    fn hv_vcpu_write_register(vcpu: u32, register: u32, value: u64) -> Return;
    fn hv_vmx_vcpu_read_vmcs(vcpu: u32, field: u32, value: *mut u64) -> Return;
    fn hv_vmx_vcpu_write_vmcs(vcpu: u32, field: u32, value: u64) -> Return;
    fn hv_vmx_read_capability(capability: u32, value: *mut u64) -> Return;
    fn hv_vcpu_run_until(vcpu: u32, deadline: u64) -> Return;
}

unsafe extern "C" {
    fn mach_absolute_time() -> u64;
    fn mach_timebase_info(info: *mut Timebase) -> i32;
}

/// The process's virtual machine: a process has one, and one vCPU here, which belongs to the thread that made it.
struct Machine {
    /// Mapped into it.
    _memory: Arc<GuestMemory>,
    _of_this_thread: PhantomData<*const ()>,
}

/// A virtual CPU in a virtual machine that maps a [`GuestMemory`].
pub struct Hypervisor {
    vcpu: u32,
    _machine: Machine,
}

impl Hypervisor {
    /// Makes the process's virtual machine and its vCPU.
    ///
    /// # Errors
    /// [`HvfError`] without the entitlement or VMX, or if there is a virtual machine already.
    pub fn new(memory: &Arc<GuestMemory>) -> Result<Self, HvfError> {
        // SAFETY: a number goes in, and nothing else.
        done("hv_vm_create", unsafe { hv_vm_create(0) })?;
        let machine = Machine { _memory: Arc::clone(memory), _of_this_thread: PhantomData };
        for region in memory.host_regions() {
            let flags = if region.rom { READ | EXECUTE } else { READ | WRITE | EXECUTE };
            let host = region.host as *const c_void;
            // SAFETY: the region is mapped as long as the memory lives, which `machine` keeps longer than the mapping.
            done("hv_vm_map", unsafe { hv_vm_map(host, region.gpa.raw(), region.bytes as usize, flags) })?;
        }
        let mut vcpu = 0;
        // SAFETY: the pointer is to a local.
        done("hv_vcpu_create", unsafe { hv_vcpu_create(&mut vcpu, 0) })?;
        Ok(Self { vcpu, _machine: machine })
    }
}

impl Drop for Hypervisor {
    fn drop(&mut self) {
        // SAFETY: the vCPU is this thread's, and nobody uses it afterwards.
        unsafe { hv_vcpu_destroy(self.vcpu) };
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: its vCPU is gone; what was mapped stays until this returns.
        unsafe { hv_vm_destroy() };
    }
}

fn done(call: &'static str, code: Return) -> Result<(), HvfError> {
    if code == 0 { Ok(()) } else { Err(HvfError { call, code }) }
}

impl Framework for Hypervisor {
    fn read_register(&self, register: Register) -> Result<u64, HvfError> {
        let mut value = 0;
        // SAFETY: the vCPU is this thread's, as it can't be sent; the pointer is to a local.
        let code = unsafe { hv_vcpu_read_register(self.vcpu, register as u32, &mut value) };
        done("hv_vcpu_read_register", code).map(|()| value)
    }

    fn write_register(&mut self, register: Register, value: u64) -> Result<(), HvfError> {
        // SAFETY: as above.
        let code = unsafe { hv_vcpu_write_register(self.vcpu, register as u32, value) };
        done("hv_vcpu_write_register", code)
    }

    fn read_vmcs(&self, field: u32) -> Result<u64, HvfError> {
        let mut value = 0;
        // SAFETY: as above.
        let code = unsafe { hv_vmx_vcpu_read_vmcs(self.vcpu, field, &mut value) };
        done("hv_vmx_vcpu_read_vmcs", code).map(|()| value)
    }

    fn write_vmcs(&mut self, field: u32, value: u64) -> Result<(), HvfError> {
        // SAFETY: as above; the framework checks values that could hurt the host.
        let code = unsafe { hv_vmx_vcpu_write_vmcs(self.vcpu, field, value) };
        done("hv_vmx_vcpu_write_vmcs", code)
    }

    fn capability(&self, of: Capability) -> Result<u64, HvfError> {
        let mut value = 0;
        // SAFETY: the pointer is to a local.
        let code = unsafe { hv_vmx_read_capability(of as u32, &mut value) };
        done("hv_vmx_read_capability", code).map(|()| value)
    }

    fn run(&mut self, ns: u64) -> Result<(), HvfError> {
        let mut base = Timebase::default();
        // SAFETY: the pointer is to a local of the structure's layout.
        unsafe { mach_timebase_info(&mut base) };
        let ticks = u128::from(ns) * u128::from(base.denominator) / u128::from(base.numerator.max(1));
        // SAFETY: reads a counter; then as above, and the guest reaches nothing but what is mapped.
        let code = unsafe { hv_vcpu_run_until(self.vcpu, mach_absolute_time().saturating_add(ticks as u64)) };
        done("hv_vcpu_run_until", code)
    }
}
