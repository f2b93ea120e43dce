//! RAM that arrives on demand: which CPU waits, which guest is told, and when the pages come.

use super::Pc;
use crate::events::Source;
use std::sync::Arc;
use umbra_arch::{Fault, GpaPage, PageAnswer, PageContext, Reply, VirtualTime};
use umbra_devices::async_pf::NOT_PRESENT;
use umbra_memory::GuestMemory;

/// Virtual time of a WRMSR or RDMSR that a hypervisor handles, in nanoseconds.
const MSR_NS: u32 = 500;

/// Memory with a page source, and what happened so far.
#[derive(Clone, Debug)]
pub(crate) struct LazyRam {
    memory: Arc<GuestMemory>,
    /// For each CPU what it waits for or waited for last, and until when.
    waits: Vec<Option<(GpaPage, VirtualTime)>>,
    stats: PageStats,
}

/// How often guests met pages that had yet to arrive, in this run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PageStats {
    /// Pages read from the source.
    pub loaded: u64,
    /// Pages sent away again.
    pub swapped: u64,
    /// "Page not present" events delivered.
    pub events: u64,
    /// Times that a CPU did nothing until a page came.
    pub waits: u64,
}

impl LazyRam {
    /// `None` for memory without a page source.
    pub(crate) fn of(memory: &Arc<GuestMemory>, vcpus: usize) -> Option<Self> {
        memory.page_source_bytes()?;
        Some(Self { memory: Arc::clone(memory), waits: vec![None; vcpus], stats: PageStats::default() })
    }
}

impl Pc {
    /// Sets how many virtual nanoseconds a page takes to arrive.
    pub fn set_page_latency(&mut self, ns: u64) {
        self.devices.arrivals.set_latency(ns);
    }

    /// Sets how many pages of RAM from the source may be present at a time.
    pub fn set_resident_pages(&mut self, limit: Option<u64>) {
        self.devices.arrivals.set_limit(limit);
    }

    /// Counts of what happened to RAM that arrives on demand; `None` if no RAM does.
    pub fn page_stats(&self) -> Option<PageStats> {
        let lazy = self.lazy.as_ref()?;
        Some(PageStats { loaded: lazy.memory.loaded_pages(), ..lazy.stats })
    }

    /// A CPU's instruction needs an absent page.
    pub(super) fn need_page(
        &mut self,
        vcpu: usize,
        now: VirtualTime,
        page: GpaPage,
        context: PageContext,
    ) -> PageAnswer {
        let Some(lazy) = &mut self.lazy else { return PageAnswer::Now };
        if self.devices.arrivals.latency() == 0 {
            return PageAnswer::Now;
        }
        let time = self.devices.arrivals.need(now, page);
        let apf = self.devices.async_pf.get_mut(vcpu);
        let answer = match apf.and_then(|apf| Some((apf.begin(page, context)?, apf.flags_at()))) {
            Some((token, flags_at)) => {
                lazy.memory.write(flags_at, &NOT_PRESENT.to_le_bytes());
                lazy.stats.events += 1;
                PageAnswer::Event(token)
            }
            None => {
                // The same wait may be asked about again, after each interrupt and slice.
                if let Some(last) = lazy.waits.get_mut(vcpu)
                    && last.replace((page, time)) != Some((page, time))
                {
                    lazy.stats.waits += 1;
                }
                PageAnswer::Wait(time)
            }
        };
        self.settle(Source::Pages);
        answer
    }

    /// Pages that are due come, and guests that wait for them are told.
    pub(super) fn pages_arrive(&mut self, now: VirtualTime) {
        let Some(lazy) = &mut self.lazy else { return };
        while let Some(page) = self.devices.arrivals.take_arrived(now) {
            lazy.memory.page_arrived(page);
            self.devices.async_pf.iter_mut().for_each(|apf| apf.page_arrived(page));
        }
        // Only here, between slices: what an engine keeps of pages never decides which of them are present.
        if let Some((excess, from)) = self.devices.arrivals.excess(lazy.memory.resident_pages()) {
            self.devices.arrivals.set_hand(lazy.memory.swap_out(from, excess));
            lazy.stats.swapped += excess;
        }
        for vcpu in 0..self.devices.async_pf.len() {
            self.tell_ready(vcpu);
        }
    }

    /// The next "page ready" event of a CPU, if it can have one now.
    fn tell_ready(&mut self, vcpu: usize) {
        let (Some(lazy), Some(apf), Some(lapic)) =
            (&self.lazy, self.devices.async_pf.get_mut(vcpu), self.devices.lapics.get_mut(vcpu))
        else {
            return;
        };
        if !apf.has_ready() || !lapic.takes_vectors() {
            return;
        }
        let mut token = [0; 4];
        lazy.memory.read(apf.token_at(), &mut token);
        if let Some(ready) = apf.take_ready(u32::from_le_bytes(token)) {
            lazy.memory.write(apf.token_at(), &ready.token.to_le_bytes());
            lapic.accept(ready.vector, false);
            self.settle_interrupts();
        }
    }

    /// RDMSR of KVM's asynchronous page faults.
    pub(super) fn async_pf_read(&mut self, vcpu: usize, msr: u32) -> Result<Reply<u64>, Fault> {
        let value = self.devices.async_pf.get(vcpu).ok_or(Fault::GP0)?.msr_read(msr)?;
        Ok(Reply { value, cost: MSR_NS, attention: false })
    }

    /// WRMSR of them.
    pub(super) fn async_pf_write(&mut self, vcpu: usize, msr: u32, value: u64) -> Result<Reply<()>, Fault> {
        self.devices.async_pf.get_mut(vcpu).ok_or(Fault::GP0)?.msr_write(msr, value)?;
        self.tell_ready(vcpu);
        Ok(Reply { value: (), cost: MSR_NS, attention: std::mem::take(&mut self.attention) })
    }
}
