//! Glue: the property is `umbra_oracle::hostile_guest`.
#![no_main]
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| umbra_oracle::hostile_guest::hostile_guest(data));
