//! Data accesses by linear address: the fast table first, else the MMU, the bus, or both pages of a
//! crossing access. LOCK needs nothing here while all CPUs share one host thread.

mod missed;

use crate::core::Core;
use crate::op::{Op, Stop};
use crate::segments::SegmentUse;
use crate::word::Word;
use umbra_arch::paging::{Access, AccessKind};
use umbra_arch::segment::Seg;
use umbra_arch::state::reg;
use umbra_arch::{AccessWidth, Bus, Fault, Gpa, Gva, PAGE_SIZE};
use umbra_memory::{Backing, PageFlags, RamOffset};
use umbra_mmu::Translation;

/// Where the bytes of one access live, translated and permitted.
#[derive(Clone, Copy)]
enum Place {
    One(Translation),
    /// First page, second page, bytes in the first.
    Split(Translation, Translation, u64),
}

impl Core {
    /// Effective address of `op`'s memory operand (offset in its segment).
    #[inline(always)]
    pub fn effective(&self, op: &Op) -> u64 {
        let base = self.gpr[op.base as usize & 31];
        let index = self.gpr[op.index as usize & 31];
        base.wrapping_add(index << (op.scale & 3)).wrapping_add(op.disp) & op.ea_mask
    }

    /// Linear address of `op`'s memory operand of `bytes` bytes.
    #[inline(always)]
    pub fn linear(&mut self, op: &Op, bytes: u64, kind: AccessKind) -> Result<u64, Stop> {
        let offset = self.effective(op);
        if op.legacy {
            return self.segmented(op.seg, offset, bytes, SegmentUse::of(kind));
        }
        Ok(self.seg_base[op.seg as usize & 7].wrapping_add(offset))
    }

    /// Linear address of `op`'s memory operand if its segment asks for no check. What comes to that by this and the table
    /// and otherwise by tail calls alone saves no registers.
    #[inline(always)]
    pub fn unchecked(&self, op: &Op) -> Option<Gva> {
        self.unchecked_at(op, op.seg, self.effective(op))
    }

    #[inline(always)]
    fn unchecked_at(&self, op: &Op, seg: u8, offset: u64) -> Option<Gva> {
        let lin = self.seg_base[seg as usize & 7].wrapping_add(offset);
        if !op.legacy {
            return Some(Gva::new(lin));
        }
        let is_checked = self.seg_checked >> (seg & 7) & 1 != 0;
        (!is_checked).then_some(Gva::new(lin & 0xffff_ffff))
    }

    /// Where `op`'s memory operand is in RAM, if that is known at once.
    #[inline(always)]
    pub fn read_at_once<W: Word>(&self, op: &Op) -> Option<RamOffset> {
        self.mmu.lookup_read(self.unchecked(op)?, W::BYTES)
    }

    /// As [`read_at_once`](Self::read_at_once) for a write.
    #[inline(always)]
    pub fn write_at_once<W: Word>(&self, op: &Op) -> Option<RamOffset> {
        self.mmu.lookup_write(self.unchecked(op)?, W::BYTES)
    }

    /// As [`write_at_once`](Self::write_at_once) for what is pushed to stack pointer `top`.
    #[inline(always)]
    pub fn push_at_once<W: Word>(&self, op: &Op, top: u64) -> Option<RamOffset> {
        self.mmu.lookup_write(self.unchecked_at(op, Seg::Ss as u8, top)?, W::BYTES)
    }

    /// As [`read_at_once`](Self::read_at_once) for the top of the stack.
    #[inline(always)]
    pub fn top_at_once<W: Word>(&self, op: &Op) -> Option<RamOffset> {
        let top = self.gpr[reg::RSP] & self.stack_mask;
        self.mmu.lookup_read(self.unchecked_at(op, Seg::Ss as u8, top)?, W::BYTES)
    }

    /// Linear address of `offset` in segment `seg`, for stack and string operands.
    #[inline(always)]
    pub fn linear_at(&mut self, op: &Op, seg: Seg, offset: u64, bytes: u64, kind: AccessKind) -> Result<u64, Stop> {
        if op.legacy {
            return self.segmented(seg as u8, offset, bytes, SegmentUse::of(kind));
        }
        Ok(self.seg_base[seg as usize & 7].wrapping_add(offset))
    }

