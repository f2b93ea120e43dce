//! MOVS and STOS with REP: at pages' ends, overlapping, wherever the next page is elsewhere, read-only, missing, a
//! device, a page table or the running code, and whenever a slice ends.

use super::*;

/// The table that maps the window, in memory that is compared.
const LEAF: u64 = 0x7_0000;
/// The last page of all, and where it is.
const TOP: u64 = 0xffff_ffff_ffff_f000;
const TOP_PAGE: u64 = 0x6_5000;
/// FS and GS begin there.
const SEGMENT: u64 = 0x123;
/// A device: beyond RAM.
const DEVICE: u64 = 0x1000_0000;
/// Entries of the window's pages: in order and not, twice, read-only, a device, a page table, code, none.
const PAGES: [u64; 12] = [
    0x6_0003,
    0x6_1003,
    0x6_3003,
    0x6_0003,
    0x6_1001,
    0x6_2003,
    DEVICE | 3,
    0x6_4003,
    LEAF | 3,
    0x6_2003,
    CODE & !0xfff | 3,
    0,
];

fn prepared(code: &[u8], data: u64) -> Arc<GuestMemory> {
    let mem = memory(code, data);
    let put = |at: u64, value: u64| mem.write(Gpa::new(at), &value.to_le_bytes());
    put(TABLES + 0x1000 + 8, TABLES + 0x3003);
    put(TABLES + 0x3000, LEAF + 3);
    PAGES.iter().enumerate().for_each(|(n, page)| put(LEAF + 8 * n as u64, *page));
    let top = [TABLES, 0xa000, 0xb000, 0xc000, TOP_PAGE];
    top.windows(2).for_each(|pair| put(pair[0] + 8 * 511, pair[1] + 3));
    for at in (0..0x6000).step_by(8) {
        put(0x6_0000 + at, data.wrapping_mul(at | 1).rotate_left(at as u32 & 63));
    }
    mem
}

fn compare_strings(code: &[u8], data: u64, options: JitOptions, stops: &[u64]) -> Result<JitStats, TestCaseError> {
    let mut start = start(data);
    for seg in [Seg::Fs, Seg::Gs] {
        start.seg[seg as usize].base = SEGMENT;
    }
    compare_from(|| prepared(code, data), &start, code, options, stops)
}

/// `mov register, value`.
fn set(register: u8, value: u64) -> Vec<u8> {
    let mut bytes = vec![0x48, 0xb8 | register];
    bytes.extend(value.to_le_bytes());
    bytes
}

const RCX: u8 = 1;
const RSI: u8 = 6;
const RDI: u8 = 7;

fn point(c: &mut Choice) -> u64 {
    // Mostly plain pages.
    let page = [0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11][c.take(15) as usize];
    let near = c.take(70);
    WINDOW + 0x1000 * page + [near, 0x800 + near, 0x1000 - near, 0xff8][c.take(4) as usize]
}

fn count(c: &mut Choice) -> u64 {
    match c.take(12) {
        0 => 0,
        1 => 1,
        2..=6 => c.take(80),
        7 | 8 => c.take(1200),
        9 => 0x1000,
        10 => 0x2000 + c.take(0x1000),
        _ => [1 << 32 | 5, u64::MAX, 1 << 63, 0x10_0000][c.take(4) as usize],
    }
}

/// A string instruction with its pointers and count.
fn string(c: &mut Choice) -> Vec<u8> {
    let target = point(c);
    // Anywhere, or a little before the target, or with almost the same place in its page.
    let source = match c.take(4) {
        0 => target.wrapping_sub(c.take(40)),
        1 => point(c) & !0xfff | target.wrapping_sub(c.take(40)) & 0xfff,
        2 => target + c.take(20),
        _ => point(c),
    };
    let mut bytes = set(RDI, target);
    bytes.extend(set(RSI, source));
    bytes.extend(set(RCX, count(c)));
    if c.take(2) == 0 {
        bytes.extend(CHANGE);
    }
    let down = c.take(8) == 0;
    if down {
        bytes.push(0xfd);
    }
    bytes.extend_from_slice([&[][..], &[], &[], &[], &[0x64], &[0x65], &[0x67], &[0x2e]][c.take(8) as usize]);
    let repeats: &[u8] = [&[0xf3][..], &[0xf3], &[0xf3], &[0xf3], &[0xf2], &[]][c.take(6) as usize];
    bytes.extend(repeats);
    let opcode = [0xa4, 0xa4, 0xa4, 0xaa, 0xaa, 0xac][c.take(6) as usize];
    let forms: [&[u8]; 4] = [&[opcode], &[0x66, opcode | 1], &[opcode | 1], &[0x48, opcode | 1]];
    bytes.extend(forms[c.take(4) as usize]);
    if down {
        bytes.push(0xfc);
    }
    bytes
}

