//! [`Core`]: one virtual CPU's registers in the form the engine works on, with its MMU and memory.

use crate::block::Block;
use crate::flags::Flags;
use crate::op::{CODE_BASE, Op, Stop};
use std::sync::Arc;
use umbra_arch::control::{CodeContext, ControlLimits, ControlRegs, Effects, FlushScope};
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::segment::{Seg, Segment};
use umbra_arch::state::{Activity, Shadow};
use umbra_arch::{Bus, CpuState, Exit, Fault, GpaPage, VirtualTime, rflags};
use umbra_hostexec::HostExec;
use umbra_memory::{GuestMemory, MemoryError, RamOffset, Watcher};
use umbra_mmu::{Mmu, MmuOptions};

/// What makes an engine impossible to build on this host.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The SIMD executor can't get executable memory.
    #[error(transparent)]
    HostExec(#[from] umbra_hostexec::HostExecError),
    /// Too many engines on one memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Choices of an engine that no guest can see.
#[derive(Clone, Debug, Default)]
pub struct EngineOptions {
    /// How the MMU treats its caches.
    pub mmu: MmuOptions,
}

/// Code size of the running segment, which decides decoding.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum CodeSize {
    /// 16-bit code.
    Bits16 = 16,
    /// 32-bit code.
    Bits32 = 32,
    /// 64-bit mode.
    Bits64 = 64,
}

/// Where the code size is in [`Core::code_mode`].
pub const CODE_SIZE_AT: u32 = 40;

/// Bits of a block's mode that an engine may choose: blocks that differ in them are different ones.
pub const CODE_VARIANT: u64 = 1 << 60;

/// The code size in a [`Core::code_mode`]: 16, 32 or 64.
pub const fn code_bits(mode: u64) -> u32 {
    (mode >> CODE_SIZE_AT) as u32 & 0x7f
}

/// Set in a [`Core::code_mode`] of 32-bit code in flat segments: CS, DS, ES and SS reach from 0 to 4 GiB, and data accesses
/// through the latter three need no check. FS and GS may be anything.
pub const FLAT: u64 = 1 << 47;

/// Whether a [`Core::code_mode`] is that of 64-bit code or of 32-bit code in flat segments.
pub const fn is_flat_mode(mode: u64) -> bool {
    code_bits(mode) == 64 || mode & FLAT != 0
}

/// One virtual CPU as the engine sees it. Registers come first, for generated code's sake.
#[repr(C)]
pub struct Core {
    /// General registers 0..16; 16 is always 0, 17 is [`CODE_BASE`](crate::op::CODE_BASE); the rest pads to a power of
    /// two.
    pub gpr: [u64; 32],
    /// Status flags.
    pub flags: Flags,
    /// RIP of the running block's start.
    pub block_rip: u64,
    /// RIP after the running block; branches overwrite it.
    pub next_rip: u64,
    /// Segment bases as addressing uses them: 0 for CS, DS, ES, SS in 64-bit mode.
    pub seg_base: [u64; 8],
    /// Bit n set: segment n needs a limit or type check on each access (legacy modes).
    pub seg_checked: u8,
    /// Mask of the stack pointer: 16, 32 or 64 bits.
    pub stack_mask: u64,
    /// End the block after the running operation.
    pub break_block: bool,
    /// A Bus reply asked for attention.
    pub attention: bool,
    /// Interrupts and shadows must be looked at before the next block.
    pub check_events: bool,
    /// TF was set when the running instruction started: #DB follows it.
    pub trap_pending: bool,
    /// Debug registers and alignment checks, digested.
    pub watch: crate::debug::Watch,
    /// A fault belongs to the task switched to: its return address.
    pub resume_at: Option<u64>,
    /// Shadow left by the running instruction for the next one.
    pub shadow_next: Shadow,
    /// Virtual time at the head of the running block.
    pub clock: VirtualTime,
    /// Cost of Bus replies in the running block.
    pub extra_cost: u64,
    /// The raised fault, valid after [`Stop::Fault`].
    pub fault: Fault,
    /// The page, valid after [`Stop::Absent`].
    pub absent: GpaPage,
    /// The exit, valid after [`Stop::Exit`].
    pub exit: Option<Exit>,
    /// Stores to lines that hold decoded code: (RAM offset, length).
    pub code_writes: Vec<(u64, u32)>,
    /// Code size of CS.
    pub code_size: CodeSize,
    /// What decoding depends on besides the bytes: CS base and code size; and [`FLAT`].
    pub code_mode: u64,
    /// [`CODE_VARIANT`] or 0: what the next block is found by besides the code mode.
    pub code_variant: u64,
    /// Everything else; `gpr`, `rip` and RFLAGS' status bits in here are stale while running.
    pub s: CpuState,
    /// What the profile allows in control registers.
    pub limits: ControlLimits,
    /// CPUID.
    pub profile: CpuidProfile,
    /// Local APIC id, for CPUID.
    pub apic_id: u32,
    /// Number of CPUs, for CPUID.
    pub cpus: u32,
    /// State of the RDRAND/RDSEED generator.
    pub random: u64,
    /// Guest-physical memory.
    pub mem: Arc<GuestMemory>,
    /// The MMU.
    pub mmu: Mmu,
    /// Executor of SIMD and x87 instructions.
    pub host: HostExec,
    /// Recent branches, as far as they were noticed at no cost.
    pub recent: crate::trace::Recent,
    /// The page claimed for MONITOR.
    pub(crate) monitored: Option<RamOffset>,
    /// Segments loaded lately.
    pub loaded: crate::loaded::LoadedSegments,
    /// What is traced, if anything.
    pub trace: Option<Box<crate::trace::Trace>>,
    /// Code bytes lines: which 64-byte lines of a RAM page hold decoded code.
    pub code_lines: hashbrown::HashMap<u64, u64>,
}

