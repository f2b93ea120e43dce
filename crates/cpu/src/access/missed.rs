//! Operands whose page the fast table lacks, or may not be stored to without telling somebody.

use super::{Place, crosses};
use crate::core::Core;
use crate::op::{Flow, Op, Stop};
use crate::word::Word;
use std::hint::black_box;
use umbra_arch::paging::{Access, AccessKind};
use umbra_arch::{Bus, Fault, Gva};
use umbra_memory::{Backing, RamOffset};
use umbra_mmu::{End, Look, Translation, Written};

impl Core {
    #[cold]
    #[inline(never)]
    pub(super) fn modify_slow<W: Word, R>(
        &mut self,
        bus: &mut dyn Bus,
        op: &Op,
        lin: u64,
        f: impl FnOnce(&mut Core, u64) -> (u64, R),
    ) -> Result<R, Stop> {
        if let Some(off) = self.mmu.lookup_reported_write(Gva::new(lin), W::BYTES) {
            let old = self.mem.load::<W>(off).zext();
            let (new, r) = f(self, old);
            self.mem.store::<W>(off, W::of(new));
            self.note_own_store(off, W::BYTES as u32);
            return Ok(r);
        }
        let place = self.place(op, lin, W::BYTES, AccessKind::Write)?;
        let old = self.load_place(bus, op, place, W::BYTES);
        let (new, r) = f(self, old);
        self.store_place(bus, op, place, W::BYTES, new);
        Ok(r)
    }

    /// Where `bytes` bytes of one page are.
    #[inline(always)]
    fn in_page(&mut self, op: &Op, lin: u64, bytes: u64, kind: AccessKind) -> Result<Translation, Stop> {
        self.may_access(op, lin, bytes, kind)?;
        let stamp = self.mmu.fetch_stamp();
        match self.mmu.translate_here(Gva::new(lin), Access::explicit(kind, self.s.cpl)) {
            Ok(found) => {
                self.after_translation(stamp);
                Ok(found)
            }
            Err(fault) => self.raise_page_fault(&fault),
        }
    }

    #[cold]
    #[inline(never)]
    pub(super) fn read_slow<W: Word>(&mut self, bus: &mut dyn Bus, op: &Op, lin: u64) -> Result<u64, Stop> {
        self.read_missed::<W>(bus, op, lin)
    }

    /// As [`read`](Self::read) where the table is known to lack the page.
    #[inline(always)]
    pub fn read_missed<W: Word>(&mut self, bus: &mut dyn Bus, op: &Op, lin: u64) -> Result<u64, Stop> {
        if crosses(lin, W::BYTES) {
            let place = self.place(op, lin, W::BYTES, AccessKind::Read)?;
            return Ok(self.load_place(bus, op, place, W::BYTES));
        }
        let found = self.in_page(op, lin, W::BYTES, AccessKind::Read)?;
        self.read_found::<W>(bus, op, found)
    }

    /// A look at why the table lacks the page of an operand that lies in one, if nothing but translation has to be
    /// looked at. A fault is raised.
    #[inline(always)]
    pub fn look_at_miss<W: Word>(&mut self, op: &Op, lin: u64, kind: AccessKind) -> Look {
        if crosses(lin, W::BYTES) || !op.legacy && !self.is_canonical(lin) || self.watch.guarded {
            return Look::Unknown;
        }
        let look = self.mmu.look_at_end(Gva::new(lin), Access::explicit(kind, self.s.cpl));
        if let Look::Faults(code) = look {
            self.fault = Fault::page(lin, code);
        }
        look
    }

    /// As [`read_missed`](Self::read_missed) from where [`look_at_miss`](Self::look_at_miss) ended.
    #[inline(always)]
    pub fn read_from<W: Word>(&mut self, bus: &mut dyn Bus, op: &Op, lin: u64, end: End) -> Result<u64, Stop> {
        let access = Access::explicit(AccessKind::Read, self.s.cpl);
        let stamp = self.mmu.fetch_stamp();
        match self.mmu.translate_from(Gva::new(lin), access, end) {
            Ok(found) => {
                self.after_translation(stamp);
                self.read_found::<W>(bus, op, found)
            }
            Err(fault) => self.raise_page_fault(&fault),
        }
    }

    #[inline(always)]
    fn read_found<W: Word>(&mut self, bus: &mut dyn Bus, op: &Op, found: Translation) -> Result<u64, Stop> {
        match found.backing {
            _ if found.absent => Err(self.is_absent(&found)),
            Backing::Ram(off) | Backing::Rom(off) => Ok(self.mem.load::<W>(off).zext()),
            // Else the compiler passes what is read of `op` instead of it: too many arguments for a tail call.
            Backing::Mmio => Ok(self.load_place(bus, black_box(op), Place::One(found), W::BYTES)),
        }
    }

    #[cold]
    #[inline(never)]
    pub(super) fn write_slow<W: Word>(&mut self, bus: &mut dyn Bus, op: &Op, lin: u64, value: u64) -> Result<(), Stop> {
        let Some(off) = self.mmu.lookup_table_write(Gva::new(lin), W::BYTES) else {
            return self.write_reported::<W>(bus, op, lin, value);
        };
        self.mem.store::<W>(off, W::of(value));
        match self.mmu.scalar_written(off, W::BYTES) {
            Written::Done => Ok(()),
            Written::Entry(index, at) => self.entry_written(index, at),
            Written::Unknown => self.noted_own_store(off, W::BYTES as u32),
        }
    }

    #[inline(never)]
    fn write_reported<W: Word>(&mut self, bus: &mut dyn Bus, op: &Op, lin: u64, value: u64) -> Result<(), Stop> {
        let Some(off) = self.mmu.lookup_reported_write(Gva::new(lin), W::BYTES) else {
            return self.write_translated::<W>(bus, op, lin, value);
        };
        self.mem.store::<W>(off, W::of(value));
        self.noted_own_store(off, W::BYTES as u32)
    }

    #[inline(never)]
    fn noted_own_store(&mut self, off: RamOffset, len: u32) -> Flow {
        self.note_own_store(off, len);
        Ok(())
    }

    /// After a store to a table's entry that the MMU knows.
    #[inline(never)]
    fn entry_written(&mut self, index: u32, at: u32) -> Flow {
        let stamp = self.mmu.fetch_stamp();
        self.mmu.entry_written(index, at);
        // The rest of this block may be mapped elsewhere now.
        self.break_block |= stamp != self.mmu.fetch_stamp();
        Ok(())
    }

    #[inline(never)]
    fn write_translated<W: Word>(&mut self, bus: &mut dyn Bus, op: &Op, lin: u64, value: u64) -> Result<(), Stop> {
        if crosses(lin, W::BYTES) {
            let place = self.place(op, lin, W::BYTES, AccessKind::Write)?;
            self.store_place(bus, op, place, W::BYTES, value);
            return Ok(());
        }
        let found = self.in_page(op, lin, W::BYTES, AccessKind::Write)?;
        match found.backing {
            _ if found.absent => return Err(self.is_absent(&found)),
            Backing::Ram(off) => {
                self.mem.store::<W>(off, W::of(value));
                self.stored_in_page(off, found.gpa, W::BYTES as u32);
            }
            Backing::Rom(_) | Backing::Mmio => self.store_place(bus, op, Place::One(found), W::BYTES, value),
        }
        Ok(())
    }
}
