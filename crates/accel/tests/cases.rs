//! Small guests under KVM, through the runner of cases.

mod support;

use iced_x86::code_asm::*;
use std::time::Duration;
use support::*;
use umbra_accel::defects::PARTIAL_WRITE;
use umbra_accel::kvm::{CaseEnd, CaseLimit, CaseRunner};
use umbra_arch::cpuid::{FeatureSet, HostOffer};
use umbra_arch::exit::RefusalKind;
use umbra_arch::fpu::FpState;
use umbra_arch::segment::{Attr, Segment};
use umbra_arch::state::{Msrs, Shadow};
use umbra_arch::{CpuState, Gpa, GpaPage};

/// What a state looks like after it has been in KVM and back, nothing executed.
fn there_and_back(runner: &mut CaseRunner, state: &CpuState) -> CpuState {
    let limit = CaseLimit { instructions: Some(0), ..FREE };
    let outcome = runner.run(state, &mut Recorder::default(), limit).expect("a run");
    // The time-stamp counter runs on.
    let msr = Msrs { tsc_offset: state.msr.tsc_offset, ..outcome.state.msr.clone() };
    CpuState { msr, ..outcome.state }
}

fn with_everything(mut s: CpuState) -> CpuState {
    s.gpr = std::array::from_fn(|i| 0x0123_4567_89ab_cdef_u64.rotate_left(4 * i as u32));
    (s.dr, s.dr7) = ([0x1000, 0x2000, 0x3000, 0x4000], 0x455);
    s.cr2 = 0xdead_b000;
    s.nmi_blocked = true;
    s.shadow = Shadow::MovSs;
    (s.xcr0, s.pkru) = (7, 0);
    s.seg[umbra_arch::segment::Seg::Ldtr as usize] =
        Segment { base: 0x80_0041_8100, limit: 0x1f, attr: Attr(0x82), selector: 0x40 };
    s.msr.lstar = 0xffff_8000_0000_1000;
    s.msr.star = 0x0023_0010_0000_0000;
    s.msr.fmask = 0x4_7700;
    s.msr.kernel_gs_base = 0x7fff_0000_0000;
    s.msr.sysenter_esp = 0x8_0000;
    s.msr.mtrr_fix[10] = 0x0505_0505_0505_0505;
    (s.msr.mtrr_var[2], s.msr.mtrr_var[3]) = (0x8000_0000, 0xf_8000_0800);
    let mut fp = FpState { fcw: 0x37f, fsw: 0x3800, ftw: 0x81, fop: 0x123, mxcsr: 0x1fa0, ..FpState::default() };
    (fp.fip, fp.fdp) = (0x1234, 0x5678);
    fp.st = std::array::from_fn(|i| [0x8000_0000_0000_0000 | i as u64, 0x3fff]);
    fp.xmm = std::array::from_fn(|i| [i as u64, !(i as u64)]);
    fp.ymm_high = std::array::from_fn(|i| [7 * i as u64, 9 * i as u64]);
    s.fp = fp;
    s
}

#[test]
fn a_state_survives_kvm() {
    let Some(mut runner) = runner() else { return };
    let memory = runner.memory().clone();
    for state in [real(), long(&memory), with_everything(long(&memory))] {
        let back = there_and_back(&mut runner, &state);
        let mask = FpState { mxcsr_mask: state.fp.mxcsr_mask, ..back.fp };
        assert_eq!(CpuState { fp: mask, ..back }, state);
    }
}

