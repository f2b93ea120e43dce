//! Segment limits and types, descriptor checks, privilege changes by IRET, call gates and interrupts.

use crate::Rom;
use crate::link::{Code, Linker};
use crate::pc::{STACK_TOP, selector, variable};
use crate::report::{check, check_memory, check_zero_flag, section};
use crate::stages::{Done, Stages, build, nothing, raises};
use iced_x86::code_asm::*;
use umbra_arch::descriptor::encode;
use umbra_arch::fault::vector;
use umbra_arch::segment::Attr;

/// Name and expectation.
pub const ROM: Rom = Rom {
    name: "segments",
    about: "segment limits and types, descriptor checks, rings, call gates",
    expect: "Result: PASS",
    build: || build(&STAGES),
};

const STAGES: Stages = Stages { title: "Umbra segments", real: nothing, protected, long: nothing, data };

const SMALL: u16 = 0x30;
const DOWN: u16 = 0x38;
const READ_ONLY: u16 = 0x40;
const EXECUTE_ONLY: u16 = 0x48;
const ABSENT: u16 = 0x50;
const CONFORMING: u16 = 0x58;
const USER_CODE: u16 = 0x60 | 3;
const USER_DATA: u16 = 0x68 | 3;
const TSS: u16 = 0x70;
const GATE: u16 = 0x78;
const ABSENT_GATE: u16 = 0x80;
const RETURN_GATE: u16 = 0x88;

const SCRATCH: u32 = variable::SCRATCH;
const USER_STACK: u32 = 0x5_f000;
const INNER_STACK: u32 = 0x5_e000;

fn data(l: &mut Linker) -> Done {
    let image = crate::LOAD.raw() as u32;
    let (gate, back, tss) = (l.address("gate"), l.address("return gate"), l.address("tss"));
    let flat = |attr| encode(0, u32::MAX, Attr(attr));
    let call_gate = |to: u32, attr: u64, count: u64| {
        u64::from(to & 0xffff)
            | u64::from(selector::CODE32) << 16
            | count << 32
            | attr << 40
            | u64::from(to >> 16) << 48
    };
    let table = [
        0,
        flat(0xc09b),
        flat(0xc093),
        flat(0xa09b),
        encode(image, 0xffff, Attr(0x009b)),
        encode(image, 0xffff, Attr(0x0093)),
        encode(SCRATCH, 0xf, Attr(0x4093)),
        encode(0, 0xffff, Attr(0x4097)),
        encode(SCRATCH, 0xfff, Attr(0x4091)),
        flat(0xc099),
        flat(0xc013),
        flat(0xc09f),
        flat(0xc0fb),
        flat(0xc0f3),
        encode(tss, 0x67, Attr(0x0089)),
        call_gate(gate, 0xec, 1),
        call_gate(gate, 0x6c, 0),
        call_gate(back, 0xec, 0),
    ];
    let bytes: Vec<u8> = table.iter().flat_map(|entry: &u64| entry.to_le_bytes()).collect();
    l.data("own gdt", &bytes)?;
    let mut register = (bytes.len() as u16 - 1).to_le_bytes().to_vec();
    register.extend_from_slice(&l.address("own gdt").to_le_bytes());
    l.data("own gdtr", &register)?;
    let mut segment = [0u8; 0x68];
    segment[4..8].copy_from_slice(&INNER_STACK.to_le_bytes());
    segment[8..10].copy_from_slice(&selector::DATA32.to_le_bytes());
    l.data("tss", &segment)
}

fn protected(c: &mut Code<'_>) -> Done {
    let gdtr = c.address("own gdtr");
    c.lgdt(fword_ptr(gdtr))?;
    section(c, "limits and types", |c| {
        limits(c)?;
        types(c)
    })?;
    section(c, "loading selectors", loading)?;
    section(c, "LAR, LSL, VERR, VERW", look)?;
    section(c, "rings and gates", rings)
}

fn load_fs(c: &mut Code<'_>, selector: u16) -> Done {
    c.mov(eax, u32::from(selector))?;
    Ok(c.mov(fs, eax)?)
}

fn limits(c: &mut Code<'_>) -> Done {
    c.mov(dword_ptr(SCRATCH + 12), 0x600d_0001u32)?;
    load_fs(c, SMALL)?;
    c.mov(ebx, dword_ptr(12u32).fs())?;
    check(c, ebx, 0x600d_0001)?;
    c.mov(byte_ptr(15u32).fs(), 0x61u32)?;
    check_memory(c, SCRATCH + 12, 0x610d_0001)?;
    for offset in [13u32, 14, 15, 16, 0xffff_fffd] {
        raises(c, vector::GP, 0, |c| Ok(c.mov(ebx, dword_ptr(offset).fs())?))?;
    }
    raises(c, vector::GP, 0, |c| Ok(c.mov(byte_ptr(16u32).fs(), 1u32)?))?;
    load_fs(c, DOWN)?;
    for offset in [0u32, 0xfffc, 0xffff] {
        raises(c, vector::GP, 0, |c| Ok(c.mov(ebx, dword_ptr(offset).fs())?))?;
    }
    c.mov(ebx, dword_ptr(SCRATCH + 12).fs())?;
    check(c, ebx, 0x610d_0001)
}

