//! The interpreter: finds blocks, runs them, takes interrupts, keeps time.
//!
//! Time and counters are exact at every exit: a block's cost is charged when it ends, a fault charges the
//! prefix before it, and a block longer than the budget runs only as far as the budget reaches.

mod endings;

use crate::block::{Block, BlockCache};
use crate::core::{CODE_VARIANT, Core, EngineError, EngineOptions};
use crate::deliver::Event;
use crate::op::Stop;
use std::hint::cold_path;
use std::sync::Arc;
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::state::{Activity, Shadow};
use umbra_arch::{Bus, CpuState, Exit, Gpa, Slice, Stopped, Vcpu, VirtualTime, rflags};
use umbra_memory::{Backing, Change, GuestMemory, PageFlags};

/// The reference engine. Its core comes first, for generated code's sake.
#[repr(C)]
pub struct Interpreter {
    pub(crate) core: Core,
    pub(crate) cache: BlockCache,
    pub(crate) retired: u64,
    /// TF or a shadow: run one instruction at a time.
    pub(crate) single: bool,
    /// End of the running slice.
    until: VirtualTime,
}

/// Where a run of blocks has left the last one, and why.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Left {
    /// It ran to its end, and no link leads on.
    AtEnd,
    /// It ran to its end, and something is due.
    Due,
    /// It ran to its end, as did the slice.
    Spent,
    /// It ran to its end, and code of another kind follows.
    Elsewhere,
    /// It didn't run: only a part of it may.
    AtStart,
    /// Behind this operation, which asked for it.
    Behind(usize),
    /// Behind its last operation, which asked for it.
    BehindAll,
    /// In this operation, which has stopped.
    In(usize, Stop),
}

/// Runs a whole block, unless `limit` comes before its end, and counts what `retired`. `Ok` if the next one can follow at
/// once. Nothing has asked for its end yet.
#[inline(always)]
fn whole_block(
    c: &mut Core,
    bus: &mut dyn Bus,
    block: &Block,
    limit: VirtualTime,
    retired: &mut u64,
) -> Result<(), Left> {
    c.enter_block(block);
    let end = c.clock.plus(u64::from(block.cost));
    if end > limit {
        return Err(Left::AtStart);
    }
    let mut ops = block.ops.iter();
    if c.resumes()
        && let Some(op) = ops.next()
    {
        cold_path();
        (op.exec)(c, bus, op).map_err(|stop| Left::In(0, stop))?;
        if c.break_block {
            return Err(Left::Behind(0));
        }
        c.s.rflags &= !rflags::RF;
    }
    while let Some(op) = ops.next() {
        (op.exec)(c, bus, op).map_err(|stop| Left::In(block.index_of(op), stop))?;
        if c.break_block {
            return Err(if ops.as_slice().is_empty() { Left::BehindAll } else { Left::Behind(block.index_of(op)) });
        }
    }
    *retired += block.ops.len() as u64;
    c.clock = end;
    if c.check_events {
        return Err(Left::Due);
    }
    if end >= limit { Err(Left::Spent) } else { Ok(()) }
}

impl Interpreter {
    /// A CPU after reset.
    ///
    /// # Errors
    /// When the host lacks something the engine needs.
    pub fn new(
        mem: Arc<GuestMemory>,
        profile: &CpuidProfile,
        apic_id: u32,
        options: &EngineOptions,
    ) -> Result<Self, EngineError> {
        let core = Core::new(mem, profile, apic_id, options)?;
        Ok(Self { core, cache: BlockCache::default(), retired: 0, single: false, until: VirtualTime(0) })
    }

    /// The MMU's counters.
    pub fn mmu_stats(&self) -> &umbra_mmu::MmuStats {
        self.core.mmu.stats()
    }

    /// The core, for tests and reports.
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// Clears DIRTY of a RAM page, so that its next store is noticed.
    pub fn clean_page(&mut self, off: umbra_memory::RamOffset) {
        self.core.mmu.clean_page(off);
    }

    /// Number of CPUs in the machine, for CPUID's topology and for clocks that have to agree.
    pub fn set_cpus(&mut self, cpus: u32) {
        self.core.cpus = cpus.max(1);
    }

    /// Traces from now on; `None` stops it.
    pub fn set_trace(&mut self, trace: Option<crate::trace::Trace>) {
        self.core.mmu.record_events(trace.as_ref().is_some_and(|trace| trace.what.mmu));
        self.core.trace = trace.map(Box::new);
        self.core.check_events = true;
    }

    /// Seeds the deterministic RDRAND/RDSEED generator.
    pub fn set_random_seed(&mut self, seed: u64) {
        self.core.random = seed;
    }

    /// Starts a slice.
    pub(crate) fn begin(&mut self, slice: Slice) {
        self.core.clock = slice.now;
        self.until = slice.until;
        self.core.check_events = true;
    }

