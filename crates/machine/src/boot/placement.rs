//! Finds room in guest RAM for the pieces of a boot, and keeps them apart.

use super::BootError;
use crate::memory_map::{MemoryMap, RangeKind};
use std::borrow::Cow;
use umbra_arch::Gpa;

/// Bytes to be put into guest RAM before the first instruction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Piece<'a> {
    /// What it is, for messages.
    pub what: &'static str,
    /// Where it goes.
    pub gpa: Gpa,
    /// Its bytes.
    pub bytes: Cow<'a, [u8]>,
}

/// The ranges taken so far, and what was put there.
pub(super) struct Placement<'a, 'm> {
    map: &'m MemoryMap,
    taken: Vec<(u64, u64, &'static str)>,
    pieces: Vec<Piece<'a>>,
}

/// The real-mode interrupt table and BIOS data area stay free.
const LOWEST: u64 = 0x1000;

impl<'a, 'm> Placement<'a, 'm> {
    pub(super) fn new(map: &'m MemoryMap) -> Self {
        Self { map, taken: Vec::new(), pieces: Vec::new() }
    }

    /// Takes exactly `start..start + len`.
    pub(super) fn claim(&mut self, what: &'static str, start: u64, len: u64) -> Result<(), BootError> {
        let end = start.saturating_add(len);
        let refuse = |why: String| Err(BootError::DoesNotFit { what, start, end, why });
        if !self.map.is_usable(start, len) {
            return refuse(format!("isn't RAM of this guest (low RAM ends at {:#x})", self.map.low_ram_end()));
        }
        match self.taken.iter().find(|&&(from, to, _)| start < to && from < end) {
            Some(&(_, _, other)) => refuse(format!("holds {other}")),
            None => {
                if len != 0 {
                    self.taken.push((start, end, what));
                }
                Ok(())
            }
        }
    }

    /// The lowest free range of `len` bytes at a multiple of `align` in `low..high`; `what` takes it.
    pub(super) fn lowest(
        &mut self,
        what: &'static str,
        len: u64,
        align: u64,
        low: u64,
        high: u64,
    ) -> Result<u64, BootError> {
        let mut candidates = vec![low];
        candidates.extend(self.map.usable().map(|entry| entry.start));
        candidates.extend(self.taken.iter().map(|&(_, end, _)| end));
        candidates.sort_unstable();
        for candidate in candidates {
            let Some(start) = super::bytes::align_up(candidate.max(low).max(LOWEST), align) else { break };
            if start.checked_add(len).is_some_and(|end| end <= high) && self.claim(what, start, len).is_ok() {
                return Ok(start);
            }
        }
        Err(self.no_room(what, len))
    }

    /// The highest free range of `len` bytes at a multiple of `align` that ends at or below `high`.
    pub(super) fn highest(&mut self, what: &'static str, len: u64, align: u64, high: u64) -> Result<u64, BootError> {
        let mut ends = vec![high];
        ends.extend(self.map.usable().map(|entry| entry.end()));
        ends.extend(self.taken.iter().map(|&(start, _, _)| start));
        ends.sort_unstable_by(|a, b| b.cmp(a));
        for end in ends.into_iter().filter(|&end| end <= high) {
            let Some(start) = end.checked_sub(len) else { continue };
            let start = start & !(align - 1);
            if start >= LOWEST && self.claim(what, start, len).is_ok() {
                return Ok(start);
            }
        }
        Err(self.no_room(what, len))
    }

    fn no_room(&self, what: &'static str, needs: u64) -> BootError {
        BootError::NoRoom { what, needs, ram: self.map.ram_bytes() }
    }

    /// Puts bytes at a place already taken.
    pub(super) fn put(&mut self, what: &'static str, gpa: u64, bytes: impl Into<Cow<'a, [u8]>>) {
        self.pieces.push(Piece { what, gpa: Gpa::new(gpa), bytes: bytes.into() });
    }

    /// Puts bytes at the lowest free page of conventional memory.
    pub(super) fn put_low(&mut self, what: &'static str, bytes: Vec<u8>) -> Result<u64, BootError> {
        let high = crate::memory_map::CONVENTIONAL_END;
        let gpa = self.lowest(what, bytes.len() as u64, umbra_arch::PAGE_SIZE, 0, high)?;
        self.put(what, gpa, bytes);
        Ok(gpa)
    }

    /// The map as E820h entries: address, length, kind.
    pub(super) fn e820(&self) -> impl Iterator<Item = (u64, u64, RangeKind)> {
        self.map.entries().iter().map(|entry| (entry.start, entry.len, entry.kind))
    }

    pub(super) fn into_pieces(self) -> Vec<Piece<'a>> {
        self.pieces
    }
}
