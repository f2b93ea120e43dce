//! A processor's share of the MMU's work: control registers, accesses with their fast path first,
//! stores with their reports.

use std::sync::Arc;
use umbra_arch::control::{CodeContext, ControlLimits, ControlRegs, Cr0, Cr3, Cr4, Efer, Effects};
use umbra_arch::paging::{Access, AccessKind, entry};
use umbra_arch::{Fault, Gpa, Gva};
use umbra_memory::{Backing, GuestMemory, PageFlags, Watcher};
use umbra_mmu::{Mmu, MmuOptions};

pub const P: u64 = entry::P;
pub const W: u64 = entry::W;
pub const U: u64 = entry::U;
pub const A: u64 = entry::A;
pub const D: u64 = entry::D;
pub const PS: u64 = entry::PS;
pub const G: u64 = entry::G;
pub const XD: u64 = entry::XD;
pub const PWU: u64 = P | W | U;

pub const CR4_ALL: u64 = Cr4::VME
    | Cr4::PSE
    | Cr4::PAE
    | Cr4::PGE
    | Cr4::LA57
    | Cr4::PCIDE
    | Cr4::SMEP
    | Cr4::SMAP
    | Cr4::PKE
    | Cr4::CET
    | Cr4::PKS;

pub const LIMITS: ControlLimits =
    ControlLimits { maxphyaddr: 40, cr4_allowed: CR4_ALL, efer_allowed: Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE };

/// Error codes as the scenarios write them.
pub fn code(result: Result<Gpa, Fault>) -> Option<u32> {
    result.err().and_then(|fault| fault.code)
}

/// A processor with a little memory. Tables are taken from `next_table` on.
pub struct Rig {
    pub mem: Arc<GuestMemory>,
    pub mmu: Mmu,
    pub regs: ControlRegs,
    pub limits: ControlLimits,
    pub cs_long: bool,
    pub cpl: u8,
    pub ac: bool,
    next_table: u64,
}

impl Rig {
    /// Paging off, 4 MiB of RAM.
    pub fn new() -> Rig {
        Rig::with(MmuOptions::default())
    }

    pub fn with(options: MmuOptions) -> Rig {
        Rig::watching(Watcher::sole(Arc::new(GuestMemory::new(8 << 20).expect("8 MiB"))), options)
    }

    /// One of several over one memory.
    pub fn watching(watcher: Watcher, options: MmuOptions) -> Rig {
        let mem = watcher.memory().clone();
        let mut mmu = Mmu::watching(watcher, LIMITS, options);
        let regs = ControlRegs { cr0: Cr0::new(Cr0::PE | Cr0::ET | Cr0::NE), ..ControlRegs::default() };
        mmu.reset_to(&regs);
        Rig { mem, mmu, regs, limits: LIMITS, cs_long: false, cpl: 0, ac: false, next_table: 0x10_0000 }
    }

    /// 4-level paging with WP and NXE; CR3 is a fresh empty table.
    pub fn long() -> Rig {
        Rig::long_with(MmuOptions::default())
    }

    pub fn long_with(options: MmuOptions) -> Rig {
        let mut rig = Rig::with(options);
        let root = rig.table();
        rig.enter_long(root);
        rig
    }

    pub fn enter_long(&mut self, root: u64) {
        self.cs_long = false;
        self.cr4(self.regs.cr4.raw() | Cr4::PAE).expect("PAE");
        self.efer(Efer::LME | Efer::NXE).expect("LME");
        self.cr3(root).expect("CR3");
        self.cr0(self.regs.cr0.raw() | Cr0::PG | Cr0::WP).expect("PG");
    }

    /// A zeroed page for a table.
    pub fn table(&mut self) -> u64 {
        let table = self.next_table;
        self.next_table += 0x1000;
        table
    }

    fn commit(&mut self, effects: Result<Effects, Fault>) -> Result<(), Fault> {
        let effects = effects?;
        self.regs = effects.regs;
        self.mmu.apply(&effects);
        Ok(())
    }

