//! A sample of each family against the same computation in plain Rust.

mod rig;

use iced_x86::Instruction;
use iced_x86::code_asm::*;
use proptest::prelude::*;
use rig::{Machine, Random, assembled, decoded};
use umbra_hostexec::{HostExec, Outcome};

/// Runs `i` with operands 1 (and destination) in XMM3 and 2 in XMM7; gives XMM3.
fn binary(i: &Instruction, a: [u64; 2], b: [u64; 2]) -> [u64; 2] {
    let mut m = Machine::random(&mut Random(a[0]));
    (m.fp.xmm[3], m.fp.xmm[7]) = (a, b);
    m.exec(&mut HostExec::new().unwrap(), i);
    m.fp.xmm[3]
}

fn bytes(v: [u64; 2]) -> [u8; 16] {
    let mut out = [0; 16];
    out[..8].copy_from_slice(&v[0].to_le_bytes());
    out[8..].copy_from_slice(&v[1].to_le_bytes());
    out
}
fn quads(b: [u8; 16]) -> [u64; 2] {
    [u64::from_le_bytes(b[..8].try_into().unwrap()), u64::from_le_bytes(b[8..].try_into().unwrap())]
}
fn by_byte(a: [u64; 2], b: [u64; 2], f: impl Fn(u8, u8) -> u8) -> [u64; 2] {
    let (a, b) = (bytes(a), bytes(b));
    quads(std::array::from_fn(|i| f(a[i], b[i])))
}
fn by_word(a: [u64; 2], b: [u64; 2], f: impl Fn(i16, i16) -> i16) -> [u64; 2] {
    std::array::from_fn(|q| {
        (0..4).fold(0, |acc, w| {
            acc | u64::from(f((a[q] >> (16 * w)) as i16, (b[q] >> (16 * w)) as i16) as u16) << (16 * w)
        })
    })
}
fn by_f32(a: [u64; 2], b: [u64; 2], f: impl Fn(f32, f32) -> f32) -> [u64; 2] {
    let lane = |v: u64, n: u32| f32::from_bits((v >> (32 * n)) as u32);
    std::array::from_fn(|q| {
        (0..2).fold(0, |acc, n| acc | u64::from(f(lane(a[q], n), lane(b[q], n)).to_bits()) << (32 * n))
    })
}
fn by_f64(a: [u64; 2], b: [u64; 2], f: impl Fn(f64, f64) -> f64) -> [u64; 2] {
    std::array::from_fn(|q| f(f64::from_bits(a[q]), f64::from_bits(b[q])).to_bits())
}
fn gf_double(x: u8) -> u8 {
    x << 1 ^ if x & 0x80 != 0 { 0x1b } else { 0 }
}
fn gf_mul(a: u8, b: u8) -> u8 {
    (0..8).fold((0, a), |(sum, p), i| (if b >> i & 1 != 0 { sum ^ p } else { sum }, gf_double(p))).0
}
/// S-box from its definition: inverse, then the affine map.
fn sub_byte(x: u8) -> u8 {
    let inverse = (0..=255).find(|y| gf_mul(x, *y) == 1).unwrap_or(0);
    (1..5).fold(inverse, |sum, n| sum ^ inverse.rotate_left(n)) ^ 0x63
}
fn aes_round(state: [u64; 2], key: [u64; 2]) -> [u64; 2] {
    let s = bytes(state);
    let shifted: [u8; 16] = std::array::from_fn(|i| sub_byte(s[(i + 4 * (i % 4)) % 16]));
    let mixed = std::array::from_fn(|i| {
        let c = |n: usize| shifted[i / 4 * 4 + (i + n) % 4];
        gf_mul(c(0), 2) ^ gf_mul(c(1), 3) ^ c(2) ^ c(3)
    });
    by_byte(quads(mixed), key, |x, k| x ^ k)
}
fn carryless(a: u64, b: u64) -> [u64; 2] {
    let product = (0..64).filter(|i| b >> i & 1 != 0).fold(0u128, |p, i| p ^ u128::from(a) << i);
    [product as u64, (product >> 64) as u64]
}

