//! Guest addresses to host addresses: a range register, or one lookup in the MMU's fast table.

use crate::emitter::{Alu, Emitter, Jump, Mem, cc};
use crate::frame::{self, frame_field, gpr, seg_base, selected};
use crate::groups::{Check, Reach};
use crate::ranges::{self, ABSOLUTE, Name, SEGMENT};
use crate::registers::{A, B, Reg, TABLE, guest, home};
use crate::translate::Translator;
use crate::windows;
use std::mem::offset_of;
use umbra_arch::segment::Seg;
use umbra_cpu::op::{NO_REG, Op};
use umbra_mmu::Entry;

/// A linear address: base register, index register and its shift count, displacement, segment.
#[derive(Clone, Copy)]
pub struct Address {
    pub base: Option<u8>,
    pub index: Option<(u8, u8)>,
    pub disp: u64,
    pub seg: Option<u8>,
}

/// Where an access goes on the host, and which scratch register isn't part of that.
#[derive(Clone, Copy)]
pub struct Place {
    pub mem: Mem,
    pub free: Reg,
}

impl Place {
    /// The address is in [`A`].
    pub const SCRATCH: Place = Place { mem: Mem { base: Some(A), index: None, disp: 0 }, free: B };
}

/// What an access does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    Read,
    /// Writes, and perhaps reads before.
    Write,
}

impl Access {
    /// Offset of the tag that allows it.
    pub const fn tag(self) -> usize {
        match self {
            Access::Read => offset_of!(Entry, tag_read),
            Access::Write => offset_of!(Entry, tag_write),
        }
    }
}

/// Where in the MMU's table the slot of a linear address is, in bytes, to another register.
pub fn to_slot(e: &mut Emitter, to: Reg, address: Reg) {
    e.shifted(to, address, 12 - size_of::<Entry>().trailing_zeros() as u8);
    e.alu_mem(Alu::And, true, to, selected!(mask));
}

/// A field of the slot that [`to_slot`] has found.
pub fn in_slot(slot: Reg, field: usize) -> Mem {
    Mem { base: Some(TABLE), index: Some((slot, 0)), disp: field as i32 }
}

impl Address {
    /// The memory operand of `op`.
    pub fn of(op: &Op) -> Self {
        let has_base = op.seg == Seg::Fs as u8 || op.seg == Seg::Gs as u8;
        Self {
            base: (op.base != NO_REG).then_some(op.base),
            index: (op.index != NO_REG).then_some((op.index, op.scale)),
            disp: if op.legacy { op.disp as i32 as u64 } else { op.disp },
            seg: has_base.then_some(op.seg),
        }
    }

    /// Without its segment's base: the effective address.
    pub fn effective(self) -> Self {
        Self { seg: None, ..self }
    }

    /// The range register that it is looked for in.
    fn range(&self) -> Name {
        let general = self.base.or(self.index.map(|(n, _)| n));
        general.unwrap_or(if self.seg.is_some() { SEGMENT } else { ABSOLUTE })
    }

    /// Whether it is a resident register and a displacement, so that the host's address needs no other.
    fn is_direct(&self) -> bool {
        self.is_plain() && self.base.and_then(home).is_some()
    }

    /// Whether it is a register and a displacement.
    fn is_plain(&self) -> bool {
        self.index.is_none() && self.seg.is_none() && self.base.is_some()
    }

    /// As a group's member; only a base and a displacement can be one.
    fn reach(&self, bytes: u32, access: Access) -> Option<Reach> {
        self.base.filter(|_| self.is_plain()).map(|base| Reach { base, disp: self.disp as i32, bytes, access })
    }

    /// `disp` bytes above a guest register, in the stack segment.
    pub fn above(register: u8, disp: i32) -> Self {
        Self { base: Some(register), index: None, disp: disp as i64 as u64, seg: None }
    }
}

