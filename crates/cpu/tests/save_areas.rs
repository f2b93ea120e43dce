//! FXSAVE, XSAVE's family and the x87 environment: formats, round trips, refusals.

mod bus;
mod long_mode;

use iced_x86::code_asm::*;
use long_mode::{DATA, Guest};
use umbra_arch::control::Cr4;
use umbra_arch::fault::vector;
use umbra_arch::fpu::FpState;

const AREA: u64 = DATA + 0x1000;

fn quad(image: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(image[at..at + 8].try_into().unwrap())
}

/// Distinct values in every field.
fn populated() -> Guest {
    let mut g = Guest::new();
    let lanes = |seed: u64| std::array::from_fn(|i| [seed | i as u64, seed << 8 | i as u64]);
    g.s.fp = FpState {
        fcw: 0x27f,
        fsw: 0x2800,
        ftw: 0xe7,
        fop: 0x5a5,
        fip: 0x1234_5678_9abc,
        fdp: 0xfedc_ba98_7654,
        mxcsr: 0x3fa1,
        st: std::array::from_fn(|i| [0x8000_0000_0000_0000 | i as u64, 0x4000 + i as u64]),
        xmm: lanes(0xaa00),
        ymm_high: lanes(0xbb00),
        ..FpState::default()
    };
    g.s.gpr[3] = AREA;
    (g.s.gpr[0], g.s.gpr[2]) = (u64::MAX, u64::MAX);
    g.s.cr4 = Cr4::new(g.s.cr4.raw() | Cr4::PKE);
    (g.s.xcr0, g.s.pkru) = (0x207, 0x5555_0000);
    g
}

/// All that the area holds, wiped.
fn wipe(g: &mut Guest) {
    g.s.fp = FpState { fcw: 0x37f, ftw: 0, ..FpState::default() };
    g.s.pkru = 0;
}

fn legacy_is_right(fp: &FpState, image: &[u8]) {
    let fcw_and_more = u64::from(fp.fcw) | u64::from(fp.fsw) << 16 | u64::from(fp.ftw) << 32 | u64::from(fp.fop) << 48;
    assert_eq!(quad(image, 0), fcw_and_more);
    assert_eq!((quad(image, 8), quad(image, 16)), (fp.fip, fp.fdp));
    assert_eq!(quad(image, 24), 0xffff_0000_0000 | u64::from(fp.mxcsr));
    for i in 0..8 {
        assert_eq!([quad(image, 32 + 16 * i), quad(image, 40 + 16 * i)], fp.st[i]);
    }
    for i in 0..16 {
        assert_eq!([quad(image, 160 + 16 * i), quad(image, 168 + 16 * i)], fp.xmm[i]);
    }
}

#[test]
fn fxsave_round_trip() {
    let mut g = populated();
    let before = g.s.fp;
    g.write(AREA + 416, &[0xee; 96]);
    assert_eq!(g.run(|a| a.fxsave64(ptr(rbx)).unwrap()), None);
    let image = g.read::<512>(AREA);
    legacy_is_right(&before, &image);
    assert_eq!(image[416..], [0xee; 96], "reserved and software's bytes");
    g.s.fp = FpState { ymm_high: before.ymm_high, ..FpState::default() };
    assert_eq!(g.run(|a| a.fxrstor64(ptr(rbx)).unwrap()), None);
    assert_eq!(g.s.fp, before);
    // Without REX.W pointers have 32 bits.
    assert_eq!(g.run(|a| a.fxsave(ptr(rbx)).unwrap()), None);
    assert_eq!(quad(&g.read::<512>(AREA), 8), before.fip & 0xffff_ffff);
    // Reserved MXCSR bits.
    g.write(AREA + 24, &0x1_0000u32.to_le_bytes());
    assert_eq!(g.run(|a| a.fxrstor(ptr(rbx)).unwrap()), Some(vector::GP));
}