    fn run_until(&mut self, bus: &mut dyn Bus, until: VirtualTime) -> Exit {
        loop {
            let found = match self.head(bus, until) {
                Ok(found) => found,
                Err(exit) => return exit,
            };
            if let Some(exit) = self.chain(bus, found, until) {
                return exit;
            }
        }
    }

    /// Does what is due between two blocks and finds the next one; `Err` ends the slice.
    #[inline(always)]
    pub(crate) fn head(&mut self, bus: &mut dyn Bus, until: VirtualTime) -> Result<Result<u32, Stop>, Exit> {
        self.before_block(bus, until)?;
        Ok(self.cache.find(&mut self.core))
    }

    /// Does what is due between two blocks: takes interrupts, drops stale code.
    ///
    /// # Errors
    /// What ends the slice.
    #[inline(always)]
    pub fn before_block(&mut self, bus: &mut dyn Bus, until: VirtualTime) -> Result<(), Exit> {
        if self.core.mmu.watcher().is_pending() {
            self.memory_changed();
        }
        if self.core.check_events
            && let Some(exit) = self.events(bus)
        {
            return Err(exit);
        }
        if self.core.clock >= until {
            return Err(Exit::BudgetSpent);
        }
        // Stores of the last block and of an exception's frame alike.
        if !self.core.code_writes.is_empty() {
            self.drop_written_code();
        }
        if self.core.trace.is_some() {
            self.core.trace_mmu();
        }
        self.core.recent.enter(self.core.next_rip);
        Ok(())
    }

    #[cold]
    fn drop_written_code(&mut self) {
        for (offset, len) in std::mem::take(&mut self.core.code_writes) {
            self.cache.invalidate(&mut self.core, offset, len);
        }
    }

    /// Runs blocks one after the other until something has to be looked at. HOT.
    #[inline(always)]
    pub(crate) fn chain(&mut self, bus: &mut dyn Bus, first: Result<u32, Stop>, until: VirtualTime) -> Option<Exit> {
        let mut found = first;
        loop {
            let mut number = match found {
                Ok(number) => number,
                Err(stop) => return self.not_found(bus, stop),
            };
            let left = self.linked_blocks(bus, &mut number, until);
            if left != Left::AtEnd {
                return self.left(bus, number, left, until);
            }
            found = self.cache.link(&mut self.core, number);
        }
    }

    /// Runs block `number` and those that are linked to it, as long as they run to their ends. Why it left the last one,
    /// which `number` is then.
    #[inline(always)]
    fn linked_blocks(&mut self, bus: &mut dyn Bus, number: &mut u32, until: VirtualTime) -> Left {
        let limit = self.limit(until);
        let mut block = self.cache.block(*number);
        self.core.break_block = false;
        loop {
            match whole_block(&mut self.core, bus, block, limit, &mut self.retired) {
                Ok(()) => {}
                Err(Left::BehindAll) if self.core.ends_quietly() => {
                    self.retired += block.ops.len() as u64;
                    self.core.charge(block.cost);
                    if self.core.clock >= limit {
                        return Left::Spent;
                    }
                    if block.mode() & !CODE_VARIANT != self.core.code_mode {
                        return Left::Elsewhere;
                    }
                    self.core.break_block = false;
                }
                Err(left) => return left,
            }
            match self.cache.linked(block, &self.core) {
                Some((next, target)) => (*number, block) = (next, target),
                None => return Left::AtEnd,
            }
        }
    }

    /// Until when whole blocks may run: `until`, or never where instructions are to run one by one.
    #[inline(always)]
    fn limit(&self, until: VirtualTime) -> VirtualTime {
        if self.single { VirtualTime(0) } else { until }
    }

    /// Does what is left to do about a block. What the slice ends with, if it ends.
    #[inline(always)]
    fn left(&mut self, bus: &mut dyn Bus, number: u32, left: Left, until: VirtualTime) -> Option<Exit> {
        match left {
            Left::AtEnd | Left::Spent | Left::Elsewhere => None,
            Left::Due => self.after(bus),
            Left::AtStart => self.part(bus, number, until),
            Left::Behind(last) => self.ended(bus, number, last),
            Left::BehindAll => self.ended_whole(bus, number),
            Left::In(last, Stop::Fault) if !self.core.s.efer.lma() => self.faulted(bus, number, last),
            Left::In(last, stop) => self.ended_by(bus, number, last, stop),
        }
    }

    /// The next block's bytes couldn't be fetched.
    pub(crate) fn not_found(&mut self, bus: &mut dyn Bus, stop: Stop) -> Option<Exit> {
        let rip = self.core.next_rip;
        self.stopped(bus, stop, rip)
    }

    /// Interprets one block, or as much of it as `until` allows. What the slice ends with, if it ends.
    pub fn run_block(&mut self, bus: &mut dyn Bus, number: u32, until: VirtualTime) -> Option<Exit> {
        let block = self.cache.block(number);
        let limit = self.limit(until);
        self.core.break_block = false;
        let ran = whole_block(&mut self.core, bus, block, limit, &mut self.retired);
        ran.err().and_then(|left| self.left(bus, number, left, until))
    }

