//! Faults, interrupts, system calls and switches of rights between the blocks of translated code.

use super::*;
use iced_x86::code_asm::*;

pub(super) const BIG_IDT: u64 = 0x6000;
pub(super) const TSS: u64 = 0x7000;
pub(super) const LAST_TABLE: u64 = 0x5000;
const OTHER_TABLES: u64 = 0xc000;
pub(super) const HANDLERS: u64 = 0xa000;
const ENTRY: u64 = 0xb000;
/// What handlers saw, mixed.
pub(super) const LOG: i32 = DATA as i32 + 0x1f00;
pub(super) const COUNTER: i32 = DATA as i32 + 0x1800;
pub(super) const USER: u64 = 0x20_0000;
pub(super) const USER_STACK: u64 = 0x20_8000;
/// Code of the user that runs as 32-bit code, too.
const USER_32: u64 = USER + 0x1000;
pub(super) const ABSENT: i32 = 0x21_0000;
pub(super) const READ_ONLY: i32 = 0x21_1000;
/// Of the supervisor.
const PRIVATE: i32 = 0x21_2000;
pub(super) const USER_CODE: u64 = 40 | 3;
pub(super) const USER_DATA: u64 = 32 | 3;
/// RFLAGS to be loaded: IF, TF, AC, RF, DF, IOPL, status flags, bits that don't exist.
pub(super) const FLAGS: [u64; 12] =
    [2, 0x202, 0x202, 0x102, 0x302, 0x4_0002, 0x4_0202, 0x1_0002, 0x1_0302, 0x3602, 0x8d7, 0x3f_ffd7];

