//! The interpreter block by block, for an engine that executes some blocks in its own way.
//!
//! Such an engine asks for the [next block](Interpreter::find_block), runs it itself or has it
//! [interpreted](Interpreter::run_block), calls single operations by [`run_op`](Interpreter::run_op), and
//! reports what it did. All that happens between blocks stays here.

use crate::block::BlockCache;
use crate::core::Core;
use crate::interp::Interpreter;
use crate::op::Stop;
use umbra_arch::rflags;
use umbra_arch::state::{Activity, Shadow};
use umbra_arch::{Bus, Exit, Slice, Stopped, VirtualTime};

/// What a block that ended early leaves to be accounted for, in ticks.
#[derive(Clone, Copy, Debug)]
pub struct QuietEnd {
    /// Cost of the operations that didn't run.
    pub unused: u32,
    /// What an operation took beyond its cost.
    pub extra: u64,
}

impl Interpreter {
    /// Where the [`Core`] lies in an interpreter, in bytes, for generated code.
    pub const CORE_OFFSET: usize = std::mem::offset_of!(Interpreter, core);

    /// Starts a slice: before the first [`before_block`](Self::before_block).
    pub fn begin_slice(&mut self, slice: Slice) {
        self.begin(slice);
    }

    /// Runs at most so many blocks of a slice, which is as good as spent then.
    pub fn run_blocks(&mut self, bus: &mut dyn Bus, slice: Slice, blocks: u64) -> Stopped {
        self.begin(slice);
        let exit = (0..blocks).find_map(|_| self.one_block(bus, slice.until)).unwrap_or(Exit::BudgetSpent);
        Stopped { exit, now: self.core.clock }
    }

    fn one_block(&mut self, bus: &mut dyn Bus, until: VirtualTime) -> Option<Exit> {
        if let Err(exit) = self.before_block(bus, until) {
            return Some(exit);
        }
        match self.find_block(bus) {
            Ok(number) => self.run_block(bus, number, until),
            Err(exit) => exit,
        }
    }

    /// Finds the block to run next.
    ///
    /// # Errors
    /// Its bytes can't be fetched: what the slice ends with, or nothing if a fault was delivered, after which
    /// [`before_block`](Self::before_block) comes again.
    pub fn find_block(&mut self, bus: &mut dyn Bus) -> Result<u32, Option<Exit>> {
        let found = self.cache.find(&mut self.core);
        found.map_err(|stop| self.not_found(bus, stop))
    }

    /// The block at RIP; `None` if its bytes can't be fetched.
    pub fn look_at_block(&mut self) -> Option<u32> {
        self.cache.find(&mut self.core).ok()
    }

    /// Whether instructions have to be looked at one by one, so that only [`run_block`](Self::run_block) will do. RFLAGS.RF
    /// isn't looked at: who runs a block has to see that it ends with the first instruction.
    pub fn must_interpret(&self) -> bool {
        self.single || self.core.check_events || self.core.trace.is_some()
    }

    /// Interprets blocks one after the other until something has to be looked at. They are all of one code size.
    pub fn run_chain(&mut self, bus: &mut dyn Bus, until: VirtualTime) -> Option<Exit> {
        let found = self.cache.find(&mut self.core);
        self.chain(bus, found, until)
    }

    /// Executes operation `index` of block `number`, whose first operation started at `clock` and whose page is at
    /// [`CODE_BASE`](crate::op::CODE_BASE). True if
    /// nothing of the block may follow it: then, and after an error, [`leave_block`](Self::leave_block).
    ///
    /// # Errors
    /// Why it didn't retire.
    #[inline]
    pub fn run_op(&mut self, bus: &mut dyn Bus, number: u32, index: usize, clock: VirtualTime) -> Result<bool, Stop> {
        let block = self.cache.block(number);
        let c = &mut self.core;
        c.clock = clock;
        c.be_in_block(block);
        let op = &block.ops[index];
        (op.exec)(c, bus, op)?;
        Ok(c.break_block)
    }

