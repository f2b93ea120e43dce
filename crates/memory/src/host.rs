//! The host mapping: the only place with pointers into guest memory.
#![allow(unsafe_code, reason = "raw access to the mapping, each after its bounds check")]

#[cfg(target_os = "linux")]
use crate::shared::Shared;
use crate::{MemoryError, RamOffset, Scalar};
use memmap2::MmapMut;
use std::hint::cold_path;
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::SeqCst};
#[cfg(target_os = "linux")]
use std::sync::{Arc, OnceLock};

/// Bytes past the last usable one, so that one comparison covers every width.
const SLACK: u64 = 4096;

/// Where a host's huge pages begin: so that one of the guest's 2 MiB is one of the host's, and few of them reach
/// beyond what the guest uses.
const HUGE_PAGE: u64 = 2 << 20;

/// An anonymous private mapping that is accessed by offset.
pub(crate) struct HostMapping {
    base: *mut u8,
    /// Usable bytes.
    bytes: u64,
    /// Once pages were asked for a second time.
    #[cfg(target_os = "linux")]
    shared: OnceLock<Option<Arc<Shared>>>,
    _map: MmapMut,
}

// SAFETY: the mapping lives as long as this value and never moves; all accesses are bounds-checked and hand out values,
// never references.
unsafe impl Send for HostMapping {}
// SAFETY: as above. Guest data races read some mixture of the stored bytes, as on hardware.
unsafe impl Sync for HostMapping {}

#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Unaligned<T>(T);

impl HostMapping {
    pub(crate) fn new(bytes: u64) -> Result<Self, MemoryError> {
        let refused = |source| MemoryError::Map { bytes, source };
        let length = bytes
            .checked_add(SLACK + HUGE_PAGE)
            .and_then(|n| usize::try_from(n).ok())
            .ok_or_else(|| refused(std::io::ErrorKind::OutOfMemory.into()))?;
        let mut map = memmap2::MmapOptions::new().len(length).no_reserve_swap().map_anon().map_err(refused)?;
        #[cfg(target_os = "linux")]
        // Only a hint: a host without transparent huge pages is merely slower.
        let _ = map.advise(memmap2::Advice::HugePage);
        let start = map.as_mut_ptr();
        let base = start.wrapping_add(start.align_offset(HUGE_PAGE as usize));
        Ok(Self {
            base,
            bytes,
            #[cfg(target_os = "linux")]
            shared: OnceLock::new(),
            _map: map,
        })
    }

    /// The mapping as one whose pages can be mapped elsewhere, too; `None` where the host can't.
    #[cfg(target_os = "linux")]
    pub(crate) fn shared(&self) -> Option<Arc<Shared>> {
        self.shared.get_or_init(|| Shared::new(self.base, self.bytes).ok().map(Arc::new)).clone()
    }

    /// Usable bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Host address of the first byte.
    pub(crate) fn address(&self) -> u64 {
        self.base as u64
    }

    #[inline(always)]
    fn pointer(&self, off: RamOffset) -> Option<*mut u8> {
        if off.raw() < self.bytes {
            // SAFETY: below `bytes`, and the mapping goes on for SLACK bytes behind that.
            Some(unsafe { self.base.add(off.raw() as usize) })
        } else {
            None
        }
    }

    #[inline(always)]
    pub(crate) fn load<T: Scalar>(&self, off: RamOffset) -> T {
        match self.pointer(off) {
            // SAFETY: SLACK covers a scalar's bytes beyond the checked first one; packed needs no alignment.
            Some(p) => unsafe { ptr::read_volatile(p.cast::<Unaligned<T>>()).0 },
            // No call: each user would have to save what it needs afterwards.
            None => {
                cold_path();
                T::default()
            }
        }
    }

    #[inline(always)]
    pub(crate) fn store<T: Scalar>(&self, off: RamOffset, value: T) {
        match self.pointer(off) {
            // SAFETY: SLACK covers a scalar's bytes beyond the checked first one. (A volatile write would have to be of a
            // packed struct, which is put together on the host's stack first.)
            Some(p) => unsafe { ptr::write_unaligned(p.cast::<T>(), value) },
            None => cold_path(),
        }
    }

    #[inline(always)]
    fn range(&self, off: RamOffset, len: usize) -> Option<*mut u8> {
        let end = off.raw().checked_add(len as u64)?;
        if end <= self.bytes { self.pointer(off) } else { None }
    }

    /// Loads words one after the other.
    #[inline(always)]
    pub(crate) fn load_words<T: Scalar, const N: usize>(&self, off: RamOffset) -> [T; N] {
        const { assert!(size_of::<[T; N]>() as u64 <= SLACK) }
        match self.pointer(off) {
            // SAFETY: SLACK covers the bytes beyond the checked first one; packed needs no alignment.
            Some(p) => std::array::from_fn(|n| unsafe { ptr::read_volatile(p.cast::<Unaligned<T>>().add(n)).0 }),
            None => [T::default(); N],
        }
    }

