//! [`Jit`]: the loop around generated code.

mod calls;
mod links;
mod translations;

use crate::contexts::{Context, Contexts, Half};
use crate::emitter::Emitter;
use crate::flags::{logic_clears_af, pack, unpack};
use crate::frame::{Frame, RELINK, Reason, edges, mode_of, stamps};
use crate::jumps::{Fetches, Places};
use crate::listing::{Listener, Translated};
use crate::mechanisms::{Mechanism, Mechanisms};
use crate::ranges::{Misses, NO_SITE, Saved};
use crate::stats::JitStats;
use crate::stubs::{self, Stubs};
use crate::translate::{Offsets, of_site};
use crate::windows::{Running, Windows};
use hashbrown::HashMap;
use links::KnownExit;
use smallvec::SmallVec;
use std::panic::resume_unwind;
use std::sync::Arc;
use translations::{Kept, Runs, Translation};
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::{Bus, CpuState, Exit, Gva, Slice, Stopped, Vcpu, VirtualTime};
use umbra_cpu::core::{CODE_VARIANT, code_bits, is_flat_mode};
use umbra_cpu::op::CODE_BASE;
use umbra_cpu::{EngineError, EngineOptions, Interpreter};
use umbra_hostexec::{CodeMemory, HostExecError};
use umbra_memory::GuestMemory;

/// What makes a translator impossible to build on this host.
#[derive(Debug, thiserror::Error)]
pub enum JitError {
    /// The interpreter inside can't be made.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// No executable memory.
    #[error(transparent)]
    Code(#[from] HostExecError),
    /// The host's processor isn't what generated code needs.
    #[error("the host's processor has no LAHF in 64-bit mode or leaves AF after logic: use --engine interp")]
    Processor,
}

/// Choices that no guest can see.
#[derive(Clone, Copy, Debug)]
pub struct JitOptions {
    /// Times a block is interpreted before it is translated.
    pub threshold: u8,
    /// Times that the budget ends at a block's head until range registers are looked for in it; 0: from the start.
    pub hot_after: u8,
    /// Bytes of host code kept, 1 GiB at most.
    pub code_bytes: usize,
    /// Translate 16-bit code, too, and 32-bit code in segments that aren't flat. None of its operations has host code, so
    /// that interpreting it is faster; for tests.
    pub legacy: bool,
    /// Blocks translated at most, to find by bisection one that is wrong.
    pub limit: u64,
    /// Instructions of an address space in user mode until it gets [windows](crate::windows), or more by the number of its
    /// pages; 0: at once, for tests; `None`: never.
    pub windows_after: Option<u64>,
    /// Mechanisms that aren't used.
    pub off: Mechanisms,
}

impl JitOptions {
    /// What a run has unless something else is said.
    pub const DEFAULT: Self = Self {
        threshold: 8,
        hot_after: 4,
        code_bytes: 128 << 20,
        legacy: false,
        limit: u64::MAX,
        windows_after: Some(50_000_000),
        off: Mechanisms::NONE,
    };
}

impl Default for JitOptions {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Room that one translation may need at most.
const LARGEST: usize = 64 << 10;
/// Code memory at most: its jumps have 32 bits.
const MOST_CODE: usize = 1 << 30;
/// More than any block costs that is translated.
pub(crate) const ROOM: i64 = umbra_cpu::block::MAX_OPS as i64;
/// Longest stretch without a look at the clock.
const LONGEST: u64 = 1 << 60;

/// All of the engine, at an address that generated code knows.
#[repr(C)]
pub(crate) struct Engine {
    pub(crate) frame: Frame,
    pub(crate) interp: Interpreter,
    code: CodeMemory,
    stubs: Stubs,
    /// What is in use of the code memory when nothing is translated.
    stubs_end: usize,
    /// By block number.
    translations: Vec<Option<Translation>>,
    /// Likewise.
    runs: Vec<Runs>,
    /// By block number: how often the budget was used up there.
    samples: HashMap<u32, u8>,
    exits: Vec<KnownExit>,
    /// By block number: the first blocks of the traces that it is a part of.
    traces: HashMap<u32, SmallVec<[u32; 4]>>,
    /// By block number: where its forgotten translations are, until it has another one.
    moved: HashMap<u32, Vec<(usize, Half)>>,
    tools: Option<Box<Kept>>,
    fetches: Fetches,
    places: Places,
    /// Ranges of other tables.
    saved: Saved,
    misses: Misses,
    windows: Windows,
    contexts: Contexts,
    /// The exit that was left by, to be linked when its target is translated, and what RIPs counted from there.
    pending: Option<(usize, u64)>,
    /// The jump table may know the next block: it isn't the one that it has just led to in vain, for it was dropped
    /// or doesn't fit into the budget.
    look_up: bool,
    options: JitOptions,
    stats: JitStats,
    listener: Option<Listener>,
}

/// The translating engine.
pub struct Jit(Box<Engine>);

// SAFETY: the frame's pointers lead to what the engine owns, but for the bus, which is only there while `run` has
// borrowed it.
unsafe impl Send for Jit {}

impl Jit {
    /// A CPU after reset.
    ///
    /// # Errors
    /// [`JitError`]: what the host lacks.
    pub fn new(
        mem: Arc<GuestMemory>,
        profile: &CpuidProfile,
        apic_id: u32,
        options: &EngineOptions,
        jit: JitOptions,
    ) -> Result<Self, JitError> {
        Self::around(Interpreter::new(mem, profile, apic_id, options)?, jit)
    }

