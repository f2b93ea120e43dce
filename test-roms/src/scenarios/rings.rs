//! What ring 3 may do, and events that come from there: with a GDT, a TSS and an IDT of this module's own.

use super::rights::{KEY, set_pkru};
use super::*;
use crate::pc::{selector, variable};
use crate::report::check_memory;
use umbra_arch::control::{Cr0, Cr4};
use umbra_arch::descriptor::{encode, system};
use umbra_arch::segment::Attr;

const SMEP: u32 = 1 << 7;
const SMAP: u32 = 1 << 20;
const PKU: u32 = 1 << 3;

/// The runtime's selectors come first in the table.
const USER_DATA: u32 = 0x30 | 3;
const USER_CODE: u32 = 0x38 | 3;
const TSS: u32 = 0x40;
const TSS_BYTES: usize = 0x68;
/// Vectors that come from ring 3.
const TRAPS: [u8; 3] = [vector::UD, vector::GP, vector::PF];
/// An interrupt that ring 3 may raise.
const CALL: u8 = 0x30;

/// Pages of ring 3 behind [`PAGE`] and its neighbour: code and stack.
const TEXT: u32 = PAGE + 0x3000;
const STACK: u32 = PAGE + 0x4000;
const STACK_IN_USE: u32 = STACK + 0xff0;
/// An IDT across two pages: exceptions in the first one, [`CALL`] in the second.
const TABLE: [u32; 2] = [PAGE + 0x5000, PAGE + 0x6000];
const TABLE_FRAMES: [u32; 2] = [0x4_d000, 0x4_e000];
const TABLE_START: u32 = TABLE[1] - 32 * 16;
const CALL_GATE: u32 = TABLE_START + CALL as u32 * 16;

/// Vector and flags of the last event from ring 3.
const SEEN: u32 = variable::SCRATCH + 16;
/// IDTR's operand.
const REGISTER: u32 = variable::SCRATCH + 24;

/// What ring 3 does at [`TEXT`]: EDI is the address, UD2 the end of what didn't fault.
#[derive(Clone, Copy)]
enum Act {
    Read,
    Write,
    Call,
    Interrupt,
}

impl Act {
    const ALL: [Act; 4] = [Act::Read, Act::Write, Act::Call, Act::Interrupt];

    const fn place(self) -> u32 {
        TEXT + 4 * self as u32
    }

    /// `mov eax, [rdi]`, `mov [rdi], eax`, `call rdi`, `int 30h`; then `ud2`.
    const fn code(self) -> u32 {
        match self {
            Act::Read => 0x0b0f_078b,
            Act::Write => 0x0b0f_0789,
            Act::Call => 0x0b0f_d7ff,
            Act::Interrupt => 0x0b0f_30cd,
        }
    }
}

fn leaf(at: u32) -> u32 {
    root_leaves(0).entry(at)
}

pub fn data(l: &mut Linker) -> Done {
    let mut tss = [0; TSS_BYTES];
    // RSP0.
    tss[4..8].copy_from_slice(&STACK_TOP.to_le_bytes());
    l.data("rings tss", &tss)?;
    let flat = |attr| encode(0, u32::MAX, Attr(attr));
    let tss = encode(l.address("rings tss"), TSS_BYTES as u32 - 1, Attr(0x80 | u32::from(system::TSS_AVAILABLE)));
    let table = [0, flat(0xc09b), flat(0xc093), flat(0xa09b), 0, 0, flat(0xc0f3), flat(0xa0fb), tss, 0];
    let bytes: Vec<u8> = table.iter().flat_map(|entry: &u64| entry.to_le_bytes()).collect();
    l.data("rings gdt", &bytes)?;
    let mut register = (bytes.len() as u16 - 1).to_le_bytes().to_vec();
    register.extend_from_slice(&u64::from(l.address("rings gdt")).to_le_bytes());
    l.data("rings gdtr", &register)?;
    let mut gates = Vec::new();
    for v in 0..=CALL {
        let taken = TRAPS.contains(&v) || v == CALL;
        let target = if taken { l.address(&format!("rings vector {v}")) } else { 0 };
        let attr = if taken { 0xeeu64 } else { 0 };
        let low =
            u64::from(target & 0xffff) | u64::from(selector::CODE64) << 16 | attr << 40 | u64::from(target >> 16) << 48;
        gates.extend_from_slice(&low.to_le_bytes());
        gates.extend_from_slice(&[0; 8]);
    }
    l.data("rings idt", &gates)?;
    l.code(64, events)
}

