//! CALLs and RETs that don't match: frames that are skipped, return addresses that are exchanged, made up or popped, calls
//! deeper than the host's stack remembers, functions at several addresses.

use super::events::*;
use super::places::{ALIAS, map_again};
use super::*;
use iced_x86::code_asm::*;

const FUNCTIONS: u64 = 7;

/// In two pages; the fourth begins in one and ends in the other.
fn address(function: u64) -> u64 {
    [0x2_0000, 0x2_0200, 0x2_0e00, 0x2_0fe8, 0x2_1200, 0x2_1400, 0x2_1c00][function as usize]
}

fn to(opcode: u8, at: u64, target: u64) -> Vec<u8> {
    let mut bytes = vec![opcode];
    bytes.extend((target as i32).wrapping_sub(at as i32 + 5).to_le_bytes());
    bytes
}

/// One piece of a function, to be placed at `at`.
fn piece(c: &mut Choice, at: u64) -> Vec<u8> {
    let function = address(c.take(FUNCTIONS));
    let absolute = (function + ALIAS * c.take(2)) as u32;
    match c.take(16) {
        0..=4 => to(0xe8, at, function),
        // mov edx, function; call rdx
        5 => [&[0xba], &absolute.to_le_bytes()[..], &[0xff, 0xd2]].concat(),
        6 => to(0xe9, at, function),
        // push function; ret
        7 => [&[0x68], &absolute.to_le_bytes()[..], &[0xc3]].concat(),
        // add rsp, 8: the caller is skipped.
        8 => vec![0x48, 0x83, 0xc4, 8],
        // call the next; pop rdx; add eax, edx
        9 => vec![0xe8, 0, 0, 0, 0, 0x5a, 0x01, 0xd0],
        // mov rdx, [rsp]; xchg rdx, [rsp + 8]; mov [rsp], rdx
        10 => vec![0x48, 0x8b, 0x14, 0x24, 0x48, 0x87, 0x54, 0x24, 8, 0x48, 0x89, 0x14, 0x24],
        // push [rsp]; ret 8
        11 => vec![0xff, 0x34, 0x24, 0xc2, 8, 0],
        _ => vec![0x83, 0xc0, c.take(100) as u8],
    }
}

/// Pieces, each one behind a condition on how often it was come to; RET.
fn function(number: u64, pieces: &[u64]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for &choice in pieces {
        let mut c = Choice(choice);
        // inc ecx; test cl, mask; jz over
        bytes.extend([0xff, 0xc1, 0xf6, 0xc1, [1, 3, 7, 0x10][c.take(4) as usize]]);
        let piece = piece(&mut c, address(number) + bytes.len() as u64 + 2);
        bytes.extend([0x74, piece.len() as u8]);
        bytes.extend(piece);
    }
    bytes.push(0xc3);
    bytes
}

fn prepared(driver: &[u8], functions: &[Vec<u8>], data: u64) -> Arc<GuestMemory> {
    let mem = memory(driver, data);
    map_again(&mem);
    // What comes behind the last function's end.
    mem.write(Gpa::new(address(0)), &[0xf4; 0x2000]);
    for (number, code) in functions.iter().enumerate() {
        mem.write(Gpa::new(address(number as u64)), code);
    }
    mem
}

/// Calls the first function again and again, each time with the stack where it was: mov esp, STACK first.
fn driver() -> Vec<u8> {
    let calls = to(0xe8, CODE + 17 + 5, address(0));
    let sets_rsp = [&[0xbc], &(STACK as u32).to_le_bytes()[..]].concat();
    looped([sets_rsp, calls].concat().into_iter())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn calls_and_returns_do_the_same(
        functions in prop::array::uniform7(prop::collection::vec(any::<u64>(), 0..5)),
        data: u64,
        pieces in prop::collection::vec(1..400u64, 0..20),
    ) {
        let functions: Vec<_> = functions.iter().enumerate().map(|(n, pieces)| function(n as u64, pieces)).collect();
        let stops = slices(&pieces, TICKS);
        compare_on(|| prepared(&driver(), &functions, data), &driver(), data, SMALL, &stops)?;
    }
}

