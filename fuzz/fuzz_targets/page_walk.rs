//! Glue: the property is `umbra_oracle::compared::page_walk`.
#![no_main]
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| umbra_oracle::compared::page_walk(data));
