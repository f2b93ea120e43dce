//! macOS' Hypervisor.framework on Intel processors, behind the cargo feature `hvf`.
//!
//! **This has never run on hardware**, and nothing here calls the real functions yet: the engine is written over
//! [`Framework`], the part of the framework that it uses, and tested against a stand-in for it.
//!
//! The framework hands out VMX as it is. Device memory would need an instruction decoder here, so an access to it
//! is [`Exit::Refused`](umbra_arch::Exit::Refused): a [`HandOver`](crate::HandOver) lets the other engine do it.

mod exits;
mod framework;
mod state;
#[cfg(test)]
mod tests;
mod vcpu;
mod vmcs;

pub use framework::{Framework, HvfError, Register};
pub use vcpu::HvfVcpu;
