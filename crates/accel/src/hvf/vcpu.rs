//! [`HvfVcpu`]: the framework as an engine.

use super::controls;
use super::exits::{self, PortAccess};
use super::framework::{Framework, HvfError, Register};
use super::state;
use super::vmcs::*;
use crate::Backend;
use crate::handover::{Accelerator, StopAt};
use crate::time::SliceClock;
use std::cell::RefCell;
use std::sync::Arc;
use umbra_arch::exit::{Refusal, RefusalKind};
use umbra_arch::state::Activity;
use umbra_arch::{Bus, CpuState, Exit, Gpa, PAGE_SIZE, Slice, Stopped, Vcpu, VirtualTime, rflags};
use umbra_memory::GuestMemory;

/// VM-entry interruption information: valid, external interrupt.
const INJECT_INTERRUPT: u64 = 1 << 31;

/// One virtual CPU of the framework. `F` is the framework, or a stand-in.
///
/// Not exchanged with the framework yet: x87 and vector registers, debug registers other than DR7, MSRs other than
/// EFER.
pub struct HvfVcpu<F> {
    hv: F,
    memory: Arc<GuestMemory>,
    held: CpuState,
    now: VirtualTime,
    problem: RefCell<Option<HvfError>>,
}

impl<F: Framework> HvfVcpu<F> {
    /// An engine over a vCPU into which `memory` is mapped.
    pub fn new(hv: F, memory: Arc<GuestMemory>) -> Self {
        let mut vcpu = Self { hv, memory, held: CpuState::reset(), now: VirtualTime(0), problem: RefCell::new(None) };
        vcpu.set_state(&CpuState::reset());
        let installed = controls::install(&mut vcpu.hv);
        vcpu.note(installed);
        vcpu
    }

    #[cfg(test)]
    pub(super) fn framework(&self) -> &F {
        &self.hv
    }

    fn note(&self, result: Result<(), HvfError>) {
        if let Err(error) = result {
            self.problem.borrow_mut().get_or_insert(error);
        }
    }

    fn slice(&mut self, bus: &mut dyn Bus, clock: &SliceClock) -> Result<Exit, HvfError> {
        if let Some(error) = self.problem.take() {
            return Err(error);
        }
        loop {
            if clock.left() == 0 {
                return Ok(Exit::BudgetSpent);
            }
            if let Some(exit) = self.offer_interrupt(bus, clock.now())? {
                return Ok(exit);
            }
            self.hv.run(clock.left())?;
            let (reason, qualification) = (self.hv.read_vmcs(EXIT_REASON)?, self.hv.read_vmcs(EXIT_QUALIFICATION)?);
            match exits::decode(reason, qualification) {
                exits::Exit::Interrupted | exits::Exit::Window => {}
                exits::Exit::Halt => {
                    self.skip_instruction()?;
                    self.held.activity = Activity::Halted;
                }
                exits::Exit::Port(access) => {
                    if self.port(bus, clock.now(), access)? {
                        return Ok(Exit::Attention);
                    }
                }
                exits::Exit::TripleFault => {
                    return Ok(Exit::ShutdownUnseen { rip: self.hv.read_register(Register::Rip)? });
                }
                exits::Exit::Other(reason) => {
                    return Ok(self.refusal(RefusalKind::Backend, format!("VM exit {reason}")));
                }
            }
        }
    }

    /// Injects a waiting interrupt if it can be taken. An exit means that the CPU still sleeps.
    fn offer_interrupt(&mut self, bus: &mut dyn Bus, now: VirtualTime) -> Result<Option<Exit>, HvfError> {
        let enabled = self.hv.read_register(Register::Rflags)? & rflags::IF != 0;
        let takes = bus.interrupt_pending() && enabled && self.hv.read_vmcs(GUEST_INTERRUPTIBILITY)? & 3 == 0;
        if takes && let Some(vector) = bus.interrupt_acknowledge(now) {
            self.held.activity = Activity::Running;
            self.hv.write_vmcs(ENTRY_INTERRUPTION_INFO, INJECT_INTERRUPT | u64::from(vector))?;
        }
        controls::ask_for_window(&mut self.hv, bus.interrupt_pending())?;
        Ok((self.held.activity == Activity::Halted).then_some(Exit::Halted))
    }

    fn skip_instruction(&mut self) -> Result<(), HvfError> {
        let next = self.hv.read_register(Register::Rip)?.wrapping_add(self.hv.read_vmcs(EXIT_INSTRUCTION_LENGTH)?);
        self.hv.write_register(Register::Rip, next)
    }

    /// Carries out a port access; says whether somebody wants attention.
    fn port(&mut self, bus: &mut dyn Bus, now: VirtualTime, access: PortAccess) -> Result<bool, HvfError> {
        let rax = self.hv.read_register(Register::Rax)?;
        let attention = if access.is_in {
            let reply = bus.port_read(now, access.port, access.width);
            let mask = access.width.mask();
            // A 32-bit result clears the upper half, narrower ones leave the rest alone.
            let kept = if mask == 0xffff_ffff { 0 } else { rax & !mask };
            self.hv.write_register(Register::Rax, kept | u64::from(reply.value) & mask)?;
            reply.attention
        } else {
            bus.port_write(now, access.port, access.width, (rax & access.width.mask()) as u32).attention
        };
        self.skip_instruction()?;
        Ok(attention)
    }

    fn refusal(&self, kind: RefusalKind, detail: String) -> Exit {
        let rip = self.hv.read_register(Register::Rip).unwrap_or(0);
        Exit::Refused(Box::new(Refusal {
            kind,
            detail: format!("{}: {detail}", Backend::Hypervisor),
            rip,
            bytes: Vec::new(),
        }))
    }
}

impl<F: Framework> Vcpu for HvfVcpu<F> {
    fn run(&mut self, bus: &mut dyn Bus, slice: Slice) -> Stopped {
        let clock = SliceClock::start(slice);
        let exit = self.slice(bus, &clock);
        self.now = clock.now();
        let exit = exit.unwrap_or_else(|error| self.refusal(RefusalKind::Host, error.to_string()));
        Stopped { exit, now: self.now }
    }

    fn state(&self) -> CpuState {
        let mut s = self.held.clone();
        self.note(state::get(&self.hv, &mut s));
        s
    }

    fn set_state(&mut self, state: &CpuState) {
        self.held = state.clone();
        self.problem.take();
        let result = state::set(&mut self.hv, state);
        self.note(result);
    }

    fn retired(&self) -> u64 {
        0
    }
}

impl<F: Framework> Accelerator for HvfVcpu<F> {
    fn backend(&self) -> Backend {
        Backend::Hypervisor
    }

    fn stop_at(&mut self, stop_at: StopAt) {
        if stop_at != StopAt::Never {
            // Said at the next run, as an answer that isn't there.
            self.note(Err(HvfError { call: "stop_at (not offered)", code: 0 }));
        }
    }

    fn is_stop_reached(&self) -> bool {
        false
    }

    fn enter_at(&mut self, state: &CpuState, now: VirtualTime) {
        self.now = now;
        self.set_state(state);
    }

    fn leave(&mut self, _: &mut dyn Bus) -> Result<(), Refusal> {
        // The framework keeps no log of written pages.
        for (start, bytes) in self.memory.ram_ranges() {
            let pages = (start.raw()..start.raw() + bytes).step_by(PAGE_SIZE as usize);
            pages.for_each(|gpa| self.memory.page_written_outside(Gpa::new(gpa).page()));
        }
        Ok(())
    }
}