fn finite() -> impl Strategy<Value = f64> {
    (-1e30..1e30f64).prop_map(|x| x)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn integer_lanes(a: [u64; 2], b: [u64; 2]) {
        type Case = (Instruction, fn([u64; 2], [u64; 2]) -> [u64; 2]);
        let cases: Vec<Case> = vec![
            (assembled(|x| x.paddb(xmm3, xmm7).unwrap()), |a, b| by_byte(a, b, u8::wrapping_add)),
            (assembled(|x| x.psubusb(xmm3, xmm7).unwrap()), |a, b| by_byte(a, b, u8::saturating_sub)),
            (assembled(|x| x.pminub(xmm3, xmm7).unwrap()), |a, b| by_byte(a, b, u8::min)),
            (assembled(|x| x.pavgb(xmm3, xmm7).unwrap()), |a, b| by_byte(a, b, |x, y| (u16::from(x) + u16::from(y)).div_ceil(2) as u8)),
            (assembled(|x| x.pcmpeqb(xmm3, xmm7).unwrap()), |a, b| by_byte(a, b, |x, y| if x == y { 255 } else { 0 })),
            (assembled(|x| x.paddsw(xmm3, xmm7).unwrap()), |a, b| by_word(a, b, i16::saturating_add)),
            (assembled(|x| x.pmulhw(xmm3, xmm7).unwrap()), |a, b| by_word(a, b, |x, y| ((i32::from(x) * i32::from(y)) >> 16) as i16)),
            (assembled(|x| x.pxor(xmm3, xmm7).unwrap()), |a, b| [a[0] ^ b[0], a[1] ^ b[1]]),
            (assembled(|x| x.paddq(xmm3, xmm7).unwrap()), |a, b| [a[0].wrapping_add(b[0]), a[1].wrapping_add(b[1])]),
            (assembled(|x| x.punpcklqdq(xmm3, xmm7).unwrap()), |a, b| [a[0], b[0]]),
            (assembled(|x| x.shufpd(xmm3, xmm7, 1).unwrap()), |a, b| [a[1], b[0]]),
            (assembled(|x| x.pblendw(xmm3, xmm7, 0xf0).unwrap()), |a, b| [a[0], b[1]]),
            (assembled(|x| x.pshufb(xmm3, xmm7).unwrap()), |a, b| {
                let (a, b) = (bytes(a), bytes(b));
                quads(std::array::from_fn(|i| if b[i] & 0x80 != 0 { 0 } else { a[usize::from(b[i] & 15)] }))
            }),
            (assembled(|x| x.aesenc(xmm3, xmm7).unwrap()), aes_round),
            (assembled(|x| x.pclmulqdq(xmm3, xmm7, 0x10).unwrap()), |a, b| carryless(a[0], b[1])),
            (assembled(|x| x.gf2p8mulb(xmm3, xmm7).unwrap()), |a, b| by_byte(a, b, gf_mul)),
        ];
        for (instruction, model) in cases {
            prop_assert_eq!(binary(&instruction, a, b), model(a, b), "{:?}", instruction.code());
        }
    }

    #[test]
    fn floating_point_lanes(x in finite(), y in finite(), z in finite(), w in finite()) {
        let (a, b) = ([x.to_bits(), y.to_bits()], [z.to_bits(), w.to_bits()]);
        let single = |x: f64, y: f64| u64::from((x as f32).to_bits()) | u64::from((y as f32).to_bits()) << 32;
        let (c, d) = ([single(x, y), single(z, w)], [single(y, z), single(w, x)]);
        prop_assert_eq!(binary(&assembled(|s| s.mulpd(xmm3, xmm7).unwrap()), a, b), by_f64(a, b, |p, q| p * q));
        prop_assert_eq!(binary(&assembled(|s| s.divpd(xmm3, xmm7).unwrap()), a, b), by_f64(a, b, |p, q| p / q));
        prop_assert_eq!(binary(&assembled(|s| s.addsd(xmm3, xmm7).unwrap()), a, b), [(x + z).to_bits(), a[1]]);
        prop_assert_eq!(binary(&assembled(|s| s.sqrtsd(xmm3, xmm7).unwrap()), a, [z.abs().to_bits(), 0]), [z.abs().sqrt().to_bits(), a[1]]);
        prop_assert_eq!(binary(&assembled(|s| s.subps(xmm3, xmm7).unwrap()), c, d), by_f32(c, d, |p, q| p - q));
        prop_assert_eq!(binary(&assembled(|s| s.haddpd(xmm3, xmm7).unwrap()), a, b), [(x + y).to_bits(), (z + w).to_bits()]);
        prop_assert_eq!(binary(&assembled(|s| s.cvtpd2ps(xmm3, xmm7).unwrap()), a, b), [single(z, w), 0]);
        prop_assert_eq!(binary(&assembled(|s| s.cmpltpd(xmm3, xmm7).unwrap()), a, b), [if x < z { u64::MAX } else { 0 }, if y < w { u64::MAX } else { 0 }]);
        let mut m = Machine::random(&mut Random(5));
        (m.fp.xmm[3], m.fp.xmm[7], m.fp.xmm[9]) = (a, b, [y.to_bits(), x.to_bits()]);
        m.exec(&mut HostExec::new().unwrap(), &assembled(|s| s.vfmadd213pd(xmm3, xmm7, xmm9).unwrap()));
        prop_assert_eq!(m.fp.xmm[3], [x.mul_add(z, y).to_bits(), y.mul_add(w, x).to_bits()]);
        prop_assert_eq!(m.fp.ymm_high[3], [0, 0]);
    }

    /// The memory form gives what the register form gives with the same value.
    #[test]
    fn memory_equals_register(a: [u64; 2], b: [u64; 2]) {
        let mut host = HostExec::new().unwrap();
        for (register, memory) in [
            (assembled(|x| x.pmaddwd(xmm3, xmm7).unwrap()), assembled(|x| x.pmaddwd(xmm3, ptr(rbx + rcx * 4 + 0x1234)).unwrap())),
            (assembled(|x| x.vpmaddwd(xmm3, xmm3, xmm7).unwrap()), assembled(|x| x.vpmaddwd(xmm3, xmm3, ptr(rsp)).unwrap())),
            (assembled(|x| x.unpcklps(xmm3, xmm7).unwrap()), assembled(|x| x.unpcklps(xmm3, ptr(0x1000)).unwrap())),
        ] {
            let mut m = Machine::random(&mut Random(3));
            (m.fp.xmm[3], m.fp.xmm[7]) = (a, b);
            let mut n = m.clone();
            n.mem.0[..16].copy_from_slice(&bytes(b));
            m.mem = n.mem;
            m.exec(&mut host, &register);
            n.exec(&mut host, &memory);
            prop_assert_eq!(m, n);
        }
    }

    #[test]
    fn general_registers_in_and_out(value: u64, x: [u64; 2]) {
        let mut host = HostExec::new().unwrap();
        let mut m = Machine::random(&mut Random(value));
        m.gpr[4] = value;
        m.fp.xmm[9] = x;
        m.exec(&mut host, &assembled(|s| s.movq(xmm1, rsp).unwrap()));
        prop_assert_eq!(m.fp.xmm[1], [value, 0]);
        m.exec(&mut host, &assembled(|s| s.cvtsi2sd(xmm2, rsp).unwrap()));
        prop_assert_eq!(m.fp.xmm[2][0], (value as i64 as f64).to_bits());
        m.exec(&mut host, &assembled(|s| s.movd(r15d, xmm9).unwrap()));
        prop_assert_eq!(m.gpr[15], x[0] & 0xffff_ffff);
        m.exec(&mut host, &assembled(|s| s.pextrq(rdi, xmm9, 1).unwrap()));
        prop_assert_eq!(m.gpr[7], x[1]);
        m.exec(&mut host, &assembled(|s| s.pmovmskb(eax, xmm9).unwrap()));
        let mask = bytes(x).iter().rev().fold(0, |mask, b| mask << 1 | u64::from(b >> 7));
        prop_assert_eq!(m.gpr[0], mask);
    }
}

