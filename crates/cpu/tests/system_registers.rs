//! What may be loaded into bases and targets, and TF across SYSCALL and SYSRET.

mod bus;
mod long_mode;

use iced_x86::code_asm::*;
use long_mode::{CODE, Guest};
use umbra_arch::control::Efer;
use umbra_arch::fault::vector;
use umbra_arch::rflags;
use umbra_arch::segment::{Attr, Seg, Segment};
use umbra_arch::state::Activity;

const GDT: u64 = 0x5000;
const TASK: u16 = 0x28;
const TSS: u64 = 0x8000;

/// Upper base bits that 48-bit addresses have, or only 57-bit ones, or none.
const UPPER: [(u32, bool); 4] = [(0, true), (0xffff_8000, true), (0xffaa_aaaa, false), (0xaaaa_aaaa, false)];

#[test]
fn task_and_ldt_registers_take_canonical_bases_only() {
    for (upper, fits) in UPPER {
        for ldt in [false, true] {
            let mut g = Guest::new();
            g.s.gdtr.limit = 0x37;
            let kind = if ldt { 0x82u64 } else { 0x89 };
            g.write(GDT + u64::from(TASK), &(0x67u64 | kind << 40).to_le_bytes());
            g.write(GDT + u64::from(TASK) + 8, &u64::from(upper).to_le_bytes());
            g.s.gpr[0] = TASK.into();
            let got = g.run(|a| if ldt { a.lldt(ax).unwrap() } else { a.ltr(ax).unwrap() });
            assert_eq!(got, (!fits).then_some(vector::GP), "{upper:#x} ldt {ldt}");
            if fits {
                let register = g.s.segment(if ldt { Seg::Ldtr } else { Seg::Tr });
                assert_eq!(register.base, u64::from(upper) << 32);
            } else {
                assert_eq!(u64::from_le_bytes(g.read(g.s.gpr[4])), TASK.into(), "error code");
            }
        }
    }
}

#[test]
fn monitor_and_mwait() {
    // ECX of MONITOR, of MWAIT; what happens.
    for (hints, extensions, fault) in [(1, 0, Some(vector::GP)), (0, 2, Some(vector::GP)), (0, 0, None), (0, 1, None)] {
        let mut g = Guest::new();
        g.s.gpr[0] = long_mode::DATA;
        let got = g.run(|a| {
            a.mov(ecx, hints).unwrap();
            a.monitor().unwrap();
            a.mov(ecx, extensions).unwrap();
            a.mwait().unwrap();
        });
        assert_eq!(got, fault, "{hints} {extensions}");
        assert_eq!(g.s.activity == Activity::Waiting, fault.is_none());
    }
    // Not armed, it falls through; an address that can't be read is a fault.
    let mut g = Guest::new();
    g.s.gpr[1] = 0;
    assert_eq!(g.run(|a| a.mwait().unwrap()), None);
    assert_eq!(g.s.activity, Activity::Halted, "the HLT behind it");
    g.s.gpr[0] = long_mode::ABSENT;
    assert_eq!(g.run(|a| a.monitor().unwrap()), Some(vector::PF));
    // Outside ring 0 they are undefined.
    let mut g = guest_with_rings();
    g.s.cpl = 3;
    g.s.gpr[0] = long_mode::DATA;
    g.s.gpr[1] = 0;
    g.write(TSS + 4, &0x31_0000u64.to_le_bytes());
    assert_eq!(g.run(|a| a.monitor().unwrap()), Some(vector::UD));
}

#[test]
fn monitor_can_be_switched_off() {
    const MISC_ENABLE: u32 = 0x1a0;
    let mut g = Guest::new();
    g.s.gpr[0] = long_mode::DATA;
    for on in [true, false, true] {
        g.s.msr.misc_enable = 1;
        (g.s.gpr[1], g.s.gpr[0], g.s.gpr[2]) = (MISC_ENABLE.into(), 1 | u64::from(on) << 18, 0);
        assert_eq!(g.run(|a| a.wrmsr().unwrap()), None);
        g.s.gpr[0] = 1;
        assert_eq!(g.run(|a| a.cpuid().unwrap()), None);
        assert_eq!(g.s.gpr[1] >> 3 & 1, u64::from(on), "CPUID.1:ECX");
        (g.s.gpr[0], g.s.gpr[1], g.s.gpr[2]) = (long_mode::DATA, 0, 0);
        assert_eq!(g.run(|a| a.monitor().unwrap()), (!on).then_some(vector::UD));
        assert_eq!(g.run(|a| a.mwait().unwrap()), (!on).then_some(vector::UD));
    }
}

#[test]
fn base_msrs_take_canonical_values_only() {
    // FS.base, GS.base, kernel GS, LSTAR, CSTAR, SYSENTER_ESP, SYSENTER_EIP.
    for msr in [0xc000_0100u64, 0xc000_0101, 0xc000_0102, 0xc000_0082, 0xc000_0083, 0x175, 0x176] {
        for (upper, fits) in UPPER {
            let mut g = Guest::new();
            (g.s.gpr[1], g.s.gpr[0], g.s.gpr[2]) = (msr, 0, upper.into());
            assert_eq!(g.run(|a| a.wrmsr().unwrap()), (!fits).then_some(vector::GP), "{msr:#x} {upper:#x}");
        }
    }
}

/// A guest that can go to ring 3 and back, with SYSCALL's segments.
fn guest_with_rings() -> Guest {
    let mut g = Guest::new();
    g.s.efer = Efer::new(g.s.efer.raw() | Efer::SCE);
    g.s.msr.star = 0x0018_0008 << 32;
    g.s.seg[Seg::Tr as usize] = Segment { base: TSS, limit: 0x67, attr: Attr(0x8b), selector: TASK };
    g.write(TSS + 4, &0x31_0000u64.to_le_bytes());
    g
}

#[test]
fn sysret_that_sets_tf_traps_before_the_next_instruction() {
    let mut g = guest_with_rings();
    (g.s.gpr[1], g.s.gpr[11]) = (CODE + 0x800, rflags::TF | 2);
    assert_eq!(g.run(|a| a.sysretq().unwrap()), Some(vector::DB));
    let saved = |offset| u64::from_le_bytes(g.read(g.s.gpr[4] + offset));
    assert_eq!((saved(0), saved(8)), (CODE + 0x800, 0x2b));
}

#[test]
fn syscall_that_masks_tf_takes_no_trap() {
    let mut g = guest_with_rings();
    g.s.rflags |= rflags::TF;
    (g.s.msr.lstar, g.s.msr.fmask) = (CODE + 0x800, rflags::TF);
    // HLT at the target.
    g.write(CODE + 0x800, &[0xf4]);
    assert_eq!(g.run(|a| a.syscall().unwrap()), None);
    assert_eq!((g.s.rip, g.s.gpr[11] & rflags::TF), (CODE + 0x801, rflags::TF));
}