fn types(c: &mut Code<'_>) -> Done {
    load_fs(c, READ_ONLY)?;
    c.mov(ebx, dword_ptr(12u32).fs())?;
    check(c, ebx, 0x610d_0001)?;
    raises(c, vector::GP, 0, |c| Ok(c.mov(dword_ptr(12u32).fs(), 0)?))?;
    check_memory(c, SCRATCH + 12, 0x610d_0001)?;
    load_fs(c, 0)?;
    raises(c, vector::GP, 0, |c| Ok(c.mov(ebx, dword_ptr(0u32).fs())?))?;
    load_fs(c, 3)?;
    raises(c, vector::GP, 0, |c| Ok(c.mov(ebx, dword_ptr(0u32).fs())?))?;
    // Code can be read through CS, not written.
    c.mov(ebx, dword_ptr(SCRATCH + 12).cs())?;
    check(c, ebx, 0x610d_0001)?;
    raises(c, vector::GP, 0, |c| Ok(c.mov(dword_ptr(SCRATCH + 12).cs(), 0)?))
}

fn loading(c: &mut Code<'_>) -> Done {
    let cases = [
        (fs, EXECUTE_ONLY, vector::GP, EXECUTE_ONLY),
        (fs, ABSENT, vector::NP, ABSENT),
        (fs, TSS, vector::GP, TSS),
        (fs, GATE, vector::GP, GATE),
        (ss, ABSENT, vector::SS, ABSENT),
        (ss, READ_ONLY, vector::GP, READ_ONLY),
        (ss, USER_DATA, vector::GP, USER_DATA & !3),
        (ss, CONFORMING, vector::GP, CONFORMING),
    ];
    for (segment, selector, vector, code) in cases {
        raises(c, vector, u32::from(code), |c| {
            c.mov(eax, u32::from(selector))?;
            Ok(c.mov(segment, eax)?)
        })?;
    }
    // A conforming segment keeps the CPL.
    let after = c.fresh_name();
    let at = c.address(&after);
    c.jmp_far(CONFORMING, at)?;
    c.name(&after)?;
    c.mov(eax, cs)?;
    check(c, eax, u32::from(CONFORMING))?;
    let home = c.fresh_name();
    let at = c.address(&home);
    c.jmp_far(selector::CODE32, at)?;
    c.name(&home)?;
    c.mov(eax, cs)?;
    check(c, eax, u32::from(selector::CODE32))?;
    raises(c, vector::NP, u32::from(ABSENT_GATE), |c| Ok(c.call_far(ABSENT_GATE, 0)?))?;
    // A task-state segment is busy once it is loaded.
    c.mov(eax, u32::from(TSS))?;
    c.ltr(ax)?;
    raises(c, vector::GP, u32::from(TSS), |c| {
        c.mov(eax, u32::from(TSS))?;
        Ok(c.ltr(ax)?)
    })?;
    c.str(eax)?;
    check(c, eax, u32::from(TSS))
}

fn look(c: &mut Code<'_>) -> Done {
    c.mov(ecx, u32::from(SMALL))?;
    c.lar(eax, ecx)?;
    check_zero_flag(c)?;
    check(c, eax, 0x0040_9300)?;
    c.lsl(eax, ecx)?;
    check(c, eax, 0xf)?;
    c.mov(ecx, u32::from(selector::DATA32))?;
    c.lsl(eax, ecx)?;
    check(c, eax, u32::MAX)?;
    for (selector, readable, writable) in [
        (SMALL, true, true),
        (READ_ONLY, true, false),
        (EXECUTE_ONLY, false, false),
        (TSS, false, false),
        (0, false, false),
    ] {
        c.mov(ecx, u32::from(selector))?;
        for (write, expected) in [(false, readable), (true, writable)] {
            if write {
                c.verw(cx)?
            } else {
                c.verr(cx)?
            }
            c.sete(bl)?;
            c.movzx(ebx, bl)?;
            check(c, ebx, u32::from(expected))?;
        }
    }
    Ok(())
}

