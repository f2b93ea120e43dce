//! Guests assembled in Rust: the embedded guest and self-checking test ROMs.
#![forbid(unsafe_code)]
