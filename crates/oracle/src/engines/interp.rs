//! The engine `interp` and its variants: single instructions on the bare core, everything else on the whole
//! interpreter.

use super::window::WindowError;
use super::{Blank, Window};
use crate::case::{Case, Layout, Run};
use crate::engine::{Answer, Engine};
use umbra_hostexec::native::Mode;
use umbra_mmu::MmuOptions;

/// The interpreter.
pub struct Interp {
    name: &'static str,
    windows: [Window; 3],
    blank: Blank,
}

impl Interp {
    /// An interpreter of that name, whose MMU is made with these options.
    ///
    /// # Errors
    /// [`WindowError`].
    pub fn new(name: &'static str, mmu: MmuOptions) -> Result<Self, WindowError> {
        Ok(Self { name, windows: Window::all()?, blank: Blank::new(mmu)? })
    }
}

impl Engine for Interp {
    fn name(&self) -> &'static str {
        self.name
    }

    fn run(&mut self, case: &Case) -> Answer {
        match (case.layout, case.run) {
            (Layout::Window(mode), Run::Instruction(_)) => {
                let number = Mode::ALL.iter().position(|m| *m == mode).unwrap_or(0);
                self.windows[number].run(case)
            }
            _ => self.blank.run(case),
        }
    }

    fn settle(&mut self) -> Result<(), String> {
        self.windows.iter_mut().try_for_each(Window::settle)
    }
}