/// Notes vector, error code, CR2 and goes on in ring 0 where [`variable::RESUME`] says, with nothing on the stack.
fn events(c: &mut Code<'_>) -> Done {
    for v in TRAPS.into_iter().chain([CALL]) {
        c.name(&format!("rings vector {v}"))?;
        c.mov(ebx, u32::from(v))?;
        if matches!(v, vector::GP | vector::PF) {
            c.pop(rax)?;
        } else {
            c.xor(eax, eax)?;
        }
        c.jump("rings event")?;
    }
    c.name("rings event")?;
    c.mov(dword_ptr(SEEN), ebx)?;
    c.mov(dword_ptr(variable::FAULT_CODE), eax)?;
    c.mov(rax, cr2)?;
    c.mov(dword_ptr(variable::FAULT_ADDRESS), eax)?;
    // AC as it was in ring 3 doesn't matter here.
    c.push(2)?;
    c.popfq()?;
    c.mov(eax, u32::from(selector::DATA32))?;
    c.mov(ss, eax)?;
    c.mov(esp, STACK_TOP)?;
    c.mov(eax, dword_ptr(variable::RESUME))?;
    Ok(c.jmp(rax)?)
}

pub fn all(c: &mut Code<'_>) -> Done {
    prepare(c)?;
    section(c, "4, 12: ring 3, WP off and on, NXE", write_protect)?;
    with(c, Word::Ebx7, SMEP, "5: ring 3, SMEP", smep)?;
    with(c, Word::Ecx7, PKU, "22: ring 3, protection keys", keys)?;
    with(c, Word::Ebx7, SMAP, "19: SMAP, AC, an IDT on a user page", implicit)?;
    let idtr = c.address("idtr.64");
    c.lidt(fword_ptr(idtr))?;
    for at in [TEXT, STACK, TABLE[0], TABLE[1]] {
        set(c, leaf(at), 0, 0)?;
    }
    reload(c)?;
    map(c, P | W, 0)
}

fn prepare(c: &mut Code<'_>) -> Done {
    let (gdtr, gates) = (c.address("rings gdtr"), c.address("rings idt"));
    c.lgdt(fword_ptr(gdtr))?;
    c.mov(eax, TSS)?;
    c.ltr(ax)?;
    for act in Act::ALL {
        c.mov(dword_ptr(SPARE[2] + act.place() % 0x1000), act.code())?;
    }
    set(c, leaf(TEXT), SPARE[2] | P | U, 0)?;
    set(c, leaf(STACK), SPARE[3] | P | W | U, 0)?;
    for (at, frame) in TABLE.into_iter().zip(TABLE_FRAMES) {
        set(c, leaf(at), frame | P, 0)?;
    }
    c.mov(esi, gates)?;
    c.mov(edi, TABLE_FRAMES[0] + TABLE_START % 0x1000)?;
    c.mov(ecx, 32 * 16 / 4)?;
    c.rep().movsd()?;
    c.mov(edi, TABLE_FRAMES[1])?;
    c.mov(ecx, (u32::from(CALL) - 31) * 16 / 4)?;
    c.rep().movsd()?;
    c.mov(word_ptr(REGISTER), u32::from(CALL) * 16 + 15)?;
    c.mov(dword_ptr(REGISTER + 2), TABLE_START)?;
    Ok(c.mov(dword_ptr(REGISTER + 6), 0)?)
}

/// Does `act` at `address` in ring 3 under the own IDT; goes on after the event that ends it.
fn in_ring_3(c: &mut Code<'_>, act: Act, address: u32, flags: i32) -> Done {
    let after = c.fresh_name();
    let at = c.address(&after);
    c.lidt(fword_ptr(REGISTER))?;
    c.mov(dword_ptr(variable::RESUME), at)?;
    c.mov(edi, address)?;
    c.mov(eax, FRAME)?;
    c.push(USER_DATA as i32)?;
    c.push(STACK_IN_USE as i32)?;
    c.push(flags)?;
    c.push(USER_CODE as i32)?;
    c.push(act.place() as i32)?;
    c.iretq()?;
    c.name(&after)?;
    let idtr = c.address("idtr.64");
    Ok(c.lidt(fword_ptr(idtr))?)
}

/// Ring 3 may.
fn may(c: &mut Code<'_>, act: Act) -> Done {
    let address = if matches!(act, Act::Call) { PAGE + CODE } else { PAGE };
    in_ring_3(c, act, address, 2)?;
    check_memory(c, SEEN, u32::from(vector::UD))
}

/// Ring 3 gets a #PF with `code`.
fn may_not(c: &mut Code<'_>, act: Act, code: u32) -> Done {
    let address = if matches!(act, Act::Call) { PAGE + CODE } else { PAGE };
    in_ring_3(c, act, address, 2)?;
    check_memory(c, SEEN, u32::from(vector::PF))?;
    check_memory(c, variable::FAULT_CODE, code)?;
    check_memory(c, variable::FAULT_ADDRESS, address)
}

