//! Glue: the property is `umbra_oracle::device_io::device_io`.
#![no_main]
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| umbra_oracle::device_io::device_io(data));
