//! 32-bit code in flat segments: addresses, the stack pointer and RIP wrap at 4 GiB; segments that stop being flat on the
//! way; code of 64 bits between.

use super::*;

/// The last 2 MiB below 4 GiB, and the first above, which nothing that wraps may come to, are mapped here.
pub const HIGH: u64 = 0x20_0000;
pub const HIGH_END: u64 = HIGH + 0x20_0000;
/// Linear address of the former.
const TOP: u64 = 0xffe0_0000;
/// Selectors: flat 32-bit code; such code with a limit; data down to address 1; data with a base.
const CODE32: u16 = 24;
const LIMITED_CODE: u16 = 32;
const LIMITED: u16 = 40;
const BASED: u16 = 48;
/// Data of 512 bytes.
const SMALL_DATA: u16 = 56;
const DATA32: u16 = 16;
const CODE64: u16 = 8;
/// What [`BASED`] adds.
const BASE: u64 = 0xffff_ff80;

fn prepared(code: &[u8], data: u64) -> Arc<GuestMemory> {
    let mem = memory(code, data);
    let put = |at: u64, value: u64| mem.write(Gpa::new(at), &value.to_le_bytes());
    put(GDT + u64::from(CODE32), descriptor::encode(0, u32::MAX, Attr(0xc09b)));
    put(GDT + u64::from(LIMITED_CODE), descriptor::encode(0, 0xfff_ffff, Attr(0xc09b)));
    put(GDT + u64::from(LIMITED), descriptor::encode(0, 0, Attr(0x4097)));
    put(GDT + u64::from(BASED), descriptor::encode(BASE as u32, u32::MAX, Attr(0xc093)));
    put(GDT + u64::from(SMALL_DATA), descriptor::encode(0, 0x1ff, Attr(0x4093)));
    put(TABLES + 0x1000 + 8 * 3, TABLES + 0x3003);
    put(TABLES + 0x1000 + 8 * 4, TABLES + 0x4003);
    put(TABLES + 0x3000 + 8 * 511, HIGH | 0x83);
    put(TABLES + 0x4000, HIGH | 0x83);
    for at in (0..0x400).step_by(8) {
        let value = data.rotate_left(at as u32 & 63);
        put(at, value);
        put(HIGH + at, !value);
        put(HIGH_END - 0x400 + at, value ^ 0x55);
    }
    mem
}

fn state(data: u64) -> CpuState {
    let mut s = start(data);
    s.seg[Seg::Cs as usize] = Segment { selector: CODE32, base: 0, limit: u32::MAX, attr: Attr(0xc09b) };
    s.seg[Seg::Gs as usize] = Segment { selector: BASED, base: BASE, limit: u32::MAX, attr: Attr(0xc093) };
    s.fp.mxcsr = 0x1f80;
    (s.fp.fcw, s.fp.fsw) = (0x37f, 0);
    // Near address 0 it wraps.
    if data & 0x100 != 0 {
        s.gpr[4] = 8 * (data >> 16 & 3) + (data >> 20 & 3);
    }
    if data & 0x200 != 0 {
        s.gpr.iter_mut().for_each(|value| *value |= data << 32);
    }
    s
}

/// A register that no address is made with, but for EBP.
fn register(c: &mut Choice) -> u8 {
    [0, 1, 2, 5][c.take(4) as usize]
}

/// Opcode, ModRM and what belongs to it: EDI is close to 4 GiB, ESI to 0, EBX is [`DATA`].
fn operand(c: &mut Choice, opcode: &[u8], reg: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    if c.take(5) == 0 {
        bytes.push([0x64, 0x65, 0x65, 0x36, 0x3e][c.take(5) as usize]);
    }
    bytes.extend(opcode);
    let near = c.take(64) as i8 - 40;
    match c.take(8) {
        0 => bytes.extend([0x47 | reg << 3, near as u8]),
        1 => bytes.extend([0x46 | reg << 3, near as u8]),
        // [edi + esi + disp8]
        2 => bytes.extend([0x44 | reg << 3, 0x37, near as u8]),
        // [esi * 4 + disp32]
        3 => {
            bytes.extend([0x04 | reg << 3, 0xb5]);
            bytes.extend((i32::from(near) - 60).to_le_bytes());
        }
        // An address by itself.
        4 => {
            bytes.push(0x05 | reg << 3);
            bytes.extend([i32::from(near), DATA as i32, 0x10][c.take(3) as usize].to_le_bytes());
        }
        5 => {
            bytes.push(0x83 | reg << 3);
            bytes.extend([0xffcu32, 0x1004, 0x7fd, 0x20][c.take(4) as usize].to_le_bytes());
        }
        6 => bytes.extend([0x44 | reg << 3, 0x24, c.take(32) as u8]),
        _ => bytes.extend([0x43 | reg << 3, c.take(100) as u8]),
    }
    bytes
}

