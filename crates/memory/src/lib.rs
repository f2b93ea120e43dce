//! Guest-physical memory: RAM, ROM, page flags and the journal of flagged writes.
//!
//! This crate owns the one host mapping behind the guest's RAM. Everybody else names bytes by
//! [`RamOffset`], a plain integer, so that neither the MMU nor an interpreter needs a pointer: every
//! access here checks the offset against the mapping. Physical addresses become offsets by
//! [`GuestMemory::map`]; devices, loaders and DMA use [`GuestMemory::read`] and [`GuestMemory::write`].
//! RAM may be filled from a [`PageSource`] page by page, as it is needed.

mod error;
mod flags;
mod guest;
mod host;
mod journal;
mod layout;
mod lazy;
mod offset;
mod scalar;
#[cfg(target_os = "linux")]
mod shared;
mod watcher;
#[cfg(target_os = "linux")]
mod window;

pub use error::MemoryError;
pub use flags::PageFlags;
pub use guest::{GuestMemory, HostRegion};
pub use journal::Change;
pub use layout::{HOLE_END, HOLE_START, LOW_RAM_END};
pub use lazy::{FileSource, PageFailure, PageSource};
pub use offset::{Backing, RamOffset};
pub use scalar::Scalar;
pub use watcher::Watcher;
#[cfg(target_os = "linux")]
pub use window::Window;
