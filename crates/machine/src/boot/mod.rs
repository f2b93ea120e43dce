//! Boot protocols: from a hostile file to bytes in RAM and a CPU state.
//!
//! Each protocol is a pure function from a [`BootRequest`] to a [`BootPlan`]; nothing here touches a
//! machine, so every refusal happens before anything ran. All header fields are untrusted.

pub(crate) mod bios;
mod bytes;
mod bzimage;
mod elf;
mod entry_state;
mod error;
mod kind;
mod multiboot1;
mod placement;
mod reset;

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod synthetic;

pub use error::{BootError, Concern};
pub use kind::ImageKind;
pub use placement::Piece;
pub use reset::{BOOT_SECTOR_AT, reset_plan};

use crate::memory_map::MemoryMap;
use umbra_arch::{CpuState, Gpa};

/// What the user wants to boot.
#[derive(Clone, Copy, Debug)]
pub struct BootRequest<'a> {
    /// The kernel file.
    pub kernel: &'a [u8],
    /// The initial RAM disk (a module for Multiboot and PVH).
    pub initrd: Option<&'a [u8]>,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// The guest's memory.
    pub map: &'a MemoryMap,
    /// Where the ACPI tables' root pointer lies.
    pub rsdp: Gpa,
}

/// What to do to a machine to boot it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BootPlan<'a> {
    /// The protocol that was found; `None` for the reset vector.
    pub kind: Option<ImageKind>,
    /// What to write into RAM. Pieces don't overlap.
    pub pieces: Vec<Piece<'a>>,
    /// The first CPU's state.
    pub state: Box<CpuState>,
}

/// Recognises the kernel by its content and plans its boot.
///
/// # Errors
/// [`BootError`] says what is wrong with the image or what doesn't fit.
pub fn plan<'a>(request: &BootRequest<'a>) -> Result<BootPlan<'a>, BootError> {
    if request.kernel.is_empty() {
        return Err(BootError::Empty);
    }
    if request.command_line.contains('\0') {
        return Err(BootError::CommandLineHasNul);
    }
    match ImageKind::of(request.kernel) {
        Some(ImageKind::BzImage) => bzimage::plan(request),
        Some(ImageKind::Elf) => elf::plan(request),
        Some(ImageKind::Multiboot1) => multiboot1::plan(request),
        Some(ImageKind::BootSector) => reset::boot_sector_plan(request),
        None => Err(unrecognised(request.kernel)),
    }
}

/// A DOS or EFI header without a Linux one is most often a cut or foreign kernel: say so.
fn unrecognised(image: &[u8]) -> BootError {
    let truncated_at =
        |needs| BootError::Truncated { kind: ImageKind::BzImage, what: "setup header", needs, has: image.len() as u64 };
    match image {
        [b'M', b'Z', ..] if image.get(0x38..0x3c) == Some(b"ARM\x64") => {
            BootError::WrongArchitecture { machine: "aarch64 (a Linux Image file)".into() }
        }
        [b'M', b'Z', ..] if image.get(0x38..0x3c) == Some(b"RSC\x05") => {
            BootError::WrongArchitecture { machine: "riscv (a Linux Image file)".into() }
        }
        [b'M', b'Z', ..] if image.len() < 0x268 => truncated_at(0x268),
        _ => BootError::Unrecognised,
    }
}
