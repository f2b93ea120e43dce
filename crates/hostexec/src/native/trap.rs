//! Entering native code by returning from a signal that never was, and leaving it by a real one.
//!
//! The frame that rt_sigreturn(2) takes is a copy of one that the kernel made, with other registers. The handler of
//! the signal that ends native code doesn't return: it goes on in [`Signals::exchange`], so that each instruction costs
//! one system call and one signal.

use super::{Ended, Mode, NativeFault, NativeState, SELECTOR_G, Until};
use libc::{c_int, c_void, siginfo_t, ucontext_t};
use std::cell::UnsafeCell;
use std::io;
use std::mem::{MaybeUninit, offset_of};
use std::sync::atomic::{AtomicU64, Ordering};
use umbra_arch::fpu::FpState;
use umbra_arch::rflags;

/// Signals that exceptions become.
const SIGNALS: [c_int; 5] = [libc::SIGILL, libc::SIGTRAP, libc::SIGBUS, libc::SIGFPE, libc::SIGSEGV];
const STACK_BYTES: usize = 1 << 17;
/// Room for the kernel's extended-state image.
const IMAGE_BYTES: usize = 1 << 14;

const DB: i64 = 1;
const BP: i64 = 3;
const PF: i64 = 14;
/// Linux reports every user access from here on as a protection violation, so as not to show what the kernel maps.
const KERNEL_HALF: u64 = 0x7fff_ffff_f000;
const PRESENT: u32 = 1;

/// Bytes of the kernel's struct ucontext, which is shorter than the C library's.
const CONTEXT_BYTES: usize = 304;
/// Offsets in the frame's extended state ("XSAVE-Managed State": standard format).
const LEGACY_BYTES: usize = offset_of!(FpState, tail);
const SOFTWARE: usize = 464;
const XSTATE_BV: usize = 512;
const YMM_HIGH: usize = 576;
const YMM_BYTES: usize = 256;
const MAGIC: u32 = 0x4650_5853;

