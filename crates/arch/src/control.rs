//! Control registers: pure legality and effects of each write.
//!
//! A write validates everything first, PDPTEs included, and only then yields the new registers and
//! the architectural flush it demands ("MOV-Move to/from Control Registers", "Control Registers",
//! "Operations that Invalidate TLBs and Paging-Structure Caches"). Nothing here touches a cache.

use crate::fault::Fault;
use crate::paging::PagingMode;
use crate::{Gpa, rflags};
use serde::{Deserialize, Serialize};

macro_rules! control_register {
    ($(#[$doc:meta])* $name:ident { $($(#[$bitdoc:meta])* $method:ident $konst:ident = $bit:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a raw value; legality is [`ControlRegs`]' business.
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }
            /// The raw value.
            #[inline(always)]
            pub const fn raw(self) -> u64 {
                self.0
            }
            $(
                $(#[$bitdoc])*
                pub const $konst: u64 = 1 << $bit;
                $(#[$bitdoc])*
                #[inline(always)]
                pub const fn $method(self) -> bool {
                    self.0 & Self::$konst != 0
                }
            )*
        }
    };
}

control_register! {
    /// CR0.
    Cr0 {
        /// Protection enable.
        pe PE = 0;
        /// Monitor coprocessor.
        mp MP = 1;
        /// x87 emulation.
        em EM = 2;
        /// Task switched.
        ts TS = 3;
        /// Extension type; reads as 1.
        et ET = 4;
        /// Numeric error.
        ne NE = 5;
        /// Write protect.
        wp WP = 16;
        /// Alignment mask.
        am AM = 18;
        /// Not write-through.
        nw NW = 29;
        /// Cache disable.
        cd CD = 30;
        /// Paging.
        pg PG = 31;
    }
}

impl Cr0 {
    /// After reset: CD, NW and ET set.
    pub const RESET: Cr0 = Cr0(Cr0::CD | Cr0::NW | Cr0::ET);
    /// Bits that a write can change.
    const DEFINED: u64 =
        Cr0::PE | Cr0::MP | Cr0::EM | Cr0::TS | Cr0::NE | Cr0::WP | Cr0::AM | Cr0::NW | Cr0::CD | Cr0::PG;
}

control_register! {
    /// CR4.
    Cr4 {
        /// Virtual-8086 mode extensions.
        vme VME = 0;
        /// Protected-mode virtual interrupts.
        pvi PVI = 1;
        /// Time-stamp disable.
        tsd TSD = 2;
        /// Debugging extensions.
        de DE = 3;
        /// Page size extensions.
        pse PSE = 4;
        /// Physical address extension.
        pae PAE = 5;
        /// Machine-check enable.
        mce MCE = 6;
        /// Page global enable.
        pge PGE = 7;
        /// RDPMC at every privilege level.
        pce PCE = 8;
        /// FXSAVE and SSE.
        osfxsr OSFXSR = 9;
        /// Unmasked SIMD exceptions.
        osxmmexcpt OSXMMEXCPT = 10;
        /// User-mode instruction prevention.
        umip UMIP = 11;
        /// 57-bit linear addresses.
        la57 LA57 = 12;
        /// VMX enable.
        vmxe VMXE = 13;
        /// SMX enable.
        smxe SMXE = 14;
        /// RDFSBASE and friends.
        fsgsbase FSGSBASE = 16;
        /// Process-context identifiers.
        pcide PCIDE = 17;
        /// XSAVE.
        osxsave OSXSAVE = 18;
        /// Supervisor-mode execution prevention.
        smep SMEP = 20;
        /// Supervisor-mode access prevention.
        smap SMAP = 21;
        /// Protection keys for user pages.
        pke PKE = 22;
        /// Control-flow enforcement.
        cet CET = 23;
        /// Protection keys for supervisor pages.
        pks PKS = 24;
    }
}

control_register! {
    /// EFER.
    Efer {
        /// SYSCALL enable.
        sce SCE = 0;
        /// IA-32e mode enable.
        lme LME = 8;
        /// IA-32e mode active.
        lma LMA = 10;
        /// Execute-disable enable.
        nxe NXE = 11;
    }
}

/// CR3: the root table's address, PCID or cache bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[repr(transparent)]
pub struct Cr3(u64);

impl Cr3 {
    /// In the source of MOV to CR3 with CR4.PCIDE = 1: keep the PCID's translations.
    pub const NO_FLUSH: u64 = 1 << 63;

    /// Wraps a raw value.
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }
    /// The raw value.
    #[inline(always)]
    pub const fn raw(self) -> u64 {
        self.0
    }
    /// Bits 11:0, meaningful as a PCID with CR4.PCIDE = 1.
    pub const fn pcid(self) -> u16 {
        (self.0 & 0xfff) as u16
    }
    /// Physical address of the root table in `mode` (for PAE of the 32-byte aligned PDPTEs).
    pub const fn table(self, mode: PagingMode) -> Gpa {
        Gpa::new(match mode {
            PagingMode::Off => 0,
            PagingMode::TwoLevel => self.0 & 0xffff_f000,
            PagingMode::Pae if cfg!(umbra_mutant = "pdptes-at-a-page") => self.0 & 0xffff_f000,
            PagingMode::Pae => self.0 & 0xffff_ffe0,
            PagingMode::FourLevel | PagingMode::FiveLevel => self.0 & 0x000f_ffff_ffff_f000,
        })
    }
}

