//! MMX, SSE, AVX and x87 rows in a running guest: every instruction form against the host directly, then what
//! surrounds the host's execution: faults, alignment, availability, element-wise moves.

mod bus;
mod long_mode;

use iced_x86::code_asm::*;
use iced_x86::{Code, Decoder, DecoderOptions, Encoder, Instruction, OpCodeOperandKind as Kind, OpKind, Register};
use long_mode::{ABSENT, DATA, Guest};
use umbra_arch::control::{Cr0, Cr4};
use umbra_arch::fault::vector;
use umbra_arch::fpu::FpState;
use umbra_hostexec::{Class, HostExec, MemBuf, Outcome};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    fn lanes<const N: usize>(&mut self) -> [[u64; 2]; N] {
        std::array::from_fn(|_| [self.next(), self.next()])
    }
    fn fill(&mut self, g: &mut Guest) {
        g.s.fp.xmm = self.lanes();
        g.s.fp.ymm_high = self.lanes();
        for st in &mut g.s.fp.st {
            *st = [self.next() | 1 << 63, self.next() % 0x7ffe + 1];
        }
        (g.s.fp.fsw, g.s.fp.ftw, g.s.fp.mxcsr) = (0x3800, self.next() as u8, 0x1f80);
        for r in [0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15] {
            g.s.gpr[r] = self.next();
        }
        g.s.rflags = 2 | self.next() & 0x8d5;
    }
}

/// `code` on registers 3, 12, 7, 9 and memory at RBX+40h; `None` if its operands aren't plain.
fn instance(code: Code, memory: bool) -> Option<(Instruction, Vec<u8>)> {
    let info = code.op_code();
    let mut i = Instruction::default();
    i.set_code(code);
    let mut seen_memory = false;
    let mut next = [3, 12, 7, 9].into_iter();
    for k in 0..info.op_count() {
        let kind = info.op_kind(k);
        let either =
            matches!(kind, Kind::r32_or_mem | Kind::r64_or_mem | Kind::mm_or_mem | Kind::xmm_or_mem | Kind::ymm_or_mem);
        if kind == Kind::mem || either && memory {
            i.set_op_kind(k, OpKind::Memory);
            i.set_memory_base(Register::RBX);
            i.set_memory_displacement64(0x40);
            i.set_memory_displ_size(1);
            seen_memory = true;
            continue;
        }
        let first = match kind {
            Kind::imm8 => {
                i.set_op_kind(k, OpKind::Immediate8);
                i.set_immediate8(0x35);
                continue;
            }
            Kind::r32_or_mem | Kind::r32_reg | Kind::r32_rm => Register::EAX,
            Kind::r64_or_mem | Kind::r64_reg | Kind::r64_rm => Register::RAX,
            Kind::mm_or_mem | Kind::mm_reg | Kind::mm_rm => Register::MM0,
            Kind::xmm_or_mem | Kind::xmm_reg | Kind::xmm_rm | Kind::xmm_vvvv | Kind::xmm_is4 => Register::XMM0,
            Kind::ymm_or_mem | Kind::ymm_reg | Kind::ymm_rm | Kind::ymm_vvvv | Kind::ymm_is4 => Register::YMM0,
            Kind::st0 | Kind::sti_opcode => Register::ST0,
            _ => return None,
        };
        let number = match (kind, next.next()?) {
            (Kind::st0, _) => 0,
            (_, n) if first == Register::MM0 || first == Register::ST0 => n % 8,
            (_, n) => n,
        };
        i.set_op_kind(k, OpKind::Register);
        i.set_op_register(k, first + number);
    }
    if memory != seen_memory {
        return None;
    }
    let mut encoder = Encoder::new(64);
    encoder.encode(&i, 0).ok()?;
    let bytes = encoder.take_buffer();
    let decoded = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
    (decoded.code() == code).then_some((decoded, bytes))
}

/// x87 pointers are the engine's, not the host executor's.
fn without_pointers(fp: &FpState) -> FpState {
    FpState { fop: 0, fip: 0, fdp: 0, ..*fp }
}

