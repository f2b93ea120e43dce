//! [`KvmVcpu`]: KVM as an engine.
#![allow(unsafe_code, reason = "the timer writes to kvm_run")]

use super::cpuid::Fitted;
use super::error::{KvmError, failed};
use super::exits::{self, Event};
use super::ioctls;
use super::irqchip::Irqchip;
use super::kernel_apic::KernelApic;
use super::kick::Kick;
use super::lapic_page;
use super::registers::{ApicCopy, Registers};
use super::vm::Vm;
use crate::Backend;
use crate::handover::{Accelerator, StopAt};
use crate::time::SliceClock;
use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug, kvm_guest_debug_arch,
};
use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant};
use umbra_arch::exit::{Refusal, RefusalKind};
use umbra_arch::msr::IA32_APIC_BASE;
use umbra_arch::state::Activity;
use umbra_arch::{Bus, CpuState, Exit, GpaPage, Slice, Stopped, Vcpu, VirtualTime};
use umbra_memory::GuestMemory;

/// IA32_APIC_BASE after reset on the first processor.
pub(super) const APIC_BASE_RESET: u64 = 0xfee0_0900;
/// DR6.BS and B0.
const DR6_STEP: u64 = 1 << 14;
const DR6_FIRST: u64 = 1;
/// DR7 with DR0 as an instruction breakpoint.
const DR7_FIRST: u64 = 0x402;
/// How long the guest runs at a time for an event to be delivered before the state can leave KVM, in nanoseconds.
const DELIVERY_NS: u64 = 50_000;
/// After so long it never will be.
const LONGEST_DELIVERY: Duration = Duration::from_millis(100);

/// Where the local APIC is.
enum Apic {
    /// In the machine; KVM has copies of two registers.
    Machine(ApicCopy),
    /// In the kernel.
    Kernel(Box<KernelApic>),
}

/// One virtual CPU that KVM executes, as an engine. There is one in a virtual machine: interrupts come from
/// the machine's own devices through [`Bus`], from its local APIC or by way of one in the kernel ([`Irqchip`]).
///
/// Retired instructions are only counted while single-stepping ([`StopAt::Instructions`]).
pub struct KvmVcpu {
    /// Dropped before the vCPU, to whose memory the timer's signal writes.
    kick: Option<Kick>,
    registers: Registers,
    vm: Vm,
    /// What was set last: whatever KVM doesn't hold is still so.
    held: CpuState,
    now: VirtualTime,
    apic: Apic,
    /// A device access waits for its instruction to complete.
    is_incomplete: bool,
    /// The kernel hasn't said yet whether interrupts can be taken.
    is_fresh: bool,
    stop_at: StopAt,
    is_stop_reached: bool,
    retired: u64,
    /// A request that failed where nobody could be told.
    problem: RefCell<Option<KvmError>>,
}

impl KvmVcpu {
    /// A CPU after reset in a virtual machine of its own.
    ///
    /// # Errors
    /// [`KvmError`] when there is no usable KVM.
    pub fn new(memory: Arc<GuestMemory>, fitted: &Fitted) -> Result<Self, KvmError> {
        let vm = Vm::new(memory, fitted.irqchip)?;
        let registers = Registers::new(&vm, &fitted.offered, 0)?;
        let mut vcpu = Self {
            kick: None,
            registers,
            vm,
            held: CpuState::reset(),
            now: VirtualTime(0),
            apic: match fitted.irqchip {
                Irqchip::User => Apic::Machine(ApicCopy { cr8: 0, base: APIC_BASE_RESET }),
                Irqchip::Split => Apic::Kernel(Box::default()),
            },
            is_incomplete: false,
            is_fresh: true,
            stop_at: StopAt::Never,
            is_stop_reached: false,
            retired: 0,
            problem: RefCell::new(None),
        };
        let mut reset = CpuState::reset();
        reset.gpr[umbra_arch::state::reg::RDX] = fitted.profile.signature().into();
        vcpu.set_state(&reset);
        Ok(vcpu)
    }

    /// What executes the guest.
    pub fn backend(&self) -> Backend {
        self.vm.backend()
    }

    /// Where its local APIC is.
    pub fn irqchip(&self) -> Irqchip {
        match self.apic {
            Apic::Machine(_) => Irqchip::User,
            Apic::Kernel(_) => Irqchip::Split,
        }
    }

    /// RAM pages that the guest has written since the last call; the memory's other users are told.
    pub(super) fn take_written(&self) -> Result<Vec<GpaPage>, KvmError> {
        self.vm.take_written()
    }