    /// Reads a value at linear address `lin`.
    #[inline(always)]
    pub fn read<W: Word>(&mut self, bus: &mut dyn Bus, op: &Op, lin: u64) -> Result<u64, Stop> {
        match self.mmu.lookup_read(Gva::new(lin), W::BYTES) {
            Some(off) => Ok(self.mem.load::<W>(off).zext()),
            None => self.read_slow::<W>(bus, op, lin),
        }
    }

    /// Writes a value at linear address `lin`.
    #[inline(always)]
    pub fn write<W: Word>(&mut self, bus: &mut dyn Bus, op: &Op, lin: u64, value: u64) -> Result<(), Stop> {
        match self.mmu.lookup_write(Gva::new(lin), W::BYTES) {
            Some(off) => {
                self.mem.store::<W>(off, W::of(value));
                Ok(())
            }
            None => self.write_slow::<W>(bus, op, lin, value),
        }
    }

    /// Replaces a value by `f(value)`, with write permission checked before the read.
    #[inline(always)]
    pub fn modify<W: Word, R>(
        &mut self,
        bus: &mut dyn Bus,
        op: &Op,
        lin: u64,
        f: impl FnOnce(&mut Core, u64) -> (u64, R),
    ) -> Result<R, Stop> {
        if let Some(off) = self.mmu.lookup_write(Gva::new(lin), W::BYTES) {
            let old = self.mem.load::<W>(off).zext();
            let (new, r) = f(self, old);
            self.mem.store::<W>(off, W::of(new));
            return Ok(r);
        }
        self.modify_slow::<W, R>(bus, op, lin, f)
    }

    /// RAM behind `bytes` bytes within a page, if they may be accessed without telling anybody: as the fast
    /// path, but after one translation when that misses. `None` says nothing about rights.
    pub fn find_ram(&mut self, op: &Op, lin: u64, bytes: u64, kind: AccessKind) -> Option<RamOffset> {
        let gva = Gva::new(lin);
        let lookup = |c: &Core| match kind {
            AccessKind::Write => c.mmu.lookup_write(gva, bytes),
            _ => c.mmu.lookup_read(gva, bytes),
        };
        // Linear addresses wrap there, which the table doesn't know.
        if op.legacy && lin >> 32 != 0 {
            return None;
        }
        if let Some(off) = lookup(self) {
            return Some(off);
        }
        let fits = bytes <= PAGE_SIZE - (lin & (PAGE_SIZE - 1));
        let addressable = op.legacy || self.is_canonical(lin);
        if !fits || !addressable || self.watch.guarded {
            return None;
        }
        let stamp = self.mmu.fetch_stamp();
        let found = self.mmu.translate(gva, Access::explicit(kind, self.s.cpl));
        self.after_translation(stamp);
        found.ok()?;
        lookup(self)
    }

    /// Checks that every byte of a write would be permitted, without writing.
    pub fn probe_write(&mut self, op: &Op, lin: u64, bytes: u64) -> Result<(), Stop> {
        let mut at = lin;
        let mut left = bytes;
        while left > 0 {
            let part = left.min(PAGE_SIZE - (at & (PAGE_SIZE - 1)));
            self.place(op, at, part, AccessKind::Write)?;
            at = self.wrap(op, at.wrapping_add(part));
            left -= part;
        }
        Ok(())
    }

    /// Reads any number of bytes (at most two pages' worth).
    pub fn read_bytes(&mut self, bus: &mut dyn Bus, op: &Op, lin: u64, out: &mut [u8]) -> Result<(), Stop> {
        if let Some(off) = self.mmu.lookup_read(Gva::new(lin), out.len() as u64) {
            self.mem.load_bytes(off, out);
            return Ok(());
        }
        let place = self.place(op, lin, out.len() as u64, AccessKind::Read)?;
        self.load_parts(bus, op, place, out);
        Ok(())
    }