fn load(register: u8, value: u32) -> Vec<u8> {
    [&[0xb8 | register][..], &value.to_le_bytes()].concat()
}

/// Between 32-bit instructions; `at` is where it lies.
fn switch(c: &mut Choice, at: u64) -> Vec<u8> {
    let far = |to: u64, selector: u16| [&[0xea][..], &(to as u32).to_le_bytes(), &selector.to_le_bytes()].concat();
    match c.take(8) {
        0..=3 => {
            let (number, selectors): (u8, &[u16]) = match c.take(4) {
                0 => (0, &[DATA32, LIMITED, BASED]),
                1 => (3, &[LIMITED, BASED, DATA32, DATA32]),
                2 => (2, &[LIMITED, DATA32]),
                _ => (4, &[LIMITED, BASED, DATA32]),
            };
            let selector = selectors[c.take(selectors.len() as u64) as usize];
            if number == 2 || c.take(2) == 0 {
                return [load(0, selector.into()), vec![0x8e, 0xc0 | number << 3]].concat();
            }
            // push selector; pop
            let pop: &[u8] = match number {
                0 => &[0x07],
                3 => &[0x1f],
                _ => &[0x0f, 0xa1],
            };
            [&[0x6a, selector as u8][..], pop].concat()
        }
        4 => far(at + 7, LIMITED_CODE),
        5 | 6 => far(at + 7, CODE32),
        _ => {
            // add rcx, rax; push 24; push next; retf, all of 64 bits
            let mut code = far(at + 7, CODE64);
            code.extend([0x48, 0x01, 0xc1, 0x6a, CODE32 as u8, 0x68]);
            code.extend((at as u32 + 7 + 12).to_le_bytes());
            code.extend([0x48, 0xcb]);
            code
        }
    }
}

fn instruction(number: u64, at: u64) -> Vec<u8> {
    let mut c = Choice(number);
    let (reg, group) = (register(&mut c), c.take(8) as u8);
    match c.take(30) {
        0 | 1 => operand(&mut c, &[0x01 + 8 * group], reg),
        2 | 3 => operand(&mut c, &[0x03 + 8 * group], reg),
        4 => operand(&mut c, &[0x89], reg),
        5 => operand(&mut c, &[0x8b], reg),
        6 => operand(&mut c, &[[0x88, 0x8a][usize::from(group & 1)]], reg & 3),
        7 => operand(&mut c, &[0x66, [0x89, 0x8b][usize::from(group & 1)]], reg),
        8 => operand(&mut c, &[0x8d], reg),
        9 => operand(&mut c, &[0x0f, [0xb6, 0xbe, 0xb7, 0xbf][usize::from(group & 3)]], reg),
        10 => [operand(&mut c, &[0x81], group), c.immediate(4)].concat(),
        11 => operand(&mut c, &[0xff], group & 1),
        12 => vec![[0x40, 0x48][usize::from(group & 1)] | reg],
        13 => vec![0x50 | reg, 0x58 | register(&mut c)],
        14 => [operand(&mut c, &[0xff], 6), vec![0x58 | reg]].concat(),
        15 => vec![0x68, 1, 2, 3, group, 0x6a, 0xf0 | group, 0x58 | reg, 0x5a],
        // Moves of the accumulator.
        16 => {
            [&[0xa0 | group & 3][..], &[DATA as u32 + 9, 0x21, 0xffff_fffa][c.take(3) as usize].to_le_bytes()].concat()
        }
        // and reg, 0x3ff before
        17 => {
            let bits = operand(&mut c, &[0x0f, [0xab, 0xa3, 0xb3, 0xbb][usize::from(group & 3)]], reg);
            [&[0x81, 0xe0 | reg, 0xff, 3, 0, 0][..], &bits].concat()
        }
        18 => [operand(&mut c, &[0x0f, 0xba], 4 | group & 3), vec![group * 5]].concat(),
        19 => operand(&mut c, &[0x0f, [0xb1, 0xc1, 0xaf, 0x44][usize::from(group & 3)]], reg),
        20 => operand(&mut c, &[0x0f, [0x10, 0x11][usize::from(group & 1)]], reg & 3),
        21 => {
            operand(&mut c, &[[0xd9, 0xdd, 0xd9, 0xdb][usize::from(group & 3)]], [0, 0, 3, 3][usize::from(group & 3)])
        }
        22 => [&[0x9c, 0x58][..], &[0x9c, 0x9d], &[0x0f, 0x31], &[0x60, 0x61]][usize::from(group & 3)].to_vec(),
        // push ebp; mov ebp, esp; leave
        23 => vec![0x55, 0x89, 0xe5, 0xc9],
        // Jcc over an INC.
        24 => vec![0x70 | c.take(16) as u8, 1, 0x42],
        25 => repeated(&mut c),
        // call over a function: inc edx; ret, perhaps with parameters
        26 if group < 4 => vec![0xe8, 2, 0, 0, 0, 0xeb, 2, 0x42, 0xc3],
        26 => vec![0x50, 0xe8, 2, 0, 0, 0, 0xeb, 4, 0x42, 0xc2, 4, 0],
        // mov eax, function; call eax, or push it and call [esp]
        27 if group < 4 => [load(0, at as u32 + 9), vec![0xff, 0xd0, 0xeb, 2, 0x42, 0xc3]].concat(),
        27 => [load(0, at as u32 + 11), vec![0x50, 0xff, 0x14, 0x24, 0xeb, 2, 0x42, 0xc3, 0x58]].concat(),
        _ => switch(&mut c, at),
    }
}

