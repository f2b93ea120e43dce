//! Every instruction code that exists: accepted or refused with a reason, and accepted ones behave.
#![allow(unsafe_code, reason = "reads and clears the host's MXCSR flags")]

mod rig;

use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic};
use rig::{Machine, Random, instance};
use std::collections::{BTreeMap, BTreeSet};
use umbra_hostexec::{Class, HostExec, HostExecError, Outcome};

fn forms(code: Code) -> impl Iterator<Item = Instruction> {
    [false, true].into_iter().filter_map(move |memory| instance(code, [3, 12, 7, 9], 1, memory))
}

/// Vector and x87 sets that guests may have, and what in them the CPU executes by itself.
#[test]
fn accepts_every_data_instruction_of_the_offered_sets() {
    use CpuidFeature::*;
    const SETS: [CpuidFeature; 19] = [
        MMX, SSE, SSE2, SSE3, SSSE3, SSE4_1, SSE4_2, AES, PCLMULQDQ, SHA, GFNI, AVX, AVX2, FMA, F16C, VAES, VPCLMULQDQ,
        FPU, FPU387,
    ];
    let mut host = HostExec::new().unwrap();
    let mut accepted = BTreeMap::<String, usize>::new();
    let mut refused = BTreeSet::new();
    for code in Code::values() {
        let sets = code.cpuid_features();
        if !sets.iter().all(|s| SETS.contains(s)) {
            continue;
        }
        for instruction in forms(code) {
            match host.prepare(&instruction) {
                Ok(_) => *accepted.entry(format!("{sets:?}")).or_default() += 1,
                Err(HostExecError::MissingFeature { feature, .. }) => println!("no {feature} here: {code:?}"),
                Err(error) => {
                    println!("{error}");
                    refused.insert(format!("{:?}", code.mnemonic()));
                }
            }
        }
    }
    println!("{accepted:#?}\n{:?}", host.code_size());
    let by_hand = [
        "Clflush",
        "Emms",
        "Fldcw",
        "Fldenv",
        "Fndisi",
        "Fneni",
        "Fnclex",
        "Fninit",
        "Fnsave",
        "Fnstcw",
        "Fnstenv",
        "Fnstsw",
        "Frstor",
        "Lfence",
        "Ldmxcsr",
        "Maskmovdqu",
        "Maskmovq",
        "Mfence",
        "Monitor",
        "Mwait",
        "Pause",
        "Prefetchnta",
        "Prefetcht0",
        "Prefetcht1",
        "Prefetcht2",
        "Sfence",
        "Stmxcsr",
        "Vgatherdpd",
        "Vgatherdps",
        "Vgatherqpd",
        "Vgatherqps",
        "Vldmxcsr",
        "Vmaskmovdqu",
        "Vmaskmovpd",
        "Vmaskmovps",
        "Vpgatherdd",
        "Vpgatherdq",
        "Vpgatherqd",
        "Vpgatherqq",
        "Vpmaskmovd",
        "Vpmaskmovq",
        "Vstmxcsr",
        "Vzeroall",
        "Vzeroupper",
        "Wait",
    ];
    let unexpected: Vec<_> = refused.iter().filter(|m| !by_hand.contains(&m.as_str())).collect();
    assert!(unexpected.is_empty(), "refused: {unexpected:?}");
    assert!(accepted.values().sum::<usize>() > 900);
}

/// No code panics, whatever its operands look like; none outside the offered sets is accepted.
#[test]
fn refuses_the_rest_with_reasons() {
    let mut host = HostExec::new().unwrap();
    for code in Code::values() {
        let mut bare = Instruction::default();
        bare.set_code(code);
        let _ = host.prepare(&bare);
        for instruction in forms(code) {
            let result = host.prepare(&instruction);
            let names = format!("{:?}", code.cpuid_features());
            let privileged = code.is_privileged() || code.is_stack_instruction();
            if names.contains("AVX512") || names.contains("D3NOW") || names.contains("XSAVE") || privileged {
                assert!(result.is_err(), "{code:?} accepted");
            }
        }
    }
}

struct Sample {
    instruction: Instruction,
    code: Code,
}

