//! KVM and Hypervisor.framework behind [`umbra_arch::Vcpu`], and the hand-over between an accelerator and
//! another engine.
//!
//! An accelerator shares the guest's RAM with everybody else (one host mapping), asks the same
//! [`Bus`](umbra_arch::Bus) for ports, device memory and interrupts, and exchanges the whole
//! [`CpuState`](umbra_arch::CpuState). What it can't execute is an answer of its own,
//! [`Exit::Refused`](umbra_arch::Exit::Refused): neither a mistake nor a difference. Every result is to be
//! labelled with [`Backend`]: /dev/kvm may be software that knows less than a processor ([`defects`]).
//!
//! What a backend is known to do wrong is in [`defects`].
//!
//! Time is the host's here: virtual time grows with the host's clock while the guest runs, so runs are not
//! repeatable, and RDTSC shows the host's counter.

pub mod backend;
pub mod defects;
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
mod device_memory;
pub mod handover;
#[cfg(any(feature = "hvf", test))]
pub mod hvf;
mod time;

#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub mod kvm;

pub use backend::Backend;
pub use handover::{Accelerator, HandOver};