#[test]
fn ymm_halves() {
    let mut host = HostExec::new().unwrap();
    let mut m = Machine::random(&mut Random(9));
    let (a, b) = (m.ymm(5), m.ymm(14));
    m.exec(&mut host, &assembled(|x| x.vpaddq(ymm2, ymm5, ymm14).unwrap()));
    assert_eq!(m.ymm(2), std::array::from_fn(|i| a[i].wrapping_add(b[i])));
    m.exec(&mut host, &assembled(|x| x.vperm2i128(ymm0, ymm5, ymm14, 0x31).unwrap()));
    assert_eq!(m.ymm(0), [a[2], a[3], b[2], b[3]]);
    m.exec(&mut host, &assembled(|x| x.vmovdqu(ptr(rax), ymm14).unwrap()));
    assert_eq!(m.mem.0[..32], b.map(u64::to_le_bytes).concat());
    m.exec(&mut host, &assembled(|x| x.vmovaps(xmm5, xmm14).unwrap()));
    assert_eq!(m.ymm(5), [b[0], b[1], 0, 0]);
    let high = m.fp.ymm_high[14];
    m.exec(&mut host, &assembled(|x| x.movaps(xmm14, xmm1).unwrap()));
    assert_eq!((m.fp.xmm[14], m.fp.ymm_high[14]), (m.fp.xmm[1], high));
}

