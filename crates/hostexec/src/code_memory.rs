//! Executable memory: one memfd mapped twice, writable here and executable there, never both.

use crate::HostExecError;
use memmap2::{Mmap, MmapOptions, MmapRaw};
use std::fs::File;

/// A file's first page mapped executable, which is how profilers find a file that tells of generated code.
pub struct ProfilerMark(#[allow(dead_code, reason = "kept for its mapping")] Mmap);

impl ProfilerMark {
    /// Maps it.
    ///
    /// # Errors
    /// What the host refuses.
    pub fn of(file: &File) -> std::io::Result<Self> {
        // SAFETY: nobody reads or runs the mapping, whatever becomes of the file.
        unsafe { MmapOptions::new().len(4096).map_exec(file) }.map(Self)
    }
}

/// Code memory: appended to, patched, and cut back when what it holds is no longer used.
pub struct CodeMemory {
    writable: MmapRaw,
    executable: Mmap,
    used: usize,
}

impl CodeMemory {
    /// Reserves `size` bytes; pages cost memory once used.
    ///
    /// # Errors
    /// What the host refuses.
    pub fn new(size: usize) -> Result<Self, HostExecError> {
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
    ///
    /// # Errors
    /// [`HostExecError::Full`].
    pub fn append(&mut self, code: &[u8]) -> Result<*const u8, HostExecError> {
        let start = self.next();
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

    /// Replaces bytes from offset `at` on, all of them in use.
    ///
    /// # Errors
    /// [`HostExecError::Full`] beyond what is in use.
    pub fn patch(&mut self, at: usize, code: &[u8]) -> Result<(), HostExecError> {
        if at.checked_add(code.len()).is_none_or(|end| end > self.used) {
            return Err(HostExecError::Full);
        }
        // SAFETY: the range lies within the mapping, as in `append`.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.as_mut_ptr().add(at), code.len());
        }
        Ok(())
    }

    /// Offset at which the next [`append`](Self::append) puts its code.
    pub fn next(&self) -> usize {
        self.used.next_multiple_of(32)
    }

    /// Forgets everything from offset `used` on.
    pub fn truncate(&mut self, used: usize) {
        self.used = self.used.min(used);
    }

    /// Address of the first byte in the executable view.
    pub fn address(&self) -> u64 {
        self.executable.as_ptr() as u64
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used
    }
}
