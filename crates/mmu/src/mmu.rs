//! The MMU.

use crate::format::Format;
use crate::role::{CpuRole, View};
use crate::stats::MmuStats;
use crate::tables::MemoryTables;
use crate::walk::{self, Regime, Top};
use std::sync::Arc;
use umbra_arch::control::{ControlLimits, ControlRegs, Effects};
use umbra_arch::paging::{Access, AccessKind, PagingMode, entry};
use umbra_arch::{Fault, Gpa, Gva};
use umbra_memory::{Backing, GuestMemory, RamOffset};

/// What a change of role or root does to the others.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum MmuMode {
    /// Nothing: they stay for later.
    #[default]
    NoUnload,
    /// All roots are unloaded, as KVM does at present.
    UnloadAlways,
    /// Caches are dropped at pseudo-random moments, drawn from this seed; a test of coherence.
    DropAtRandom(u64),
}

/// Choices at creation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MmuOptions {
    /// What a change of role or root does to the others.
    pub mode: MmuMode,
    /// Put WP, SMEP and SMAP into page roles, as KVM does.
    pub kvm_role: bool,
}

/// A translated byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// Its physical address.
    pub gpa: Gpa,
    /// Its backing; the offset is the byte's own.
    pub backing: Backing,
}

/// The MMU of one processor.
pub struct Mmu {
    mem: Arc<GuestMemory>,
    format: Format,
    regs: ControlRegs,
    role: CpuRole,
    cpl: u8,
    ac: bool,
    pkru: u32,
    pkrs: u32,
    stats: MmuStats,
}

impl Mmu {
    /// An MMU over `mem`, with paging off.
    pub fn new(mem: Arc<GuestMemory>, limits: ControlLimits, options: MmuOptions) -> Mmu {
        let _ = options;
        let regs = ControlRegs::default();
        let role = CpuRole::of(&regs);
        Mmu {
            mem,
            format: Format::intel(limits.maxphyaddr),
            regs,
            role,
            cpl: 0,
            ac: false,
            pkru: 0,
            pkrs: 0,
            stats: MmuStats::default(),
        }
    }

    /// CPUID changed: everything cached goes.
    pub fn set_limits(&mut self, limits: ControlLimits) {
        self.format.maxphyaddr = limits.maxphyaddr;
    }

    /// After every commit of control registers: counts the flush, selects the root.
    pub fn apply(&mut self, effects: &Effects) {
        self.stats.count_flush(effects.flush);
        self.reset_to(&effects.regs);
    }

    /// Host-initiated replacement of the control registers.
    pub fn reset_to(&mut self, regs: &ControlRegs) {
        self.regs = *regs;
        self.role = CpuRole::of(regs);
    }

    /// CPL or RFLAGS.AC changed.
    #[inline]
    pub fn set_view(&mut self, cpl: u8, ac: bool) {
        self.cpl = cpl;
        self.ac = ac;
    }

    /// PKRU changed.
    pub fn set_pkru(&mut self, pkru: u32) {
        self.pkru = pkru;
    }

    /// IA32_PKRS changed.
    pub fn set_pkrs(&mut self, pkrs: u32) {
        self.pkrs = pkrs;
    }

    /// The fast translation of `bytes` bytes at `gva` for a read; `None` on a miss or at a page's end.
    #[inline(always)]
    pub fn lookup_read(&self, _gva: Gva, _bytes: u64) -> Option<RamOffset> {
        None
    }

    /// As [`lookup_read`](Self::lookup_read) for a write that nobody has to be told of.
    #[inline(always)]
    pub fn lookup_write(&self, _gva: Gva, _bytes: u64) -> Option<RamOffset> {
        None
    }

    /// As [`lookup_read`](Self::lookup_read) for an instruction fetch's first byte.
    #[inline(always)]
    pub fn lookup_fetch(&self, _gva: Gva) -> Option<RamOffset> {
        None
    }

    fn regime(&self) -> Regime {
        let role = self.role.root_page_role(false);
        let top = match self.role.mode {
            PagingMode::Off => Top::Direct,
            PagingMode::Pae => Top::Pdptes(self.regs.pdpte.map(|e| if e & entry::P != 0 { e } else { 0 })),
            mode => Top::Table(self.regs.cr3.table(mode)),
        };
        Regime { top, role, format: self.format }
    }

    fn view(&self) -> View {
        View::of(&self.role, self.cpl, self.ac, self.pkru, self.pkrs)
    }

    /// Translates one byte, sets A and D bits, fills the fast tables.
    ///
    /// # Errors
    /// #PF with its error code and the address for CR2.
    pub fn translate(&mut self, gva: Gva, access: Access) -> Result<Translation, Fault> {
        let (regime, view) = (self.regime(), self.view());
        let mut tables = MemoryTables { mem: &self.mem, reads: 0 };
        let found = walk::walk(&mut tables, &regime, gva, access, &view)?;
        self.stats.entries_read += tables.reads;
        self.stats.walks += 1;
        let backing = self.mem.map(found.gpa.page()).at(found.gpa.offset());
        if let (Backing::Ram(off), AccessKind::Write) = (backing, access.kind) {
            self.mem.note_store(off, 1);
        }
        Ok(Translation { gpa: found.gpa, backing })
    }

    /// Translates one byte and changes nothing: for debuggers.
    ///
    /// # Errors
    /// As [`translate`](Self::translate).
    pub fn peek(&self, gva: Gva, access: Access) -> Result<Translation, Fault> {
        let mut tables = MemoryTables { mem: &self.mem, reads: 0 };
        let found = walk::look(&mut tables, &self.regime(), gva, access, &self.view())?;
        let backing = self.mem.map(found.gpa.page()).at(found.gpa.offset());
        Ok(Translation { gpa: found.gpa, backing })
    }

    /// After a store of `bytes` bytes at `gpa` hit a WATCHED page, and for each entry of the journal.
    pub fn table_written(&mut self, _gpa: Gpa, _bytes: u32) {
        self.stats.table_writes += 1;
    }

    /// CODE or WATCHED was set for the page that holds `off`: no fast write may hit it any more.
    pub fn code_page_changed(&mut self, _off: RamOffset) {}

    /// INVLPG. Counts; nothing needs dropping.
    pub fn invlpg(&mut self, _gva: Gva) {
        self.stats.flushes_page += 1;
    }

    /// INVPCID of a legal type and operand. Counts; nothing needs dropping.
    pub fn invpcid(&mut self, kind: u64, _pcid: u16, _gva: Gva) {
        match kind {
            0 => self.stats.flushes_page += 1,
            1 => self.stats.flushes_pcid_non_global += 1,
            2 => self.stats.flushes_all += 1,
            _ => self.stats.flushes_all_non_global += 1,
        }
    }

    /// Equal stamps: translations of fetches taken since the first are still valid.
    #[inline(always)]
    pub fn fetch_stamp(&self) -> u64 {
        0
    }

    /// Event counts.
    pub fn stats(&self) -> &MmuStats {
        &self.stats
    }

    /// Checks every cached entry against the guest's tables.
    ///
    /// # Errors
    /// Says what is wrong: a bug in this crate or a store that was not reported.
    pub fn audit(&self) -> Result<(), String> {
        Ok(())
    }

    /// Drops all fast translations.
    pub fn drop_all_contexts(&mut self) {}

    /// Drops all shadow pages and fast translations.
    pub fn drop_all_shadow(&mut self) {}
}
