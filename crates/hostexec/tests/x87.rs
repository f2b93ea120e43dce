//! x87 and MMX: arithmetic, stack, exceptions, and what they share.

mod rig;

use iced_x86::Instruction;
use iced_x86::code_asm::*;
use rig::{Machine, Random, assembled};
use umbra_hostexec::{HostExec, Outcome};

const C1: u16 = 1 << 9;

/// An empty stack, TOP 0.
fn empty() -> Machine {
    let mut m = Machine::random(&mut Random(77));
    (m.fp.fsw, m.fp.ftw, m.fp.fcw) = (0, 0, 0x37f);
    m
}

fn top(m: &Machine) -> u16 {
    m.fp.fsw >> 11 & 7
}

struct Fpu {
    host: HostExec,
    m: Machine,
}

impl Fpu {
    fn new() -> Self {
        Self { host: HostExec::new().unwrap(), m: empty() }
    }
    fn run(&mut self, i: &Instruction) -> Outcome {
        let prepared = self.host.prepare(i).unwrap();
        self.m.run(&mut self.host, &prepared)
    }
    fn exec(&mut self, f: impl FnOnce(&mut CodeAssembler)) {
        let outcome = self.run(&assembled(f));
        assert_eq!(outcome, Outcome::Done);
    }
    fn load(&mut self, x: f64) {
        self.m.mem.0[..8].copy_from_slice(&x.to_le_bytes());
        self.exec(|a| a.fld(qword_ptr(rbx)).unwrap());
    }
    fn pop(&mut self) -> f64 {
        self.exec(|a| a.fstp(qword_ptr(rbx)).unwrap());
        f64::from_le_bytes(self.m.mem.0[..8].try_into().unwrap())
    }
}

#[test]
fn arithmetic() {
    let mut f = Fpu::new();
    f.load(3.5);
    f.load(1.25);
    assert_eq!((top(&f.m), f.m.fp.ftw), (6, 0xc0));
    f.exec(|a| a.faddp(st1, st0).unwrap());
    assert_eq!(f.pop(), 4.75);
    f.load(6.0);
    f.load(7.0);
    f.exec(|a| a.fmul_2(st0, st1).unwrap());
    assert_eq!(f.pop(), 42.0);
    assert_eq!(f.pop(), 6.0);
    f.load(2.0);
    f.exec(|a| a.fsqrt().unwrap());
    assert_eq!(f.pop(), 2f64.sqrt());
    assert_eq!((top(&f.m), f.m.fp.ftw), (0, 0));
    f.m.mem.0[..4].copy_from_slice(&(-77i32).to_le_bytes());
    f.exec(|a| a.fild(dword_ptr(rbx)).unwrap());
    f.exec(|a| a.fabs().unwrap());
    f.exec(|a| a.fistp(word_ptr(rbx)).unwrap());
    assert_eq!(f.m.mem.0[..2], 77i16.to_le_bytes());
}

#[test]
fn rounding_control() {
    let mut f = Fpu::new();
    for (mode, rounded) in [(0, 2), (1, 2), (2, 3), (3, 2)] {
        f.m.fp.fcw = 0x37f | mode << 10;
        f.load(2.25);
        f.exec(|a| a.fistp(dword_ptr(rbx)).unwrap());
        assert_eq!(f.m.mem.0[0], rounded, "mode {mode}");
    }
    assert_eq!(f.m.fp.fcw, 0x37f | 3 << 10);
}

#[test]
fn comparisons() {
    for (a, b, codes, flags) in
        [(1.0, 2.0, 0x100, 1), (2.0, 1.0, 0, 0), (2.0, 2.0, 0x4000, 0x40), (f64::NAN, 1.0, 0x4500, 0x45)]
    {
        let mut f = Fpu::new();
        f.load(b);
        f.load(a);
        f.exec(|x| x.fcom_2(st0, st1).unwrap());
        assert_eq!(f.m.fp.fsw & 0x4500, codes, "{a} {b}");
        f.exec(|x| x.fcomi(st0, st1).unwrap());
        assert_eq!(f.m.rflags & 0x45, flags, "{a} {b}");
        f.exec(|x| x.fcmovbe(st0, st1).unwrap());
        let moved = if flags & 0x41 != 0 { b } else { a };
        assert_eq!(f.pop(), moved);
    }
}

#[test]
fn stack_faults() {
    let mut f = Fpu::new();
    for n in 0..8 {
        f.load(f64::from(n));
    }
    assert_eq!((f.m.fp.fsw & 0x7f, f.m.fp.ftw), (0, 0xff));
    f.exec(|a| a.fld1().unwrap());
    assert_eq!(f.m.fp.fsw & (C1 | 0x7f), C1 | 0x41, "overflow");
    assert_eq!(f.m.fp.st[0], [0xc000_0000_0000_0000, 0xffff]);
    let mut f = Fpu::new();
    f.exec(|a| a.fsqrt().unwrap());
    assert_eq!(f.m.fp.fsw & (C1 | 0x7f), 0x41, "underflow");
}

/// Nothing but the x87 part and memory changes, pointers and XMM included.
#[test]
fn the_rest_survives() {
    let mut host = HostExec::new().unwrap();
    let mut random = Random(8);
    for _ in 0..50 {
        let mut m = Machine::random(&mut random);
        m.fp.ftw = 0xff;
        let before = m.clone();
        m.exec(&mut host, &assembled(|a| a.fmul_2(st0, st3).unwrap()));
        let mut expected = before.clone();
        (expected.fp.fsw, expected.fp.st[0]) = (m.fp.fsw, m.fp.st[0]);
        assert_eq!(m, expected);
    }
}

