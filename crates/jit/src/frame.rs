//! What generated code and the engine tell each other, at fixed offsets from R15.

mod core_fields;

pub use core_fields::*;

use crate::contexts::{Contexts, Half};
use crate::emitter::Mem;
use crate::engine::Engine;
use crate::gates::Gates;
use crate::groups::BASES;
use crate::jumps::salt;
use crate::ranges::{self, COUNTERS, Ranges, STRIKES, StackRanges};
use crate::registers::{ENGINE, home};
use crate::system_calls::Segments;
use crate::views::{self, Selected, Views};
use crate::windows::{self, REGIONS, Region};
use std::mem::offset_of;
use umbra_arch::control::{Cr0, Cr4};
use umbra_arch::fpu::xcr0;
use umbra_arch::segment::Segment;
use umbra_arch::{Bus, CpuState, Exit, VirtualTime, rflags};
use umbra_cpu::Core;
use umbra_cpu::core::CODE_VARIANT;
use umbra_cpu::op::Stop;
use umbra_mmu::{Entry, FastTable, Mmu};

/// Why generated code was left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Reason {
    /// An operation broke its block or stopped: `site` says which.
    Op,
    /// A block doesn't fit into the budget, or the engine asked to be told: `site` says which block.
    Budget,
    /// A fault was delivered, and there is more to look at or an exit: all is in the core.
    Event,
    /// A direct exit isn't linked: `site` is its number.
    Link,
    /// No translation is known for the RIP in the core.
    Miss,
}

/// The engine's part that generated code uses. What it uses most comes last.
#[repr(C)]
pub struct Frame {
    /// Host address of guest RAM.
    pub ram: u64,
    pub scratch: u64,
    /// The host's stack where no CALL is to be [returned](crate::returns) from, and where too many are.
    pub calls: u64,
    pub deepest_call: u64,
    /// Where pages of the upper half are fetched from.
    pub fetches: u64,
    /// The table of translations by place.
    pub places: u64,
    /// Upper halves of linear addresses from which a near branch may reach beyond the canonical ones.
    pub edges: [u32; 2],
    /// What the search by place has found.
    pub found: u64,
    /// Failing guards until an exit is linked anew.
    pub relink: u32,
    /// The linear address of a range's miss.
    pub linear: u64,
    /// A range that was missed for some time, and one: where, and where the code that missed goes on.
    pub missed: u32,
    pub missed_gva: u64,
    /// An address that a site whose counter is down has missed with, if it uses windows.
    pub struck_gva: u64,
    /// A site whose counter is down.
    pub struck: u32,
    /// Packed status flags, in RAX while code runs.
    pub flags: u32,
    pub reason: Reason,
    /// See [`Reason`].
    pub site: u32,
    /// The guest's MXCSR while `vectors` allows SSE, with exceptions masked otherwise.
    pub mxcsr: u32,
    /// What Rust code runs with.
    pub host_mxcsr: u32,
    /// Vector units that generated code may use: [`VECTOR_SSE`], [`VECTOR_AVX`].
    pub vectors: u8,
    /// As `vectors` while the host's vector registers hold the guest's, the core's are stale; otherwise 0.
    pub vectors_live: u8,
    /// 1: no x87 instruction can fault for the x87 state's sake, and no exception is unmasked.
    pub x87_usable: u8,
    /// Not 0: the host's x87 registers hold the guest's FSW, tags and stack, the core's are stale.
    pub x87_live: u8,
    /// INVLPGs that have yet to be counted.
    pub page_flushes: u64,
    /// 1: EFER.SCE.
    pub system_calls: u8,
    /// 1: an interrupt waits, whatever RFLAGS.IF says.
    pub interrupt: u8,
    /// 1: the view was changed by generated code, and the MMU doesn't know.
    pub changed_view: u8,
    /// 1: CR0.WP may be changed by generated code.
    pub wp_usable: u8,
    /// Changes of CR0.WP that the MMU doesn't know of.
    pub wp_changes: u64,
    /// The view in force: its offset in `views`.
    pub view: u64,
    /// Where the views of the root in force begin there.
    pub root_views: u64,
    /// The MMU's epoch as it was last seen.
    pub epoch: u64,
    /// The MMU's withdrawals that the ranges hold for.
    pub withdrawals: u64,
    pub views: Views,
    /// What system calls load into segment registers, and IA32_STAR that this is of.
    pub segments: Segments,
    pub star: Option<u64>,
    /// What INT n and IRETQ load.
    pub gates: Gates,
    /// CR4.TSD as views take it into account.
    pub tsd: bool,
    /// Scratch of system calls: RFLAGS before and after, the site.
    pub old_flags: u64,
    pub new_flags: u64,
    pub call_site: u32,
    /// FCW that Rust code runs with.
    pub host_fcw: u16,
    pub ranges: Ranges,
    /// Misses of [sites](crate::ranges::counter) until one is looked at.
    pub strikes: [u32; COUNTERS],
    /// By kind of access: the ranges, by bits, that aren't empty.
    pub used_ranges: [u32; 2],
    /// What to add to a linear address of the group that was checked last, by its base register if that lives in memory.
    pub addends: [u64; BASES],