/// A string instruction with REP, now and then up to address 0 and beyond.
fn repeated(c: &mut Choice) -> Vec<u8> {
    // push edi; push ecx; push esi
    let mut bytes = vec![0x57, 0x51, 0x56];
    if c.take(2) == 0 {
        // lea edi, [ebx + 0xfe0]; lea esi, [ebx + 0x100]
        bytes.extend([0x8d, 0xbb, 0xe0, 0x0f, 0, 0, 0x8d, 0xb3, 0, 1, 0, 0]);
    }
    bytes.extend(load(1, c.take(40) as u32));
    let which: [&[u8]; 5] = [&[0xf3, 0xa4], &[0xf3, 0xa5], &[0xf3, 0xaa], &[0xf3, 0xab], &[0xf3, 0x65, 0xa5]];
    bytes.extend(which[c.take(5) as usize]);
    bytes.extend([0x5e, 0x59, 0x5f]);
    bytes
}

fn program(body: &[u64], data: u64) -> Vec<u8> {
    let mut code = load(7, 0xffff_fff0 + (data as u32 & 7));
    code.extend(load(6, 0x20 + (data as u32 >> 3 & 7)));
    code.extend(load(3, DATA as u32));
    for &number in body {
        code.extend(instruction(number, CODE + code.len() as u64));
    }
    again(code)
}

fn compare_narrow(code: &[u8], data: u64, options: JitOptions, stops: &[u64]) -> Result<JitStats, TestCaseError> {
    compare_from(|| prepared(code, data), &state(data), code, options, stops)
}

#[test]
fn most_programs_come_to_their_end() {
    let ended = |seed: u64| {
        let mut numbers = Choice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let body: Vec<_> = (0..15).map(|n: u64| numbers.take(u64::MAX).wrapping_mul(2 * n + 1)).collect();
        let code = program(&body, seed << 8);
        let mem = prepared(&code, seed << 8);
        let mut interp =
            Interpreter::new(Arc::clone(&mem), &CpuidProfile::default(), 0, &EngineOptions::default()).unwrap();
        let seen = run(&mut interp, &mem, &state(seed << 8), &[TICKS]);
        seen.state.rip == CODE + code.len() as u64
    };
    let ended = (0..200).filter(|&seed| ended(seed)).count();
    assert!(ended > 100, "{ended} of 200");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn narrow_programs_do_the_same_on_both_engines(
        body in prop::collection::vec(any::<u64>(), 1..30),
        data: u64,
        pieces in prop::collection::vec(1..400u64, 0..8),
    ) {
        compare_narrow(&program(&body, data), data, SMALL, &slices(&pieces, 4000))?;
    }

    /// Without what turns segments and modes.
    #[test]
    fn flat_programs_do_the_same_on_both_engines(body in prop::collection::vec(any::<u64>(), 1..30), data: u64) {
        let flat: Vec<_> = body.into_iter().filter(|&number| {
            let mut c = Choice(number);
            register(&mut c);
            c.take(8);
            c.take(30) < 28
        }).collect();
        let options = JitOptions { legacy: false, ..SMALL };
        compare_narrow(&program(&flat, data), data, options, &[4000])?;
    }
}