/// A string instruction or something that looks at what one must leave alone.
fn step(number: u64) -> Vec<u8> {
    let mut c = Choice(number);
    match c.take(12) {
        0..=4 => string(&mut c),
        // paddd xmm0, xmm1; vpaddd ymm0, ymm0, ymm1; rdtsc; add [rdi + rbx], rdx; fld1; mov al, [rsi]
        5 => vec![0x66, 0x0f, 0xfe, 0xc1],
        6 => vec![0xc5, 0xfd, 0xfe, 0xc1],
        7 => vec![0x0f, 0x31],
        8 => vec![0x31, 0xdb, 0x48, 0x01, 0x14, 0x1f],
        9 => vec![0xd9, 0xe8],
        10 => vec![0x8a, 0x06],
        // Flags that are looked at behind the next one.
        _ => {
            let mut bytes = vec![0x48, 0x39, 0xd0]; // cmp rax, rdx
            bytes.extend(string(&mut c));
            bytes.extend([0x0f, 0x90 | c.take(16) as u8, 0xc2]); // setcc dl
            bytes
        }
    }
}

fn body(numbers: &[u64]) -> Vec<u8> {
    looped(numbers.iter().flat_map(|&number| step(number)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(768))]

    #[test]
    fn strings_do_the_same_on_both_engines(
        numbers in prop::collection::vec(any::<u64>(), 1..8),
        data: u64,
        pieces in prop::collection::vec(1..900u64, 0..20),
    ) {
        let stops = slices(&pieces, TICKS);
        compare_strings(&body(&numbers), data, SMALL, &stops)?;
    }
}

/// add rax, 0x12345678; mov [rsi], rax: something else is moved or stored with each round.
const CHANGE: [u8; 9] = [0x48, 0x05, 0x78, 0x56, 0x34, 0x12, 0x48, 0x89, 0x06];

/// A loop of one string instruction.
fn one(to: u64, from: u64, count: u64, string: &[u8]) -> Vec<u8> {
    let steps = [set(RDI, to), set(RSI, from), CHANGE.to_vec(), set(RCX, count), string.to_vec()];
    looped(steps.concat().into_iter())
}

const FORMS: [(&[u8], u64); 8] = [
    (&[0xf3, 0xa4], 1),
    (&[0xf3, 0x66, 0xa5], 2),
    (&[0xf3, 0xa5], 4),
    (&[0xf3, 0x48, 0xa5], 8),
    (&[0xf3, 0xaa], 1),
    (&[0xf3, 0x66, 0xab], 2),
    (&[0xf3, 0xab], 4),
    (&[0xf3, 0x48, 0xab], 8),
];

#[test]
fn what_lies_in_the_table_calls_no_function() {
    for (form, size) in FORMS {
        // From page to page, elsewhere, and with pages' ends at different times.
        for (to, from) in [(0x100, 0x1100), (0xf80, 0x1f00), (0x1000 - 8 * size, 0x1000)] {
            let code = one(WINDOW + to, WINDOW + from, 0x1800 / size, form);
            let stats = compare_strings(&code, 1, SMALL, &[1 << 20]).unwrap();
            assert!(stats.ops_translated > 150 && stats.ops_by_helper < 12, "{form:02x?} {to:#x} {from:#x} {stats}");
            let off = JitOptions { off: Mechanisms::NONE.with(Mechanism::Strings), ..SMALL };
            let without = compare_strings(&code, 1, off, &[1 << 20]).unwrap();
            assert!(without.ops_by_helper > stats.ops_by_helper + 20, "{without}");
        }
    }
}

