//! A rig's accesses judged by the manual's predictor, which works on a copy of memory.

use crate::manual::{self, Attempt, Kind, Machine, Memory, Verdict};
use crate::support::Rig;
use umbra_arch::paging::{Access, AccessKind};
use umbra_arch::{Gpa, Gva};
use umbra_memory::PageFlags;

/// Bytes of the rig's RAM; the video hole is absent, as is everything above.
const RAM: usize = 8 << 20;

/// RAM, in the predictor's own hands.
pub struct Image(Vec<u8>);

impl Image {
    pub fn new() -> Self {
        Self(vec![0; RAM])
    }

    fn at(gpa: u64, bytes: usize) -> Option<usize> {
        let absent = (0xa_0000..0xc_0000).contains(&gpa) || gpa as usize + bytes > RAM;
        (!absent).then_some(gpa as usize)
    }

    pub fn write(&mut self, gpa: u64, bytes: &[u8]) {
        if let Some(at) = Self::at(gpa, bytes.len()) {
            self.0[at..at + bytes.len()].copy_from_slice(bytes);
        }
    }

    pub fn bytes(&self, gpa: u64, bytes: usize) -> &[u8] {
        &self.0[gpa as usize..gpa as usize + bytes]
    }
}

impl Memory for Image {
    fn entry(&self, gpa: u64, bytes: u64) -> u64 {
        let mut raw = [0; 8];
        match Self::at(gpa, bytes as usize) {
            Some(at) => raw[..bytes as usize].copy_from_slice(&self.0[at..at + bytes as usize]),
            None => raw[..bytes as usize].fill(0xff),
        }
        u64::from_le_bytes(raw)
    }
}

fn access_of(attempt: Attempt) -> Access {
    let kind = match attempt.kind {
        Kind::Read => AccessKind::Read,
        Kind::Write => AccessKind::Write,
        Kind::Fetch => AccessKind::Fetch,
    };
    Access { kind, user: attempt.user, implicit: attempt.implicit }
}

/// What a processor would do next to memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Store {
    /// A device, or the host.
    Device,
    /// The processor whose MMU this is.
    Own,
}

/// Stores to physical memory and to the copy.
pub fn store(rig: &mut Rig, copy: &mut Image, gpa: u64, bytes: &[u8], by: Store) {
    copy.write(gpa, bytes);
    if by == Store::Device {
        return rig.poke_bytes(gpa, bytes);
    }
    let Some(off) = rig.mem.map(Gpa::new(gpa).page()).at(gpa & 0xfff).readable() else { return };
    rig.mem.store_bytes(off, bytes);
    rig.mem.note_store(off, bytes.len() as u64);
    rig.mmu.watcher().stored(Gpa::new(gpa), off, bytes.len() as u32);
    if rig.mem.page_flags(off).contains(PageFlags::WATCHED) {
        rig.mmu.table_written(Gpa::new(gpa), bytes.len() as u32);
    }
}

/// One access by fast path, else by slow path: outcome, error code, CR2 and the accessed and dirty flags of all entries
/// on its way are what the manual says of `machine`. The rig's view is the attempt's already.
pub fn access(rig: &mut Rig, machine: &Machine, copy: &mut Image, linear: u64, attempt: Attempt) -> Verdict {
    let verdict = manual::access(machine, copy, linear, attempt);
    let changes = verdict.used().iter().any(|used| copy.entry(used.gpa, used.bytes) != used.value);
    let fast = fast(rig, linear, attempt);
    match (fast, verdict.outcome) {
        (Some(off), Ok(gpa)) if !changes => {
            let expected = rig.mem.map(Gpa::new(gpa).page()).at(gpa & 0xfff).readable();
            assert_eq!(expected.map(|off| off.raw()), Some(off), "{}", say(machine, linear, attempt, &verdict));
        }
        (Some(_), _) => panic!("a fast hit: {}", say(machine, linear, attempt, &verdict)),
        (None, expected) => {
            let got = rig.mmu.translate(Gva::new(linear), access_of(attempt)).map(|t| t.gpa.raw());
            let got = got.map_err(|fault| (fault.mnemonic(), fault.address, fault.code));
            let expected = expected.map_err(|code| ("#PF", linear, Some(code)));
            assert_eq!(got, expected, "{}", say(machine, linear, attempt, &verdict));
        }
    }
    for used in verdict.used() {
        copy.write(used.gpa, &used.value.to_le_bytes()[..used.bytes as usize]);
        let mut now = [0; 8];
        match rig.mem.map(Gpa::new(used.gpa).page()).at(used.gpa & 0xfff).readable() {
            Some(off) if used.bytes == 8 => now = rig.mem.load::<u64>(off).to_le_bytes(),
            Some(off) => now[..4].copy_from_slice(&rig.mem.load::<u32>(off).to_le_bytes()),
            None => continue,
        }
        assert_eq!(u64::from_le_bytes(now), used.value, "entry {used:x?}: {}", say(machine, linear, attempt, &verdict));
    }
    verdict
}

fn fast(rig: &Rig, linear: u64, attempt: Attempt) -> Option<u64> {
    if attempt.implicit {
        return None;
    }
    let gva = Gva::new(linear);
    let off = match attempt.kind {
        Kind::Read => rig.mmu.lookup_read(gva, 1),
        Kind::Write => rig.mmu.lookup_write(gva, 1).or_else(|| rig.mmu.lookup_reported_write(gva, 1)),
        Kind::Fetch => rig.mmu.lookup_fetch(gva),
    };
    off.map(|off| off.raw())
}

fn say(machine: &Machine, linear: u64, attempt: Attempt, verdict: &Verdict) -> String {
    format!("{attempt:?} at {linear:#x} in {:?}, {machine:x?}, expected {verdict:x?}", machine.form())
}

/// The pages of `range` are the same in memory and in the copy.
pub fn same_memory(rig: &Rig, copy: &Image, start: u64, bytes: usize) {
    let mut now = vec![0; bytes];
    rig.mem.read(Gpa::new(start), &mut now);
    if now != copy.bytes(start, bytes) {
        let at = (0..bytes).find(|&i| now[i] != copy.bytes(start, bytes)[i]).unwrap_or(0);
        panic!("memory at {:#x} differs from its copy", start + at as u64);
    }
}
