//! What each watcher has to hear of before it runs again: one bounded queue each.

use crate::RamOffset;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use umbra_arch::{Gpa, PAGE_SIZE};

/// Most watchers of one memory.
pub(crate) const MAX_WATCHERS: usize = 32;
/// Entries in a queue before stores are merged to whole pages.
const QUEUE: usize = 1024;

/// Something that happened to memory behind a watcher's back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// Bytes of a CODE or WATCHED page may have changed.
    Written {
        /// The first of them.
        gpa: Gpa,
        /// How many; they don't leave the page unless the writer's access did.
        bytes: u32,
    },
    /// The page got its first CODE or WATCHED flag, or lost DIRTY: no fast write may hit it any more.
    Flagged(RamOffset),
    /// The map of regions changed, or the queue overflowed: everything derived from memory is stale.
    Everything,
}

pub(crate) struct Journal {
    /// A bit for each queue that holds something.
    pending: AtomicU32,
    queues: Mutex<Box<[Vec<Change>; MAX_WATCHERS]>>,
}

impl Default for Journal {
    fn default() -> Self {
        Self { pending: AtomicU32::new(0), queues: Mutex::new(Box::new(std::array::from_fn(|_| Vec::new()))) }
    }
}

impl Journal {
    fn queues(&self) -> MutexGuard<'_, Box<[Vec<Change>; MAX_WATCHERS]>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a change into the queues whose bits are set in `to`.
    pub(crate) fn push(&self, to: u32, change: Change) {
        if to == 0 {
            return;
        }
        let mut queues = self.queues();
        for (id, queue) in queues.iter_mut().enumerate() {
            if to >> id & 1 != 0 {
                append(queue, change);
            }
        }
        self.pending.fetch_or(to, Relaxed);
    }

    #[inline(always)]
    pub(crate) fn pending(&self, id: u8) -> bool {
        self.pending.load(Relaxed) & 1 << id != 0
    }

    pub(crate) fn take(&self, id: u8) -> Vec<Change> {
        let mut queues = self.queues();
        self.pending.fetch_and(!(1 << id), Relaxed);
        queues.get_mut(usize::from(id)).map(std::mem::take).unwrap_or_default()
    }
}

fn append(queue: &mut Vec<Change>, change: Change) {
    match queue.last_mut() {
        Some(Change::Everything) => return,
        Some(last) if *last == change => return,
        Some(Change::Written { gpa, bytes }) if follows(*gpa, *bytes, change) => {
            if let Change::Written { bytes: more, .. } = change {
                *bytes += more;
            }
            return;
        }
        _ => {}
    }
    if change == Change::Everything {
        queue.clear();
    } else if queue.len() >= QUEUE {
        widen(queue);
        return append(queue, change);
    }
    queue.push(change);
}

/// Whether `change` writes the bytes behind these, on the same page.
fn follows(gpa: Gpa, bytes: u32, change: Change) -> bool {
    matches!(change, Change::Written { gpa: next, .. }
        if next.raw() == gpa.raw().wrapping_add(bytes.into()) && next.page() == gpa.page())
}

/// Merges a full queue's entries by pages, or into one if that doesn't help.
fn widen(queue: &mut Vec<Change>) {
    let mut written = Vec::new();
    let mut flagged = Vec::new();
    for change in queue.iter() {
        match *change {
            Change::Written { gpa, bytes } => {
                let last = gpa.raw().saturating_add(u64::from(bytes.max(1)) - 1) >> 12;
                written.extend(gpa.page().raw()..=last);
            }
            Change::Flagged(off) => flagged.push(off.page_base().raw()),
            Change::Everything => {}
        }
    }
    for pages in [&mut written, &mut flagged] {
        pages.sort_unstable();
        pages.dedup();
    }
    queue.clear();
    if written.len() + flagged.len() > QUEUE / 2 {
        queue.push(Change::Everything);
        return;
    }
    let whole = |page: u64| Change::Written { gpa: Gpa::new(page << 12), bytes: PAGE_SIZE as u32 };
    queue.extend(flagged.into_iter().map(|off| Change::Flagged(RamOffset::new(off))));
    queue.extend(written.into_iter().map(whole));
}