#[test]
fn xsave_standard_round_trip() {
    let mut g = populated();
    let (before, pkru) = (g.s.fp, g.s.pkru);
    g.write(AREA, &[0; 4096]);
    assert_eq!(g.run(|a| a.xsave64(ptr(rbx)).unwrap()), None);
    let image = g.read::<2704>(AREA);
    legacy_is_right(&before, &image);
    assert_eq!((quad(&image, 512), quad(&image, 520)), (0x207, 0));
    for i in 0..16 {
        assert_eq!([quad(&image, 576 + 16 * i), quad(&image, 584 + 16 * i)], before.ymm_high[i]);
    }
    assert_eq!(quad(&image, 2688), u64::from(pkru));
    wipe(&mut g);
    assert_eq!(g.run(|a| a.xrstor64(ptr(rbx)).unwrap()), None);
    assert_eq!((g.s.fp, g.s.pkru), (before, pkru));
    // The same by parts: what isn't asked for isn't touched.
    wipe(&mut g);
    g.s.gpr[0] = 4;
    g.s.gpr[2] = 0;
    assert_eq!(g.run(|a| a.xrstor64(ptr(rbx)).unwrap()), None);
    assert_eq!((g.s.fp.ymm_high, g.s.fp.xmm, g.s.pkru), (before.ymm_high, [[0; 2]; 16], 0));
    assert_eq!(g.s.fp.mxcsr, before.mxcsr, "the standard format loads MXCSR with AVX");
}

#[test]
fn compacted_round_trip() {
    for supervisor in [false, true] {
        let mut g = populated();
        let (before, pkru) = (g.s.fp, g.s.pkru);
        let save =
            |a: &mut CodeAssembler| if supervisor { a.xsaves64(ptr(rbx)) } else { a.xsavec64(ptr(rbx)) }.unwrap();
        g.write(AREA, &[0; 4096]);
        assert_eq!(g.run(save), None);
        let image = g.read::<1024>(AREA);
        legacy_is_right(&before, &image);
        assert_eq!((quad(&image, 512), quad(&image, 520)), (0x207, 1 << 63 | 0x207));
        assert_eq!([quad(&image, 576), quad(&image, 584)], before.ymm_high[0]);
        assert_eq!(quad(&image, 832), u64::from(pkru), "right behind AVX");
        wipe(&mut g);
        let load =
            |a: &mut CodeAssembler| if supervisor { a.xrstors64(ptr(rbx)) } else { a.xrstor64(ptr(rbx)) }.unwrap();
        assert_eq!(g.run(load), None);
        assert_eq!((g.s.fp, g.s.pkru), (before, pkru));
    }
}

/// Components in their initial configuration aren't saved, and come back initial.
#[test]
fn init_optimisation() {
    let mut g = populated();
    g.s.fp.ymm_high = [[0; 2]; 16];
    g.s.fp.xmm = [[0; 2]; 16];
    g.s.fp.mxcsr = 0x1f80;
    let before = g.s.fp;
    g.write(AREA, &[0xee; 512]);
    g.write(AREA + 512, &[0; 64]);
    g.write(AREA + 576, &[0xee; 512]);
    assert_eq!(g.run(|a| a.xsavec64(ptr(rbx)).unwrap()), None);
    let image = g.read::<1024>(AREA);
    assert_eq!((quad(&image, 512), quad(&image, 520)), (0x201, 1 << 63 | 0x207));
    assert_eq!((image[160], image[24], image[576]), (0xee, 0xee, 0xee));
    (g.s.fp.ymm_high, g.s.fp.xmm, g.s.fp.mxcsr) = ([[1; 2]; 16], [[1; 2]; 16], 0x1fa0);
    assert_eq!(g.run(|a| a.xrstor64(ptr(rbx)).unwrap()), None);
    assert_eq!(g.s.fp, before);

    g.write(AREA + 512, &[0; 64]);
    g.write(AREA + 512, &4u64.to_le_bytes());
    assert_eq!(g.run(|a| a.xsaveopt64(ptr(rbx)).unwrap()), None);
    let image = g.read::<1024>(AREA);
    assert_eq!((quad(&image, 512), image[576]), (0x201, 0xee), "AVX became initial, unwritten");
    assert_eq!(quad(&image, 24) as u32, 0x1f80, "MXCSR is written with SSE asked for");
    // XGETBV tells the same.
    g.s.gpr[1] = 1;
    assert_eq!(g.run(|a| a.xgetbv().unwrap()), None);
    assert_eq!(g.s.gpr[0], 0x201);
}

