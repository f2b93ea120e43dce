//! Makes a differing case smaller as long as it still differs: fewer steps, less memory, plainer registers.

use crate::case::Case;
use std::time::{Duration, Instant};
use umbra_arch::control::{Cr0, Cr4, Efer};
use umbra_arch::fpu::FpState;

/// Attempts after which it is small enough, and time after which it has to be: some engines are slow.
const ATTEMPTS: usize = 20_000;
const PATIENCE: Duration = Duration::from_secs(8);

struct Search<'a> {
    case: Case,
    differs: &'a mut dyn FnMut(&Case) -> bool,
    left: usize,
    start: Instant,
}

/// The smallest case that was found for which `differs` still holds.
pub fn minimise(case: &Case, differs: &mut dyn FnMut(&Case) -> bool) -> Case {
    let mut search = Search { case: case.clone(), differs, left: ATTEMPTS, start: Instant::now() };
    loop {
        let before = search.case.clone();
        search.steps();
        search.memory();
        search.registers();
        search.control();
        if search.case == before || search.is_spent() {
            return search.case;
        }
    }
}

impl Search<'_> {
    fn is_spent(&self) -> bool {
        self.left == 0 || self.start.elapsed() > PATIENCE
    }

    /// Keeps a change if the case still differs.
    fn attempt(&mut self, change: impl FnOnce(&mut Case)) -> bool {
        let mut smaller = self.case.clone();
        change(&mut smaller);
        if smaller == self.case || self.is_spent() {
            return false;
        }
        self.left -= 1;
        let keeps = (self.differs)(&smaller);
        if keeps {
            self.case = smaller;
        }
        keeps
    }

    /// Removes runs of steps, long ones first.
    fn steps(&mut self) {
        let mut run = self.case.code.steps.len() / 2;
        while run > 0 {
            let mut at = 0;
            while at + run <= self.case.code.steps.len() && self.case.code.steps.len() > run {
                if !self.attempt(|case| drop(case.code.steps.drain(at..at + run))) {
                    at += 1;
                }
            }
            run /= 2;
        }
    }

    fn memory(&mut self) {
        for n in (0..self.case.memory.len()).rev() {
            if !self.attempt(|case| drop(case.memory.remove(n))) {
                self.attempt(|case| case.memory[n].bytes.fill(0));
            }
        }
        for n in 0..self.case.memory.len() {
            let bits = 8 * self.case.memory[n].bytes.len();
            // Entries of tables bit by bit, longer pieces by bytes.
            for at in 0..if bits <= 64 { bits } else { 0 } {
                self.attempt(|case| case.memory[n].bytes[at / 8] &= !(1 << (at % 8)));
            }
            for at in (0..bits / 8).filter(|_| bits > 64) {
                self.attempt(|case| case.memory[n].bytes[at] = 0);
            }
        }
    }

    fn registers(&mut self) {
        let plain = self.case.layout.state();
        for n in 0..16 {
            // In ring 0 they have meanings: the log's end, the stack.
            let is_free = self.case.layout.is_window();
            if !self.attempt(|case| case.state.gpr[n] = plain.gpr[n]) && is_free {
                for shift in [32, 16, 8] {
                    self.attempt(|case| case.state.gpr[n] &= (1 << shift) - 1);
                }
            }
        }
        self.attempt(|case| case.state.fp = FpState::default());
        for n in 0..16 {
            self.attempt(|case| case.state.fp.xmm[n] = [0; 2]);
            self.attempt(|case| case.state.fp.ymm_high[n] = [0; 2]);
        }
        for n in 0..8 {
            self.attempt(|case| case.state.fp.st[n] = [0; 2]);
        }
        self.attempt(|case| case.state.pkru = 0);
        self.attempt(|case| case.state.seg = plain.seg);
    }

    fn control(&mut self) {
        let plain = self.case.layout.state();
        for bit in (0..32).map(|n| 1u64 << n) {
            self.attempt(|case| case.state.rflags &= !bit | plain.rflags);
            self.attempt(|case| case.state.cr0 = Cr0::new(case.state.cr0.raw() & (!bit | plain.cr0.raw())));
            self.attempt(|case| case.state.cr4 = Cr4::new(case.state.cr4.raw() & (!bit | plain.cr4.raw())));
            self.attempt(|case| case.state.efer = Efer::new(case.state.efer.raw() & (!bit | plain.efer.raw())));
        }
    }
}
