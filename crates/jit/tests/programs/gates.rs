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
/// Of the page table: that of the user's stack.
const STACK_ENTRY: u64 = LAST_TABLE + 8 * ((USER_STACK - USER) >> 12);
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
        // Where the user's stack is.
        (STACK_ENTRY, USER_STACK | 7, vec![DATA + 0x3_0007, DATA + 0x3_0005, 6, USER_STACK | 7]),
    ]
}

/// Stores a quadword.
fn put(a: &mut CodeAssembler, at: u64, value: u64) -> Result<(), IcedError> {
    a.mov(rax, value)?;
    a.mov(qword_ptr(at as i32), rax)
}

/// Something that INT n or IRETQ go by becomes something else.
#[derive(Clone, Copy, Debug)]
enum Change {
    Word {
        at: u64,
        value: u64,
    },
    /// LIDT or LGDT of one of [`POINTERS`].
    Table(i32),
    /// A selector in DS, ES, FS or GS.
    Segment {
        which: u64,
        selector: i32,
    },
    Root(u64),
    Stack(u64),
    Flags(u64),
}

impl Change {
    fn all() -> Vec<Self> {
        let words = changes().into_iter().flat_map(|(at, _, others)| others.into_iter().map(move |value| (at, value)));
        let words = words.map(|(at, value)| Self::Word { at, value });
        let selectors = [0, 16, USER_DATA as i32];
        let segments = (0..12).map(|n| Self::Segment { which: n / 3, selector: selectors[n as usize % 3] });
        let stacks = [STACK, STACK + 0x105, 0x8_1018, 0x8_1008, READ_ONLY as u64 + 0x800].map(Self::Stack);
        let others = (0..6).map(Self::Table).chain((0..6).map(Self::Root)).chain(stacks).chain(FLAGS.map(Self::Flags));
        words.chain(segments).chain(others).collect()
    }

    fn make(self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        match self {
            Self::Word { at, value } => put(a, at, value),
            Self::Table(n @ 0..3) => a.lidt(fword_ptr(POINTERS as i32 + 16 * n)),
            Self::Table(n) => a.lgdt(fword_ptr(POINTERS as i32 + 16 * n)),
            Self::Segment { which, selector } => {
                a.mov(eax, selector)?;
                match which {
                    0 => a.mov(ds, eax),
                    1 => a.mov(es, eax),
                    2 => a.mov(fs, eax),
                    _ => a.mov(gs, eax),
                }
            }
            Self::Root(n) => {
                a.mov(eax, top_table(n) as i32)?;
                a.mov(cr3, rax)
            }
            Self::Stack(pointer) => a.mov(rsp, pointer),
            Self::Flags(flags) => {
                a.push(flags as i32)?;
                a.popfq()
            }
        }
    }
}

/// What goes by it.
#[derive(Clone, Copy, Debug)]
enum Crossing {
    Interrupt(i32),
    /// IRETQ to code of the user.
    User {
        which: u64,
        flags: u64,
    },
    /// IRETQ to ring 0.
    Same {
        code: i32,
        stack: i32,
        flags: u64,
    },
}

impl Crossing {
    fn any(c: &mut Choice) -> Self {
        let flags = FLAGS[c.take(FLAGS.len() as u64) as usize];
        match c.take(6) {
            0 | 1 => Self::Interrupt(0x80),
            2 => Self::Interrupt(0x81),
            3 | 4 => Self::User { which: [0, 3, 4, 11, c.take(USER_CODES)][c.take(5) as usize], flags },
            _ => {
                let stack = [16, 0, 16, USER_DATA as i32, 1][c.take(5) as usize];
                let code = [8, OTHER_CODE as i32, 8, 16, 0][c.take(5) as usize];
                Self::Same { code, stack, flags }
            }
        }
    }

