//! Runs any user-level instruction on the host CPU as it stands, in 16-, 32- or 64-bit code: the oracle that
//! an interpreter's rows are compared with. Not for running guests (feature `native`).
//!
//! [`NativeCpu`] owns a window of [`PAGES`] pages at [`WINDOW`], whose protections are [`PROTECTION`]; the test's
//! guest maps the same addresses alike. [`NativeCpu::run`] loads all registers, executes one instruction (or up
//! to the next INT3), and gives the registers and the exception back. 16-bit code runs in segments of a local
//! descriptor table whose base is the window, 32-bit code in the flat segments of the operating system.
//!
//! The control transfers are the kernel's for signals: entering is returning from a signal handler whose saved registers
//! were exchanged, leaving is the next signal. So nothing limits which registers, flags, stack pointer or code
//! segment the instruction sees, and a fault comes with vector, error code and CR2.

mod guard;
mod segments;
mod trap;

pub use segments::{GLOBAL, LOCAL, Mode, SEGMENT_G, SELECTOR_G};

use iced_x86::{Decoder, DecoderOptions, Instruction};
use std::io;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};
use umbra_arch::fpu::FpState;

/// Linear address of the window.
pub const WINDOW: u64 = 0x2000_0000;
/// Pages in the window: exactly what a 16-bit segment can address.
pub const PAGES: usize = 16;
const PAGE: usize = 4096;
/// Addresses next to the window that are certainly not present.
const MARGIN: usize = 1 << 20;

/// What user code may do with a page of the window.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Protection {
    /// Not present.
    Absent,
    /// Present and read-only.
    Read,
    /// Present and writable.
    Write,
    /// Present, read-only and executable.
    Execute,
}

/// Protection of each page: code, then every sequence of two that matters to crossing accesses.
pub const PROTECTION: [Protection; PAGES] = {
    use Protection::{Absent as A, Execute as X, Read as R, Write as W};
    [X, A, W, W, A, W, R, A, R, W, W, R, A, W, W, W]
};

/// Registers of user code.
#[derive(Clone, PartialEq, Debug)]
pub struct NativeState {
    /// General registers in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer, an offset in the code segment.
    pub rip: u64,
    /// RFLAGS; the trap flag is never seen.
    pub rflags: u64,
    /// Selectors of ES, CS, SS, DS, FS and GS; only an output, the mode gives the input.
    pub selectors: [u16; 6],
    /// Vector and x87 registers; FOP, FIP and FDP go in and out as the host treats them.
    pub fp: FpState,
}

/// An exception with its error code (0 if it has none) and CR2 (#PF only).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NativeFault {
    /// The exception's vector.
    pub vector: u8,
    /// Its error code.
    pub code: u32,
    /// CR2, for #PF.
    pub address: u64,
}

/// How a run ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Ended {
    /// The instruction completed.
    Done,
    /// It raised an exception; registers are as the CPU left them.
    Fault(NativeFault),
    /// It wasn't run, for this reason.
    Refused(&'static str),
}

/// How far to run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Until {
    /// One instruction, by the trap flag.
    Step,
    /// INT3, which follows the instruction: all rounds of a repeated one.
    Breakpoint,
}

/// What keeps the oracle from working on this host.
#[derive(Debug, thiserror::Error)]
pub enum NativeError {
    /// The fixed addresses are taken or memory is short.
    #[error("can't map the test window at {WINDOW:#x}: {0}")]
    Map(io::Error),
    /// modify_ldt is refused: 16-bit code can't run.
    #[error("can't set local descriptors: {0} (is modify_ldt forbidden here?)")]
    Descriptors(io::Error),
    /// Signal handlers or the signal stack can't be set.
    #[error("can't handle signals: {0}")]
    Signals(io::Error),
}

static OWNER: Mutex<()> = Mutex::new(());

/// The host CPU and the window. One at a time in a process: a second one waits.
pub struct NativeCpu {
    view: NonNull<u8>,
    reserve: NonNull<u8>,
    signals: trap::Signals,
    _owner: MutexGuard<'static, ()>,
}

impl NativeCpu {
    /// Maps the window, makes the segments, takes the fault signals of the process.
    ///
    /// # Errors
    /// [`NativeError`].
    pub fn new() -> Result<Self, NativeError> {
        let owner = OWNER.lock().unwrap_or_else(PoisonError::into_inner);
        let (view, reserve) = map_window().map_err(NativeError::Map)?;
        let signals = trap::Signals::take().map_err(NativeError::Signals)?;
        let cpu = Self { view, reserve, signals, _owner: owner };
        segments::install().map_err(NativeError::Descriptors)?;
        Ok(cpu)
    }

