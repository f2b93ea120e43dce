//! Blocks translated together, and flags that are only computed where something looks at them: comparisons and other
//! arithmetic of all widths, accesses that miss or fault behind them, branches over a little code, loops of one block.

use super::events::{COUNTER, LAST_TABLE, LOG, USER, assembled, compare_in, rings};
use super::*;
use iced_x86::code_asm::*;
use std::sync::Mutex;
use umbra_jit::Translated;

/// In the window: two pages of data, one that may only be read, none.
fn prepared(code: &[u8], data: u64) -> Arc<GuestMemory> {
    windowed(code, data, &[DATA + 3, DATA + 0x1003, DATA + 1], ROUNDS as u64)
}

/// Some of the registers that live in the host's and some that live in memory; RBX points to data, RCX counts.
const REGISTERS: [u8; 8] = [0, 2, 6, 8, 10, 12, 14, 15];

/// Prefixes, opcode and ModRM of two registers, or of one and `[rbx + disp8]`.
fn operation(c: &mut Choice, opcode: &[u8], reg: u8, wide: bool) -> Vec<u8> {
    let in_memory = c.take(4) == 0;
    let rm = if in_memory { 3 } else { REGISTERS[c.take(8) as usize] };
    let mut bytes = if !wide && c.take(4) == 0 { vec![0x66] } else { vec![] };
    let size = if wide { 8 } else { c.take(2) as u8 * 8 };
    bytes.push(0x40 | size | (reg >> 3) << 2 | rm >> 3);
    bytes.extend(opcode);
    bytes.push(if in_memory { 0x40 } else { 0xc0 } | (reg & 7) << 3 | rm & 7);
    if in_memory {
        bytes.push((c.take(0x60) as u8).wrapping_sub(0x30));
    }
    bytes
}

fn step(number: u64) -> Vec<u8> {
    let mut c = Choice(number);
    let register = REGISTERS[c.take(8) as usize];
    let with = |c: &mut Choice, opcode: &[u8], reg: u8, immediate: Option<u8>| {
        let mut bytes = operation(c, opcode, reg, false);
        bytes.extend(immediate);
        bytes
    };
    let immediate = Some([0, 1, 0x7f, 0x80, 0xff, 5][c.take(6) as usize]);
    match c.take(24) {
        // ADD, OR, ADC, SBB, AND, SUB, XOR, CMP in both directions and of bytes, too; then with an immediate.
        0..=5 => {
            let opcode = c.take(8) as u8 * 8 + c.take(4) as u8;
            with(&mut c, &[opcode], register, None)
        }
        6 | 7 => {
            let (opcode, extension) = ([0x80, 0x83][c.take(2) as usize], c.take(8) as u8);
            with(&mut c, &[opcode], extension, immediate)
        }
        8 => {
            let opcode = [0x84, 0x85][c.take(2) as usize];
            with(&mut c, &[opcode], register, None)
        }
        // Shifts and rotates by a constant, by 1 and by CL.
        9 => {
            let (opcode, extension) = ([0xc0, 0xc1][c.take(2) as usize], [0, 1, 4, 5, 7][c.take(5) as usize]);
            let count = Some(c.take(40) as u8);
            with(&mut c, &[opcode], extension, count)
        }
        10 => {
            let (opcode, extension) = ([0xd0, 0xd1, 0xd3][c.take(3) as usize], [0, 1, 4, 5, 7][c.take(5) as usize]);
            with(&mut c, &[opcode], extension, None)
        }
        11 => with(&mut c, &[0x0f, 0xaf], register, None),
        12 => with(&mut c, &[0x6b], register, immediate),
        // NOT, NEG; INC, DEC.
        13 => {
            let (opcode, extension) = ([0xf6, 0xf7][c.take(2) as usize], 2 + c.take(2) as u8);
            with(&mut c, &[opcode], extension, None)
        }
        14 => {
            let (opcode, extension) = ([0xfe, 0xff][c.take(2) as usize], c.take(2) as u8);
            with(&mut c, &[opcode], extension, None)
        }
        // MOV both ways, SETcc, CMOVcc, MOVZX.
        15 => {
            let opcode = [0x88, 0x89, 0x8a, 0x8b][c.take(4) as usize];
            with(&mut c, &[opcode], register, None)
        }
        16 => {
            let opcode = 0x90 | c.take(16) as u8;
            with(&mut c, &[0x0f, opcode], 0, None)
        }
        17 => {
            let opcode = [0x40 | c.take(16) as u8, 0xb6, 0xb7][c.take(3) as usize];
            with(&mut c, &[0x0f, opcode], register, None)
        }
        // MOV register, [rbx + disp8], or back: they write no flags and may fault.
        18..=21 => {
            let opcode = [0x8b, 0x8b, 0x89][c.take(3) as usize];
            vec![0x48 | register >> 3 << 2, opcode, 0x43 | (register & 7) << 3, [0, 0xf8, 0x10][c.take(3) as usize]]
        }
        // The pointer moves.
        _ => vec![0x48, 0x83, [0xc3, 0xeb][c.take(2) as usize], c.take(0x20) as u8],
    }
}

