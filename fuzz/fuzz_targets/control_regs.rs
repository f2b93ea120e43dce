//! Glue: the property is `umbra_oracle::compared::control_regs`.
#![no_main]
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| umbra_oracle::compared::control_regs(data));
