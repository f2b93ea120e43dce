//! Paging modes, table-entry bits and page-fault error codes ("Paging" in SDM volume 3).

use crate::control::{Cr0, Cr4, Efer};
use serde::{Deserialize, Serialize};

/// Bits of a page-table entry that mean the same in every format.
pub mod entry {
    #![allow(missing_docs, reason = "the names are the manual's")]
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const PWT: u64 = 1 << 3;
    pub const PCD: u64 = 1 << 4;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    /// Page size, in entries above the last level.
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    /// Execute-disable, in 8-byte entries.
    pub const XD: u64 = 1 << 63;
}

/// Page-fault error code bits ("Page-Fault Exceptions").
pub mod pfec {
    #![allow(missing_docs, reason = "the names are the manual's")]
    pub const P: u32 = 1 << 0;
    pub const W: u32 = 1 << 1;
    pub const U: u32 = 1 << 2;
    pub const RSVD: u32 = 1 << 3;
    pub const I: u32 = 1 << 4;
    pub const PK: u32 = 1 << 5;
}

/// The paging mode in force ("Paging Modes and Control Bits").
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[repr(u8)]
pub enum PagingMode {
    /// CR0.PG = 0: linear addresses are physical.
    Off = 0,
    /// 32-bit paging: two levels of 4-byte entries.
    TwoLevel = 1,
    /// PAE paging: four latched PDPTEs over two levels of 8-byte entries.
    Pae = 2,
    /// 4-level paging.
    FourLevel = 3,
    /// 5-level paging.
    FiveLevel = 4,
}

impl PagingMode {
    /// The mode that these registers select.
    pub const fn of(cr0: Cr0, cr4: Cr4, efer: Efer) -> Self {
        if !cr0.pg() {
            Self::Off
        } else if !cr4.pae() {
            Self::TwoLevel
        } else if !efer.lma() {
            Self::Pae
        } else if cr4.la57() {
            Self::FiveLevel
        } else {
            Self::FourLevel
        }
    }
    /// Number of table levels that a walk reads from memory (PAE's PDPTEs are registers).
    pub const fn levels(self) -> u8 {
        match self {
            Self::Off => 0,
            Self::TwoLevel | Self::Pae => 2,
            Self::FourLevel => 4,
            Self::FiveLevel => 5,
        }
    }
    /// 4- or 5-level paging, where protection keys exist.
    pub const fn is_long(self) -> bool {
        matches!(self, Self::FourLevel | Self::FiveLevel)
    }
}

/// What an access wants to do.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum AccessKind {
    /// Data read.
    Read = 0,
    /// Data write, or the read half of a read-modify-write.
    Write = 1,
    /// Instruction fetch.
    Fetch = 2,
}

/// One linear access, as the permission rules see it ("Determination of Access Rights").
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Access {
    /// Read, write or fetch.
    pub kind: AccessKind,
    /// User-mode access: CPL 3 and not implicitly supervisor.
    pub user: bool,
    /// Implicit supervisor access (descriptor tables, TSS, event delivery's stack): ignores RFLAGS.AC.
    pub implicit: bool,
}

impl Access {
    /// An explicit access by an instruction running at `cpl`.
    pub const fn explicit(kind: AccessKind, cpl: u8) -> Self {
        Self { kind, user: cpl == 3, implicit: false }
    }
    /// An access to a system structure.
    pub const fn implicit(kind: AccessKind) -> Self {
        Self { kind, user: false, implicit: true }
    }
}