/// Functions near 4 GiB, called from below, one of which ends behind address 0.
#[test]
fn rip_wraps() {
    const FUNCTION: u64 = TOP + 0x10ff0;
    // add eax, ecx; jmp [ebx]; behind it in the last page: mov edx, [ebx]; inc ecx; nop to the end; at 0: ret
    let mut driver = load(3, DATA as u32);
    driver.extend(load(1, 60));
    let round = driver.len();
    for function in [FUNCTION, 0xffff_ffe8] {
        let behind = CODE + driver.len() as u64 + 5;
        driver.push(0xe8);
        driver.extend((function.wrapping_sub(behind) as u32).to_le_bytes());
    }
    driver.extend([0x49, 0x75]);
    driver.push((round as i32 - driver.len() as i32 - 1) as u8);
    driver.push(0xf4);
    let jump = |from: u64, to: u64| [&[0xe9][..], &(to.wrapping_sub(from + 5) as u32).to_le_bytes()].concat();
    let memory = || {
        let mem = prepared(&driver, 3);
        // add eax, ecx and on into the next page; jmp back to low memory; ret
        let mut function = [0x01, 0xc8, 0x0f, 0xaf, 0xc1].repeat(4);
        let at = FUNCTION + function.len() as u64;
        function.extend(jump(at, 0x3_0000));
        mem.write(Gpa::new(HIGH + FUNCTION - TOP), &function);
        mem.write(Gpa::new(0x3_0000), &[0x31, 0xc8, 0xc3]);
        // The last page's end: xor edx, eax, as often as it fits, then inc edx, which crosses nothing.
        let mut last = [0x31, 0xc2].repeat(11);
        last.extend([0x42, 0x42]);
        mem.write(Gpa::new(HIGH + 0x1f_ffe8), &last);
        // At address 0: jmp to the last page but one, wrapping back; there: ret
        mem.write(Gpa::new(0), &jump(0, TOP + 0x1f_e000));
        mem.write(Gpa::new(HIGH + 0x1f_e000), &[0x01, 0xd0, 0xc3]);
        mem
    };
    for legacy in [false, true] {
        let options = JitOptions { legacy, ..SMALL };
        let stats = compare_from(memory, &state(0), &driver, options, &[100_000]).unwrap();
        assert!(stats.ops_translated > stats.ops_interpreted, "{stats}");
        assert!(stats.linked > 4, "{stats}");
    }
}

/// Most of what such programs run is host code.
#[test]
fn narrow_loops_have_host_code() {
    // mov eax, [ebx]; push eax; call over inc edx, ret; pop ecx; add [ebx + 8], ecx; gs mov eax, [0x90]
    let mut code = load(3, DATA as u32);
    code.extend([
        0x8b, 0x03, 0x50, 0xe8, 2, 0, 0, 0, 0xeb, 2, 0x42, 0xc3, 0x59, 0x01, 0x4b, 8, 0x65, 0xa1, 0x90, 0, 0, 0,
    ]);
    let options = JitOptions { legacy: false, ..SMALL };
    let stats = compare_narrow(&again(code), 0, options, &[100_000]).unwrap();
    assert!(stats.ops_translated > 5 * stats.ops_interpreted, "{stats}");
    assert!(stats.ops_by_helper * 10 < stats.ops_translated, "{stats}");
}

/// Back to the start as often as the counter says; HLT.
fn again(mut code: Vec<u8>) -> Vec<u8> {
    count_down(&mut code, &[0xff, 0x0d], DATA + 0x1800);
    code.push(0xf4);
    code
}

/// The page above 4 GiB is one that the table knows, and nothing of a string goes there.
#[test]
fn strings_wrap() {
    // mov rcx, 4 GiB; inc byte [rcx]
    let mut code = [&[0xea][..], &(CODE as u32 + 7).to_le_bytes(), &CODE64.to_le_bytes()].concat();
    code.extend([0x48, 0xb9, 0, 0, 0, 0, 1, 0, 0, 0, 0xfe, 0x01, 0x6a, CODE32 as u8, 0x68]);
    let next = CODE as u32 + code.len() as u32 + 4 + 2;
    code.extend(next.to_le_bytes());
    code.extend([0x48, 0xcb]);
    for string in [0xab, 0xaa, 0xa5] {
        code.extend([load(7, 0xffff_fff0), load(6, 0xffff_fe00), load(1, 24), vec![0xf3, string]].concat());
    }
    let code = again(code);
    let stats = compare_narrow(&code, 0, SMALL, &[100_000]).unwrap();
    assert!(stats.ops_translated > stats.ops_interpreted, "{stats}");
}

/// Each segment by turns gets a limit, which a loop comes to: through FS it has host code, through the others none.
#[test]
fn limits_are_looked_at() {
    for (number, prefix) in [(0, 0x26), (3, 0x3e), (4, 0x64), (5, 0x65)] {
        // xor ecx, ecx; round: es mov [ecx * 4], al; inc ecx; jmp round
        let mut code = [load(0, SMALL_DATA.into()), vec![0x8e, 0xc0 | number << 3]].concat();
        code.extend(load(1, 0));
        let round = code.len();
        code.extend([prefix, 0x88, 0x04, 0x8d, 0, 0, 0, 0, 0x41, 0xeb]);
        code.push((round as i32 - code.len() as i32 - 1) as u8);
        compare_narrow(&code, 0, JitOptions { legacy: false, ..SMALL }, &[TICKS]).unwrap();
        compare_narrow(&code, 0, SMALL, &[TICKS]).unwrap();
    }
}