/// Rounds of a program: as many as its counter says.
const ROUNDS: i32 = 120;

/// RBX goes up by `stride` a round, from the first page's beginning on.
fn climb(stride: i32) -> Vec<u8> {
    // mov ebx, [0x41800]; imul rbx, rbx, -stride; add rbx, WINDOW + 0x80 + ROUNDS * stride
    let mut bytes = vec![0x8b, 0x1c, 0x25];
    bytes.extend((DATA as u32 + 0x1800).to_le_bytes());
    bytes.extend([0x48, 0x69, 0xdb]);
    bytes.extend((-stride).to_le_bytes());
    bytes.extend([0x48, 0x81, 0xc3]);
    bytes.extend((WINDOW as i32 + 0x80 + ROUNDS * stride).to_le_bytes());
    bytes
}

/// A Jcc, long or short, over `body`.
fn over(condition: u8, long: bool, body: &[u8]) -> Vec<u8> {
    let mut bytes = if long { vec![0x0f, 0x80 | condition] } else { vec![0x70 | condition] };
    if long {
        bytes.extend((body.len() as u32).to_le_bytes());
    } else {
        bytes.push(body.len() as u8);
    }
    bytes.extend(body);
    bytes
}

/// A loop of 1 to 8 rounds that counts in RCX with an instruction that the branch looks at.
fn rounds(c: &mut Choice, body: &[u8]) -> Vec<u8> {
    let count = 1 + c.take(8) as u8;
    // MOV ECX, count; the body; SUB ECX, 1 or ADD ECX, -1 or DEC ECX; JNZ or JA. Or CMP with R9, which counts, too.
    let mut bytes = vec![0xb9, count, 0, 0, 0];
    bytes.extend(body);
    let end: &[u8] = match c.take(4) {
        0 => &[0x83, 0xe9, 1],
        1 => &[0x83, 0xc1, 0xff],
        2 => &[0xff, 0xc9],
        _ => &[0x83, 0xe9, 1, 0x83, 0xf9, 0],
    };
    bytes.extend(end);
    let back = -((body.len() + end.len() + 2) as i64);
    bytes.extend([if c.take(2) == 0 { 0x75 } else { 0x7f }, back as u8]);
    bytes
}

fn program(stride: u8, body: &[(u64, [u64; 3])]) -> Vec<u8> {
    let pieces = body.iter().flat_map(|&(number, steps)| {
        let mut c = Choice(number);
        let some: Vec<u8> = steps.iter().take(c.take(4) as usize).flat_map(|&number| step(number)).collect();
        match c.take(8) {
            0 => rounds(&mut c, &some),
            1..=5 => over(c.take(16) as u8, c.take(4) == 0, &some),
            // JMP over an INT3.
            6 => [&some[..], &[0xeb, 1, 0xcc]].concat(),
            _ => some,
        }
    });
    looped(climb(stride.into()).into_iter().chain(pieces))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn branches_and_what_follows_do_the_same(
        body in prop::collection::vec(any::<(u64, [u64; 3])>(), 1..14),
        data: u64,
        stride: u8,
        pieces in prop::collection::vec(1..60u64, 0..40),
    ) {
        let stops = slices(&pieces, 6000);
        let code = program(stride, &body);
        compare_on(|| prepared(&code, data), &code, data, SMALL, &stops)?;
    }
}

