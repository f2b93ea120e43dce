//! Roles: what a change of control registers means for paging, as pure functions.
//!
//! Three types keep apart what KVM's role words mix: [`CpuRole`] governs how the guest's tables are
//! read at all, [`PageRole`] is the part that a shadow page's decoded entries depend on, and [`View`]
//! is everything that only decides whether an access to a known translation is allowed.

use serde::Serialize;
use std::fmt;
use umbra_arch::control::ControlRegs;
use umbra_arch::paging::PagingMode;

/// Everything in the registers that governs paging, apart from the tables' address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
pub struct CpuRole {
    /// The paging mode; with [`PagingMode::Off`] all other fields but `smm` and `guest_mode` are false.
    pub mode: PagingMode,
    /// EFER.NXE, where entries have an execute-disable bit (PAE and longer formats).
    pub nxe: bool,
    /// CR4.PSE, where it matters (2-level paging).
    pub pse: bool,
    /// CR0.WP.
    pub wp: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// CR4.PKE, where keys exist (4- and 5-level paging).
    pub pke: bool,
    /// CR4.PKS, where keys exist.
    pub pks: bool,
    /// CR4.CET.
    pub cet: bool,
    /// System-management mode.
    pub smm: bool,
    /// Running a nested guest.
    pub guest_mode: bool,
}

impl CpuRole {
    /// The role that these registers give, outside SMM and nested guests. With paging off CR4, EFER
    /// and CR0.WP have no say.
    pub const fn of(regs: &ControlRegs) -> Self {
        let mode = regs.mode();
        let paging = !matches!(mode, PagingMode::Off);
        let two_level = matches!(mode, PagingMode::TwoLevel);
        Self {
            mode,
            nxe: paging && (!two_level || cfg!(umbra_mutant = "nxe-in-2-level-paging")) && regs.efer.nxe(),
            pse: two_level && regs.cr4.pse(),
            wp: paging && regs.cr0.wp(),
            smep: paging && regs.cr4.smep(),
            smap: paging && regs.cr4.smap(),
            pke: mode.is_long() && regs.cr4.pke(),
            pks: mode.is_long() && regs.cr4.pks(),
            cet: paging && regs.cr4.cet(),
            smm: false,
            guest_mode: false,
        }
    }

    /// The role of this mode's topmost table (for PAE of the four page directories). `kvm` puts WP,
    /// SMEP and SMAP into the key as KVM does.
    pub const fn root_page_role(&self, kvm: bool) -> PageRole {
        let (format, level) = match self.mode {
            PagingMode::Off => (EntryFormat::None, 0),
            PagingMode::TwoLevel => (EntryFormat::Short, 2),
            PagingMode::Pae => (EntryFormat::Pae, 2),
            PagingMode::FourLevel => (EntryFormat::Long, 4),
            PagingMode::FiveLevel => (EntryFormat::Long, 5),
        };
        PageRole {
            level,
            format,
            nxe: self.nxe,
            pse: self.pse,
            smm: self.smm,
            guest_mode: self.guest_mode,
            wp: kvm && self.wp,
            smep: kvm && self.smep,
            smap: kvm && self.smap,
        }
    }

    /// Whether fetches are told apart in error codes: SMEP, or an execute-disable bit in force
    /// ("Page-Fault Exceptions").
    pub const fn reports_fetches(&self) -> bool {
        self.smep || self.nxe
    }
}

/// Writes the names of the flags that are set, each after a blank.
fn write_set(f: &mut fmt::Formatter<'_>, flags: &[(&str, bool)]) -> fmt::Result {
    flags.iter().filter(|(_, on)| *on).try_for_each(|(name, _)| write!(f, " {name}"))
}

impl fmt::Display for CpuRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.mode)?;
        let keys = [("pke", self.pke), ("pks", self.pks), ("cet", self.cet)];
        let rights = [("nxe", self.nxe), ("pse", self.pse), ("wp", self.wp), ("smep", self.smep), ("smap", self.smap)];
        write_set(f, &rights)?;
        write_set(f, &keys)?;
        write_set(f, &[("smm", self.smm), ("guest-mode", self.guest_mode)])
    }
}

/// The layout of a table's entries.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum EntryFormat {
    /// No tables: paging is off.
    None = 0,
    /// 4-byte entries of 2-level paging.
    Short = 1,
    /// 8-byte entries of PAE paging.
    Pae = 2,
    /// 8-byte entries of 4- and 5-level paging.
    Long = 3,
}

