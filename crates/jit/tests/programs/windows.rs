//! Programs of the user whose accesses go through windows, while its pages come, go, change their frames and their rights.

use super::events::{BIG_IDT, USER, USER_CODE, USER_DATA, assembled, ring_0, rings};
use super::*;
use iced_x86::code_asm::*;
use umbra_arch::rflags;

/// Where the pages are, in three regions: by tables that are the same.
const REGIONS: [u64; 2] = [0x1_0000_0000, 0x7f80_0000_0000];
/// Their page table, directory, and the directory pointers of the second region.
const PAGES: u64 = 0xf000;
const DIRECTORY: u64 = 0x9000;
const POINTERS: u64 = 0x1_8000;
/// Eight of them.
const FRAMES: u64 = 0x6_0000;
const PROGRAM: u64 = USER + 0x2_0000;
const ROUNDS: u64 = USER + 0x5_0000;
/// What the handlers remember, and what they change in an entry: P, W, the frame, D.
const TURN: i32 = 0x4_1f80;
const CHANGES: i32 = 0x4_1f88;
const MASKS: [u64; 4] = [1, 2, 0x2000, 0x42];
const REPAIR: u64 = 0x1_9000;
const CHANGE: u64 = 0x1_9100;
const CALLED: u64 = 0x1_9200;
const SAVED: i32 = 0x4_1fc0;
/// The interrupt that changes an entry.
const VECTOR: u8 = 0x83;

/// #PF: the page comes back, whatever was missing.
fn repair(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut repaired, mut lost) = (a.create_label(), a.create_label());
    a.push(rax)?;
    a.mov(rax, cr2)?;
    a.shr(rax, 32)?;
    a.cmp(eax, (REGIONS[0] >> 32) as i32)?;
    a.je(repaired)?;
    a.cmp(eax, (REGIONS[1] >> 32) as i32)?;
    a.jne(lost)?;
    a.set_label(&mut repaired)?;
    a.mov(rax, cr2)?;
    a.shr(eax, 12)?;
    a.cmp(eax, 8)?;
    a.jae(lost)?;
    a.or(qword_ptr(rax * 8 + PAGES as i32), 7)?;
    a.mov(rax, cr2)?;
    a.invlpg(byte_ptr(rax))?;
    a.pop(rax)?;
    a.add(rsp, 8)?;
    a.iretq()?;
    a.set_label(&mut lost)?;
    a.hlt()
}

/// Changes the next entry in the next way. The stack is the user's.
fn change(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(qword_ptr(SAVED), rax)?;
    a.mov(qword_ptr(SAVED + 8), rdx)?;
    a.mov(eax, dword_ptr(TURN))?;
    a.inc(dword_ptr(TURN))?;
    a.mov(edx, eax)?;
    a.and(edx, 7)?;
    a.shr(eax, 3)?;
    a.and(eax, 3)?;
    a.mov(rax, qword_ptr(rax * 8 + CHANGES))?;
    a.xor(qword_ptr(rdx * 8 + PAGES as i32), rax)?;
    a.shl(edx, 12)?;
    for region in REGIONS {
        a.mov(rax, region)?;
        a.invlpg(byte_ptr(rax + rdx))?;
    }
    a.mov(rax, qword_ptr(SAVED))?;
    a.mov(rdx, qword_ptr(SAVED + 8))
}

fn change_by_interrupt(a: &mut CodeAssembler) -> Result<(), IcedError> {
    change(a)?;
    a.iretq()
}

fn change_by_call(a: &mut CodeAssembler) -> Result<(), IcedError> {
    change(a)?;
    a.sysretq()
}