    /// Stores `data` at `offset` into the window, whatever the page's protection.
    ///
    /// # Panics
    /// Outside the window.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        assert!(offset.checked_add(data.len()).is_some_and(|end| end <= PAGES * PAGE));
        // SAFETY: the range lies in the view, which stays mapped with `self` and which no reference covers.
        unsafe { self.view.as_ptr().add(offset).copy_from_nonoverlapping(data.as_ptr(), data.len()) }
    }

    /// Loads from `offset` in the window.
    ///
    /// # Panics
    /// Outside the window.
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        assert!(offset.checked_add(out.len()).is_some_and(|end| end <= PAGES * PAGE));
        // SAFETY: as in `write`.
        unsafe { self.view.as_ptr().add(offset).copy_to_nonoverlapping(out.as_mut_ptr(), out.len()) }
    }

    /// Runs `i`, which [`decode`] gave for the bytes at `state.rip`; vector registers are loaded and stored only
    /// `with_fp`.
    ///
    /// # Panics
    /// On another thread than the one that called [`new`](Self::new), and if the code there isn't `i`.
    pub fn run(&mut self, i: &Instruction, mode: Mode, until: Until, state: &mut NativeState, with_fp: bool) -> Ended {
        if let Some(reason) = guard::refuse(i, mode, state) {
            return Ended::Refused(reason);
        }
        let at = mode.base().wrapping_add(state.rip).wrapping_sub(WINDOW) as usize;
        let mut bytes = [0; 16];
        self.read(at, &mut bytes);
        let same = decode(mode, &bytes, state.rip) == *i;
        assert!(same && PROTECTION.get(at / PAGE) == Some(&Protection::Execute), "the code isn't there");
        if until == Until::Breakpoint {
            assert_eq!(bytes[i.len() % 16], 0xcc, "no breakpoint follows");
        }
        // SAFETY: the bytes are `i`, which `guard` found harmless with these registers; the window and the signal
        // handlers are in place while `self` lives.
        unsafe { self.signals.exchange(mode, until, state, with_fp) }
    }
}

/// The instruction as the oracle wants it: forms that are invalid for their prefixes only (LOCK) are decoded too.
pub fn decode(mode: Mode, bytes: &[u8], rip: u64) -> Instruction {
    Decoder::with_ip(mode.bits(), bytes, rip, DecoderOptions::NO_INVALID_CHECK).decode()
}

impl Drop for NativeCpu {
    fn drop(&mut self) {
        // SAFETY: both were mapped by `map_window` with these sizes; nothing points into them any more.
        unsafe {
            libc::munmap(self.view.as_ptr().cast(), PAGES * PAGE);
            libc::munmap(self.reserve.as_ptr().cast(), PAGES * PAGE + 2 * MARGIN);
        }
    }
}

/// A file mapped twice: writable wherever the system likes, and with [`PROTECTION`] at [`WINDOW`].
fn map_window() -> io::Result<(NonNull<u8>, NonNull<u8>)> {
    let fd = rustix::fs::memfd_create("umbra-native", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&fd, (PAGES * PAGE) as u64)?;
    let raw = std::os::fd::AsRawFd::as_raw_fd(&fd);
    let none = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    let reserve_len = PAGES * PAGE + 2 * MARGIN;
    let reserve = map((WINDOW as usize - MARGIN) as *mut _, reserve_len, libc::PROT_NONE, none, -1, 0)?;
    let shared = libc::MAP_SHARED | libc::MAP_POPULATE;
    let view = map(std::ptr::null_mut(), PAGES * PAGE, libc::PROT_READ | libc::PROT_WRITE, shared, raw, 0)?;
    for (page, protection) in PROTECTION.into_iter().enumerate() {
        let flags = match protection {
            Protection::Absent => continue,
            Protection::Read => libc::PROT_READ,
            Protection::Write => libc::PROT_READ | libc::PROT_WRITE,
            Protection::Execute => libc::PROT_READ | libc::PROT_EXEC,
        };
        let at = (WINDOW as usize + page * PAGE) as *mut _;
        map(at, PAGE, flags, shared | libc::MAP_FIXED, raw, (page * PAGE) as libc::off_t)?;
    }
    Ok((view, reserve))
}

fn map(
    at: *mut libc::c_void,
    len: usize,
    protection: i32,
    flags: i32,
    fd: i32,
    offset: libc::off_t,
) -> io::Result<NonNull<u8>> {
    // SAFETY: a fixed address is either refused when taken or lies in this module's own reservation.
    let got = unsafe { libc::mmap(at, len, protection, flags, fd, offset) };
    if got == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(got.cast()).ok_or_else(|| io::Error::other("mapped at 0"))
}