fn write_protect(c: &mut Code<'_>) -> Done {
    map(c, P | U, 0)?;
    for _ in 0..2 {
        cr0_bits(c, Cr0::WP, 0)?;
        write(c)?;
        may(c, Act::Read)?;
        may_not(c, Act::Write, 7)?;
        write(c)?;
        cr0_bits(c, 0, Cr0::WP)?;
        may(c, Act::Read)?;
        may_not(c, Act::Write, 7)?;
        write_faults(c, 3)?;
    }
    map(c, P | W | U, 0)?;
    may(c, Act::Write)?;
    marks(c, ENTRY, A | D)?;
    may(c, Act::Call)?;
    // A supervisor page, one that isn't there, one that isn't for fetches.
    map(c, P | W, 0)?;
    write(c)?;
    may_not(c, Act::Read, 5)?;
    may_not(c, Act::Write, 7)?;
    may_not(c, Act::Call, 0x15)?;
    map(c, 0, 0)?;
    may_not(c, Act::Read, 4)?;
    may_not(c, Act::Call, 0x14)?;
    map(c, P | U, XD)?;
    may(c, Act::Read)?;
    may_not(c, Act::Call, 0x15)?;
    change_efer(c, Efer::NXE, 0)?;
    reload(c)?;
    may_not(c, Act::Read, 0xd)?;
    may_not(c, Act::Call, 0xd)?;
    change_efer(c, 0, Efer::NXE)?;
    may(c, Act::Read)?;
    may_not(c, Act::Call, 0x15)
}

fn smep(c: &mut Code<'_>) -> Done {
    map(c, P | U, 0)?;
    cr4_bits(c, 0, Cr4::SMEP)?;
    for _ in 0..2 {
        cr0_bits(c, Cr0::WP, 0)?;
        write(c)?;
        fetch_faults(c, 0x11)?;
        may(c, Act::Call)?;
        fetch_faults(c, 0x11)?;
        cr0_bits(c, 0, Cr0::WP)?;
        may(c, Act::Call)?;
        fetch_faults(c, 0x11)?;
    }
    cr4_bits(c, Cr4::SMEP, 0)?;
    fetch(c)?;
    may(c, Act::Call)
}

/// Key 2, as in [`super::rights`].
fn keys(c: &mut Code<'_>) -> Done {
    cr4_bits(c, 0, Cr4::PKE)?;
    set_pkru(c, 0)?;
    map(c, P | W | U, KEY)?;
    may(c, Act::Write)?;
    set_pkru(c, 0x20)?;
    may(c, Act::Read)?;
    may_not(c, Act::Write, 0x27)?;
    // Write-disable is for ring 3 whatever WP says.
    cr0_bits(c, Cr0::WP, 0)?;
    may_not(c, Act::Write, 0x27)?;
    cr0_bits(c, 0, Cr0::WP)?;
    set_pkru(c, 0x10)?;
    may_not(c, Act::Read, 0x25)?;
    may(c, Act::Call)?;
    cr4_bits(c, Cr4::PKE, 0)?;
    may(c, Act::Write)?;
    cr4_bits(c, 0, Cr4::PKE)?;
    may_not(c, Act::Read, 0x25)?;
    set_pkru(c, 0)?;
    cr4_bits(c, Cr4::PKE, 0)
}

/// Reading a gate is an access of the supervisor's to which AC means nothing, whatever ring the event comes from.
fn implicit(c: &mut Code<'_>) -> Done {
    const AC: i32 = 0x4_0002;
    const WITHOUT_AC: i32 = 2;
    let taken = |c: &mut Code<'_>, flags| -> Done {
        in_ring_3(c, Act::Interrupt, 0, flags)?;
        check_memory(c, SEEN, u32::from(CALL))
    };
    taken(c, AC)?;
    for _ in 0..2 {
        c.or(dword_ptr(leaf(TABLE[1])), U)?;
        c.invlpg(byte_ptr(TABLE[1]))?;
        taken(c, AC)?;
        cr4_bits(c, 0, Cr4::SMAP)?;
        for flags in [AC, WITHOUT_AC] {
            in_ring_3(c, Act::Interrupt, 0, flags)?;
            check_memory(c, SEEN, u32::from(vector::PF))?;
            check_memory(c, variable::FAULT_CODE, 1)?;
            check_memory(c, variable::FAULT_ADDRESS, CALL_GATE)?;
        }
        // An explicit access with AC may.
        c.stac()?;
        c.mov(ebx, dword_ptr(CALL_GATE))?;
        c.clac()?;
        check_page_fault(c, 1, CALL_GATE, |c| Ok(c.mov(ebx, dword_ptr(CALL_GATE))?))?;
        c.and(dword_ptr(leaf(TABLE[1])), !(U as i32))?;
        c.invlpg(byte_ptr(TABLE[1]))?;
        taken(c, AC)?;
        cr4_bits(c, Cr4::SMAP, 0)?;
    }
    Ok(())
}