    /// Whether the host's processor has what generated code can't do without.
    pub fn runs_on_this_host() -> bool {
        let has_lahf = std::arch::x86_64::__cpuid(0x8000_0001).ecx & 1 != 0;
        has_lahf && logic_clears_af()
    }

    /// A translator around an interpreter.
    ///
    /// # Errors
    /// [`JitError`]: what the host lacks.
    pub fn around(mut interp: Interpreter, jit: JitOptions) -> Result<Self, JitError> {
        if !Self::runs_on_this_host() {
            return Err(JitError::Processor);
        }
        let ram = interp.core().mem.mapping_address();
        interp.watch_blocks();
        let part = jit.code_bytes.clamp(4 * LARGEST, MOST_CODE) / 2;
        let mut code = CodeMemory::in_parts(part, part)?;
        let mut e = Emitter::new(0);
        let stubs = stubs::emit(&mut e, &calls::functions());
        code.append(&e.bytes)?;
        let after = jit.windows_after.filter(|_| !jit.off.has(Mechanism::Windows));
        let windows = Windows::new(Arc::clone(&interp.core().mem), code.address(), after);
        let (fetches, places) = (Fetches::new(), Places::new());
        Ok(Self(Box::new(Engine {
            frame: Frame::new(ram, [fetches.address(), places.address()]),
            interp,
            stubs_end: code.used(),
            code,
            stubs,
            translations: Vec::new(),
            runs: Vec::new(),
            samples: HashMap::new(),
            exits: Vec::new(),
            traces: HashMap::new(),
            moved: HashMap::new(),
            tools: None,
            fetches,
            places,
            saved: Saved::new(),
            misses: Misses::new(),
            windows,
            contexts: Contexts::new(),
            pending: None,
            look_up: false,
            options: jit,
            stats: JitStats::default(),
            listener: None,
        })))
    }

    /// The interpreter inside: registers, MMU, blocks.
    pub fn interpreter(&self) -> &Interpreter {
        &self.0.interp
    }

    /// The interpreter inside, to be set up.
    pub fn interpreter_mut(&mut self) -> &mut Interpreter {
        &mut self.0.interp
    }

    /// Has `listener` called with each translation from now on.
    pub fn set_listener(&mut self, listener: Listener) {
        self.0.listener = Some(listener);
    }

    /// The translations of blocks at `rip`, in whatever context, as they would be made now.
    pub fn translations_at(&self, rip: u64) -> Vec<Translated> {
        let engine = &*self.0;
        let found = engine.translations.iter().enumerate().filter_map(|(number, translation)| {
            let translation = translation.filter(|translation| translation.seen_at == rip)?;
            Some((number as u32, translation.entry))
        });
        let listed = found.map(|(number, entry)| {
            let at = Offsets { often: entry, ..engine.next() };
            let (trace, code) = engine.translated(number, at, Half::of(rip), &mut Kept::default());
            engine.listed(&trace, rip, &code, at)
        });
        listed.collect()
    }

