//! A PC made of CPUs, memory and devices: memory map, boot protocols, events, run loop, snapshots.
#![forbid(unsafe_code)]

pub mod acpi;
pub mod boot;
pub mod memory_map;
