//! [`CaseRunner`]: single test cases, one after the other, in one virtual machine.

use super::cpuid::Fitted;
use super::error::KvmError;
use super::irqchip::Irqchip;
use super::vcpu::KvmVcpu;
use crate::Backend;
use crate::handover::{Accelerator, StopAt};
use std::sync::Arc;
use std::time::Duration;
use umbra_arch::exit::Refusal;
use umbra_arch::{Bus, CpuState, Exit, GpaPage, Slice, Vcpu, VirtualTime};
use umbra_memory::GuestMemory;

/// How far a case runs at most. HLT, shutdown and refusal always end it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CaseLimit {
    /// Instructions, single-stepped, which is slow; `None` runs freely.
    pub instructions: Option<u64>,
    /// Host time.
    pub time: Duration,
}

/// Why a case ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CaseEnd {
    /// HLT; RIP is behind it.
    Halted,
    /// The number of instructions was reached. Delivering an exception counts with the handler's first.
    Instructions,
    /// Triple fault. The registers are what KVM leaves behind, and mean nothing.
    Shutdown,
    /// The oracle can't answer.
    Refused(Refusal),
    /// The time was up.
    TimedOut,
}

/// What a case led to. Memory is what the case's [`GuestMemory`] holds now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CaseOutcome {
    /// Why it ended.
    pub end: CaseEnd,
    /// All registers then.
    pub state: CpuState,
    /// Instructions retired, where they were counted.
    pub retired: u64,
    /// RAM pages that the case wrote, in order of their addresses; accessed and dirty bits count.
    pub written: Vec<GpaPage>,
}

/// Runs cases under KVM. The virtual machine, its CPU and its memory are made once.
///
/// A case is a memory image and a [`CpuState`]. Write the image into [`memory`](Self::memory) with
/// [`GuestMemory::write`], then call [`run`](Self::run), and read the result from the same memory; undo
/// [`CaseOutcome::written`] (or write a whole new image) before the next case. Exceptions take the guest's own
/// IDT: let each gate lead to a HLT of its own, and RIP tells the vector, the stack the error code.
pub struct CaseRunner {
    vcpu: KvmVcpu,
    memory: Arc<GuestMemory>,
}

impl CaseRunner {
    /// A runner of cases for CPUs of the profile [`fit`](super::fit) passed, on `memory`, which may have other
    /// users while no case runs. Cases have no local APIC: their end is a HLT, which wouldn't end KVM_RUN with one.
    ///
    /// # Errors
    /// [`KvmError`] when there is no usable KVM.
    pub fn new(memory: Arc<GuestMemory>, fitted: &Fitted) -> Result<Self, KvmError> {
        let fitted = Fitted { irqchip: Irqchip::User, ..fitted.clone() };
        Ok(Self { vcpu: KvmVcpu::new(Arc::clone(&memory), &fitted)?, memory })
    }

    /// What executes the cases; results are to be labelled with it.
    pub fn backend(&self) -> Backend {
        self.vcpu.backend()
    }

    /// The cases' memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Runs one case from `start`. Everything that KVM derived from the memory's earlier contents is dropped
    /// first. Devices, if the case reaches any, are `bus`.
    ///
    /// # Errors
    /// [`KvmError`] when the host fails; what KVM can't do with the case is [`CaseEnd::Refused`].
    pub fn run(&mut self, start: &CpuState, bus: &mut dyn Bus, limit: CaseLimit) -> Result<CaseOutcome, KvmError> {
        let before = self.vcpu.retired();
        self.vcpu.stop_at(limit.instructions.map_or(StopAt::Never, StopAt::Instructions));
        self.vcpu.enter_at(start, VirtualTime(0));
        let until = VirtualTime(limit.time.as_nanos().try_into().unwrap_or(u64::MAX));
        let mut now = VirtualTime(0);
        let end = loop {
            if limit.instructions == Some(0) {
                break CaseEnd::Instructions;
            }
            let stopped = self.vcpu.run(bus, Slice { now, until });
            now = stopped.now;
            match stopped.exit {
                Exit::Halted | Exit::WaitForSipi => break CaseEnd::Halted,
                Exit::Attention if self.vcpu.is_stop_reached() => break CaseEnd::Instructions,
                Exit::Refused(refusal) => break CaseEnd::Refused(*refusal),
                Exit::BudgetSpent => break CaseEnd::TimedOut,
                Exit::Shutdown(_) | Exit::ShutdownUnseen { .. } => break CaseEnd::Shutdown,
                Exit::Attention | Exit::Unsupported(_) => {}
            }
        };
        let written = self.vcpu.take_written()?;
        Ok(CaseOutcome { end, state: self.vcpu.state(), retired: self.vcpu.retired() - before, written })
    }
}