fn vector_samples(host: &mut HostExec, regs: [u32; 4], imm: u8) -> Vec<Sample> {
    let mut samples = Vec::new();
    for code in Code::values() {
        for memory in [false, true] {
            let Some(instruction) = instance(code, regs, imm, memory) else { continue };
            let Ok(prepared) = host.prepare(&instruction) else { continue };
            if matches!(prepared.class, Class::Sse | Class::Avx | Class::Mmx) {
                samples.push(Sample { instruction, code });
            }
        }
    }
    samples
}

/// Register operands of an instruction: file and number.
fn operands(i: &Instruction) -> Vec<(char, usize)> {
    use iced_x86::OpKind;
    (0..i.op_count())
        .filter(|k| i.op_kind(*k) == OpKind::Register)
        .map(|k| {
            let r = i.op_register(k);
            let file = if r.is_vector_register() {
                'v'
            } else if r.is_mm() {
                'm'
            } else {
                'g'
            };
            (file, r.number())
        })
        .collect()
}

fn value(m: &Machine, (file, number): (char, usize)) -> [u64; 4] {
    match file {
        'v' => m.ymm(number),
        'm' => [m.fp.st[number][0], 0, 0, 0],
        _ => [m.gpr[number], 0, 0, 0],
    }
}

fn set_value(m: &mut Machine, (file, number): (char, usize), v: [u64; 4]) {
    match file {
        'v' => (m.fp.xmm[number], m.fp.ymm_high[number]) = ([v[0], v[1]], [v[2], v[3]]),
        'm' => m.fp.st[number][0] = v[0],
        _ => m.gpr[number] = v[0],
    }
}

/// Only the first register operand, implicit results, flags and the memory operand change; and the same values in
/// other registers give the same results.
#[test]
fn nothing_else_changes_and_registers_are_alike() {
    let mut host = HostExec::new().unwrap();
    let mut random = Random(1);
    let (first, second) = ([3, 12, 7, 9], [13, 6, 10, 2]);
    for sample in vector_samples(&mut host, first, 0x15) {
        let (i, code) = (&sample.instruction, sample.code);
        let prepared = host.prepare(i).unwrap();
        let mut before = Machine::random(&mut random);
        before.fp.fsw = 0;
        let mut after = before.clone();
        assert_eq!(after.run(&mut host, &prepared), Outcome::Done);

        let named = operands(i);
        let implicit_xmm0 = format!("{code:?}").contains("strm");
        let mut expected = before.clone();
        if let Some(op0) = named.first().filter(|_| i.op0_kind() == iced_x86::OpKind::Register) {
            set_value(&mut expected, *op0, value(&after, *op0));
            if op0.0 == 'm' {
                expected.fp.st[op0.1][1] |= 0xffff;
            }
            if op0.0 == 'v' && prepared.class != Class::Avx {
                assert_eq!(after.fp.ymm_high[op0.1], before.fp.ymm_high[op0.1], "{code:?}");
            }
        }
        if implicit_xmm0 {
            expected.fp.xmm[0] = after.fp.xmm[0];
            expected.fp.ymm_high[0] = after.fp.ymm_high[0];
        }
        if format!("{code:?}").contains("stri") {
            expected.gpr[1] = after.gpr[1];
        }
        if prepared.enters_mmx {
            expected.fp.ftw = 0xff;
            // Sources keep their exponent; only a written register's becomes all ones.
            if let Some(op0) = named.first().filter(|o| o.0 == 'm') {
                expected.fp.st[op0.1][1] = after.fp.st[op0.1][1];
            }
        }
        if prepared.mxcsr {
            expected.fp.mxcsr = after.fp.mxcsr;
            assert_eq!(after.fp.mxcsr & !0x3f, before.fp.mxcsr, "{code:?}");
        }
        expected.rflags = before.rflags & !prepared.flags_written | after.rflags & prepared.flags_written;
        let written = prepared.mem_write as usize;
        expected.mem.0[..written].copy_from_slice(&after.mem.0[..written]);
        assert_eq!(after, expected, "{code:?}");

        let memory = i.op_kinds().any(|k| k == iced_x86::OpKind::Memory);
        let other = instance(code, second, 0x15, memory).unwrap();
        let mut moved = Machine::random(&mut random);
        moved.fp.fsw = 0;
        (moved.mem, moved.rflags) = (before.mem, before.rflags);
        (moved.fp.xmm[0], moved.gpr[0], moved.gpr[2]) = (before.fp.xmm[0], before.gpr[0], before.gpr[2]);
        let renamed = operands(&other);
        for (from, to) in named.iter().zip(&renamed) {
            set_value(&mut moved, *to, value(&before, *from));
        }
        moved.exec(&mut host, &other);
        for (from, to) in named.iter().zip(&renamed) {
            assert_eq!(value(&moved, *to), value(&after, *from), "{code:?}");
        }
        assert_eq!((moved.mem, moved.rflags, moved.fp.mxcsr), (after.mem, after.rflags, after.fp.mxcsr), "{code:?}");
        if implicit_xmm0 {
            assert_eq!(moved.fp.xmm[0], after.fp.xmm[0]);
        }
    }
}

