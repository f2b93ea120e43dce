//! Counters: what the MMU did, for reports, tests and the acceptance rules.

use std::fmt;
use umbra_arch::control::FlushScope;

/// Root-cache slots whose hits are counted one by one; deeper ones share the last.
pub const COUNTED_SLOTS: usize = 8;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Event counts since the MMU was made.
        #[derive(Clone, PartialEq, Eq, Debug, Default)]
        pub struct MmuStats {
            $($(#[$doc])* pub $name: u64,)*
            /// Root-cache hits by LRU position, most recent first; the last counts all deeper ones.
            pub root_hits_by_slot: [u64; COUNTED_SLOTS],
        }

        impl MmuStats {
            /// Adds another MMU's counts.
            pub fn add(&mut self, other: &MmuStats) {
                $(self.$name += other.$name;)*
                for (sum, more) in self.root_hits_by_slot.iter_mut().zip(other.root_hits_by_slot) {
                    *sum += more;
                }
            }

            /// Names and values in a fixed order.
            pub fn fields(&self) -> impl Iterator<Item = (String, u64)> + '_ {
                let plain = [$((stringify!($name), self.$name)),*];
                let slots = self.root_hits_by_slot.iter().enumerate();
                plain
                    .into_iter()
                    .map(|(name, value)| (name.to_owned(), value))
                    .chain(slots.map(|(i, &n)| (format!("root_hits_slot_{i}"), n)))
            }
        }
    };
}

counters! {
    /// Commits of control registers that changed the CPU role.
    role_changes,
    /// Commits after which another cached root was found.
    root_hits,
    /// Commits after which no cached root fitted.
    root_misses,
    /// Roots made.
    roots_built,
    /// New roots whose upper half is that of the root in force before.
    upper_halves_adopted,
    /// Roots given up: evicted, or their table was freed.
    roots_freed,
    /// Shadow pages made.
    pages_allocated,
    /// Shadow pages given up.
    pages_freed,
    /// Shadow pages evicted because of the bound on their number (part of `pages_freed`).
    pages_evicted,
    /// Walks of guest tables.
    walks,
    /// Guest table entries read by those walks.
    entries_read,
    /// Context entries filled from the shadow tree.
    refills,
    /// Shadow entries dropped because the guest entry they came from changed.
    entries_dropped,
    /// Context entries dropped by an architectural flush: 0, except with unload-always.
    dropped_by_flush,
    /// Commits and invalidations that demand no flush.
    flushes_none,
    /// Flushes of one PCID's non-global entries.
    flushes_pcid_non_global,
    /// Flushes of one PCID's entries.
    flushes_pcid,
    /// Flushes of all non-global entries.
    flushes_all_non_global,
    /// Flushes of everything.
    flushes_all,
    /// Invalidations of one page.
    flushes_page,
    /// Stores to watched pages.
    table_writes,
    /// Shadow pages freed because their page no longer serves as a table (part of `pages_freed`).
    tables_retired,
    /// Columns cleared as a whole.
    context_clears,
    /// Columns enlarged after conflicts.
    context_growths,
    /// Times everything was dropped (memory map, CPUID).
    full_drops,
}

impl MmuStats {
    pub(crate) fn count_flush(&mut self, scope: FlushScope) {
        match scope {
            FlushScope::None => self.flushes_none += 1,
            FlushScope::PcidNonGlobal(_) => self.flushes_pcid_non_global += 1,
            FlushScope::Pcid(_) => self.flushes_pcid += 1,
            FlushScope::AllNonGlobal => self.flushes_all_non_global += 1,
            FlushScope::All => self.flushes_all += 1,
        }
    }
}

impl fmt::Display for MmuStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.fields() {
            writeln!(f, "{:<26}{value:>16}", name.replace('_', " "))?;
        }
        Ok(())
    }
}
