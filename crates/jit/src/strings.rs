//! MOVS and STOS with REP. What lies in the MMU's table is moved by the host's own instruction, in the chunks that the
//! operation's function makes and at the same cost; the function does what is left.

use crate::emitter::{Alu, Emitter, Jump, Mem, cc};
use crate::frame::{self, frame_field};
use crate::memory_path::{Access, in_slot, to_slot};
use crate::registers::{A, B, ENGINE, FLAGS, GUEST_RAX, RBX, RCX, RDI, RDX, RSI, Reg};
use crate::stubs::{pop, push};
use crate::translate::Translator;
use iced_x86::{Instruction, Mnemonic as M};
use std::fmt;
use std::mem::offset_of;
use umbra_arch::PAGE_SIZE;
use umbra_arch::segment::Seg;
use umbra_cpu::isa::string::BYTES_A_TICK;
use umbra_cpu::op::Op;
use umbra_mmu::Entry;

/// MOVS or STOS with REP.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Repeated {
    /// MOVS.
    moves: bool,
    /// Log2 of an element's bytes.
    size: u8,
}

/// The stubs, those of STOS first, by size.
pub type RepeatedStubs = [[usize; 4]; 2];

impl Repeated {
    /// All of them.
    const ALL: [[Self; 4]; 2] = [
        [Self::stos(0), Self::stos(1), Self::stos(2), Self::stos(3)],
        [Self::movs(0), Self::movs(1), Self::movs(2), Self::movs(3)],
    ];

    const fn movs(size: u8) -> Self {
        Self { moves: true, size }
    }

    const fn stos(size: u8) -> Self {
        Self { moves: false, size }
    }

    /// Which one `i` is, without a segment's base or addresses narrower than its code's.
    pub fn of(i: &Instruction, op: &Op) -> Option<Self> {
        let mask = if op.legacy { 0xffff_ffff } else { u64::MAX };
        if !i.is_string_instruction() || !(i.has_rep_prefix() || i.has_repne_prefix()) || op.ea_mask != mask {
            return None;
        }
        let found = match i.mnemonic() {
            M::Movsb => Self::movs(0),
            M::Movsw => Self::movs(1),
            M::Movsd => Self::movs(2),
            M::Movsq => Self::movs(3),
            M::Stosb => Self::stos(0),
            M::Stosw => Self::stos(1),
            M::Stosd => Self::stos(2),
            M::Stosq => Self::stos(3),
            _ => return None,
        };
        let has_base = op.seg == Seg::Fs as u8 || op.seg == Seg::Gs as u8 || op.legacy && op.seg == Seg::Cs as u8;
        (!found.moves || !has_base).then_some(found)
    }

    fn name(self) -> String {
        format!("rep_{}{}", if self.moves { "movs" } else { "stos" }, ['b', 'w', 'd', 'q'][usize::from(self.size)])
    }

    /// Its stub's place.
    pub fn stub(self, stubs: &RepeatedStubs) -> usize {
        stubs[usize::from(self.moves)][usize::from(self.size)]
    }
}

impl fmt::Debug for Repeated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

/// The stubs by name.
pub fn names(stubs: &RepeatedStubs) -> Vec<(usize, String)> {
    Repeated::ALL.iter().flatten().map(|which| (which.stub(stubs), which.name())).collect()
}

impl Translator<'_> {
    /// MOVS or STOS with REP. Its slow path is open.
    pub fn repeated(&mut self, which: Repeated) {
        self.host_flags = false;
        if self.narrow {
            self.only_below_4_gib(which);
        }
        self.e.call(which.stub(&self.stubs.repeated));
        let left = self.e.jcc(cc::NOT_EQUAL);
        self.slow(left);
    }
}

impl Translator<'_> {
    /// The function does what wraps, and where registers have upper halves.
    fn only_below_4_gib(&mut self, which: Repeated) {
        let pointers = if which.moves { &[RDI, RSI][..] } else { &[RDI] };
        self.e.mov(A, RCX);
        for &pointer in pointers {
            self.e.alu(Alu::Or, true, A, pointer);
            self.e.lea(B, Mem { base: Some(pointer), index: Some((RCX, which.size)), disp: 0 });
            self.e.alu(Alu::Or, true, A, B);
        }
        self.e.shr(true, A, 32);
        let beyond = self.e.jcc(cc::NOT_EQUAL);
        self.slow(beyond);
    }
}

/// See [`Stubs::repeated`](crate::stubs::Stubs::repeated).
pub fn emit(e: &mut Emitter) -> RepeatedStubs {
    Repeated::ALL.map(|some| some.map(|which| stub(e, which)))
}