    /// Virtual time when the budget is used up.
    pub end: u64,
    /// Taken from the budget so that the next block's head leaves.
    pub bank: i64,
    /// The code mode in force.
    pub mode: u64,
    /// How the operation of a [`Reason::Op`] stopped.
    pub stop: Option<Stop>,
    /// What a [`Reason::Event`] ends the slice with.
    pub exit: Option<Exit>,
    /// Virtual time at which RFLAGS.RF was set, which is clear in the core: it is for the instruction that starts then.
    pub resume: u64,
    /// Ticks that were taken from the budget and weren't instructions.
    pub extra: u64,
    /// The bus of the slice, erased: only used while `run` has it.
    pub bus: Option<*mut (dyn Bus + 'static)>,
    /// A panic on its way through generated code.
    pub panic: Option<Box<dyn std::any::Any + Send>>,
    /// What FXSAVE writes on the way to the core, and FXRSTOR reads on the way back.
    pub image: Image,
    /// Regions of the address space in force that have windows, but for the first ones.
    pub far_regions: [Region; REGIONS - NEAR_REGIONS],
    /// What follows ends where the core begins.
    pub near: [Core; 0],
    /// What the flags of the last operation that has a [recipe](crate::recipes) are made from, if no register keeps it.
    pub kept: u64,
    pub selected: Selected,
    /// Ticks left, negative when there is not enough for the next block.
    pub budget: i64,
    /// The first regions.
    pub regions: [Region; NEAR_REGIONS],
    /// The stack's ranges.
    pub stack: StackRanges,
}

/// Regions that are addressed by short displacements.
pub const NEAR_REGIONS: usize = 2;

/// An FXSAVE image.
#[repr(C, align(16))]
pub struct Image([u8; 512]);

/// SSE may be used and MXCSR is the guest's.
pub const VECTOR_SSE: u8 = 1;
/// AVX, too.
pub const VECTOR_AVX: u8 = 2;
/// All exceptions masked, round to nearest: the mask bits.
pub const MXCSR_DEFAULT: u32 = 0x1f80;

/// FCW after FNINIT.
const FCW_DEFAULT: u16 = 0x37f;
/// FCW: masks of all exceptions.
pub const X87_MASKS: u16 = 0x3f;
/// FCW: bits that exist.
pub const X87_CONTROL: u16 = 0x1f7f;
/// FSW: error summary and busy.
const X87_SUMMARY: u16 = 0x8080;

/// Failing guards until the next one's exit is linked to where it leads now: the hottest ones come first.
pub const RELINK: u32 = 64;

/// No virtual time.
const NEVER: u64 = u64::MAX;

/// More than any budget.
pub const BANK: i64 = 1 << 61;

const AVX_STATE: u64 = xcr0::SSE | xcr0::AVX;

/// A table that holds nothing.
static NOTHING: [Entry; Entry::FEW] = {
    let mut table = [Entry::empty(0); Entry::FEW];
    let mut slot = 0;
    while slot < table.len() {
        table[slot] = Entry::empty(slot as u64);
        slot += 1;
    }
    table
};

impl Frame {
    pub fn new(ram: u64, [fetches, places]: [u64; 2]) -> Self {
        Self {
            ram,
            scratch: 0,
            kept: 0,
            calls: 0,
            deepest_call: 0,
            fetches,
            places,
            edges: [0; 2],
            found: 0,
            relink: RELINK,
            linear: 0,
            missed: 0,
            missed_gva: 0,
            struck_gva: 0,
            struck: ranges::NO_SITE,
            flags: 0,
            reason: Reason::Op,
            site: 0,
            mxcsr: MXCSR_DEFAULT,
            host_mxcsr: MXCSR_DEFAULT,
            vectors: 0,
            vectors_live: 0,
            x87_usable: 0,
            x87_live: 0,
            page_flushes: 0,
            system_calls: 0,
            interrupt: 0,
            changed_view: 0,
            wp_usable: 0,
            wp_changes: 0,
            view: u64::MAX,
            root_views: 0,
            epoch: 0,
            withdrawals: 0,
            views: views::NONE,
            segments: [[Segment::null(0); 2]; 2],
            star: None,
            gates: Gates::new(),
            tsd: false,
            old_flags: 0,
            new_flags: 0,
            call_site: 0,
            host_fcw: FCW_DEFAULT,
            ranges: ranges::NONE,
            strikes: [STRIKES; COUNTERS],
            used_ranges: [0; 2],
            addends: [0; BASES],
            end: 0,
            bank: 0,
            mode: 0,
            stop: None,
            exit: None,
            resume: NEVER,
            extra: 0,
            bus: None,
            panic: None,
            image: Image([0; 512]),
            far_regions: [windows::NOWHERE; REGIONS - NEAR_REGIONS],
            near: [],
            selected: Selected::NONE,
            budget: 0,
            regions: [windows::NOWHERE; NEAR_REGIONS],
            stack: [ranges::EMPTY; 2],
        }
    }

