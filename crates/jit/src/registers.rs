//! Which host register holds what while generated code runs.
//!
//! The code's own are RSP (the host's stack), R15 (the engine), R14 (the MMU's table), RAX (the guest's status
//! flags) and two scratch registers. Ten guest registers stay in host registers across chained blocks, six of
//! them in the register of the same name; the others are loaded from the core where they are used.

/// A host register's number.
pub type Reg = u8;

/// RAX: status flags as LAHF and SETO leave them.
pub const FLAGS: Reg = 0;
/// Home of guest RCX.
pub const RCX: Reg = 1;
/// Home of guest RDX.
pub const RDX: Reg = 2;
/// Home of guest RBX.
pub const RBX: Reg = 3;
/// The host's stack pointer.
pub const RSP: Reg = 4;
/// Second argument of a function.
pub const RSI: Reg = 6;
/// First argument of a function.
pub const RDI: Reg = 7;
/// Guest RAX.
pub const GUEST_RAX: Reg = 10;
/// Guest RSP.
pub const GUEST_RSP: Reg = 11;
/// First scratch register: addresses.
pub const A: Reg = 12;
/// Second scratch register.
pub const B: Reg = 13;
/// The MMU's fast table that is [selected](crate::views::Selected).
pub const TABLE: Reg = 14;
/// The engine.
pub const ENGINE: Reg = 15;

/// Guest register numbers with a meaning of their own.
pub mod guest {
    /// RSP.
    pub const RSP: u8 = 4;
    /// RBP.
    pub const RBP: u8 = 5;
}

/// The host register that a guest register lives in; `None`: in memory.
pub const fn home(guest: u8) -> Option<Reg> {
    match guest {
        0 => Some(GUEST_RAX),
        4 => Some(GUEST_RSP),
        1..=9 => Some(guest),
        _ => None,
    }
}

/// Guest registers that live in host registers.
pub const RESIDENT: u8 = 10;