    fn slice(&mut self, bus: &mut dyn Bus, clock: &SliceClock) -> Exit {
        if let Err(error) = self.prepare(bus, clock) {
            return self.refusal(exits::state_refused(&error));
        }
        match self.held.activity {
            Activity::Shutdown => return self.shutdown(),
            Activity::WaitForSipi => return Exit::WaitForSipi,
            // MWAIT may end at any time.
            Activity::Running | Activity::Halted | Activity::Waiting => {}
        }
        let exit = self.until_exit(bus, clock);
        if let Some(kick) = &self.kick {
            kick.arm(0);
        }
        match (exit, &self.apic) {
            (Exit::BudgetSpent, Apic::Kernel(_)) => {
                self.asleep(bus).unwrap_or_else(|error| self.refusal(exits::state_refused(&error)))
            }
            (exit, _) => exit,
        }
    }

    /// At the end of a slice: whether the CPU sleeps in the kernel, and nothing there will wake it. That takes two
    /// slices, as a timer may have expired that KVM looks at when the CPU runs next.
    fn asleep(&mut self, bus: &mut dyn Bus) -> Result<Exit, KvmError> {
        let slept = self.held.activity == Activity::Halted;
        let halted = self.registers.is_halted()?;
        self.held.activity = if halted { Activity::Halted } else { Activity::Running };
        if !halted || !slept {
            return Ok(Exit::BudgetSpent);
        }
        let is_deaf = self.registers.fd.get_kvm_run().if_flag == 0;
        let apic = self.registers.local_apic()?;
        let will_wake = lapic_page::is_timer_armed(&apic.registers, apic.tsc_deadline)
            || bus.apic_bus().is_some_and(|apics| apics.intr());
        Ok(if is_deaf || !will_wake { Exit::Halted } else { Exit::BudgetSpent })
    }

    fn prepare(&mut self, bus: &mut dyn Bus, clock: &SliceClock) -> Result<(), KvmError> {
        if let Some(error) = self.problem.take() {
            return Err(error);
        }
        self.vm.follow_map()?;
        match &mut self.apic {
            Apic::Machine(copy) => {
                if let Ok(reply) = bus.apic_msr_read(clock.now(), IA32_APIC_BASE)
                    && reply.value != copy.base
                {
                    self.registers.set_apic_base(reply.value)?;
                    copy.base = reply.value;
                }
            }
            Apic::Kernel(apic) => {
                let bus = bus.apic_bus().ok_or(KvmError::NoLoan)?;
                apic.hold(&self.registers, &self.vm, bus, clock.now())?;
            }
        }
        if !self.kick.as_ref().is_some_and(Kick::is_for_this_thread) {
            let flag = self.registers.immediate_exit();
            // SAFETY: the flag lies in the mapping that the vCPU keeps; `kick` is dropped before it.
            self.kick = Some(unsafe { Kick::new(flag) }?);
        }
        self.registers.fd.set_kvm_immediate_exit(0);
        if let Some(kick) = &self.kick {
            kick.arm(clock.left().max(1));
        }
        Ok(())
    }

    fn until_exit(&mut self, bus: &mut dyn Bus, clock: &SliceClock) -> Exit {
        let mut leave = None;
        loop {
            if leave.is_none() && clock.left() == 0 {
                leave = Some(Exit::BudgetSpent);
            }
            if let Some(exit) = leave.take_if(|_| !self.is_incomplete) {
                return exit;
            }
            if leave.is_some() {
                // Completes the instruction that waits for its device and goes no further.
                self.registers.fd.set_kvm_immediate_exit(1);
            } else if let Some(exit) = self.offer_interrupts(bus, clock.now()) {
                return exit;
            }
            let event = self.enter(bus, clock.now());
            if let Some(exit) = self.after(event) {
                leave.get_or_insert(exit);
            }
        }
    }

    /// One KVM_RUN, with the local APIC's copies in and out.
    fn enter(&mut self, bus: &mut dyn Bus, now: VirtualTime) -> Event {
        if let Apic::Machine(copy) = &mut self.apic {
            copy.cr8 = bus.read_cr8();
            self.registers.fd.get_kvm_run().cr8 = copy.cr8.into();
        }
        self.is_incomplete = false;
        let event = self.registers.run(bus, now);
        self.is_fresh = false;
        if let Apic::Machine(copy) = &mut self.apic {
            let run = self.registers.fd.get_kvm_run();
            let (cr8, base) = (run.cr8 as u8 & 15, run.apic_base);
            if cr8 != copy.cr8 {
                bus.write_cr8(now, cr8);
            }
            if base != copy.base {
                copy.base = base;
                // What our APIC refuses, KVM has refused before.
                let _ = bus.apic_msr_write(now, IA32_APIC_BASE, base);
            }
        }
        event
    }

