//! Runs one guest *data* instruction (MMX, SSE, AVX, x87, and for tests integer ones) on the host CPU:
//! registers in and out, faults as values.
//!
//! [`HostExec::prepare`] turns a decoded instruction into a [`HostOp`]; [`HostExec::run`] executes it on an
//! [`FpState`](umbra_arch::fpu::FpState), the general registers, RFLAGS and a [`MemBuf`] that stands for its memory operand: the caller
//! has loaded it through the guest's MMU, and stores it back afterwards. Behind a `HostOp` is a *stub*, a few
//! host instructions around the guest's one: load the registers it uses, execute it, store what it wrote.
//!
//! Rules:
//! - A stub exists per instruction *form* (code and immediate), not per register: vector and general register
//!   operands are renamed to fixed host registers, and their numbers travel in the `HostOp`. So the number of
//!   stubs is bounded, whatever a guest executes.
//! - The host never faults: memory is the `MemBuf` only, floating-point exceptions are masked while the
//!   instruction runs (x87 overflow and underflow: never delivered), and division is checked first. Unmasked exceptions go through careful paths.
//! - What isn't plainly data (branches, stack, system, strings, gathers, MASKMOV, XSAVE's family, control
//!   words, environments) is refused with a reason.
//!
//! Approximations (RCPPS, RSQRTPS, x87 transcendentals) are the host's.

#![allow(unsafe_code, reason = "calls generated code; each block says why it is sound")]

mod code_memory;
mod exec;
mod executable;
mod features;
mod form;
mod host_op;
mod integer;
mod mmx;
#[cfg(all(feature = "native", target_os = "linux"))]
pub mod native;
mod simd;
mod stub;
mod x87;

pub use code_memory::{CodeMemory, ProfilerMark};
pub use exec::HostExec;
pub use features::{HostFeatures, host_features};
pub use host_op::{Class, HostExecError, HostOp, MemBuf, Outcome, Prepared};
