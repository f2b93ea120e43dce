//! The engine `interp` and its variants: single instructions on the bare core, everything else on the whole
//! interpreter.

use super::window::WindowError;
use super::{Blank, Window};
use crate::case::{Case, Layout, Run};
use crate::engine::{Answer, Engine, RomAnswer};
use crate::roms;
use umbra_arch::cpuid::CpuidProfile;
use umbra_cpu::{EngineOptions, Interpreter};
use umbra_hostexec::native::Mode;
use umbra_mmu::MmuOptions;
use umbra_test_roms::Rom;

/// The interpreter.
pub struct Interp {
    name: &'static str,
    windows: [Window; 3],
    blank: Blank,
    mmu: MmuOptions,
    profile: CpuidProfile,
}

impl Interp {
    /// An interpreter of that name and CPU model, whose MMU is made with these options.
    ///
    /// # Errors
    /// [`WindowError`].
    pub fn new(name: &'static str, profile: &CpuidProfile, mmu: MmuOptions) -> Result<Self, WindowError> {
        let (windows, blank) = (Window::all(profile)?, Blank::new(profile, mmu)?);
        Ok(Self { name, windows, blank, mmu, profile: profile.clone() })
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

    fn run_rom(&mut self, rom: &Rom) -> RomAnswer {
        let options = EngineOptions { mmu: self.mmu };
        roms::report(rom, self.profile.clone(), |memory| Interpreter::new(memory, &self.profile, 0, &options))
    }
}
