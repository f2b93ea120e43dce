//! The code that all translations share: entering, leaving, calling an operation's function, finding a RIP.

mod lookup;

use crate::emitter::{Alu, Emitter, Jump, Mem, cc};
use crate::frame::{BANK, INTO, Reason, at_engine, frame_field, gpr, next_rip, selected};
use crate::memory_path::{Access, in_slot};
use crate::ranges::{self, MARGIN, NAMES, Name, PATIENCE, Range};
use crate::registers::{A, B, ENGINE, FLAGS, RDI, RDX, RESIDENT, RSI, RSP, TABLE, home};
use crate::returns;
use crate::strings::{self, RepeatedStubs};
use crate::system_calls::{self, Ways};
use crate::{gates, vector_file, views, x87};
use std::mem::offset_of;
use umbra_mmu::Entry;

pub use lookup::{compare_slot, go, take_base};
use lookup::{elsewhere, find, lookup, other};

/// Offsets of the stubs in the code memory.
#[derive(Clone, Copy)]
pub struct Stubs {
    /// `extern "sysv64" fn(engine, code)`.
    pub enter: usize,
    /// Called with a site in [`A`]: does that operation, comes back if the block goes on.
    pub helper: usize,
    /// As `helper` for that operation, which missed its group, and all behind it in its block.
    pub rest: usize,
    /// As `rest` where no group was missed.
    pub tail: usize,
    /// As `tail` for an operation whose base register isn't in the region that it was looked for in.
    pub other_base: usize,
    /// Leaves at a block's head; [`A`] is its site.
    pub budget: usize,
    /// Leaves at an exit without a link; [`A`] is its number.
    pub link: usize,
    /// Goes to the translation of the RIP that is the code's base and [`A`].
    pub lookup: usize,
    /// As `lookup` for an exit, its number in [`B`], whose guard fails: now and then leaves so that it is linked anew.
    pub other: usize,
    /// Likewise where RIPs have 32 bits.
    pub other_narrow: usize,
    /// Called with a RIP in [`A`], which stays there, that isn't in the jump table's slot at [`B`]: if its translation is
    /// found, in the pair's other slot or by where its code is, ZF set and its slot at [`B`].
    pub find: usize,
    /// Called by what remains of a dropped translation, `LOOKUP_BYTES` of it: as `lookup`, but by where the
    /// code is alone.
    pub elsewhere: usize,
    /// As `elsewhere` for code whose RIPs don't count from its page.
    pub elsewhere_legacy: usize,
    /// As `lookup` for the RIP in the core.
    pub dispatch: usize,
    /// Called: see [`views::emit_change`].
    pub change_view: usize,
    /// SYSCALL: see [`system_calls::emit_call`].
    pub system_call: usize,
    /// SYSRETQ: see [`system_calls::emit_return`].
    pub system_return: usize,
    /// INT n: see [`gates::emit_interrupt`].
    pub interrupt: usize,
    /// IRETQ: see [`gates::emit_return`].
    pub interrupt_return: usize,
    /// Called: the guest's vector registers go to the host's; not equal (ZF) if the units in [`A`] can't be used.
    /// Clobbers [`B`].
    pub vectors_load: usize,
    /// Called: the guest's x87 state goes to the host's registers; not equal (ZF) if it can't be used. Clobbers
    /// [`A`] and [`B`].
    pub x87_load: usize,
    /// Called: it goes to the core if it isn't there. Clobbers [`A`] and [`B`].
    pub x87_store: usize,
    /// Called: does MOVS or STOS with REP as far as it can; not equal (ZF) if the operation's function must do the rest.
    /// Clobbers [`A`] and [`B`].
    pub repeated: RepeatedStubs,
    /// Called with a site in [`B`], which it clobbers, whose counter of misses is down.
    pub struck: usize,
    /// By range: called with a linear address in [`A`] and a number of bytes less one in [`B`]. If the MMU's table has
    /// them in one page: ZF set, the addend in [`A`], the linear address in [`B`].
    ranges: [[usize; NAMES]; 2],
    /// By kind of access: called with a linear address in [`A`] and a number of bytes less one in [`B`]. If the MMU's table
    /// has them in one page: ZF set, the addend in [`B`].
    pub other_region: [usize; 2],
}

impl Stubs {
    /// The stub of a range.
    pub fn range(&self, name: Name, access: Access) -> usize {
        self.ranges[usize::from(access == Access::Write)][usize::from(name)]
    }
}

/// How generated code goes on after an operation's function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Flow {
    /// With the next operation.
    On,
    /// Not at all.
    Leave,
    /// With another block, by the RIP in the core.
    Block,
}

/// Registers that the ABI wants back: RBX, RBP, R12 to R15.
const SAVED: [u8; 6] = [3, 5, 12, 13, 14, 15];

