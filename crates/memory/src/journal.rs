//! Writes by devices and the host to pages that the engine or the MMU has derived something from.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use umbra_arch::Gpa;

#[derive(Default)]
pub(crate) struct Journal {
    pending: AtomicBool,
    writes: Mutex<Vec<(Gpa, u32)>>,
}

impl Journal {
    fn writes(&self) -> MutexGuard<'_, Vec<(Gpa, u32)>> {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner)
    }
    pub(crate) fn push(&self, gpa: Gpa, bytes: u32) {
        let mut writes = self.writes();
        writes.push((gpa, bytes));
        self.pending.store(true, Relaxed);
    }
    #[inline(always)]
    pub(crate) fn pending(&self) -> bool {
        self.pending.load(Relaxed)
    }
    pub(crate) fn take(&self) -> Vec<(Gpa, u32)> {
        let mut writes = self.writes();
        self.pending.store(false, Relaxed);
        std::mem::take(&mut *writes)
    }
}
