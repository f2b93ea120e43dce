//! Encodings that mean something else, or nothing, to the guest's CPU.

use umbra_arch::cpuid::{CpuidProfile, Feature};
use umbra_arch::{CpuState, Fault, rflags};
use umbra_hostexec::native::{Mode, WINDOW};
use umbra_oracle::engine::End;
use umbra_oracle::engines::Window;
use umbra_oracle::window;

/// Every register holds 55h.
fn initial() -> CpuState {
    CpuState { gpr: [0x55; 16], rflags: rflags::FIXED, ..window::state(Mode::Bits64) }
}

/// RAX after `bytes`.
fn run_with_rax(bytes: &[u8], rax: u64) -> u64 {
    let mut state = initial();
    state.gpr[0] = rax;
    let mut window = Window::new(&CpuidProfile::default(), Mode::Bits64).unwrap();
    assert_eq!(window.execute(bytes, &mut state), End::Completed);
    state.gpr[0]
}

/// RAX, RBX and the status flags after `bytes` with RBX = `rbx` on that CPU.
fn run(profile: &CpuidProfile, bytes: &[u8], rbx: u64) -> Result<(u64, u64, u64), Fault> {
    let mut state = initial();
    state.gpr[3] = rbx;
    let mut padded = [0xcc; 16];
    padded[..bytes.len()].copy_from_slice(bytes);
    if let End::Fault(fault) = Window::new(profile, Mode::Bits64).unwrap().execute(&padded, &mut state) {
        return Err(fault);
    }
    assert_eq!(state.rip, WINDOW + 0x800 + bytes.len() as u64);
    Ok((state.gpr[0], state.gpr[3], state.rflags & rflags::STATUS))
}

#[test]
fn prefixed_bit_scans_without_bmi1_and_lzcnt() {
    let (tzcnt, lzcnt) = ([0xf3, 0x0f, 0xbc, 0xc3], [0xf3, 0x0f, 0xbd, 0xc3]);
    let with = CpuidProfile::default();
    let mut without = with.clone();
    without.features.remove(Feature::Bmi1);
    without.features.remove(Feature::Lzcnt);
    assert_eq!(run(&with, &tzcnt, 0x80).unwrap().0, 7);
    assert_eq!(run(&with, &lzcnt, 0x80).unwrap().0, 24);
    assert_eq!(run(&without, &tzcnt, 0x80).unwrap().0, 7);
    assert_eq!(run(&without, &lzcnt, 0x80).unwrap().0, 7);
    // A zero source: the width, or the destination as it was and ZF.
    assert_eq!(run(&with, &tzcnt, 0).unwrap(), (32, 0, rflags::CF));
    assert_eq!(run(&without, &tzcnt, 0).unwrap(), (0x55, 0, rflags::ZF));
    assert_eq!(run(&without, &lzcnt, 0).unwrap(), (0x55, 0, rflags::ZF));
}

#[test]
fn hints_and_shadow_stack_reads_do_nothing() {
    let encodings: [&[u8]; 7] = [
        &[0xf3, 0x0f, 0x1e, 0xfa],       // ENDBR64
        &[0xf3, 0x48, 0x0f, 0x1e, 0xcb], // RDSSPQ RBX
        &[0xf3, 0x0f, 0x1e, 0xcb],       // RDSSPD EBX
        &[0x0f, 0x1c, 0x03],             // CLDEMOTE
        &[0x0f, 0x0d, 0x13],             // PREFETCHWT1
        &[0x0f, 0x1a, 0x03],             // BNDLDX
        &[0xf3, 0x90],                   // PAUSE
    ];
    for bytes in encodings {
        assert_eq!(run(&CpuidProfile::default(), bytes, 0x66).unwrap(), (0x55, 0x66, 0), "{bytes:02x?}");
    }
}

/// With REX.B, F3 90 is XCHG EAX, R8D: the upper half of RAX goes.
#[test]
fn pause_with_rex_b_exchanges() {
    assert_eq!(run_with_rax(&[0xf3, 0x41, 0x90], 0x1_0000_0055), 0x55);
    assert_eq!(run_with_rax(&[0xf3, 0x90], 0x1_0000_0055), 0x1_0000_0055);
}

/// Rows are found by mnemonic; EVEX and XOP forms share it with what we have.
#[test]
fn evex_and_xop_forms_are_undefined() {
    let vmovups = [0x62, 0xf1, 0x7c, 0x08, 0x10, 0xff];
    let bextr = [0x8f, 0xea, 0x78, 0x10, 0xc3, 0, 0x80, 0xff, 0xff];
    for bytes in [&vmovups[..], &bextr[..]] {
        assert_eq!(run(&CpuidProfile::default(), bytes, 1), Err(Fault::UNDEFINED));
    }
}