    /// After anything that may have moved or cleared the MMU's table.
    #[inline]
    pub fn take_table(&mut self, table: Table) {
        let selected = &mut self.selected;
        (selected.slots, selected.mask) = table;
    }

    /// The table in force.
    #[inline]
    pub fn table(&self) -> Table {
        (self.selected.slots, self.selected.mask)
    }

    /// Before generated code goes on: MXCSR, and which vector units it may use.
    #[inline]
    pub fn take_vectors(&mut self, s: &CpuState) {
        let mxcsr = s.fp.mxcsr;
        let usable = s.cr0.raw() & (Cr0::EM | Cr0::TS) == 0 && s.cr4.raw() & Cr4::OSFXSR != 0;
        let sse = usable && mxcsr & MXCSR_DEFAULT == MXCSR_DEFAULT && mxcsr >> 16 == 0;
        let avx = sse && s.cr4.raw() & Cr4::OSXSAVE != 0 && s.xcr0 & AVX_STATE == AVX_STATE;
        self.vectors = u8::from(sse) | u8::from(avx) << 1;
        self.mxcsr = if sse { mxcsr } else { MXCSR_DEFAULT };
    }

    /// Before generated code goes on: whether it may use the x87 unit. What is stale in the core while the host has
    /// the state doesn't matter: it was usable then, and nothing that changes that is done meanwhile.
    #[inline]
    pub fn take_x87(&mut self, s: &CpuState) {
        let fp = &s.fp;
        let masked = fp.fcw & (X87_MASKS | !X87_CONTROL) == X87_MASKS;
        let usable = masked && fp.fsw & X87_SUMMARY == 0 && s.cr0.raw() & (Cr0::EM | Cr0::TS) == 0;
        debug_assert!(usable || self.x87_live == 0, "the host's x87 registers still hold the guest's");
        self.x87_usable = usable.into();
    }

    /// After generated code: MXCSR's flags.
    #[inline]
    pub fn give_vectors(&self, s: &mut CpuState) {
        if self.vectors & VECTOR_SSE != 0 {
            s.fp.mxcsr = self.mxcsr;
        }
    }

    /// Virtual time, as far as blocks have been charged.
    pub fn now(&self) -> u64 {
        self.end.wrapping_sub(self.left() as u64)
    }

    /// Ticks left, whatever is banked.
    pub fn left(&self) -> i64 {
        self.budget + self.bank
    }

    /// After anything that may have changed what code is fetched and how.
    #[inline]
    pub fn take_context(&mut self, core: &Core, contexts: &mut Contexts) {
        self.selected.stamps = stamps(core);
        let variant = windows::variant(core);
        self.mode = core.code_mode | variant;
        self.selected.place_salt = place_salt(variant);
        for half in Half::BOTH {
            let mode = mode_of(core, half);
            let context = contexts.get(half, self.selected.stamps[half as usize], mode);
            self.selected.context[half as usize] = context.number;
            self.selected.jumps[half as usize] = context.jumps.address();
        }
        self.selected.upper_salt = salt(self.selected.context[Half::Upper as usize]).into();
        contexts.take_replaced().for_each(|number| self.forget_views_of(number));
        self.edges = edges(core.s.linear_bits());
        self.take_level(core);
    }

    /// As [`take_context`](Self::take_context) if it may well be the same as before.
    #[inline]
    pub fn follow_context(&mut self, core: &Core, contexts: &mut Contexts) {
        if stamps(core) == self.selected.stamps && mode_of(core, Half::Lower) == self.mode {
            self.take_level(core);
        } else {
            self.take_context(core, contexts);
        }
    }