pub(super) fn assembled(at: u64, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    write(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// Mixes the flags of the frame `below` bytes above RSP, its RIP and what is under it into the log.
fn log(a: &mut CodeAssembler, below: i32) -> Result<(), IcedError> {
    a.push(rax)?;
    for at in [below + 0x18, below + 8, 8] {
        a.mov(rax, qword_ptr(rsp + at))?;
        a.add(qword_ptr(LOG), rax)?;
        a.rol(qword_ptr(LOG), 7)?;
    }
    a.mov(rax, cr2)?;
    a.xor(qword_ptr(LOG), rax)?;
    a.pop(rax)
}

/// Handlers: of faults with an error code and without, which go on at R15 and take R12 for the next time; of traps, which
/// clear TF; of all others.
fn handlers() -> Vec<(u64, Vec<u8>)> {
    let skipping = |code: i32| {
        move |a: &mut CodeAssembler| {
            log(a, code)?;
            a.add(rsp, code)?;
            a.mov(qword_ptr(rsp), r15)?;
            a.mov(r15, r12)?;
            a.iretq()
        }
    };
    let untracing = |a: &mut CodeAssembler| {
        log(a, 0)?;
        a.and(qword_ptr(rsp + 0x10), !0x100)?;
        a.iretq()
    };
    let returning = |a: &mut CodeAssembler| {
        log(a, 0)?;
        a.iretq()
    };
    vec![
        (HANDLERS, assembled(HANDLERS, skipping(8))),
        (HANDLERS + 0x100, assembled(HANDLERS + 0x100, skipping(0))),
        (HANDLERS + 0x200, assembled(HANDLERS + 0x200, untracing)),
        (HANDLERS + 0x300, assembled(HANDLERS + 0x300, returning)),
        (HANDLERS + 0x400, assembled(HANDLERS + 0x400, |a| a.mov(rsp, STACK).and_then(|()| a.jmp(rbx)))),
        (ENTRY, assembled(ENTRY, |a| a.jmp(rbx))),
    ]
}

pub(super) fn rings(code: &[u8]) -> Arc<GuestMemory> {
    let mem = memory(code, 3);
    let put = |at: u64, value: u64| mem.write(Gpa::new(at), &value.to_le_bytes());
    put(GDT + 24, descriptor::encode(0, u32::MAX, Attr(0xc0fb)));
    put(GDT + 32, descriptor::encode(0, u32::MAX, Attr(0xc0f3)));
    put(GDT + 40, descriptor::encode(0, u32::MAX, Attr(0xa0fb)));
    for vector in 0..256 {
        let (handler, kind) = match vector {
            1 => (HANDLERS + 0x200, 0x8e),
            8 | 10..=14 | 17 => (HANDLERS, 0x8e),
            // A trap gate: IF stays.
            6 => (HANDLERS + 0x100, 0x8f),
            0x80 => (HANDLERS + 0x300, 0xee),
            0x81 => (HANDLERS + 0x300, 0xef),
            0x82 => (HANDLERS + 0x400, 0xee),
            2 | 0x20.. => (HANDLERS + 0x300, 0x8e),
            _ => (HANDLERS + 0x100, 0x8e),
        };
        put(BIG_IDT + 16 * vector, handler & 0xffff | 8 << 16 | kind << 40 | (handler >> 16) << 48);
    }
    mem.write(Gpa::new(TSS + 4), &(STACK + 0x400).to_le_bytes());
    put(TABLES, TABLES + 0x1007);
    put(TABLES + 0x1000, TABLES + 0x2007);
    put(TABLES + 0x2008, LAST_TABLE | 7);
    for page in 0..512u64 {
        put(LAST_TABLE + 8 * page, (USER + 0x1000 * page) | 7);
    }
    for (page, rights) in [(ABSENT, 0), (READ_ONLY, 1), (PRIVATE, 3)] {
        put(LAST_TABLE + 8 * ((page as u64 - USER) >> 12), page as u64 | rights);
    }
    // The topmost table at other places; half of them map the user's stack to another page, and all pages are the user's.
    (1..6).for_each(|n| put(top_table(n), if n & 1 == 0 { TABLES + 0x1007 } else { OTHER_TABLES | 7 }));
    put(OTHER_TABLES, OTHER_TABLES + 0x1007);
    put(OTHER_TABLES + 0x1000, 0x83);
    put(OTHER_TABLES + 0x1008, OTHER_TABLES + 0x2007);
    for page in 0..512u64 {
        let frame = if USER + 0x1000 * page == USER_STACK { DATA + 0x2_0000 } else { USER + 0x1000 * page };
        put(OTHER_TABLES + 0x2000 + 8 * page, frame | 7);
    }
    handlers().iter().for_each(|(at, bytes)| mem.write(Gpa::new(*at), bytes));
    for which in 0..USER_CODES {
        let at = USER + 0x100 * which;
        mem.write(Gpa::new(at), &assembled(at, |a| user(a, which)));
    }
    // inc eax; nop; inc eax; nop; int 0x82, or in 64-bit mode two NOPs with REX and INT
    mem.write(Gpa::new(USER_32), &[0x40, 0x90, 0x40, 0x90, 0xcd, 0x82]);
    mem
}

pub(super) fn ring_0(data: u64) -> CpuState {
    let mut s = start(8);
    s.cr0 = Cr0::new(0x8001_0033 | (data & 1) << 18);
    // FSGSBASE and PGE, now and then SMEP and SMAP.
    s.cr4 = Cr4::new(0x1_06a0 | (data >> 1 & 3) << 20);
    // Now and then too short for a stack pointer.
    let limit = if data % 32 == 31 { 10 } else { 0x67 };
    s.seg[Seg::Tr as usize] = Segment { selector: 48, base: TSS, limit, attr: Attr(0x8b) };
    s.gdtr = TableRegister { base: GDT, limit: 0xff };
    s.idtr = TableRegister { base: BIG_IDT, limit: 0xfff };
    s.msr.star = (24 | 3) << 48 | 8 << 32;
    s.msr.lstar = ENTRY;
    s.msr.fmask = [0x700, 0x4_7700, 0, 0x4_0000, 0x25_7fd5, 0x200][(data >> 3) as usize % 6];
    s.msr.kernel_gs_base = DATA + 0x100;
    s.gpr[4] = STACK;
    s
}

pub(super) const USER_CODES: u64 = 12;

/// Code of the user, which ends with SYSCALL.
fn user(a: &mut CodeAssembler, which: u64) -> Result<(), IcedError> {
    let mut next = a.create_label();
    a.lea(r15, ptr(next))?;
    a.mov(r12, r15)?;
    let stack = USER_STACK as i32;
    match which {
        0 => {}
        1 => a.add(dword_ptr(stack), 3)?,
        2 => a.mov(eax, dword_ptr(PRIVATE))?,
        3 => a.int(0x80)?,
        4 => {
            a.pushfq()?;
            a.pop(rax)?;
            a.add(qword_ptr(stack), rax)?;
        }
        5 => a.cli()?,
        6 => a.swapgs()?,
        // Misaligned.
        7 => a.mov(rax, qword_ptr(stack + 1))?,
        8 => {
            let mut first = a.create_label();
            a.lea(r15, ptr(first))?;
            a.mov(eax, dword_ptr(ABSENT))?;
            a.set_label(&mut first)?;
            a.mov(eax, dword_ptr(ABSENT))?;
        }
        9 => a.rdtsc()?,
        10 => a.mov(rax, cr0)?,
        _ => a.int(0x81)?,
    }
    a.set_label(&mut next)?;
    a.syscall()
}

/// Topmost tables.
pub(super) fn top_table(n: u64) -> u64 {
    if n == 0 { TABLES } else { 0x10_0000 + 0x1000 * n }
}

const EVENTS: u64 = 32;

/// One thing that may happen.
fn event(a: &mut CodeAssembler, c: &mut Choice) -> Result<(), IcedError> {
    let (mut next, mut here) = (a.create_label(), a.create_label());
    let which = c.take(EVENTS);
    let flags = FLAGS[c.take(FLAGS.len() as u64) as usize];
    a.lea(r15, ptr(next))?;
    a.mov(r12, r15)?;
    match which {
        0 => a.mov(eax, dword_ptr(ABSENT))?,
        1 => {
            // The first instruction of its block.
            a.jmp(here)?;
            a.set_label(&mut here)?;
            a.add(dword_ptr(ABSENT), eax)?;
        }
        2 => {
            // Where IRET goes on, with RF, the next one faults.
            a.lea(r15, ptr(here))?;
            a.ud2()?;
            a.set_label(&mut here)?;
            a.mov(edx, dword_ptr(ABSENT))?;
        }
        3 => {
            a.lea(r15, ptr(here))?;
            a.mov(eax, dword_ptr(ABSENT))?;
            a.set_label(&mut here)?;
            a.int(0x80)?;
        }
        4 => {
            a.sti()?;
            a.cli()?;
        }
        5 => {
            a.sti()?;
            a.add(eax, 5)?;
            a.nop()?;
            a.cli()?;
        }
        6 => {
            a.sti()?;
            a.mov(edx, dword_ptr(ABSENT))?;
        }
        7 => {
            a.pushfq()?;
            a.pop(rax)?;
            a.add(qword_ptr(LOG), rax)?;
        }
        8 | 9 => {
            a.push(flags as i32)?;
            a.popfq()?;
        }
        10..=13 => {
            a.lea(rbx, ptr(next))?;
            let to = c.take(USER_CODES + 2);
            a.mov(rcx, if to < USER_CODES { USER + 0x100 * to } else { USER_32 })?;
            a.mov(r11, flags)?;
            a.mov(rsp, STACK + 0x200)?;
            a.sysretq()?;
        }
        14 => {
            // Not canonical.
            a.mov(rcx, 0x8000_0000_0000u64)?;
            a.mov(r11, flags)?;
            a.sysretq()?;
        }
        15 | 16 => {
            a.lea(rbx, ptr(next))?;
            let to = USER + 0x100 * c.take(USER_CODES);
            for value in [USER_DATA, USER_STACK + 0x800, flags & 0x3f_ffff, USER_CODE, to] {
                a.push(value as i32)?;
            }
            a.iretq()?;
        }
        17 => {
            // To the same ring; with RF, perhaps, to an instruction that faults.
            a.mov(rcx, rsp)?;
            a.lea(rdx, ptr(here))?;
            a.push(16)?;
            a.push(rcx)?;
            a.push((flags & 0x3f_ffff) as i32)?;
            a.push(8)?;
            a.push(rdx)?;
            a.iretq()?;
            a.set_label(&mut here)?;
            match c.take(4) {
                0 => a.mov(eax, dword_ptr(ABSENT))?,
                1 => a.int(0x81)?,
                2 => a.pushfq().and_then(|()| a.pop(rax))?,
                _ => a.inc(eax)?,
            }
        }
        18 => {
            a.lea(rbx, ptr(next))?;
            a.syscall()?;
        }
        19 => {
            let toggle = [0x1_0000u32, 0x1_0000, 0x1_0000, 0x1_0008, 0][c.take(5) as usize];
            a.mov(rax, cr0)?;
            a.xor(eax, toggle as i32)?;
            a.mov(cr0, rax)?;
            a.add(dword_ptr(READ_ONLY), 1)?;
        }
        20 => {
            a.stac()?;
            a.add(dword_ptr(USER_STACK as i32), 1)?;
            a.clac()?;
        }
        21 => a.add(dword_ptr(USER_STACK as i32), 1)?,
        22 => {
            a.swapgs()?;
            a.rdgsbase(rax)?;
            a.add(qword_ptr(LOG), rax)?;
        }
        23 => {
            a.invlpg(byte_ptr(ABSENT))?;
            a.mov(eax, top_table(c.take(6)) as i32)?;
            a.mov(cr3, rax)?;
        }
        24 => {
            a.mov(eax, 16)?;
            a.mov(ss, eax)?;
            a.mov(eax, dword_ptr(if c.take(2) == 0 { ABSENT } else { PRIVATE }))?;
        }
        25 => a.out(0x80, al)?,
        27 => {
            for _ in 0..2 {
                a.mov(rax, cr2)?;
                a.mov(rdx, cr3)?;
                a.mov(r10, cr4)?;
            }
            a.add(qword_ptr(LOG), r10)?;
        }
        30 => {
            // Canonical with 48 bits, 57 bits, neither.
            let values = [DATA as i64, -0x4000, 1 << 47, 1 << 56, 1 << 57, -1 << 48];
            a.mov(rax, values[c.take(6) as usize] as u64)?;
            a.mov(r10, rax)?;
            match c.take(4) {
                0 => a.wrfsbase(rax)?,
                1 => a.wrfsbase(eax)?,
                2 => a.wrgsbase(r10)?,
                _ => a.wrgsbase(r10d)?,
            }
            a.rdfsbase(rcx)?;
            a.rdgsbase(edx)?;
            a.rdgsbase(r11)?;
            for register in [rcx, rdx, r11] {
                a.add(qword_ptr(LOG), register)?;
            }
        }
        31 => {
            let msr = [0xc000_0100u32, 0xc000_0101, 0xc000_0102, 0xc000_0102, 0xc000_0081][c.take(5) as usize];
            a.mov(ecx, msr)?;
            a.mov(eax, [0x100, 0xffff_c000u32][c.take(2) as usize])?;
            a.mov(edx, [0, 0xffff_ffffu32, 0x8000, 0x80_0000][c.take(4) as usize])?;
            a.wrmsr()?;
            a.add(qword_ptr(LOG), 1)?;
            a.rdmsr()?;
            a.add(qword_ptr(LOG), rax)?;
            a.add(qword_ptr(LOG), rdx)?;
        }
        26 => {
            // CR4.TSD or FSGSBASE
            a.mov(rax, cr4)?;
            a.xor(eax, if c.take(2) == 0 { 4 } else { 0x1_0000 })?;
            a.mov(cr4, rax)?;
        }
        _ => {
            // To compatibility mode, which comes back by a gate.
            a.lea(rbx, ptr(next))?;
            a.mov(rcx, USER_32)?;
            a.mov(r11, flags)?;
            a.mov(rsp, STACK + 0x200)?;
            a.sysret()?;
        }
    }
    a.set_label(&mut next)?;
    // Something to resume at.
    match c.take(5) {
        0 => a.nop(),
        1 => a.push(rax).and_then(|()| a.pop(rdx)),
        2 => a.add(eax, ecx),
        3 => a.paddd(xmm0, xmm1),
        _ => Ok(()),
    }
}

fn events(body: &[u64]) -> Vec<u8> {
    assembled(CODE, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(rsp, STACK)?;
        for &number in body {
            event(a, &mut Choice(number))?;
        }
        a.dec(dword_ptr(COUNTER))?;
        a.jnz(again)?;
        a.hlt()
    })
}

/// Slices end at `stops`; what waits from there on is what the number beside says.
fn run_with(engine: &mut dyn Vcpu, mem: &GuestMemory, start: &CpuState, stops: &[(u64, u8)]) -> Seen {
    engine.set_state(start);
    let mut now = VirtualTime(0);
    let mut bus = Devices { by_out: Some(0x21), ..Devices::default() };
    'end: for &(stop, waits) in stops {
        while now.0 < stop {
            let stopped = engine.run(&mut bus, Slice { now, until: VirtualTime(stop) });
            now = stopped.now;
            match stopped.exit {
                Exit::BudgetSpent | Exit::Attention => {}
                _ => break 'end,
            }
        }
        bus.nmi |= waits == 1;
        bus.interrupt = bus.interrupt.or((waits == 2 || waits == 3).then_some(0x20 + waits));
    }
    let mut memory = vec![0; 0x4_2000];
    mem.read(Gpa::new(DATA), &mut memory);
    Seen { state: engine.state(), retired: engine.retired(), now: now.0, memory }
}