#[test]
fn ports_reach_the_bus_item_by_item() {
    let Some(mut runner) = runner() else { return };
    load(runner.memory(), 16, |a| {
        a.mov(dx, 0x3f8u32)?;
        a.mov(al, 0x41u32)?;
        a.out(dx, al)?;
        a.in_(ax, 0x60u32)?;
        a.mov(si, 0x100u32)?;
        a.mov(cx, 3u32)?;
        a.rep().outsb()?;
        a.hlt()
    });
    runner.memory().write(Gpa::new(0x100), b"xyz");
    let mut bus = Recorder::default();
    let outcome = runner.run(&real(), &mut bus, FREE).unwrap();
    assert_eq!(outcome.end, CaseEnd::Halted);
    let expected = ["out 0x3f8 1 0x41", "in 0x60 2", "out 0x3f8 1 0x78", "out 0x3f8 1 0x79", "out 0x3f8 1 0x7a"];
    assert_eq!(bus.log, expected);
    assert_eq!(outcome.state.gpr[0] & 0xffff, 0x60);
    assert_eq!(outcome.state.gpr[6] & 0xffff, 0x103);
}

#[test]
fn device_memory_reaches_the_bus_and_ram_is_logged() {
    let Some(mut runner) = runner() else { return };
    let start = long(runner.memory());
    // The second table entry maps device memory at 1 GiB.
    runner.memory().write(Gpa::new(TABLES + 0x2008), &(0x4000_0083_u64).to_le_bytes());
    load(runner.memory(), 64, |a| {
        a.mov(rax, 0x20_0010u64)?;
        a.mov(ecx, dword_ptr(rax))?;
        a.mov(qword_ptr(rax + 8), rcx)?;
        a.mov(byte_ptr(0x9_0000), cl)?;
        a.hlt()
    });
    let mut bus = Recorder::default();
    let outcome = runner.run(&start, &mut bus, FREE).unwrap();
    assert_eq!(outcome.end, CaseEnd::Halted);
    assert_eq!(bus.log, ["load 0x40000010 4", "store 0x40000018 8 0x10"]);
    assert!(outcome.written.contains(&GpaPage::new(0x90)), "{:?}", outcome.written);
    assert!(!outcome.written.contains(&GpaPage::new(0x91)));
}

#[test]
fn single_steps_are_counted_exactly() {
    let Some(mut runner) = runner() else { return };
    let start = long(runner.memory());
    load(runner.memory(), 64, |a| {
        (0..20).try_for_each(|_| a.inc(rax))?;
        a.hlt()
    });
    for count in [1, 2, 7, 20] {
        let limit = CaseLimit { instructions: Some(count), ..FREE };
        let outcome = runner.run(&start, &mut Recorder::default(), limit).unwrap();
        assert_eq!((outcome.end, outcome.retired, outcome.state.gpr[0]), (CaseEnd::Instructions, count, count));
    }
}

#[test]
fn a_loop_ends_in_time() {
    let Some(mut runner) = runner() else { return };
    let start = long(runner.memory());
    runner.memory().write(Gpa::new(CODE), &[0xeb, 0xfe]);
    let limit = CaseLimit { instructions: None, time: Duration::from_millis(20) };
    let outcome = runner.run(&start, &mut Recorder::default(), limit).unwrap();
    assert_eq!((outcome.end, outcome.state.rip), (CaseEnd::TimedOut, CODE));
}

#[test]
fn tables_that_changed_between_cases_are_read_anew() {
    let Some(mut runner) = runner() else { return };
    let start = long(runner.memory());
    load(runner.memory(), 64, |a| {
        a.mov(rax, qword_ptr(0x20_0000))?;
        a.hlt()
    });
    for page in [0x10_0000u64, 0x12_0000, 0x14_0000] {
        // A table of small pages at 2 MiB, whose first entry changes from case to case.
        runner.memory().write(Gpa::new(TABLES + 0x2008), &(TABLES + 0x3003).to_le_bytes());
        runner.memory().write(Gpa::new(TABLES + 0x3000), &(page | 3).to_le_bytes());
        runner.memory().write(Gpa::new(page), &page.to_le_bytes());
        let outcome = runner.run(&start, &mut Recorder::default(), FREE).unwrap();
        assert_eq!((outcome.end, outcome.state.gpr[0]), (CaseEnd::Halted, page));
    }
}

