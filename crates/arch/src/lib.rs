//! The x86-64 architecture as data and pure rules.
//!
//! Nothing here executes a guest or owns a host resource: types for addresses and registers, the
//! legality and effects of control-register writes, descriptors, MSRs, CPUID profiles, and the
//! borders between an engine and the rest of the machine ([`Vcpu`], [`Bus`], [`Fault`], [`Exit`]).
//!
//! Rules cite the manual by section title: "SDM" is Intel 64 and IA-32 Architectures Software
//! Developer's Manual, "APM" is AMD64 Architecture Programmer's Manual (revisions: ARCHITECTURE.md).
#![forbid(unsafe_code)]

pub mod addr;
pub mod control;
pub mod cpuid;
pub mod descriptor;
pub mod exit;
pub mod fault;
pub mod fpu;
pub mod local_apic;
pub mod msr;
pub mod paging;
pub mod rflags;
pub mod segment;
pub mod state;
pub mod time;
pub mod vcpu;

pub use addr::{Gpa, GpaPage, Gva, GvaPage, PAGE_SIZE};
pub use exit::Exit;
pub use fault::Fault;
pub use local_apic::{ApicBus, ApicLoan, ApicMessage, LocalApic};
pub use state::CpuState;
pub use time::VirtualTime;
pub use vcpu::{AccessWidth, Bus, PageAnswer, PageContext, Reply, Slice, Stopped, Vcpu};