    /// Writes any number of bytes (at most two pages' worth), all or none.
    pub fn write_bytes(&mut self, bus: &mut dyn Bus, op: &Op, lin: u64, data: &[u8]) -> Result<(), Stop> {
        if let Some(off) = self.mmu.lookup_write(Gva::new(lin), data.len() as u64) {
            self.mem.store_bytes(off, data);
            return Ok(());
        }
        let place = self.place(op, lin, data.len() as u64, AccessKind::Write)?;
        self.store_parts(bus, op, place, data);
        Ok(())
    }

    /// Reads a value of a system structure (descriptor table, TSS): an implicit supervisor access.
    #[inline]
    pub fn read_system<W: Word>(&mut self, bus: &mut dyn Bus, lin: u64) -> Result<u64, Stop> {
        let lin = self.system_address(lin);
        match self.mmu.lookup_system_read(Gva::new(lin), W::BYTES) {
            Some(off) => Ok(self.mem.load::<W>(off).zext()),
            None => self.read_system_slow(bus, lin, W::BYTES),
        }
    }

    /// Writes a value of a system structure or of a stack switched to by event delivery.
    #[inline]
    pub fn write_system<W: Word>(&mut self, bus: &mut dyn Bus, lin: u64, value: u64) -> Result<(), Stop> {
        let lin = self.system_address(lin);
        match self.mmu.lookup_system_write(Gva::new(lin), W::BYTES) {
            Some(off) => {
                self.mem.store::<W>(off, W::of(value));
                Ok(())
            }
            None => self.write_system_slow(bus, lin, W::BYTES, value),
        }
    }

    #[inline(always)]
    pub(crate) fn system_address(&self, lin: u64) -> u64 {
        if self.s.efer.lma() { lin } else { lin & 0xffff_ffff }
    }

    #[inline(never)]
    fn read_system_slow(&mut self, bus: &mut dyn Bus, lin: u64, bytes: u64) -> Result<u64, Stop> {
        let place = self.system_place(lin, bytes, AccessKind::Read)?;
        Ok(self.load_place(bus, &SYSTEM_OP, place, bytes))
    }

    #[inline(never)]
    fn write_system_slow(&mut self, bus: &mut dyn Bus, lin: u64, bytes: u64, value: u64) -> Result<(), Stop> {
        let place = self.system_place(lin, bytes, AccessKind::Write)?;
        self.store_place(bus, &SYSTEM_OP, place, bytes, value);
        Ok(())
    }

    /// Linear addresses are 32 bits wide outside 64-bit mode.
    #[inline(always)]
    fn wrap(&self, op: &Op, lin: u64) -> u64 {
        if op.legacy { lin & 0xffff_ffff } else { lin }
    }

    #[inline(never)]
    fn place(&mut self, op: &Op, lin: u64, bytes: u64, kind: AccessKind) -> Result<Place, Stop> {
        self.may_access(op, lin, bytes, kind)?;
        let access = Access::explicit(kind, self.s.cpl);
        self.place_as(lin, bytes, access, op.legacy)
    }

    #[inline(always)]
    fn is_canonical(&self, lin: u64) -> bool {
        Gva::new(lin).is_canonical(self.s.linear_bits())
    }

    /// What comes before the translation of an operand's address: canonicality, breakpoints, alignment.
    #[inline(always)]
    fn may_access(&mut self, op: &Op, lin: u64, bytes: u64, kind: AccessKind) -> Result<(), Stop> {
        if !op.legacy {
            let bits = self.s.linear_bits();
            let is_outside = |lin: u64| !Gva::new(lin).is_canonical(bits);
            if is_outside(lin) || crosses(lin, bytes) && is_outside(lin.wrapping_add(bytes - 1)) {
                return self.raise(if op.seg == Seg::Ss as u8 { Fault::SS0 } else { Fault::GP0 });
            }
        }
        if self.watch.guarded {
            self.guard(lin, bytes, kind)?;
        }
        Ok(())
    }

