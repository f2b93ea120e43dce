//! Translates hot blocks of x86-64 to x86-64 host code.
//!
//! [`Jit`] is an engine around an [`Interpreter`](umbra_cpu::Interpreter), which decodes all code, runs what is
//! cold, single-stepped or traced, and does everything that happens between blocks. A canonical block that has
//! run a few times is [`translate`]d: each operation either becomes host instructions on guest registers that stay
//! in host [`registers`], or a call of the operation's own function. Instruction counts, virtual time and
//! everything else a guest can see are the interpreter's.
//!
//! Rules: an operation's host code changes nothing of the guest before its accesses are known to hit the MMU's
//! fast table, otherwise the whole operation is done by its function; so faults, devices, watched pages and code
//! writes need no code here. The guest's status flags are in RAX wherever anything could look at them.
#![allow(unsafe_code, reason = "calls generated code; each block says why it is sound")]

mod bases;
mod bit_tests;
mod bits;
mod branch;
mod contexts;
mod emitter;
mod engine;
mod exchanges;
mod flags;
mod frame;
mod gates;
mod groups;
mod in_core;
mod jumps;
mod listing;
mod mechanisms;
mod memory_path;
mod mmx;
mod narrow;
mod native;
mod plan;
mod ranges;
mod recipes;
mod registers;
mod renaming;
mod returns;
mod rewrite;
mod sample;
mod shifts;
mod stats;
mod strings;
mod stubs;
mod system;
mod system_calls;
mod traces;
mod translate;
mod turns;
mod vector;
mod vector_file;
mod views;
mod windows;
mod x87;

pub use engine::{Jit, JitError, JitOptions};
pub use listing::{Listener, Part, Translated};
pub use mechanisms::{Mechanism, Mechanisms};
pub use sample::{SampleError, SampleMode, translations_of};
pub use stats::JitStats;
