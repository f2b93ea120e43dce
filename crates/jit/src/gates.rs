//! INT n through a gate of 64-bit mode to ring 0, and IRETQ from there to 64-bit code, as far as nothing about them is
//! unusual.
//!
//! Descriptor tables, the TSS and the stack are read anew each time, through the table that implicit accesses go by. What
//! checking a descriptor comes to is [known](Gates) from the last time that the operation's function has done it, and holds
//! as long as the descriptor's bytes are the same.

use crate::emitter::{Alu, Emitter, Jump, Mem, cc};
use crate::frame::{self, frame_field, gpr};
use crate::memory_path::Access;
use crate::registers::{A, B, ENGINE, GUEST_RSP, RCX, RDI, RDX, RSI, Reg};
use crate::system_calls::{Ways, by_function, jump_if_any, set_status, unless_byte, unless_canonical, whole_flags};
use crate::views::{Selected, View, offset_of_view, supervisors_view};
use std::mem::offset_of;
use umbra_arch::rflags;
use umbra_arch::segment::{Seg, Segment};
use umbra_cpu::Core;
use umbra_cpu::loaded::Rules;
use umbra_mmu::Entry;

/// The code segment of handlers that are entered from one CPL.
#[derive(Clone, Copy)]
#[repr(C)]
struct Handler {
    /// As gates have it, for CPL 0; more than 16 bits: none is known.
    selector: u32,
    /// Its descriptor, and what that came to.
    raw: u64,
    segment: Segment,
}

/// The segments of a return from CPL 0.
#[derive(Clone, Copy)]
#[repr(C)]
struct Return {
    /// CS, and SS in the upper half.
    selectors: u32,
    /// The first and the last byte of their descriptors in the GDT, beyond any limit if none are known.
    first: u32,
    last: u32,
    /// Where they are from the first byte on. A null selector for SS has the place of CS.
    at: [u32; 2],
    raw: [u64; 2],
    segments: [Segment; 2],
}

/// Segments that INT n and IRETQ have loaded.
#[repr(C)]
pub struct Gates {
    /// By CPL: 0 and 3.
    handlers: [Handler; 2],
    /// By [`place`].
    returns: [Return; RETURNS],
    null_stack: Segment,
    /// The operation whose segments are to be known, once its function has done it: [`RETURN`], or [`HANDLER`] and the CPL.
    learn: u32,
    /// Scratch: the handler's RIP, the new RSP.
    rip: u64,
    rsp: u64,
}

const RETURNS: usize = 8;
const RETURN: u32 = 4;
const HANDLER: u32 = 8;

/// Where returns to a stack segment are known.
fn place(stack: u16) -> usize {
    usize::from(stack >> 3) % RETURNS
}

impl Gates {
    pub const fn new() -> Self {
        let null = Segment::null(0);
        let none = Return { selectors: 0, first: 0, last: u32::MAX, at: [0; 2], raw: [0; 2], segments: [null; 2] };
        Self {
            handlers: [Handler { selector: u32::MAX, raw: 0, segment: null }; 2],
            returns: [none; RETURNS],
            null_stack: Segment::null_stack(0),
            learn: 0,
            rip: 0,
            rsp: 0,
        }
    }

    /// After an operation that ended its block: INT n and IRETQ may have asked for what they load to be known.
    #[inline]
    pub fn look(&mut self, core: &Core) {
        if self.learn != 0 {
            self.know(core);
        }
    }

    #[cold]
    fn know(&mut self, core: &Core) {
        let what = std::mem::take(&mut self.learn);
        let [code, stack] = [Seg::Cs, Seg::Ss].map(|seg| core.s.segment(seg).selector);
        if what == RETURN {
            if let Some(known) = Return::of(core, code, stack) {
                self.returns[place(stack)] = known;
            }
        } else if let Some((raw, segment)) = core.known_segment(code & !3, Rules::Handler((what & 3) as u8))
            && !segment.attr.is_conforming()
            && segment.attr.dpl() == 0
        {
            let selector = (code & !3).into();
            self.handlers[(what & 1) as usize] = Handler { selector, raw, segment };
        }
    }
}

