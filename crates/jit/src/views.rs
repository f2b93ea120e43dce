//! Views of memory that generated code changes between by itself: what CPL, RFLAGS.AC and CR0.WP decide of data
//! accesses and fetches, remembered for as long as nothing else decides otherwise ([`Mmu::epoch`]).
//!
//! The MMU isn't told; it [catches up](Frame::catch_up) before Rust code looks at it.

use crate::emitter::{Alu, Emitter, Mem, cc};
use crate::frame::{Frame, cr0, frame_field, gpr, selected};
use crate::memory_path::Access;
use crate::ranges::{self, EMPTY, PATIENCE, Range};
use crate::registers::{A, B, ENGINE, RDX, TABLE, guest};
use std::mem::offset_of;
use umbra_arch::control::Cr0;
use umbra_arch::rflags;
use umbra_cpu::Core;
use umbra_cpu::core::{FLAT, code_bits};

/// What generated code needs of a view.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct View {
    /// The MMU's epoch that this holds for.
    epoch: u64,
    /// The slot of its root.
    root: usize,
    selected: Selected,
    /// The MMU's withdrawals that the stack's ranges hold for.
    withdrawals: u64,
    stack: [Range; 2],
}

impl View {
    /// Offsets.
    pub const EPOCH: usize = offset_of!(View, epoch);
    pub const SELECTED: usize = offset_of!(View, selected);
}

/// What a view selects.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Selected {
    /// The MMU's fast table.
    pub slots: u64,
    /// Numbers of the fetch stamps and code mode in force, by [`Half`](crate::contexts::Half).
    pub context: [u32; 2],
    /// Their jump tables.
    pub jumps: [u64; 2],
    /// What the upper half's context changes in the hash of [`Fetches`](crate::jumps::Fetches).
    pub upper_salt: u64,
    /// The MMU's fetch stamps in force.
    pub stamps: [u64; 2],
    /// What is added to the place of code in the lower half where that is looked for.
    pub place_salt: u64,
    /// 1: RDTSC can't fault, and no other processor's time has to be looked at.
    pub tsc_usable: u64,
    /// Mask of a slot's offset in bytes. The last one, within reach of short displacements.
    pub mask: u64,
}

impl Selected {
    pub const NONE: Self = Self {
        slots: 0,
        mask: 0,
        context: [0; 2],
        jumps: [0; 2],
        upper_salt: 0,
        stamps: [0; 2],
        place_salt: 0,
        tsc_usable: 0,
    };
}

/// No epoch: that of no view.
const NEVER: u64 = u64::MAX;
/// Nor this one, of views that aren't known.
const UNTAKEN: u64 = u64::MAX - 1;
const UNKNOWN: View = View { epoch: NEVER, root: 0, selected: Selected::NONE, withdrawals: 0, stack: [EMPTY; 2] };
/// In 64-bit mode: ring 3 with RFLAGS.AC clear, the supervisor's four by AC and CR0.WP. As many of 32-bit code in flat
/// segments. Whatever else there is, which is never known.
const VIEWS: usize = 2 * NARROW + 1;
/// The first one of 32-bit code.
const NARROW: usize = 5;
const ELSEWHERE: usize = VIEWS - 1;
/// Roots whose views are kept, by their slots' last bits.
const ROOTS: usize = 4;

/// The views.
pub type Views = [View; ROOTS * VIEWS];

/// None of them known.
pub const NONE: Views = [UNKNOWN; ROOTS * VIEWS];

/// Where a view is from its root's first one on, in bytes.
pub const fn offset_of_view(user: bool, ac: bool, wp: bool) -> usize {
    let number = if user { 0 } else { 1 + ac as usize + 2 * wp as usize };
    number * size_of::<View>()
}

/// From a view of 64-bit code to that of 32-bit code.
pub const NARROW_STEP: i32 = (NARROW * size_of::<View>()) as i32;
/// From a supervisor's view with CR0.WP clear to that with CR0.WP set.
pub const WP_STEP: i32 = 2 * size_of::<View>() as i32;
/// Likewise for RFLAGS.AC.
pub const AC_STEP: i32 = size_of::<View>() as i32;

fn number(core: &Core) -> usize {
    let (ac, wp) = (core.s.rflags & rflags::AC != 0, core.s.cr0.raw() & Cr0::WP != 0);
    // The numbers of contexts say what code is decoded as.
    let first = match core.code_mode {
        mode if code_bits(mode) == 64 => 0,
        mode if mode & FLAT != 0 => NARROW,
        _ => return ELSEWHERE,
    };
    match core.s.cpl {
        0 => first + offset_of_view(false, ac, wp) / size_of::<View>(),
        3 if !ac => first,
        _ => ELSEWHERE,
    }
}