/// Whether accesses by a segment may be refused.
fn asks_for_checks(seg: &Segment) -> bool {
    let data = seg.attr.is_writable_data() && !seg.attr.is_expand_down() && !seg.attr.is_unusable();
    seg.limit != u32::MAX || !data
}

impl Core {
    /// A CPU after reset.
    ///
    /// # Errors
    /// When the host can't give executable memory for SIMD stubs, or the memory has too many engines.
    pub fn new(
        mem: Arc<GuestMemory>,
        profile: &CpuidProfile,
        apic_id: u32,
        options: &EngineOptions,
    ) -> Result<Self, EngineError> {
        let limits = profile.control_limits();
        let mut s = CpuState::reset();
        s.gpr[2] = u64::from(profile.signature());
        let mut core = Self {
            gpr: [0; 32],
            flags: Flags::default(),
            block_rip: 0,
            next_rip: 0,
            seg_base: [0; 8],
            seg_checked: 0xff,
            stack_mask: 0xffff,
            break_block: false,
            attention: false,
            check_events: true,
            trap_pending: false,
            watch: crate::debug::Watch::default(),
            resume_at: None,
            shadow_next: Shadow::None,
            clock: VirtualTime(0),
            extra_cost: 0,
            fault: Fault::UNDEFINED,
            absent: GpaPage::new(0),
            exit: None,
            code_writes: Vec::new(),
            code_size: CodeSize::Bits16,
            code_mode: 0,
            code_variant: 0,
            limits,
            profile: profile.clone(),
            apic_id,
            cpus: 1,
            random: 0x9e37_79b9_7f4a_7c15,
            mmu: Mmu::watching(Watcher::register(mem.clone())?, limits, options.mmu),
            host: HostExec::new()?,
            mem,
            recent: crate::trace::Recent::default(),
            monitored: None,
            loaded: crate::loaded::LoadedSegments::default(),
            trace: None,
            code_lines: hashbrown::HashMap::new(),
            s,
        };
        let reset = core.s.clone();
        core.set_state(&reset);
        Ok(core)
    }

    /// The block at `next_rip` is about to run.
    #[inline(always)]
    pub fn enter_block(&mut self, block: &Block) {
        self.gpr[CODE_BASE as usize] = self.next_rip.wrapping_sub(block.rip);
        self.be_in_block(block);
    }

    /// The block is running where [`CODE_BASE`] says.
    #[inline(always)]
    pub fn be_in_block(&mut self, block: &Block) {
        let base = self.gpr[CODE_BASE as usize];
        self.block_rip = base.wrapping_add(block.rip);
        self.next_rip = base.wrapping_add(block.end_rip);
    }

    /// The architectural state, complete. `rip` is where execution goes on.
    pub fn state(&self, rip: u64) -> CpuState {
        let mut s = self.s.clone();
        s.gpr.copy_from_slice(&self.gpr[..16]);
        s.rip = rip;
        s.rflags = self.rflags();
        s
    }

    /// Replaces the architectural state.
    pub fn set_state(&mut self, state: &CpuState) {
        self.s = state.clone();
        self.gpr[..16].copy_from_slice(&state.gpr);
        self.gpr[16] = 0;
        self.next_rip = state.rip;
        self.set_rflags(state.rflags);
        let regs = self.control_regs();
        self.mmu.reset_to(&regs);
        self.mmu.set_pkru(self.s.pkru);
        self.mmu.set_pkrs(self.s.msr.pkrs as u32);
        self.segments_changed();
        self.view_changed();
        self.forget_hits();
        self.debug_changed();
        self.restore_monitor();
        self.check_events = true;
    }