impl Return {
    fn of(core: &Core, code: u16, stack: u16) -> Option<Self> {
        let level = (code & 3) as u8;
        let (raw_code, code_segment) = core.known_segment(code, Rules::Return(0))?;
        let (raw_stack, stack_segment) = match stack {
            // From 64-bit mode to ring 0.
            0 => (raw_code, Segment::null_stack(0)),
            _ => core.known_segment(stack, Rules::Stack(level))?,
        };
        if !code_segment.attr.is_long() || !matches!(level, 0 | 3) || stack & !3 == 0 && (stack, level) != (0, 0) {
            return None;
        }
        let code_at = u32::from(code & !7);
        let stack_at = if stack == 0 { code_at } else { u32::from(stack & !7) };
        let first = code_at.min(stack_at);
        Some(Self {
            selectors: u32::from(stack) << 16 | u32::from(code),
            first,
            last: code_at.max(stack_at) + 7,
            at: [code_at - first, stack_at - first],
            raw: [raw_code, raw_stack],
            segments: [code_segment, stack_segment],
        })
    }
}

/// A field of the gates.
macro_rules! gates {
    ($($field:tt)+) => {{
        let start = frame_field!(gates);
        Mem { disp: start.disp + offset_of!(Gates, $($field)+) as i32, ..start }
    }};
}

/// What lives in the registers that are used besides [`A`] and [`B`].
const BORROWED: [Reg; 4] = [RCX, RDX, RSI, RDI];

fn borrow(e: &mut Emitter) {
    BORROWED.iter().for_each(|&r| e.store(gpr(r), r));
}

fn give_back(e: &mut Emitter) {
    BORROWED.iter().for_each(|&r| e.load(r, gpr(r)));
}

/// A table of the MMU: where what [selects](Selected) it is.
#[derive(Clone, Copy)]
struct Table(Mem);

impl Table {
    fn field(self, offset: usize) -> Mem {
        Mem { disp: self.0.disp + offset as i32, ..self.0 }
    }

    /// The linear address in [`A`] to the host's, if the bytes from there to `last` bytes on are in one page of the table.
    /// Clobbers [`B`] and RDX.
    fn find(self, e: &mut Emitter, last: Last, access: Access, slow: &mut Vec<Jump>) {
        let to_last = match last {
            Last::Constant(bytes) => Mem { base: Some(A), index: None, disp: bytes },
            Last::Register(r) => Mem { base: Some(A), index: Some((r, 0)), disp: 0 },
        };
        e.lea(B, to_last);
        e.alu_imm(Alu::And, true, B, -4096);
        e.mov(RDX, A);
        e.shr(true, RDX, 12 - size_of::<Entry>().trailing_zeros() as u8);
        e.alu_mem(Alu::And, true, RDX, self.field(offset_of!(Selected, mask)));
        e.alu_mem(Alu::Add, true, RDX, self.field(offset_of!(Selected, slots)));
        e.alu_mem(Alu::Cmp, true, B, Mem::at(RDX, access.tag()));
        slow.push(e.jcc(cc::NOT_EQUAL));
        e.alu_mem(Alu::Add, true, A, Mem::at(RDX, offset_of!(Entry, addend)));
    }
}

/// Where bytes end, from where they begin.
#[derive(Clone, Copy)]
enum Last {
    Constant(i32),
    Register(Reg),
}