/// A loop of one block: `add rsi, [rbx]; add rax, 8; cmp rax, r12; jb` for some rounds, again and again.
fn summing() -> Vec<u8> {
    let mut body = climb(3);
    body.extend([0x31, 0xc0, 0x41, 0xbc, 0x40, 0, 0, 0]); // xor eax, eax; mov r12d, 64
    body.extend([0x48, 0x03, 0x33, 0x48, 0x83, 0xc0, 8, 0x4c, 0x39, 0xe0, 0x72, 0xf4]);
    looped(body.into_iter())
}

#[test]
fn a_loop_of_one_block_is_in_place_twice() {
    let run = |off| {
        let code = summing();
        let options = JitOptions { off, ..SMALL };
        compare_on(|| prepared(&code, 3), &code, 3, options, &(1..TICKS / 7).map(|n| n * 7).collect::<Vec<_>>())
            .unwrap()
    };
    let (all, alone) = (run(Mechanisms::NONE), run(Mechanisms::NONE.with(Mechanism::Traces)));
    assert!(all.translated_ops >= alone.translated_ops + 4, "{all}\n{alone}");
    // Where all flags are saved it is as good alone.
    let saving = run(Mechanisms::NONE.with(Mechanism::Flags));
    assert!(all.translated_ops >= saving.translated_ops + 4, "{all}\n{saving}");
}

/// A branch that falls through to code that a store before it, in the same trace, has changed.
#[test]
fn a_trace_ends_when_its_next_block_is_written() {
    // mov [rip + to the immediate of mov edx], al; cmp eax, esi; je over; mov edx, 5; add r8d, edx; inc eax
    let mut body = vec![0x88, 0x05, 5, 0, 0, 0, 0x39, 0xf0, 0x74, 5, 0xba, 5, 0, 0, 0];
    body.extend([0x41, 0x01, 0xd0, 0xff, 0xc0]);
    let code = looped(body.into_iter());
    compare(&code, 3, SMALL, &[TICKS]).unwrap();
}

/// A block's bytes are written when it is long a part of the trace of the block before it.
#[test]
fn a_trace_is_forgotten_with_any_of_its_blocks() {
    // mov eax, [0x41800]; cmp eax, 20; ja over the store
    let mut body = vec![0x8b, 0x04, 0x25];
    body.extend((DATA as u32 + 0x1800).to_le_bytes());
    body.extend([0x83, 0xf8, 20, 0x77, 8]);
    // mov [rip + to the immediate of mov edx], al; jmp to the next
    body.extend([0x88, 0x05, 7, 0, 0, 0, 0xeb, 0]);
    // test eax, eax; js over mov edx, 5; add r8d, edx
    body.extend([0x85, 0xc0, 0x78, 5, 0xba, 5, 0, 0, 0, 0x41, 0x01, 0xd0]);
    let code = looped(body.into_iter());
    compare(&code, 3, SMALL, &[TICKS]).unwrap();
}

/// In the one round in which the product's operand lies across a page's end, the next access faults.
#[test]
fn a_product_by_its_function_leaves_its_own_flags() {
    let mut body = climb(79);
    // xor r9d, r9d; mov r8d, 0x1234567; shl r8, 3; imul r12, [rbx + r9], -1; mov rsi, [rbx + 0x1000]; add esi, 1
    body.extend([0x45, 0x31, 0xc9, 0x41, 0xb8, 0x67, 0x45, 0x23, 1, 0x49, 0xc1, 0xe0, 3, 0x4e, 0x6b, 0x24, 0x0b, 0xff]);
    body.extend([0x48, 0x8b, 0xb3, 0, 0x10, 0, 0, 0x83, 0xc6, 1]);
    let code = looped(body.into_iter());
    for data in [3, 0x55, u64::MAX - 9] {
        compare_on(|| prepared(&code, data), &code, data, SMALL, &[TICKS]).unwrap();
    }
}