fn host_mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: stores MXCSR to the pointed-to variable.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &mut value) };
    value
}

/// Guest's modes don't stay with the host.
#[test]
fn host_modes_survive() {
    let mut host = HostExec::new().unwrap();
    let add = instance(Code::Addps_xmm_xmmm128, [3, 12, 7, 9], 0, false).unwrap();
    let prepared = host.prepare(&add).unwrap();
    for mxcsr in [0x1f80, 0x1fbf, 0x3f80, 0x5f80, 0x7f80, 0x9f80, 0x1fc0, 0x1f00, 0x0000, 0xffff] {
        let mut m = Machine::random(&mut Random(3));
        m.fp.mxcsr = mxcsr;
        let _ = m.run(&mut host, &prepared);
        assert_eq!(host_mxcsr() & !0x3f, 0x1f80, "{mxcsr:#x}");
        assert_eq!(m.fp.mxcsr & !0x3f, mxcsr & !0x3f);
    }
}

fn clear_host_flags() {
    let value = 0x1f80u32;
    // SAFETY: the reset value, which Rust expects.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &value) };
}

/// Instructions said not to obey MXCSR raise no exception flag on the worst operands; of those said to obey it
/// all but the approximations do.
#[test]
fn mxcsr_users_are_known() {
    let worst: [u64; 12] = [
        0x7ff0_0000_0000_0001, // signalling NaN, double
        0x7f80_0001_7f80_0001, // signalling NaNs, single
        0x0000_0001_0000_0001, // denormal, single and double
        0x7fef_ffff_ffff_ffff, // largest double
        0x7f7f_ffff_7f7f_ffff, // largest singles
        0x3ff0_0000_0000_0001, // inexact double
        0x3f80_0001_3f80_0001, // inexact singles
        0x7fff_ffff_7fff_ffff,
        0x7c01_7c01_7c01_7c01, // signalling NaNs, half
        0x3ff5_5555_5555_5555,
        0,
        0xbfff_ffff_bfff_ffff,
    ];
    let mut host = HostExec::new().unwrap();
    let mut random = Random(2);
    for sample in vector_samples(&mut host, [3, 12, 7, 9], 0x31) {
        let prepared = host.prepare(&sample.instruction).unwrap();
        let mut raised = 0;
        for _ in 0..60 {
            let mut m = Machine::random(&mut random);
            let mut pick = || worst[random.next() as usize % worst.len()];
            m.fp.xmm.as_flattened_mut().fill_with(&mut pick);
            m.fp.ymm_high.as_flattened_mut().fill_with(&mut pick);
            for st in &mut m.fp.st {
                st[0] = pick();
            }
            for (chunk, value) in m.mem.0.chunks_mut(8).zip(std::iter::repeat_with(pick)) {
                chunk.copy_from_slice(&value.to_le_bytes());
            }
            clear_host_flags();
            assert_eq!(m.run(&mut host, &prepared), Outcome::Done);
            assert_eq!(host_mxcsr(), 0x1f80, "{:?} raised host flags", sample.code);
            raised |= m.fp.mxcsr & 0x3f;
        }
        use Mnemonic::*;
        let quiet = matches!(
            sample.code.mnemonic(),
            Rcpps | Rcpss | Rsqrtps | Rsqrtss | Vrcpps | Vrcpss | Vrsqrtps | Vrsqrtss | Cvtdq2pd | Vcvtdq2pd | Cvtpi2pd
        ) || matches!(sample.code, Code::Cvtsi2sd_xmm_rm32 | Code::VEX_Vcvtsi2sd_xmm_xmm_rm32);
        assert_eq!(raised != 0, prepared.mxcsr && !quiet, "{:?}: flags {raised:#x}", sample.code);
    }
}