/// Jumped to with the site of an INT n in the frame, its vector times 16 in [`A`] and the RIP behind it, from the code's
/// base, in [`B`].
pub fn emit_interrupt(e: &mut Emitter, ways: Ways) -> usize {
    let here = e.here();
    e.store(frame_field!(scratch), B);
    borrow(e);
    e.mov(RCX, A);
    let mut slow = vec![test_flags(e, rflags::AC)];
    // With RFLAGS.RF, which is pushed.
    now(e, A);
    e.alu_imm(Alu::Sub, true, A, 1);
    e.alu_mem(Alu::Cmp, true, A, frame_field!(resume));
    slow.push(e.jcc(cc::EQUAL));
    let table = supervisors_table(e, &mut slow);
    level(e, &mut slow);
    gate(e, table, &mut slow);
    descriptor(e, table, &mut slow);
    stack(e, table, &mut slow);
    push_frame(e);
    enter(e);
    give_back(e);
    e.rm(false, &[0x80], 7, frame::cpl()); // cmp byte
    e.raw(&[0]);
    let inner = e.jcc(cc::NOT_EQUAL);
    let entered = e.here();
    e.load(A, gates!(rip));
    e.jmp_to(ways.absolute);
    e.bind(inner);
    copy_segment(e, gates!(null_stack), Seg::Ss);
    e.rm(false, &[0xc6], 0, frame::cpl()); // mov byte
    e.raw(&[0]);
    supervisors_view(e);
    // It is known.
    e.call(ways.change);
    e.jmp_to(entered);
    slow.into_iter().for_each(|jump| e.bind(jump));
    give_back(e);
    zero_extended(e, A, 1, frame::cpl());
    e.alu_imm(Alu::Or, false, A, HANDLER as i32);
    e.store32(gates!(learn), A);
    by_function(e, Vec::new(), ways);
    here
}

/// Jumped to with the site of an IRETQ in the frame and the host address of what it takes off the stack in [`A`].
pub fn emit_return(e: &mut Emitter, ways: Ways) -> usize {
    let here = e.here();
    borrow(e);
    e.mov(RCX, A);
    let mut slow = vec![unless_byte(e, frame::cpl(), 0), unless_byte(e, frame::nmi_blocked(), 0)];
    slow.push(test_flags(e, rflags::AC | rflags::NT));
    flags_to_load(e, &mut slow);
    e.load(A, Mem::at(RCX, 0));
    slow.push(unless_canonical(e, A, B));
    segments_to_load(e, &mut slow);
    e.rm(false, &[0xf6], 0, Mem::at(RCX, 8)); // test byte
    e.raw(&[3]);
    let same = e.jcc(cc::EQUAL);
    // Data segments that the user may not have.
    zero_extended(e, A, 2, frame::selector(Seg::Es as usize));
    for seg in [Seg::Ds, Seg::Fs, Seg::Gs] {
        zero_extended(e, B, 2, frame::selector(seg as usize));
        e.alu(Alu::Or, false, A, B);
    }
    e.rr(false, &[0x85], A, A); // test
    slow.push(e.jcc(cc::NOT_EQUAL));
    e.load(RDX, gpr(RDX));
    e.mov_imm(B, offset_of_view(true, false, false) as u64);
    e.call(ways.change);
    slow.push(e.jcc(cc::NOT_EQUAL));
    e.bind(same);
    resume(e);
    e.load(A, frame_field!(new_flags));
    e.store(frame::rflags(), A);
    set_status(e);
    for (n, seg) in [Seg::Cs, Seg::Ss].into_iter().enumerate() {
        copy_segment(e, Mem::at(RSI, offset_of!(Return, segments) + n * size_of::<Segment>()), seg);
    }
    zero_extended(e, A, 1, Mem::at(RCX, 8));
    e.alu_imm(Alu::And, false, A, 3);
    e.rm(false, &[0x88], A, frame::cpl()); // mov byte
    e.load(GUEST_RSP, Mem::at(RCX, 24));
    e.load(A, Mem::at(RCX, 0));
    give_back(e);
    e.jmp_to(ways.absolute);
    slow.into_iter().for_each(|jump| e.bind(jump));
    give_back(e);
    e.store_imm32(gates!(learn), RETURN);
    by_function(e, Vec::new(), ways);
    here
}

