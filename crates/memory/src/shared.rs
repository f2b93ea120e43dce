//! Guest RAM that becomes a file without a name, piece by piece, so that its pages can be mapped a second time. All of it
//! isn't one from the start, as hosts give large pages to files less readily.
#![allow(unsafe_code, reason = "maps pages of RAM anew")]

use crate::RamOffset;
use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Bytes that become part of the file at once: the host's large pages.
const PIECE: u64 = 2 << 20;

/// The file, and where RAM is mapped.
pub(crate) struct Shared {
    file: File,
    base: usize,
    bytes: u64,
    /// By number: the pieces that are part of the file.
    done: Box<[AtomicBool]>,
}

impl Shared {
    /// For the `bytes` bytes of RAM from `base` on, a multiple of [`PIECE`].
    ///
    /// # Errors
    /// What the host refuses.
    pub(crate) fn new(base: *mut u8, bytes: u64) -> io::Result<Self> {
        let file = file_of(bytes)?;
        let done = (0..bytes.div_ceil(PIECE)).map(|_| AtomicBool::new(false)).collect();
        Ok(Self { file, base: base as usize, bytes, done })
    }

    /// The file, whose offsets are RAM's.
    pub(crate) fn file(&self) -> impl AsFd + '_ {
        &self.file
    }

    /// Makes these bytes of RAM part of the file. Nobody may write to them meanwhile.
    ///
    /// # Errors
    /// What the host refuses.
    pub(crate) fn share(&self, off: RamOffset, bytes: u64) -> io::Result<()> {
        let end = off.raw().checked_add(bytes).filter(|end| *end <= self.bytes && bytes > 0);
        let Some(end) = end else { return Err(io::ErrorKind::InvalidInput.into()) };
        for piece in off.raw() / PIECE..=(end - 1) / PIECE {
            if !self.done[piece as usize].load(Relaxed) {
                self.share_piece(piece * PIECE)?;
                self.done[piece as usize].store(true, Relaxed);
            }
        }
        Ok(())
    }

    #[cold]
    fn share_piece(&self, start: u64) -> io::Result<()> {
        let bytes = PIECE.min(self.bytes - start) as usize;
        let at = (self.base + start as usize) as *mut u8;
        // SAFETY: within RAM, which nobody writes to meanwhile.
        self.file.write_all_at(unsafe { std::slice::from_raw_parts(at, bytes) }, start)?;
        let (rights, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED);
        // SAFETY: replaces pages of RAM's mapping by others with the same bytes.
        unsafe { mmap(at.cast(), bytes, rights, flags, &self.file, start)? };
        // SAFETY: changes what the pages are made of, and no byte of them. A host that can't, refuses.
        unsafe { libc::madvise(at.cast(), bytes, libc::MADV_COLLAPSE) };
        Ok(())
    }
}

fn file_of(bytes: u64) -> io::Result<File> {
    let file = File::from(rustix::fs::memfd_create("umbra-ram", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.set_len(bytes)?;
    Ok(file)
}