#[test]
fn every_form_does_what_the_host_does() {
    let mut host = HostExec::new().unwrap();
    let mut g = Guest::new();
    let mut random = Random(42);
    let mut tried = 0;
    for code in Code::values() {
        for memory in [false, true] {
            let Some((instruction, bytes)) = instance(code, memory) else { continue };
            let Ok(prepared) = host.prepare(&instruction) else { continue };
            if prepared.class == Class::Integer {
                continue;
            }
            random.fill(&mut g);
            g.s.gpr[3] = if memory { DATA } else { random.next() };
            let mut mem = MemBuf::default();
            mem.0.fill_with(|| random.next() as u8);
            g.write(DATA + 0x40, &mem.0);
            let mut expected = g.s.clone();
            let outcome = host.run(prepared.op, &mut expected.fp, &mut expected.gpr, &mut expected.rflags, &mut mem);
            assert_eq!(outcome, Outcome::Done);

            let fault = g.run_bytes(&bytes);
            assert_eq!(fault, None, "{code:?}");
            assert_eq!(without_pointers(&g.s.fp), without_pointers(&expected.fp), "{code:?}");
            assert_eq!((g.s.gpr, g.s.rflags), (expected.gpr, expected.rflags), "{code:?}");
            if memory {
                assert_eq!(g.read::<64>(DATA + 0x40), mem.0, "{code:?}");
            }
            tried += 1;
        }
    }
    assert!(tried > 1900, "only {tried}");
}

#[test]
fn alignment_is_checked_where_required() {
    let mut g = Guest::new();
    g.s.gpr[3] = DATA + 8;
    assert_eq!(g.run(|a| a.movups(xmm1, ptr(rbx)).unwrap()), None);
    for f in [
        |a: &mut CodeAssembler| a.movaps(xmm1, ptr(rbx)).unwrap(),
        |a: &mut CodeAssembler| a.paddb(xmm1, ptr(rbx)).unwrap(),
        |a: &mut CodeAssembler| a.movntdq(ptr(rbx), xmm1).unwrap(),
        |a: &mut CodeAssembler| a.vmovdqa(ptr(rbx + 8), ymm1).unwrap(),
        |a: &mut CodeAssembler| a.fxsave(ptr(rbx)).unwrap(),
        |a: &mut CodeAssembler| a.xsave(ptr(rbx + 8)).unwrap(),
    ] {
        let mut g = Guest::new();
        g.s.gpr[3] = DATA + 8;
        assert_eq!(g.run(f), Some(vector::GP));
    }
    assert_eq!(g.run(|a| a.vpaddb(ymm1, ymm2, ptr(rbx)).unwrap()), None);
}

/// Vector expected of (SSE, AVX, MMX, x87, FXSAVE, XSAVE, LDMXCSR) after a change of the control registers.
#[test]
fn availability() {
    const UD: Option<u8> = Some(vector::UD);
    const NM: Option<u8> = Some(vector::NM);
    type Change = fn(&mut Guest);
    let cases: [(&str, Change, [Option<u8>; 7]); 6] = [
        ("all on", |_| {}, [None; 7]),
        ("TS", |g| g.s.cr0 = Cr0::new(g.s.cr0.raw() | Cr0::TS), [NM; 7]),
        ("EM", |g| g.s.cr0 = Cr0::new(g.s.cr0.raw() | Cr0::EM), [UD, None, UD, NM, NM, None, UD]),
        ("no OSFXSR", |g| g.s.cr4 = Cr4::new(g.s.cr4.raw() & !Cr4::OSFXSR), [UD, None, None, None, None, None, UD]),
        ("no OSXSAVE", |g| g.s.cr4 = Cr4::new(g.s.cr4.raw() & !Cr4::OSXSAVE), [None, UD, None, None, None, UD, None]),
        ("XCR0 without AVX", |g| g.s.xcr0 = 3, [None, UD, None, None, None, None, None]),
    ];
    for (name, change, expected) in cases {
        let instructions: [fn(&mut CodeAssembler); 7] = [
            |a| a.addps(xmm1, xmm2).unwrap(),
            |a| a.vaddps(xmm1, xmm2, xmm3).unwrap(),
            |a| a.paddb(mm1, mm2).unwrap(),
            |a| a.fld1().unwrap(),
            |a| a.fxsave(ptr(rbx)).unwrap(),
            |a| a.xsave(ptr(rbx)).unwrap(),
            |a| a.ldmxcsr(ptr(rbx + 0x800)).unwrap(),
        ];
        for (n, (instruction, fault)) in instructions.into_iter().zip(expected).enumerate() {
            let mut g = Guest::new();
            g.s.gpr[3] = DATA;
            change(&mut g);
            assert_eq!(g.run(instruction), fault, "{name}, instruction {n}");
        }
    }
}

