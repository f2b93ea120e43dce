//! Decodes and executes x86-64: instruction rows, canonical blocks, interpreter.
#![forbid(unsafe_code)]
