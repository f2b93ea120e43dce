//! A guest that starts under an accelerator and goes on in another engine, and back.

use crate::Backend;
use std::fmt;
use umbra_arch::exit::Refusal;
use umbra_arch::{Bus, CpuState, Exit, Slice, Stopped, Vcpu, VirtualTime};

/// Where an accelerator stops by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopAt {
    /// Nowhere.
    Never,
    /// Before the instruction at this linear address.
    Address(u64),
    /// After this many instructions, counted by single steps.
    Instructions(u64),
}

/// An engine that executes the guest with the host's help and shares its RAM with another engine.
pub trait Accelerator: Vcpu {
    /// What executes the guest.
    fn backend(&self) -> Backend;
    /// Where to stop from now on: the run then ends with [`Exit::Attention`] and
    /// [`is_stop_reached`](Self::is_stop_reached) is true.
    fn stop_at(&mut self, stop_at: StopAt);
    /// Whether the place of [`stop_at`](Self::stop_at) was reached since it was set.
    fn is_stop_reached(&self) -> bool;
    /// Takes over from another engine that has written to memory, at virtual time `now`.
    fn enter_at(&mut self, state: &CpuState, now: VirtualTime);
    /// Brings the CPU to a point where [`Vcpu::state`] says everything, and tells the memory's other users
    /// what the guest has written.
    ///
    /// # Errors
    /// When an event that is being delivered can't be brought to its end.
    fn leave(&mut self, bus: &mut dyn Bus) -> Result<(), Refusal>;
}

/// Which of the two engines runs the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// The accelerator.
    Accelerator,
    /// The other engine.
    Soft,
}

/// Why the guest changed sides.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reason {
    /// The accelerator could not execute an instruction.
    Refused(Refusal),
    /// The place of [`HandOver::stop_at`] was reached.
    Reached(StopAt),
    /// [`HandOver::hand_over`] asked for it.
    Asked,
}

/// One change of sides.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Switch {
    /// Who runs the guest from here on.
    pub to: Side,
    /// Why.
    pub reason: Reason,
    /// Virtual time.
    pub now: VirtualTime,
    /// RIP.
    pub rip: u64,
}

impl fmt::Display for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let to = match self.to {
            Side::Accelerator => "the accelerator",
            Side::Soft => "Umbra's own engine",
        };
        write!(f, "to {to} at rip {:#x}, {} ns: ", self.rip, self.now.0)?;
        match &self.reason {
            Reason::Refused(refusal) => refusal.fmt(f),
            Reason::Reached(StopAt::Address(address)) => write!(f, "address {address:#x} reached"),
            Reason::Reached(StopAt::Instructions(count)) => write!(f, "{count} instructions counted"),
            Reason::Reached(StopAt::Never) | Reason::Asked => f.write_str("asked for"),
        }
    }
}

/// Two engines for one CPU on one memory, of which one runs at a time.
pub struct HandOver<A, S> {
    accelerator: A,
    soft: S,
    side: Side,
    asked: Option<Side>,
    at_refusal: bool,
    stop_at: StopAt,
    switches: Vec<Switch>,
}

impl<A: Accelerator, S: Vcpu> HandOver<A, S> {
    /// The guest starts on the accelerator, and stays there.
    pub fn new(accelerator: A, soft: S) -> Self {
        Self {
            accelerator,
            soft,
            side: Side::Accelerator,
            asked: None,
            at_refusal: false,
            stop_at: StopAt::Never,
            switches: Vec::new(),
        }
    }

    /// Whether what the accelerator refuses is a reason to change sides.
    pub fn set_at_refusal(&mut self, yes: bool) {
        self.at_refusal = yes;
    }

    /// Changes sides when the accelerator reaches this place.
    pub fn stop_at(&mut self, stop_at: StopAt) {
        self.stop_at = stop_at;
        self.accelerator.stop_at(stop_at);
    }

    /// Changes sides before the next instruction.
    pub fn hand_over(&mut self, to: Side) {
        self.asked = Some(to);
    }

    /// Who runs the guest.
    pub fn side(&self) -> Side {
        self.side
    }

    /// The accelerator.
    pub fn accelerator(&self) -> &A {
        &self.accelerator
    }

    /// The other engine.
    pub fn soft(&self) -> &S {
        &self.soft
    }

    /// The changes of sides so far.
    pub fn switches(&self) -> &[Switch] {
        &self.switches
    }

    fn switch(&mut self, bus: &mut dyn Bus, to: Side, reason: Reason, now: VirtualTime) -> Result<(), Refusal> {
        let state = match to {
            Side::Soft => {
                self.accelerator.leave(bus)?;
                let state = self.accelerator.state();
                self.soft.set_state(&state);
                state
            }
            Side::Accelerator => {
                let state = self.soft.state();
                self.accelerator.enter_at(&state, now);
                state
            }
        };
        self.side = to;
        self.switches.push(Switch { to, reason, now, rip: state.rip });
        Ok(())
    }

    fn accelerated(&mut self, bus: &mut dyn Bus, slice: Slice) -> Stopped {
        let mut stopped = self.accelerator.run(bus, slice);
        let reason = match &stopped.exit {
            Exit::Refused(refusal) if self.at_refusal => Reason::Refused(Refusal::clone(refusal)),
            Exit::Attention if self.accelerator.is_stop_reached() => Reason::Reached(self.stop_at),
            _ => return stopped,
        };
        stopped.exit = match self.switch(bus, Side::Soft, reason, stopped.now) {
            Ok(()) => Exit::Attention,
            Err(refusal) => Exit::Refused(Box::new(refusal)),
        };
        stopped
    }
}

impl<A: Accelerator, S: Vcpu> Vcpu for HandOver<A, S> {
    fn run(&mut self, bus: &mut dyn Bus, slice: Slice) -> Stopped {
        if let Some(to) = self.asked.take_if(|to| *to != self.side)
            && let Err(refusal) = self.switch(bus, to, Reason::Asked, slice.now)
        {
            return Stopped { exit: Exit::Refused(Box::new(refusal)), now: slice.now };
        }
        self.asked = None;
        match self.side {
            Side::Accelerator => self.accelerated(bus, slice),
            Side::Soft => self.soft.run(bus, slice),
        }
    }

    fn state(&self) -> CpuState {
        match self.side {
            Side::Accelerator => self.accelerator.state(),
            Side::Soft => self.soft.state(),
        }
    }

    fn set_state(&mut self, state: &CpuState) {
        match self.side {
            Side::Accelerator => self.accelerator.set_state(state),
            Side::Soft => self.soft.set_state(state),
        }
    }

    fn retired(&self) -> u64 {
        self.accelerator.retired() + self.soft.retired()
    }
}