/// What the processor (its CPUID profile) allows in control registers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ControlLimits {
    /// MAXPHYADDR: number of physical-address bits, 32..=52.
    pub maxphyaddr: u8,
    /// CR4 bits that CPUID enumerates.
    pub cr4_allowed: u64,
    /// EFER bits that CPUID enumerates (LMA included where LME is).
    pub efer_allowed: u64,
}

impl ControlLimits {
    /// Bits of a physical address that must be 0: 51:MAXPHYADDR.
    pub const fn reserved_address_bits(&self) -> u64 {
        (!0u64 << self.maxphyaddr) & 0x000f_ffff_ffff_ffff
    }
    /// Whether a *present* PDPTE of PAE paging has a reserved bit set ("PDPTE Registers").
    pub const fn pdpte_is_bad(&self, pdpte: u64) -> bool {
        let reserved = 0x1e6 | (!0u64 << self.maxphyaddr);
        pdpte & 1 != 0 && pdpte & reserved != 0
    }
}

/// The registers that govern paging.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct ControlRegs {
    /// CR0.
    pub cr0: Cr0,
    /// CR3.
    pub cr3: Cr3,
    /// CR4.
    pub cr4: Cr4,
    /// EFER.
    pub efer: Efer,
    /// Latched PDPTEs; meaningful in PAE paging only.
    pub pdpte: [u64; 4],
}

/// The rest of the processor state that legality depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct CodeContext {
    /// CS.L of the running code segment.
    pub cs_long: bool,
    /// TR holds a 16-bit TSS.
    pub tss16: bool,
}

/// Which TLB entries the architecture demands to be gone.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlushScope {
    /// Nothing.
    #[default]
    None,
    /// Non-global entries of one PCID and its paging-structure caches (MOV to CR3, INVPCID type 1).
    PcidNonGlobal(u16),
    /// All entries of one PCID, global ones too (CR4.PAE and SMEP changes).
    Pcid(u16),
    /// All non-global entries of all PCIDs (INVPCID type 3).
    AllNonGlobal,
    /// Everything.
    All,
}

/// A legal write's result: commit `regs`, count `flush`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Effects {
    /// The registers after the write, LMA and PDPTEs included.
    pub regs: ControlRegs,
    /// The architectural flush.
    pub flush: FlushScope,
    /// PDPTEs were (re)loaded from memory.
    pub pdptes_loaded: bool,
    /// Cached contexts that a later no-flush MOV to CR3 could select must count as flushed too
    /// (CR4.PCIDE 0->1), although the architecture flushes nothing now.
    pub forget_pcids: bool,
}

/// Reads the four PDPTEs at a 32-byte aligned physical address; absent memory reads as all ones.
pub type ReadPdptes<'a> = &'a mut dyn FnMut(Gpa) -> [u64; 4];

const CR0_PDPTE_BITS: u64 = Cr0::CD | Cr0::NW | Cr0::PG;
const CR4_PDPTE_BITS: u64 =
    Cr4::PAE | Cr4::PSE | Cr4::SMEP | if cfg!(umbra_mutant = "pge-change-keeps-pdptes") { 0 } else { Cr4::PGE };

impl ControlRegs {
    /// The paging mode in force.
    pub const fn mode(&self) -> PagingMode {
        PagingMode::of(self.cr0, self.cr4, self.efer)
    }

    /// The PCID in force: 0 with CR4.PCIDE = 0.
    pub const fn pcid(&self) -> u16 {
        if self.cr4.pcide() { self.cr3.pcid() } else { 0 }
    }

    fn effects(self, flush: FlushScope) -> Effects {
        Effects { regs: self, flush, pdptes_loaded: false, forget_pcids: false }
    }