    fn pdpte_reader(&self) -> impl FnMut(Gpa) -> [u64; 4] + use<> {
        let mem = self.mem.clone();
        move |gpa| {
            std::array::from_fn(|i| {
                let mut bytes = [0; 8];
                mem.read(gpa.add(8 * i as u64), &mut bytes);
                u64::from_le_bytes(bytes)
            })
        }
    }

    pub fn cr0(&mut self, value: u64) -> Result<(), Fault> {
        let code = CodeContext { cs_long: self.cs_long, tss16: false };
        let effects = self.regs.write_cr0(value, code, &self.limits, &mut self.pdpte_reader());
        self.commit(effects)
    }
    pub fn cr3(&mut self, value: u64) -> Result<(), Fault> {
        let effects = self.regs.write_cr3(value, &self.limits, &mut self.pdpte_reader());
        self.commit(effects)
    }
    pub fn cr4(&mut self, value: u64) -> Result<(), Fault> {
        let effects = self.regs.write_cr4(value, &self.limits, &mut self.pdpte_reader());
        self.commit(effects)
    }
    pub fn efer(&mut self, value: u64) -> Result<(), Fault> {
        let effects = self.regs.write_efer(value, &self.limits);
        self.commit(effects)
    }
    /// A host-initiated write of EFER.
    pub fn host_efer(&mut self, value: u64) {
        let effects = self.regs.host_write_efer(value);
        self.commit(Ok(effects)).expect("never refused");
    }
    /// A host-initiated replacement of them all; false if they contradict each other.
    pub fn host_registers(&mut self, cr0: u64, cr3: u64, cr4: u64, efer: u64, pdpte: [u64; 4]) -> bool {
        let new =
            ControlRegs { cr0: Cr0::new(cr0), cr3: Cr3::new(cr3), cr4: Cr4::new(cr4), efer: Efer::new(efer), pdpte };
        let Ok(effects) = self.regs.host_replace(new, self.cs_long, &self.limits) else { return false };
        self.regs = effects.regs;
        self.mmu.reset_to(&effects.regs);
        true
    }
    pub fn init(&mut self) {
        let effects = self.regs.init();
        self.commit(Ok(effects)).expect("never refused");
    }
    pub fn set_cr0(&mut self, bit: u64, on: bool) {
        let old = self.regs.cr0.raw();
        self.cr0(if on { old | bit } else { old & !bit }).expect("legal CR0");
    }
    pub fn set_cr4(&mut self, bit: u64, on: bool) {
        let old = self.regs.cr4.raw();
        self.cr4(if on { old | bit } else { old & !bit }).expect("legal CR4");
    }
    pub fn set_nxe(&mut self, on: bool) {
        let old = self.regs.efer.raw();
        self.efer(if on { old | Efer::NXE } else { old & !Efer::NXE }).expect("legal EFER");
    }
    pub fn view(&mut self, cpl: u8, ac: bool) {
        (self.cpl, self.ac) = (cpl, ac);
        self.mmu.set_view(cpl, ac);
    }

