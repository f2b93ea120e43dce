//! Code that is mapped at several linear addresses: one translation serves all of them.

use super::*;

/// Where the first 2 MiB of memory are mapped once more.
pub const ALIAS: u64 = 0x4000_0000;
/// And again, up to the last canonical address of the lower half.
const EDGE: u64 = 0x7fff_ffe0_0000;

pub fn map_again(mem: &GuestMemory) {
    let put = |at: u64, value: u64| mem.write(Gpa::new(at), &value.to_le_bytes());
    put(TABLES + 0x1000 + 8, TABLES + 0x2003);
    put(TABLES + 8 * 255, TABLES + 0x3003);
    put(TABLES + 0x3000 + 8 * 511, TABLES + 0x4003);
    put(TABLES + 0x4000 + 8 * 511, 0x83);
}

/// Runs the code at `rips`, one after the other, on one engine, and compares each end.
fn compare_at(
    rips: &[u64],
    code: &[(u64, &[u8])],
    data: u64,
    options: JitOptions,
    ticks: u64,
) -> Result<JitStats, TestCaseError> {
    let profile = CpuidProfile::default();
    let prepared = || {
        let mem = memory(code[0].1, data);
        map_again(&mem);
        code.iter().for_each(|(at, bytes)| mem.write(Gpa::new(*at), bytes));
        mem
    };
    let (mem, jit_mem) = (prepared(), prepared());
    let mut interp = Interpreter::new(Arc::clone(&mem), &profile, 0, &EngineOptions::default()).unwrap();
    let mut jit = Jit::new(Arc::clone(&jit_mem), &profile, 0, &EngineOptions::default(), options).unwrap();
    for &rip in rips {
        let expected = run_at(&mut interp, &mem, rip, data, ticks);
        let seen = run_at(&mut jit, &jit_mem, rip, data, ticks);
        let difference = seen.memory.iter().zip(&expected.memory).position(|(a, b)| a != b);
        prop_assert_eq!(difference, None, "memory, {:#x}, {:02x?}", rip, code);
        prop_assert_eq!(seen.state, expected.state, "{:#x}, {:02x?}", rip, code);
        prop_assert_eq!((seen.retired, seen.now), (expected.retired, expected.now));
    }
    Ok(jit.stats())
}

fn run_at(engine: &mut dyn Vcpu, mem: &GuestMemory, rip: u64, data: u64, ticks: u64) -> Seen {
    mem.write(Gpa::new(DATA + 0x1800), &40u64.to_le_bytes());
    let start = CpuState { rip, ..start(data) };
    run(engine, mem, &start, &[ticks])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn random_programs_do_the_same_wherever_they_are(body in prop::collection::vec(any::<u64>(), 1..40), data: u64) {
        let rips = [CODE, ALIAS + CODE, EDGE + CODE, CODE];
        compare_at(&rips, &[(CODE, &program(&body))], data, SMALL, 4000)?;
    }
}

/// RIP-relative operands, calls and jumps across pages, indirect ones, by turns at two addresses.
#[test]
fn code_is_translated_once_for_all_its_addresses() {
    // mov eax, [rip + 0x1000]; lea rdx, [rip - 5]; add [rip + 0x1100], rdx; call +0x2000; jmp rdx or ret
    let function = |at: u64| {
        let mut code = vec![0x8b, 0x05, 0, 0x10, 0, 0, 0x48, 0x8d, 0x15, 0xfb, 0xff, 0xff, 0xff];
        code.extend([0x48, 0x01, 0x15, 0, 0x11, 0, 0, 0xe8, 0, 0x20, 0, 0, 0xc3]);
        (at, code)
    };
    let (function_at, function) = function(0x2_0000);
    // add ebx, eax; push [rip]; pop rsi; jz over; ret; over: ret
    let callee = [0x01, 0xc3, 0xff, 0x35, 0, 0, 0, 0, 0x5e, 0x74, 1, 0xc3, 0xc3];
    let callee_at = function_at + function.len() as u64 - 1 + 0x2000;
    // mov ecx, 60; round: mov eax, low; call rax; mov eax, alias; call rax; dec ecx; jnz round; hlt
    let mut driver = vec![0xb9, 60, 0, 0, 0];
    for base in [0, ALIAS] {
        driver.push(0xb8);
        driver.extend(((base + function_at) as u32).to_le_bytes());
        driver.extend([0xff, 0xd0]);
    }
    driver.extend([0xff, 0xc9, 0x75, (0u8).wrapping_sub(driver.len() as u8 - 5 + 4), 0xf4]);
    let code: [(u64, &[u8]); 3] = [(CODE, &driver), (function_at, &function), (callee_at, &callee)];
    let stats = compare_at(&[CODE], &code, 7, SMALL, TICKS).unwrap();
    assert!(stats.translated < 16 && stats.ops_translated > 10 * stats.ops_interpreted, "{stats}");
    // At another address everything is found without a look at the decoded blocks.
    let again = compare_at(&[CODE, ALIAS + CODE], &code, 7, SMALL, TICKS).unwrap();
    assert_eq!(again.translated, stats.translated, "{again}");
}

/// A branch that is never taken where its page is low, and leads to no canonical address where it is high: #GP is its
/// own, not its target's.
#[test]
fn a_branch_beyond_the_canonical_addresses_faults_itself() {
    // test ecx, ecx; jz far ahead; dec ecx; ret
    let function = [0x85, 0xc9, 0x0f, 0x84, 0, 0, 0xff, 0x7f, 0xff, 0xc9, 0xc3];
    let at = 0x3_0000u64;
    // mov ecx, 20; mov eax, low; round: call rax; test ecx, ecx; jnz round; mov rax, high; call rax
    let mut driver = vec![0xb9, 20, 0, 0, 0, 0xb8];
    driver.extend((at as u32).to_le_bytes());
    driver.extend([0xff, 0xd0, 0x85, 0xc9, 0x75, 0xfa, 0x48, 0xb8]);
    driver.extend((EDGE + at).to_le_bytes());
    driver.extend([0xff, 0xd0, 0xf4]);
    compare_at(&[CODE], &[(CODE, &driver), (at, &function)], 1, SMALL, TICKS).unwrap();
}

/// More blocks than the cache holds: numbers are used again for other blocks at once.
#[test]
fn more_blocks_than_fit_are_translated() {
    // rol eax, 1; xor eax, n; jmp +0, 140,000 times; dec dword [0x41800]; jnz back
    let block = |n: u8| [0xd1, 0xc0, 0x83, 0xf0, n, 0xeb, 0];
    let mut code: Vec<u8> = (0..140_000u32).flat_map(|n| block((n % 127) as u8)).collect();
    code.extend([0xff, 0x0c, 0x25]);
    code.extend((DATA as u32 + 0x1800).to_le_bytes());
    code.extend([0x0f, 0x85]);
    code.extend((-(code.len() as i32) - 4).to_le_bytes());
    code.push(0xf4);
    let at = 0x10_0000;
    let options = JitOptions { threshold: 0, ..JitOptions::DEFAULT };
    let stats = compare_at(&[at], &[(CODE, &[0xf4]), (at, &code)], 1, options, 1_000_000).unwrap();
    assert!(stats.dropped > 1000 && stats.translated > 100_000, "{stats}");
}