    /// After anything that may have changed CPL or CR4.TSD.
    #[inline]
    fn take_level(&mut self, core: &Core) {
        self.selected.tsc_usable = u64::from(core.cpus == 1 && (core.s.cpl == 0 || !core.s.cr4.tsd()));
    }

    /// Before generated code goes on: RFLAGS.RF ends with the next instruction, unless that faults.
    #[inline]
    pub fn take_resume(&mut self, s: &mut CpuState) {
        if s.rflags & rflags::RF != 0 {
            s.rflags &= !rflags::RF;
            self.resume = self.now();
        }
    }

    /// Before an instruction that starts at `clock` is looked at: RFLAGS.RF, if it is the one that this was set for.
    #[inline]
    pub fn give_resume(&mut self, s: &mut CpuState, clock: VirtualTime) {
        let due = std::mem::replace(&mut self.resume, NEVER);
        if due == clock.0 {
            s.rflags |= rflags::RF;
        }
    }

    /// Has the next block's head leave.
    pub fn leave_soon(&mut self) {
        if self.bank == 0 {
            self.bank = BANK;
            self.budget -= BANK;
        }
    }
}

/// See [`Selected::stamps`].
#[inline]
pub fn stamps(core: &Core) -> [u64; 2] {
    [core.mmu.fetch_stamp(), core.mmu.upper_stamp()]
}

/// What code of a half is found by besides its place.
#[inline]
pub fn mode_of(core: &Core, half: Half) -> u64 {
    match half {
        Half::Lower => core.code_mode | windows::variant(core),
        Half::Upper => core.code_mode,
    }
}

/// What tells places of code apart that is translated in more than one way.
pub fn place_salt(mode: u64) -> u64 {
    mode & CODE_VARIANT
}

/// See [`Frame::edges`].
pub fn edges(linear_bits: u32) -> [u32; 2] {
    let half = 1 << (linear_bits - 33);
    [half - 1, 0u32.wrapping_sub(half)]
}

/// A slot's table, the mask of a slot's offset in bytes.
pub type Table = (u64, u64);

/// The table that the MMU reads at present.
#[inline]
pub fn table_of(mmu: &Mmu) -> Table {
    let table = mmu.fast_table().unwrap_or(FastTable { slots: NOTHING.as_ptr(), mask: NOTHING.len() as u64 - 1 });
    (table.slots as u64, table.mask * size_of::<Entry>() as u64)
}

/// What a view selects, as generated code addresses it.
macro_rules! selected {
    ($field:ident) => {{
        let start = $crate::frame::frame_field!(selected);
        let offset = std::mem::offset_of!($crate::views::Selected, $field);
        $crate::emitter::Mem { disp: start.disp + offset as i32, ..start }
    }};
}
pub(crate) use selected;

/// How far into the engine R15 points: what lies within 128 bytes to either side is addressed by short displacements.
/// These are the frame's end and guest R10 to R15 and [`CODE_BASE`](umbra_cpu::op::CODE_BASE), which lie in the core.
pub const INTO: usize = offset_of!(Engine, frame) + size_of::<Frame>() + 16;
const STACK_END: i32 = frame_field!(stack).disp + size_of::<StackRanges>() as i32;
const _: () = assert!(STACK_END == gpr(0).disp, "nothing lies between the frame and the core");
const _: () = assert!(selected!(mask).disp >= -128 && code_base().disp < 128);

/// What lies at that offset of the engine.
pub const fn at_engine(offset: usize) -> Mem {
    Mem { base: Some(ENGINE), index: None, disp: offset as i32 - INTO as i32 }
}

/// A field of the frame as generated code addresses it.
macro_rules! frame_field {
    ($field:ident) => {
        $crate::frame::at_engine(
            std::mem::offset_of!($crate::engine::Engine, frame) + std::mem::offset_of!($crate::frame::Frame, $field),
        )
    };
}
pub(crate) use frame_field;

/// See [`Frame::addends`]. Those of registers that live in the host's are where functions expect these, which nothing in a
/// group calls.
pub fn addend(base: u8) -> Mem {
    let elsewhere = Mem { disp: frame_field!(addends).disp + 8 * i32::from(base), ..frame_field!(addends) };
    if home(base).is_some() { gpr(base) } else { elsewhere }
}

/// The context number of a half.
pub fn context(half: Half) -> Mem {
    Mem { disp: selected!(context).disp + 4 * half as i32, ..selected!(context) }
}

/// The jump table of a half.
pub fn jumps(half: Half) -> Mem {
    Mem { disp: selected!(jumps).disp + 8 * half as i32, ..selected!(jumps) }
}
