//! Guests assembled in Rust: the embedded guest and test ROMs that check themselves.
//!
//! Every ROM is a flat image that the machine loads at [`LOAD`] and that starts there in real mode
//! (the state is described at [`ENTRY`]). A ROM reports on COM1 in plain text, one line a section, ends
//! its report with a line that starts with `Result: `, and powers the machine off. A report never
//! depends on the host or on time.
#![forbid(unsafe_code)]

mod costs;
mod embedded;
mod exceptions;
mod link;
mod measure;
mod pages;
mod pc;
mod report;
mod scenarios;
mod segments;
mod stages;
mod strings;
mod syscalls;

pub use link::RomError;
pub use measure::{MEASUREMENT_PORT, Phase};

use umbra_arch::Gpa;

/// Where every ROM is loaded.
pub const LOAD: Gpa = Gpa::new(0x1_0000);
/// CS:IP of every ROM's first instruction: real mode, DS = ES = CS, a stack at 0000:7C00h, IF = 0, A20 on.
pub const ENTRY: (u16, u16) = (0x1000, 0);

/// A guest that checks itself.
#[derive(Clone, Copy, Debug)]
pub struct Rom {
    /// Name on the command line.
    pub name: &'static str,
    /// What it checks, in a line.
    pub about: &'static str,
    /// What the report's last line starts with when all is well.
    pub expect: &'static str,
    build: fn() -> Result<Vec<u8>, RomError>,
}

impl Rom {
    /// The bytes to load at [`LOAD`].
    ///
    /// # Errors
    /// None that a caller can cause: the ROM failed to assemble.
    pub fn image(&self) -> Result<Vec<u8>, RomError> {
        (self.build)()
    }

    /// Where to load the image.
    pub const fn load(&self) -> Gpa {
        LOAD
    }
}

/// Every ROM; the embedded guest is the first.
pub const ROMS: &[Rom] = &[
    embedded::ROM,
    costs::ROM,
    exceptions::ROM,
    pages::ROM,
    scenarios::ROM,
    segments::ROM,
    strings::ROM,
    syscalls::ROM,
];

/// The guest that runs when no other is named.
pub fn embedded_guest() -> &'static Rom {
    &ROMS[0]
}

/// The ROM of that name.
pub fn rom(name: &str) -> Option<&'static Rom> {
    ROMS.iter().find(|r| r.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_rom_assembles_alike_twice_and_has_its_own_name() {
        let names: BTreeSet<_> = ROMS.iter().map(|r| r.name).collect();
        assert_eq!(names.len(), ROMS.len());
        for r in ROMS {
            assert_eq!(r.image().expect(r.name), r.image().expect(r.name), "{}", r.name);
            assert!(r.expect.starts_with("Result: "), "{}", r.name);
        }
    }

    #[test]
    fn the_entry_is_the_load_address() {
        assert_eq!((u64::from(ENTRY.0) << 4) + u64::from(ENTRY.1), LOAD.raw());
    }
}