/// Addresses of the functions that the stubs of their names call: `extern "sysv64" fn(engine, site) -> u32`, a [`Flow`].
pub struct Functions {
    pub helper: u64,
    pub rest: u64,
    pub tail: u64,
    pub other_base: u64,
}

/// Emits the stubs.
pub fn emit(e: &mut Emitter, functions: &Functions) -> Stubs {
    let vectors_load = vector_file::emit_load(e);
    let x87_load = x87::emit_load(e);
    let x87_store = x87::emit_store(e);
    let leave_spilled = leave_spilled(e, x87_store);
    let leave = e.here();
    spill(e);
    e.jmp_to(leave_spilled);
    let leaving = |e: &mut Emitter, reason: Reason| {
        let here = e.here();
        e.store_imm32(frame_field!(reason), reason as u32);
        e.store32(frame_field!(site), A);
        e.jmp_to(leave);
        here
    };
    let budget = leaving(e, Reason::Budget);
    let link = leaving(e, Reason::Link);
    let miss = leaving(e, Reason::Miss);
    let dispatch = e.here();
    // The context may be another one.
    returns::empty(e);
    e.load(A, next_rip());
    let to_absolute = e.jmp();
    let (find, by_place) = find(e);
    let ([lookup, lookup_narrow], absolute) = lookup(e, find, miss, to_absolute);
    let (elsewhere, elsewhere_legacy) = elsewhere(e, by_place, miss);
    let [helper, rest, tail, other_base] = [functions.helper, functions.rest, functions.tail, functions.other_base]
        .map(|function| call_helper(e, function, leave_spilled, dispatch));
    let change_view = views::emit_change(e);
    let in_any_context = returns::emit_absolute(e, absolute);
    let ways = Ways { change: change_view, helper, dispatch, absolute: in_any_context };
    let system_call = system_calls::emit_call(e, ways);
    let system_return = system_calls::emit_return(e, ways);
    let interrupt = gates::emit_interrupt(e, ways);
    let interrupt_return = gates::emit_return(e, ways);
    let mut ranges = [[0; NAMES]; 2];
    for (n, stub) in ranges.iter_mut().flatten().enumerate() {
        *stub = range(e, n);
    }
    let other_region = [Access::Read, Access::Write].map(|access| other_region(e, access));
    Stubs {
        other_region,
        enter: enter(e, in_any_context),
        helper,
        rest,
        tail,
        other_base,
        budget,
        link,
        lookup,
        other: other(e, lookup, link),
        other_narrow: other(e, lookup_narrow, link),
        find,
        elsewhere,
        elsewhere_legacy,
        dispatch,
        change_view,
        system_call,
        system_return,
        interrupt,
        interrupt_return,
        vectors_load,
        struck: struck(e),
        x87_load,
        x87_store,
        repeated: strings::emit(e),
        ranges,
    }
}

fn enter(e: &mut Emitter, in_any_context: usize) -> usize {
    let here = e.here();
    SAVED.iter().for_each(|&r| push(e, r));
    // Six pushes and the return address: aligned to 16 bytes with one slot more.
    e.alu_imm(Alu::Sub, true, RSP, 8);
    e.lea(ENGINE, Mem::at(RDI, INTO));
    e.mov(A, RSI);
    reload(e);
    returns::begin(e, in_any_context);
    e.jmp_reg(A);
    here
}

fn leave_spilled(e: &mut Emitter, x87_store: usize) -> usize {
    let here = e.here();
    e.call(x87_store);
    returns::end(e);
    e.alu_imm(Alu::Add, true, RSP, 8);
    SAVED.iter().rev().for_each(|&r| pop(e, r));
    e.raw(&[0xc3]);
    here
}

fn call_helper(e: &mut Emitter, function: u64, leave_spilled: usize, dispatch: usize) -> usize {
    let here = e.here();
    spill(e);
    e.lea(RDI, at_engine(0));
    e.mov32(RSI, A);
    e.alu_imm(Alu::Sub, true, RSP, 8);
    e.mov_imm(RDX, function);
    e.raw(&[0xff, 0xd2]); // call rdx
    e.alu_imm(Alu::Add, true, RSP, 8);
    e.raw(&[0x85, 0xc0]); // test eax, eax
    let ended = e.jcc(cc::NOT_EQUAL);
    reload(e);
    e.raw(&[0xc3]);
    e.bind(ended);
    e.raw(&[0x83, 0xf8, Flow::Leave as u8]); // cmp eax, imm8
    let left = e.jcc(cc::EQUAL);
    e.point(left, leave_spilled);
    reload(e);
    e.jmp_to(dispatch);
    here
}