    /// Hands a waiting NMI or interrupt to KVM, or asks for the moment when it can be taken. An exit means
    /// that the CPU still sleeps.
    fn offer_interrupts(&mut self, bus: &mut dyn Bus, now: VirtualTime) -> Option<Exit> {
        let is_ready = {
            let run = self.registers.fd.get_kvm_run();
            !self.is_fresh && run.ready_for_interrupt_injection != 0 && run.if_flag != 0
        };
        if let (Apic::Kernel(apic), Some(bus)) = (&mut self.apic, bus.apic_bus()) {
            return match apic.feed(&self.registers, &self.vm, bus, now, is_ready) {
                Ok(ask) => {
                    self.registers.fd.get_kvm_run().request_interrupt_window = ask.into();
                    None
                }
                Err(error) => Some(self.refusal(exits::state_refused(&error))),
            };
        }
        let halted = self.held.activity == Activity::Halted;
        if bus.take_nmi() {
            self.held.activity = Activity::Running;
            if let Err(error) = self.registers.fd.nmi().map_err(failed("KVM_NMI")) {
                return Some(self.refusal(exits::state_refused(&error)));
            }
        }
        let waiting = bus.interrupt_pending();
        // A CPU that just got its state says by itself whether it takes interrupts.
        let wakes = waiting && (is_ready || self.is_fresh && self.held.rflags & umbra_arch::rflags::IF != 0);
        if halted && !wakes && self.held.activity == Activity::Halted {
            return Some(Exit::Halted);
        }
        self.held.activity = Activity::Running;
        let mut ask = waiting;
        if waiting && is_ready {
            if let Some(vector) = bus.interrupt_acknowledge(now)
                && let Err(error) = ioctls::interrupt(&self.registers.fd, vector)
            {
                return Some(self.refusal(exits::state_refused(&error)));
            }
            self.is_fresh = true;
            ask = bus.interrupt_pending();
        }
        self.registers.fd.get_kvm_run().request_interrupt_window = ask.into();
        None
    }

    fn after(&mut self, event: Event) -> Option<Exit> {
        match event {
            Event::Device { attention } => {
                self.is_incomplete = true;
                attention.then_some(Exit::Attention)
            }
            Event::Kicked | Event::Window | Event::EndOfInterrupt => None,
            Event::Halted => {
                self.held.activity = Activity::Halted;
                None
            }
            Event::Debug { dr6 } => self.debugged(dr6),
            Event::Shutdown => {
                self.held.activity = Activity::Shutdown;
                Some(self.shutdown())
            }
            refused @ Event::Refused { .. } => Some(self.refusal(refused)),
        }
    }

    fn debugged(&mut self, dr6: u64) -> Option<Exit> {
        match &mut self.stop_at {
            StopAt::Address(_) => self.is_stop_reached = dr6 & DR6_FIRST != 0,
            StopAt::Instructions(left) if dr6 & DR6_STEP != 0 => {
                self.retired += 1;
                *left = left.saturating_sub(1);
                self.is_stop_reached = *left == 0;
            }
            _ => {}
        }
        self.is_stop_reached.then_some(Exit::Attention)
    }

    fn shutdown(&self) -> Exit {
        Exit::ShutdownUnseen { rip: self.registers.next_instruction(&self.vm).0 }
    }

    fn refusal(&self, event: Event) -> Exit {
        let Event::Refused { kind, detail, bytes } = event else { return Exit::Attention };
        let (rip, read) = self.registers.next_instruction(&self.vm);
        let bytes = if bytes.is_empty() { read } else { bytes };
        Exit::Refused(Box::new(Refusal { kind, detail: format!("{}: {detail}", self.backend()), rip, bytes }))
    }

    fn note(&self, result: Result<(), KvmError>) {
        if let Err(error) = result {
            self.problem.borrow_mut().get_or_insert(error);
        }
    }

    fn set_guest_debug(&mut self) -> Result<(), KvmError> {
        set_guest_debug(&self.registers, self.stop_at)
    }
}

