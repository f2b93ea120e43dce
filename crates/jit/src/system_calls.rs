//! SYSCALL and SYSRET in 64-bit mode, as far as nothing about them is unusual.

use crate::emitter::{Alu, Emitter, Jump, Mem, cc};
use crate::frame::{self, Frame, frame_field, gpr};
use crate::registers::{A, B, FLAGS, RCX, Reg};
use crate::views::{offset_of_view, supervisors_view};
use umbra_arch::rflags;
use umbra_arch::segment::{Seg, Segment};
use umbra_cpu::Core;

/// CS and SS after SYSCALL, those after SYSRET.
pub type Segments = [[Segment; 2]; 2];
const _: () = assert!(size_of::<Segment>().is_multiple_of(8));

impl Frame {
    /// After anything that may have changed MSRs or CR4: before the view in force is taken.
    #[inline]
    pub fn take_registers(&mut self, core: &Core) {
        if self.tsd != core.s.cr4.tsd() {
            self.tsd = !self.tsd;
            self.forget_all_views();
        }
        self.system_calls = core.s.efer.sce().into();
        self.wp_usable = (core.mmu.keeps_roots() && !core.s.cr4.cet()).into();
        let star = core.s.msr.star;
        if self.star == Some(star) {
            return;
        }
        self.star = Some(star);
        let (call, back) = ((star >> 32) as u16 & 0xfffc, (star >> 48) as u16);
        self.segments = [
            [Segment::code64(call, 0), Segment::flat_data(call.wrapping_add(8), 0)],
            [Segment::code64(back.wrapping_add(16) | 3, 3), Segment::flat_data(back.wrapping_add(8) | 3, 3)],
        ];
    }
}

/// What a system call's stub jumps to.
#[derive(Clone, Copy)]
pub struct Ways {
    /// Changes the view: see [`crate::views::emit_change`].
    pub change: usize,
    /// Does the operation whose site is in [`A`] by its function.
    pub helper: usize,
    /// Goes to the RIP in the core.
    pub dispatch: usize,
    /// Goes to the RIP in [`A`], in whatever context.
    pub absolute: usize,
}

/// Jumped to with SYSCALL's site in [`A`] and the RIP behind it, from the code's base, in [`B`].
pub fn emit_call(e: &mut Emitter, ways: Ways) -> usize {
    let here = e.here();
    let mut slow = begin(e);
    e.store(frame_field!(scratch), B);
    // For R11.
    whole_flags(e, B, A);
    e.store(frame_field!(old_flags), B);
    e.load(A, frame::fmask());
    e.rr(true, &[0xf7], 2, A); // not
    e.alu(Alu::And, true, A, B);
    e.store(frame_field!(new_flags), A);
    slow.push(jump_if_any(e, A, rflags::AC | rflags::TF));
    supervisors_view(e);
    e.call(ways.change);
    slow.push(e.jcc(cc::NOT_EQUAL));
    e.load(RCX, frame_field!(scratch));
    e.alu_mem(Alu::Add, true, RCX, frame::code_base());
    e.load(A, frame_field!(old_flags));
    e.store(gpr(11), A);
    commit(e, 0);
    e.load(A, frame::lstar());
    e.jmp_to(ways.absolute);
    by_function(e, slow, ways);
    here
}

/// Jumped to with SYSRETQ's site in [`A`].
pub fn emit_return(e: &mut Emitter, ways: Ways) -> usize {
    let here = e.here();
    let mut slow = begin(e);
    slow.push(unless_byte(e, frame::cpl(), 0));
    slow.push(unless_canonical(e, RCX, B));
    e.load(A, gpr(11));
    e.alu_imm(Alu::And, true, A, (rflags::WRITABLE & !(rflags::RF | rflags::VM)) as i32);
    slow.push(jump_if_any(e, A, rflags::TF | rflags::AC));
    e.alu_imm(Alu::Or, true, A, rflags::FIXED as i32);
    e.store(frame_field!(new_flags), A);
    // An interrupt that waits is taken when IF becomes set.
    e.rm(false, &[0x80], 7, frame_field!(interrupt)); // cmp byte
    e.raw(&[0]);
    slow.push(e.jcc(cc::NOT_EQUAL));
    e.mov_imm(B, offset_of_view(true, false, false) as u64);
    e.call(ways.change);
    slow.push(e.jcc(cc::NOT_EQUAL));
    commit(e, 1);
    e.mov(A, RCX);
    e.jmp_to(ways.absolute);
    by_function(e, slow, ways);
    here
}