#[test]
fn unmasked_divide_by_zero_changes_only_status() {
    let mut f = Fpu::new();
    f.m.fp.fcw = 0x37f & !4;
    f.load(1.0);
    f.load(0.0);
    let before = f.m.clone();
    let divide = assembled(|a| a.fdivp(st1, st0).unwrap());
    // ST(1) / ST(0).
    assert_eq!(f.run(&divide), Outcome::Suppressed);
    let mut expected = before.clone();
    expected.fp.fsw |= 0x8084;
    assert_eq!(f.m, expected);
    // Masked, the same divides.
    f.m = before;
    f.m.fp.fcw = 0x37f;
    assert_eq!(f.run(&divide), Outcome::Done);
    assert_eq!((f.m.fp.fsw & 0x80ff, f.pop()), (4, f64::INFINITY));
}

#[test]
fn unmasked_overflow_suppresses_the_store() {
    let mut f = Fpu::new();
    f.load(1e300);
    f.m.fp.fcw = 0x37f & !8;
    let before = f.m.clone();
    assert_eq!(f.run(&assembled(|a| a.fstp(dword_ptr(rbx)).unwrap())), Outcome::Suppressed);
    assert_eq!(f.m.mem, before.mem);
    assert_eq!((top(&f.m), f.m.fp.ftw), (top(&before), before.fp.ftw));
    assert_eq!(f.m.fp.fsw & 0x8088, 0x8088);
}

/// ST(0) becomes 2 to the power `exponent`, then is multiplied by itself, or by a half.
fn multiplied(fcw: u16, exponent: i32, by_itself: bool) -> (u16, u16) {
    let mut f = Fpu::new();
    f.load(0.5);
    f.load(1.0);
    f.m.fp.st[0][1] = (16383 + exponent) as u64;
    f.m.fp.fcw = fcw;
    let outcome = if by_itself {
        f.run(&assembled(|a| a.fmul_2(st0, st0).unwrap()))
    } else {
        f.run(&assembled(|a| a.fmul_2(st0, st1).unwrap()))
    };
    assert_eq!(outcome, Outcome::Done);
    (f.m.fp.fsw & 0x80ff, f.m.fp.st[0][1] as u16)
}

#[test]
fn unmasked_overflow_and_underflow_of_registers_adjust_the_exponent() {
    // "Numeric Overflow Exception (#O)", "Numeric Underflow Exception (#U)": by 24576.
    assert_eq!(multiplied(0x37f, 16383, true), (0x28, 0x7fff));
    assert_eq!(multiplied(0x37f & !8, 16383, true), (0x8088, 16383 + 2 * 16383 - 24576));
    // Exact: no underflow where it is masked.
    assert_eq!(multiplied(0x37f, -16382, false), (0, 0));
    assert_eq!(multiplied(0x37f & !0x10, -16382, false), (0x8090, 24576));
}

#[test]
fn unmasked_precision_stores_and_reports() {
    let mut f = Fpu::new();
    f.load(1.0);
    f.load(3.0);
    f.m.fp.fcw = 0x37f & !0x20;
    assert_eq!(f.run(&assembled(|a| a.fdivp(st1, st0).unwrap())), Outcome::Done);
    assert_eq!(f.m.fp.fsw & 0x80ff, 0x80a0);
}

#[test]
fn mmx_shares_the_registers() {
    let mut host = HostExec::new().unwrap();
    let mut m = Machine::random(&mut Random(6));
    // TOP 3: ST(i) is physical register i+3, and MM3 is ST(0).
    m.fp.fsw = 3 << 11 | 0x4000;
    m.fp.ftw = 0x18;
    let stack = m.fp.st;
    let before = m.clone();
    m.exec(&mut host, &assembled(|a| a.paddb(mm3, mm5).unwrap()));
    assert_eq!((m.fp.fsw, m.fp.ftw), (0x4000, 0xff));
    for physical in 0..8 {
        if physical != 3 {
            assert_eq!(m.fp.st[physical], stack[(physical + 8 - 3) % 8], "mm{physical}");
        }
    }
    let sum = stack[0][0]
        .to_le_bytes()
        .iter()
        .zip(stack[2][0].to_le_bytes())
        .map(|(a, b)| a.wrapping_add(b))
        .collect::<Vec<_>>();
    assert_eq!(m.fp.st[3][0].to_le_bytes()[..], sum);
    assert_eq!(m.fp.st[3][1] & 0xffff, 0xffff);
    let mut expected = before.clone();
    (expected.fp.st, expected.fp.fsw, expected.fp.ftw) = (m.fp.st, m.fp.fsw, m.fp.ftw);
    assert_eq!(m, expected);
}

/// The same MMX transition as the hardware's own: an x87 stub runs the instruction between FXRSTOR and FXSAVE.
#[test]
fn mmx_then_x87_sees_a_nan() {
    let mut f = Fpu::new();
    f.exec(|a| a.pxor(mm0, mm0).unwrap());
    f.exec(|a| a.fxam().unwrap());
    // Exponent all ones with integer bit 0: unsupported, C3 C2 C0 all 0.
    assert_eq!(f.m.fp.fsw & 0x4500, 0);
}