    /// A device's or the host's write, reported through the journal.
    pub fn poke(&mut self, gpa: u64, value: u64) {
        self.poke_bytes(gpa, &value.to_le_bytes());
    }
    pub fn poke32(&mut self, gpa: u64, value: u32) {
        self.poke_bytes(gpa, &value.to_le_bytes());
    }
    pub fn poke_bytes(&mut self, gpa: u64, bytes: &[u8]) {
        self.mem.write(Gpa::new(gpa), bytes);
        self.drain();
    }
    pub fn drain(&mut self) {
        if self.mmu.watcher().is_pending() {
            for change in self.mmu.watcher().take_changes() {
                self.mmu.memory_changed(change);
            }
        }
    }
    pub fn peek64(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        self.mem.read(Gpa::new(gpa), &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Address of the entry at `level` for `gva` under the table `root` at `top` level, making
    /// intermediate tables with `flags`.
    pub fn entry_at(&mut self, root: u64, top: u32, level: u32, gva: u64, flags: u64) -> u64 {
        let mut table = root;
        for l in (level + 1..=top).rev() {
            let at = table + (gva >> (12 + 9 * (l - 1)) & 511) * 8;
            let mut entry = self.peek64(at);
            if entry & P == 0 {
                entry = self.table() | flags;
                self.poke(at, entry);
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        table + (gva >> (12 + 9 * (level - 1)) & 511) * 8
    }

    /// Maps a 4 KiB page in 4-level tables under the current CR3; the leaf's address.
    pub fn map(&mut self, gva: u64, leaf: u64) -> u64 {
        let at = self.entry_at(self.regs.cr3.raw() & !0xfff, 4, 1, gva, PWU);
        self.poke(at, leaf);
        at
    }

    fn try_fast(&self, gva: u64, kind: AccessKind) -> Option<u64> {
        let gva = Gva::new(gva);
        match kind {
            AccessKind::Read => self.mmu.lookup_read(gva, 1),
            AccessKind::Write => self.mmu.lookup_write(gva, 1).or_else(|| self.mmu.lookup_reported_write(gva, 1)),
            AccessKind::Fetch => self.mmu.lookup_fetch(gva),
        }
        .map(|off| off.raw())
    }

    /// One access as a processor makes it; a write is followed by its report, though nothing is stored.
    pub fn access(&mut self, gva: u64, access: Access) -> Result<Gpa, Fault> {
        if !access.implicit
            && let Some(off) = self.try_fast(gva, access.kind)
        {
            let peek = self.mmu.peek(Gva::new(gva), access).expect("a fast hit is no fault");
            assert_eq!(peek.backing.readable().map(|o| o.raw()), Some(off), "fast path of {gva:#x}");
            return Ok(peek.gpa);
        }
        let done = self.mmu.translate(Gva::new(gva), access)?;
        Ok(done.gpa)
    }

    pub fn read(&mut self, gva: u64) -> Result<Gpa, Fault> {
        self.access(gva, Access::explicit(AccessKind::Read, self.cpl))
    }
    pub fn write(&mut self, gva: u64) -> Result<Gpa, Fault> {
        self.access(gva, Access::explicit(AccessKind::Write, self.cpl))
    }
    pub fn fetch(&mut self, gva: u64) -> Result<Gpa, Fault> {
        self.access(gva, Access::explicit(AccessKind::Fetch, self.cpl))
    }
    pub fn implicit_read(&mut self, gva: u64) -> Result<Gpa, Fault> {
        self.access(gva, Access::implicit(AccessKind::Read))
    }

    /// A store by the running instruction, through the tables.
    pub fn store64(&mut self, gva: u64, value: u64) -> Result<(), Fault> {
        if let Some(off) = self.mmu.lookup_write(Gva::new(gva), 8) {
            self.mem.store(off, value);
            return Ok(());
        }
        if let Some(off) = self.mmu.lookup_reported_write(Gva::new(gva), 8) {
            self.mem.store(off, value);
            self.mmu.frame_written(off, 8);
            return Ok(());
        }
        let done = self.mmu.translate(Gva::new(gva), Access::explicit(AccessKind::Write, self.cpl))?;
        if let Backing::Ram(off) = done.backing {
            self.mem.store(off, value);
            self.mem.note_store(off, 8);
            self.mmu.watcher().stored(done.gpa, off, 8);
            if self.mem.page_flags(off).contains(PageFlags::WATCHED) {
                self.mmu.table_written(done.gpa, 8);
            }
        }
        Ok(())
    }

    pub fn audit(&self) {
        if let Err(what) = self.mmu.audit() {
            panic!("audit: {what}");
        }
    }
}

/// The error codes of user and supervisor read, write and fetch of one address, 0 where allowed:
/// `[user r, user w, user x, supervisor r, supervisor w, supervisor x]`.
pub fn all_six(rig: &mut Rig, gva: u64) -> [u32; 6] {
    let (cpl, ac) = (rig.cpl, rig.ac);
    let mut codes = [0; 6];
    for (i, (level, kind)) in [3, 0]
        .into_iter()
        .flat_map(|l| [AccessKind::Read, AccessKind::Write, AccessKind::Fetch].map(|k| (l, k)))
        .enumerate()
    {
        rig.view(level, ac);
        codes[i] = code(rig.access(gva, Access::explicit(kind, level))).unwrap_or(0);
    }
    rig.view(cpl, ac);
    codes
}
