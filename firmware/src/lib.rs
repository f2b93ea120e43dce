//! Umbra's own firmware: the reset stub, assembled in Rust.
#![forbid(unsafe_code)]