    /// Translates the block at RIP, unless it has to be run before by the threshold, and doesn't run it. The RIP behind
    /// it; `None` if there is no translation.
    pub fn translate_here(&mut self) -> Option<u64> {
        let engine = &mut *self.0;
        engine.choose_variant();
        let number = engine.interp.look_at_block()?;
        engine.forget_dropped();
        engine.translation(number)?;
        let block = engine.interp.blocks().block(number);
        Some(engine.interp.core().next_rip.wrapping_sub(block.rip).wrapping_add(block.end_rip))
    }

    /// Runs at most so many blocks of a slice, one at a time; the slice is as good as spent then.
    pub fn run_blocks(&mut self, bus: &mut dyn Bus, slice: Slice, blocks: u64) -> Stopped {
        let engine = &mut *self.0;
        engine.interp.begin_slice(slice);
        let one = |_| engine.run_some(bus, slice.until, true);
        let exit = (0..blocks).find_map(one).unwrap_or(Exit::BudgetSpent);
        Stopped { exit, now: engine.interp.core().clock }
    }

    /// Counters.
    pub fn stats(&self) -> JitStats {
        let (stats, counts) = (self.0.stats, self.0.windows.counts);
        let retired = self.0.interp.retired();
        JitStats {
            code_bytes: self.0.code.used() as u64,
            windows_opened: counts.opened,
            windows_given_up: counts.given_up,
            window_maps: counts.maps,
            window_unmaps: counts.unmaps,
            window_faults: counts.faults,
            ops_interpreted: retired.saturating_sub(stats.ops_translated),
            ..stats
        }
    }
}

impl Vcpu for Jit {
    fn run(&mut self, bus: &mut dyn Bus, slice: Slice) -> Stopped {
        let engine = &mut *self.0;
        if engine.interp.core().trace.is_some() {
            let stopped = engine.interp.run(bus, slice);
            engine.forget_dropped();
            return stopped;
        }
        engine.interp.begin_slice(slice);
        let exit = engine.run_until(bus, slice.until);
        if exit == Exit::Halted {
            engine.code.rest();
        }
        Stopped { exit, now: engine.interp.core().clock }
    }

    fn state(&self) -> CpuState {
        self.0.interp.state()
    }

    fn set_state(&mut self, state: &CpuState) {
        self.0.interp.set_state(state);
    }

    fn retired(&self) -> u64 {
        self.0.interp.retired()
    }

    fn wait_is_over(&mut self) -> bool {
        self.0.interp.wait_is_over()
    }
}

impl Engine {
    fn run_until(&mut self, bus: &mut dyn Bus, until: VirtualTime) -> Exit {
        loop {
            if let Some(exit) = self.run_some(bus, until, false) {
                return exit;
            }
        }
    }

    /// Runs a block, and those that follow it in generated code unless it is to be `alone`.
    fn run_some(&mut self, bus: &mut dyn Bus, until: VirtualTime, alone: bool) -> Option<Exit> {
        if let Err(exit) = self.interp.before_block(bus, until) {
            return Some(exit);
        }
        self.forget_dropped();
        if !alone && !self.options.legacy && !is_flat_mode(self.interp.core().code_mode) {
            self.pending = None;
            self.look_up = true;
            self.interp.core_mut().code_variant = 0;
            return self.interp.run_chain(bus, until);
        }
        if !alone && let Some(code) = self.known() {
            let rip = self.interp.core().next_rip;
            return self.enter(bus, code, rip & !0xfff, until);
        }
        if self.windows.are_tried_at_once() && self.windows.ran(self.interp.core_mut(), 1) {
            self.frame.forget_all_views();
        }
        self.choose_variant();
        let number = match self.interp.find_block(bus) {
            Ok(number) => number,
            Err(exit) => return exit,
        };
        // Building a block may have dropped others, and it may have the number of one of them.
        self.forget_dropped();
        let end = self.interp.core().clock.plus(u64::from(self.interp.blocks().block(number).cost));
        let can = end <= until && !self.interp.must_interpret();
        let translation = if can { self.translation(number) } else { None };
        let with_end = translation.map(|it| (it, self.interp.core().clock.plus(it.charge.into())));
        match with_end {
            Some((translation, end)) if end <= until && self.reaches(number) => {
                self.execute(bus, number, translation, if alone { end } else { until })
            }
            _ => {
                self.pending = None;
                self.look_up = true;
                let from = self.interp.core().next_rip;
                let exit = self.interp.run_block(bus, number, until);
                self.note_way(number, from);
                exit
            }
        }
    }

