//! SIMD and x87 rows in 32-bit code: eight registers, segments, narrow pointers.

mod bus;
mod long_mode;

use iced_x86::code_asm::*;
use long_mode::{DATA, Guest};
use umbra_arch::fault::vector;
use umbra_arch::segment::{Seg, Segment};

fn guest() -> Guest {
    let mut g = Guest::new();
    g.s.seg[Seg::Cs as usize] = Segment::flat_code32(8, 0);
    g.s.gpr[3] = DATA;
    g.s.fp.xmm = std::array::from_fn(|i| [i as u64 + 1; 2]);
    g.s.fp.ymm_high = g.s.fp.xmm;
    g
}

fn run(g: &mut Guest, f: impl FnOnce(&mut CodeAssembler)) -> Option<u8> {
    let mut a = CodeAssembler::new(32).unwrap();
    f(&mut a);
    let code = a.assemble(0).unwrap();
    g.run_bytes(&code)
}

#[test]
fn only_eight_registers_exist() {
    let mut g = guest();
    let before = g.s.fp;
    g.write(DATA, &[0xee; 1024]);
    assert_eq!(run(&mut g, |a| a.fxsave(ptr(ebx)).unwrap()), None);
    let image = g.read::<512>(DATA);
    assert_eq!((image[160 + 7 * 16], image[160 + 8 * 16]), (8, 0xee));
    assert_eq!(run(&mut g, |a| a.vzeroall().unwrap()), None);
    assert_eq!((g.s.fp.xmm[7], g.s.fp.ymm_high[7]), ([0; 2], [0; 2]));
    assert_eq!((&g.s.fp.xmm[8..], &g.s.fp.ymm_high[8..]), (&before.xmm[8..], &before.ymm_high[8..]));
    assert_eq!(run(&mut g, |a| a.fxrstor(ptr(ebx)).unwrap()), None);
    assert_eq!(g.s.fp.xmm, before.xmm);

    let mut g = guest();
    g.write(DATA, &[0; 64 * 16]);
    g.write(DATA + 576, &[0xee; 256]);
    (g.s.gpr[0], g.s.gpr[2]) = (7, 0);
    assert_eq!(run(&mut g, |a| a.xsavec(ptr(ebx)).unwrap()), None);
    let image = g.read::<832>(DATA);
    assert_eq!((image[576 + 7 * 16], image[576 + 8 * 16]), (8, 0xee));
    g.s.fp.ymm_high = [[9; 2]; 16];
    assert_eq!(run(&mut g, |a| a.xrstor(ptr(ebx)).unwrap()), None);
    assert_eq!((g.s.fp.ymm_high[7], g.s.fp.ymm_high[8]), ([8; 2], [9; 2]));
}

#[test]
fn vector_operands_obey_segments() {
    let mut g = guest();
    g.s.seg[Seg::Fs as usize] = Segment { base: DATA, ..Segment::flat_data(16, 0) };
    g.write(DATA + 0x20, &[7; 32]);
    g.s.gpr[6] = 0x10;
    assert_eq!(run(&mut g, |a| a.vmovdqu(ymm1, ymmword_ptr(esi + 0x10).fs()).unwrap()), None);
    assert_eq!((g.s.fp.xmm[1], g.s.fp.ymm_high[1]), ([0x0707_0707_0707_0707; 2], [0x0707_0707_0707_0707; 2]));
    // The last byte lies beyond the limit.
    for (seg, fault) in [(Seg::Ds, vector::GP), (Seg::Ss, vector::SS)] {
        let mut g = guest();
        g.s.seg[seg as usize].limit = DATA as u32 + 14;
        let at = if seg == Seg::Ds { ptr(ebx) } else { ptr(ebx).ss() };
        assert_eq!(run(&mut g, |a| a.movups(xmm1, at).unwrap()), Some(fault));
        g = guest();
        g.s.seg[seg as usize].limit = DATA as u32 + 15;
        assert_eq!(run(&mut g, |a| a.movups(xmm1, at).unwrap()), None);
    }
}

#[test]
fn general_registers_have_32_bits() {
    let mut g = guest();
    g.s.fp.xmm[1] = [0x1122_3344_8899_aabb, 0];
    assert_eq!(run(&mut g, |a| a.movd(ecx, xmm1).unwrap()), None);
    assert_eq!(g.s.gpr[1], 0x8899_aabb);
    g.s.gpr[1] = -5i32 as u32 as u64;
    assert_eq!(run(&mut g, |a| a.cvtsi2sd(xmm2, ecx).unwrap()), None);
    assert_eq!(g.s.fp.xmm[2][0], (-5f64).to_bits());
}

/// The environment of 16-bit operand size: seven words.
#[test]
fn short_environment() {
    let mut g = guest();
    (g.s.fp.fip, g.s.fp.fdp, g.s.fp.ftw, g.s.fp.fsw) = (0x1_2345, 0x6789, 0x80, 7 << 11);
    g.s.fp.st[0] = [1 << 63, 0x3fff];
    g.write(DATA, &[0xee; 32]);
    assert_eq!(g.run_bytes(&[0x66, 0xd9, 0x33]), None);
    let words: [u16; 8] = {
        let raw = g.read::<16>(DATA);
        std::array::from_fn(|i| u16::from_le_bytes([raw[2 * i], raw[2 * i + 1]]))
    };
    assert_eq!(words, [0x37f, 0x3800, 0x3fff, 0x2345, 0, 0x6789, 0, 0xeeee]);
}
