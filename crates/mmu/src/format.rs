//! What one table entry says: present, reserved, a table or a leaf (mmu formats of "Paging").

use crate::rights::Rights;
use crate::role::{EntryFormat, PageRole};
use umbra_arch::Gpa;
use umbra_arch::paging::entry;

/// CPUID facts that entries are read by and that no role holds. A change drops every shadow page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Format {
    /// MAXPHYADDR, 32..=52.
    pub maxphyaddr: u8,
    /// 1 GiB pages exist.
    pub gib_pages: bool,
    /// 4 MiB pages of 2-level paging reach above 4 GiB.
    pub pse36: bool,
    /// Bit 8 is reserved in PML4 and PML5 entries, as on AMD processors.
    pub amd: bool,
}

impl Format {
    /// A processor with `maxphyaddr` physical-address bits and otherwise everything an Intel one has.
    pub const fn intel(maxphyaddr: u8) -> Self {
        let clamped = if maxphyaddr < 32 {
            32
        } else if maxphyaddr > 52 {
            52
        } else {
            maxphyaddr
        };
        Self { maxphyaddr: clamped, gib_pages: true, pse36: true, amd: false }
    }
}

/// An entry, read under a role.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decoded {
    /// P is clear; the rest means nothing.
    NotPresent,
    /// P is set together with a reserved bit.
    Reserved,
    /// Points to a table one level down.
    Table {
        /// The table.
        table: Gpa,
        /// This entry's own rights.
        rights: Rights,
        /// A is set.
        accessed: bool,
    },
    /// Maps a page of the entry's size.
    Leaf {
        /// First byte of the page.
        base: Gpa,
        /// This entry's own rights, key included.
        rights: Rights,
        /// A is set.
        accessed: bool,
        /// D is set.
        dirty: bool,
    },
}

const fn bits(high: u32, low: u32) -> u64 {
    if high < low { 0 } else { (!0u64 >> (63 - high)) & (!0u64 << low) }
}

/// How the leaves of a table are read, or its other entries: what a [`Format`] and a role come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct EntryMasks {
    /// Bits that must be 0.
    reserved: u64,
    address: u64,
    /// Address bits 39:32, where a 4 MiB page has them.
    high_address: u64,
    execute_disable: u64,
    key: u64,
}

impl EntryMasks {
    /// The present entry `raw` has no reserved bit set.
    #[inline(always)]
    pub(crate) const fn are_legal(&self, raw: u64) -> bool {
        raw & self.reserved == 0
    }

    /// First byte of the page or table that `raw` leads to.
    #[inline(always)]
    pub(crate) const fn base(&self, raw: u64) -> Gpa {
        Gpa::new(raw & self.address | (raw & self.high_address) << 19)
    }

    /// What `raw` itself allows.
    #[inline(always)]
    pub(crate) const fn rights(&self, raw: u64) -> Rights {
        Rights {
            write: raw & entry::W != 0 || self.is_writable_by_mistake(raw),
            user: raw & entry::U != 0,
            exec: raw & self.execute_disable == 0,
            key: ((raw & self.key) >> KEY.trailing_zeros()) as u8,
        }
    }

    const fn is_writable_by_mistake(&self, raw: u64) -> bool {
        let large = self.address & 1 << 12 == 0;
        large && cfg!(umbra_mutant = "large-pages-always-writable")
            || large && cfg!(umbra_mutant = "wp-ignored-for-large-pages") && raw & entry::U == 0
    }
}

/// A leaf's protection key, in the formats that have one.
const KEY: u64 = bits(62, 59);

impl Format {
    /// Reads `raw` as an entry of a table with `role`.
    #[inline(always)]
    pub const fn decode(&self, raw: u64, role: PageRole) -> Decoded {
        if raw & entry::P == 0 {
            return Decoded::NotPresent;
        }
        let leaf = is_leaf(raw, role);
        let masks = self.masks(role, leaf);
        if !masks.are_legal(raw) {
            return Decoded::Reserved;
        }
        let (base, rights, accessed) = (masks.base(raw), masks.rights(raw), raw & entry::A != 0);
        if leaf {
            Decoded::Leaf { base, rights, accessed, dirty: raw & entry::D != 0 }
        } else {
            Decoded::Table { table: base, rights, accessed }
        }
    }

    /// How leaves, or other entries, of a table with `role` are read.
    #[inline(always)]
    pub(crate) const fn masks(&self, role: PageRole, leaf: bool) -> EntryMasks {
        let address = match role.format {
            EntryFormat::None => 0,
            EntryFormat::Short => 0xffff_f000,
            EntryFormat::Pae | EntryFormat::Long => bits(51, 12),
        };
        let large_short = leaf && matches!(role.format, EntryFormat::Short) && role.level == 2;
        EntryMasks {
            reserved: self.reserved(role, leaf),
            address: if leaf { address & !0u64 << role.format.shift(role.level) } else { address },
            high_address: if large_short && self.pse36 { bits(20, 13) } else { 0 },
            execute_disable: if role.nxe { entry::XD } else { 0 },
            key: if leaf && matches!(role.format, EntryFormat::Long) { KEY } else { 0 },
        }
    }

    /// Bits that must be 0 in a present entry.
    #[inline]
    const fn reserved(&self, role: PageRole, leaf: bool) -> u64 {
        let m = self.maxphyaddr as u32;
        let xd = if role.nxe { 0 } else { entry::XD };
        match role.format {
            EntryFormat::None => 0,
            EntryFormat::Short => {
                if role.level == 2 && leaf {
                    self.reserved_in_4m_leaf()
                } else {
                    0
                }
            }
            EntryFormat::Pae => {
                let large = if role.level > 1 && leaf { bits(20, 13) } else { 0 };
                bits(62, m) | xd | large
            }
            EntryFormat::Long => bits(51, m) | xd | self.reserved_in_long(role, leaf),
        }
    }

    const fn reserved_in_4m_leaf(&self) -> u64 {
        if !self.pse36 {
            return bits(21, 13);
        }
        let m = if self.maxphyaddr < 40 { self.maxphyaddr as u32 } else { 40 };
        bits(21, m - 19)
    }

    const fn reserved_in_long(&self, role: PageRole, leaf: bool) -> u64 {
        match role.level {
            4 | 5 => entry::PS | if self.amd { entry::G } else { 0 },
            3 if leaf && !self.gib_pages => entry::PS,
            3 if leaf => bits(29, 13),
            2 if leaf => bits(20, 13),
            _ => 0,
        }
    }
}

/// Whether `raw` maps a page, if it is present in a table with `role`.
#[inline]
pub(crate) const fn is_leaf(raw: u64, role: PageRole) -> bool {
    let ps = raw & entry::PS != 0;
    match (role.format, role.level) {
        (_, 1) => true,
        (EntryFormat::Short, 2) => role.pse && ps,
        (EntryFormat::Pae, 2) | (EntryFormat::Long, 2 | 3) => ps,
        _ => false,
    }
}
