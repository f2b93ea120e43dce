//! KVM's asynchronous page faults, one [`AsyncPf`] a virtual CPU ("KVM-specific MSRs").
//!
//! A guest that comes to RAM which has yet to arrive is told so by a synthetic #PF whose CR2 is a token
//! ("page not present"), may do something else meanwhile, and finds the token in memory when the page is
//! there ("page ready", an interrupt). Whether a guest can take the #PF is judged when it is due, not when
//! it was asked for: a guest may switch paging off without draining what is under way.
//!
//! This register machine knows tokens and MSRs. The caller writes to memory and raises vectors.

mod arrivals;
#[cfg(test)]
mod tests;

pub use arrivals::PageArrivals;

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use umbra_arch::msr::{KVM_ASYNC_PF_ACK, KVM_ASYNC_PF_EN, KVM_ASYNC_PF_INT};
use umbra_arch::{Fault, Gpa, GpaPage, PageContext};

/// Events under way that one virtual CPU can have.
pub const MAX_OUTSTANDING: usize = 64;
/// The token that stands for every event under way.
pub const WAKE_ALL: u32 = !0;
/// What the guest finds in its area's flags with a "page not present" event.
pub const NOT_PRESENT: u32 = 1;

/// Bits of the control MSR.
mod enable {
    pub const ENABLED: u64 = 1 << 0;
    pub const SEND_ALWAYS: u64 = 1 << 1;
    pub const READY_BY_INTERRUPT: u64 = 1 << 3;
    /// Reserved ones, and delivery to a nested hypervisor, which isn't offered.
    pub const REFUSED: u64 = 1 << 2 | 3 << 4;
    pub const AREA: u64 = !0x3f;
}

/// Bits of a token below the counter.
const TOKEN_SHIFT: u32 = 12;

/// An event of which the guest knows by its token.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Outstanding {
    token: u32,
    page: u64,
}

/// A "page ready" event to be made real: write the token, raise the vector.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ready {
    /// Goes to [`AsyncPf::token_at`].
    pub token: u32,
    /// Of the interrupt.
    pub vector: u8,
}

/// The state of one virtual CPU.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AsyncPf {
    vcpu: u32,
    control: u64,
    vector: u8,
    counter: u32,
    /// Pages that have not arrived.
    missing: Vec<Outstanding>,
    /// Pages that have arrived, of which the guest has yet to hear.
    arrived: VecDeque<Outstanding>,
    /// The guest has yet to hear that everything is there.
    wake_all: bool,
}

impl AsyncPf {
    /// Virtual CPU `vcpu` after reset.
    pub fn new(vcpu: u32) -> Self {
        Self { vcpu, control: 0, vector: 0, counter: 0, missing: Vec::new(), arrived: VecDeque::new(), wake_all: false }
    }

    /// RDMSR of one of the three.
    ///
    /// # Errors
    /// #GP(0) for any other number.
    pub fn msr_read(&self, msr: u32) -> Result<u64, Fault> {
        match msr {
            KVM_ASYNC_PF_EN => Ok(self.control),
            KVM_ASYNC_PF_INT => Ok(self.vector.into()),
            KVM_ASYNC_PF_ACK => Ok(0),
            _ => Err(Fault::GP0),
        }
    }

    /// WRMSR of one of the three. Afterwards [`take_ready`](Self::take_ready) may have something.
    ///
    /// # Errors
    /// #GP(0) for reserved bits and any other number.
    pub fn msr_write(&mut self, msr: u32, value: u64) -> Result<(), Fault> {
        match msr {
            KVM_ASYNC_PF_EN if value & enable::REFUSED == 0 => self.set_control(value),
            KVM_ASYNC_PF_INT if value >> 8 == 0 => self.vector = value as u8,
            // Asking again is all that an acknowledgement does.
            KVM_ASYNC_PF_ACK => {}
            _ => return Err(Fault::GP0),
        }
        Ok(())
    }

    /// Disabling forgets everything; enabling, also once more, wakes whoever waits for something forgotten.
    fn set_control(&mut self, value: u64) {
        self.control = value;
        if self.is_enabled() {
            self.wake_all |= self.arrived.is_empty();
        } else {
            self.forget();
        }
    }

    fn forget(&mut self) {
        self.missing.clear();
        self.arrived.clear();
        self.wake_all = false;
    }

    /// INIT: as after reset, but tokens go on counting.
    pub fn init(&mut self) {
        *self = Self { counter: self.counter, ..Self::new(self.vcpu) };
    }

    /// Without an interrupt for "page ready" nothing is delivered at all.
    fn is_enabled(&self) -> bool {
        const BOTH: u64 = enable::ENABLED | enable::READY_BY_INTERRUPT;
        self.control & BOTH == BOTH
    }

    /// The guest came to `page`: the token of a "page not present" event, if it can and wants to have one now.
    pub fn begin(&mut self, page: GpaPage, context: PageContext) -> Option<u32> {
        let wanted = context.cpl != 0 || self.control & enable::SEND_ALWAYS != 0;
        let deliverable = context.paging && context.interruptible && wanted && self.is_enabled();
        let known = self.missing.iter().chain(&self.arrived).any(|event| event.page == page.raw());
        if !deliverable || known || self.missing.len() + self.arrived.len() >= MAX_OUTSTANDING {
            return None;
        }
        let token = self.next_token();
        self.missing.push(Outstanding { token, page: page.raw() });
        Some(token)
    }

    /// The counter's part of a token is never 0.
    fn next_token(&mut self) -> u32 {
        self.counter = self.counter.wrapping_add(1) & (u32::MAX >> TOKEN_SHIFT);
        self.counter = self.counter.max(1);
        self.counter << TOKEN_SHIFT | self.vcpu
    }

    /// A page is there.
    pub fn page_arrived(&mut self, page: GpaPage) {
        if let Some(at) = self.missing.iter().position(|event| event.page == page.raw()) {
            self.arrived.push_back(self.missing.remove(at));
        }
    }

    /// Address of the area's flags.
    pub fn flags_at(&self) -> Gpa {
        Gpa::new(self.control & enable::AREA)
    }

    /// Address of the area's token.
    pub fn token_at(&self) -> Gpa {
        self.flags_at().add(4)
    }

    /// Whether the guest has yet to hear of a page that is there.
    pub fn has_ready(&self) -> bool {
        self.wake_all || !self.arrived.is_empty()
    }

    /// The next "page ready" event, if `token`, what the area's token is at present, says that the guest has
    /// taken the last one.
    pub fn take_ready(&mut self, token: u32) -> Option<Ready> {
        if token != 0 || !self.is_enabled() {
            return None;
        }
        let next = if std::mem::take(&mut self.wake_all) { WAKE_ALL } else { self.arrived.pop_front()?.token };
        Some(Ready { token: next, vector: self.vector })
    }
}
