//! A guest in 32-bit protected mode that touches pages which arrive on demand, counts what it is told, and
//! checks it.

use iced_x86::code_asm::*;
use std::borrow::Cow;
use umbra_arch::control::{Cr0, Cr4};
use umbra_arch::segment::{Seg, Segment, TableRegister};
use umbra_arch::{CpuState, Gpa};
use umbra_machine::boot::{BootPlan, Piece};

/// First and last page that it touches, and the page behind, to which one access reaches over.
pub const FIRST: u32 = 0x40_0000;
pub const PAGES: u32 = 1200;
pub const END: u32 = FIRST + PAGES * 4096;
/// A page that holds nothing but RET.
pub const FUNCTION: u32 = 0xe0_0000;

const PAGE_DIRECTORY: u32 = 0x1000;
const IDT: u32 = 0x2000;
const GDT: u32 = 0x3000;
const STACK: u32 = 0x6000;
const PF_HANDLER: u32 = 0x8000;
const READY_HANDLER: u32 = 0x8800;
const TIMER_HANDLER: u32 = 0x9000;
const MAIN: u32 = 0x9800;
/// Flags and token; what the guest counts follows.
const AREA: u32 = 0x7000;
const SAVED: u32 = 0x7100;
/// "Page not present", "page ready", "wake all", timer interrupts, and the sum of what the pages held.
pub const COUNTS: u32 = 0x7200;
const READY_VECTOR: u32 = 0xf3;
const TIMER_VECTOR: u32 = 0x40;
const ALWAYS: u32 = 0b1011;
const EOI: u32 = 0x80b;
pub const GOOD: u32 = 0x10;
pub const BAD: u32 = 0x11;

/// What the guest does.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Low bits of the control MSR.
    pub control: u32,
    /// CR0.PG while it touches pages.
    pub paging: bool,
    /// The #PF handler switches paging off, counts down from here, and on again. 0 does nothing of it.
    pub off_for: u32,
    /// How often it goes through the pages.
    pub rounds: u32,
    /// RFLAGS.IF while it touches pages.
    pub interrupts: bool,
    /// Nanoseconds between interrupts of the local APIC's timer; 0 is none.
    pub timer: u32,
}

impl Plan {
    pub const TOLD: Plan = Plan { control: ALWAYS, paging: true, off_for: 0, rounds: 1, interrupts: true, timer: 0 };
}

type Assembled = Result<Vec<u8>, IcedError>;

