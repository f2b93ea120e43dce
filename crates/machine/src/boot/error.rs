//! Why an image can't be booted, and what to do about it.

use crate::boot::kind::ImageKind;

/// A kernel or initrd that can't be booted. Nothing has run when this is returned.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BootError {
    /// No bytes at all.
    #[error("the kernel is empty: give a bzImage, an ELF vmlinux, a Multiboot kernel or a boot sector")]
    Empty,
    /// None of the formats we know.
    #[error(
        "not a kernel we can boot: it is neither a bzImage, an ELF file with a PVH entry, a Multiboot kernel nor a boot sector"
    )]
    Unrecognised,
    /// The file ends before what its headers promise.
    #[error("{kind} is truncated: its {what} needs {needs} bytes and the file has {has}; copy the file again")]
    Truncated {
        /// What the file was taken for.
        kind: ImageKind,
        /// The part that is cut.
        what: &'static str,
        /// File length that the headers demand.
        needs: u64,
        /// The file's length.
        has: u64,
    },
    /// A machine other than x86.
    #[error("the kernel is built for {machine}: Umbra runs x86-64 and i386 guests")]
    WrongArchitecture {
        /// The architecture's name, or its number in words.
        machine: String,
    },
    /// A Linux image that has only a 32-bit or real-mode entry.
    #[error("this bzImage has no entry that can be used ({why}): give a bzImage of Linux 2.6.31 or later")]
    NoEntry {
        /// Which header field says so.
        why: String,
    },
    /// An ELF file without the note that tells where to enter it.
    #[error(
        "this ELF file has no PVH entry note (XEN_ELFNOTE_PHYS32_ENTRY) and no Multiboot header: build Linux with CONFIG_PVH=y, or give the bzImage"
    )]
    NoPvhNote,
    /// A header field has a value that makes no sense.
    #[error("{kind} is damaged: {what} is {value:#x}")]
    BadField {
        /// What the file was taken for.
        kind: ImageKind,
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The image demands something of the loader that this one doesn't do.
    #[error("{kind} demands a boot loader feature that Umbra lacks: {what}")]
    Unsupported {
        /// What the file was taken for.
        kind: ImageKind,
        /// The feature.
        what: String,
    },
    /// A fixed address isn't RAM, or something already lies there.
    #[error("{what} has to lie at {start:#x}..{end:#x}, which {why}: give the guest more memory with -m")]
    DoesNotFit {
        /// What has no room.
        what: &'static str,
        /// First byte.
        start: u64,
        /// First byte after it.
        end: u64,
        /// What is there instead.
        why: String,
    },
    /// No free range is large enough.
    #[error(
        "{what} needs {needs} bytes, more than any free range of the guest's {ram} bytes of RAM: enlarge it with -m"
    )]
    NoRoom {
        /// What has no room.
        what: &'static str,
        /// Its size.
        needs: u64,
        /// The guest's RAM.
        ram: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("the kernel command line has {len} bytes and this kernel takes {max}: shorten --append")]
    CommandLineTooLong {
        /// Its length.
        len: usize,
        /// What the kernel's header allows.
        max: u64,
    },
    /// A NUL byte would end the command line early.
    #[error("the kernel command line holds a NUL byte: remove it from --append")]
    CommandLineHasNul,
    /// An initrd was given to something that can't take one.
    #[error("{kind} takes no initrd: leave --initrd away")]
    NoInitrdSupport {
        /// What the file was taken for.
        kind: ImageKind,
    },
    /// A command line was given to something that can't take one.
    #[error("{kind} takes no command line: leave --append away")]
    NoCommandLineSupport {
        /// What the file was taken for.
        kind: ImageKind,
    },
}

/// What the user gave that an error is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Concern {
    /// The kernel file.
    Kernel,
    /// The initrd file.
    Initrd,
    /// The command line.
    CommandLine,
}

impl BootError {
    /// Which of the user's inputs has to change.
    pub fn concern(&self) -> Concern {
        match self {
            Self::NoRoom { what: "the initrd", .. } | Self::NoInitrdSupport { .. } => Concern::Initrd,
            Self::CommandLineTooLong { .. } | Self::CommandLineHasNul | Self::NoCommandLineSupport { .. } => {
                Concern::CommandLine
            }
            _ => Concern::Kernel,
        }
    }
}
