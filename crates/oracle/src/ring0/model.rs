//! The engine `model`: predicts the cases of [`shapes`](super::shapes) from the manual's words, a second time.
//!
//! It knows the fault, the tables' accessed and dirty bits and the data, not the registers.

use super::step::{Access, WRITTEN};
use super::{CODE, Paging, shapes};
use crate::case::{Case, Layout, Piece, RAM};
use crate::engine::{Answer, End, Engine, Outcome};
use std::collections::BTreeMap;
use std::sync::LazyLock;
use umbra_arch::{CpuState, rflags};

/// The predictor.
#[derive(Default)]
pub struct Model;

impl Engine for Model {
    fn name(&self) -> &'static str {
        "model"
    }

    fn run(&mut self, case: &Case) -> Answer {
        let s = &case.state;
        let Layout::Ring0(paging) = case.layout else {
            return Answer::cannot("the model predicts ring-0 cases only");
        };
        let starts = s.rip == CODE && s.cr0.pg();
        let Some((kind, gva)) = starts.then(|| shapes::accessed(case, paging)).flatten() else {
            return Answer::cannot("the model predicts single accesses only");
        };
        let mut world = World::of(case, paging);
        let fault = world.perform(s, paging, kind, gva);
        if let Some(code) = fault {
            world.put(shapes::FAULT.start, 14, 4);
            world.put(shapes::FAULT.start + 4, code.into(), 4);
            world.put(shapes::FAULT.start + 8, gva, if paging.is_long() { 8 } else { 4 });
        }
        let mut memory: Vec<Piece> = case.watch.iter().map(|range| world.piece(range)).collect();
        // A read logs what it found; ring 3 comes back with an exception of its own.
        let own_log = matches!(kind, Access::Read | Access::UserRead | Access::UserWrite | Access::UserFetch);
        if fault.is_none() && own_log {
            memory.retain(|piece| piece.gpa != shapes::FAULT.start);
        }
        Answer::Outcome(Outcome { end: End::Halted, state: None, memory })
    }
}

/// Memory: the layout's, and what is written over it.
struct World {
    layout: &'static [u8],
    own: BTreeMap<u64, u8>,
}

/// The memory of a layout from address 0 on.
fn flat(paging: Paging) -> &'static [u8] {
    static ALL: LazyLock<[Vec<u8>; 3]> = LazyLock::new(|| {
        Paging::ALL.map(|paging| {
            let mut bytes = vec![0; RAM as usize];
            for piece in Layout::Ring0(paging).pieces() {
                bytes[piece.gpa as usize..][..piece.bytes.len()].copy_from_slice(&piece.bytes);
            }
            bytes
        })
    });
    &ALL[paging as usize]
}

/// What an access asks for.
struct Request {
    write: bool,
    fetch: bool,
    user: bool,
    implicit: bool,
}

impl World {
    fn of(case: &Case, paging: Paging) -> Self {
        let mut own = BTreeMap::new();
        for (gpa, bytes) in case.pieces() {
            own.extend((gpa..).zip(bytes.iter().copied()));
        }
        Self { layout: flat(paging), own }
    }

    fn byte(&self, gpa: u64) -> u8 {
        let layout = || self.layout.get(gpa as usize).copied().unwrap_or(0);
        self.own.get(&gpa).copied().unwrap_or_else(layout)
    }

    fn get(&self, gpa: u64, bytes: u64) -> u64 {
        (0..bytes).rev().fold(0, |value, n| value << 8 | u64::from(self.byte(gpa + n)))
    }

    fn put(&mut self, gpa: u64, value: u64, bytes: u64) {
        self.own.extend((gpa..gpa + bytes).zip(value.to_le_bytes()));
    }

    fn piece(&self, range: &std::ops::Range<u64>) -> Piece {
        let layout = self.layout.get(range.start as usize..range.end as usize);
        let mut bytes = layout.map(<[u8]>::to_vec).unwrap_or_default();
        for (gpa, byte) in self.own.range(range.clone()) {
            if let Some(to) = bytes.get_mut((gpa - range.start) as usize) {
                *to = *byte;
            }
        }
        Piece { gpa: range.start, bytes }
    }

    /// The access with its effects on data; the error code if it faults.
    fn perform(&mut self, s: &CpuState, paging: Paging, kind: Access, gva: u64) -> Option<u32> {
        use Access::*;
        let request = Request {
            write: matches!(kind, Write | Modify | UserWrite),
            fetch: matches!(kind, Fetch | UserFetch),
            user: matches!(kind, UserRead | UserWrite | UserFetch),
            implicit: matches!(kind, Descriptor | FreshDescriptor),
        };
        let gpa = match self.walk(s, paging, &request, gva) {
            Ok(gpa) => gpa,
            Err(code) => return Some(code),
        };
        match kind {
            Write => self.put(gpa, WRITTEN.into(), 4),
            // RCX is 0 at the start.
            UserWrite => self.put(gpa, 0, 4),
            Modify => self.put(gpa, self.get(gpa, 4).wrapping_add(1), 4),
            FreshDescriptor => {
                let marking = Request { write: true, ..request };
                if let Err(code) = self.walk(s, paging, &marking, gva) {
                    return Some(code);
                }
                self.put(gpa + 5, self.get(gpa + 5, 1) | 1, 1);
            }
            _ => {}
        }
        None
    }