/// The number of the view in force.
fn place(core: &Core) -> usize {
    core.mmu.root() % ROOTS * VIEWS + number(core)
}

impl Frame {
    /// Takes the view in force if it is known, as [`emit_change`] does; false if it isn't.
    #[inline]
    pub fn follow_view(&mut self, core: &Core) -> bool {
        let (number, epoch, withdrawals) = (place(core), core.mmu.epoch(), core.mmu.withdrawals());
        let known = &self.views[number];
        if self.epoch != epoch || known.epoch != epoch || known.root != core.mmu.root() {
            return false;
        }
        let (view, size) = ((number * size_of::<View>()) as u64, size_of::<View>() as u64);
        if view != self.view {
            let known = self.views[number];
            if let Some(old) = self.views.get_mut((self.view / size) as usize) {
                old.stack = self.stack;
                old.withdrawals = self.withdrawals;
            }
            self.forget_ranges();
            if known.withdrawals == withdrawals {
                self.take_stack_ranges(known.stack);
            }
            (self.view, self.selected) = (view, known.selected);
            self.mode = core.code_mode | known.selected.place_salt;
            self.take_root(core);
        } else if self.withdrawals != withdrawals {
            self.forget_ranges();
        }
        self.withdrawals = withdrawals;
        true
    }

    /// What views select may depend on something else than before.
    pub fn forget_all_views(&mut self) {
        self.views.iter_mut().for_each(|view| view.epoch = NEVER);
    }

    /// Generated code can't change to CPL 3 by itself until that has been known anew.
    pub fn forget_user_views(&mut self) {
        self.views.iter_mut().step_by(VIEWS).for_each(|view| view.epoch = NEVER);
    }

    /// The context of that number isn't known any more.
    pub fn forget_views_of(&mut self, context: u32) {
        let those = self.views.iter_mut().filter(|view| view.selected.context.contains(&context));
        those.for_each(|view| view.epoch = NEVER);
    }

    /// As [`know_view`](Self::know_view) if numbers of contexts may be others than before.
    #[inline]
    pub fn know_view_anew(&mut self, core: &Core) {
        self.epoch = UNTAKEN;
        self.know_view(core);
    }

    /// After the table and the context in force were taken: they are this view's.
    #[inline]
    pub fn know_view(&mut self, core: &Core) {
        let (number, root, epoch) = (place(core), core.mmu.root(), core.mmu.epoch());
        let view = (number * size_of::<View>()) as u64;
        let known = &mut self.views[number];
        if (self.view, self.epoch) == (view, epoch) && (known.epoch, known.root) == (epoch, root) {
            return;
        }
        if (known.epoch, known.root) != (epoch, root) {
            known.stack = [EMPTY; 2];
        }
        (known.selected, known.root) = (self.selected, root);
        known.epoch = if number % VIEWS == ELSEWHERE { NEVER } else { epoch };
        (self.view, self.epoch) = (view, epoch);
        self.take_root(core);
    }

    /// Generated code only changes between views of one root.
    fn take_root(&mut self, core: &Core) {
        let first = core.mmu.root() % ROOTS * VIEWS;
        self.root_views = (first * size_of::<View>()) as u64;
        for view in self.views[first..first + VIEWS].iter_mut().filter(|view| view.root != core.mmu.root()) {
            view.epoch = NEVER;
        }
    }

    /// What was known of views doesn't hold until the context is taken again.
    pub fn forget_views(&mut self) {
        self.epoch = UNTAKEN;
    }

    /// Before anything looks at the MMU: generated code may have changed the view.
    #[inline]
    pub fn catch_up(&mut self, core: &mut Core) {
        if self.changed_view != 0 {
            self.changed_view = 0;
            core.catch_up_view(std::mem::take(&mut self.wp_changes));
        }
    }
}

/// A field of the view at [`B`].
fn field(offset: usize) -> Mem {
    Mem::at(B, offset)
}

/// To [`B`]: which view the supervisor's is with RFLAGS.AC clear, from its root's first one. Clobbers [`A`].
pub fn supervisors_view(e: &mut Emitter) {
    e.load(A, cr0());
    e.shr(false, A, Cr0::WP.trailing_zeros() as u8);
    e.alu_imm(Alu::And, false, A, 1);
    e.rr(true, &[0x69], B, A); // imul
    e.raw(&WP_STEP.to_le_bytes());
    e.alu_imm(Alu::Add, true, B, offset_of_view(false, false, false) as i32);
}

