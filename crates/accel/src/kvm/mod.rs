//! KVM. [`KvmVcpu`] is an engine for a machine; [`CaseRunner`] runs single test cases.

mod case;
mod convert;
mod cpuid;
mod error;
mod exits;
mod ioctls;
mod irqchip;
mod kernel_apic;
mod kick;
mod lapic_page;
mod msrs;
mod probe;
mod registers;
mod vcpu;
mod vm;

pub use case::{CaseEnd, CaseLimit, CaseOutcome, CaseRunner};
pub use cpuid::{Fitted, fit};
pub use error::KvmError;
pub use irqchip::Irqchip;
pub use vcpu::KvmVcpu;
pub use vm::Vm;
