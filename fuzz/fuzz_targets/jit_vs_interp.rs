//! Glue: the property is `umbra_oracle::compared::jit_vs_interp`.
#![no_main]
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| umbra_oracle::compared::jit_vs_interp(data));