/// An access that missed its range: looked up in the table, then it goes on.
pub struct Cold {
    missed: Jump,
    back: usize,
    address: Address,
    bytes: u32,
    access: Access,
    /// Of a group, whose code wants the addend in [`B`] and, unless its base is resident, the linear address in [`A`].
    group: bool,
    /// Which of the block's slow paths does it all if the table has no such page.
    slow: usize,
}

/// An access that may be in another region than that whose window it goes through.
pub struct Elsewhere {
    missed: Jump,
    back: usize,
    address: Address,
    bytes: u32,
    access: Access,
    slow: usize,
}

impl Translator<'_> {
    /// Finds the `bytes` bytes at `address` on the host; the operation's function does it all if they aren't in one
    /// page of the table. Clobbers [`A`], [`B`] and the host's flags.
    pub fn lookup(&mut self, address: &Address, bytes: u32, access: Access) -> Place {
        let op = self.op_of(self.slow_number());
        let check = self.groups.check(op, self.lookups);
        self.lookups += 1;
        let reach = address.reach(bytes, access);
        if let Some(windows) = self.windows.filter(|_| self.missing >> op & 1 == 0) {
            if let Some(place) = self.in_known_region(address) {
                return place;
            }
            let region = windows.region(self.site(op), address.base.unwrap_or(umbra_cpu::op::NO_REG));
            return self.through_window(address, bytes, access, region);
        }
        match (check, reach) {
            (Check::First(group, all), Some(reach)) if all.covers(&reach) => {
                let place = self.find_group(address, &all);
                self.checked[usize::from(all.base)] = Some(group);
                place
            }
            (Check::Covered(group, planned), Some(reach))
                if reach == planned && self.checked[usize::from(reach.base)] == Some(group) =>
            {
                self.in_group(address, reach.base)
            }
            _ => self.find_one(address, bytes, access),
        }
    }

    /// An address in a group that has been checked.
    fn in_group(&mut self, address: &Address, base: u8) -> Place {
        if self.narrow {
            self.host_flags = false;
            self.narrow_linear(address);
            self.e.alu_mem(Alu::Add, true, A, frame::addend(base));
            return Place::SCRATCH;
        }
        if let Some(home) = home(base) {
            self.e.load(A, frame::addend(base));
            return Place { mem: Mem { base: Some(home), index: Some((A, 0)), disp: address.disp as i32 }, free: B };
        }
        self.host_flags = false;
        self.e.load(A, gpr(base));
        self.e.alu_mem(Alu::Add, true, A, frame::addend(base));
        Place { mem: Mem { base: Some(A), index: None, disp: address.disp as i32 }, free: B }
    }

    /// Finds all bytes of a group, `address` being in it.
    fn find_group(&mut self, address: &Address, all: &Reach) -> Place {
        self.host_flags = false;
        let slow = self.slow_number();
        let start = Address { disp: all.disp as i64 as u64, ..*address };
        let into = (address.disp as i32).wrapping_sub(all.disp);
        let resident = home(all.base).filter(|_| !self.narrow);
        if !self.is_ranged(address, slow) {
            self.table_addend(&start, all.bytes, all.access);
            self.e.store(frame::addend(all.base), B);
            if self.narrow {
                self.narrow_linear(address);
                self.e.alu(Alu::Add, true, A, B);
                return Place::SCRATCH;
            }
            return self.beyond_addend(address);
        } else {
            let missed = self.compare_range(&start, all.access);
            self.e.load(B, ranges::addend(start.range(), all.access));
            let (back, bytes, access) = (self.e.here(), all.bytes, all.access);
            self.cold.push(Cold { missed, back, address: start, bytes, access, group: true, slow });
            self.e.store(frame::addend(all.base), B);
        }
        if let Some(base) = resident {
            return Place { mem: Mem { base: Some(base), index: Some((B, 0)), disp: address.disp as i32 }, free: A };
        }
        self.e.alu(Alu::Add, true, A, B);
        Place { mem: Mem { base: Some(A), index: None, disp: into }, free: B }
    }

    /// As [`lookup`](Self::lookup) if the base register's region is known.
    fn in_known_region(&mut self, address: &Address) -> Option<Place> {
        let base = address.base.filter(|_| address.is_plain())?;
        let region = self.known.region(base)?;
        let place = match home(base) {
            Some(home) => {
                self.e.load(B, windows::addend(region));
                Place { mem: Mem { base: Some(B), index: Some((home, 0)), disp: address.disp as i32 }, free: A }
            }
            None => {
                self.host_flags = false;
                self.e.load(A, gpr(base));
                self.e.alu_mem(Alu::Add, true, A, windows::addend(region));
                Place { mem: Mem { base: Some(A), index: None, disp: address.disp as i32 }, free: B }
            }
        };
        self.through_window.get_or_insert(self.e.here());
        Some(place)
    }

    /// As [`lookup`](Self::lookup) by the window of a region, else by the table.
    fn through_window(&mut self, address: &Address, bytes: u32, access: Access, region: u8) -> Place {
        self.host_flags = false;
        let slow = self.slow_number();
        let plain = address.base.filter(|_| address.is_plain());
        let direct = plain.and_then(home);
        match plain {
            _ if direct.is_some() => {}
            Some(base) => self.e.load(A, gpr(base)),
            None => self.linear(address),
        }
        self.e.shifted(B, direct.unwrap_or(A), 32);
        self.e.alu_mem(Alu::Cmp, false, B, windows::id(region));
        let missed = self.e.jcc(cc::NOT_EQUAL);
        let place = match direct {
            Some(base) => {
                self.e.load(B, windows::addend(region));
                Place { mem: Mem { base: Some(B), index: Some((base, 0)), disp: address.disp as i32 }, free: A }
            }
            None => {
                self.e.alu_mem(Alu::Add, true, A, windows::addend(region));
                let disp = if plain.is_some() { address.disp as i32 } else { 0 };
                Place { mem: Mem { disp, ..Place::SCRATCH.mem }, ..Place::SCRATCH }
            }
        };
        let back = self.e.here();
        if let Some(base) = plain.filter(|_| self.of_use && self.lookups == 1) {
            // What is behind takes it for granted.
            self.known.found(base, region);
            self.through_window.get_or_insert(back);
            self.slow_tail(slow, missed);
            return place;
        }
        self.through_window.get_or_insert(back);
        self.elsewhere_in_memory.push(Elsewhere { missed, back, address: *address, bytes, access, slow });
        place
    }

    /// The code for accesses that aren't in the regions in which they were looked for.
    fn emit_elsewhere(&mut self) {
        for other in std::mem::take(&mut self.elsewhere_in_memory) {
            self.e.bind(other.missed);
            let site = self.site(self.op_of(other.slow));
            if other.address.is_plain() {
                self.linear(&other.address);
            }
            self.e.rm(false, &[0xff], 1, ranges::counter(site)); // dec
            let struck = self.e.jcc(cc::EQUAL);
            let counted = self.e.here();
            self.e.mov_imm(B, u64::from(other.bytes) - 1);
            self.e.call(self.stubs.other_region[usize::from(other.access == Access::Write)]);
            let nowhere = self.e.jcc(cc::NOT_EQUAL);
            self.slow_of(other.slow, nowhere);
            if !other.address.is_direct() {
                if let Some(base) = other.address.base.filter(|_| other.address.is_plain()) {
                    self.e.load(A, gpr(base));
                }
                self.e.alu(Alu::Add, true, A, B);
            }
            self.e.jmp_to(other.back);
            self.e.bind(struck);
            self.e.store(frame_field!(struck_gva), A);
            self.e.mov_imm32(B, site);
            self.e.call(self.stubs.struck);
            self.e.jmp_to(counted);
        }
    }

    /// As [`lookup`](Self::lookup) for an access by itself.
    fn find_one(&mut self, address: &Address, bytes: u32, access: Access) -> Place {
        self.host_flags = false;
        let slow = self.slow_number();
        if !self.is_ranged(address, slow) {
            return self.lookup_in_table(address, bytes, access);
        }
        let missed = self.compare_range(address, access);
        let addend = ranges::addend(address.range(), access);
        let place = match address.base.filter(|_| self.is_direct(address)).and_then(home) {
            Some(base) => {
                self.e.load(A, addend);
                Place { mem: Mem { base: Some(base), index: Some((A, 0)), disp: address.disp as i32 }, free: B }
            }
            None => {
                self.e.alu_mem(Alu::Add, true, A, addend);
                Place::SCRATCH
            }
        };
        let back = self.e.here();
        self.cold.push(Cold { missed, back, address: *address, bytes, access, group: false, slow });
        place
    }

    /// Whether a range register is worth a try: for the stack, and for arrays and loops where much time is spent, unless the
    /// operation has missed too
    /// often. Pointers to structures lead anywhere.
    fn is_ranged(&self, address: &Address, slow: usize) -> bool {
        let misses = self.missing >> self.op_of(slow) & 1 != 0;
        let array = self.hot && (self.closes_loop || address.index.is_some());
        !misses && (array || address.base == Some(guest::RSP))
    }

    /// Jumps if no access may begin at `address` by its range. The linear address is in [`A`] afterwards, unless the
    /// address is direct.
    fn compare_range(&mut self, address: &Address, access: Access) -> Jump {
        let name = address.range();
        self.linear(address);
        let compared = if self.is_direct(address) {
            A
        } else {
            self.e.mov(B, A);
            B
        };
        self.e.alu_mem(Alu::Sub, true, compared, ranges::first(name, access));
        self.e.alu_mem(Alu::Cmp, true, compared, ranges::limit(name, access));
        self.e.jcc(cc::NOT_BELOW)
    }

    /// As [`find_one`](Self::find_one) where a range is no good.
    fn lookup_in_table(&mut self, address: &Address, bytes: u32, access: Access) -> Place {
        self.table_addend(address, bytes, access);
        if self.narrow {
            self.narrow_linear(address);
            self.e.alu(Alu::Add, true, A, B);
            return Place::SCRATCH;
        }
        if address.index.is_some_and(|(n, _)| home(n).is_none()) {
            self.e.load(A, frame_field!(linear));
            self.e.alu(Alu::Add, true, A, B);
            return Place::SCRATCH;
        }
        self.beyond_addend(address)
    }

    /// An address, its index register being resident, by what is to be added to it in [`B`].
    fn beyond_addend(&mut self, address: &Address) -> Place {
        if let Some(seg) = address.seg {
            self.e.alu_mem(Alu::Add, true, B, seg_base(seg));
        }
        let index = address.index.and_then(|(n, scale)| Some((home(n)?, scale)));
        let place = |index| Place { mem: Mem { base: Some(B), index, disp: address.disp as i32 }, free: A };
        match address.base.map(|n| (home(n), gpr(n))) {
            Some((Some(base), _)) if index.is_none() => return place(Some((base, 0))),
            Some((Some(base), _)) => self.e.alu(Alu::Add, true, B, base),
            Some((None, base)) => self.e.alu_mem(Alu::Add, true, B, base),
            None if i32::try_from(address.disp as i64).is_ok() => {}
            None => {
                self.e.mov_imm(A, address.disp);
                self.e.alu(Alu::Add, true, A, B);
                return Place::SCRATCH;
            }
        }
        place(index)
    }

    /// What to add to the linear address of these bytes to [`B`], by the table. Clobbers [`A`], but if the index register
    /// is in memory, the linear address is in the frame.
    fn table_addend(&mut self, address: &Address, bytes: u32, access: Access) {
        let index_in_memory = address.index.is_some_and(|(n, _)| home(n).is_none());
        self.linear(address);
        if index_in_memory {
            self.e.store(frame_field!(linear), A);
        }
        self.compare_slot(bytes, access);
    }

    /// What to add to the linear address in [`A`], which it clobbers, to [`B`].
    fn compare_slot(&mut self, bytes: u32, access: Access) {
        let e = &mut self.e;
        to_slot(e, B, A);
        e.alu_mem(Alu::Sub, true, A, in_slot(B, access.tag()));
        e.alu_imm(Alu::Cmp, true, A, 4097 - bytes as i32);
        let miss = e.jcc(cc::NOT_BELOW);
        e.load(B, in_slot(B, offset_of!(Entry, addend)));
        self.slow(miss);
    }

    /// What [`find_linear`](Self::find_linear) has found.
    pub const AT_B: Mem = Mem { base: Some(B), index: None, disp: 0 };

    /// The host's address, to [`B`], of the bytes at the linear address in [`A`], by the table; the operation's function does
    /// it all if they aren't in one page of that. Clobbers [`A`].
    pub fn find_linear(&mut self, bytes: u32, access: Access) {
        self.e.store(frame_field!(linear), A);
        self.compare_slot(bytes, access);
        self.e.alu_mem(Alu::Add, true, B, frame_field!(linear));
    }

    /// The code for accesses that missed their ranges.
    pub fn emit_cold(&mut self) {
        self.emit_elsewhere();
        let mut all = std::mem::take(&mut self.cold);
        for cold in all.drain(..) {
            self.e.bind(cold.missed);
            let site = self.site(self.op_of(cold.slow));
            self.e.rm(false, &[0xff], 1, ranges::counter(site)); // dec
            let struck = self.e.jcc(cc::EQUAL);
            let counted = self.e.here();
            let direct = self.is_direct(&cold.address);
            if direct {
                self.linear(&cold.address);
            }
            self.e.mov_imm(B, u64::from(cold.bytes) - 1);
            self.e.call(self.stubs.range(cold.address.range(), cold.access));
            let nowhere = self.e.jcc(cc::NOT_EQUAL);
            self.slow_of(cold.slow, nowhere);
            match (cold.group, direct) {
                (true, _) => self.e.rr(true, &[0x87], A, B), // xchg
                (false, true) => {}
                (false, false) => self.e.alu(Alu::Add, true, A, B),
            }
            self.e.jmp_to(cold.back);
            self.e.bind(struck);
            self.e.mov_imm32(B, site);
            self.e.call(self.stubs.struck);
            self.e.jmp_to(counted);
        }
        self.cold = all;
    }

    /// Whether the host's address needs no other register than the guest's, which is the linear address as it is.
    fn is_direct(&self, address: &Address) -> bool {
        !self.narrow && address.is_direct()
    }

    /// Linear address to [`A`]; clobbers [`B`] only if the index register is in memory. The operation's function does it all
    /// if the segment's limit or type has to be looked at.
    pub fn linear(&mut self, address: &Address) {
        if self.narrow {
            self.unchecked_segment(address);
            return self.narrow_linear(address);
        }
        let e = &mut self.e;
        if address.base.is_none() && address.index.is_none() {
            e.mov_imm(A, address.disp);
        } else {
            let mut resident = |n: u8, scratch: Reg| {
                home(n).unwrap_or_else(|| {
                    e.load(scratch, gpr(n));
                    scratch
                })
            };
            let base = address.base.map(|n| resident(n, A));
            let index = address.index.map(|(n, scale)| (resident(n, B), scale));
            match (base, index, address.disp) {
                (Some(A), None, 0) => {}
                (Some(base), None, 0) => e.mov(A, base),
                _ => e.lea(A, Mem { base, index, disp: address.disp as i32 }),
            }
        }
        if let Some(seg) = address.seg {
            e.alu_mem(Alu::Add, true, A, seg_base(seg));
        }
    }
}