/// Saved and used besides the scratch registers: the guest's flags and two of its registers.
const SAVED: [Reg; 3] = [FLAGS, RDX, RBX];
/// What to add to a linear address of the destination.
const TARGET: Reg = RDX;
/// Likewise of the source.
const SOURCE: Reg = RBX;

/// DF in the second byte of RFLAGS.
const DF: u8 = 4;

fn stub(e: &mut Emitter, which: Repeated) -> usize {
    let here = e.here();
    SAVED.iter().for_each(|&r| push(e, r));
    e.rr(true, &[0x85], RCX, RCX); // test
    let nothing = e.jcc(cc::EQUAL);
    let flags = frame::rflags();
    e.rm(false, &[0xf6], 0, Mem { disp: flags.disp + 1, ..flags }); // test byte
    e.raw(&[DF]);
    let down = e.jcc(cc::NOT_EQUAL);
    let next = e.here();
    let mut by_function = room(e, which);
    by_function.push(find(e, RDI, Access::Write, TARGET));
    if which.moves {
        by_function.push(find(e, RSI, Access::Read, SOURCE));
    }
    charge(e);
    let close = if which.moves { moves(e, which) } else { stores(e, which) };
    let more = e.jcc(cc::NOT_EQUAL);
    e.point(more, next);
    // ZF says how it went, whichever way led here.
    e.bind(nothing);
    e.bind(down);
    let restored = e.here();
    SAVED.iter().rev().for_each(|&r| pop(e, r));
    e.raw(&[0xc3]);
    by_function.into_iter().for_each(|jump| e.bind(jump));
    e.rr(true, &[0x85], ENGINE, ENGINE);
    e.jmp_to(restored);
    if let Some(close) = close {
        close.emit(e, which);
    }
    here
}

/// The next chunk's elements to [`B`]: as many as RCX says and the pages have room for. What it takes from the budget to
/// [`A`]: its ticks without the one that the block's head has charged, unless the instruction starts again. The jumps are
/// taken where there is no room for an element, or not all of the block's rest would be in time afterwards.
fn room(e: &mut Emitter, which: Repeated) -> Vec<Jump> {
    offset(e, A, RDI);
    if which.moves {
        offset(e, B, RSI);
        e.alu(Alu::Cmp, false, A, B);
        e.rr(false, &[0x0f, 0x40 | cc::BELOW], A, B); // cmovb
    }
    e.mov_imm(B, PAGE_SIZE);
    e.alu(Alu::Sub, false, B, A);
    if which.size > 0 {
        e.shr(false, B, which.size);
    }
    e.alu(Alu::Cmp, true, RCX, B);
    e.rr(true, &[0x0f, 0x40 | cc::BELOW], B, RCX); // cmovb
    e.rr(false, &[0x85], B, B); // test
    let crosses = e.jcc(cc::EQUAL);
    e.lea(A, Mem { base: None, index: Some((B, which.size)), disp: BYTES_A_TICK as i32 - 1 });
    e.shr(true, A, BYTES_A_TICK.trailing_zeros() as u8);
    e.alu(Alu::Cmp, true, B, RCX);
    e.rr(true, &[0x83], 2, A); // adc
    e.raw(&[0xff]);
    e.rm(true, &[0x39], A, frame_field!(budget)); // cmp
    let late = e.jcc(cc::LESS);
    vec![crosses, late]
}

/// Where in its page an address is.
fn offset(e: &mut Emitter, to: Reg, address: Reg) {
    e.mov32(to, address);
    e.alu_imm(Alu::And, false, to, PAGE_SIZE as i32 - 1);
}

/// What to add to a linear address in the page at `address` to `to`, by the MMU's table; the jump is taken if that
/// doesn't have it. Clobbers [`FLAGS`].
fn find(e: &mut Emitter, address: Reg, access: Access, to: Reg) -> Jump {
    to_slot(e, FLAGS, address);
    e.mov(to, address);
    e.alu_imm(Alu::And, true, to, -(PAGE_SIZE as i32));
    e.alu_mem(Alu::Cmp, true, to, in_slot(FLAGS, access.tag()));
    let missed = e.jcc(cc::NOT_EQUAL);
    e.load(to, in_slot(FLAGS, offset_of!(Entry, addend)));
    missed
}

/// Takes what [`room`] found from the budget. An instruction that starts again retires each time.
fn charge(e: &mut Emitter) {
    e.rm(true, &[0x29], A, frame_field!(budget)); // sub
    e.alu(Alu::Cmp, true, B, RCX);
    e.rr(true, &[0x83], 3, A); // sbb
    e.raw(&[0]);
    e.rm(true, &[0x01], A, frame_field!(extra)); // add
}

