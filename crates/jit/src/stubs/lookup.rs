//! How generated code finds the translation of a RIP: the jump table of the context, else the place in RAM that the RIP's
//! page is fetched from.

use super::pop;
use crate::contexts::Half;
use crate::emitter::{Alu, Emitter, Jump, Mem, cc};
use crate::frame::{code_base, code_mode, context, frame_field, jumps, next_rip, selected};
use crate::jumps::{FETCHES, FOLD, Fetch, NARROW_AT, OTHER, PAIR_SHIFT, PLACES, Place, SLOT_MASK, SPREAD, Slot};
use crate::memory_path::{in_slot, to_slot};
use crate::registers::{A, B};
use std::mem::offset_of;
use umbra_cpu::core::{CODE_SIZE_AT, FLAT};
use umbra_mmu::Entry;

/// The upper half of a code mode of 64-bit code.
const MODE_64: u32 = 64 << (CODE_SIZE_AT - 32);
/// Likewise of 32-bit code in flat segments.
const MODE_NARROW: u32 = 32 << (CODE_SIZE_AT - 32) | (FLAT >> 32) as u32;

/// The jump table's slot of the RIP in [`A`]: its address to [`B`].
fn slot(e: &mut Emitter, half: Half) {
    const _: () = assert!(SPREAD == 9);
    e.lea(B, Mem { base: Some(A), index: Some((A, 3)), disp: 0 });
    e.alu_imm(Alu::And, false, B, SLOT_MASK as i32);
    e.alu_mem(Alu::Add, true, B, jumps(half));
}

/// See [`Stubs::find`](super::Stubs::find); the second place doesn't look at the pair's other slot.
pub(super) fn find(e: &mut Emitter) -> (usize, usize) {
    let here = e.here();
    e.alu_imm(Alu::Xor, true, B, OTHER);
    e.alu_mem(Alu::Cmp, true, A, Mem::at(B, offset_of!(Slot, rip)));
    let other = e.jcc(cc::NOT_EQUAL);
    e.raw(&[0xc3]);
    e.bind(other);
    let by_place = e.here();
    e.store(next_rip(), A);
    let upper_mode = Mem { disp: code_mode().disp + 4, ..code_mode() };
    e.cmp_mem_imm(upper_mode, MODE_64);
    let not_64 = e.jcc(cc::NOT_EQUAL);
    e.mov(B, A);
    e.shr(true, B, 32);
    let edges = frame_field!(edges);
    let at_edge = [edges, Mem { disp: edges.disp + 4, ..edges }].map(|edge| {
        e.alu_mem(Alu::Cmp, false, B, edge);
        e.jcc(cc::EQUAL)
    });
    let mut unknown = Vec::new();
    by_half(e, |e, half| {
        unknown.extend(find_in(e, half, false));
        e.raw(&[0xc3]);
    });
    e.bind(not_64);
    e.cmp_mem_imm(upper_mode, MODE_NARROW);
    unknown.push(e.jcc(cc::NOT_EQUAL));
    unknown.extend(find_in(e, Half::Lower, true));
    e.raw(&[0xc3]);
    at_edge.into_iter().for_each(|jump| e.bind(jump));
    e.alu(Alu::Or, false, B, B);
    unknown.into_iter().for_each(|jump| e.bind(jump));
    e.raw(&[0xc3]);
    (here, by_place)
}

/// The RIP in [`A`], which is that in the core, by its place: ZF set and the jump table's slot at [`B`]; or one of the
/// jumps is taken, with ZF clear.
fn find_in(e: &mut Emitter, half: Half, narrow: bool) -> Vec<Jump> {
    let unmapped = match half {
        Half::Lower => find_page(e),
        Half::Upper => find_upper_page(e),
    };
    if narrow {
        e.rr(true, &[0x0f, 0xba], 5, A); // bts
        e.raw(&[NARROW_AT]);
    }
    // The translation of what is there.
    e.mov(B, A);
    e.shr(true, B, FOLD);
    e.alu(Alu::Xor, false, B, A);
    e.alu_imm(Alu::And, false, B, PLACES as i32 - 1);
    e.shl(false, B, PAIR_SHIFT);
    e.alu_mem(Alu::Add, true, B, frame_field!(places));
    e.alu_mem(Alu::Cmp, true, A, Mem::at(B, offset_of!(Place, offset)));
    let first = e.jcc(cc::EQUAL);
    e.lea(B, Mem::at(B, size_of::<Place>()));
    e.alu_mem(Alu::Cmp, true, A, Mem::at(B, offset_of!(Place, offset)));
    let unknown = e.jcc(cc::NOT_EQUAL);
    e.bind(first);
    e.load(A, Mem::at(B, offset_of!(Place, code)));
    e.store(frame_field!(found), A);
    // The jump table knows it from now on.
    e.load(A, next_rip());
    slot(e, half);
    e.cmp_mem_imm(Mem::at(B, offset_of!(Slot, code)), 0);
    let empty = e.jcc(cc::EQUAL);
    for field in [offset_of!(Slot, rip), offset_of!(Slot, code)] {
        e.load(A, Mem::at(B, field));
        e.alu_imm(Alu::Xor, true, B, OTHER);
        e.store(Mem::at(B, field), A);
        e.alu_imm(Alu::Xor, true, B, OTHER);
    }
    e.bind(empty);
    e.load(A, frame_field!(found));
    e.store(Mem::at(B, offset_of!(Slot, code)), A);
    e.load(A, next_rip());
    e.store(Mem::at(B, offset_of!(Slot, rip)), A);
    e.alu(Alu::Cmp, false, A, A);
    unmapped.into_iter().chain([unknown]).collect()
}

