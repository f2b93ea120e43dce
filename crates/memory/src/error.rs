//! What the host can refuse.

use umbra_arch::Gpa;

/// A host-side mistake or shortage; never caused by a running guest.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// RAM sizes are whole pages.
    #[error("guest RAM of {0} bytes is not a positive multiple of 4096: choose another size")]
    BadSize(u64),
    /// The host refused the mapping.
    #[error("the host refused {bytes} bytes for guest RAM: choose a smaller size or free memory")]
    Map {
        /// Bytes asked for.
        bytes: u64,
        /// The host's reason.
        source: std::io::Error,
    },
    /// A region must start and end at page borders.
    #[error("region at {gpa} of {bytes} bytes is not page-aligned: round it to 4096")]
    Misaligned {
        /// First byte.
        gpa: Gpa,
        /// Length.
        bytes: u64,
    },
    /// The space behind RAM for ROMs and added regions is used up.
    #[error("no room for another {bytes} bytes of ROM or added RAM ({left} left): use a smaller image")]
    NoRoom {
        /// Bytes asked for.
        bytes: u64,
        /// Bytes left.
        left: u64,
    },
    /// A memory has one page source for its life.
    #[error("the memory already has a page source: give one file only")]
    SecondSource,
    /// Engines watch the memory they run on.
    #[error("more than {0} virtual CPUs on one memory: use fewer")]
    TooManyWatchers(usize),
}
