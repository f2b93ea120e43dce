//! macOS' Hypervisor.framework on Intel processors, behind the cargo feature `hvf`.
//!
//! **This has never run on hardware**: the engine is written over [`Framework`], the part of the framework that it uses,
//! and tested against a stand-in for it. `Hypervisor`, the framework itself, is only type-checked.
//!
//! The framework hands out VMX as it is. Device memory would need an instruction decoder here, so an access to it
//! is [`Exit::Refused`](umbra_arch::Exit::Refused): a [`HandOver`](crate::HandOver) lets the other engine do it.

mod controls;
mod exits;
mod framework;
#[cfg(all(target_os = "macos", target_arch = "x86_64"))]
mod real;
mod state;
#[cfg(test)]
mod tests;
mod vcpu;
mod vmcs;

pub use framework::{Capability, Framework, HvfError, Register};
#[cfg(all(target_os = "macos", target_arch = "x86_64"))]
pub use real::Hypervisor;
pub use vcpu::HvfVcpu;
