//! The host as oracle for integer instructions.

mod rig;

use iced_x86::Instruction;
use iced_x86::code_asm::*;
use proptest::prelude::*;
use rig::{Machine, Random, assembled, decoded};
use umbra_hostexec::{HostExec, HostExecError, Outcome};

const STATUS: u64 = 0x8d5;

fn flags(carry: bool, overflow: bool, adjust: bool, result: u64) -> u64 {
    let parity = (result as u8).count_ones().is_multiple_of(2);
    let bit = |b: bool, n: u32| u64::from(b) << n;
    bit(carry, 0)
        | bit(parity, 2)
        | bit(adjust, 4)
        | bit(result == 0, 6)
        | bit(result >> 63 != 0, 7)
        | bit(overflow, 11)
}

proptest! {
    #[test]
    fn add_and_subtract(a: u64, b: u64, carry: bool, seed: u64) {
        let mut host = HostExec::new().unwrap();
        for (i, with_carry, subtract) in [
            (assembled(|x| x.add(rdi, r8).unwrap()), false, false),
            (assembled(|x| x.adc(rdi, r8).unwrap()), true, false),
            (assembled(|x| x.sub(rdi, r8).unwrap()), false, true),
            (assembled(|x| x.sbb(rdi, r8).unwrap()), true, true),
        ] {
            let mut m = Machine::random(&mut Random(seed));
            (m.gpr[7], m.gpr[8]) = (a, b);
            m.rflags = m.rflags & !1 | u64::from(carry);
            let mut expected = m.clone();
            let c = u64::from(carry && with_carry);
            let (wide, result) = if subtract {
                (i128::from(a as i64) - i128::from(b as i64) - i128::from(c), a.wrapping_sub(b).wrapping_sub(c))
            } else {
                (i128::from(a as i64) + i128::from(b as i64) + i128::from(c), a.wrapping_add(b).wrapping_add(c))
            };
            let carry_out = if subtract { u128::from(a) < u128::from(b) + u128::from(c) } else { u128::from(a) + u128::from(b) + u128::from(c) > u128::from(u64::MAX) };
            let overflow = wide != i128::from(result as i64);
            expected.gpr[7] = result;
            expected.rflags = m.rflags & !STATUS | flags(carry_out, overflow, (a ^ b ^ result) & 16 != 0, result);
            m.exec(&mut host, &i);
            prop_assert_eq!(m, expected, "{:?}", i.code());
        }
    }

    #[test]
    fn multiply_divide_and_memory(a: u64, b in 1u64.., seed: u64) {
        let mut host = HostExec::new().unwrap();
        let mut m = Machine::random(&mut Random(seed));
        (m.gpr[0], m.gpr[2]) = (a, a % b);
        m.mem.0[..8].copy_from_slice(&b.to_le_bytes());
        m.exec(&mut host, &assembled(|x| x.div(qword_ptr(rax + rdx * 2)).unwrap()));
        let dividend = u128::from(a % b) << 64 | u128::from(a);
        prop_assert_eq!((m.gpr[0], m.gpr[2]), ((dividend / u128::from(b)) as u64, (dividend % u128::from(b)) as u64));
        (m.gpr[0], m.gpr[9]) = (a, b);
        m.exec(&mut host, &assembled(|x| x.mul(r9).unwrap()));
        prop_assert_eq!(u128::from(m.gpr[2]) << 64 | u128::from(m.gpr[0]), u128::from(a) * u128::from(b));
        m.gpr[3] = a;
        m.exec(&mut host, &assembled(|x| x.lock().xadd(qword_ptr(rsp), rbx).unwrap()));
        prop_assert_eq!((m.gpr[3], &m.mem.0[..8]), (b, &a.wrapping_add(b).to_le_bytes()[..]));
    }

    /// IDIV's check agrees with Rust's arithmetic on every width.
    #[test]
    fn signed_division(low: i64, high in -3i64..3, divisor in -300i64..300) {
        let mut host = HostExec::new().unwrap();
        let mut m = Machine::random(&mut Random(1));
        (m.gpr[0], m.gpr[2], m.gpr[6]) = (low as u64, high as u64, divisor as u64);
        let prepared = host.prepare(&assembled(|x| x.idiv(esi).unwrap())).unwrap();
        let dividend = (high as i32 as i64) << 32 | i64::from(low as u32);
        let quotient = dividend.checked_div(divisor).and_then(|q| i32::try_from(q).ok());
        let outcome = m.run(&mut host, &prepared);
        match quotient {
            Some(q) => prop_assert_eq!((outcome, m.gpr[0]), (Outcome::Done, u64::from(q as u32))),
            None => prop_assert_eq!((outcome, m.gpr[0]), (Outcome::DivideError, low as u64)),
        }
    }
}

#[test]
fn high_bytes_and_bit_counts() {
    let mut host = HostExec::new().unwrap();
    let mut m = Machine::random(&mut Random(3));
    (m.gpr[0], m.mem.0[0]) = (0x1122_3344_5566_7788, 5);
    m.exec(&mut host, &assembled(|x| x.add(ah, byte_ptr(rsi)).unwrap()));
    assert_eq!(m.gpr[0], 0x1122_3344_5566_7c88);
    m.exec(&mut host, &assembled(|x| x.popcnt(rcx, rax).unwrap()));
    assert_eq!(m.gpr[1], 0x1122_3344_5566_7c88u64.count_ones() as u64);
    m.gpr[11] = 0xffff_ffff;
    m.exec(&mut host, &assembled(|x| x.crc32(r11d, al).unwrap()));
    assert_eq!(m.gpr[11], u64::from(crc32c(0xffff_ffff, 0x88)));
}

fn crc32c(mut crc: u32, byte: u8) -> u32 {
    crc ^= u32::from(byte);
    for _ in 0..8 {
        crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
    }
    crc
}

#[test]
fn every_register_but_rsp_is_loaded_and_stored() {
    let mut host = HostExec::new().unwrap();
    for r in (0..16u8).filter(|r| *r != 4) {
        // NOT r64.
        let i: Instruction = decoded(64, &[0x48 | r >> 3, 0xf7, 0xd0 | r & 7]);
        let mut m = Machine::random(&mut Random(r.into()));
        let mut expected = m.clone();
        expected.gpr[r as usize] = !expected.gpr[r as usize];
        m.exec(&mut host, &i);
        assert_eq!(m, expected);
    }
}

#[test]
fn refusals() {
    let mut host = HostExec::new().unwrap();
    for i in [
        assembled(|x| x.add(rsp, rax).unwrap()),
        assembled(|x| x.push(rax).unwrap()),
        assembled(|x| x.bts(qword_ptr(rax), rcx).unwrap()),
        assembled(|x| x.lea(rax, ptr(rbx)).unwrap()),
        assembled(|x| x.rdtsc().unwrap()),
        assembled(|x| x.rdrand(rax).unwrap()),
        assembled(|x| x.cpuid().unwrap()),
        assembled(|x| x.syscall().unwrap()),
        assembled(|x| x.popfq().unwrap()),
        assembled(|x| x.std().unwrap()),
        assembled(|x| x.mov(ds, eax).unwrap()),
        assembled(|x| x.mov(rax, cr3).unwrap()),
        assembled(|x| x.movsb().unwrap()),
    ] {
        let result = host.prepare(&i);
        assert!(matches!(result, Err(HostExecError::Unsupported { .. })), "{:?}: {result:?}", i.code());
    }
}