    /// Ends block `number` behind operation `last`, after which, by [`run_op`](Self::run_op), nothing of it may follow,
    /// or before it if it is to start `again`: if nothing is due before the next block, no event, no trap, no stale
    /// code. With `room` there is time for an instruction more, so that the shadow of STI passes unseen. RFLAGS.RF may be
    /// set then.
    #[inline]
    pub fn end_quietly(
        &mut self,
        bus: &mut dyn Bus,
        number: u32,
        last: usize,
        again: bool,
        room: bool,
    ) -> Option<QuietEnd> {
        let shadowed = match self.core.shadow_next {
            Shadow::None => false,
            Shadow::Sti => !room,
            Shadow::MovSs => true,
        };
        if shadowed || self.core.trap_pending || !self.is_quiet(bus) {
            return None;
        }
        let c = &mut self.core;
        c.shadow_next = Shadow::None;
        if c.after_instruction() != 0 {
            return None;
        }
        let block = self.cache.block(number);
        let unused = block.ops.get(last + 1).map_or(0, |op| block.cost - op.prefix);
        if let Some(op) = block.ops.get(if again { last } else { last + 1 }) {
            c.next_rip = c.block_rip.wrapping_add(u64::from(op.start));
        }
        Some(QuietEnd { unused, extra: std::mem::take(&mut c.extra_cost) })
    }

    /// Whether nothing is due before the next block but what its first instruction's RFLAGS.RF and a shadow ask for.
    #[inline]
    fn is_quiet(&mut self, bus: &mut dyn Bus) -> bool {
        let c = &mut self.core;
        let due = c.attention || c.mmu.watcher().is_pending() || !c.code_writes.is_empty();
        if due || c.must_look_for_debug() {
            return false;
        }
        if c.check_events {
            let interrupt = c.s.rflags & rflags::IF != 0 && bus.interrupt_pending();
            if interrupt || c.s.activity != Activity::Running || c.trace.is_some() {
                return false;
            }
        }
        c.check_events = false;
        c.break_block = false;
        true
    }

    /// Operation `index` of block `number` has raised a fault by [`run_op`](Self::run_op): delivers it. What the slice ends
    /// with, if it ends; then whether the next block can follow at once, as after [`end_quietly`](Self::end_quietly).
    #[inline]
    pub fn fault_in_block(&mut self, bus: &mut dyn Bus, number: u32, index: usize) -> (Option<Exit>, bool) {
        let rip = self.stop_in_block(number, index, index);
        self.core.shadow_next = Shadow::None;
        let exit = self.failed(bus, Stop::Fault, rip);
        let quiet = exit.is_none() && self.is_quiet(bus);
        (exit, quiet)
    }

    /// The block ended with operation `last`, or because that stopped.
    pub fn leave_block(&mut self, bus: &mut dyn Bus, number: u32, last: usize, stop: Option<Stop>) -> Option<Exit> {
        match stop {
            None => self.ended(bus, number, last),
            Some(stop) => self.ended_by(bus, number, last, stop),
        }
    }

    /// Whole blocks of `ops` operations have run until `clock`, and `rip` comes next.
    pub fn ran_blocks(&mut self, bus: &mut dyn Bus, ops: u64, clock: VirtualTime, rip: u64) -> Option<Exit> {
        self.count(ops, clock);
        self.core.next_rip = rip;
        if self.core.check_events { self.after(bus) } else { None }
    }

    /// Whole blocks of `ops` operations have run until `clock`.
    pub fn count(&mut self, ops: u64, clock: VirtualTime) {
        self.retired += ops;
        self.core.clock = clock;
    }

    /// So many INVLPGs were executed elsewhere.
    pub fn count_page_flushes(&mut self, count: u64) {
        self.core.mmu.count_page_flushes(count);
    }

    /// The core, for an engine that keeps some of it elsewhere while it runs.
    pub fn core_mut(&mut self) -> &mut Core {
        &mut self.core
    }

    /// The decoded blocks.
    pub fn blocks(&self) -> &BlockCache {
        &self.cache
    }

    /// Notes from now on which blocks are dropped.
    pub fn watch_blocks(&mut self) {
        self.cache.watch();
    }

    /// Block `number` will run without [`next_block`](Self::next_block): it stays until its code changes.
    pub fn keep_block(&mut self, number: u32) {
        self.cache.keep(number);
    }

    /// Numbers of the blocks dropped since the last call; new blocks may have them by now.
    pub fn take_dropped(&mut self) -> Vec<u32> {
        self.cache.take_dropped()
    }
}
