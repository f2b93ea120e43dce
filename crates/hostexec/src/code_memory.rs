//! Executable memory: one memfd mapped twice, writable here and executable there, never both.

use crate::HostExecError;
use memmap2::{Mmap, MmapOptions, MmapRaw};
use std::fs::File;

/// Append-only code memory.
pub(crate) struct CodeMemory {
    writable: MmapRaw,
    executable: Mmap,
    used: usize,
}

impl CodeMemory {
    /// Reserves `size` bytes; pages cost memory once used.
    pub(crate) fn new(size: usize) -> Result<Self, HostExecError> {
        let fd =
            rustix::fs::memfd_create("umbra-stubs", rustix::fs::MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
        let file = File::from(fd);
        file.set_len(size as u64)?;
        let writable = MmapOptions::new().len(size).map_raw(&file)?;
        // SAFETY: the file is anonymous, and only this object, through `writable`, changes it.
        let executable = unsafe { MmapOptions::new().len(size).map_exec(&file)? };
        Ok(Self { writable, executable, used: 0 })
    }

    /// Appends `code` at a 32-byte boundary; returns its address in the executable view.
    pub(crate) fn append(&mut self, code: &[u8]) -> Result<*const u8, HostExecError> {
        let start = self.used.next_multiple_of(32);
        let end = start + code.len();
        if end > self.writable.len() {
            return Err(HostExecError::Full);
        }
        // SAFETY: start..end lies within the mapping, which no reference covers: `executable` is only ever
        // used as a raw pointer and for calls. x86 keeps instruction fetch coherent with these stores.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.as_mut_ptr().add(start), code.len());
        }
        self.used = end;
        // SAFETY: as above, within the mapping.
        Ok(unsafe { self.executable.as_ptr().add(start) })
    }

    /// Bytes in use.
    pub(crate) fn used(&self) -> usize {
        self.used
    }
}
