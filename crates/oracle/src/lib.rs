//! Properties that must hold for any input, free of any fuzzer: fuzz targets, property tests and the replay
//! of saved findings all call these.
//!
//! Each takes raw bytes and panics when the property is broken; a guest's mistakes are not.
#![forbid(unsafe_code)]

pub mod boot_images;
pub mod decode_execute;
pub mod devices;
pub mod hostile_guest;
