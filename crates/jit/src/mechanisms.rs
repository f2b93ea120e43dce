//! What of the translator can be left out, to find by elimination which part is wrong or what it gains.

/// A mechanism. Without any of them everything is the same for the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Mechanism {
    /// Host code for operations: without it each is a call of its function.
    Native,
    /// Host code for SSE and AVX.
    Vectors,
    /// Host code for x87.
    X87,
    /// Host code for MOVS and STOS with REP.
    Strings,
    /// Changes of CPL, RFLAGS.AC and CR0.WP in generated code.
    Views,
    /// Looking memory operands up in generated code: without it each operation on memory is a call.
    Memory,
    /// Range registers: without them each access looks into the MMU's table.
    Ranges,
    /// Having the host's MMU translate for programs that run for long.
    Windows,
    /// Checking neighbouring accesses together.
    Groups,
    /// Saving status flags only where something looks at them.
    Flags,
    /// Translating a block together with those that its conditional branch mostly leads to.
    Traces,
    /// Charging all of a trace at its head.
    Budgets,
    /// Jumps from one block straight to another.
    Links,
    /// Finding a block by its RIP in generated code.
    Jumps,
    /// CALL and RET by the host's own.
    Returns,
}

impl Mechanism {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::Native,
        Self::Vectors,
        Self::X87,
        Self::Strings,
        Self::Views,
        Self::Memory,
        Self::Ranges,
        Self::Windows,
        Self::Groups,
        Self::Flags,
        Self::Traces,
        Self::Budgets,
        Self::Links,
        Self::Jumps,
        Self::Returns,
    ];
}

/// A set of mechanisms.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Mechanisms(u16);

impl Mechanisms {
    /// No mechanism.
    pub const NONE: Self = Self(0);

    /// This set and one more.
    pub const fn with(self, one: Mechanism) -> Self {
        Self(self.0 | 1 << one as u8)
    }

    /// Whether it is in the set.
    pub const fn has(self, one: Mechanism) -> bool {
        self.0 >> (one as u8) & 1 != 0
    }
}
