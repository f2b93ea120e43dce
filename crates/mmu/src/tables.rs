//! Guest tables in guest memory, as a walk reaches them.

use crate::walk::{Exchange, Tables};
use umbra_arch::Gpa;
use umbra_memory::{Backing, GuestMemory, PageFlags, RamOffset, Watcher};

/// Entry reads and locked updates in guest memory, counted.
pub(crate) struct MemoryTables<'a> {
    pub watcher: &'a Watcher,
    pub reads: u64,
}

/// Reads one entry; absent memory reads as all ones.
#[inline(always)]
pub(crate) fn read_entry(mem: &GuestMemory, gpa: Gpa, bytes: u64) -> u64 {
    match (mem.map(gpa.page()).at(gpa.offset()).readable(), bytes) {
        (Some(off), 4) => u64::from(mem.load::<u32>(off)),
        (Some(off), _) => mem.load::<u64>(off),
        (None, 4) => 0xffff_ffff,
        (None, _) => !0,
    }
}

/// Entry reads that leave no trace, not even in absent pages.
pub(crate) struct PeekedTables<'a>(pub &'a GuestMemory);

impl Tables for PeekedTables<'_> {
    fn read(&mut self, gpa: Gpa, bytes: u64) -> u64 {
        let mut raw = [0; 8];
        self.0.peek(gpa, &mut raw[..bytes as usize]);
        u64::from_le_bytes(raw)
    }

    fn exchange(&mut self, _: Gpa, _: u64, _: u64, _: u64) -> Exchange {
        Exchange::Ignored
    }
}

impl Tables for MemoryTables<'_> {
    #[inline(always)]
    fn read(&mut self, gpa: Gpa, bytes: u64) -> u64 {
        self.reads += 1;
        read_entry(self.watcher.memory(), gpa, bytes)
    }

    #[inline(always)]
    fn exchange(&mut self, gpa: Gpa, bytes: u64, old: u64, new: u64) -> Exchange {
        let Backing::Ram(off) = self.watcher.memory().map(gpa.page()).at(gpa.offset()) else {
            return Exchange::Ignored;
        };
        if self.replace(gpa, off, bytes, old, new) { Exchange::Done } else { Exchange::Changed }
    }
}

impl MemoryTables<'_> {
    /// As [`Tables::exchange`] of the entry in RAM at `off`, which `gpa` names. False if somebody changed it since it was
    /// read.
    #[inline(always)]
    pub(crate) fn replace(&self, gpa: Gpa, off: RamOffset, bytes: u64, old: u64, new: u64) -> bool {
        if !self.watcher.is_alone() {
            return self.replace_locked(gpa, off, bytes, old, new);
        }
        let mem = self.watcher.memory();
        // What devices and the host store comes between instructions.
        let done = if bytes == 4 { mem.replace(off, old as u32, new as u32) } else { mem.replace(off, old, new) };
        let flags = mem.page_flags(off);
        if done && (flags.intersects(PageFlags::CODE) || !flags.contains(PageFlags::DIRTY)) {
            self.replaced(gpa, off, bytes);
        }
        done
    }

    #[cold]
    #[inline(never)]
    fn replace_locked(&self, gpa: Gpa, off: RamOffset, bytes: u64, old: u64, new: u64) -> bool {
        let mem = self.watcher.memory();
        let done = if bytes == 4 {
            mem.compare_exchange(off, old as u32, new as u32).is_ok()
        } else {
            mem.compare_exchange(off, old, new).is_ok()
        };
        if done {
            self.replaced(gpa, off, bytes);
        }
        done
    }

    #[cold]
    #[inline(never)]
    fn replaced(&self, gpa: Gpa, off: RamOffset, bytes: u64) {
        // Entries lie in one page.
        self.watcher.memory().note_store(off, 1);
        if !cfg!(umbra_mutant = "walks-tell-nobody") {
            self.watcher.walk_stored(gpa, off, bytes as u32);
        }
    }
}