    /// The walk may have set A or D bits on a page that holds code. It may have made room, too, so that nobody hears of a
    /// store to the tables of the running block's page, by which what follows has to be fetched: its `stamp` was this before.
    #[inline(always)]
    fn after_translation(&mut self, stamp: u64) {
        self.break_block |= self.mmu.watcher().is_pending() || stamp != self.mmu.fetch_stamp();
        if self.trace.is_some() {
            self.trace_mmu();
        }
    }

    fn system_place(&mut self, lin: u64, bytes: u64, kind: AccessKind) -> Result<Place, Stop> {
        let long = self.s.efer.lma();
        if long && !self.is_canonical(lin) {
            return self.raise(Fault::GP0);
        }
        self.place_as(lin, bytes, Access::implicit(kind), !long)
    }

    fn place_as(&mut self, lin: u64, bytes: u64, access: Access, legacy: bool) -> Result<Place, Stop> {
        let stamp = self.mmu.fetch_stamp();
        let first = self.translate(lin, access)?;
        self.after_translation(stamp);
        if !crosses(lin, bytes) {
            return Ok(Place::One(first));
        }
        let room = PAGE_SIZE - (lin & (PAGE_SIZE - 1));
        let mut next = lin.wrapping_add(room);
        if legacy {
            next &= 0xffff_ffff;
        }
        let second = self.translate(next, access)?;
        self.after_translation(stamp);
        Ok(Place::Split(first, second, room))
    }

    /// Translates one byte for the running instruction, which starts again if the page has yet to arrive.
    /// That never happens to implicit accesses, so that no event is lost half-way in its delivery.
    #[inline(always)]
    pub fn translate(&mut self, lin: u64, access: Access) -> Result<Translation, Stop> {
        let found = match self.mmu.translate(Gva::new(lin), access) {
            Ok(found) => found,
            Err(fault) => return self.raise(fault),
        };
        if found.absent {
            return Err(self.is_absent(&found));
        }
        Ok(found)
    }

    /// Raises what a translation ended with. Field by field: the processor at work would wait for the fields' stores
    /// before it could copy all of them at once.
    #[inline(always)]
    fn raise_page_fault<T>(&mut self, fault: &Fault) -> Result<T, Stop> {
        self.raise(Fault::page(fault.address, fault.code.unwrap_or(0)))
    }

    #[cold]
    fn is_absent(&mut self, found: &Translation) -> Stop {
        self.absent = found.gpa.page();
        Stop::Absent
    }

    fn load_place(&mut self, bus: &mut dyn Bus, op: &Op, place: Place, bytes: u64) -> u64 {
        let mut raw = [0u8; 8];
        self.load_parts(bus, op, place, &mut raw[..bytes as usize]);
        u64::from_le_bytes(raw)
    }

    fn store_place(&mut self, bus: &mut dyn Bus, op: &Op, place: Place, bytes: u64, value: u64) {
        self.store_parts(bus, op, place, &value.to_le_bytes()[..bytes as usize]);
    }

    fn load_parts(&mut self, bus: &mut dyn Bus, op: &Op, place: Place, out: &mut [u8]) {
        match place {
            Place::One(t) => self.load_part(bus, op, t, out),
            Place::Split(a, b, cut) => {
                let (low, high) = out.split_at_mut(cut as usize);
                self.load_part(bus, op, a, low);
                self.load_part(bus, op, b, high);
            }
        }
    }

    fn store_parts(&mut self, bus: &mut dyn Bus, op: &Op, place: Place, data: &[u8]) {
        match place {
            Place::One(t) => self.store_part(bus, op, t, data),
            Place::Split(a, b, cut) => {
                let (low, high) = data.split_at(cut as usize);
                self.store_part(bus, op, a, low);
                self.store_part(bus, op, b, high);
            }
        }
    }

    fn load_part(&mut self, bus: &mut dyn Bus, op: &Op, t: Translation, out: &mut [u8]) {
        match t.backing {
            Backing::Ram(off) | Backing::Rom(off) => self.mem.load_bytes(off, out),
            Backing::Mmio => {
                let mut done = 0;
                while done < out.len() {
                    let width = mmio_width(t.gpa.raw() + done as u64, out.len() - done);
                    let now = self.now(op.prefix);
                    let reply = bus.mmio_read(now, t.gpa.add(done as u64), width);
                    let raw = self.settle(reply).to_le_bytes();
                    let n = width.bytes() as usize;
                    out[done..done + n].copy_from_slice(&raw[..n]);
                    done += n;
                }
            }
        }
    }