#[test]
fn shutdown_and_refusals_are_answers_of_their_own() {
    let Some(mut runner) = runner() else { return };
    let mut start = long(runner.memory());
    runner.memory().write(Gpa::new(CODE), &[0x0f, 0x0b]);
    let outcome = runner.run(&start, &mut Recorder::default(), FREE).unwrap();
    assert_eq!(outcome.end, CaseEnd::Shutdown, "#UD without an IDT");
    // LOCK CMPXCHG16B [9_0000h]
    start.gpr[6] = 0x9_0000;
    let cmpxchg16b = [0xf0, 0x48, 0x0f, 0xc7, 0x0e];
    runner.memory().write(Gpa::new(CODE), &cmpxchg16b);
    runner.memory().write(Gpa::new(CODE + 5), &[0xf4]);
    let outcome = runner.run(&start, &mut Recorder::default(), FREE).unwrap();
    match outcome.end {
        CaseEnd::Halted => assert!(runner.backend().is_hardware(), "{} can emulate it", runner.backend()),
        CaseEnd::Refused(refusal) => {
            assert_eq!((refusal.kind, refusal.rip), (RefusalKind::Emulation, CODE));
            assert_eq!(refusal.bytes[..5], cmpxchg16b, "{refusal}");
            assert_eq!(outcome.state.rip, CODE, "another engine can go on from here");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn cpuid_in_long_mode_shows_the_fitted_profile() {
    let Some(fitted) = kvm() else { return };
    let Some(mut runner) = runner() else { return };
    let start = long(runner.memory());
    load(runner.memory(), 64, |a| {
        a.cpuid()?;
        a.hlt()
    });
    let seen = HostOffer::from_cpuid(|leaf, subleaf| {
        let mut state = start.clone();
        (state.gpr[0], state.gpr[1]) = (leaf.into(), subleaf.into());
        let outcome = runner.run(&state, &mut Recorder::default(), FREE).unwrap();
        assert_eq!(outcome.end, CaseEnd::Halted);
        [0, 3, 1, 2].map(|register| outcome.state.gpr[register] as u32)
    });
    let implemented = |features: FeatureSet| features.iter().filter(|f| f.is_implemented()).collect::<FeatureSet>();
    assert_eq!(implemented(seen.features), fitted.profile.features);
    assert!(fitted.dropped.iter().all(|feature| !fitted.profile.has(*feature)));
    assert!(fitted.shown.is_empty() || !runner.backend().is_hardware(), "{:?}", fitted.shown);
}

/// What [`umbra_accel::defects`] says of stores across pages, on the backend that it says it of.
#[test]
fn a_store_into_an_absent_page_writes_nothing_but_for_the_known_defect() {
    let Some(mut runner) = runner() else { return };
    let start = long(runner.memory());
    let memory = runner.memory().clone();
    memory.write(Gpa::new(TABLES + 0x2008), &(TABLES + 0x3003).to_le_bytes());
    memory.write(Gpa::new(TABLES + 0x3000), &0x10_0003_u64.to_le_bytes());
    // #PF leads to a HLT at 9000h.
    memory.write(Gpa::new(0x1200 + 14 * 16), &(0x9000_u64 | 8 << 16 | 0x8e << 40).to_le_bytes());
    memory.write(Gpa::new(0x1108), &0x00af_9b00_0000_ffff_u64.to_le_bytes());
    memory.write(Gpa::new(0x9000), &[0xf4]);
    load(&memory, 64, |a| {
        a.mov(eax, 0x1122_3344u32)?;
        a.mov(dword_ptr(0x20_0ffe), eax)?;
        a.hlt()
    });
    let outcome = runner.run(&start, &mut Recorder::default(), FREE).unwrap();
    assert_eq!((outcome.end, outcome.state.rip, outcome.state.cr2), (CaseEnd::Halted, 0x9001, 0x20_1000));
    let mut bytes = [0; 2];
    memory.read(Gpa::new(0x10_0ffe), &mut bytes);
    let is_known = PARTIAL_WRITE.backend == runner.backend();
    assert_eq!(bytes != [0; 2], is_known, "{bytes:x?} on {}", runner.backend());
}