/// Called with the offset of a view of the root in force in [`B`]: makes it the one in force; not equal (ZF) if it isn't
/// known. Clobbers [`A`] and [`B`].
pub fn emit_change(e: &mut Emitter) -> usize {
    let here = e.here();
    let views = frame_field!(views);
    e.alu_mem(Alu::Add, true, B, frame_field!(root_views));
    e.alu_mem(Alu::Cmp, true, B, frame_field!(view));
    let same = e.jcc(cc::EQUAL);
    e.load(A, frame_field!(epoch));
    e.alu_mem(Alu::Cmp, true, A, Mem { base: Some(ENGINE), index: Some((B, 0)), disp: views.disp });
    let unknown = e.jcc(cc::NOT_EQUAL);
    e.store(gpr(RDX), RDX);
    e.load(A, frame_field!(view));
    e.store(frame_field!(view), B);
    e.lea(A, Mem { base: Some(ENGINE), index: Some((A, 0)), disp: views.disp });
    e.lea(B, Mem { base: Some(ENGINE), index: Some((B, 0)), disp: views.disp });
    emit_ranges(e);
    e.load(RDX, frame_field!(withdrawals));
    e.alu_mem(Alu::Cmp, true, RDX, field(offset_of!(View, withdrawals)));
    let withdrawn = e.jcc(cc::NOT_EQUAL);
    let known = e.here();
    for at in (0..size_of::<Selected>()).step_by(8) {
        e.load(RDX, field(offset_of!(View, selected) + at));
        let selected = frame_field!(selected);
        e.store(Mem { disp: selected.disp + at as i32, ..selected }, RDX);
    }
    e.load(TABLE, selected!(slots));
    e.rm(false, &[0xc6], 0, frame_field!(changed_view)); // mov byte
    e.raw(&[1]);
    e.load(RDX, gpr(RDX));
    e.alu(Alu::Cmp, false, A, A);
    e.bind(unknown);
    e.bind(same);
    e.raw(&[0xc3]);
    e.bind(withdrawn);
    for access in [Access::Read, Access::Write] {
        empty(e, |at| ranges::field(guest::RSP, access, at));
    }
    e.jmp_to(known);
    here
}

/// Empties the range whose fields are where `part` says.
fn empty(e: &mut Emitter, part: impl Fn(usize) -> Mem) {
    e.store_imm(part(offset_of!(Range, limit)), 0);
    // With the field behind it, which is 0.
    e.store_imm(part(offset_of!(Range, patience)), PATIENCE as i32);
}

/// The stack's ranges go to the view at [`A`], those of the one at [`B`] take their place; all others are emptied. Clobbers
/// [`A`] and RDX.
fn emit_ranges(e: &mut Emitter) {
    let accesses = [(Access::Read, 0), (Access::Write, 1)];
    e.load(RDX, frame_field!(withdrawals));
    e.store(Mem::at(A, offset_of!(View, withdrawals)), RDX);
    let stack = |access: usize, at: usize| offset_of!(View, stack) + access * size_of::<Range>() + at;
    for (access, n) in accesses {
        for at in (0..size_of::<Range>()).step_by(8) {
            e.load(RDX, ranges::field(guest::RSP, access, at));
            e.store(Mem::at(A, stack(n, at)), RDX);
            e.load(RDX, field(stack(n, at)));
            e.store(ranges::field(guest::RSP, access, at), RDX);
        }
    }
    for (access, _) in accesses {
        e.load32(A, ranges::used(access));
        e.store_imm32(ranges::used(access), 1 << guest::RSP);
        e.alu_imm(Alu::And, false, A, !(1 << guest::RSP));
        let none = e.jcc(cc::EQUAL);
        let next = e.here();
        e.rr(false, &[0x0f, 0xbc], RDX, A); // bsf
        e.shl(true, RDX, size_of::<Range>().trailing_zeros() as u8);
        let first = ranges::field(0, access, 0);
        let part = |at: usize| Mem { base: Some(ENGINE), index: Some((RDX, 0)), disp: first.disp + at as i32 };
        empty(e, part);
        e.lea(RDX, Mem { base: Some(A), index: None, disp: -1 });
        e.alu(Alu::And, false, A, RDX);
        let more = e.jcc(cc::NOT_EQUAL);
        e.point(more, next);
        e.bind(none);
    }
}
