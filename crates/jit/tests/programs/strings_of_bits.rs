//! Bits of strings in memory by a register, CMPXCHG16B, CLD and STD.

use super::*;

/// In the window: two pages of data, one that may only be read, none.
fn prepared(code: &[u8], data: u64) -> Arc<GuestMemory> {
    windowed(code, data, &[DATA + 3, DATA + 0x1003, DATA + 1], 60)
}

fn mov(register: u8, value: i32) -> Vec<u8> {
    let mut bytes = vec![0x48 | register >> 3, 0xc7, 0xc0 | register & 7];
    bytes.extend(value.to_le_bytes());
    bytes
}

/// BT, BTS, BTR or BTC of `[rbx + disp32]`, or that and R12, by a register with a bit's number.
fn bit(c: &mut Choice) -> Vec<u8> {
    let register = [0, 1, 2, 5, 6, 8, 9, 10, 15][c.take(9) as usize];
    let number = [c.take(1 << 16) as i32 - (1 << 15), -1, 63, 64, i32::MIN][[0, 0, 0, 1, 2, 3, 4][c.take(7) as usize]];
    let wide = c.take(2) as u8 * 8;
    let opcode = 0xa3 + 8 * c.take(4) as u8;
    // BT has no LOCK.
    let mut bytes = if opcode != 0xa3 && c.take(8) == 0 { vec![0xf0] } else { vec![] };
    let indexed = c.take(3) == 0;
    bytes.extend([0x40 | wide | register >> 3 << 2 | if indexed { 2 } else { 0 }, 0x0f, opcode]);
    bytes.extend(if indexed { vec![0x84 | (register & 7) << 3, 0x63] } else { vec![0x83 | (register & 7) << 3] });
    bytes.extend((c.take(0x1800) as i32).to_le_bytes());
    // What CF is goes to memory: adc dword [rbx + 0x10], 0.
    [mov(register, number), bytes, vec![0x83, 0x53, 0x10, 0]].concat()
}

/// CMPXCHG16B of `[rbx + disp8]`, whose value has been loaded or not; ZF and what was loaded go to other registers.
fn exchange(c: &mut Choice) -> Vec<u8> {
    let disp = [0x20, 0x30, 0x38, 0x50][c.take(4) as usize];
    let loads = [vec![0x48, 0x8b, 0x43, disp], vec![0x48, 0x8b, 0x53, disp + 8]];
    let mut bytes = mov(0, 7);
    for load in loads {
        bytes.extend(if c.take(5) == 0 { vec![] } else { load });
    }
    // mov rcx, rdi; lock cmpxchg16b; setz sil; add r8, rax; add r9, rdx
    bytes.extend([0x48, 0x89, 0xf9, 0xf0, 0x48, 0x0f, 0xc7, 0x4b, disp, 0x40, 0x0f, 0x94, 0xc6]);
    bytes.extend([0x49, 0x01, 0xc0, 0x49, 0x01, 0xd1]);
    bytes
}

fn step(number: u64) -> Vec<u8> {
    let mut c = Choice(number);
    match c.take(8) {
        0..=3 => bit(&mut c),
        4 | 5 => exchange(&mut c),
        // STD; CLD
        6 => vec![if c.take(2) == 0 { 0xfc } else { 0xfd }],
        // add rsi, r8; inc r9
        _ => [&[0x4c, 0x01, 0xc6][..], &[0x49, 0xff, 0xc1]][c.take(2) as usize].to_vec(),
    }
}

/// RBX goes through the window's first page by so many bytes a round, R12 is small.
fn program(stride: i32, body: &[u64]) -> Vec<u8> {
    let mut bytes = vec![0x8b, 0x1c, 0x25];
    bytes.extend((DATA as u32 + 0x1800).to_le_bytes());
    bytes.extend([0x48, 0x69, 0xdb]);
    bytes.extend(stride.to_le_bytes());
    bytes.extend([0x48, 0x81, 0xc3]);
    bytes.extend((WINDOW as i32 + 0x40).to_le_bytes());
    bytes.extend(mov(12, 24));
    looped(bytes.into_iter().chain(body.iter().flat_map(|&number| step(number))))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn bits_of_strings_and_wide_exchanges_do_the_same(
        body in prop::collection::vec(any::<u64>(), 1..16),
        data: u64,
        stride in 0..80i32,
        pieces in prop::collection::vec(1..60u64, 0..40),
    ) {
        let stops = slices(&pieces, 5000);
        let code = program(stride, &body);
        compare_on(|| prepared(&code, data), &code, data, SMALL, &stops)?;
    }
}

/// Where pages allow it, no function is called.
#[test]
fn bits_of_strings_and_wide_exchanges_call_no_functions() {
    // mov esi, 77; bts [rbx + 0x100], rsi; mov rax, [rbx + 0x40]; mov rdx, [rbx + 0x48]; cmpxchg16b [rbx + 0x40]; cld; std
    let mut body = vec![0xbe, 77, 0, 0, 0, 0x48, 0x0f, 0xab, 0xb3, 0, 1, 0, 0, 0x48, 0x8b, 0x43, 0x40, 0x48, 0x8b];
    body.extend([0x53, 0x48, 0x48, 0x0f, 0xc7, 0x4b, 0x40, 0xfc, 0xfd]);
    let code = looped(mov(3, WINDOW as i32).into_iter().chain(body));
    let stats = compare_on(|| prepared(&code, 5), &code, 5, SMALL, &[TICKS]).unwrap();
    assert!(stats.ops_translated > 300 && stats.ops_by_helper < 20, "{stats}");
}