    fn store_part(&mut self, bus: &mut dyn Bus, op: &Op, t: Translation, data: &[u8]) {
        match t.backing {
            Backing::Ram(off) => {
                self.mem.store_bytes(off, data);
                self.stored(off, t, data.len() as u32);
            }
            Backing::Rom(_) => {}
            Backing::Mmio => {
                let mut done = 0;
                while done < data.len() {
                    let width = mmio_width(t.gpa.raw() + done as u64, data.len() - done);
                    let n = width.bytes() as usize;
                    let mut raw = [0u8; 8];
                    raw[..n].copy_from_slice(&data[done..done + n]);
                    let now = self.now(op.prefix);
                    let reply = bus.mmio_write(now, t.gpa.add(done as u64), width, u64::from_le_bytes(raw));
                    self.settle(reply);
                    done += n;
                }
            }
        }
    }

    /// After a slow-path store to RAM: watched tables and code lines learn of it at once.
    fn stored(&mut self, off: RamOffset, t: Translation, len: u32) {
        self.mem.note_store(off, u64::from(len));
        self.stored_in_page(off, t.gpa, len);
    }

    /// As [`stored`](Self::stored), after a store in the page that was translated, and thereby marked dirty.
    #[inline]
    fn stored_in_page(&mut self, off: RamOffset, gpa: Gpa, len: u32) {
        if self.mem.page_flags(off).intersects(PageFlags::REPORTED) {
            self.mmu.watcher().stored(gpa, off, len);
            self.note_own_store(off, len);
        }
    }

    /// Does what this processor's own caches ask for after a store in one page.
    #[inline]
    fn note_own_store(&mut self, off: RamOffset, len: u32) {
        let flags = self.mem.page_flags(off);
        if flags.contains(PageFlags::WATCHED) {
            let stamp = self.mmu.fetch_stamp();
            self.mmu.frame_written(off, len.into());
            // The rest of this block may be mapped elsewhere now.
            self.break_block |= stamp != self.mmu.fetch_stamp();
        }
        if flags.contains(PageFlags::CODE) && self.hits_code(off, len) {
            self.code_writes.push((off.raw(), len));
            self.break_block = true;
        }
    }

    fn hits_code(&self, off: RamOffset, len: u32) -> bool {
        let Some(lines) = self.code_lines.get(&(off.raw() >> 12)) else { return false };
        let first = (off.raw() & 0xfff) >> 6;
        let last = ((off.raw() & 0xfff) + u64::from(len.max(1)) - 1).min(0xfff) >> 6;
        (first..=last).any(|line| lines >> line & 1 != 0)
    }
}

/// Whether `bytes` bytes at `lin` are not all in one page.
#[inline(always)]
fn crosses(lin: u64, bytes: u64) -> bool {
    bytes > PAGE_SIZE - (lin & (PAGE_SIZE - 1))
}

/// The widest naturally aligned access that fits.
fn mmio_width(gpa: u64, left: usize) -> AccessWidth {
    [AccessWidth::Qword, AccessWidth::Dword, AccessWidth::Word]
        .into_iter()
        .find(|w| w.bytes() as usize <= left && gpa.is_multiple_of(w.bytes()))
        .unwrap_or(AccessWidth::Byte)
}

/// Stands for "no instruction's operand" in system accesses: time is the block's head.
static SYSTEM_OP: Op = Op {
    exec: |_, _, _| Ok(()),
    imm: 0,
    disp: 0,
    ea_mask: u64::MAX,
    base: crate::op::NO_REG,
    index: crate::op::NO_REG,
    scale: 0,
    seg: Seg::Ds as u8,
    dst: 0,
    src: 0,
    len: 0,
    legacy: false,
    start: 0,
    row: 0,
    prefix: 0,
    aux: 0,
};