/// test ecx, ecx; jz to the RET; dec ecx; call itself; inc eax; ret, from 3000 on.
#[test]
fn deep_recursion_comes_back() {
    let function = [0x85, 0xc9, 0x74, 9, 0xff, 0xc9, 0xe8, 0xf5, 0xff, 0xff, 0xff, 0xff, 0xc0, 0xc3].to_vec();
    let driver = [&[0xb9, 0xb8, 0x0b, 0, 0], &to(0xe8, CODE + 5, address(0))[..], &[0xf4]].concat();
    let stats =
        compare_on(|| prepared(&driver, std::slice::from_ref(&function), 0), &driver, 0, SMALL, &[50_000]).unwrap();
    assert!(stats.ops_translated > 17_000, "{stats}");
}

/// Compares ring 0's `code` with more code elsewhere.
fn compare_rings(code: &[u8], more: &[(u64, Vec<u8>)]) -> JitStats {
    let prepared = || {
        let mem = rings(code);
        more.iter().for_each(|(at, bytes)| mem.write(Gpa::new(*at), bytes));
        mem
    };
    compare_from(prepared, &ring_0(0), code, SMALL, &[TICKS]).unwrap()
}

/// Ring 3 returns to where a CALL of ring 0's, never returned from, would.
#[test]
fn ring_3_returns_to_nothing_of_ring_0() {
    let (user, after_fault) = (USER + 0x800, USER + 0x880);
    let counter = DATA as i32 + 0x1800;
    let kernel = assembled(CODE, |a| {
        let [mut again, mut function, mut back, mut down] = [(); 4].map(|()| a.create_label());
        a.set_label(&mut again)?;
        a.mov(rsp, STACK)?;
        a.lea(rbx, ptr(back))?;
        a.mov(r15d, after_fault as i32)?;
        a.mov(r12, r15)?;
        a.call(function)?;
        a.inc(eax)?;
        a.set_label(&mut back)?;
        a.dec(dword_ptr(counter))?;
        a.jnz(again)?;
        a.hlt()?;
        a.set_label(&mut function)?;
        // Now and then it returns.
        a.test(dword_ptr(counter), 3)?;
        a.jz(down)?;
        a.ret()?;
        a.set_label(&mut down)?;
        a.mov(r13, qword_ptr(rsp))?;
        a.mov(ecx, user as i32)?;
        a.mov(r11d, 2)?;
        a.sysretq()
    });
    let user_code = assembled(user, |a| {
        a.mov(esp, USER_STACK as i32)?;
        a.push(r13)?;
        a.ret()
    });
    let stats = compare_rings(&kernel, &[(user, user_code), (after_fault, assembled(after_fault, |a| a.syscall()))]);
    assert!(stats.ops_translated > 400, "{stats}");
}

/// A function changes CR3 before it returns, and its caller's page is another one then.
#[test]
fn a_return_is_to_what_is_mapped_by_then() {
    let caller = USER_STACK + 0x400;
    let function = CODE + 0x800;
    let calling = |n: i32| {
        assembled(caller, |a| {
            a.call(function)?;
            a.imul_3(eax, eax, 3)?;
            a.add(eax, n)?;
            a.jmp(r8)
        })
    };
    let toggling = assembled(function, |a| {
        a.xor(r9, r10)?;
        a.mov(cr3, r9)?;
        a.ret()
    });
    let driver = assembled(CODE, |a| {
        let [mut again, mut back] = [(); 2].map(|()| a.create_label());
        a.mov(r9d, top_table(1) as i32)?;
        a.mov(r10d, (top_table(1) ^ top_table(2)) as i32)?;
        a.lea(r8, ptr(back))?;
        a.set_label(&mut again)?;
        a.mov(edx, caller as i32)?;
        a.jmp(rdx)?;
        a.set_label(&mut back)?;
        a.dec(dword_ptr(DATA as i32 + 0x1800))?;
        a.jnz(again)?;
        a.hlt()
    });
    let pages = [(caller, calling(1)), (DATA + 0x2_0400, calling(5)), (function, toggling)];
    let stats = compare_rings(&driver, &pages);
    assert!(stats.ops_translated > 300, "{stats}");
}