    /// Loads the PDPTEs that `self` selects; #GP leaves the caller's registers alone.
    fn load_pdptes(&mut self, limits: &ControlLimits, read: ReadPdptes<'_>) -> Result<(), Fault> {
        let pdpte = read(self.cr3.table(PagingMode::Pae));
        if pdpte.iter().any(|&e| limits.pdpte_is_bad(e)) {
            return Err(Fault::GP0);
        }
        self.pdpte = pdpte;
        Ok(())
    }

    /// MOV to CR0 (LMSW and CLTS come here too with the value they make).
    ///
    /// # Errors
    /// #GP(0) as in "MOV-Move to/from Control Registers"; nothing changes then.
    pub fn write_cr0(
        &self,
        value: u64,
        code: CodeContext,
        limits: &ControlLimits,
        read: ReadPdptes<'_>,
    ) -> Result<Effects, Fault> {
        let old = self.cr0;
        if value >> 32 != 0 {
            return Err(Fault::GP0);
        }
        let new = Cr0(value & Cr0::DEFINED | Cr0::ET);
        if new.pg() && !new.pe() || new.nw() && !new.cd() || !new.wp() && self.cr4.cet() {
            return Err(Fault::GP0);
        }
        let mut regs = Self { cr0: new, ..*self };
        if new.pg() && !old.pg() && self.efer.lme() {
            if !self.cr4.pae() || code.cs_long || code.tss16 {
                return Err(Fault::GP0);
            }
            regs.efer = Efer(self.efer.0 | Efer::LMA);
        }
        if !new.pg() {
            // A host-initiated write may have left PCIDE set with PG clear: the result counts, not the change.
            if self.efer.lma() && code.cs_long || self.cr4.pcide() {
                return Err(Fault::GP0);
            }
            regs.efer = Efer(self.efer.0 & !Efer::LMA);
        }
        let flush = if old.pg() && !new.pg() { FlushScope::All } else { FlushScope::None };
        let mut effects = regs.effects(flush);
        if regs.mode() == PagingMode::Pae && (old.0 ^ new.0) & CR0_PDPTE_BITS != 0 {
            effects.regs.load_pdptes(limits, read)?;
            effects.pdptes_loaded = true;
        }
        Ok(effects)
    }

    /// MOV to CR3, and a task switch's load (which passes CR3 of the TSS).
    ///
    /// # Errors
    /// #GP(0) for reserved bits and bad PDPTEs; nothing changes then.
    pub fn write_cr3(&self, value: u64, limits: &ControlLimits, read: ReadPdptes<'_>) -> Result<Effects, Fault> {
        let mut value = value;
        let mut flush = FlushScope::PcidNonGlobal(0);
        if self.cr4.pcide() {
            flush = FlushScope::PcidNonGlobal((value & 0xfff) as u16);
            if value & Cr3::NO_FLUSH != 0 {
                flush = FlushScope::None;
                value &= !Cr3::NO_FLUSH;
            }
        }
        if self.efer.lma() {
            if value & (!0u64 << limits.maxphyaddr) != 0 {
                return Err(Fault::GP0);
            }
        } else {
            value &= 0xffff_ffff;
        }
        let mut effects = Self { cr3: Cr3(value), ..*self }.effects(flush);
        if self.mode() == PagingMode::Pae {
            effects.regs.load_pdptes(limits, read)?;
            effects.pdptes_loaded = true;
        }
        Ok(effects)
    }

    /// MOV to CR4.
    ///
    /// # Errors
    /// #GP(0) as in "MOV-Move to/from Control Registers"; nothing changes then.
    pub fn write_cr4(&self, value: u64, limits: &ControlLimits, read: ReadPdptes<'_>) -> Result<Effects, Fault> {
        let (old, new) = (self.cr4, Cr4(value));
        let changed = old.0 ^ new.0;
        let lma = self.efer.lma();
        if value & !limits.cr4_allowed != 0
            || lma && !new.pae()
            || lma && changed & Cr4::LA57 != 0
            || new.cet() && !self.cr0.wp()
        {
            return Err(Fault::GP0);
        }
        if new.pcide() && !old.pcide() && (!lma || self.cr3.pcid() != 0) {
            return Err(Fault::GP0);
        }
        let flush = if changed & Cr4::PGE != 0 || old.pcide() && !new.pcide() {
            FlushScope::All
        } else if changed & Cr4::PAE != 0 || new.smep() && !old.smep() {
            FlushScope::Pcid(self.pcid())
        } else {
            FlushScope::None
        };
        let mut effects = Self { cr4: new, ..*self }.effects(flush);
        effects.forget_pcids = new.pcide() && !old.pcide();
        if effects.regs.mode() == PagingMode::Pae && changed & CR4_PDPTE_BITS != 0 {
            effects.regs.load_pdptes(limits, read)?;
            effects.pdptes_loaded = true;
        }
        Ok(effects)
    }

