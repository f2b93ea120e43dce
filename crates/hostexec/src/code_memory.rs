//! Executable memory: one memfd mapped twice, writable here and executable there, never both.

use crate::HostExecError;
use crate::executable::{Executable, LARGE_PAGE};
use memmap2::{Mmap, MmapOptions, MmapRaw, UncheckedAdvice};
use std::fs::File;
use std::ops::Range;

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

/// Bytes of code in a large page from which on it is worth one of the host's.
const ENLARGED_FROM: usize = LARGE_PAGE / 8;

/// Code memory: appended to, patched, and cut back when what it holds is no longer used. It can have a second part for
/// rarely executed code, so that what is executed often lies close together.
pub struct CodeMemory {
    writable: MmapRaw,
    executable: Executable,
    used: usize,
    /// By number: the large pages that have so much code that they are to be one of the host's.
    enlarged: Vec<bool>,
    /// Where the second part begins and what is in use of it ends.
    rare: Range<usize>,
    /// The writable view has been written to since [`rest`](Self::rest) was called.
    is_written: bool,
}

impl CodeMemory {
    /// Reserves `size` bytes; pages cost memory once used.
    ///
    /// # Errors
    /// What the host refuses.
    pub fn new(size: usize) -> Result<Self, HostExecError> {
        Self::in_parts(size, 0)
    }

    /// As [`new`](Self::new) with `rare` bytes more for rarely executed code.
    ///
    /// # Errors
    /// What the host refuses.
    pub fn in_parts(size: usize, rare: usize) -> Result<Self, HostExecError> {
        let begin = size;
        let size = size + rare;
        let fd =
            rustix::fs::memfd_create("umbra-stubs", rustix::fs::MemfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
        let file = File::from(fd);
        file.set_len(size as u64)?;
        let writable = MmapOptions::new().len(size).map_raw(&file)?;
        let executable = Executable::of(&file, size)?;
        Ok(Self {
            writable,
            executable,
            used: 0,
            enlarged: vec![false; size.div_ceil(LARGE_PAGE)],
            rare: begin..begin,
            is_written: false,
        })
    }

    /// Appends `code`; returns its address in the executable view. It isn't aligned: processors tell the ways to an indirect
    /// jump apart by the last bits of where jumps went, which would be alike.
    ///
    /// # Errors
    /// [`HostExecError::Full`].
    pub fn append(&mut self, code: &[u8]) -> Result<*const u8, HostExecError> {
        let start = self.next();
        if start + code.len() > self.rare.start {
            return Err(HostExecError::Full);
        }
        self.write(start, code);
        self.used = start + code.len();
        // SAFETY: within the mapping.
        Ok(unsafe { self.executable.as_ptr().add(start) })
    }

    /// Appends `code` to the part for rarely executed code.
    ///
    /// # Errors
    /// [`HostExecError::Full`].
    pub fn append_rare(&mut self, code: &[u8]) -> Result<(), HostExecError> {
        if code.len() > self.writable.len() - self.rare.end {
            return Err(HostExecError::Full);
        }
        self.write(self.rare.end, code);
        self.rare.end += code.len();
        Ok(())
    }

    /// `code` fits in there.
    fn write(&mut self, at: usize, code: &[u8]) {
        assert!(at + code.len() <= self.writable.len(), "code beyond the code memory");
        // SAFETY: it lies within the mapping, which no reference covers: `executable` is only ever used as a raw
        // pointer and for calls. x86 keeps instruction fetch coherent with these stores.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.as_mut_ptr().add(at), code.len());
        }
        self.is_written = true;
        let page = at / LARGE_PAGE;
        if at % LARGE_PAGE > ENLARGED_FROM && !std::mem::replace(&mut self.enlarged[page], true) {
            self.executable.enlarge(page);
        }
    }

    /// Replaces bytes from offset `at` on, all of them in use.
    ///
    /// # Errors
    /// [`HostExecError::Full`] beyond what is in use.
    pub fn patch(&mut self, at: usize, code: &[u8]) -> Result<(), HostExecError> {
        let limit = if at < self.rare.start { self.used } else { self.rare.end };
        if at.checked_add(code.len()).is_none_or(|end| end > limit) {
            return Err(HostExecError::Full);
        }
        self.write(at, code);
        Ok(())
    }

    /// To be called when the guest waits: pages of the writable view, which count as resident beside those of the executable
    /// one, are unmapped until something is written.
    pub fn rest(&mut self) {
        if std::mem::take(&mut self.is_written) {
            // SAFETY: the pages are a file's: what was written stays, there and in the executable view.
            // A host that refuses keeps them mapped.
            let _ = unsafe { self.writable.unchecked_advise(UncheckedAdvice::DontNeed) };
        }
    }

    /// Offset at which the next [`append`](Self::append) puts its code.
    pub fn next(&self) -> usize {
        self.used
    }

    /// Offset at which the next [`append_rare`](Self::append_rare) puts its code.
    pub fn next_rare(&self) -> usize {
        self.rare.end
    }

    /// Forgets everything from offset `used` on, and all rarely executed code.
    pub fn truncate(&mut self, used: usize) {
        self.used = self.used.min(used);
        self.rare.end = self.rare.start;
    }

    /// Bytes that can still be appended to the fuller part.
    pub fn room(&self) -> usize {
        (self.rare.start - self.used).min(self.writable.len() - self.rare.end)
    }

    /// Address of the first byte in the executable view.
    pub fn address(&self) -> u64 {
        self.executable.as_ptr() as u64
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used + self.rare.len()
    }
}

#[cfg(test)]
mod tests {
    use super::CodeMemory;

    #[test]
    fn code_stays_while_the_writable_view_rests() {
        let mut memory = CodeMemory::in_parts(1 << 16, 1 << 16).unwrap();
        let first = memory.append(&[0xb8, 1, 0, 0, 0, 0xc3]).unwrap(); // mov eax, 1; ret
        // SAFETY: a function of that signature is there, and stays.
        let call = || unsafe { std::mem::transmute::<*const u8, extern "C" fn() -> u32>(first)() };
        for value in [2, 3] {
            memory.rest();
            assert_eq!(call(), value - 1);
            memory.patch(1, &value.to_le_bytes()).unwrap();
            assert_eq!(call(), value);
        }
        memory.rest();
        memory.append_rare(&[0xc3]).unwrap();
        assert_eq!((memory.used(), call()), (7, 3));
    }
}