fn compare_events(
    body: &[u64],
    data: u64,
    options: JitOptions,
    stops: &[(u64, u8)],
) -> Result<JitStats, TestCaseError> {
    compare_code(&events(body), data, options, stops)
}

fn compare_code(code: &[u8], data: u64, options: JitOptions, stops: &[(u64, u8)]) -> Result<JitStats, TestCaseError> {
    compare_in(|| rings(code), data, options, stops)
}

pub(super) fn compare_in(
    memory: impl Fn() -> Arc<GuestMemory>,
    data: u64,
    options: JitOptions,
    stops: &[(u64, u8)],
) -> Result<JitStats, TestCaseError> {
    let profile = CpuidProfile::default();
    let mem = memory();
    let mut interp = Interpreter::new(Arc::clone(&mem), &profile, 0, &EngineOptions::default()).unwrap();
    let expected = run_with(&mut interp, &mem, &ring_0(data), stops);
    let mem = memory();
    let mut jit = Jit::new(Arc::clone(&mem), &profile, 0, &EngineOptions::default(), options).unwrap();
    let seen = run_with(&mut jit, &mem, &ring_0(data), stops);
    let difference = seen.memory.iter().zip(&expected.memory).position(|(a, b)| a != b);
    prop_assert_eq!(difference, None, "memory");
    prop_assert_eq!((seen.retired, seen.now), (expected.retired, expected.now));
    prop_assert_eq!(seen.state, expected.state);
    let (ours, theirs) = (jit.interpreter().mmu_stats(), interp.mmu_stats());
    prop_assert_eq!(ours.flushes_page, theirs.flushes_page);
    prop_assert_eq!(ours.role_changes, theirs.role_changes);
    Ok(jit.stats())
}