    /// WRMSR of IA32_EFER by the guest. The written LMA is ignored.
    ///
    /// # Errors
    /// #GP(0) for bits that CPUID doesn't enumerate and for LME changes with paging on.
    pub fn write_efer(&self, value: u64, limits: &ControlLimits) -> Result<Effects, Fault> {
        if value & !(limits.efer_allowed | Efer::LMA) != 0 {
            return Err(Fault::GP0);
        }
        if (value ^ self.efer.0) & Efer::LME != 0 && self.cr0.pg() {
            return Err(Fault::GP0);
        }
        let efer = Efer(value & !Efer::LMA | self.efer.0 & Efer::LMA);
        Ok(Self { efer, ..*self }.effects(FlushScope::None))
    }

    /// A host-initiated EFER write (restoring MSRs): LMA is kept, CPUID and the LME rule are not asked.
    pub fn host_write_efer(&self, value: u64) -> Effects {
        let efer = Efer(value & !Efer::LMA | self.efer.0 & Efer::LMA);
        Self { efer, ..*self }.effects(FlushScope::All)
    }

    /// Host-initiated replacement of all of them (restoring a snapshot, KVM_SET_SREGS). Combinations the
    /// guest could not reach (PCIDE without LMA, ...) are accepted and must be survived.
    ///
    /// # Errors
    /// Says which rule the values break; that is the caller's mistake, never a guest fault.
    pub fn host_replace(
        &self,
        new: ControlRegs,
        cs_long: bool,
        limits: &ControlLimits,
    ) -> Result<Effects, BadControlRegs> {
        let (cr0, cr4, efer) = (new.cr0, new.cr4, new.efer);
        if cr0.0 >> 32 != 0 {
            return Err(BadControlRegs::Cr0High(cr0.0));
        }
        if cr0.nw() && !cr0.cd() || cr0.pg() && !cr0.pe() {
            return Err(BadControlRegs::Cr0Combination(cr0.0));
        }
        if cr4.0 & !limits.cr4_allowed != 0 {
            return Err(BadControlRegs::Cr4Reserved(cr4.0 & !limits.cr4_allowed));
        }
        let efer_reserved = efer.0 & !(limits.efer_allowed | Efer::LMA);
        if efer_reserved != 0 {
            return Err(BadControlRegs::EferReserved(efer_reserved));
        }
        let long = efer.lme() && cr0.pg();
        if long != efer.lma() || long && !cr4.pae() || !long && cs_long {
            return Err(BadControlRegs::LongMode);
        }
        if long && new.cr3.0 & (!0u64 << limits.maxphyaddr) != 0 {
            return Err(BadControlRegs::Cr3Reserved(new.cr3.0));
        }
        Ok(Effects { regs: new, flush: FlushScope::All, pdptes_loaded: false, forget_pcids: true })
    }

    /// INIT ("Processor State After Reset"): CD and NW survive, everything else is as after reset.
    pub fn init(&self) -> Effects {
        let cr0 = Cr0(self.cr0.0 & (Cr0::CD | Cr0::NW) | Cr0::ET);
        Self { cr0, ..Self::default() }.effects(FlushScope::All)
    }
}

/// Host-supplied control registers that no processor accepts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum BadControlRegs {
    /// Bits 63:32 of CR0.
    #[error("CR0 {0:#x} has bits set above bit 31: clear them")]
    Cr0High(u64),
    /// NW without CD, or PG without PE.
    #[error("CR0 {0:#x} has NW without CD or PG without PE")]
    Cr0Combination(u64),
    /// Bits that CPUID doesn't enumerate.
    #[error("CR4 bits {0:#x} are not offered by this CPU profile: choose another --cpu or clear them")]
    Cr4Reserved(u64),
    /// Bits that CPUID doesn't enumerate.
    #[error("EFER bits {0:#x} are not offered by this CPU profile: choose another --cpu or clear them")]
    EferReserved(u64),
    /// LME and PG need PAE and LMA; without them LMA and CS.L must be 0.
    #[error("EFER.LME, CR0.PG, CR4.PAE, EFER.LMA and CS.L contradict each other")]
    LongMode,
    /// Address bits at or above MAXPHYADDR.
    #[error("CR3 {0:#x} has address bits at or above MAXPHYADDR")]
    Cr3Reserved(u64),
}

/// Flags that an access's rights depend on and that are in no control register.
pub const VIEW_RFLAGS: u64 = rflags::AC;
