//! A timer that makes KVM_RUN return in time.
#![allow(unsafe_code, reason = "POSIX timers and a signal handler")]

use super::error::KvmError;
use std::io::Error;
use std::sync::Once;
use std::{mem, ptr};

/// The signal that interrupts KVM_RUN.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 5
}

/// Sets kvm_run.immediate_exit, so that a signal that arrives just before KVM_RUN isn't lost; its arrival
/// interrupts a KVM_RUN under way.
extern "C" fn handler(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: `info` is the kernel's. Its value is the pointer that `Kick::new` was given, which its caller
    // keeps valid while the timer lives; the timer's thread is this one, so no signal outlives it.
    unsafe {
        let flag = (*info).si_value().sival_ptr.cast::<u8>();
        if !flag.is_null() {
            flag.write_volatile(1);
        }
    }
}

/// A timer of the thread that made it.
pub(super) struct Kick {
    timer: libc::timer_t,
    thread: libc::pid_t,
}

fn this_thread() -> libc::pid_t {
    // SAFETY: no arguments, can't fail.
    unsafe { libc::gettid() }
}

impl Kick {
    /// A timer for the calling thread.
    ///
    /// # Safety
    /// `immediate_exit` stays valid for writes until the value is dropped.
    pub(super) unsafe fn new(immediate_exit: *mut u8) -> Result<Self, KvmError> {
        install();
        let thread = this_thread();
        // SAFETY: sigevent is plain data for which all zeros are valid.
        let mut event: libc::sigevent = unsafe { mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal();
        event.sigev_value = libc::sigval { sival_ptr: immediate_exit.cast() };
        event.sigev_notify_thread_id = thread;
        let mut timer: libc::timer_t = ptr::null_mut();
        // SAFETY: both pointers are to locals of the right types.
        match unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) } {
            0 => Ok(Self { timer, thread }),
            _ => Err(KvmError::Request { request: "timer_create", source: Error::last_os_error() }),
        }
    }

    /// Whether the timer would signal the calling thread.
    pub(super) fn is_for_this_thread(&self) -> bool {
        self.thread == this_thread()
    }

    /// Kicks in `ns` nanoseconds; 0 never.
    pub(super) fn arm(&self, ns: u64) {
        let value = libc::timespec {
            tv_sec: (ns / 1_000_000_000) as libc::time_t,
            tv_nsec: (ns % 1_000_000_000) as libc::c_long,
        };
        let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let setting = libc::itimerspec { it_interval: zero, it_value: value };
        // SAFETY: the timer is ours, the structure is read only; a valid time can't be refused.
        unsafe { libc::timer_settime(self.timer, 0, &setting, ptr::null_mut()) };
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // SAFETY: the timer is ours and used by nobody afterwards. Signals pending for this thread are
        // delivered when the call returns, before the caller can free what the handler writes to.
        unsafe { libc::timer_delete(self.timer) };
    }
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: sigaction is plain data for which all zeros are valid; the handler is async-signal-safe and
        // the signal is nobody else's.
        unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(signal(), &action, ptr::null_mut());
        }
    });
}
