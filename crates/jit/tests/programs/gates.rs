//! INT n, IRETQ and POPFQ while gates, descriptors, the TSS, tables' limits, stacks and flags change under them.

use super::events::*;
use super::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// A second code segment of ring 0.
const OTHER_CODE: u64 = 0x40;
const OTHER_IDT: u64 = 0x3_0000;
/// What LIDT and LGDT read, 16 bytes apart.
const POINTERS: u64 = DATA + 0x1d00;
/// RSP that handlers of the user's events begin with.
const RSP0: u64 = TSS + 4;
/// A handler that is IRETQ and nothing else.
const PLAIN: u64 = HANDLERS + 0x500;
const GATE: u64 = BIG_IDT + 16 * 0x80;

fn gate(handler: u64, selector: u64, kind: u64, ist: u64) -> u64 {
    handler & 0xffff | selector << 16 | ist << 32 | kind << 40 | (handler >> 16) << 48
}

fn code(attr: u16) -> u64 {
    descriptor::encode(0, u32::MAX, Attr(attr.into()))
}

/// Quadwords that change: their addresses, what they are at the loop's begin, what else they may be.
fn changes() -> Vec<(u64, u64, Vec<u64>)> {
    let returning = HANDLERS + 0x300;
    let plain = gate(returning, 8, 0xee, 0);
    vec![
        (
            GATE,
            plain,
            vec![
                gate(returning, 8, 0xef, 0),
                gate(returning, 8, 0x8e, 0),
                gate(returning, 8, 0x6e, 0),
                gate(returning, 8, 0xee, 1),
                gate(returning, 8, 0xec, 0),
                gate(returning, 8, 0xfe, 0),
                gate(returning, OTHER_CODE, 0xee, 0),
                gate(returning, OTHER_CODE | 3, 0xee, 0),
                gate(returning, 0, 0xee, 0),
                gate(returning, 16, 0xee, 0),
                gate(returning, USER_CODE, 0xee, 0),
                gate(returning, 0x100, 0xee, 0),
                gate(HANDLERS + 0x200, 8, 0xee, 0),
            ],
        ),
        (GATE + 8, 0, vec![0x8000, 0xffff_8000]),
        (
            GDT + OTHER_CODE,
            code(0xa09b),
            vec![code(0xa09a), code(0xa01b), code(0xa09f), code(0xa0fb), code(0xc09b), code(0xc093), code(0xb09b), 0],
        ),
        (
            GDT + (USER_CODE & !7),
            code(0xa0fb),
            vec![code(0xa0fa), code(0xa07b), code(0xb0fb), code(0xa0ff), code(0xa09b)],
        ),
        (
            GDT + (USER_DATA & !7),
            code(0xc0f3),
            vec![code(0xc0f2), code(0xc073), code(0xd0f3), code(0xc0f1), code(0xc093)],
        ),
        (RSP0, STACK + 0x400, vec![STACK + 0x403, 0x8_1010, 0x8_0ff8, 0x9_0000, 0x8000_0000_0000]),
        (TSS + 0x24, 0x9_0800, vec![0x9_0805]),
    ]
}

/// Stores a quadword.
fn put(a: &mut CodeAssembler, at: u64, value: u64) -> Result<(), IcedError> {
    a.mov(rax, value)?;
    a.mov(qword_ptr(at as i32), rax)
}

fn change(a: &mut CodeAssembler, c: &mut Choice) -> Result<(), IcedError> {
    let list = changes();
    match c.take(list.len() as u64 + 6) {
        0 => a.lidt(fword_ptr(POINTERS as i32 + 16 * c.take(3) as i32)),
        1 => a.lgdt(fword_ptr(POINTERS as i32 + 16 * (3 + c.take(3)) as i32)),
        2 => {
            a.mov(eax, [0, 16, USER_DATA as i32][c.take(3) as usize])?;
            match c.take(4) {
                0 => a.mov(ds, eax),
                1 => a.mov(es, eax),
                2 => a.mov(fs, eax),
                _ => a.mov(gs, eax),
            }
        }
        3 => {
            a.mov(eax, top_table(c.take(6)) as i32)?;
            a.mov(cr3, rax)
        }
        4 => a.mov(rsp, [STACK, STACK + 0x105, 0x8_1018, 0x8_1008, READ_ONLY as u64 + 0x800][c.take(5) as usize]),
        5 => {
            a.push(FLAGS[c.take(FLAGS.len() as u64) as usize] as i32)?;
            a.popfq()
        }
        n => {
            let (at, _, others) = &list[n as usize - 6];
            put(a, *at, others[c.take(others.len() as u64) as usize])
        }
    }
}