#[test]
fn implicit_operands() {
    let mut host = HostExec::new().unwrap();
    let mut m = Machine::random(&mut Random(11));
    (m.fp.xmm[0], m.fp.xmm[3], m.fp.xmm[7]) = ([1 << 63, 0], [10, 11], [20, 21]);
    m.exec(&mut host, &assembled(|x| x.blendvpd(xmm3, xmm7).unwrap()));
    assert_eq!(m.fp.xmm[3], [20, 11]);
    // Compare strings of explicit length 3: equal-each finds all equal, the least index is 0.
    (m.fp.xmm[3], m.fp.xmm[7], m.gpr[0], m.gpr[2]) = ([0x636261, 0], [0x637861, 0], 3, 3);
    m.exec(&mut host, &assembled(|x| x.pcmpestri(xmm3, xmm7, 0x18).unwrap()));
    assert_eq!(m.gpr[1], 1, "first difference");
    m.exec(&mut host, &assembled(|x| x.vpcmpestrm(xmm3, xmm7, 0x08).unwrap()));
    assert_eq!((m.fp.xmm[0][0] & 7, m.fp.ymm_high[0]), (0b101, [0, 0]));
}

#[test]
fn flags_of_comparisons() {
    let mut host = HostExec::new().unwrap();
    let (zf, pf, cf) = (0x40, 4, 1);
    for (a, b, flags) in [(1.0, 2.0, cf), (2.0, 1.0, 0), (2.0, 2.0, zf), (f64::NAN, 2.0, zf | pf | cf)] {
        let mut m = Machine::random(&mut Random(1));
        m.rflags = 0x3_0ad7;
        (m.fp.xmm[3][0], m.fp.xmm[7][0]) = (f64::to_bits(a), f64::to_bits(b));
        m.exec(&mut host, &assembled(|x| x.ucomisd(xmm3, xmm7).unwrap()));
        assert_eq!(m.rflags, 0x3_0202 | flags, "{a} {b}");
    }
    let mut m = Machine::random(&mut Random(1));
    m.fp.xmm[3] = [0, 0];
    m.exec(&mut host, &assembled(|x| x.ptest(xmm3, xmm7).unwrap()));
    assert_eq!(m.rflags & 0x8d5, zf);
}

#[test]
fn metadata() {
    let mut host = HostExec::new().unwrap();
    let mut of = |i: Instruction| {
        let p = host.prepare(&i).unwrap();
        (p.mem_read, p.mem_write, p.mem_align)
    };
    assert_eq!(of(assembled(|x| x.movaps(xmm1, ptr(rax)).unwrap())), (16, 0, 16));
    assert_eq!(of(assembled(|x| x.movups(ptr(rax), xmm1).unwrap())), (0, 16, 1));
    assert_eq!(of(assembled(|x| x.paddb(xmm1, ptr(rax)).unwrap())), (16, 0, 16));
    assert_eq!(of(assembled(|x| x.vpaddb(ymm1, ymm2, ptr(rax)).unwrap())), (32, 0, 1));
    assert_eq!(of(assembled(|x| x.vmovdqa(ptr(rax), ymm2).unwrap())), (0, 32, 32));
    assert_eq!(of(assembled(|x| x.addss(xmm1, ptr(rax)).unwrap())), (4, 0, 1));
    assert_eq!(of(assembled(|x| x.pcmpistri(xmm1, ptr(rax), 0).unwrap())), (16, 0, 1));
    assert_eq!(of(assembled(|x| x.fld(tbyte_ptr(rax)).unwrap())), (10, 0, 1));
    assert_eq!(of(assembled(|x| x.movlps(ptr(rax), xmm1).unwrap())), (0, 8, 1));
    assert_eq!(of(assembled(|x| x.paddb(mm1, ptr(rax)).unwrap())), (8, 0, 1));
    assert_eq!(of(assembled(|x| x.movntdqa(xmm1, ptr(rax)).unwrap())), (16, 0, 16));
}

