//! The executable view of a file, on host pages of 2 MiB where the host has them.

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::fs::File;
use std::ptr::null_mut;

/// A large host page's size in bytes.
pub(crate) const LARGE_PAGE: usize = 2 << 20;

/// A file mapped executable at an address that large pages can begin at.
pub(crate) struct Executable {
    /// What is reserved of the address space around the view.
    reserved: (*mut c_void, usize),
    at: *mut u8,
    len: usize,
}

// SAFETY: it owns its mapping, and reads or writes nothing by it.
unsafe impl Send for Executable {}
// SAFETY: as above.
unsafe impl Sync for Executable {}

impl Executable {
    /// Maps `len` bytes of `file`.
    pub fn of(file: &File, len: usize) -> std::io::Result<Self> {
        let reserved = len + LARGE_PAGE;
        // SAFETY: a new mapping, at an address of the host's choice.
        let start = unsafe { mmap_anonymous(null_mut(), reserved, ProtFlags::empty(), MapFlags::PRIVATE)? };
        let at = start.map_addr(|address| address.next_multiple_of(LARGE_PAGE));
        let view = Self { reserved: (start, reserved), at: at.cast(), len };
        // SAFETY: it replaces a part of what has just been reserved.
        unsafe { mmap(at, len, ProtFlags::READ | ProtFlags::EXEC, MapFlags::SHARED | MapFlags::FIXED, file, 0)? };
        Ok(view)
    }

    /// Address of the first byte.
    pub fn as_ptr(&self) -> *const u8 {
        self.at
    }

    /// Has large page number `page` be one of the host's, too, if it can: generated code lies scattered, and
    /// translating the addresses of what is fetched from small pages takes as long as running it.
    pub fn enlarge(&self, page: usize) {
        let start = page * LARGE_PAGE;
        if start + LARGE_PAGE <= self.len {
            // SAFETY: it lies within the mapping, whose bytes stay as they are. A host that can't, refuses.
            unsafe { libc::madvise(self.at.add(start).cast(), LARGE_PAGE, libc::MADV_COLLAPSE) };
        }
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        let (start, len) = self.reserved;
        // SAFETY: the mapping is its own, and nobody runs what is in it any more.
        let unmapped = unsafe { munmap(start, len) };
        debug_assert!(unmapped.is_ok());
    }
}
