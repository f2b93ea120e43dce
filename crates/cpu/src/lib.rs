//! Decodes and executes x86-64.
//!
//! The hot path in three hops: [`Interpreter::run`](interp) finds a canonical [`block`] and calls each
//! operation's function; the function comes from a row in [`isa`]; its operands go through [`operand`]
//! and [`access`] to the MMU's fast table.
//!
//! Rules: no unsafe; semantics live once, in the rows; guests' mistakes are [`Fault`](umbra_arch::Fault)s;
//! nothing here allocates per instruction.
#![forbid(unsafe_code)]

pub mod access;
mod at_once;
pub mod block;
pub mod core;
pub mod coverage;
pub mod debug;
pub mod decode;
pub mod deliver;
pub mod far;
pub mod flags;
pub mod frame;
pub mod interp;
pub mod isa;
pub mod loaded;
pub mod msr;
pub mod op;
pub mod operand;
pub mod returns;
pub mod segments;
pub mod stepping;
pub mod taskswitch;
pub mod trace;
pub mod word;

pub use crate::core::{Core, EngineError, EngineOptions};
pub use interp::Interpreter;
