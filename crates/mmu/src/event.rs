//! What the MMU does, one event at a time, for traces.

use crate::role::{CpuRole, PageRole};
use serde::Serialize;
use std::fmt;
use umbra_arch::control::FlushScope;
use umbra_arch::paging::AccessKind;
use umbra_arch::{Fault, Gpa, GpaPage, Gva};

/// One event. The counters of [`MmuStats`](crate::MmuStats) count them; a trace shows them in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A commit of control registers changed the role.
    Role {
        /// The new one.
        #[serde(flatten)]
        role: CpuRole,
    },
    /// The root of the new role was found again.
    RootHit {
        /// Where it is kept.
        slot: usize,
        /// Its position in order of last use; 0 is the one before.
        position: usize,
    },
    /// No kept root fitted: one was made.
    RootMiss {
        /// Where it is kept.
        slot: usize,
        /// The tables' role.
        #[serde(flatten)]
        role: PageRole,
    },
    /// A root was given up.
    RootFreed {
        /// Where it was kept.
        slot: usize,
    },
    /// The architecture demands a flush. Nothing is dropped by it unless `--mmu unload-always`.
    Flush {
        /// Of what.
        scope: FlushScope,
    },
    /// INVLPG, or INVPCID of one page.
    FlushPage {
        /// The linear address.
        gva: Gva,
    },
    /// A walk of guest tables.
    Walk {
        /// The linear address.
        gva: Gva,
        /// What the access wanted.
        access: AccessKind,
        /// User mode.
        user: bool,
        /// Table entries read; fewer than the paging mode's levels where the shadow tree knew the rest.
        entries: u64,
        /// Where it led, unless it faulted.
        gpa: Option<Gpa>,
        /// The #PF's error code.
        fault: Option<u32>,
    },
    /// A guest table is shadowed from now on.
    PageAllocated {
        /// The table.
        table: GpaPage,
        /// How it is read.
        #[serde(flatten)]
        role: PageRole,
    },
    /// A guest table is no longer shadowed.
    PageFreed {
        /// The table.
        table: GpaPage,
        /// How it was read.
        #[serde(flatten)]
        role: PageRole,
    },
    /// A shadow entry was brought up to date with the guest's: it says something else now and was dropped.
    EntryDropped {
        /// The table.
        table: GpaPage,
        /// The table's level.
        level: u8,
        /// Index of the entry.
        index: usize,
    },
}

impl Event {
    pub(crate) fn walk(
        gva: Gva,
        access: umbra_arch::paging::Access,
        entries: u64,
        outcome: Result<Gpa, Fault>,
    ) -> Event {
        Event::Walk {
            gva,
            access: access.kind,
            user: access.user,
            entries,
            gpa: outcome.ok(),
            fault: outcome.err().and_then(|fault| fault.code),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Event::Role { role } => write!(f, "role {role}"),
            Event::RootHit { slot, position } => write!(f, "root {slot} found at position {position}"),
            Event::RootMiss { slot, role } => write!(f, "root {slot} made for {role}"),
            Event::RootFreed { slot } => write!(f, "root {slot} freed"),
            Event::Flush { scope } => write!(f, "flush {scope:?}"),
            Event::FlushPage { gva } => write!(f, "flush page {gva}"),
            Event::Walk { gva, access, user, entries, gpa, fault } => {
                let who = if user { "user" } else { "supervisor" };
                write!(f, "walk {gva} {who} {access:?} {entries} entries: ")?;
                match (gpa, fault) {
                    (Some(gpa), _) => write!(f, "{gpa}"),
                    (None, code) => write!(f, "#PF({:#x})", code.unwrap_or_default()),
                }
            }
            Event::PageAllocated { table, role } => write!(f, "shadow {table} as {role}"),
            Event::PageFreed { table, role } => write!(f, "unshadow {table} as {role}"),
            Event::EntryDropped { table, level, index } => write!(f, "drop entry {index} of {table} level {level}"),
        }
    }
}

/// Events noted since they were last taken; nothing is noted while it is off.
#[derive(Default)]
pub(crate) struct EventLog(Option<Vec<Event>>);

impl EventLog {
    pub(crate) fn enable(&mut self, on: bool) {
        self.0 = on.then(Vec::new);
    }

    #[inline(always)]
    pub(crate) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    #[inline(always)]
    pub(crate) fn note(&mut self, event: impl FnOnce() -> Event) {
        if let Some(events) = &mut self.0 {
            events.push(event());
        }
    }

    pub(crate) fn take(&mut self) -> Vec<Event> {
        self.0.as_mut().map(std::mem::take).unwrap_or_default()
    }
}