/// A trace's next block, if it charges by itself, may be left at its head, where flags are wanted that can't be computed any more.
#[test]
fn flags_are_there_at_a_head_behind_a_jump() {
    // add rax, rsi; mov rax, r8; jmp over int3; and r10, rsi; inc r8
    let body = [0x48, 0x01, 0xf0, 0x4c, 0x89, 0xc0, 0xeb, 1, 0xcc, 0x49, 0x21, 0xf2, 0x49, 0xff, 0xc0];
    let code = looped(body.into_iter());
    for off in [Mechanisms::NONE, Mechanisms::NONE.with(Mechanism::Budgets)] {
        for end in 300..320 {
            compare_on(|| prepared(&code, 3), &code, 3, JitOptions { off, ..SMALL }, &[end]).unwrap();
        }
    }
}

/// What listeners are told of a trace is where its instructions are, behind a JMP, too, and in a loop that is in place twice.
#[test]
fn a_listing_has_each_instruction_of_a_trace() {
    // jmp over int3; inc rax; mov ecx, 5; sub ecx, 1; jnz back
    let body = [0xeb, 1, 0xcc, 0x48, 0xff, 0xc0, 0xb9, 5, 0, 0, 0, 0x83, 0xe9, 1, 0x75, 0xfb];
    let code = looped(body.into_iter());
    let mem = prepared(&code, 1);
    let mut jit = Jit::new(Arc::clone(&mem), &CpuidProfile::default(), 0, &EngineOptions::default(), SMALL).unwrap();
    let told = Arc::new(Mutex::new(Vec::new()));
    let keep = Arc::clone(&told);
    jit.set_listener(Box::new(move |translated| keep.lock().unwrap().push(translated.clone())));
    run(&mut jit, &mem, &start(1), &[2000]);
    let told = told.lock().unwrap();
    for translated in told.iter() {
        for part in &translated.parts {
            let at = (part.rip - CODE) as usize;
            assert_eq!(translated.guest[part.guest.clone()], code[at..at + part.guest.len()], "{translated}");
        }
    }
    let rips = |translated: &Translated| translated.parts.iter().map(|part| part.rip).collect::<Vec<_>>();
    let jump = CODE + (code.windows(2).position(|bytes| bytes == [0xeb, 1]).unwrap() as u64);
    let goes_on = |translated: &Translated| rips(translated).windows(2).any(|pair| pair == [jump, jump + 3]);
    assert!(told.iter().any(goes_on), "none goes on behind the JMP");
    assert!(told.iter().any(|translated| !rips(translated).is_sorted()), "no loop is in place twice");
}

/// A store to the page table in a trace's first block has the second one fetched from another page.
#[test]
fn a_trace_ends_when_its_page_is_mapped_anew() {
    const PAGES: [u64; 2] = [USER + 0x4000, USER + 0x5000];
    let code = assembled(CODE, |a| a.jmp(PAGES[0]));
    let body = |adds: i32| {
        assembled(PAGES[0], |a| {
            let (mut again, mut over) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.xor(qword_ptr(LAST_TABLE + 8 * 4), 0x1000)?;
            a.add(eax, 3)?;
            a.js(over)?;
            a.add(qword_ptr(LOG), adds)?;
            a.set_label(&mut over)?;
            a.rol(qword_ptr(LOG), 1)?;
            a.dec(dword_ptr(COUNTER))?;
            a.jnz(again)?;
            a.hlt()
        })
    };
    let memory = || {
        let mem = rings(&code);
        PAGES.into_iter().zip([1, 7]).for_each(|(page, adds)| mem.write(Gpa::new(page), &body(adds)));
        mem
    };
    let stats = compare_in(memory, 0, SMALL, &[(TICKS, 0)]).unwrap();
    assert!(stats.ops_translated > 200, "{stats}");
}