    fn make(self, a: &mut CodeAssembler) -> Result<(), IcedError> {
        let mut next = a.create_label();
        a.lea(r15, ptr(next))?;
        a.mov(r12, r15)?;
        match self {
            Self::Interrupt(vector) => a.int(vector)?,
            Self::User { which, flags } => {
                a.lea(rbx, ptr(next))?;
                to_user(a, USER + 0x100 * which, flags & 0x3f_ffff)?;
            }
            Self::Same { code, stack, flags } => {
                a.mov(rcx, rsp)?;
                a.lea(rdx, ptr(next))?;
                a.push(stack)?;
                a.push(rcx)?;
                a.push((flags & 0x3f_ffff) as i32)?;
                a.push(code)?;
                a.push(rdx)?;
                a.iretq()?;
            }
        }
        a.set_label(&mut next)
    }
}

/// IRETQ to the user at `to` with these flags.
fn to_user(a: &mut CodeAssembler, to: u64, flags: u64) -> Result<(), IcedError> {
    for value in [USER_DATA, USER_STACK + 0x800, flags, USER_CODE, to] {
        a.push(value as i32)?;
    }
    a.iretq()
}

/// A loop that begins with everything as it was.
fn looped(body: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    assembled(CODE, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(rsp, STACK)?;
        for (at, first, _) in changes() {
            put(a, at, first)?;
        }
        Change::Table(0).make(a)?;
        Change::Table(3).make(a)?;
        body(a)?;
        a.dec(dword_ptr(COUNTER))?;
        a.jnz(again)?;
        a.hlt()
    })
}