/// What a miss of range `n` calls.
fn range(e: &mut Emitter, n: usize) -> usize {
    let (name, access) = ((n % NAMES) as Name, if n < NAMES { Access::Read } else { Access::Write });
    let here = e.here();
    let nowhere = compare_page(e, access);
    e.load(A, in_slot(A, offset_of!(Entry, addend)));
    e.rm(false, &[0x81], 1, ranges::used(access)); // or
    e.raw(&(1u32 << name).to_le_bytes());
    e.rm(false, &[0xff], 1, ranges::field(name, access, offset_of!(Range, patience))); // dec
    let impatient = e.jcc(cc::EQUAL);
    e.alu_imm(Alu::And, true, B, -4096);
    let patient = e.here();
    e.cmp_mem_imm(ranges::field(name, access, offset_of!(Range, fixed)), 0);
    let fixed = e.jcc(cc::NOT_EQUAL);
    e.store(ranges::first(name, access), B);
    e.store(ranges::addend(name, access), A);
    e.store_imm(ranges::limit(name, access), (4096 - MARGIN) as i32);
    e.bind(fixed);
    e.load(B, frame_field!(linear));
    e.alu(Alu::Cmp, false, B, B);
    e.bind(nowhere);
    e.raw(&[0xc3]);
    e.bind(impatient);
    e.load(B, frame_field!(linear));
    e.store(frame_field!(missed_gva), B);
    e.store_imm32(frame_field!(missed), n as u32 + 1);
    e.store_imm32(ranges::field(name, access, offset_of!(Range, patience)), PATIENCE);
    leave_soon(e);
    e.load(B, frame_field!(linear));
    e.alu_imm(Alu::And, true, B, -4096);
    e.jmp_to(patient);
    here
}

/// See [`Stubs::other_region`].
fn other_region(e: &mut Emitter, access: Access) -> usize {
    let here = e.here();
    let nowhere = compare_page(e, access);
    e.load(B, in_slot(A, offset_of!(Entry, addend)));
    e.load(A, frame_field!(linear));
    e.bind(nowhere);
    e.raw(&[0xc3]);
    here
}

/// Jumps unless the MMU's table has the bytes from the linear address in [`A`] on, of which [`B`] is the number less one, in
/// one page; its slot's offset is in [`A`] then, the page's tag in [`B`], and the address in the frame.
fn compare_page(e: &mut Emitter, access: Access) -> Jump {
    e.store(frame_field!(linear), A);
    e.alu(Alu::Add, true, B, A);
    e.alu_imm(Alu::And, true, B, -4096);
    e.shr(true, A, 12 - size_of::<Entry>().trailing_zeros() as u8);
    e.alu_mem(Alu::And, true, A, selected!(mask));
    e.alu_mem(Alu::Cmp, true, B, in_slot(A, access.tag()));
    e.jcc(cc::NOT_EQUAL)
}

/// As [`Frame::leave_soon`](crate::frame::Frame::leave_soon): the next block's head leaves. Clobbers [`B`].
fn leave_soon(e: &mut Emitter) {
    e.rm(true, &[0x83], 7, frame_field!(bank)); // cmp
    e.raw(&[0]);
    let banked = e.jcc(cc::NOT_EQUAL);
    e.mov_imm(B, BANK as u64);
    e.store(frame_field!(bank), B);
    e.rm(true, &[0x29], B, frame_field!(budget)); // sub
    e.bind(banked);
}

/// See [`Stubs::struck`].
fn struck(e: &mut Emitter) -> usize {
    let here = e.here();
    e.store32(frame_field!(struck), B);
    leave_soon(e);
    e.raw(&[0xc3]);
    here
}

/// Stores what lives in host registers. Vector registers aren't live afterwards and [`reload`] doesn't bring them back:
/// code that goes on with them calls [`Stubs::vectors_load`].
fn spill(e: &mut Emitter) {
    for n in 0..RESIDENT {
        if let Some(r) = home(n) {
            e.store(gpr(n), r);
        }
    }
    e.store32(frame_field!(flags), FLAGS);
    vector_file::emit_store(e);
}

fn reload(e: &mut Emitter) {
    for n in 0..RESIDENT {
        if let Some(r) = home(n) {
            e.load(r, gpr(n));
        }
    }
    e.load32(FLAGS, frame_field!(flags));
    e.load(TABLE, selected!(slots));
}

/// PUSH.
pub fn push(e: &mut Emitter, r: u8) {
    if r >= 8 {
        e.raw(&[0x41]);
    }
    e.raw(&[0x50 | r & 7]);
}

/// POP.
pub fn pop(e: &mut Emitter, r: u8) {
    if r >= 8 {
        e.raw(&[0x41]);
    }
    e.raw(&[0x58 | r & 7]);
}