fn assemble(at: u32, f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Assembled {
    let mut a = CodeAssembler::new(32)?;
    f(&mut a)?;
    a.assemble(at.into())
}

fn write_msr(a: &mut CodeAssembler, msr: u32, value: u32) -> Result<(), IcedError> {
    a.mov(ecx, msr)?;
    a.mov(eax, value)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

fn leave(a: &mut CodeAssembler, code: u32) -> Result<(), IcedError> {
    a.mov(eax, code)?;
    a.out(0xf4, al)?;
    a.hlt()
}

/// Takes the token, sleeps until the other handler has found it ready, and tries again.
fn page_fault(plan: &Plan) -> Assembled {
    assemble(PF_HANDLER, |a| {
        let (mut wait, mut spin, mut bad) = (a.create_label(), a.create_label(), a.create_label());
        a.pushad()?;
        a.cmp(dword_ptr(esp + 32), 0)?;
        a.jne(bad)?;
        a.cmp(dword_ptr(AREA), 1)?;
        a.jne(bad)?;
        a.mov(dword_ptr(AREA), 0)?;
        a.inc(dword_ptr(COUNTS))?;
        a.mov(eax, cr2)?;
        a.mov(dword_ptr(SAVED), eax)?;
        if plan.off_for > 0 {
            a.mov(eax, cr0)?;
            a.and(eax, 0x7fff_ffff)?;
            a.mov(cr0, eax)?;
            a.mov(ecx, plan.off_for)?;
            a.set_label(&mut spin)?;
            a.loop_(spin)?;
            a.or(eax, 0x8000_0000u32 as i32)?;
            a.mov(cr0, eax)?;
        }
        a.set_label(&mut wait)?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        a.cmp(dword_ptr(SAVED), 0)?;
        a.jne(wait)?;
        a.popad()?;
        a.add(esp, 4)?;
        a.iretd()?;
        a.set_label(&mut bad)?;
        leave(a, BAD)
    })
}

/// Checks that the token is the one last seen, or means all.
fn page_ready() -> Assembled {
    assemble(READY_HANDLER, |a| {
        let (mut all, mut done, mut bad) = (a.create_label(), a.create_label(), a.create_label());
        a.pushad()?;
        a.mov(eax, dword_ptr(AREA + 4))?;
        a.cmp(eax, -1)?;
        a.je(all)?;
        a.test(eax, eax)?;
        a.je(bad)?;
        a.cmp(eax, dword_ptr(SAVED))?;
        a.jne(bad)?;
        a.mov(dword_ptr(SAVED), 0)?;
        a.inc(dword_ptr(COUNTS + 4))?;
        a.jmp(done)?;
        a.set_label(&mut all)?;
        a.inc(dword_ptr(COUNTS + 8))?;
        a.set_label(&mut done)?;
        a.mov(dword_ptr(AREA + 4), 0)?;
        write_msr(a, 0x4b56_4d07, 1)?;
        write_msr(a, EOI, 0)?;
        a.popad()?;
        a.iretd()?;
        a.set_label(&mut bad)?;
        leave(a, BAD)
    })
}

fn timer() -> Assembled {
    assemble(TIMER_HANDLER, |a| {
        a.pushad()?;
        a.inc(dword_ptr(COUNTS + 12))?;
        write_msr(a, EOI, 0)?;
        a.popad()?;
        a.iretd()
    })
}

/// Reads each page and writes to it, in rounds; reads across the last page's end; calls a function.
fn main(plan: &Plan) -> Assembled {
    assemble(MAIN, |a| {
        let (mut round, mut next) = (a.create_label(), a.create_label());
        // x2APIC mode: registers are MSRs.
        write_msr(a, 0x1b, 0xfee0_0d00)?;
        write_msr(a, 0x4b56_4d06, READY_VECTOR)?;
        write_msr(a, 0x4b56_4d02, AREA | plan.control)?;
        if plan.timer > 0 {
            write_msr(a, 0x83e, 0xb)?;
            write_msr(a, 0x832, TIMER_VECTOR | 1 << 17)?;
            write_msr(a, 0x838, plan.timer)?;
        }
        if plan.interrupts {
            a.sti()?;
        }
        a.xor(edi, edi)?;
        a.mov(esi, plan.rounds)?;
        a.set_label(&mut round)?;
        a.mov(ebx, FIRST)?;
        a.set_label(&mut next)?;
        a.add(edi, dword_ptr(ebx))?;
        a.mov(dword_ptr(ebx + 8), ebx)?;
        a.add(ebx, 4096)?;
        a.cmp(ebx, END)?;
        a.jb(next)?;
        a.dec(esi)?;
        a.jnz(round)?;
        a.add(edi, dword_ptr(END - 2))?;
        a.mov(eax, FUNCTION)?;
        a.call(eax)?;
        a.cli()?;
        a.mov(dword_ptr(COUNTS + 16), edi)?;
        leave(a, GOOD)
    })
}

/// The whole guest in memory, and its first state.
pub fn boot(plan: &Plan) -> Result<BootPlan<'static>, IcedError> {
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let mut idt = vec![0u64; 256];
    for (vector, handler) in [(14, PF_HANDLER), (READY_VECTOR, READY_HANDLER), (TIMER_VECTOR, TIMER_HANDLER)] {
        idt[vector as usize] = u64::from(handler & 0xffff) | 0x08 << 16 | 0x8e << 40 | u64::from(handler >> 16) << 48;
    }
    // Four pages of 4 MiB, mapped to themselves.
    let directory: Vec<u8> = (0..4u32).flat_map(|n| (n << 22 | 0x83).to_le_bytes()).collect();
    let pieces = [
        (PAGE_DIRECTORY, directory),
        (IDT, words(&idt)),
        (GDT, words(&[0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff])),
        (AREA, vec![0; 4096]),
        (STACK - 4096, vec![0; 4096]),
        (PF_HANDLER, page_fault(plan)?),
        (READY_HANDLER, page_ready()?),
        (TIMER_HANDLER, timer()?),
        (MAIN, main(plan)?),
    ];
    let piece =
        |(at, bytes): (u32, Vec<u8>)| Piece { what: "test", gpa: Gpa::new(at.into()), bytes: Cow::Owned(bytes) };
    Ok(BootPlan { kind: None, pieces: pieces.map(piece).into(), state: Box::new(state(plan)) })
}

fn state(plan: &Plan) -> CpuState {
    let mut s = CpuState::reset();
    s.cr0 = Cr0::new(Cr0::PE | Cr0::NE | Cr0::ET | if plan.paging { Cr0::PG } else { 0 });
    s.cr4 = Cr4::new(Cr4::PSE);
    s.cr3 = umbra_arch::control::Cr3::new(PAGE_DIRECTORY.into());
    s.seg[Seg::Cs as usize] = Segment::flat_code32(0x08, 0);
    for seg in [Seg::Ss, Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs] {
        s.seg[seg as usize] = Segment::flat_data(0x10, 0);
    }
    s.gdtr = TableRegister { base: GDT.into(), limit: 0x17 };
    s.idtr = TableRegister { base: IDT.into(), limit: 0x7ff };
    s.gpr[4] = STACK.into();
    s.rip = MAIN.into();
    s
}
