//! The embedded guest: one CPU through all its modes, and the switches between them many times over.
//!
//! It starts in real mode, goes through protected mode without paging, with 2-level and PAE paging to
//! long mode, measures there what a shadow MMU should make cheap, and walks back to real mode.

mod long;
pub(crate) mod protected;
pub(crate) mod real;
pub(crate) mod switches;
pub(crate) mod tables;

use crate::link::{Linker, RomError, link};
use crate::{Rom, report};

/// Name and expectation.
pub const ROM: Rom = Rom {
    name: "embedded",
    about: "all modes, and the switches of control registers many times over",
    expect: "Result: PASS",
    build,
};

type Done = Result<(), RomError>;

fn build() -> Result<Vec<u8>, RomError> {
    link(|l: &mut Linker| {
        l.code(16, real::start)?;
        l.code(32, protected::all)?;
        l.code(64, long::all)?;
        l.code(64, switches::trip_return)?;
        l.code(32, switches::trips32)?;
        l.code(32, protected::back)?;
        l.code(16, real::back)?;
        far_pointers(l)?;
        l.data("idtr.real", &[0xff, 3, 0, 0, 0, 0])?;
        report::runtime(l)
    })
}

/// Offset and selector of each change of code width that an indirect far jump makes.
fn far_pointers(l: &mut Linker) -> Done {
    use crate::pc::selector::CODE32;
    for name in ["protected", "trip pae", "trip 2-level", "leave long mode"] {
        let mut bytes = l.address(name).to_le_bytes().to_vec();
        bytes.extend_from_slice(&CODE32.to_le_bytes());
        l.data(&format!("far {name}"), &bytes)?;
    }
    Ok(())
}
