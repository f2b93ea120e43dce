//! SIGSEGV in generated code: an access through a window for which the host's MMU has no page goes on in its operation's slow
//! path.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::OnceLock;

/// Host code that may fault, by offsets in the code memory, and where its operation's slow path is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    pub start: u32,
    pub end: u32,
    pub slow: u32,
}

/// An access that the host's MMU had no page for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hit {
    /// On the host.
    pub address: u64,
    pub write: bool,
}

/// What the handler needs while generated code runs.
#[derive(Default)]
pub struct Faults {
    /// Host address of the code memory.
    code: u64,
    /// By where they begin.
    known: Vec<Fault>,
    hit: Cell<Option<Hit>>,
}

impl Faults {
    pub fn new(code: u64) -> Self {
        Self { code, ..Self::default() }
    }

    /// Those of a translation that lies behind all others.
    pub fn add(&mut self, faults: &[Fault]) {
        self.known.extend_from_slice(faults);
    }

    /// All code was emptied.
    pub fn clear(&mut self) {
        self.known.clear();
    }

    pub fn take_hit(&self) -> Option<Hit> {
        self.hit.take()
    }

    /// Where code goes on that has faulted at `rip`.
    fn slow_path(&self, rip: u64) -> Option<u64> {
        let at = u32::try_from(rip.checked_sub(self.code)?).ok()?;
        let last = self.known.partition_point(|fault| fault.start <= at).checked_sub(1)?;
        let fault = self.known.get(last).filter(|fault| at < fault.end)?;
        Some(self.code + u64::from(fault.slow))
    }
}

thread_local! {
    /// Those of the engine whose code this thread runs.
    static RUNNING: Cell<*const Faults> = const { Cell::new(ptr::null()) };
}

/// For as long as this lives the thread runs code that these are of.
pub struct Running(*const Faults);

impl Running {
    pub fn new(faults: &Faults) -> Self {
        Self(RUNNING.replace(faults))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.set(self.0);
    }
}

/// What handled SIGSEGV before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Makes sure that faults are handled here. False where they can't be.
pub fn install() -> bool {
    let mut action: libc::sigaction = none();
    action.sa_sigaction = on_fault as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    let mut before = none();
    // SAFETY: only asks.
    if unsafe { libc::sigaction(libc::SIGSEGV, ptr::null(), &mut before) } != 0 {
        return false;
    }
    if before.sa_sigaction == action.sa_sigaction {
        return true;
    }
    // One that may interrupt itself doesn't mean to return. Another one than before is only there for a time.
    if before.sa_flags & libc::SA_NODEFER != 0 || BEFORE.set(before).is_err() {
        return false;
    }
    // SAFETY: the handler touches nothing but what it is given and its thread's `RUNNING`.
    unsafe { libc::sigaction(libc::SIGSEGV, &action, ptr::null_mut()) == 0 }
}

fn none() -> libc::sigaction {
    // SAFETY: a plain C structure for which all zeroes are valid.
    unsafe { std::mem::zeroed() }
}

/// The page fault's error code: a write.
const WRITE: i64 = 2;

extern "C" fn on_fault(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let running = RUNNING.get();
    if !running.is_null() {
        // SAFETY: the kernel's structures, valid until this returns. What `running` points to lives as long as the code runs,
        // and nobody changes it meanwhile: this thread was in generated code, or, if not, the RIP isn't in that.
        unsafe {
            let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
            let rip = registers[libc::REG_RIP as usize] as u64;
            if let Some(slow) = (*running).slow_path(rip) {
                let write = registers[libc::REG_ERR as usize] & WRITE != 0;
                (*running).hit.set(Some(Hit { address: (*info).si_addr() as u64, write }));
                registers[libc::REG_RIP as usize] = slow as i64;
                return;
            }
        }
    }
    pass_on(signal, info, context);
}

/// To whoever handled it before; by default the fault comes again and ends the process.
fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let before = BEFORE.get().copied().unwrap_or_else(none);
    match before.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: gives the signal back.
            unsafe { libc::sigaction(signal, &before, ptr::null_mut()) };
        }
        handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: what was installed with this flag is such a function.
            let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: what was installed without the flag is such a function.
            let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}