    /// Translates, sets accessed and dirty bits; the error code if it may not.
    fn walk(&mut self, s: &CpuState, paging: Paging, request: &Request, gva: u64) -> Result<u64, u32> {
        let (nx, long) = (s.efer.nxe() && paging != Paging::TwoLevel, paging.is_long());
        let describe = u32::from(request.write) << 1
            | u32::from(request.user) << 2
            | if request.fetch && (nx || s.cr4.smep()) { 16 } else { 0 };
        let (mut table, shifts): (u64, &[u32]) = match paging {
            Paging::TwoLevel => (s.cr3.raw() & 0xffff_f000, &[22, 12]),
            Paging::Pae => (s.pdpte[(gva >> 30 & 3) as usize], &[21, 12]),
            Paging::Long => (s.cr3.raw() & 0xf_ffff_ffff_f000, &[39, 30, 21, 12]),
        };
        if paging == Paging::Pae {
            if table & 1 == 0 {
                return Err(describe);
            }
            table &= !0xfff;
        }
        let size = if paging == Paging::TwoLevel { 4 } else { 8 };
        let (mut writable, mut user, mut executable) = (true, true, true);
        let mut seen = Vec::new();
        for &shift in shifts {
            let at = table + (gva >> shift & if size == 4 { 1023 } else { 511 }) * size;
            let entry = self.get(at, size);
            if entry & 1 == 0 {
                return Err(describe);
            }
            let large = shift > 12 && shift < 39 && entry & 0x80 != 0 && (size == 8 || s.cr4.pse());
            if is_reserved(entry, size, shift, large, nx) {
                return Err(describe | 9);
            }
            writable &= entry & 2 != 0;
            user &= entry & 4 != 0;
            executable &= entry >> 63 == 0 || size == 4;
            seen.push((at, entry));
            if large || shift == 12 {
                let key = if long { entry >> 59 & 15 } else { 0 };
                return self.leaf(s, request, (writable, user, executable), key as u32, describe).map(|()| {
                    self.mark(&seen, size, request.write);
                    let mask = (1 << shift) - 1;
                    let frame = if size == 4 { entry & 0xffff_f000 } else { entry & 0x7_ffff_ffff_f000 };
                    frame & !mask | gva & mask
                });
            }
            table = if size == 4 { entry & 0xffff_f000 } else { entry & 0x7_ffff_ffff_f000 };
        }
        Err(describe)
    }

    fn mark(&mut self, seen: &[(u64, u64)], size: u64, write: bool) {
        for (n, &(at, entry)) in seen.iter().enumerate() {
            let dirty = if write && n + 1 == seen.len() { 0x40 } else { 0 };
            self.put(at, entry | 0x20 | dirty, size);
        }
    }

    fn leaf(
        &self,
        s: &CpuState,
        request: &Request,
        (writable, user, executable): (bool, bool, bool),
        key: u32,
        describe: u32,
    ) -> Result<(), u32> {
        let ac = s.rflags & rflags::AC != 0;
        let key_bits = s.pkru >> (2 * key) & 3;
        let keyed = s.cr4.pke() && s.efer.lma() && user && !request.fetch;
        let key_denies =
            keyed && (key_bits & 1 != 0 || key_bits & 2 != 0 && request.write && (request.user || s.cr0.wp()));
        let denied = if request.user {
            !user || request.write && !writable || request.fetch && !executable
        } else if request.fetch {
            !executable || user && s.cr4.smep()
        } else {
            request.write && !writable && s.cr0.wp() || user && s.cr4.smap() && (request.implicit || !ac)
        };
        if key_denies {
            return Err(describe | 1 | 32);
        }
        if denied { Err(describe | 1) } else { Ok(()) }
    }
}

/// Bits that must be 0 in an entry.
fn is_reserved(entry: u64, size: u64, shift: u32, large: bool, nx: bool) -> bool {
    if size == 4 {
        // A 4 MiB page's frame has at most 40 bits; bit 21 is none of them.
        return large && entry & (1 << 21) != 0;
    }
    let high = entry & 1 << 51 != 0;
    let executes = entry >> 63 != 0 && !nx;
    let low = large && entry & ((1 << shift) - 1) & !0x1fff != 0;
    let top = shift == 39 && entry & 0x80 != 0;
    high || executes || low || top
}
