//! Exceptions as values: what a guest did wrong, never what the host did wrong.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Exception vectors ("Exceptions and Interrupts").
pub mod vector {
    #![allow(missing_docs, reason = "the names are the manual's mnemonics")]
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
    pub const CP: u8 = 21;
}

/// An exception that an instruction or an event delivery raised.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fault {
    /// The exception's vector, 0..32.
    pub vector: u8,
    /// The error code it pushes, if it has one.
    pub code: Option<u32>,
    /// For #PF the faulting linear address, which goes to CR2; else 0.
    pub address: u64,
}

impl Fault {
    const fn plain(vector: u8) -> Self {
        Self { vector, code: None, address: 0 }
    }
    const fn coded(vector: u8, code: u32) -> Self {
        Self { vector, code: Some(code), address: 0 }
    }
    /// #DE.
    pub const DIVIDE: Fault = Fault::plain(vector::DE);
    /// #DB; the cause goes to DR6 separately.
    pub const DEBUG: Fault = Fault::plain(vector::DB);
    /// #BR.
    pub const BOUND: Fault = Fault::plain(vector::BR);
    /// #UD.
    pub const UNDEFINED: Fault = Fault::plain(vector::UD);
    /// #NM.
    pub const DEVICE_NOT_AVAILABLE: Fault = Fault::plain(vector::NM);
    /// #MF.
    pub const X87: Fault = Fault::plain(vector::MF);
    /// #XM.
    pub const SIMD: Fault = Fault::plain(vector::XM);
    /// #AC(0).
    pub const ALIGNMENT: Fault = Fault::coded(vector::AC, 0);
    /// #GP(0).
    pub const GP0: Fault = Fault::coded(vector::GP, 0);
    /// #SS(0).
    pub const SS0: Fault = Fault::coded(vector::SS, 0);

    /// #GP with an error code (a selector with its index/TI/EXT bits).
    pub const fn gp(code: u32) -> Self {
        Self::coded(vector::GP, code)
    }
    /// #SS with an error code.
    pub const fn ss(code: u32) -> Self {
        Self::coded(vector::SS, code)
    }
    /// #NP with an error code.
    pub const fn np(code: u32) -> Self {
        Self::coded(vector::NP, code)
    }
    /// #TS with an error code.
    pub const fn ts(code: u32) -> Self {
        Self::coded(vector::TS, code)
    }
    /// #PF at linear `address` with `code` as in "Page-Fault Exceptions".
    pub const fn page(address: u64, code: u32) -> Self {
        Self { vector: vector::PF, code: Some(code), address }
    }

    /// The manual's mnemonic, as in `#PF`.
    pub const fn mnemonic(self) -> &'static str {
        match self.vector {
            vector::DE => "#DE",
            vector::DB => "#DB",
            vector::NMI => "NMI",
            vector::BP => "#BP",
            vector::OF => "#OF",
            vector::BR => "#BR",
            vector::UD => "#UD",
            vector::NM => "#NM",
            vector::DF => "#DF",
            vector::TS => "#TS",
            vector::NP => "#NP",
            vector::SS => "#SS",
            vector::GP => "#GP",
            vector::PF => "#PF",
            vector::MF => "#MF",
            vector::AC => "#AC",
            vector::MC => "#MC",
            vector::XM => "#XM",
            vector::CP => "#CP",
            _ => "#??",
        }
    }
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.mnemonic())?;
        if let Some(code) = self.code {
            write!(f, "({code:#x})")?;
        }
        if self.vector == vector::PF {
            write!(f, " at {:#x}", self.address)?;
        }
        Ok(())
    }
}