    /// The next block is found by how it is translated, too.
    #[inline]
    fn choose_variant(&mut self) {
        let core = self.interp.core_mut();
        core.code_variant = mode_of(core, Half::of(core.next_rip)) & CODE_VARIANT;
    }

    /// Whether what follows block `number` at the present RIP, by its end or a near branch, is at a canonical address, as
    /// translations take for granted.
    fn reaches(&self, number: u32) -> bool {
        let (core, block) = (self.interp.core(), self.interp.blocks().block(number));
        let (rip, bits) = (core.next_rip, core.s.linear_bits());
        let target = block.ops.last().map_or(0, |op| op.imm);
        let at_edge = !block.is_legacy() && edges(bits).contains(&((rip >> 32) as u32));
        let base = rip.wrapping_sub(block.rip);
        !at_edge || [target, block.end_rip].iter().all(|to| Gva::new(base.wrapping_add(*to)).is_canonical(bits))
    }

    /// The next block's code by the jump table, if there is no more to do than to go there.
    fn known(&mut self) -> Option<u64> {
        if !self.look_up || self.pending.is_some() || self.interp.must_interpret() {
            return None;
        }
        let rip = self.interp.core().next_rip;
        self.context_of(rip).jumps.find(rip)
    }

    /// The context that the code at `rip` is in.
    fn context_of(&mut self, rip: u64) -> &mut Context {
        let (core, half) = (self.interp.core(), Half::of(rip));
        self.contexts.get(half, stamps(core)[half as usize], mode_of(core, half))
    }

    /// Runs generated code from `translation` on until it is left.
    fn execute(
        &mut self,
        bus: &mut dyn Bus,
        number: u32,
        translation: Translation,
        until: VirtualTime,
    ) -> Option<Exit> {
        if self.contexts.is_exhausted() {
            self.forget_everything();
            self.contexts = Contexts::new();
            self.frame.forget_all_views();
            return self.interp.run_block(bus, number, until);
        }
        let rip = self.interp.core().next_rip;
        let base = rip.wrapping_sub(translation.rip);
        let code = self.code.address() + translation.entry as u64;
        let jumps = !self.options.off.has(Mechanism::Jumps);
        let known = self.context_of(rip);
        let context = known.number;
        if jumps {
            known.jumps.enter(rip, code);
            if translation.is_placed() && Half::of(rip) == Half::Upper {
                self.fetches.enter(rip, context, translation.offset);
            }
        }
        if let Some((pending, from)) = self.pending.take().filter(|_| !self.options.off.has(Mechanism::Links)) {
            self.link(pending, from, &translation, rip, context);
        }
        self.enter(bus, code, base, until)
    }

    /// Runs generated code from host address `code` on until it is left; RIPs there count from `base`.
    fn enter(&mut self, bus: &mut dyn Bus, code: u64, base: u64, until: VirtualTime) -> Option<Exit> {
        self.interp.core_mut().gpr[CODE_BASE as usize] = base;
        let budget = self.enter_frame(bus, until);
        let enter = self.code.address() + self.stubs.enter as u64;
        let running = Running::new(&self.windows.faults);
        let engine: *mut Engine = self;
        // SAFETY: `enter` is the stub of that signature; it and what it jumps to keep to the ABI, touch of Rust's
        // memory only the engine's frame and core at their fixed offsets, and guest RAM within the mapping or a window: an entry
        // of the MMU's table is only ever for a page of RAM. No reference to the engine is live meanwhile.
        unsafe {
            let enter: extern "sysv64" fn(*mut Engine, u64) = std::mem::transmute(enter as *const ());
            enter(engine, code);
        }
        drop(running);
        self.frame.bus = None;
        if let Some(panic) = self.frame.panic.take() {
            resume_unwind(panic);
        }
        let core = self.interp.core_mut();
        self.frame.catch_up(core);
        core.flags = unpack(self.frame.flags);
        self.frame.give_vectors(&mut core.s);
        self.left(bus, budget)
    }