/// Stops by what lies between them.
pub(super) fn stops(pieces: &[(u64, u8)]) -> Vec<(u64, u8)> {
    let sums = pieces.iter().scan(0, |at, &(piece, waits)| {
        *at += piece;
        Some((*at, waits))
    });
    sums.chain([(TICKS, 0)]).collect()
}

/// All mechanisms but one, or all.
pub(super) fn without(mechanism: usize) -> JitOptions {
    let off = Mechanism::ALL.get(mechanism).map_or(Mechanisms::NONE, |&one| Mechanisms::NONE.with(one));
    JitOptions { off, ..SMALL }
}

proptest! {
    #![proptest_config(ProptestConfig::default())]

    #[test]
    fn events_do_the_same_on_both_engines(
        body in prop::collection::vec(any::<u64>(), 1..12),
        data in 0..256u64,
        pieces in prop::collection::vec((1..600u64, 0..6u8), 0..30),
        mechanism in 0..40usize,
    ) {
        compare_events(&body, data, without(mechanism), &stops(&pieces))?;
    }
}

/// The programs above are of any use: each event by itself comes to the loop's end, and most of it is translated.
#[test]
fn loops_of_events_come_to_their_end() {
    for number in 0..EVENTS * FLAGS.len() as u64 {
        let stats = compare_events(&[number], 0, SMALL, &[(TICKS, 0)]).unwrap();
        assert!(stats.ops_translated > stats.ops_interpreted, "{number}: {stats}");
    }
}