/// To ring 3 by IRET, into ring 0 by exceptions and a call gate, back by another gate.
fn rings(c: &mut Code<'_>) -> Done {
    let user = c.address("user");
    c.push(i32::from(USER_DATA))?;
    c.push(USER_STACK)?;
    c.push(0x3002)?;
    c.push(i32::from(USER_CODE))?;
    c.push(user)?;
    c.iretd()?;
    gate(c)?;
    c.name("user")?;
    // Data segments of ring 0 are out of reach now.
    c.mov(eax, ds)?;
    check_in_user(c, eax, 0)?;
    c.mov(eax, u32::from(USER_DATA))?;
    c.mov(ds, eax)?;
    c.mov(es, eax)?;
    let (checks, fails) = (c.dword(variable::CHECKS), c.dword(variable::FAILS));
    c.mov(checks, 0)?;
    c.mov(fails, 0)?;
    user_mode(c)?;
    c.call_far(RETURN_GATE, 0)?;
    c.name("return gate")?;
    c.mov(eax, cs)?;
    check(c, eax, u32::from(selector::CODE32))?;
    c.mov(eax, u32::from(selector::DATA32))?;
    for segment in [ds, es, ss] {
        c.mov(segment, eax)?;
    }
    Ok(c.mov(esp, STACK_TOP)?)
}

/// DS is null: nothing can be counted yet; a wrong value stops with an exception that nobody expects.
fn check_in_user(c: &mut Code<'_>, register: AsmRegister32, value: u32) -> Done {
    let mut fine = c.create_label();
    c.cmp(register, value)?;
    c.je(fine)?;
    c.ud2()?;
    Ok(c.set_label(&mut fine)?)
}

/// The call gate's routine: one parameter is copied to the inner stack.
fn gate(c: &mut Code<'_>) -> Done {
    c.name("gate")?;
    c.mov(eax, esp)?;
    c.mov(dword_ptr(SCRATCH), eax)?;
    c.mov(eax, dword_ptr(esp + 8))?;
    c.mov(dword_ptr(SCRATCH + 4), eax)?;
    c.mov(eax, ss)?;
    c.mov(dword_ptr(SCRATCH + 8), eax)?;
    Ok(c.retf_1(4)?)
}

fn user_mode(c: &mut Code<'_>) -> Done {
    let fault = |c: &mut Code<'_>, vector: u8, code: u32, body: &dyn Fn(&mut Code<'_>) -> Done| -> Done {
        raises(c, vector, code, body)?;
        Ok(c.mov(esp, USER_STACK)?)
    };
    c.mov(eax, cs)?;
    check(c, eax, u32::from(USER_CODE))?;
    fault(c, vector::GP, 0, &|c| Ok(c.hlt()?))?;
    fault(c, vector::GP, 0, &|c| Ok(c.mov(eax, cr0)?))?;
    fault(c, vector::GP, 0, &|c| Ok(c.clts()?))?;
    fault(c, vector::GP, 0, &|c| Ok(c.lgdt(fword_ptr(SCRATCH))?))?;
    fault(c, vector::GP, 0, &|c| Ok(c.rdmsr()?))?;
    fault(c, vector::GP, 0, &|c| Ok(c.invlpg(byte_ptr(SCRATCH))?))?;
    // The gates have DPL 0.
    fault(c, vector::GP, 14 * 8 + 2, &|c| Ok(c.int(14)?))?;
    fault(c, vector::GP, 3 * 8 + 2, &|c| Ok(c.int3()?))?;
    fault(c, vector::UD, 0, &|c| Ok(c.ud2()?))?;
    fault(c, vector::DE, 0, &|c| {
        c.xor(ecx, ecx)?;
        Ok(c.div(ecx)?)
    })?;
    fault(c, vector::GP, u32::from(selector::DATA32), &|c| {
        c.mov(eax, u32::from(selector::DATA32))?;
        Ok(c.mov(fs, eax)?)
    })?;
    fault(c, vector::GP, u32::from(selector::CODE32), &|c| Ok(c.jmp_far(selector::CODE32, 0)?))?;
    fault(c, vector::NP, u32::from(ABSENT_GATE), &|c| Ok(c.call_far(ABSENT_GATE | 3, 0)?))?;
    // IOPL 3: I/O and CLI are allowed.
    c.cli()?;
    c.mov(dx, 0x80u32)?;
    c.out(dx, al)?;
    c.push(0x1234_5678)?;
    c.call_far(GATE | 3, 0xdead)?;
    c.mov(eax, esp)?;
    check(c, eax, USER_STACK)?;
    c.mov(eax, ss)?;
    check(c, eax, u32::from(USER_DATA))?;
    // SS, ESP, the parameter, CS, EIP.
    check_memory(c, SCRATCH, INNER_STACK - 20)?;
    check_memory(c, SCRATCH + 4, 0x1234_5678)?;
    check_memory(c, SCRATCH + 8, u32::from(selector::DATA32))
}
