//! Code that runs natively while somebody else's signals arrive.
#![cfg(feature = "native")]
#![allow(unsafe_code, reason = "signals")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use umbra_arch::rflags;
use umbra_hostexec::native::{Ended, Mode, NativeCpu, NativeState, PAGES, Until, WINDOW, decode};

static TAKEN: AtomicU64 = AtomicU64::new(0);
static DONE: AtomicBool = AtomicBool::new(false);

/// Runs on the stack that the code had which it interrupts: it wasn't installed with SA_ONSTACK.
extern "C" fn handler(_: libc::c_int) {
    TAKEN.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn handlers_of_others_never_run_on_the_stack_of_native_code() {
    const CODE: u64 = 0x800;
    // INC EAX; INT3.
    const BYTES: [u8; 16] =
        [0xff, 0xc0, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc];
    // SAFETY: the handler only counts; this thread outlives the other one.
    let this = unsafe {
        libc::signal(libc::SIGUSR2, handler as *const () as usize);
        libc::pthread_self()
    };
    let sender = std::thread::spawn(move || {
        while !DONE.load(Ordering::Relaxed) {
            // SAFETY: as above.
            unsafe { libc::pthread_kill(this, libc::SIGUSR2) };
            std::thread::yield_now();
        }
    });
    let mut cpu = NativeCpu::new().unwrap();
    let mut expected = vec![0x5a; PAGES * 4096];
    expected[CODE as usize..][..16].copy_from_slice(&BYTES);
    cpu.write(0, &expected);
    let i = decode(Mode::Bits64, &BYTES, WINDOW + CODE);
    let mut state = NativeState {
        gpr: [0; 16],
        rip: WINDOW + CODE,
        rflags: rflags::FIXED,
        selectors: [0; 6],
        fp: umbra_arch::fpu::FpState::default(),
    };
    // In the middle of writable pages.
    state.gpr[4] = WINDOW + 0xb000;
    let mut runs = 0;
    while runs < 5000 || TAKEN.load(Ordering::Relaxed) < 200 {
        assert_eq!(cpu.run(&i, Mode::Bits64, Until::Breakpoint, &mut state, false), Ended::Done);
        runs += 1;
        assert_eq!((state.gpr[0], state.rip), (runs, WINDOW + CODE + 2));
        state.rip = WINDOW + CODE;
    }
    DONE.store(true, Ordering::Relaxed);
    sender.join().unwrap();
    let mut now = vec![0; expected.len()];
    cpu.read(0, &mut now);
    assert!(now == expected, "a signal's frame lies in the window");
}