/// All distances that overlap or almost do, in one page, in the same page seen twice, and in another one.
#[test]
fn each_distance_between_the_operands_is_right() {
    for (form, size) in &FORMS[..4] {
        for distance in (0..70).chain([0x800, 0xfc0, 0xfff]) {
            for (target, source) in [(0u64, 0u64), (0x3000, 0), (0x5000, 0)] {
                let to = WINDOW + target + 0x40 + distance;
                let code = one(to, WINDOW + source + 0x40, 203 / size, form);
                compare_strings(&code, 3, SMALL, &[TICKS]).unwrap();
                let code = one(WINDOW + source + 0x40, to, 203 / size, form);
                compare_strings(&code, 3, SMALL, &[TICKS]).unwrap();
            }
        }
    }
}

/// Whenever the budget ends, the same chunks have been done.
#[test]
fn a_slice_may_end_at_each_tick() {
    for (form, size) in [FORMS[0], FORMS[7]] {
        let code = one(WINDOW + 0xfe0, WINDOW + 0x1fc0, 0x100 / size, form);
        for end in 200..450 {
            compare_strings(&code, 5, SMALL, &[end]).unwrap();
        }
    }
}

#[test]
fn the_address_space_wraps_around() {
    for (form, size) in FORMS {
        // The first page of all is mapped, too: what comes behind the last one goes there. The source has another slot
        // of the MMU's table than either.
        let code = one(TOP + 0xf00, WINDOW + 0x1000, 0x180 / size, form);
        let stats = compare_strings(&code, 7, SMALL, &[TICKS]).unwrap();
        assert!(stats.ops_by_helper < 12, "{form:02x?} {stats}");
        let code = one(WINDOW + 8, TOP + 0xf00, u64::MAX, form);
        compare_strings(&code, 7, SMALL, &[TICKS]).unwrap();
    }
}

/// The instruction behind it comes from where the string went, by another address of the same page.
#[test]
fn a_string_may_overwrite_the_code_behind_it() {
    for count in 0..6 {
        // By turns `mov eax, imm32` and `mov edx, imm32`: xor byte [0x60000], 2
        let mut steps = vec![0x80, 0x34, 0x25, 0, 0, 6, 0, 2];
        // Here, then three of `set`, the string, and `looped` begins with 17 bytes.
        let behind = 17 + steps.len() as u64 + 30 + 2;
        steps.extend(set(RDI, WINDOW + 0xa000 + (CODE & 0xfff) + behind));
        steps.extend(set(RSI, WINDOW));
        steps.extend(set(RCX, count));
        // rep movsb; mov eax, 1; add eax, edx
        steps.extend([0xf3, 0xa4, 0xb8, 1, 0, 0, 0, 0x01, 0xd0]);
        let code = looped(steps.into_iter());
        let mem = || {
            let mem = prepared(&code, 1);
            mem.write(Gpa::new(0x6_0000), &[0xb8, 1, 2, 3, 0]);
            mem
        };
        compare_from(mem, &start(1), &code, SMALL, &[TICKS]).unwrap();
    }
}

/// Entries of the table that maps the target, by a string whose own next page they map.
#[test]
fn a_string_may_overwrite_its_page_tables() {
    for (page, count) in [(1u64, 1u64), (1, 2), (2, 3), (5, 1)] {
        // What is read and written next is mapped elsewhere by then.
        let mut steps = set(RDI, WINDOW + 8 * 0x1000 + 8 * page);
        steps.extend(set(RSI, WINDOW + 7 * 0x1000));
        steps.extend(set(RCX, count));
        steps.extend([0xf3, 0x48, 0xa5]);
        steps.extend(set(RDI, WINDOW + 0xf80));
        steps.extend(set(RCX, 0x40));
        steps.extend([0xf3, 0x48, 0xab]);
        let code = looped(steps.into_iter());
        let mem = || {
            let mem = prepared(&code, 2);
            for (n, entry) in [0x6_2003u64, 0x6_5003, 0x6_1003].iter().enumerate() {
                mem.write(Gpa::new(0x6_4000 + 8 * n as u64), &entry.to_le_bytes());
            }
            mem
        };
        compare_from(mem, &start(2), &code, SMALL, &[TICKS]).unwrap();
    }
}
