//! The part of Hypervisor.framework that is used.

/// A register as hv_x86_reg_t numbers it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names are the manual's")]
pub enum Register {
    Rip = 0,
    Rflags = 1,
    Rax = 2,
    Rcx = 3,
    Rdx = 4,
    Rbx = 5,
    Rsi = 6,
    Rdi = 7,
    Rsp = 8,
    Rbp = 9,
    R8 = 10,
    R9 = 11,
    R10 = 12,
    R11 = 13,
    R12 = 14,
    R13 = 15,
    R14 = 16,
    R15 = 17,
}

/// What VMX offers of one kind of controls, as hv_vmx_capability_t numbers it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Capability {
    /// Pin-based VM-execution controls.
    Pin = 0,
    /// Primary processor-based VM-execution controls.
    Processor = 1,
    /// Secondary ones.
    Secondary = 2,
    /// VM-entry controls.
    Entry = 3,
    /// VM-exit controls.
    Exit = 4,
}

/// The framework refused a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("Hypervisor.framework's {call} failed with {code:#x}: use --accel soft")]
pub struct HvfError {
    /// The function.
    pub call: &'static str,
    /// Its hv_return_t.
    pub code: u32,
}

/// One vCPU of the framework, by the functions that act on it.
pub trait Framework {
    /// hv_vcpu_read_register.
    ///
    /// # Errors
    /// The framework's refusal, as for all functions here.
    fn read_register(&self, register: Register) -> Result<u64, HvfError>;
    /// hv_vcpu_write_register.
    ///
    /// # Errors
    /// As above.
    fn write_register(&mut self, register: Register, value: u64) -> Result<(), HvfError>;
    /// hv_vmx_vcpu_read_vmcs.
    ///
    /// # Errors
    /// As above.
    fn read_vmcs(&self, field: u32) -> Result<u64, HvfError>;
    /// hv_vmx_vcpu_write_vmcs.
    ///
    /// # Errors
    /// As above.
    fn write_vmcs(&mut self, field: u32, value: u64) -> Result<(), HvfError>;
    /// hv_vmx_read_capability: bits that must be set in the lower half, bits that may be in the upper one.
    ///
    /// # Errors
    /// As above.
    fn capability(&self, of: Capability) -> Result<u64, HvfError>;
    /// hv_vcpu_run_until: enters the guest for at most `ns` nanoseconds.
    ///
    /// # Errors
    /// As above.
    fn run(&mut self, ns: u64) -> Result<(), HvfError>;
}