/// Tells KVM where to stop.
pub(super) fn set_guest_debug(registers: &Registers, stop_at: StopAt) -> Result<(), KvmError> {
    let mut arch = kvm_guest_debug_arch::default();
    let control = match stop_at {
        StopAt::Never => 0,
        StopAt::Address(address) => {
            (arch.debugreg[0], arch.debugreg[7]) = (address, DR7_FIRST);
            KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP
        }
        StopAt::Instructions(_) => KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
    };
    let debug = kvm_guest_debug { control, pad: 0, arch };
    registers.fd.set_guest_debug(&debug).map_err(failed("KVM_SET_GUEST_DEBUG"))
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, bus: &mut dyn Bus, slice: Slice) -> Stopped {
        let clock = SliceClock::start(slice);
        let exit = self.slice(bus, &clock);
        self.now = clock.now();
        Stopped { exit, now: self.now }
    }

    fn state(&self) -> CpuState {
        let mut s = self.held.clone();
        match self.registers.get(&mut s) {
            Ok(tsc) => s.msr.tsc_offset = tsc.wrapping_sub(self.now.0),
            Err(error) => self.note(Err(error)),
        }
        if matches!(self.apic, Apic::Kernel(_)) && matches!(s.activity, Activity::Running | Activity::Halted) {
            match self.registers.is_halted() {
                Ok(halted) => s.activity = if halted { Activity::Halted } else { Activity::Running },
                Err(error) => self.note(Err(error)),
            }
        }
        s
    }

    fn set_state(&mut self, state: &CpuState) {
        self.held = state.clone();
        (self.is_incomplete, self.is_fresh) = (false, true);
        let tsc = self.now.0.wrapping_add(state.msr.tsc_offset);
        self.problem.take();
        let apic = if let Apic::Machine(copy) = self.apic { Some(copy) } else { None };
        self.note(self.registers.set(state, apic, tsc));
    }

    fn retired(&self) -> u64 {
        self.retired
    }
}

impl Accelerator for KvmVcpu {
    fn backend(&self) -> Backend {
        self.vm.backend()
    }

    fn stop_at(&mut self, stop_at: StopAt) {
        (self.stop_at, self.is_stop_reached) = (stop_at, false);
        let result = self.set_guest_debug();
        self.note(result);
    }

    fn is_stop_reached(&self) -> bool {
        self.is_stop_reached
    }

    fn enter_at(&mut self, state: &CpuState, now: VirtualTime) {
        self.now = now;
        let remapped = self.vm.remap();
        self.set_state(state);
        self.note(remapped);
    }

    fn leave(&mut self, bus: &mut dyn Bus) -> Result<(), Refusal> {
        let wanted = std::mem::replace(&mut self.stop_at, StopAt::Never);
        let result = self.set_guest_debug();
        self.note(result);
        let delivered = self.deliver_pending(bus);
        if let Some(kick) = &self.kick {
            kick.arm(0);
        }
        self.stop_at(wanted);
        if let (Apic::Kernel(apic), Some(bus)) = (&mut self.apic, bus.apic_bus()) {
            apic.give_back(bus, self.now);
        }
        self.note(self.take_written().map(|_| ()));
        delivered
    }
}

impl KvmVcpu {
    /// Completes what is under way, and lets the guest run for moments until KVM holds no event that a state can't
    /// hold. (A single step would do, but for RFLAGS.TF in the frame that the event pushes.)
    fn deliver_pending(&mut self, bus: &mut dyn Bus) -> Result<(), Refusal> {
        let started = Instant::now();
        let mut kicked = false;
        while started.elapsed() < LONGEST_DELIVERY {
            let is_incomplete = self.is_incomplete;
            if !is_incomplete && self.is_settled(kicked).map_err(|error| self.undelivered(&error.to_string()))? {
                return Ok(());
            }
            self.registers.fd.set_kvm_immediate_exit(is_incomplete.into());
            if let Some(kick) = &self.kick {
                kick.arm(if is_incomplete { 0 } else { DELIVERY_NS });
            }
            let event = self.enter(bus, self.now);
            kicked = event == Event::Kicked && !is_incomplete;
            // What the guest comes to meanwhile is the next engine's business.
            let _ = self.after(event);
        }
        Err(self.undelivered("an interrupt stays on its way"))
    }

    fn undelivered(&self, why: &str) -> Refusal {
        let (rip, bytes) = self.registers.next_instruction(&self.vm);
        Refusal { kind: RefusalKind::Delivery, detail: format!("{}: {why}", self.backend()), rip, bytes }
    }

    /// Whether the state and a local APIC's say everything.
    fn is_settled(&mut self, kicked: bool) -> Result<bool, KvmError> {
        let apic = match &mut self.apic {
            Apic::Machine(_) => true,
            Apic::Kernel(apic) => apic.settle(&self.registers, kicked)?,
        };
        Ok(apic && !self.registers.is_event_pending()?)
    }
}
