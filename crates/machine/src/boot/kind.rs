//! Tells images apart by their content, never by their name.

use super::{bzimage, elf, multiboot1};
use std::fmt;

/// The image formats that can be booted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ImageKind {
    /// Linux' bzImage.
    BzImage,
    /// ELF with a PVH note, such as `vmlinux`.
    Elf,
    /// Multiboot 1, inside an ELF file or with address fields.
    Multiboot1,
    /// A boot sector: 55AAh at offset 510, run in real mode at 7C00h.
    BootSector,
}

impl fmt::Display for ImageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BzImage => "the bzImage",
            Self::Elf => "the ELF kernel",
            Self::Multiboot1 => "the Multiboot kernel",
            Self::BootSector => "the boot sector",
        })
    }
}

impl ImageKind {
    /// What `image` looks like, if it looks like anything we boot. Says nothing about its being whole.
    pub fn of(image: &[u8]) -> Option<Self> {
        if bzimage::looks_like(image) {
            Some(Self::BzImage)
        } else if multiboot1::find_header(image).is_some() {
            Some(Self::Multiboot1)
        } else if elf::looks_like(image) {
            Some(Self::Elf)
        } else if image.get(510..512) == Some(&[0x55, 0xaa]) && !image.starts_with(b"MZ") {
            Some(Self::BootSector)
        } else {
            None
        }
    }
}
