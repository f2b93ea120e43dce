//! The engine `jit`: the translator, which translates everything that it runs.

use super::window::WindowError;
use super::{Blank, EAGER};
use crate::case::Case;
use crate::engine::{Answer, Engine, RomAnswer};
use crate::roms;
use umbra_arch::cpuid::CpuidProfile;
use umbra_cpu::EngineOptions;
use umbra_jit::Jit;
use umbra_test_roms::Rom;

/// The translator.
pub struct Translator {
    blank: Blank<Jit>,
    profile: CpuidProfile,
}

impl Translator {
    /// A translator of this CPU model.
    ///
    /// # Errors
    /// [`WindowError`].
    pub fn new(profile: &CpuidProfile) -> Result<Self, WindowError> {
        Ok(Self { blank: Blank::translating(profile)?, profile: profile.clone() })
    }
}

impl Engine for Translator {
    fn name(&self) -> &'static str {
        "jit"
    }

    fn run(&mut self, case: &Case) -> Answer {
        self.blank.run(case)
    }

    fn run_rom(&mut self, rom: &Rom) -> RomAnswer {
        let make = |memory| Jit::new(memory, &self.profile, 0, &EngineOptions::default(), EAGER);
        roms::report(rom, self.profile.clone(), make)
    }
}