/// The RAM offset of the RIP in [`A`], which is that in the core, to [`A`], if the MMU's table says where it is fetched
/// from.
fn find_page(e: &mut Emitter) -> Vec<Jump> {
    to_slot(e, B, A);
    e.alu_mem(Alu::Sub, true, A, in_slot(B, offset_of!(Entry, tag_fetch)));
    e.alu_imm(Alu::Cmp, true, A, 4096);
    let other = e.jcc(cc::NOT_BELOW);
    e.load(A, next_rip());
    e.alu_mem(Alu::Add, true, A, in_slot(B, offset_of!(Entry, addend)));
    e.alu_mem(Alu::Sub, true, A, frame_field!(ram));
    e.alu_mem(Alu::Add, true, A, selected!(place_salt));
    vec![other]
}

/// Likewise if [`Fetches`](crate::jumps::Fetches) says it.
fn find_upper_page(e: &mut Emitter) -> Vec<Jump> {
    e.mov(B, A);
    e.shr(true, B, 12);
    e.alu_mem(Alu::Xor, false, B, selected!(upper_salt));
    e.alu_imm(Alu::And, false, B, FETCHES as i32 - 1);
    e.shl(false, B, size_of::<Fetch>().trailing_zeros() as u8);
    e.alu_mem(Alu::Add, true, B, frame_field!(fetches));
    e.alu_imm(Alu::And, true, A, -4096);
    e.alu_mem(Alu::Cmp, true, A, Mem::at(B, offset_of!(Fetch, page)));
    let other_page = e.jcc(cc::NOT_EQUAL);
    e.load32(A, context(Half::Upper));
    e.alu_mem(Alu::Cmp, true, A, Mem::at(B, offset_of!(Fetch, context)));
    let other_context = e.jcc(cc::NOT_EQUAL);
    e.load(A, next_rip());
    e.alu_mem(Alu::Add, true, A, Mem::at(B, offset_of!(Fetch, addend)));
    vec![other_page, other_context]
}

/// Code for the RIP in [`A`] by its half; it doesn't come to its end.
fn by_half(e: &mut Emitter, mut emit: impl FnMut(&mut Emitter, Half)) {
    e.rr(true, &[0x85], A, A); // test
    let upper = e.jcc(cc::SIGN);
    emit(e, Half::Lower);
    e.bind(upper);
    emit(e, Half::Upper);
}

/// Compares the jump table's slot of the RIP in [`A`], whose address goes to [`B`]; jumps if it is another one's, as that of
/// a RIP of the other half always is.
pub fn compare_slot(e: &mut Emitter, half: Half) -> Jump {
    slot(e, half);
    e.alu_mem(Alu::Cmp, true, A, Mem::at(B, offset_of!(Slot, rip)));
    e.jcc(cc::NOT_EQUAL)
}

/// Goes to the translation of the RIP in [`A`], whose slot is at [`B`].
pub fn go(e: &mut Emitter) {
    take_base(e);
    e.jmp_mem(Mem::at(B, offset_of!(Slot, code)));
}

/// RIPs count from the page of the one in [`A`].
pub fn take_base(e: &mut Emitter) {
    e.alu_imm(Alu::And, true, A, -4096);
    e.store(code_base(), A);
}

/// What follows [`compare_slot`] where that jumped: leaves if there is no translation.
fn search(e: &mut Emitter, unknown: Jump, find: usize, miss: usize) {
    e.bind(unknown);
    e.call(find);
    let nothing = e.jcc(cc::NOT_EQUAL);
    e.point(nothing, miss);
}

/// See [`Stubs::lookup`](super::Stubs::lookup), for RIPs of 64 and of 32 bits; `absolute` comes with the RIP itself, to the
/// last place.
pub(super) fn lookup(e: &mut Emitter, find: usize, miss: usize, absolute: Jump) -> ([usize; 2], usize) {
    let narrow = e.here();
    e.alu_mem(Alu::Add, false, A, code_base());
    let added = e.jmp();
    let here = e.here();
    e.alu_mem(Alu::Add, true, A, code_base());
    let at_absolute = e.here();
    e.bind(added);
    e.bind(absolute);
    by_half(e, |e, half| {
        let unknown = compare_slot(e, half);
        go(e);
        search(e, unknown, find, miss);
        go(e);
    });
    ([here, narrow], at_absolute)
}

/// See [`Stubs::other`](super::Stubs::other).
pub(super) fn other(e: &mut Emitter, lookup: usize, link: usize) -> usize {
    let here = e.here();
    e.rm(false, &[0xff], 1, frame_field!(relink)); // dec
    let stays = e.jcc(cc::NOT_EQUAL);
    e.point(stays, lookup);
    e.mov(A, B);
    e.jmp_to(link);
    here
}

/// Slots may still lead to the dropped translation, and to what has become a jump to it: its place alone says what there is
/// now. The second place is for RIPs that don't count from a page.
pub(super) fn elsewhere(e: &mut Emitter, by_place: usize, miss: usize) -> (usize, usize) {
    let legacy = e.here();
    e.store_imm(code_base(), 0);
    let here = e.here();
    pop(e, B);
    e.alu_mem(Alu::Add, true, A, code_base());
    e.call(by_place);
    let nothing = e.jcc(cc::NOT_EQUAL);
    e.point(nothing, miss);
    go(e);
    (here, legacy)
}
