//! Engines compared with each other, and properties that must hold for any input, free of any fuzzer.
//!
//! Differential testing: a generator makes [`Case`](case::Case)s, [`Engine`](engine::Engine)s run them,
//! [`compare`] says whether outcomes differ in anything that is defined.
//!
//! Properties take raw bytes and panic when they are broken; a guest's mistakes are not. Fuzz targets, property
//! tests and the replay of saved findings all call these.
#![forbid(unsafe_code)]
#![cfg(target_os = "linux")]

pub mod asks_kvm;
pub mod boot_images;
pub mod campaign;
pub mod case;
pub mod compare;
pub mod compared;
pub mod decode_execute;
pub mod device_io;
pub mod devices;
pub mod engine;
pub mod engines;
pub mod hostile_guest;
pub mod image;
pub mod minimise;
pub mod programs;
pub mod random;
pub mod ring0;
pub mod roms;
pub mod rows;
pub mod saved;
pub mod self_modifying;
pub mod trace;
pub mod window;
