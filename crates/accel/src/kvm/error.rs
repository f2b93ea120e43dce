//! What the host can refuse.

use umbra_memory::MemoryError;

/// A host-side problem with /dev/kvm.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No device, or no right to use it.
    #[error("/dev/kvm can't be used: {0}: check that it exists and that this user may open it, or use --accel soft")]
    Open(#[source] std::io::Error),
    /// A request failed.
    #[error("{request} failed: {source}: this kernel's KVM can't run the guest; use --accel soft")]
    Request {
        /// The ioctl.
        request: &'static str,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// Something that every supported kernel offers is missing.
    #[error("this kernel's KVM lacks {0}: use a kernel of 5.5 or later, or --accel soft")]
    Missing(&'static str),
    /// Several CPUs, or a bus with no APICs at all.
    #[error("this machine can't lend its local APIC to KVM: use --irqchip user")]
    NoLoan,
    /// A case's memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Names a failed request.
pub(super) fn failed(request: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Request { request, source: error.into() }
}