/// Two roots in turn, and in each of them changes of AC, WP and CPL with accesses that tell them apart.
#[test]
fn views_are_those_of_their_root() {
    let code = assembled(CODE, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        for table in [0, 1, 2, 3] {
            let mut back = a.create_label();
            a.mov(eax, top_table(table) as i32)?;
            a.mov(cr3, rax)?;
            a.stac()?;
            a.add(dword_ptr(USER_STACK as i32), 1)?;
            a.clac()?;
            for _ in 0..2 {
                a.mov(rax, cr0)?;
                a.btc(eax, 16)?;
                a.mov(cr0, rax)?;
                a.add(dword_ptr(DATA as i32), 1)?;
            }
            a.lea(rbx, ptr(back))?;
            a.mov(ecx, (USER + 0x100) as i32)?;
            a.mov(r11d, 2)?;
            a.sysretq()?;
            a.set_label(&mut back)?;
        }
        a.dec(dword_ptr(COUNTER))?;
        a.jnz(again)?;
        a.hlt()
    });
    let run = |off| compare_code(&code, 6, JitOptions { off, ..SMALL }, &[(TICKS, 0)]).unwrap();
    let (all, without) = (run(Mechanisms::NONE), run(Mechanisms::NONE.with(Mechanism::Views)));
    assert!(2 * all.ops_by_helper < without.ops_by_helper, "{all}\n{without}");
}