/// Where OF is in RFLAGS.
const OF_BIT: u8 = 11;

fn begin(e: &mut Emitter) -> Vec<Jump> {
    e.store32(frame_field!(call_site), A);
    vec![unless_byte(e, frame_field!(system_calls), 1)]
}

/// Jumps unless a byte is `value`.
pub fn unless_byte(e: &mut Emitter, mem: Mem, value: u8) -> Jump {
    e.rm(false, &[0x80], 7, mem); // cmp byte
    e.raw(&[value]);
    e.jcc(cc::NOT_EQUAL)
}

/// Jumps if the address in `r` isn't canonical whatever the paging mode.
pub fn unless_canonical(e: &mut Emitter, r: Reg, free: Reg) -> Jump {
    e.mov(free, r);
    e.shl(true, free, 16);
    e.sar(true, free, 16);
    e.alu(Alu::Cmp, true, free, r);
    e.jcc(cc::NOT_EQUAL)
}

/// Jumps if any of these bits are set in `r`.
pub fn jump_if_any(e: &mut Emitter, r: u8, bits: u64) -> Jump {
    e.rr(false, &[0xf7], 0, r); // test
    e.raw(&(bits as u32).to_le_bytes());
    e.jcc(cc::NOT_EQUAL)
}

/// RFLAGS with RF clear. Clobbers `free`.
pub fn whole_flags(e: &mut Emitter, to: Reg, free: Reg) {
    e.mov32(to, FLAGS);
    e.shr(false, to, 8);
    e.alu_imm(Alu::And, false, to, 0xd5);
    e.mov32(free, FLAGS);
    e.alu_imm(Alu::And, false, free, 1);
    e.shl(false, free, OF_BIT);
    e.alu(Alu::Or, false, to, free);
    e.load(free, frame::rflags());
    e.alu_imm(Alu::And, true, free, !((rflags::STATUS | rflags::RF | rflags::VM) as i32));
    e.alu(Alu::Or, true, to, free);
    e.alu_imm(Alu::Or, true, to, rflags::FIXED as i32);
}

/// The status flags in [`A`], which it clobbers, are the guest's.
pub fn set_status(e: &mut Emitter) {
    e.mov32(FLAGS, A);
    e.alu_imm(Alu::And, false, FLAGS, 0xd5);
    e.alu_imm(Alu::Or, false, FLAGS, rflags::FIXED as i32);
    e.shl(false, FLAGS, 8);
    e.shr(false, A, OF_BIT);
    e.alu_imm(Alu::And, false, A, 1);
    e.alu(Alu::Or, false, FLAGS, A);
}

/// RFLAGS, CS, SS and CPL as after SYSCALL (0) or SYSRET (1). Clobbers [`A`].
fn commit(e: &mut Emitter, which: usize) {
    e.load(A, frame_field!(new_flags));
    e.store(frame::rflags(), A);
    set_status(e);
    for (n, seg) in [Seg::Cs, Seg::Ss].into_iter().enumerate() {
        let (from, to) = (frame_field!(segments), frame::segment(seg as usize));
        let first = from.disp + ((2 * which + n) * size_of::<Segment>()) as i32;
        for at in (0..size_of::<Segment>() as i32).step_by(8) {
            e.load(A, Mem { disp: first + at, ..from });
            e.store(Mem { disp: to.disp + at, ..to }, A);
        }
    }
    e.rm(false, &[0xc6], 0, frame::cpl()); // mov byte
    e.raw(&[if which == 0 { 0 } else { 3 }]);
}

/// Does the operation whose site is in the frame by its function, where these jumps lead and from here.
pub fn by_function(e: &mut Emitter, slow: Vec<Jump>, ways: Ways) {
    slow.into_iter().for_each(|jump| e.bind(jump));
    e.load32(A, frame_field!(call_site));
    e.call(ways.helper);
    e.jmp_to(ways.dispatch);
}