#[test]
fn simd_and_x87_exceptions() {
    let divide = |a: &mut CodeAssembler| a.divsd(xmm1, xmm2).unwrap();
    let mut g = Guest::new();
    (g.s.fp.mxcsr, g.s.fp.xmm[1][0]) = (0x1d80, 1f64.to_bits());
    assert_eq!(g.run(divide), Some(vector::XM));
    assert_eq!((g.s.fp.mxcsr, g.s.fp.xmm[1][0]), (0x1d84, 1f64.to_bits()));
    g = Guest::new();
    (g.s.fp.mxcsr, g.s.fp.xmm[1][0]) = (0x1d80, 1f64.to_bits());
    g.s.cr4 = Cr4::new(g.s.cr4.raw() & !Cr4::OSXMMEXCPT);
    assert_eq!(g.run(divide), Some(vector::UD));

    // x87: the error comes with the next waiting instruction, and not with others.
    let mut g = Guest::new();
    g.s.fp.fcw = 0x37b;
    let fault = g.run(|a| {
        a.fld1().unwrap();
        a.fldz().unwrap();
        a.fdivp(st1, st0).unwrap();
        a.fnstsw(ax).unwrap();
        a.fnclex().unwrap();
        a.fld1().unwrap();
    });
    assert_eq!((fault, g.s.gpr[0] & 0x80ff), (None, 0x8084));
    let fault = g.run(|a| {
        a.fldz().unwrap();
        a.fdivp(st1, st0).unwrap();
        a.fld1().unwrap();
    });
    assert_eq!(fault, Some(vector::MF));
}

/// A store that faults changes nothing, the x87 stack included.
#[test]
fn faulting_stores_are_precise() {
    let mut g = Guest::new();
    assert_eq!(g.run(|a| a.fld1().unwrap()), None);
    let before = g.s.fp;
    g.s.gpr[3] = ABSENT;
    assert_eq!(g.run(|a| a.fstp(qword_ptr(rbx)).unwrap()), Some(vector::PF));
    assert_eq!((g.s.fp, g.s.cr2), (before, ABSENT));
    // Across the border of the mapping: the first half stays unwritten.
    let mut g = Guest::new();
    g.s.gpr[3] = ABSENT - 8;
    g.s.fp.xmm[1] = [u64::MAX; 2];
    assert_eq!(g.run(|a| a.movups(ptr(rbx), xmm1).unwrap()), Some(vector::PF));
    assert_eq!(g.read::<8>(ABSENT - 8), [0; 8]);
}

#[test]
fn x87_pointers() {
    let mut g = Guest::new();
    g.s.gpr[3] = DATA;
    assert_eq!(g.run_bytes(&[0x90, 0xdd, 0x43, 0x08, 0xd9, 0xc0]), None);
    assert_eq!((g.s.fp.fop, g.s.fp.fdp, g.s.fp.fip), (0x1c0, DATA + 8, g.s.rip - 3));
    assert_eq!(g.run_bytes(&[0x67, 0xdd, 0x43, 0x10]), None);
    assert_eq!((g.s.fp.fop, g.s.fp.fdp), (0x543, DATA + 16));
}

#[test]
fn masked_moves_touch_only_selected_elements() {
    let mut g = Guest::new();
    // Two dwords below the border of the mapping, two above.
    g.s.gpr[3] = ABSENT - 8;
    g.write(ABSENT - 8, &[1, 0, 0, 0, 2, 0, 0, 0]);
    g.s.fp.xmm[2] = [0xffff_ffff_8000_0000, 0x7fff_ffff_0000_0001];
    assert_eq!(g.run(|a| a.vpmaskmovd(xmm1, xmm2, ptr(rbx)).unwrap()), None);
    assert_eq!((g.s.fp.xmm[1], g.s.fp.ymm_high[1]), ([0x2_0000_0001, 0], [0, 0]));
    g.s.fp.xmm[3] = [0xbbbb_bbbb_aaaa_aaaa, 0xdddd_dddd_cccc_cccc];
    assert_eq!(g.run(|a| a.vmaskmovps(ptr(rbx), xmm2, xmm3).unwrap()), None);
    assert_eq!(g.read::<8>(ABSENT - 8), 0xbbbb_bbbb_aaaa_aaaa_u64.to_le_bytes());
    // One selected element above: nothing at all is written.
    g.s.fp.xmm[2] = [0x8000_0000_8000_0000, 0x8000_0000];
    g.s.fp.xmm[3] = [0; 2];
    assert_eq!(g.run(|a| a.vmaskmovps(ptr(rbx), xmm2, xmm3).unwrap()), Some(vector::PF));
    assert_eq!(g.read::<8>(ABSENT - 8), 0xbbbb_bbbb_aaaa_aaaa_u64.to_le_bytes());

    let mut g = Guest::new();
    g.s.gpr[7] = ABSENT - 3;
    (g.s.fp.xmm[1], g.s.fp.xmm[2]) = ([0x0807_0605_0403_0201, 0], [0x80_00ff, 0]);
    assert_eq!(g.run(|a| a.maskmovdqu(xmm1, xmm2).unwrap()), None);
    assert_eq!(g.read::<3>(ABSENT - 3), [1, 0, 3]);
}