/// gregs index of each general register in encoding order.
const GPR: [c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// The kernel's extended-state image, aligned as XRSTOR wants it.
#[repr(C, align(64))]
struct Image([u8; IMAGE_BYTES]);

/// What goes in and out of the handler.
struct Exchange {
    /// The next signal is there to have its frame copied.
    wants_frame: bool,
    /// What native code is entered with.
    context: MaybeUninit<ucontext_t>,
    /// Signals that are blocked outside.
    blocked: MaybeUninit<libc::sigset_t>,
    image: Image,
    image_len: usize,
    with_fp: bool,
    state: MaybeUninit<NativeState>,
    vector: i64,
    error: i64,
    cr2: i64,
    /// Where to go on after native code, and the stack there.
    resume: [u64; 2],
}

struct Shared(UnsafeCell<Exchange>);
// SAFETY: only the owner of `Signals` (one per process, see `NativeCpu`) and the handler that interrupts it touch
// the contents, the latter only on the thread that `THREAD` names.
unsafe impl Sync for Shared {}

static EXCHANGE: Shared = Shared(UnsafeCell::new(Exchange {
    wants_frame: false,
    context: MaybeUninit::zeroed(),
    blocked: MaybeUninit::zeroed(),
    image: Image([0; IMAGE_BYTES]),
    image_len: 0,
    with_fp: false,
    state: MaybeUninit::uninit(),
    vector: 0,
    error: 0,
    cr2: 0,
    resume: [0; 2],
}));
/// Thread that is in or about to enter native code; 0: none.
static THREAD: AtomicU64 = AtomicU64::new(0);

/// The calling thread, by its thread pointer: without a system call, as handlers ask twice for each instruction.
fn thread() -> u64 {
    let pointer;
    // SAFETY: the x86-64 ABI keeps the thread pointer in the word that it points to; native code never loads FS.
    unsafe { std::arch::asm!("mov {}, fs:[0]", out(reg) pointer, options(nostack, readonly, preserves_flags)) };
    pointer
}

extern "C" fn handler(signal: c_int, _: *mut siginfo_t, context: *mut c_void) {
    // The system clears DF and TF for handlers, but not AC.
    // SAFETY: pushes and pops eight bytes, and changes a flag that compiled code doesn't expect to be set.
    unsafe { std::arch::asm!("pushfq", "and qword ptr [rsp], {keep}", "popfq", keep = const !0x4_0000i32) };
    if THREAD.load(Ordering::Relaxed) != thread() {
        // Somebody's real fault: it happens again and has its default effect.
        // SAFETY: restoring the default action is allowed in a handler.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    // SAFETY: SA_SIGINFO handlers get a ucontext_t, whose fpregs is the frame's extended state; the exchange is
    // ours as `THREAD` says, and the code that set it up waits in `exchange`.
    unsafe {
        let context = &mut *context.cast::<ucontext_t>();
        let x = &mut *EXCHANGE.0.get();
        let frame = context.uc_mcontext.fpregs.cast::<u8>();
        if x.wants_frame {
            x.copy_frame(context, frame);
            return;
        }
        x.leave(context, frame);
        let [rip, rsp] = x.resume;
        // Nothing on the signal stack has to be dropped.
        std::arch::asm!("mov rsp, {rsp}", "jmp {rip}", rsp = in(reg) rsp, rip = in(reg) rip, options(noreturn));
    }
}

impl Exchange {
    /// # Safety
    /// Both are the kernel's: `frame` is the context's extended state.
    unsafe fn copy_frame(&mut self, context: *const ucontext_t, frame: *const u8) {
        // SAFETY: the kernel's structure has this size, and all bytes of the longer one are initialized; frame_bytes bytes
        // are there and have room.
        unsafe {
            let copy = self.context.as_mut_ptr();
            context.cast::<u8>().copy_to_nonoverlapping(copy.cast(), CONTEXT_BYTES);
            let (components, bytes) = frame_len(frame);
            self.image_len = if bytes <= IMAGE_BYTES { components } else { 0 };
            let bytes = bytes.min(IMAGE_BYTES);
            frame.copy_to_nonoverlapping(self.image.0.as_mut_ptr(), bytes);
            (*copy).uc_mcontext.fpregs = self.image.0.as_mut_ptr().cast();
            self.blocked.write((*copy).uc_sigmask);
            // A handler of somebody else's could run on the stack that native code has, and change the window.
            libc::sigfillset(&mut (*copy).uc_sigmask);
            for signal in SIGNALS {
                libc::sigdelset(&mut (*copy).uc_sigmask, signal);
            }
        }
        self.wants_frame = false;
    }

    /// Puts `state` into the frame.
    ///
    /// # Safety
    /// The frame has been copied.
    unsafe fn enter(&mut self, state: &NativeState, until: Until, selectors: i64) {
        // SAFETY: zeros, then a copy.
        let g = unsafe { &mut self.context.assume_init_mut().uc_mcontext.gregs };
        for (r, index) in GPR.into_iter().enumerate() {
            g[index as usize] = state.gpr[r] as i64;
        }
        g[libc::REG_RIP as usize] = state.rip as i64;
        let trap = if until == Until::Step { rflags::TF } else { 0 };
        g[libc::REG_EFL as usize] = (state.rflags | rflags::FIXED | rflags::IF | trap) as i64;
        g[libc::REG_CSGSFS as usize] = selectors;
        // SAFETY: the image is a copy of the kernel's.
        unsafe { set_fp(self.with_fp.then_some(&state.fp), self.image.0.as_mut_ptr(), self.image_len) }
    }

    /// # Safety
    /// `frame` is the context's extended state.
    unsafe fn leave(&mut self, context: &ucontext_t, frame: *const u8) {
        let g = &context.uc_mcontext.gregs;
        // SAFETY: `exchange` wrote it before it entered native code.
        let state = unsafe { self.state.assume_init_mut() };
        for (r, index) in GPR.into_iter().enumerate() {
            state.gpr[r] = g[index as usize] as u64;
        }
        state.rip = g[libc::REG_RIP as usize] as u64;
        state.rflags = g[libc::REG_EFL as usize] as u64 & !(rflags::TF | rflags::RF);
        let packed = g[libc::REG_CSGSFS as usize] as u64;
        let (es, ds, gs): (u16, u16, u16);
        // SAFETY: reads selectors; handlers run with those of the interrupted code.
        unsafe {
            std::arch::asm!("mov {0:x}, es", "mov {1:x}, ds", "mov {2:x}, gs", out(reg) es, out(reg) ds, out(reg) gs);
        }
        state.selectors = [es, packed as u16, (packed >> 48) as u16, ds, (packed >> 32) as u16, gs];
        self.vector = g[libc::REG_TRAPNO as usize];
        self.error = g[libc::REG_ERR as usize];
        self.cr2 = g[libc::REG_CR2 as usize];
        if self.with_fp {
            // SAFETY: the kernel's frame has the same size each time.
            unsafe { load_fp(&mut state.fp, frame, self.image_len) }
        }
    }
}

/// Bytes of the state components, and of them together with what the kernel puts behind.
///
/// # Safety
/// `frame` is a signal frame's extended state, at least FXSAVE's 512 bytes.
unsafe fn frame_len(frame: *const u8) -> (usize, usize) {
    // SAFETY: struct _fpx_sw_bytes lies in FXSAVE's software bytes: magic1, extended_size, xfeatures, xstate_size.
    unsafe {
        let word = |at: usize| frame.add(SOFTWARE + at).cast::<u32>().read_unaligned() as usize;
        if word(0) == MAGIC as usize { (word(16), word(4)) } else { (512, 512) }
    }
}

/// Vector registers, or none: then those components are in their initial state.
///
/// # Safety
/// `frame` has `len` bytes.
unsafe fn set_fp(fp: Option<&FpState>, frame: *mut u8, len: usize) {
    let has_header = len >= YMM_HIGH + YMM_BYTES;
    // SAFETY: FpState has FXSAVE's layout followed by the upper halves; `len` covers what is written.
    unsafe {
        if has_header {
            let present = frame.add(XSTATE_BV).cast::<u64>();
            present.write_unaligned(present.read_unaligned() & !7 | if fp.is_some() { 7 } else { 0 });
        }
        let Some(fp) = fp else { return };
        let raw = std::ptr::from_ref(fp).cast::<u8>();
        // MXCSR_MASK stays the host's.
        raw.copy_to_nonoverlapping(frame, 28);
        raw.add(32).copy_to_nonoverlapping(frame.add(32), LEGACY_BYTES - 32);
        if has_header {
            raw.add(512).copy_to_nonoverlapping(frame.add(YMM_HIGH), YMM_BYTES);
        }
    }
}

/// # Safety
/// `frame` has `len` bytes.
unsafe fn load_fp(fp: &mut FpState, frame: *const u8, len: usize) {
    // SAFETY: as in `store_fp`.
    unsafe {
        let present = if len >= YMM_HIGH + YMM_BYTES { frame.add(XSTATE_BV).cast::<u64>().read_unaligned() } else { 3 };
        let mask = fp.mxcsr_mask;
        let raw = std::ptr::from_mut(fp).cast::<u8>();
        frame.copy_to_nonoverlapping(raw, LEGACY_BYTES);
        frame
            .add(YMM_HIGH)
            .copy_to_nonoverlapping(raw.add(512), if len >= YMM_HIGH + YMM_BYTES { YMM_BYTES } else { 0 });
        fp.mxcsr_mask = mask;
        // A component in its initial state needn't have been stored.
        if present & 1 == 0 {
            (fp.fcw, fp.fsw, fp.ftw, fp.fop, fp.fip, fp.fdp, fp.st) = (0x37f, 0, 0, 0, 0, 0, [[0; 2]; 8]);
        }
        if present & 2 == 0 {
            fp.xmm = [[0; 2]; 16];
        }
        if present & 4 == 0 {
            fp.ymm_high = [[0; 2]; 16];
        }
    }
}

/// The process's fault signals, taken and given back.
pub(super) struct Signals {
    old: Vec<(c_int, libc::sigaction)>,
    old_stack: libc::stack_t,
    thread: u64,
    _stack: Vec<u8>,
}

impl Signals {
    pub(super) fn take() -> io::Result<Self> {
        let mut stack = vec![0u8; STACK_BYTES];
        let new_stack = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: STACK_BYTES };
        // SAFETY: plain C structures for which all zeroes are valid; the stack lives as long as `self`.
        unsafe {
            let mut old_stack: libc::stack_t = std::mem::zeroed();
            if libc::sigaltstack(&new_stack, &mut old_stack) != 0 {
                return Err(io::Error::last_os_error());
            }
            let mut signals = Self { old: Vec::new(), old_stack, thread: thread(), _stack: stack };
            for signal in SIGNALS {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as extern "C" fn(c_int, *mut siginfo_t, *mut c_void) as usize;
                // The handler doesn't return: nothing may stay blocked.
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                let mut old: libc::sigaction = std::mem::zeroed();
                if libc::sigaction(signal, &action, &mut old) != 0 {
                    return Err(io::Error::last_os_error());
                }
                signals.old.push((signal, old));
            }
            THREAD.store(signals.thread, Ordering::SeqCst);
            (*EXCHANGE.0.get()).wants_frame = true;
            std::arch::asm!("int3");
            THREAD.store(0, Ordering::SeqCst);
            if (*EXCHANGE.0.get()).image_len == 0 {
                return Err(io::Error::other("the host has more vector state than a frame here has room for"));
            }
            Ok(signals)
        }
    }

    /// # Safety
    /// The code at `state.rip` must stay in user mode and store only into the window.
    pub(super) unsafe fn exchange(
        &mut self,
        mode: Mode,
        until: Until,
        state: &mut NativeState,
        with_fp: bool,
    ) -> Ended {
        assert_eq!(self.thread, thread(), "the signal stack is another thread's");
        let (code, data) = (mode.code().selector, mode.data().selector);
        let selectors = i64::from(code) | i64::from(SELECTOR_G) << 16 | i64::from(data) << 48;
        let x = EXCHANGE.0.get();
        // SAFETY: the process has one `NativeCpu`; `take` has copied a frame. The handler runs only for what native code
        // raises, stores the state and comes back to the label with the stack that is stored here; all registers but
        // the two pushed ones are given up.
        unsafe {
            (*x).with_fp = with_fp;
            (*x).enter(state, until, selectors);
            (*x).state.write(state.clone());
            THREAD.store(self.thread, Ordering::SeqCst);
            std::arch::asm!(
                "push rbx",
                "push rbp",
                // The system call keeps ID and NT as they are.
                "push 0x202",
                "popfq",
                "mov ds, ecx",
                "mov es, ecx",
                "mov gs, edx",
                "lea rax, [rip + 2f]",
                "mov [rdi], rax",
                "mov [rdi + 8], rsp",
                "mov rsp, rsi",
                "mov eax, {rt_sigreturn}",
                "syscall",
                "ud2",
                "2:",
                "push 0x202",
                "popfq",
                "pop rbp",
                "pop rbx",
                in("ecx") u32::from(data),
                in("edx") u32::from(SELECTOR_G),
                in("rdi") (*x).resume.as_mut_ptr(),
                in("rsi") (*x).context.as_mut_ptr(),
                rt_sigreturn = const libc::SYS_rt_sigreturn,
                out("r12") _, out("r13") _, out("r14") _, out("r15") _,
                clobber_abi("C"),
            );
            libc::pthread_sigmask(libc::SIG_SETMASK, (*x).blocked.as_ptr(), std::ptr::null_mut());
            THREAD.store(0, Ordering::SeqCst);
            *state = (*x).state.assume_init_read();
            let (vector, code, cr2) = ((*x).vector, (*x).error as u32, (*x).cr2 as u64);
            match (vector, until) {
                (DB, Until::Step) => Ended::Done,
                (BP, Until::Breakpoint) => {
                    state.rip = state.rip.wrapping_sub(1);
                    Ended::Done
                }
                _ => {
                    let address = if vector == PF { cr2 } else { 0 };
                    let code = if address >= KERNEL_HALF { code & !PRESENT } else { code };
                    Ended::Fault(NativeFault { vector: vector as u8, code, address })
                }
            }
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: puts back what `take` found.
        unsafe {
            for (signal, old) in &self.old {
                libc::sigaction(*signal, old, std::ptr::null_mut());
            }
            if self.thread == thread() {
                libc::sigaltstack(&self.old_stack, std::ptr::null_mut());
            }
        }
    }
}