    /// Stores words one after the other.
    #[inline(always)]
    pub(crate) fn store_words<T: Scalar, const N: usize>(&self, off: RamOffset, words: &[T; N]) {
        const { assert!(size_of::<[T; N]>() as u64 <= SLACK) }
        if let Some(p) = self.pointer(off) {
            // SAFETY: SLACK covers the bytes beyond the checked first one; `words` is the caller's own memory, and packed needs
            // no alignment.
            unsafe { ptr::copy_nonoverlapping(words.as_ptr().cast(), p, size_of_val(words)) }
        }
    }

    pub(crate) fn load_bytes(&self, off: RamOffset, into: &mut [u8]) {
        match self.range(off, into.len()) {
            // SAFETY: the whole range was checked; `into` is the caller's own memory.
            Some(p) => unsafe { ptr::copy_nonoverlapping(p, into.as_mut_ptr(), into.len()) },
            None => into.fill(0),
        }
    }

    pub(crate) fn store_bytes(&self, off: RamOffset, from: &[u8]) {
        if let Some(p) = self.range(off, from.len()) {
            // SAFETY: the whole range was checked; `from` is the caller's own memory.
            unsafe { ptr::copy_nonoverlapping(from.as_ptr(), p, from.len()) }
        }
    }

    pub(crate) fn compare_exchange<T: Scalar>(&self, off: RamOffset, current: T, new: T) -> Result<T, T> {
        let size = size_of::<T>();
        if off.raw().is_multiple_of(size as u64)
            && let Some(p) = self.pointer(off)
            && let Some(result) = exchange_aligned(p, current, new)
        {
            return result;
        }
        let seen: T = self.load(off);
        if seen == current {
            self.store(off, new);
            Ok(seen)
        } else {
            Err(seen)
        }
    }
}

/// Reinterprets a scalar as the integer of the same width that it is.
fn same<T: Scalar, U: Scalar>(value: T) -> U {
    assert!(size_of::<T>() == size_of::<U>());
    // SAFETY: equal sizes, and every bit pattern is a value of either sealed integer type.
    unsafe { std::mem::transmute_copy::<T, U>(&value) }
}

/// A locked exchange at a naturally aligned pointer; `None` where the host has none of this width.
fn exchange_aligned<T: Scalar>(p: *mut u8, current: T, new: T) -> Option<Result<T, T>> {
    macro_rules! exchange {
        ($atomic:ty, $int:ty) => {{
            // SAFETY: in bounds and aligned (both checked by the caller), alive as long as the mapping.
            let cell = unsafe { <$atomic>::from_ptr(p.cast()) };
            cell.compare_exchange(same::<T, $int>(current), same::<T, $int>(new), SeqCst, SeqCst)
                .map(same::<$int, T>)
                .map_err(same::<$int, T>)
        }};
    }
    Some(match size_of::<T>() {
        1 => exchange!(AtomicU8, u8),
        2 => exchange!(AtomicU16, u16),
        4 => exchange!(AtomicU32, u32),
        8 => exchange!(AtomicU64, u64),
        _ => {
            return exchange_wide(p, same(current), same(new)).map(|r| r.map(same::<u128, T>).map_err(same::<u128, T>));
        }
    })
}

#[cfg(target_arch = "x86_64")]
fn exchange_wide(p: *mut u8, current: u128, new: u128) -> Option<Result<u128, u128>> {
    if !std::is_x86_feature_detected!("cmpxchg16b") {
        return None;
    }
    // SAFETY: the feature was just detected; 16-byte aligned and in bounds by the caller's checks.
    let seen = unsafe { exchange_16(p.cast(), current, new) };
    Some(if seen == current { Ok(seen) } else { Err(seen) })
}

/// The value found; `new` was stored if it is `current`. Not core's function of the same name: in
/// builds with little optimisation that one becomes a call into a library that isn't linked.
///
/// # Safety
/// `p` is valid for reads and writes, and aligned to 16 bytes; the host has CMPXCHG16B.
#[cfg(target_arch = "x86_64")]
unsafe fn exchange_16(p: *mut u128, current: u128, new: u128) -> u128 {
    let (mut low, mut high) = (current as u64, (current >> 64) as u64);
    // SAFETY: the caller's promise. RBX cannot be an operand, so it is saved in RSI meanwhile.
    unsafe {
        core::arch::asm!(
            "xchg rsi, rbx",
            "lock cmpxchg16b [rdi]",
            "mov rbx, rsi",
            inout("rsi") new as u64 => _,
            in("rcx") (new >> 64) as u64,
            in("rdi") p,
            inout("rax") low,
            inout("rdx") high,
            options(nostack),
        );
    }
    u128::from(low) | u128::from(high) << 64
}

#[cfg(not(target_arch = "x86_64"))]
fn exchange_wide(_: *mut u8, _: u128, _: u128) -> Option<Result<u128, u128>> {
    None
}