    /// RFLAGS with materialised status flags.
    #[inline(always)]
    pub fn rflags(&self) -> u64 {
        self.s.rflags & !rflags::STATUS | self.flags.to_rflags() | rflags::FIXED
    }

    /// Replaces RFLAGS; the caller has masked what may change.
    #[inline(always)]
    pub fn set_rflags(&mut self, value: u64) {
        self.flags = Flags::from_rflags(value);
        self.set_system_flags(value);
    }

    /// Replaces RFLAGS but for the status flags.
    #[inline]
    pub fn set_system_flags(&mut self, value: u64) {
        let changed = self.s.rflags ^ value;
        self.set_flags_in_view(value);
        if changed & rflags::AC != 0 {
            self.view_changed();
        }
    }

    /// As [`set_system_flags`](Self::set_system_flags) where RFLAGS.AC stays.
    #[inline(always)]
    pub(crate) fn set_flags_in_view(&mut self, value: u64) {
        let changed = self.s.rflags ^ value;
        self.s.rflags = value & rflags::WRITABLE | rflags::FIXED;
        // RF is looked at with each block.
        if changed & (rflags::IF | rflags::TF | rflags::VM) != 0 || value & rflags::TF != 0 {
            self.check_events = true;
            self.break_block = true;
        }
    }

    /// Raises `fault`: `return c.raise(Fault::GP0)`.
    #[cold]
    pub fn raise<T>(&mut self, fault: Fault) -> Result<T, Stop> {
        self.fault = fault;
        Err(Stop::Fault)
    }

    /// Lifts an architectural result into the engine's.
    #[inline]
    pub fn check<T>(&mut self, result: Result<T, Fault>) -> Result<T, Stop> {
        match result {
            Ok(value) => Ok(value),
            Err(fault) => self.raise(fault),
        }
    }

    /// Virtual time of the operation `op` of the running block.
    #[inline]
    pub fn now(&self, prefix: u32) -> VirtualTime {
        self.clock.plus(u64::from(prefix) + self.extra_cost)
    }

    /// Charges instructions that cost so much, and what the bus took.
    #[inline(always)]
    pub(crate) fn charge(&mut self, cost: u32) {
        self.clock = self.clock.plus(u64::from(cost) + std::mem::take(&mut self.extra_cost));
    }

    /// The TSC at `now`.
    pub fn tsc(&self, now: VirtualTime) -> u64 {
        now.0.wrapping_add(self.s.msr.tsc_offset)
    }

    /// The TSC as operation `op` reads it: all CPUs see it grow.
    #[inline]
    pub fn read_tsc(&self, bus: &mut dyn Bus, op: &Op) -> u64 {
        let now = self.now(op.prefix);
        self.tsc(if self.cpus > 1 { bus.shared_time(now) } else { now })
    }

    /// Takes the cost and the attention request of a Bus reply.
    #[inline]
    pub fn settle<T>(&mut self, reply: umbra_arch::Reply<T>) -> T {
        self.extra_cost += u64::from(reply.cost);
        // A device may have written to memory.
        if reply.attention || reply.cost != 0 || self.mmu.watcher().is_pending() {
            self.attention |= reply.attention;
            self.break_block = true;
        }
        reply.value
    }

    /// The registers that govern paging.
    pub fn control_regs(&self) -> ControlRegs {
        let s = &self.s;
        ControlRegs { cr0: s.cr0, cr3: s.cr3, cr4: s.cr4, efer: s.efer, pdpte: s.pdpte }
    }

    /// The rest of what control-register legality asks for.
    pub fn code_context(&self) -> CodeContext {
        let tr = self.s.segment(Seg::Tr);
        CodeContext { cs_long: self.s.segment(Seg::Cs).attr.is_long(), tss16: tr.attr.kind() & 0xd == 1 }
    }

    /// Commits a legal control-register write: registers, MMU root, decoding mode.
    pub fn commit(&mut self, effects: &Effects) {
        let r = &effects.regs;
        let de = self.s.cr4.de();
        let s = &mut self.s;
        (s.cr0, s.cr3, s.cr4, s.efer, s.pdpte) = (r.cr0, r.cr3, r.cr4, r.efer, r.pdpte);
        self.mmu.apply(effects);
        if self.trace.is_some() {
            self.trace_commit(effects);
        }
        self.segments_changed();
        self.view_changed();
        if effects.regs.cr4.de() != de {
            self.debug_changed();
        }
        self.break_block = true;
    }

