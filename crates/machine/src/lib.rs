//! A PC made of CPUs, memory and devices: memory map, boot protocols, events, run loop, snapshots.
#![forbid(unsafe_code)]

pub mod acpi;
pub mod boot;
pub mod events;
pub mod explain;
pub mod machine;
pub mod memory_map;
pub mod outcome;
pub mod pc;
pub mod run;
pub mod snapshot;

pub use machine::{Machine, MachineConfig, MachineError, guest_memory, map_of};
pub use outcome::{End, Halted, Stop};
pub use pc::PageStats;
pub use run::Host;
pub use snapshot::SnapshotError;
