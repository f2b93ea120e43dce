//! Glue: the property is `umbra_oracle::boot_images`.
#![no_main]
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| umbra_oracle::boot_images::boot_images(data));
