//! Pages of guest RAM, mapped a second time in whatever order: what is contiguous to the guest is then contiguous to the
//! host, whose MMU translates and checks.
#![allow(unsafe_code, reason = "maps pages at addresses of its own")]

use crate::RamOffset;
use crate::shared::Shared;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::io;
use std::sync::Arc;

/// Reserved addresses of the host, nothing of which can be accessed until pages of guest RAM are mapped there.
pub struct Window {
    start: *mut c_void,
    bytes: usize,
    ram: Arc<Shared>,
}

// SAFETY: it owns its range of addresses; nobody gets a reference to what is mapped there.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    /// Reserves `bytes` of addresses.
    pub(crate) fn new(ram: Arc<Shared>, bytes: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: new addresses, which nobody uses.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::empty(), flags)? };
        Ok(Self { start, bytes, ram })
    }

    /// Host address of its first byte.
    pub fn address(&self) -> u64 {
        self.start as u64
    }

    /// Bytes reserved.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn at(&self, at: usize, bytes: usize) -> io::Result<*mut c_void> {
        let fits = at.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        let aligned = at.is_multiple_of(4096) && bytes.is_multiple_of(4096);
        if fits && aligned { Ok(self.start.wrapping_byte_add(at)) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    /// Maps `bytes` of RAM from `off` on at offset `at`, all of them multiples of the page size; what was there isn't any
    /// more. Nobody else may write to RAM meanwhile.
    ///
    /// # Errors
    /// What the host refuses, too many pieces for instance; what is there then isn't known.
    pub fn map(&mut self, at: usize, off: RamOffset, bytes: usize, writable: bool) -> io::Result<()> {
        let to = self.at(at, bytes)?;
        self.ram.share(off, bytes as u64)?;
        let rights = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::POPULATE;
        // SAFETY: replaces pages of the range that this owns.
        unsafe { mmap(to, bytes, rights, flags, self.ram.file(), off.raw())? };
        Ok(())
    }

    /// Makes `bytes` from offset `at` on inaccessible again.
    ///
    /// # Errors
    /// What the host refuses; all may still be accessible then.
    pub fn unmap(&mut self, at: usize, bytes: usize) -> io::Result<()> {
        let to = self.at(at, bytes)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: replaces pages of the range that this owns.
        unsafe { mmap_anonymous(to, bytes, ProtFlags::empty(), flags)? };
        Ok(())
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the range is its own, and nobody accesses it any more.
        let _ = unsafe { munmap(self.start, self.bytes) };
    }
}
