//! Which pages of RAM are on their way, for all CPUs together, and how many may be there.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use umbra_arch::{GpaPage, VirtualTime};

/// Pages on their way: each was asked for by the first access to it and takes the same time.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PageArrivals {
    /// Virtual nanoseconds from the first access to the arrival.
    latency: u64,
    /// Most pages that are present.
    limit: Option<u64>,
    /// Where the search for pages to send away goes on.
    hand: u64,
    times: BTreeMap<u64, VirtualTime>,
    queue: BTreeSet<(VirtualTime, u64)>,
}

impl PageArrivals {
    /// Sets how many virtual nanoseconds pages take that are asked for from now on.
    pub fn set_latency(&mut self, ns: u64) {
        self.latency = ns;
    }

    /// How many virtual nanoseconds a page takes.
    pub fn latency(&self) -> u64 {
        self.latency
    }

    /// Sets how many pages may be present.
    pub fn set_limit(&mut self, pages: Option<u64>) {
        self.limit = pages;
    }

    /// How many pages may be present.
    pub fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// With `present` pages: how many must go, enough for a while, and from which on to look for them.
    pub fn excess(&self, present: u64) -> Option<(u64, GpaPage)> {
        let limit = self.limit.filter(|&limit| present > limit)?;
        Some((present - limit + limit / 8, GpaPage::new(self.hand)))
    }

    /// Pages were sent away: the next search starts here.
    pub fn set_hand(&mut self, page: GpaPage) {
        self.hand = page.raw();
    }

    /// When the page arrives that is needed at `now`.
    pub fn need(&mut self, now: VirtualTime, page: GpaPage) -> VirtualTime {
        let (page, time) = (page.raw(), now.plus(self.latency));
        let time = *self.times.entry(page).or_insert(time);
        self.queue.insert((time, page));
        time
    }

    /// Takes the next page that has arrived by `now`; those of one time in the order of their addresses.
    pub fn take_arrived(&mut self, now: VirtualTime) -> Option<GpaPage> {
        let &(time, page) = self.queue.first().filter(|&&(time, _)| time <= now)?;
        self.queue.remove(&(time, page));
        self.times.remove(&page);
        Some(GpaPage::new(page))
    }

    /// When the next page arrives.
    pub fn next_event(&self) -> Option<VirtualTime> {
        self.queue.first().map(|&(time, _)| time)
    }
}