fn crossing(a: &mut CodeAssembler, c: &mut Choice) -> Result<(), IcedError> {
    let mut next = a.create_label();
    let flags = FLAGS[c.take(FLAGS.len() as u64) as usize];
    a.lea(r15, ptr(next))?;
    a.mov(r12, r15)?;
    match c.take(7) {
        0 | 1 => a.int(0x80)?,
        2 => a.int(0x81)?,
        3 | 4 => {
            let to = USER + 0x100 * [0, 3, 4, 11, c.take(USER_CODES)][c.take(5) as usize];
            a.lea(rbx, ptr(next))?;
            for value in [USER_DATA, USER_STACK + 0x800, flags & 0x3f_ffff, USER_CODE, to] {
                a.push(value as i32)?;
            }
            a.iretq()?;
        }
        5 => {
            let stack = [16, 0, 16, USER_DATA, 1][c.take(5) as usize] as i32;
            let code = [8, OTHER_CODE as i32, 8, 16][c.take(4) as usize];
            a.mov(rcx, rsp)?;
            a.lea(rdx, ptr(next))?;
            a.push(stack)?;
            a.push(rcx)?;
            a.push((flags & 0x3f_ffff) as i32)?;
            a.push(code)?;
            a.push(rdx)?;
            a.iretq()?;
        }
        _ => {
            a.push(flags as i32)?;
            a.popfq()?;
        }
    }
    a.set_label(&mut next)?;
    Ok(())
}

/// A loop that begins with everything as it was.
fn crossings(body: &[u64]) -> Vec<u8> {
    assembled(CODE, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(rsp, STACK)?;
        for (at, first, _) in changes() {
            put(a, at, first)?;
        }
        a.lidt(fword_ptr(POINTERS as i32))?;
        a.lgdt(fword_ptr(POINTERS as i32 + 48))?;
        for &number in body {
            let mut c = Choice(number);
            if c.take(3) == 0 { change(a, &mut c)? } else { crossing(a, &mut c)? }
        }
        a.dec(dword_ptr(COUNTER))?;
        a.jnz(again)?;
        a.hlt()
    })
}

fn prepared(code: &[u8]) -> Arc<GuestMemory> {
    let mem = rings(code);
    let mut idt = vec![0; 0x1000];
    mem.read(Gpa::new(BIG_IDT), &mut idt);
    mem.write(Gpa::new(OTHER_IDT), &idt);
    mem.write(Gpa::new(PLAIN), &[0x48, 0xcf]);
    // Another handler of the vector.
    mem.write(Gpa::new(OTHER_IDT + 16 * 0x80), &gate(HANDLERS + 0x300, 8, 0xef, 0).to_le_bytes());
    let pointers = [
        (BIG_IDT, 0xfff),
        (BIG_IDT, 16 * 0x80 + 14),
        (OTHER_IDT, 0xfff),
        (GDT, 0xff),
        (GDT, USER_CODE as u16 + 2),
        (GDT, OTHER_CODE as u16 + 6),
    ];
    for (n, (base, limit)) in pointers.into_iter().enumerate() {
        let at = POINTERS + 16 * n as u64;
        mem.write(Gpa::new(at), &limit.to_le_bytes());
        mem.write(Gpa::new(at + 2), &base.to_le_bytes());
    }
    mem
}

fn compare_crossings(
    body: &[u64],
    data: u64,
    options: JitOptions,
    stops: &[(u64, u8)],
) -> Result<JitStats, TestCaseError> {
    let code = crossings(body);
    compare_in(|| prepared(&code), data, options, stops)
}

proptest! {
    #![proptest_config(ProptestConfig::default())]

    #[test]
    fn gates_may_change_at_any_time(
        body in prop::collection::vec(any::<u64>(), 1..10),
        data in 0..256u64,
        pieces in prop::collection::vec((1..600u64, 0..6u8), 0..20),
        mechanism in 0..40usize,
    ) {
        compare_crossings(&body, data, without(mechanism), &stops(&pieces))?;
    }
}

#[test]
fn crossings_call_no_functions() {
    let code = assembled(CODE, |a| {
        let (mut again, mut next, mut inner) = (a.create_label(), a.create_label(), a.create_label());
        put(a, GATE, gate(PLAIN, 8, 0xee, 0))?;
        a.set_label(&mut again)?;
        a.mov(rsp, STACK)?;
        a.int(0x80)?;
        for stack in [16, 0] {
            a.mov(rcx, rsp)?;
            a.lea(rdx, ptr(next))?;
            a.push(stack)?;
            a.push(rcx)?;
            a.push(0x1_0002)?;
            a.push(8)?;
            a.push(rdx)?;
            a.iretq()?;
            a.set_label(&mut next)?;
            next = a.create_label();
        }
        a.lea(rbx, ptr(inner))?;
        for value in [USER_DATA, USER_STACK + 0x800, 2, USER_CODE, USER + 0x300] {
            a.push(value as i32)?;
        }
        a.iretq()?;
        a.set_label(&mut inner)?;
        a.pushfq()?;
        a.popfq()?;
        a.dec(dword_ptr(COUNTER))?;
        a.jnz(again)?;
        a.hlt()
    });
    let run = |off| compare_in(|| prepared(&code), 0, JitOptions { off, ..SMALL }, &[(TICKS, 0)]).unwrap();
    let (all, without) = (run(Mechanisms::NONE), run(Mechanisms::NONE.with(Mechanism::Views)));
    assert!(5 * all.ops_by_helper < without.ops_by_helper, "{all}\n{without}");
}