#[test]
fn gathers() {
    let mut g = Guest::new();
    for i in 0..16u32 {
        g.write(DATA + 4 * u64::from(i), &(0x100 + i).to_le_bytes());
    }
    g.s.gpr[3] = DATA + 32;
    let ones = [u64::MAX; 2];
    // Indices -1, 2, 0, 7 scaled by 4; the third element isn't selected.
    g.s.fp.xmm[2] = [2 << 32 | 0xffff_ffff, 7 << 32];
    (g.s.fp.xmm[3], g.s.fp.ymm_high[3]) = ([u64::MAX, 0xffff_ffff_0000_0000], ones);
    (g.s.fp.xmm[1], g.s.fp.ymm_high[1]) = ([0x55; 2], ones);
    assert_eq!(g.run(|a| a.vpgatherdd_3(xmm1, ptr(rbx + xmm2 * 4), xmm3).unwrap()), None);
    assert_eq!((g.s.fp.xmm[1], g.s.fp.ymm_high[1]), ([0x10a_0000_0107, 0x10f_0000_0055], [0; 2]));
    assert_eq!((g.s.fp.xmm[3], g.s.fp.ymm_high[3]), ([0; 2], [0; 2]));

    // The third of four faults: two are done, and their mask elements are clear.
    let mut g = Guest::new();
    g.write(DATA, &7u64.to_le_bytes());
    g.s.gpr[3] = DATA;
    (g.s.fp.xmm[2], g.s.fp.ymm_high[2]) = ([0, 0], [ABSENT - DATA, 0]);
    (g.s.fp.xmm[3], g.s.fp.ymm_high[3]) = (ones, ones);
    assert_eq!(g.run(|a| a.vpgatherqq_3(ymm1, ptr(rbx + ymm2), ymm3).unwrap()), Some(vector::PF));
    assert_eq!((g.s.fp.xmm[1], g.s.fp.ymm_high[1]), ([7, 7], [0, 0]));
    assert_eq!((g.s.fp.xmm[3], g.s.fp.ymm_high[3], g.s.cr2), ([0; 2], ones, ABSENT));

    // Destination and mask alike: undefined.
    let mut g = Guest::new();
    g.s.gpr[3] = DATA;
    assert_eq!(g.run(|a| a.vpgatherdd_3(xmm1, ptr(rbx + xmm2 * 4), xmm1).unwrap()), Some(vector::UD));
}

#[test]
fn vzero() {
    let mut g = Guest::new();
    Random(1).fill(&mut g);
    let xmm = g.s.fp.xmm;
    assert_eq!(g.run(|a| a.vzeroupper().unwrap()), None);
    assert_eq!((g.s.fp.xmm, g.s.fp.ymm_high), (xmm, [[0; 2]; 16]));
    assert_eq!(g.run(|a| a.vzeroall().unwrap()), None);
    assert_eq!(g.s.fp.xmm, [[0; 2]; 16]);
}

/// The check value of CRC-32C, by bytes and by one quadword and a byte, from registers and memory.
#[test]
fn crc32c_check_value() {
    let mut g = Guest::new();
    g.s.gpr[3] = DATA;
    g.write(DATA, b"123456789");
    (g.s.gpr[0], g.s.gpr[1]) = (0xffff_ffff, u64::MAX);
    let fault = g.run(|a| {
        for at in 0..9 {
            a.crc32(eax, byte_ptr(rbx + at)).unwrap();
        }
        a.crc32(rcx, qword_ptr(rbx)).unwrap();
        a.movzx(edx, byte_ptr(rbx + 8)).unwrap();
        a.shl(edx, 8).unwrap();
        a.crc32(ecx, dh).unwrap();
    });
    assert_eq!((fault, g.s.gpr[0] ^ 0xffff_ffff, g.s.gpr[1] ^ 0xffff_ffff), (None, 0xe306_9283, 0xe306_9283));
}