/// The virtual time at the block's end, to a register.
fn now(e: &mut Emitter, to: Reg) {
    e.load(to, frame_field!(end));
    e.alu_mem(Alu::Sub, true, to, frame_field!(bank));
    e.alu_mem(Alu::Sub, true, to, frame_field!(budget));
}

/// Jumps if any of these are set in RFLAGS.
fn test_flags(e: &mut Emitter, bits: u64) -> Jump {
    e.rm(false, &[0xf7], 0, frame::rflags()); // test dword
    e.raw(&(bits as u32).to_le_bytes());
    e.jcc(cc::NOT_EQUAL)
}

/// One or two bytes to a register.
fn zero_extended(e: &mut Emitter, to: Reg, bytes: u8, from: Mem) {
    e.rm(false, &[0x0f, 0xb5 + bytes], to, from); // movzx
}

/// A segment register from where it is known. Clobbers [`A`].
fn copy_segment(e: &mut Emitter, from: Mem, seg: Seg) {
    let to = frame::segment(seg as usize);
    for at in (0..size_of::<Segment>() as i32).step_by(8) {
        e.load(A, Mem { disp: from.disp + at, ..from });
        e.store(Mem { disp: to.disp + at, ..to }, A);
    }
}

/// The table that implicit accesses go by, at RSI.
fn supervisors_table(e: &mut Emitter, slow: &mut Vec<Jump>) -> Table {
    let views = frame_field!(views);
    supervisors_view(e);
    e.alu_mem(Alu::Add, true, B, frame_field!(root_views));
    e.lea(RSI, Mem { base: Some(ENGINE), index: Some((B, 0)), disp: views.disp });
    e.load(A, frame_field!(epoch));
    e.alu_mem(Alu::Cmp, true, A, Mem::at(RSI, View::EPOCH));
    slow.push(e.jcc(cc::NOT_EQUAL));
    Table(Mem::at(RSI, View::SELECTED))
}

/// To RDI: what is known of handlers that are entered from the CPL in force.
fn level(e: &mut Emitter, slow: &mut Vec<Jump>) {
    zero_extended(e, A, 1, frame::cpl());
    e.rr(false, &[0x85], A, A); // test
    let supervisor = e.jcc(cc::EQUAL);
    e.alu_imm(Alu::Cmp, false, A, 3);
    slow.push(e.jcc(cc::NOT_EQUAL));
    e.mov_imm32(A, size_of::<Handler>() as u32);
    e.bind(supervisor);
    let handlers = gates!(handlers);
    e.lea(RDI, Mem { base: Some(ENGINE), index: Some((A, 0)), disp: handlers.disp });
}

/// The gate of the vector times 16 in RCX: the handler's RIP to the gates' scratch, 1 to RCX if it is a trap gate.
fn gate(e: &mut Emitter, table: Table, slow: &mut Vec<Jump>) {
    let idtr = frame::idtr();
    e.lea(A, Mem::at(RCX, 15));
    zero_extended(e, B, 2, frame::table_limit(idtr));
    e.alu(Alu::Cmp, false, B, A);
    slow.push(e.jcc(cc::BELOW));
    e.load(A, frame::table_base(idtr));
    e.alu(Alu::Add, true, A, RCX);
    table.find(e, Last::Constant(15), Access::Read, slow);
    // An interrupt stack.
    e.rm(false, &[0xf6], 0, Mem::at(A, 4)); // test byte
    e.raw(&[7]);
    slow.push(e.jcc(cc::NOT_EQUAL));
    // Present, an interrupt or a trap gate.
    zero_extended(e, RCX, 1, Mem::at(A, 5));
    e.mov32(B, RCX);
    e.alu_imm(Alu::And, false, B, 0x9e);
    e.alu_imm(Alu::Cmp, false, B, 0x8e);
    slow.push(e.jcc(cc::NOT_EQUAL));
    e.mov32(B, RCX);
    e.shr(false, B, 5);
    e.alu_imm(Alu::And, false, B, 3);
    e.rm(false, &[0x3a], B, frame::cpl()); // cmp byte
    slow.push(e.jcc(cc::BELOW));
    e.alu_imm(Alu::And, false, RCX, 1);
    zero_extended(e, B, 2, Mem::at(A, 2));
    e.alu_mem(Alu::Cmp, false, B, Mem::at(RDI, offset_of!(Handler, selector)));
    slow.push(e.jcc(cc::NOT_EQUAL));
    zero_extended(e, B, 2, Mem::at(A, 6));
    e.shl(false, B, 16);
    zero_extended(e, RDX, 2, Mem::at(A, 0));
    e.alu(Alu::Or, false, B, RDX);
    e.load32(A, Mem::at(A, 8));
    e.shl(true, A, 32);
    e.alu(Alu::Or, true, B, A);
    slow.push(unless_canonical(e, B, A));
    e.store(gates!(rip), B);
}