fn crossings(body: &[u64]) -> Vec<u8> {
    let all = Change::all();
    looped(|a| {
        body.iter().try_for_each(|&number| {
            let mut c = Choice(number);
            match c.take(3) {
                0 => all[c.take(all.len() as u64) as usize].make(a),
                _ => Crossing::any(&mut c).make(a),
            }
        })
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

proptest! {
    #![proptest_config(ProptestConfig::default())]

    #[test]
    fn gates_may_change_at_any_time(
        body in prop::collection::vec(any::<u64>(), 1..10),
        data in 0..256u64,
        pieces in prop::collection::vec((1..600u64, 0..6u8), 0..20),
        mechanism in 0..40usize,
    ) {
        let code = crossings(&body);
        compare_in(|| prepared(&code), data, without(mechanism), &stops(&pieces))?;
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
        to_user(a, USER + 0x300, 2)?;
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

/// What is known of the user's stack doesn't outlive its page, and nothing else that is known of the user ends with it.
#[test]
fn the_users_stack_may_move() {
    const ROUNDS: u64 = 40;
    let code = assembled(CODE, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        for (page, flags) in [(USER_STACK, 2), (DATA + 0x3_0000, 0x8d7)] {
            let mut back = a.create_label();
            put(a, STACK_ENTRY, page | 7)?;
            a.mov(rsp, STACK)?;
            a.lea(rbx, ptr(back))?;
            // PUSHFQ, POP
            to_user(a, USER + 0x400, flags)?;
            a.set_label(&mut back)?;
        }
        a.dec(dword_ptr(COUNTER))?;
        a.jnz(again)?;
        a.hlt()
    });
    let stats = compare_in(|| prepared(&code), 0, SMALL, &[(TICKS, 0)]).unwrap();
    // A store to the table and the first access to the page that is there now.
    assert!(stats.ops_by_helper <= 4 * ROUNDS, "{stats}");
}

/// Each change behind each other one, with all that goes by it between them.
#[test]
fn every_pair_of_changes() {
    let crossings = [
        Crossing::Interrupt(0x80),
        Crossing::User { which: 3, flags: 2 },
        Crossing::Same { code: OTHER_CODE as i32, stack: 16, flags: 2 },
        Crossing::Same { code: 8, stack: 0, flags: 0x1_0002 },
    ];
    let all: Vec<_> = Change::all().into_iter().filter(|change| !matches!(change, Change::Flags(_))).collect();
    for (first, second) in all.iter().flat_map(|first| all.iter().map(move |second| (first, second))) {
        let code = looped(|a| {
            [first, second].into_iter().try_for_each(|change| {
                change.make(a)?;
                crossings.iter().try_for_each(|crossing| crossing.make(a))
            })?;
            // By what is known from the first time.
            crossings.iter().try_for_each(|crossing| crossing.make(a))
        });
        let result = compare_in(|| prepared(&code), 0, SMALL, &[(TICKS / 8, 0)]);
        assert!(result.is_ok(), "{first:x?}, {second:x?}: {result:?}");
    }
}

/// SYSCALL and SYSRET load what IA32_STAR says by now.
#[test]
fn the_segments_of_system_calls_may_change() {
    let code = looped(|a| {
        for code in [8, OTHER_CODE as i32] {
            let mut back = a.create_label();
            a.mov(ecx, 0xc000_0081u32)?;
            a.xor(eax, eax)?;
            a.mov(edx, (24 | 3) << 16 | code)?;
            a.wrmsr()?;
            a.lea(rbx, ptr(back))?;
            a.mov(ecx, USER as i32)?;
            a.mov(r11d, 2)?;
            a.sysretq()?;
            a.set_label(&mut back)?;
            a.mov(eax, cs)?;
            a.mov(edx, ss)?;
            a.lea(rax, ptr(rax + rdx * 4))?;
            a.add(dword_ptr(DATA as i32), eax)?;
            a.rol(dword_ptr(DATA as i32), 1)?;
        }
        Ok(())
    });
    compare_in(|| prepared(&code), 0, SMALL, &[(TICKS, 0)]).unwrap();
}

/// Nothing is known of any segment when this comes first.
#[test]
fn each_crossing_by_itself() {
    let selectors = [0, 1, 8, 16, USER_DATA as i32, OTHER_CODE as i32];
    let pairs = selectors.iter().flat_map(|&code| selectors.map(|stack| (code, stack)));
    let returns = pairs.map(|(code, stack)| Crossing::Same { code, stack, flags: 2 });
    let users = (0..USER_CODES).map(|which| Crossing::User { which, flags: 2 });
    for crossing in returns.chain(users).chain([0x80, 0x81].map(Crossing::Interrupt)) {
        let code = looped(|a| crossing.make(a));
        let result = compare_in(|| prepared(&code), 0, SMALL, &[(TICKS / 8, 0)]);
        assert!(result.is_ok(), "{crossing:x?}: {result:?}");
    }
}

/// Two rounds as usual, two with RFLAGS.NT set: #GP then, whose handler goes on behind.
#[test]
fn a_nested_task_does_not_return() {
    let code = looped(|a| {
        let mut next = a.create_label();
        a.lea(r15, ptr(next))?;
        a.mov(r12, r15)?;
        a.mov(eax, dword_ptr(COUNTER))?;
        a.and(eax, 2)?;
        a.shl(eax, 13)?;
        a.mov(rdx, rsp)?;
        a.push(16)?;
        a.push(rdx)?;
        a.push(2)?;
        a.push(8)?;
        a.push(r15)?;
        a.push(rax)?;
        a.popfq()?;
        a.iretq()?;
        a.set_label(&mut next)?;
        a.pushfq()?;
        a.pop(rax)?;
        a.add(dword_ptr(DATA as i32), eax)?;
        a.rol(dword_ptr(DATA as i32), 1)
    });
    compare_in(|| prepared(&code), 0, SMALL, &[(TICKS, 0)]).unwrap();
}

/// IRETQ of ring 3 changes neither IF nor IOPL.
#[test]
fn the_users_return_changes_no_privileged_flags() {
    let at = USER + 0x900;
    let code = looped(|a| {
        let mut back = a.create_label();
        a.lea(rbx, ptr(back))?;
        to_user(a, at, 2)?;
        a.set_label(&mut back)
    });
    let user = assembled(at, |a| {
        let mut next = a.create_label();
        a.lea(rax, ptr(next))?;
        for value in [USER_DATA, USER_STACK + 0x700, 0x3202, USER_CODE] {
            a.push(value as i32)?;
        }
        a.push(rax)?;
        a.iretq()?;
        a.set_label(&mut next)?;
        a.pushfq()?;
        a.pop(rax)?;
        a.add(r8, rax)?;
        a.rol(r8, 1)?;
        a.int(0x82)
    });
    let memory = || {
        let mem = prepared(&code);
        mem.write(Gpa::new(at), &user);
        // The user may read the GDT.
        mem.write(Gpa::new(TABLES + 0x2000), &[0x87]);
        mem
    };
    let stats = compare_in(memory, 0, SMALL, &[(TICKS, 0)]).unwrap();
    assert!(stats.ops_translated > 500, "{stats}");
}