    /// Fills the frame in; the budget.
    fn enter_frame(&mut self, bus: &mut dyn Bus, until: VirtualTime) -> i64 {
        // SAFETY: only the lifetime is erased; the pointer is removed before this borrow ends.
        let bus = unsafe { std::mem::transmute::<*mut dyn Bus, *mut (dyn Bus + 'static)>(bus) };
        let core = self.interp.core_mut();
        core.break_block = false;
        let budget = until.since(core.clock).min(LONGEST);
        let frame = &mut self.frame;
        frame.end = core.clock.0 + budget;
        frame.budget = budget as i64;
        frame.bank = 0;
        frame.extra = 0;
        // SAFETY: the bus is borrowed until this returns.
        frame.interrupt = unsafe { &mut *bus }.interrupt_pending().into();
        frame.bus = Some(bus);
        frame.take_resume(&mut core.s);
        self.windows.follow(frame, core);
        frame.take_context(core, &mut self.contexts);
        frame.flags = pack(core.flags);
        self.saved.follow(frame, &core.mmu);
        frame.take_registers(core);
        frame.know_view_anew(core);
        frame.take_vectors(&core.s);
        frame.take_x87(&core.s);
        budget as i64
    }

    /// A site whose counter is down and whose operand isn't in the region that was guessed gets another guess, a few
    /// times.
    fn learn_region(&mut self) {
        let site = self.frame.struck;
        if site == NO_SITE {
            return;
        }
        let (number, _) = of_site(site);
        let uses_windows = self.interp.blocks().block(number).is_variant();
        if uses_windows && self.windows.learn(site, self.frame.struck_gva) {
            self.misses.forgive(&mut self.frame, site);
            self.misses.translate_again(number);
        }
    }

    /// Accounts for what generated code did, by the reason for which it was left.
    fn left(&mut self, bus: &mut dyn Bus, budget: i64) -> Option<Exit> {
        self.learn_region();
        self.misses.look(&mut self.frame, &self.interp.core().mmu);
        let (reason, site) = (self.frame.reason, self.frame.site);
        self.look_up = matches!(reason, Reason::Op | Reason::Event);
        let (number, last) = of_site(site);
        let mut left = self.frame.left();
        if matches!(reason, Reason::Op | Reason::Budget) {
            // Its head has charged the block that isn't done.
            left += i64::from(self.interp.blocks().block(number).cost);
        }
        let ops = (budget - left) as u64 - self.frame.extra;
        let clock = VirtualTime(self.frame.end.wrapping_sub(left as u64));
        self.stats.ops_translated += ops;
        if self.windows.ran(self.interp.core_mut(), ops) {
            self.frame.forget_all_views();
        }
        self.interp.count_page_flushes(std::mem::take(&mut self.frame.page_flushes));
        self.frame.give_resume(&mut self.interp.core_mut().s, clock);
        let base = self.interp.core().gpr[CODE_BASE as usize];
        let rip = match reason {
            Reason::Op => {
                self.stats.left_by_op += 1;
                self.interp.count(ops, clock);
                let before = self.interp.retired();
                let stop = self.frame.stop.take();
                let exit = self.interp.leave_block(bus, number, last, stop);
                self.stats.ops_translated += self.interp.retired() - before;
                return exit;
            }
            Reason::Event => {
                self.stats.left_by_op += 1;
                self.interp.count(ops, clock);
                return self.frame.exit.take();
            }
            Reason::Budget => {
                self.stats.left_by_budget += 1;
                self.sample(number);
                base.wrapping_add(self.interp.blocks().block(number).rip)
            }
            Reason::Link => {
                self.stats.left_by_link += 1;
                self.pending = Some((site as usize, base));
                self.frame.relink = RELINK;
                base.wrapping_add(self.exits[site as usize].exit.target) & rip_mask(self.interp.core().code_mode)
            }
            Reason::Miss => {
                self.stats.left_by_miss += 1;
                self.interp.core().next_rip
            }
        };
        self.interp.ran_blocks(bus, ops, clock, rip)
    }
}

/// RIPs of code of this mode, as a mask.
fn rip_mask(mode: u64) -> u64 {
    if code_bits(mode) == 64 { u64::MAX } else { 0xffff_ffff }
}