/// Stores a chunk; ZF clear if there are more.
fn stores(e: &mut Emitter, which: Repeated) -> Option<Close> {
    // RBX isn't needed for a source.
    e.mov(RBX, RCX);
    e.alu(Alu::Sub, true, RBX, B);
    e.mov(RCX, B);
    e.mov(FLAGS, GUEST_RAX);
    e.alu(Alu::Add, true, RDI, TARGET);
    repeat(e, 0xaa, which.size);
    e.alu(Alu::Sub, true, RDI, TARGET);
    e.mov(RCX, RBX);
    e.rr(true, &[0x85], RCX, RCX); // test
    None
}

/// Moves a chunk; ZF clear if there are more.
fn moves(e: &mut Emitter, which: Repeated) -> Option<Close> {
    e.mov(FLAGS, RCX);
    e.alu(Alu::Sub, true, FLAGS, B);
    e.mov(RCX, B);
    e.alu(Alu::Add, true, RDI, TARGET);
    e.alu(Alu::Add, true, RSI, SOURCE);
    e.mov(A, RDI);
    e.alu(Alu::Sub, true, A, RSI);
    e.lea(B, Mem { base: Some(A), index: None, disp: -1 });
    e.alu_imm(Alu::And, false, B, PAGE_SIZE as i32 - 1);
    e.alu_imm(Alu::Cmp, false, B, CLOSE - 1);
    let close = e.jcc(cc::BELOW);
    let plain = e.here();
    repeat(e, 0xa4, which.size);
    let moved = e.here();
    e.alu(Alu::Sub, true, RDI, TARGET);
    e.alu(Alu::Sub, true, RSI, SOURCE);
    e.mov(RCX, FLAGS);
    e.rr(true, &[0x85], RCX, RCX); // test
    Some(Close { close, plain, moved })
}

/// `rep movs` or `rep stos`, by the opcode for bytes.
fn repeat(e: &mut Emitter, opcode: u8, size: u8) {
    match size {
        0 => e.raw(&[0xf3, opcode]),
        1 => e.raw(&[0x66, 0xf3, opcode | 1]),
        2 => e.raw(&[0xf3, opcode | 1]),
        _ => e.raw(&[0xf3, 0x48, opcode | 1]),
    }
}

/// A destination so many bytes behind the source or less, in different pages as well, takes the host's `rep movs` thirty
/// times as long or three times as long.
const CLOSE: i32 = 32;
/// Bytes that are moved at once there. What really overlaps by less is the host's instruction's again.
const VECTOR: i32 = 16;

/// Moving a chunk where the operands are [`CLOSE`].
struct Close {
    close: Jump,
    /// The host's instruction for the chunk, and what follows it.
    plain: usize,
    moved: usize,
}

impl Close {
    fn emit(self, e: &mut Emitter, which: Repeated) {
        e.bind(self.close);
        e.alu_imm(Alu::Cmp, true, A, VECTOR);
        let overlap = e.jcc(cc::BELOW);
        e.point(overlap, self.plain);
        if which.size > 0 {
            e.shl(false, RCX, which.size);
        }
        e.rm(false, &[0x0f, 0x11], 0, frame_field!(image)); // movups
        e.alu_imm(Alu::Sub, false, RCX, VECTOR);
        let short = e.jcc(cc::BELOW);
        let round = e.here();
        e.rm(false, &[0x0f, 0x10], 0, Mem::at(RSI, 0)); // movups
        e.rm(false, &[0x0f, 0x11], 0, Mem::at(RDI, 0)); // movups
        pass(e, VECTOR);
        e.alu_imm(Alu::Sub, false, RCX, VECTOR);
        let whole = e.jcc(cc::NOT_BELOW);
        e.point(whole, round);
        e.bind(short);
        e.rm(false, &[0x0f, 0x10], 0, frame_field!(image)); // movups
        for size in (which.size..4).rev() {
            e.rr(false, &[0xf6], 0, RCX); // test cl
            e.raw(&[1 << size]);
            let none = e.jcc(cc::EQUAL);
            part(e, size);
            pass(e, 1 << size);
            e.bind(none);
        }
        e.jmp_to(self.moved);
    }
}

/// Moves 1 to 8 bytes.
fn part(e: &mut Emitter, size: u8) {
    let (load, store): (&[u8], &[u8]) = match size {
        0 => (&[0x0f, 0xb6], &[0x88]),
        1 => (&[0x0f, 0xb7], &[0x89]),
        _ => (&[0x8b], &[0x89]),
    };
    e.rm(size == 3, load, A, Mem::at(RSI, 0));
    if size == 1 {
        e.raw(&[0x66]);
    }
    e.rm(size == 3, store, A, Mem::at(RDI, 0));
}

fn pass(e: &mut Emitter, bytes: i32) {
    e.alu_imm(Alu::Add, true, RSI, bytes);
    e.alu_imm(Alu::Add, true, RDI, bytes);
}
