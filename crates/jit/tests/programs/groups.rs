//! Accesses that are checked together: near each other by the same register, at pages' ends, where the next page is
//! elsewhere in memory, read-only or missing, between other operations that miss.

use super::*;

/// In the window: two pages of data, the first one again, the second one read-only, none.
const PAGES: u64 = 4;
/// RSP at the end of a page that isn't the stack's only one.
const NEAR_END: u64 = 0x8_1000;

fn prepared(code: &[u8], data: u64) -> Arc<GuestMemory> {
    windowed(code, data, &[DATA + 3, DATA + 0x1003, DATA + 3, DATA + 0x1001], 150)
}

const BASES: [u8; 6] = [3, 5, 7, 4, 12, 13];

/// `opcode register, [base + disp8]`.
fn on_memory(prefix: &[u8], opcode: &[u8], register: u8, base: u8, disp: u8) -> Vec<u8> {
    let mut bytes = prefix.to_vec();
    bytes.push(0x48 | (register >> 3) << 2 | base >> 3);
    bytes.extend(opcode);
    bytes.push(0x40 | (register & 7) << 3 | base & 7);
    if base & 7 == 4 {
        bytes.push(0x24);
    }
    bytes.push(disp);
    bytes
}

/// `mov base, value`.
fn point(base: u8, value: u64) -> Vec<u8> {
    let mut bytes = vec![0x48 | base >> 3, 0xb8 | base & 7];
    bytes.extend(value.to_le_bytes());
    bytes
}

fn step(number: u64) -> Vec<u8> {
    let mut c = Choice(number);
    let base = BASES[c.take(6) as usize];
    let register = [0, 1, 2, 6, 8, 10, 14][c.take(7) as usize];
    let disp = if c.take(3) == 0 { c.take(20) * 16 } else { c.take(0x60).wrapping_sub(0x20) } as u8;
    let memory = |prefix: &[u8], opcode: &[u8]| on_memory(prefix, opcode, register, base, disp);
    match c.take(22) {
        0..=3 => memory(&[], &[0x8b]),
        4 | 5 => memory(&[], &[0x89]),
        6 => memory(&[], &[0x01]),
        7 => memory(&[], &[0x3b]),
        8 => memory(&[], &[0x13]),
        9 => on_memory(&[], &[0xff], 0, base, disp),
        // MOVUPS, MOVAPS, UCOMISD, PADDQ.
        10 => memory(&[], &[0x0f, [0x10, 0x11][c.take(2) as usize]]),
        11 => memory(&[], &[0x0f, [0x28, 0x29][c.take(2) as usize]]),
        12 => memory(&[0x66], &[0x0f, [0x2e, 0xd4][c.take(2) as usize]]),
        13 => memory(&[], &[0x0f, 0x40 | c.take(16) as u8]),
        14 => memory(&[], &[0x0f, 0x90 | c.take(16) as u8]),
        // LEA base, [base + disp]; ADD base, imm8; SUB.
        15 => on_memory(&[], &[0x8d], base, base, disp & 0x1f),
        16 => vec![0x48 | base >> 3, 0x83, [0xc0, 0xe8][c.take(2) as usize] | base & 7, disp & 0x1f],
        17 => vec![[0x50, 0x51, 0x53, 0x55, 0x56][c.take(5) as usize]],
        18 => vec![[0x58, 0x59, 0x5a, 0x5e][c.take(4) as usize]],
        19 => on_memory(&[], &[0xff], 6, base, disp),
        // FLD and FSTP of 64 bits, LDMXCSR.
        20 => on_memory(
            &[],
            [&[0xdd][..], &[0xdd], &[0x0f, 0xae]][c.take(3) as usize],
            [0, 3, 2][c.take(3) as usize],
            base,
            disp,
        ),
        // [rdi + r14]: in no group; Jcc over an INC.
        _ if c.take(2) == 0 => vec![0x4a, 0x8b, 0x04, 0x37],
        _ => vec![0x70 | c.take(16) as u8, 3, 0x48, 0xff, 0xc2],
    }
}

/// Bases near pages' ends, then these steps, again and again.
fn program(places: &[u64; 6], body: &[u64]) -> Vec<u8> {
    let points = BASES.iter().zip(places).flat_map(|(&base, &place)| {
        let near = (place >> 8) % 200;
        let value = if base == 4 { NEAR_END + 0x40 } else { WINDOW + (1 + place % PAGES) * 0x1000 };
        point(base, value - if place & 0x80 == 0 { near } else { near & !15 })
    });
    let steps: Vec<u8> = points.chain(body.iter().flat_map(|&number| step(number))).collect();
    looped(steps.into_iter())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(768))]

    #[test]
    fn accesses_near_each_other_do_the_same(
        places: [u64; 6],
        body in prop::collection::vec(any::<u64>(), 1..24),
        data: u64,
    ) {
        let code = program(&places, &body);
        compare_on(|| prepared(&code, data), &code, data, SMALL, &[4000])?;
    }
}

/// A loop of accesses by RBX from `place` on.
fn accesses(place: u64) -> Vec<u8> {
    let pairs = (0..4u8).flat_map(|n| [on_memory(&[], &[0x8b], 0, 3, 8 * n), on_memory(&[], &[0x01], 0, 3, 8 * n + 4)]);
    looped(point(3, place).into_iter().chain(pairs.flatten()))
}

fn run_accesses(place: u64, off: Mechanisms) -> JitStats {
    let code = accesses(place);
    compare_on(|| prepared(&code, 9), &code, 9, JitOptions { off, ..SMALL }, &[TICKS]).unwrap()
}

#[test]
fn a_block_is_translated_again_if_its_groups_cross_pages() {
    let (within, across) = (WINDOW + 0x100, WINDOW + 0x1000 - 20);
    let seen = [within, across].map(|place| run_accesses(place, Mechanisms::NONE));
    assert!(seen[1].translated > seen[0].translated, "{} {}", seen[0], seen[1]);
    assert!(seen[1].ops_by_helper > seen[0].ops_by_helper + 30, "{} {}", seen[0], seen[1]);
}

/// Flags that nothing between can look at stay in the host's register, but an address that must be aligned is tested.
#[test]
fn flags_survive_an_alignment_check_in_a_group() {
    // cmp rax, rcx; movaps xmm0, [rbx]; movaps xmm1, [rbx + 16]; jb over inc rdx
    let mut body = point(3, WINDOW + 0x100);
    body.extend([0x48, 0x39, 0xc8]);
    body.extend(on_memory(&[], &[0x0f, 0x28], 0, 3, 0));
    body.extend([0x48, 0x39, 0xc8]);
    body.extend(on_memory(&[], &[0x0f, 0x28], 1, 3, 16));
    body.extend([0x72, 3, 0x48, 0xff, 0xc2]);
    let code = looped(body.into_iter());
    for data in [5, 1 << 40, u64::MAX] {
        compare_on(|| prepared(&code, data), &code, data, SMALL, &[TICKS]).unwrap();
    }
}

/// In place twice, the loop is come to from itself, too: what was checked before is another address then.
#[test]
fn a_loop_that_moves_the_stack_is_checked_each_round() {
    // mov ecx, 40; push rcx; sub ecx, 1; jnz push
    let mut body = point(4, WINDOW + 0x2040);
    body.extend([0xb9, 40, 0, 0, 0, 0x51, 0x83, 0xe9, 1, 0x75, 0xfa]);
    body.extend(point(4, NEAR_END));
    let code = looped(body.into_iter());
    compare_on(|| prepared(&code, 5), &code, 5, SMALL, &[TICKS]).unwrap();
}