/// Whether the handler's descriptor is the one that is known at RDI.
fn descriptor(e: &mut Emitter, table: Table, slow: &mut Vec<Jump>) {
    let gdtr = frame::gdtr();
    e.load32(A, Mem::at(RDI, offset_of!(Handler, selector)));
    e.lea(B, Mem::at(A, 7));
    zero_extended(e, RDX, 2, frame::table_limit(gdtr));
    e.alu(Alu::Cmp, false, RDX, B);
    slow.push(e.jcc(cc::BELOW));
    e.alu_mem(Alu::Add, true, A, frame::table_base(gdtr));
    table.find(e, Last::Constant(7), Access::Read, slow);
    e.load(B, Mem::at(A, 0));
    e.alu_mem(Alu::Cmp, true, B, Mem::at(RDI, offset_of!(Handler, raw)));
    slow.push(e.jcc(cc::NOT_EQUAL));
}

/// Bytes that INT n pushes.
const FRAME: i32 = 40;

/// The new RSP to the gates' scratch, its host address to [`A`].
fn stack(e: &mut Emitter, table: Table, slow: &mut Vec<Jump>) {
    const RSP0: i32 = 4;
    e.mov(A, GUEST_RSP);
    e.rm(false, &[0x80], 7, frame::cpl()); // cmp byte
    e.raw(&[0]);
    let same = e.jcc(cc::EQUAL);
    let tr = Seg::Tr as usize;
    e.load32(A, frame::segment_limit(tr));
    e.alu_imm(Alu::Cmp, false, A, RSP0 + 7);
    slow.push(e.jcc(cc::BELOW));
    e.load(A, frame::segment_base(tr));
    e.alu_imm(Alu::Add, true, A, RSP0);
    table.find(e, Last::Constant(7), Access::Read, slow);
    e.load(A, Mem::at(A, 0));
    e.bind(same);
    e.alu_imm(Alu::And, true, A, -16);
    e.alu_imm(Alu::Sub, true, A, FRAME);
    e.store(gates!(rsp), A);
    table.find(e, Last::Constant(FRAME - 1), Access::Write, slow);
}

/// Pushes at the host address [`A`]: SS, RSP, RFLAGS, CS, RIP, the last one lowest. Clobbers [`B`] and RDX.
fn push_frame(e: &mut Emitter) {
    e.load(B, frame_field!(scratch));
    e.alu_mem(Alu::Add, true, B, frame::code_base());
    e.store(Mem::at(A, 0), B);
    for (at, seg) in [(8, Seg::Cs), (32, Seg::Ss)] {
        zero_extended(e, B, 2, frame::selector(seg as usize));
        e.store(Mem::at(A, at), B);
    }
    whole_flags(e, B, RDX);
    e.store(Mem::at(A, 16), B);
    e.store(Mem::at(A, 24), GUEST_RSP);
}