#[test]
fn refusals_of_xrstor() {
    type Damage = (u64, u64, bool);
    // Offset in the header, value there, whether it is legal.
    let cases: [Damage; 8] = [
        (0, 7, true),
        (0, 8, false),
        (8, 1, false),
        (16, 1, false),
        (24, 1, true),
        (8, 1 << 63 | 7, true),
        (8, 1 << 63 | 8, false),
        (8, 1 << 63, true),
    ];
    for (at, value, legal) in cases {
        let mut g = populated();
        g.write(AREA, &[0; 4096]);
        g.write(AREA + 512 + at, &value.to_le_bytes());
        let fault = g.run(|a| a.xrstor64(ptr(rbx)).unwrap());
        assert_eq!(fault, (!legal).then_some(vector::GP), "{at}: {value:#x}");
    }
    // In compacted areas all of the header's rest must be 0, and XSTATE_BV within XCOMP_BV.
    for (at, value) in [(24, 1), (0, 4)] {
        let mut g = populated();
        g.write(AREA, &[0; 4096]);
        g.write(AREA + 520, &(1u64 << 63 | 3).to_le_bytes());
        g.write(AREA + 512 + at, &u64::to_le_bytes(value));
        assert_eq!(g.run(|a| a.xrstor64(ptr(rbx)).unwrap()), Some(vector::GP));
    }
    // XRSTORS knows only compacted areas.
    let mut g = populated();
    g.write(AREA, &[0; 4096]);
    assert_eq!(g.run(|a| a.xrstors64(ptr(rbx)).unwrap()), Some(vector::GP));
}

#[test]
fn xsetbv_legality() {
    for value in 0..0x400u64 {
        let mut g = populated();
        (g.s.gpr[0], g.s.gpr[1], g.s.gpr[2]) = (value, 0, 0);
        let legal = value & !0x207 == 0 && value & 1 != 0 && value & 6 != 4;
        assert_eq!(g.run(|a| a.xsetbv().unwrap()), (!legal).then_some(vector::GP), "{value:#x}");
        assert_eq!(g.s.xcr0, if legal { value } else { 0x207 });
    }
}

#[test]
fn x87_environment() {
    let mut g = populated();
    // TOP 5: physical 0..8 hold ST(3)..ST(7), ST(0)..ST(2); FTW E7h leaves physical 3 and 4 empty.
    g.s.fp.st[3] = [0, 0];
    g.s.fp.st[4] = [0x8000_0000_0000_0000, 0x7fff];
    g.s.fp.st[5] = [1, 0];
    g.s.fp.fsw |= 1;
    let before = g.s.fp;
    assert_eq!(g.run(|a| a.fnstenv(ptr(rbx)).unwrap()), None);
    let image = g.read::<28>(AREA);
    let word = |n: usize| u32::from_le_bytes(image[4 * n..4 * n + 4].try_into().unwrap());
    assert_eq!((word(0), word(1)), (0xffff_027f, 0xffff_2801));
    // From physical 7 down: valid, valid, valid, empty, empty, special, special, zero.
    assert_eq!(word(2), 0xffff_0000 | 0b00_00_00_11_11_10_10_01);
    assert_eq!((word(3), word(4), word(5)), (before.fip as u32, 0x5a5 << 16, before.fdp as u32));
    assert_eq!(g.s.fp.fcw, 0x27f);
    assert_eq!(g.run(|a| a.fninit().unwrap()), None);
    assert_eq!((g.s.fp.fcw, g.s.fp.fsw, g.s.fp.ftw), (0x37f, 0, 0));
    assert_eq!(g.run(|a| a.fldenv(ptr(rbx)).unwrap()), None);
    let expected = FpState { fip: before.fip & 0xffff_ffff, fdp: before.fdp & 0xffff_ffff, ..before };
    assert_eq!(g.s.fp, expected);
}

#[test]
fn fnsave_round_trip() {
    let mut g = populated();
    let before = g.s.fp;
    assert_eq!(g.run(|a| a.fnsave(ptr(rbx)).unwrap()), None);
    assert_eq!((g.s.fp.fcw, g.s.fp.fsw, g.s.fp.ftw, g.s.fp.xmm), (0x37f, 0, 0, before.xmm));
    assert_eq!(quad(&g.read::<108>(AREA), 28 + 10), before.st[1][0]);
    g.s.fp.st = [[9; 2]; 8];
    assert_eq!(g.run(|a| a.frstor(ptr(rbx)).unwrap()), None);
    let expected = FpState { fip: before.fip & 0xffff_ffff, fdp: before.fdp & 0xffff_ffff, ..before };
    assert_eq!(g.s.fp, expected);
}

/// A loaded control word that unmasks a raised exception makes it pending.
#[test]
fn fldcw_unmasks() {
    let mut g = populated();
    g.s.fp.fsw |= 4;
    g.write(AREA, &0x37bu16.to_le_bytes());
    assert_eq!(g.run(|a| a.fldcw(ptr(rbx)).unwrap()), None);
    assert_eq!((g.s.fp.fcw, g.s.fp.fsw & 0x8080), (0x37b, 0x8080));
    assert_eq!(g.run(|a| a.fld1().unwrap()), Some(vector::MF));
    assert_eq!(g.run(|a| a.fnclex().unwrap()), None);
    assert_eq!(g.s.fp.fsw & 0x80ff, 0);
}