/// The same instruction decoded in 16- and 32-bit code uses the same stub as in 64-bit code.
#[test]
fn other_code_sizes() {
    let mut host = HostExec::new().unwrap();
    let wide = host.prepare(&decoded(64, &[0x0f, 0x58, 0x1f])).unwrap();
    assert_eq!(host.prepare(&decoded(32, &[0x0f, 0x58, 0x1f])).unwrap(), wide);
    assert_eq!(host.prepare(&decoded(16, &[0x0f, 0x58, 0x1f])).unwrap(), wide);
    assert_eq!(host.code_size().0, 1);
}

#[test]
fn unmasked_simd_exceptions() {
    let mut host = HostExec::new().unwrap();
    let divide = host.prepare(&assembled(|x| x.divsd(xmm3, xmm7).unwrap())).unwrap();
    let mut m = Machine::random(&mut Random(4));
    (m.fp.xmm[3][0], m.fp.xmm[7][0]) = (1f64.to_bits(), 0);
    m.fp.mxcsr = 0x1f80 & !(1 << 9);
    let before = m.clone();
    assert_eq!(m.run(&mut host, &divide), Outcome::SimdException);
    let mut expected = before.clone();
    expected.fp.mxcsr |= 4;
    assert_eq!(m, expected);
    // An exception that stays masked does not trap, and earlier flags don't either.
    (m.fp.xmm[3][0], m.fp.xmm[7][0]) = (1f64.to_bits(), 3f64.to_bits());
    assert_eq!(m.run(&mut host, &divide), Outcome::Done);
    assert_eq!((m.fp.xmm[3][0], m.fp.mxcsr), ((1f64 / 3.0).to_bits(), expected.fp.mxcsr | 0x20));
    // Unmasked underflow traps although the tiny result is exact; masked, it would raise nothing.
    (m.fp.xmm[3][0], m.fp.xmm[7][0]) = (f64::MIN_POSITIVE.to_bits(), 2f64.to_bits());
    m.fp.mxcsr = 0x1f80;
    assert_eq!(m.run(&mut host, &divide), Outcome::Done);
    assert_eq!((m.fp.xmm[3][0], m.fp.mxcsr), (1 << 51, 0x1f80));
    m.fp.xmm[3][0] = f64::MIN_POSITIVE.to_bits();
    m.fp.mxcsr = 0x1f80 & !(1 << 11);
    assert_eq!(m.run(&mut host, &divide), Outcome::SimdException);
    assert_eq!(m.fp.mxcsr & 0x3f, 0x10);
}

#[test]
fn rounding_and_denormal_modes() {
    let mut host = HostExec::new().unwrap();
    let add = assembled(|x| x.addsd(xmm3, xmm7).unwrap());
    for (mode, bits) in [(0, 0), (1, 0), (2, 1), (3, 0)] {
        let mut m = Machine::random(&mut Random(4));
        (m.fp.xmm[3][0], m.fp.xmm[7][0]) = (1f64.to_bits(), 1e-30f64.to_bits());
        m.fp.mxcsr = 0x1f80 | mode << 13;
        m.exec(&mut host, &add);
        assert_eq!((m.fp.xmm[3][0], m.fp.mxcsr), (1f64.to_bits() + bits, 0x1fa0 | mode << 13), "mode {mode}");
    }
    let mut m = Machine::random(&mut Random(4));
    (m.fp.xmm[3][0], m.fp.xmm[7][0]) = (1, 1);
    m.fp.mxcsr = 0x1fc0;
    m.exec(&mut host, &add);
    assert_eq!((m.fp.xmm[3][0], m.fp.mxcsr), (0, 0x1fc0));
}

#[test]
fn reserved_mxcsr_bits_are_harmless() {
    let mut host = HostExec::new().unwrap();
    let mut m = Machine::random(&mut Random(4));
    m.fp.mxcsr = u32::MAX;
    m.exec(&mut host, &assembled(|x| x.addps(xmm3, xmm7).unwrap()));
    assert_eq!(m.fp.mxcsr, 0xffff);
}
