//! The one agenda of a machine: what happens next, and in which order.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use umbra_arch::VirtualTime;

/// Who wants to be woken. Each source has at most one entry.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Source {
    /// The 8254.
    Pit,
    /// The clock's interrupts.
    Rtc,
    /// The first serial port.
    Com1,
    /// The keyboard controller.
    Keyboard,
    /// The power-management timer.
    AcpiPm,
    /// The high precision event timer.
    Hpet,
    /// The host's input is looked at.
    HostInput,
    /// A page of RAM arrives.
    Pages,
    /// The timer of one local APIC.
    Lapic(u32),
}

/// Sources before the first local APIC.
const FIXED_SOURCES: usize = 8;

impl Source {
    fn index(self) -> usize {
        match self {
            Self::Pit => 0,
            Self::Rtc => 1,
            Self::Com1 => 2,
            Self::Keyboard => 3,
            Self::AcpiPm => 4,
            Self::Hpet => 5,
            Self::HostInput => 6,
            Self::Pages => 7,
            Self::Lapic(n) => FIXED_SOURCES + n as usize,
        }
    }
}

/// Future events, ordered by time; equal times in the order in which they were entered.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Events {
    queue: BTreeSet<(VirtualTime, u64, Source)>,
    entered: Vec<Option<(VirtualTime, u64)>>,
    sequence: u64,
}

impl Events {
    /// An empty agenda for a machine with this many local APICs.
    pub fn new(lapics: usize) -> Self {
        Self { queue: BTreeSet::new(), entered: vec![None; FIXED_SOURCES + lapics], sequence: 0 }
    }

    /// Replaces the source's entry. An unchanged time keeps its place among equals.
    #[inline]
    pub fn schedule(&mut self, source: Source, time: Option<VirtualTime>) {
        let Some(slot) = self.entered.get_mut(source.index()) else { return };
        if slot.map(|(at, _)| at) == time {
            return;
        }
        if let Some((at, sequence)) = slot.take() {
            self.queue.remove(&(at, sequence, source));
        }
        if let Some(at) = time {
            self.sequence += 1;
            *slot = Some((at, self.sequence));
            self.queue.insert((at, self.sequence, source));
        }
    }

    /// The time of the next event.
    #[inline]
    pub fn earliest(&self) -> Option<VirtualTime> {
        self.queue.first().map(|&(time, _, _)| time)
    }

    /// Takes the next event at or before `now`.
    pub fn pop_due(&mut self, now: VirtualTime) -> Option<(VirtualTime, Source)> {
        let &(time, sequence, source) = self.queue.first().filter(|&&(time, _, _)| time <= now)?;
        self.queue.remove(&(time, sequence, source));
        if let Some(slot) = self.entered.get_mut(source.index()) {
            *slot = None;
        }
        Some((time, source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn source(n: u8) -> Source {
        match n % 8 {
            0 => Source::Pit,
            1 => Source::Rtc,
            2 => Source::Com1,
            3 => Source::Keyboard,
            4 => Source::AcpiPm,
            5 => Source::HostInput,
            n => Source::Lapic(u32::from(n) - 6),
        }
    }

    #[test]
    fn equal_times_come_in_order_of_entry() {
        let mut events = Events::new(2);
        for n in [4u8, 7, 0, 2] {
            events.schedule(source(n), Some(VirtualTime(10)));
        }
        events.schedule(source(7), Some(VirtualTime(10)));
        events.schedule(source(4), None);
        events.schedule(source(4), Some(VirtualTime(10)));
        let order: Vec<_> = std::iter::from_fn(|| events.pop_due(VirtualTime(10))).map(|(_, s)| s).collect();
        assert_eq!(order, [source(7), source(0), source(2), source(4)]);
    }

    proptest! {
        /// Against a plain list searched anew each time.
        #[test]
        fn agrees_with_a_sorted_list(steps in prop::collection::vec((0u8..8, prop::option::of(0u64..20), 0u64..4), 1..200)) {
            let mut events = Events::new(2);
            let mut list: Vec<(u64, usize, Source)> = Vec::new();
            let mut now = 0;
            for (order, (n, time, pass)) in steps.into_iter().enumerate() {
                let source = source(n);
                let at = time.map(|t| now + t);
                events.schedule(source, at.map(VirtualTime));
                if list.iter().find(|e| e.2 == source).map(|e| e.0) != at {
                    list.retain(|e| e.2 != source);
                    list.extend(at.map(|at| (at, order, source)));
                }
                now += pass;
                list.sort_unstable();
                while let Some((time, source)) = events.pop_due(VirtualTime(now)) {
                    prop_assert!(!list.is_empty());
                    let expected = list.remove(0);
                    prop_assert_eq!((time.0, source), (expected.0, expected.2));
                }
                prop_assert_eq!(events.earliest().map(|t| t.0), list.first().map(|e| e.0));
                prop_assert!(list.first().is_none_or(|e| e.0 > now));
            }
        }
    }
}
