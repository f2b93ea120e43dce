//! Glue: the property is `umbra_oracle::self_modifying`.
#![no_main]
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| umbra_oracle::self_modifying::self_modifying(data));