impl EntryFormat {
    /// Bytes of one entry.
    pub const fn entry_bytes(self) -> u64 {
        if matches!(self, EntryFormat::Short) { 4 } else { 8 }
    }
    /// log2 of the entries of one table.
    pub const fn index_bits(self) -> u32 {
        if matches!(self, EntryFormat::Short) { 10 } else { 9 }
    }
    /// log2 of the bytes that one entry of a table at `level` (1 is the last) covers.
    pub const fn shift(self, level: u8) -> u32 {
        12 + self.index_bits() * (level as u32 - 1)
    }
    /// The entry's index in a table at `level` for linear address `gva`.
    #[inline(always)]
    pub const fn index(self, level: u8, gva: u64) -> usize {
        ((gva >> self.shift(level)) & ((1 << self.index_bits()) - 1)) as usize
    }
}

/// What a shadow page is keyed by, beside its table's frame: all that its decoded entries depend on
/// except the CPUID facts of [`Format`](crate::format::Format), whose change drops everything.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
pub struct PageRole {
    /// The table's level; 1 holds 4 KiB leaves. 0 for the tableless root of paging off.
    pub level: u8,
    /// The entries' layout.
    pub format: EntryFormat,
    /// Bit 63 is execute-disable; else it is reserved.
    pub nxe: bool,
    /// Page-directory entries of 2-level paging can be 4 MiB leaves.
    pub pse: bool,
    /// Built in system-management mode.
    pub smm: bool,
    /// Built while a nested guest ran.
    pub guest_mode: bool,
    /// CR0.WP, only with KVM's keys.
    pub wp: bool,
    /// CR4.SMEP, only with KVM's keys.
    pub smep: bool,
    /// CR4.SMAP, only with KVM's keys.
    pub smap: bool,
}

impl PageRole {
    /// The role of the tables that this one's entries point to.
    pub const fn child(self) -> PageRole {
        PageRole { level: self.level.saturating_sub(1), ..self }
    }

    /// All of it in one word, for comparison.
    pub const fn word(self) -> u32 {
        self.level as u32
            | (self.format as u32) << 4
            | (self.nxe as u32) << 8
            | (self.pse as u32) << 9
            | (self.smm as u32) << 10
            | (self.guest_mode as u32) << 11
            | (self.wp as u32) << 12
            | (self.smep as u32) << 13
            | (self.smap as u32) << 14
    }
}

impl fmt::Display for PageRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} level {}", self.format, self.level)?;
        write_set(f, &[("nxe", self.nxe), ("pse", self.pse), ("smm", self.smm), ("guest-mode", self.guest_mode)])?;
        write_set(f, &[("wp", self.wp), ("smep", self.smep), ("smap", self.smap)])
    }
}

/// What decides about an access to a page whose raw rights are known ("Determination of Access
/// Rights"), and how its fault is reported.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct View {
    /// CPL is 3.
    pub user: bool,
    /// RFLAGS.AC.
    pub ac: bool,
    /// CR0.WP.
    pub wp: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// Faults of fetches carry the I/D bit.
    pub reports_fetches: bool,
    /// Protection keys in force for user pages.
    pub pke: bool,
    /// Protection keys in force for supervisor pages.
    pub pks: bool,
    /// PKRU: access-disable and write-disable bits of 16 keys.
    pub pkru: u32,
    /// IA32_PKRS, likewise for supervisor pages.
    pub pkrs: u32,
}

impl View {
    /// The view of implicit supervisor accesses (descriptor tables, TSS), at any CPL.
    pub(crate) const fn implicit(&self) -> Self {
        Self { user: false, ac: false, ..*self }
    }

    /// The view in `role` at privilege level `cpl` with RFLAGS.AC = `ac`.
    pub const fn of(role: &CpuRole, cpl: u8, ac: bool, pkru: u32, pkrs: u32) -> Self {
        Self {
            user: cpl == 3,
            ac,
            wp: role.wp,
            smep: role.smep,
            smap: role.smap,
            reports_fetches: role.reports_fetches(),
            pke: role.pke,
            pks: role.pks,
            pkru,
            pkrs,
        }
    }

    /// Supervisor data accesses to user pages are denied.
    pub const fn smap_enforced(&self, implicit: bool) -> bool {
        let implicit = implicit && !cfg!(umbra_mutant = "implicit-accesses-obey-ac");
        self.smap && (implicit || !self.ac)
    }

    /// The keys that any restriction holds for at present: user pages in bits 15:0, supervisor pages
    /// in bits 31:16.
    pub const fn restricted_keys(&self) -> u32 {
        let user = if self.pke { keys_of(self.pkru) } else { 0 };
        let supervisor = if self.pks { keys_of(self.pkrs) } else { 0 };
        user | supervisor << 16
    }
}

/// The keys with access-disable or write-disable set in a PKRU-shaped register.
const fn keys_of(register: u32) -> u32 {
    // One bit in two, pushed together by halves.
    let any = (register | register >> 1) & 0x5555_5555;
    let pairs = (any | any >> 1) & 0x3333_3333;
    let fours = (pairs | pairs >> 2) & 0x0f0f_0f0f;
    let eights = (fours | fours >> 4) & 0x00ff_00ff;
    (eights | eights >> 8) & 0xffff
}
