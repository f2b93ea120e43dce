//! The PC's devices as pure register machines.
#![forbid(unsafe_code)]
