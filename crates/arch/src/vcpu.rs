//! The two borders of an engine: [`Vcpu`] towards the machine, [`Bus`] towards devices.

use crate::{ApicBus, CpuState, Exit, Fault, Gpa, GpaPage, VirtualTime};

/// Width of one device access.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum AccessWidth {
    /// 8 bits.
    Byte = 1,
    /// 16 bits.
    Word = 2,
    /// 32 bits.
    Dword = 4,
    /// 64 bits; not for ports.
    Qword = 8,
}

impl AccessWidth {
    /// Number of bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        self as u64
    }
    /// The width of `bytes` bytes, if there is one.
    pub const fn of_bytes(bytes: u64) -> Option<Self> {
        Some(match bytes {
            1 => Self::Byte,
            2 => Self::Word,
            4 => Self::Dword,
            8 => Self::Qword,
            _ => return None,
        })
    }
    /// All bits that a value of this width can have.
    #[inline]
    pub const fn mask(self) -> u64 {
        u64::MAX >> (64 - 8 * self as u32)
    }
}

/// A device's answer to an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Reply<T> {
    /// What was read; `()` for a write.
    pub value: T,
    /// Virtual nanoseconds the access takes besides the instruction's own cost.
    pub cost: u32,
    /// The slice's end or an interrupt line may have changed: the engine finishes this instruction
    /// and returns [`Exit::Attention`].
    pub attention: bool,
}

impl<T> Reply<T> {
    /// An answer that costs nothing extra and changes nothing for the engine.
    pub const fn quiet(value: T) -> Self {
        Self { value, cost: 0, attention: false }
    }
}

/// The state of a CPU whose instruction came to a page of RAM that has yet to arrive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageContext {
    /// Current privilege level.
    pub cpl: u8,
    /// CR0.PG.
    pub paging: bool,
    /// A maskable interrupt would be taken before this instruction: RFLAGS.IF is set and no shadow is in force.
    pub interruptible: bool,
}

/// What a CPU does about a page of RAM that has yet to arrive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageAnswer {
    /// The engine loads it at once and executes the instruction again.
    Now,
    /// It arrives at this time: the CPU does nothing until then but take interrupts.
    Wait(VirtualTime),
    /// The guest wants to be told: #PF with error code 0 and this in CR2, as KVM's "page not present" event.
    Event(u32),
}

/// What a virtual CPU reaches outside its registers and RAM. Called in the middle of an instruction,
/// exactly once per architectural access. `now` is the virtual time of the calling instruction.
pub trait Bus {
    /// Reads device memory (no RAM there); absent devices read as all ones.
    fn mmio_read(&mut self, now: VirtualTime, gpa: Gpa, width: AccessWidth) -> Reply<u64>;
    /// Writes device memory; absent devices and ROM swallow it.
    fn mmio_write(&mut self, now: VirtualTime, gpa: Gpa, width: AccessWidth, value: u64) -> Reply<()>;
    /// Reads an I/O port.
    fn port_read(&mut self, now: VirtualTime, port: u16, width: AccessWidth) -> Reply<u32>;
    /// Writes an I/O port.
    fn port_write(&mut self, now: VirtualTime, port: u16, width: AccessWidth, value: u32) -> Reply<()>;
    /// RDMSR of an MSR that lives outside of the CPU: the local APIC's (IA32_APIC_BASE, IA32_TSC_DEADLINE,
    /// x2APIC's) and those of KVM's asynchronous page faults.
    fn apic_msr_read(&mut self, now: VirtualTime, msr: u32) -> Result<Reply<u64>, Fault>;
    /// WRMSR of such an MSR.
    fn apic_msr_write(&mut self, now: VirtualTime, msr: u32, value: u64) -> Result<Reply<()>, Fault>;
    /// CR8: the task priority's high nibble (bits 7:4 of TPR).
    fn read_cr8(&mut self) -> u8;
    /// MOV to CR8.
    fn write_cr8(&mut self, now: VirtualTime, value: u8) -> Reply<()>;
    /// Whether an external interrupt (LAPIC or 8259 by ExtINT) is waiting, whatever RFLAGS.IF says. During a slice one
    /// begins to wait only with a reply that asks for attention.
    fn interrupt_pending(&mut self) -> bool;
    /// Interrupt acknowledge: takes the waiting interrupt's vector. `None` if it went away.
    fn interrupt_acknowledge(&mut self, now: VirtualTime) -> Option<u8>;
    /// Takes a waiting NMI, if there is one.
    fn take_nmi(&mut self) -> bool;
    /// The time that RDTSC shows at `now`: no earlier than any that another CPU has been shown.
    fn shared_time(&mut self, now: VirtualTime) -> VirtualTime {
        now
    }
    /// The guest moved its TSC: it is `offset` ahead of virtual time now (modulo 2^64).
    fn tsc_moved(&mut self, _now: VirtualTime, _offset: u64) -> Reply<()> {
        Reply::quiet(())
    }
    /// The instruction about to be executed again came to a page of RAM that has yet to arrive.
    fn page_absent(&mut self, _now: VirtualTime, _page: GpaPage, _context: PageContext) -> PageAnswer {
        PageAnswer::Now
    }
    /// PAUSE: this CPU probably waits for another.
    fn pause(&mut self, _now: VirtualTime) -> Reply<()> {
        Reply::quiet(())
    }
    /// The interrupt controllers, for an accelerator with a local APIC of its own. `None` where it can't be lent.
    fn apic_bus(&mut self) -> Option<&mut dyn ApicBus> {
        None
    }
    /// Whether A20 is enabled; physical bit 20 is masked where it is not.
    fn a20(&self) -> bool {
        true
    }
}

/// A stretch of virtual time to run in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slice {
    /// Time at which the first instruction starts.
    pub now: VirtualTime,
    /// The engine returns at the first instruction boundary at or after this time.
    pub until: VirtualTime,
}

/// How a slice ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stopped {
    /// Why.
    pub exit: Exit,
    /// Virtual time then.
    pub now: VirtualTime,
}

/// A virtual CPU: an engine with its state.
pub trait Vcpu {
    /// Runs instructions and delivers interrupts until something is up. Time, counters and interrupts
    /// are the same in every engine that implements this deterministically.
    fn run(&mut self, bus: &mut dyn Bus, slice: Slice) -> Stopped;
    /// The architectural state, complete.
    fn state(&self) -> CpuState;
    /// Replaces the architectural state (host-initiated: "impossible" values are survived, not refused).
    fn set_state(&mut self, state: &CpuState);
    /// Instructions retired since the engine was made.
    fn retired(&self) -> u64;
    /// For a processor that waits by MWAIT: whether a store by another one or a device has ended that.
    fn wait_is_over(&mut self) -> bool {
        false
    }
}