    /// Whether `address` may be loaded into a base or target register: what counts is the width that the
    /// processor supports, whatever CR4.LA57 says ("5-Level Paging": canonicality checking).
    pub fn fits_register(&self, address: u64) -> bool {
        let bits = if self.profile.has(umbra_arch::cpuid::Feature::La57) { 57 } else { 48 };
        umbra_arch::Gva::new(address).is_canonical(bits)
    }

    /// Tells the MMU about CPL and RFLAGS.AC.
    #[inline]
    pub fn view_changed(&mut self) {
        self.mmu.set_view(self.s.cpl, self.s.rflags & rflags::AC != 0);
        self.guard_changed();
    }

    /// CPL, RFLAGS.AC and, `wp_changes` times, CR0.WP have changed, and the MMU doesn't know yet.
    pub fn catch_up_view(&mut self, wp_changes: u64) {
        if wp_changes & 1 != 0 {
            let (regs, flush) = (self.control_regs(), FlushScope::None);
            self.mmu.apply(&Effects { regs, flush, pdptes_loaded: false, forget_pcids: false });
        }
        self.mmu.count_wp_changes(wp_changes & !1);
        self.view_changed();
    }

    /// Sets CPL; decoded code and the view follow.
    pub fn set_cpl(&mut self, cpl: u8) {
        self.s.cpl = cpl;
        self.view_changed();
    }

    /// Recomputes what addressing and decoding derive from segment registers and mode.
    #[inline]
    pub fn segments_changed(&mut self) {
        self.break_block = true;
        if self.code_size == CodeSize::Bits64 && self.s.is_64bit_code() {
            return self.flat_bases();
        }
        self.code_size_changed();
    }

    /// Replaces CS, and nothing else that addressing and decoding depend on.
    #[inline(always)]
    pub fn set_code_segment(&mut self, cs: Segment) {
        self.break_block = true;
        let old = &mut self.s.seg[Seg::Cs as usize];
        // Handlers mostly run in the segment that they interrupt.
        if *old != cs {
            *old = cs;
            self.segments_changed();
        }
    }

    #[inline(never)]
    fn code_size_changed(&mut self) {
        let long = self.s.is_64bit_code();
        self.seg_base = [0; 8];
        let cs = self.s.segment(Seg::Cs);
        let size = if long {
            CodeSize::Bits64
        } else if cs.attr.is_big() {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        };
        self.code_size = size;
        if long {
            self.flat_bases();
        } else {
            self.checked_bases();
        }
        let ss = self.s.segment(Seg::Ss);
        self.stack_mask = match (long, ss.attr.is_big()) {
            (true, _) => u64::MAX,
            (_, true) => 0xffff_ffff,
            _ => 0xffff,
        };
        let flat = if size == CodeSize::Bits32 && self.is_flat() { FLAT } else { 0 };
        self.code_mode = self.seg_base[Seg::Cs as usize] | (size as u64) << CODE_SIZE_AT | flat;
    }

    /// Whether code and data segments but for FS and GS are [`FLAT`].
    #[inline]
    fn is_flat(&self) -> bool {
        let bit = |seg: Seg| 1 << seg as u8;
        let bases = [Seg::Cs, Seg::Ds, Seg::Es, Seg::Ss].iter().fold(0, |all, &seg| all | self.seg_base[seg as usize]);
        self.seg_checked & (bit(Seg::Ds) | bit(Seg::Es) | bit(Seg::Ss)) == 0
            && bases == 0
            && self.s.segment(Seg::Cs).limit == u32::MAX
            && self.stack_mask == 0xffff_ffff
    }

    /// 64-bit code: only FS and GS have bases, and nothing is checked against limits.
    #[inline]
    fn flat_bases(&mut self) {
        for seg in [Seg::Fs, Seg::Gs] {
            self.seg_base[seg as usize] = self.s.segment(seg).base;
        }
    }

    fn checked_bases(&mut self) {
        self.seg_checked = 0;
        for (i, seg) in self.s.seg.iter().enumerate() {
            self.seg_base[i] = seg.base;
            self.seg_checked |= u8::from(asks_for_checks(seg)) << i;
        }
    }

    /// Whether what is derived from segment registers is what they say, outside 64-bit mode.
    pub(crate) fn knows_segments(&self) -> bool {
        let known = |(n, seg): (usize, &Segment)| {
            self.seg_base[n] == seg.base && self.seg_checked >> n & 1 == asks_for_checks(seg).into()
        };
        self.s.is_64bit_code() || self.s.seg[..6].iter().enumerate().all(known)
    }

    /// Stops executing: [`Activity::Halted`] or [`Activity::Waiting`].
    pub fn halt(&mut self, activity: Activity) {
        self.s.activity = activity;
        self.check_events = true;
        self.break_block = true;
    }

    /// Next value of the deterministic RDRAND/RDSEED generator (splitmix64).
    pub fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.random ^ self.random >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}