fn user_memory(code: &[u8], turn: u32) -> Arc<GuestMemory> {
    let mem = rings(&[0xf4]);
    let put = |at: u64, value: u64| mem.write(Gpa::new(at), &value.to_le_bytes());
    put(TABLES + 0x1000 + 8 * 4, DIRECTORY | 7);
    put(TABLES + 8 * 255, POINTERS | 7);
    put(POINTERS, DIRECTORY | 7);
    put(DIRECTORY, PAGES | 7);
    for page in 0..8 {
        put(PAGES + 8 * page, (FRAMES + 0x1000 * ((3 * page) & 7)) | 7);
    }
    for vector in 0..256 {
        let (handler, kind) = match vector {
            14 => (REPAIR, 0x8e),
            _ if vector == u64::from(VECTOR) => (CHANGE, 0xee),
            _ => (HANDLER, 0x8e),
        };
        put(BIG_IDT + 16 * vector, handler & 0xffff | 8 << 16 | kind << 40 | (handler >> 16) << 48);
    }
    mem.write(Gpa::new(REPAIR), &assembled(REPAIR, repair));
    mem.write(Gpa::new(CHANGE), &assembled(CHANGE, change_by_interrupt));
    mem.write(Gpa::new(CALLED), &assembled(CALLED, change_by_call));
    mem.write(Gpa::new(TURN as u64), &turn.to_le_bytes());
    MASKS.iter().zip((CHANGES as u64..).step_by(8)).for_each(|(mask, at)| put(at, *mask));
    (0..0x8000u64).step_by(8).for_each(|at| put(FRAMES + at, at.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    put(ROUNDS, 60);
    mem.write(Gpa::new(PROGRAM), code);
    mem
}

fn ring_3(data: u64) -> CpuState {
    let mut s = ring_0(data & 1);
    let user = |selector, attr| Segment { selector, base: 0, limit: u32::MAX, attr: Attr(attr) };
    s.seg[Seg::Cs as usize] = user(USER_CODE as u16, 0xa0fb);
    for seg in [Seg::Ss, Seg::Ds, Seg::Es] {
        s.seg[seg as usize] = user(USER_DATA as u16, 0xc0f3);
    }
    // Base of FS: another way to the pages.
    s.seg[Seg::Fs as usize].base = REGIONS[1];
    s.msr.lstar = CALLED;
    s.cpl = 3;
    s.rip = PROGRAM;
    s.rflags = rflags::FIXED;
    s.gpr[4] = REGIONS[(data >> 1 & 1) as usize] + 0x7f00;
    s
}

/// A loop of instructions of all kinds on pages that RDI and R13 point to, with changes of these.
fn user_program(body: &[u64], data: u64) -> Vec<u8> {
    let one = |&number: &u64| match number >> 60 {
        0 if number >> 8 & 1 == 0 => vec![0xcd, VECTOR],
        0 => vec![0x0f, 0x05],                         // syscall
        2 => vec![0x55, 0x41, 0x54, 0x41, 0x5c, 0x5d], // push rbp; push r12; pop r12; pop rbp
        1..6 => on_pages(number),
        _ => instruction(number),
    };
    looped_on_pages(&body.iter().flat_map(one).collect::<Vec<_>>(), data)
}

fn looped_on_pages(body: &[u8], data: u64) -> Vec<u8> {
    let place = |choice: u64| match choice % 3 {
        2 => USER + 0x6_0000,
        region => REGIONS[region as usize] + 0x1000 * (choice >> 2 & 3),
    };
    let mut code = Vec::new();
    for page in (0..8).map(|page| REGIONS[page & 1] + 0x1000 * page as u64) {
        code.push(0xa1); // mov eax, [imm64]
        code.extend(page.to_le_bytes());
    }
    code.extend([0x48, 0xbf]); // mov rdi, imm64
    code.extend(place(data >> 8).to_le_bytes());
    code.extend([0x49, 0xbd]); // mov r13, imm64
    code.extend((place(data >> 16) + 0x800).to_le_bytes());
    code.extend([0x45, 0x31, 0xf6]); // xor r14d, r14d
    code.extend(body);
    count_down(&mut code, &[0xff, 0x0c, 0x25], ROUNDS);
    code.extend([0xeb, 0xfe]);
    code
}

/// Accesses by registers that have changed by little, by pointers to other regions and to none, by FS.
fn on_pages(number: u64) -> Vec<u8> {
    let write = |a: &mut CodeAssembler| {
        match number >> 8 & 7 {
            0 => {
                a.add(rdi, 8)?;
                a.mov(rbx, qword_ptr(rdi + 0x10))?;
                a.sub(rdi, 8)?;
                a.add(qword_ptr(rdi + 0xff4), rbx)
            }
            1 => {
                a.lea(r12, qword_ptr(rdi + 0x1008))?;
                a.mov(rsi, qword_ptr(r12))?;
                a.mov(qword_ptr(r12 + 0x20), rsi)?;
                a.mov(r12, r13)?;
                a.adc(dword_ptr(r12), esi)
            }
            2 => {
                a.mov(rbx, REGIONS[(number >> 12 & 1) as usize])?;
                a.movzx(ecx, byte_ptr(rbx + 0x2345))?;
                a.mov(byte_ptr(rbx + rcx * 8 + 0x3000), cl)
            }
            3 => {
                // What is in no region faults, or isn't canonical.
                a.mov(
                    rbx,
                    [0x8000_0000_0000u64, 0xffff_8000_0000_0000, 0x8000_0000_0000_0000, 0x55_0000_0000]
                        [(number >> 12 & 3) as usize],
                )?;
                a.mov(eax, dword_ptr(rbx))
            }
            4 => a.mov(eax, dword_ptr(0x2004).fs()),
            5 => {
                a.movdqu(xmm3, xmmword_ptr(rdi + 0xff8))?;
                a.movaps(xmmword_ptr(r13), xmm3)
            }
            6 => {
                a.xchg(qword_ptr(rdi + 0x2010), rsi)?;
                a.push(qword_ptr(rdi + 0x18))?;
                a.pop(rbx)
            }
            _ => {
                // From the last page of the region below, across the border.
                a.mov(rbx, REGIONS[0] - 4)?;
                a.mov(rax, qword_ptr(rbx + 4))?;
                a.mov(rax, qword_ptr(rbx))
            }
        }
    };
    assembled(0, write)
}

const WINDOWS: JitOptions = JitOptions { windows_after: Some(0), ..SMALL };

fn compare_user(body: &[u64], data: u64, options: JitOptions, stops: &[u64]) -> Result<JitStats, TestCaseError> {
    let code = user_program(body, data);
    compare_from(|| user_memory(&code, data as u32 >> 24), &ring_3(data), &code, options, stops)
}

proptest! {
    #![proptest_config(ProptestConfig::default())]

    #[test]
    fn pages_may_change_at_any_time(
        body in prop::collection::vec(any::<u64>(), 1..30),
        data: u64,
        pieces in prop::collection::vec(1..2000u64, 0..6),
    ) {
        compare_user(&body, data, WINDOWS, &slices(&pieces, TICKS))?;
    }
}

/// A register's region isn't taken for granted any more when it has got another value, or has changed by much.
#[test]
fn registers_that_change_by_much_are_looked_at_again() {
    let mut ways: Vec<Vec<u8>> = Vec::new();
    for far in [false, true] {
        ways.push(assembled(0, |a| {
            if !far {
                for region in REGIONS {
                    a.mov(rbx, region)?;
                    a.mov(eax, dword_ptr(rbx + 0x10))?;
                    a.mov(dword_ptr(rbx + 0x1014), eax)?;
                }
            } else {
                a.mov(eax, dword_ptr(rdi))?;
                a.mov(eax, dword_ptr(rdi + 8))?;
                a.mov(r12, rdi)?;
                // Beyond the window and its margins.
                for _ in 0..8 {
                    a.lea(r12, qword_ptr(r12 + 0x7fff_ffff))?;
                }
                a.mov(eax, dword_ptr(r12))?;
            }
            a.nop()
        }));
    }
    for body in ways {
        let code = looped_on_pages(&body, 0);
        let options = JitOptions { threshold: 0, ..WINDOWS };
        let stats =
            compare_from(|| user_memory(&code, 0), &ring_3(0), &code, options, &slices(&[11, 1000], TICKS)).unwrap();
        assert!(stats.windows_opened == 1 && stats.window_faults < 30, "{stats}");
    }
}

/// One thing after the other on pages that change after each, by windows and without: faults are few.
#[test]
fn each_kind_of_access_goes_through_windows() {
    for kind in 0..8u64 {
        for change in [false, true] {
            let mut body = vec![1 << 60 | kind << 8; 3];
            body.extend([2 << 60].repeat(2));
            body.extend(change.then_some(1 << 8));
            let run = |windows_after| {
                compare_user(&body, 0, JitOptions { windows_after, ..SMALL }, &slices(&[300; 20], TICKS)).unwrap()
            };
            let (with, without) = (run(Some(0)), run(None));
            assert_eq!((without.windows_opened, without.window_faults), (0, 0));
            if ![3, 7].contains(&kind) {
                assert!(with.windows_opened == 1 && with.window_maps > 0, "{kind}: {with}");
                assert!(change == (with.window_unmaps > 0), "{kind}, {change}: {with}");
                assert!(change || with.window_faults < 30, "{kind}: {with}");
            }
        }
    }
}