    /// Runs a block only as far as the budget reaches, or one instruction of it.
    #[inline(never)]
    fn part(&mut self, bus: &mut dyn Bus, number: u32, until: VirtualTime) -> Option<Exit> {
        let block = self.cache.block(number);
        let c = &mut self.core;
        if self.single && c.trace.is_some() {
            c.trace_instruction(c.block_rip);
        }
        let budget = until.since(c.clock);
        let fits = block.ops.iter().take_while(|op| u64::from(op.prefix) < budget).count();
        let most = if self.single { 1 } else { fits.max(1) };
        for (done, op) in block.ops[..most].iter().enumerate() {
            if let Err(stop) = (op.exec)(c, bus, op) {
                return self.ended_by(bus, number, done, stop);
            }
            if c.break_block || done + 1 == most {
                return self.ended(bus, number, done);
            }
            c.s.rflags &= !rflags::RF;
        }
        None
    }

    /// Takes NMIs and interrupts, notices halts, shadows and single-stepping.
    #[inline(never)]
    fn events(&mut self, bus: &mut dyn Bus) -> Option<Exit> {
        let c = &mut self.core;
        c.check_events = false;
        match c.s.activity {
            Activity::Shutdown => return Some(c.exit.take().unwrap_or(Exit::Halted)),
            Activity::WaitForSipi => return Some(Exit::WaitForSipi),
            Activity::Running | Activity::Halted | Activity::Waiting => {}
        }
        let mut event = None;
        if c.s.shadow == Shadow::None && !c.s.nmi_blocked && bus.take_nmi() {
            c.s.nmi_blocked = true;
            event = Some(Event::External(umbra_arch::fault::vector::NMI));
        } else if c.s.rflags & rflags::IF != 0 && c.s.shadow == Shadow::None && bus.interrupt_pending() {
            event = bus.interrupt_acknowledge(c.clock).map(Event::External);
        }
        if let Some(event) = event {
            c.s.activity = Activity::Running;
            let rip = c.next_rip;
            c.break_block = true;
            if let Err(stop) = c.deliver(bus, event, rip) {
                return self.stopped(bus, stop, rip);
            }
        }
        let c = &mut self.core;
        // Masked ones end MWAIT, too: it may end at any time.
        if c.s.activity == Activity::Waiting && bus.interrupt_pending() {
            c.s.activity = Activity::Running;
        }
        if matches!(c.s.activity, Activity::Halted | Activity::Waiting) {
            c.check_events = true;
            return Some(Exit::Halted);
        }
        let hit = c.fetch_breakpoints();
        if hit != 0
            && let Err(exit) = self.debug_trap(bus, hit)
        {
            return Some(exit);
        }
        let c = &mut self.core;
        self.single = c.must_step() || c.traces_instructions();
        c.trap_pending = c.s.rflags & rflags::TF != 0;
        c.check_events = self.single;
        None
    }

    /// Drops what became stale by writes of devices, the host, other CPUs and the MMU's own walker.
    #[cold]
    fn memory_changed(&mut self) {
        for change in self.core.mmu.watcher().take_changes() {
            match change {
                Change::Written { gpa, bytes } => self.written(gpa, bytes),
                Change::Flagged(_) => self.core.mmu.memory_changed(change),
                Change::Everything => {
                    self.core.disarm_monitor();
                    self.cache.clear(&mut self.core);
                    self.core.mmu.memory_changed(change);
                }
            }
        }
    }

    fn written(&mut self, gpa: Gpa, bytes: u32) {
        let Backing::Ram(offset) = self.core.mem.map(gpa.page()).at(gpa.offset()) else { return };
        let flags = self.core.mem.page_flags(offset);
        if flags.contains(PageFlags::MONITORED) {
            self.core.monitored_page_written(gpa, bytes);
        }
        if flags.contains(PageFlags::WATCHED) {
            self.core.mmu.table_written(gpa, bytes);
        }
        if flags.contains(PageFlags::CODE) {
            self.cache.invalidate(&mut self.core, offset.raw(), bytes);
        }
    }
}

impl Vcpu for Interpreter {
    fn run(&mut self, bus: &mut dyn Bus, slice: Slice) -> Stopped {
        self.begin(slice);
        let exit = match self.core.io_trace() {
            None => self.run_until(bus, slice.until),
            Some(mut traced) => self.run_until(&mut traced.over(bus), slice.until),
        };
        Stopped { exit, now: self.core.clock }
    }

    fn state(&self) -> CpuState {
        self.core.state(self.core.next_rip)
    }

    fn set_state(&mut self, state: &CpuState) {
        // What happened to memory before concerns the old state.
        self.memory_changed();
        self.core.set_state(state);
        self.single = false;
    }

    fn retired(&self) -> u64 {
        self.retired
    }

    fn wait_is_over(&mut self) -> bool {
        if self.core.mmu.watcher().is_pending() {
            self.memory_changed();
        }
        self.core.s.activity != Activity::Waiting
    }
}
