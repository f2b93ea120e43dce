//! How a block is left: exits and their links.

use super::{End, Translator};
use crate::emitter::{Alu, Emitter, Jump, Mem, cc};
use crate::frame::{code_base, context};
use crate::registers::{A, B};
use crate::stubs::Stubs;

/// Bytes of [`dropped_code`], the least size of a block's code.
pub const LOOKUP_BYTES: usize = 15;
/// Bytes of [`other_code`], the size of an exit without a link.
const UNLINKED_BYTES: usize = LOOKUP_BYTES + 6;

/// A direct exit of a translation. All places are offsets in the code memory. Small: there are several for each block.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    /// RIP that it goes to, from where RIPs count.
    pub target: u64,
    /// Displacement of its jump.
    pub jump: u32,
    /// If it leaves the page.
    pub guard: Option<Guard>,
    /// Its code as long as it isn't linked, or for other contexts: [`UNLINKED_BYTES`].
    pub unlinked: u32,
}

/// What an exit that leaves its page holds for.
#[derive(Clone, Copy, Debug)]
pub struct Guard {
    /// Context number, 32 bits.
    pub context: u32,
    /// Where its own page is mapped, 64 bits.
    pub base: u32,
}

/// Code of an exit, by its number, to `rip` where its guard fails; RIPs there have so many `bits`.
pub fn other_code(at: usize, number: u32, rip: u64, bits: u32, stubs: &Stubs) -> Vec<u8> {
    let mut e = Emitter::new(at);
    e.mov_imm64(A, rip);
    e.mov_imm32(B, number);
    e.jmp_to(if bits == 64 { stubs.other } else { stubs.other_narrow });
    e.bytes
}

/// What a dropped translation of `rip` becomes, which may count from its page: always [`LOOKUP_BYTES`].
pub fn dropped_code(at: usize, rip: u64, is_relative: bool, stubs: &Stubs) -> Vec<u8> {
    let mut e = Emitter::new(at);
    e.mov_imm64(A, rip);
    e.call(if is_relative { stubs.elsewhere } else { stubs.elsewhere_legacy });
    e.bytes
}

/// What a translation becomes whose block has another one at offset `to`.
pub fn jump(at: usize, to: usize) -> Vec<u8> {
    let mut e = Emitter::new(at);
    e.jmp_to(to);
    e.bytes
}

/// An exit whose rarely executed code isn't written yet.
pub struct Open {
    pub(super) exit: Exit,
    jump: Jump,
    /// Where its guard fails.
    others: Option<[Jump; 2]>,
    /// If it is a CALL of the host's, where that returns to.
    back: Option<usize>,
}

impl Translator<'_> {
    /// Goes on at `target`.
    pub fn exit(&mut self, target: u64) {
        self.guarded(target, Emitter::jmp);
    }

    /// Goes on at `target`, and from there, by a RET, at `next`.
    pub fn call(&mut self, target: u64, next: u64) {
        self.guarded(target, Emitter::call_ahead);
        let here = self.e.here();
        if let Some(open) = self.exits.last_mut() {
            open.back = Some(here);
        }
        self.return_here(next);
    }

    /// Goes on at `target` by a jump or call that `emit` writes.
    fn guarded(&mut self, target: u64, emit: fn(&mut Emitter) -> Jump) {
        let mut others = None;
        let page = i32::try_from(target as i64 & !0xfff).ok();
        let guard = page.filter(|_| self.leaves_page(target)).map(|page| {
            // No context has number 0.
            let number = self.e.cmp_mem_imm(context(self.half), 0);
            let other_context = self.e.jcc(cc::NOT_EQUAL);
            self.e.mov_imm64(A, 0);
            let base = self.e.here() - 8;
            self.e.alu_mem(Alu::Cmp, true, A, code_base());
            others = Some([other_context, self.e.jcc(cc::NOT_EQUAL)]);
            if self.block.is_relative() {
                self.e.rm(!self.narrow, &[0x8d], A, Mem { base: Some(A), index: None, disp: page }); // lea
                self.e.store(code_base(), A);
            }
            Guard { context: number as u32, base: base as u32 }
        });
        let jump = emit(&mut self.e);
        let exit = Exit { target, jump: jump.0 as u32, guard, unlinked: 0 };
        self.exits.push(Open { exit, jump, others, back: None });
    }

    fn leaves_page(&self, target: u64) -> bool {
        target >> 12 != self.block.rip >> 12
    }

    /// Goes on at `target` where `condition` holds, else behind.
    pub fn exit_if(&mut self, condition: u8, target: u64) {
        if self.leaves_page(target) {
            let not = self.e.jcc(condition ^ 1);
            self.exit(target);
            self.e.bind(not);
        } else {
            let jump = self.e.jcc(condition);
            let exit = Exit { target, jump: jump.0 as u32, guard: None, unlinked: 0 };
            self.exits.push(Open { exit, jump, others: None, back: None });
        }
    }

    /// The block's conditional branch.
    pub fn ends(&mut self, condition: u8, target: u64, next: u64) {
        match self.end {
            End::Exits => {
                self.exit_if(condition, target);
                self.exit(next);
            }
            End::Falls => self.leave_if(condition, target),
            End::Enters => self.leave_if(condition ^ 1, next),
            End::Loops => {
                let again = self.e.jcc(condition);
                self.e.point(again, self.head);
                if self.unsaved {
                    self.e.save_flags();
                }
                self.exit(next);
            }
        }
    }

    /// The block's JMP.
    pub fn goes(&mut self, target: u64) {
        if self.end != End::Enters {
            self.exit(target);
        }
    }

    /// Leaves the trace for `target` where `condition` holds.
    fn leave_if(&mut self, condition: u8, target: u64) {
        if self.unsaved || self.ahead > 0 || self.leaves_page(target) {
            let side = self.e.jcc(condition);
            self.sides.push((side, target));
        } else {
            self.exit_if(condition, target);
        }
    }

    pub(super) fn emit_sides(&mut self) {
        for (side, target) in std::mem::take(&mut self.sides) {
            self.e.bind(side);
            if self.unsaved {
                self.e.save_flags();
            }
            self.give_back();
            self.exit(target);
        }
    }
}

/// The rarely executed code of an exit, which has this number; where that is.
pub(super) fn emit_exit(e: &mut Emitter, open: &Open, number: usize, stubs: &Stubs) -> u32 {
    let Open { jump, others, back, .. } = *open;
    let unlinked = e.here();
    e.bind(jump);
    if back.is_none() {
        others.into_iter().flatten().for_each(|jump| e.bind(jump));
    }
    e.mov_imm(A, number as u64);
    e.jmp_to(stubs.link);
    while e.here() < unlinked + UNLINKED_BYTES {
        e.raw(&[0xcc]);
    }
    if let (Some(back), Some(others)) = (back, others) {
        others.into_iter().for_each(|jump| e.bind(jump));
        e.call(unlinked);
        e.jmp_to(back);
    }
    unlinked as u32
}