/// RSP, CS and RFLAGS as in the handler; RCX is 1 if its gate leaves IF alone.
fn enter(e: &mut Emitter) {
    let clear = (rflags::TF | rflags::NT | rflags::RF | rflags::VM) as i32;
    e.load(GUEST_RSP, gates!(rsp));
    copy_segment(e, Mem::at(RDI, offset_of!(Handler, segment)), Seg::Cs);
    e.shl(false, RCX, rflags::IF.trailing_zeros() as u8);
    e.alu_imm(Alu::Or, true, RCX, !(clear | rflags::IF as i32));
    e.load(A, frame::rflags());
    e.alu(Alu::And, true, A, RCX);
    e.store(frame::rflags(), A);
}

/// RFLAGS that IRETQ loads in ring 0 to the frame's scratch, with RF.
fn flags_to_load(e: &mut Emitter, slow: &mut Vec<Jump>) {
    e.load(B, Mem::at(RCX, 16));
    slow.push(jump_if_any(e, B, rflags::TF | rflags::NT | rflags::AC));
    e.alu_imm(Alu::And, true, B, (rflags::WRITABLE & !rflags::VM) as i32);
    e.alu_imm(Alu::Or, true, B, rflags::FIXED as i32);
    e.store(frame_field!(new_flags), B);
    // An interrupt that waits is taken when IF becomes set.
    e.alu_imm(Alu::And, false, B, rflags::IF as i32);
    let clear = e.jcc(cc::EQUAL);
    slow.push(unless_byte(e, frame_field!(interrupt), 0));
    e.bind(clear);
}

/// To RSI: what is known of the segments that the frame at RCX names.
fn segments_to_load(e: &mut Emitter, slow: &mut Vec<Jump>) {
    let (returns, gdtr) = (gates!(returns), frame::gdtr());
    zero_extended(e, A, 2, Mem::at(RCX, 32));
    e.mov32(B, A);
    e.shr(false, B, 3);
    e.alu_imm(Alu::And, false, B, RETURNS as i32 - 1);
    e.rr(true, &[0x69], B, B); // imul
    e.raw(&(size_of::<Return>() as u32).to_le_bytes());
    e.lea(RSI, Mem { base: Some(ENGINE), index: Some((B, 0)), disp: returns.disp });
    e.shl(false, A, 16);
    zero_extended(e, B, 2, Mem::at(RCX, 8));
    e.alu(Alu::Or, false, A, B);
    let known = |offset: usize| Mem::at(RSI, offset);
    e.alu_mem(Alu::Cmp, false, A, known(offset_of!(Return, selectors)));
    slow.push(e.jcc(cc::NOT_EQUAL));
    e.load32(RDI, known(offset_of!(Return, last)));
    zero_extended(e, B, 2, frame::table_limit(gdtr));
    e.alu(Alu::Cmp, false, B, RDI);
    slow.push(e.jcc(cc::BELOW));
    e.load32(A, known(offset_of!(Return, first)));
    e.alu(Alu::Sub, false, RDI, A);
    e.alu_mem(Alu::Add, true, A, frame::table_base(gdtr));
    Table(frame_field!(selected)).find(e, Last::Register(RDI), Access::Read, slow);
    for n in 0..2 {
        e.load32(B, known(offset_of!(Return, at) + 4 * n));
        e.load(B, Mem { base: Some(A), index: Some((B, 0)), disp: 0 });
        e.alu_mem(Alu::Cmp, true, B, known(offset_of!(Return, raw) + 8 * n));
        slow.push(e.jcc(cc::NOT_EQUAL));
    }
}

/// RFLAGS.RF of the frame's scratch, if set, is for the next instruction.
fn resume(e: &mut Emitter) {
    e.rm(false, &[0xf7], 0, frame_field!(new_flags)); // test dword
    e.raw(&(rflags::RF as u32).to_le_bytes());
    let clear = e.jcc(cc::EQUAL);
    now(e, A);
    e.store(frame_field!(resume), A);
    e.load(A, frame_field!(new_flags));
    e.alu_imm(Alu::And, true, A, !(rflags::RF as i32));
    e.store(frame_field!(new_flags), A);
    e.bind(clear);
}
