//! Virtual time that follows the host's clock during a slice.

use std::time::Instant;
use umbra_arch::{Slice, VirtualTime};

/// One slice's clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SliceClock {
    slice: Slice,
    started: Instant,
}

impl SliceClock {
    pub(crate) fn start(slice: Slice) -> Self {
        Self { slice, started: Instant::now() }
    }

    pub(crate) fn now(&self) -> VirtualTime {
        self.slice.now.plus(self.started.elapsed().as_nanos() as u64)
    }

    /// Nanoseconds until the slice ends.
    pub(crate) fn left(&self) -> u64 {
        self.slice.until.since(self.now())
    }
}
