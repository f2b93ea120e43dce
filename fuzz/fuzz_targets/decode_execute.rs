//! Glue: the property is `umbra_oracle::decode_execute`.
#![no_main]
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| umbra_oracle::decode_execute::decode_execute(data));
