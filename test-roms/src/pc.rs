//! The PC as the ROMs use it: ports, selectors, memory.

/// COM1's base port.
pub const COM1: u32 = 0x3f8;
/// PM1a control: SLP_EN with SLP_TYP 0 is S5 here.
pub const PM1A_CONTROL: u32 = 0x604;
/// SLP_EN.
pub const POWER_OFF: u32 = 1 << 13;

/// Selectors of the linker's GDT.
pub mod selector {
    pub const CODE32: u16 = 0x08;
    pub const DATA32: u16 = 0x10;
    pub const CODE64: u16 = 0x18;
    /// 16-bit segments over the image, for the way back to real mode.
    pub const CODE16: u16 = 0x20;
    pub const DATA16: u16 = 0x28;
}

/// Variables: in the image's 64 KiB, so that real mode reaches them through DS, above the image itself.
pub mod variable {
    /// Linear address of the first.
    pub const BASE: u32 = 0x1_f000;
    /// Checks of the running section.
    pub const CHECKS: u32 = BASE;
    /// Failed ones.
    pub const FAILS: u32 = BASE + 4;
    /// Sections so far.
    pub const SECTIONS: u32 = BASE + 8;
    /// Sections with a failed check.
    pub const FAILED_SECTIONS: u32 = BASE + 12;
    /// The vector that may be raised now, or [`NOTHING_EXPECTED`].
    pub const EXPECT: u32 = BASE + 16;
    /// Where to go on after it.
    pub const RESUME: u32 = BASE + 20;
    /// Error code of the last exception.
    pub const FAULT_CODE: u32 = BASE + 24;
    /// CR2's low half then.
    pub const FAULT_ADDRESS: u32 = BASE + 28;
    /// Software interrupts seen.
    pub const INTERRUPTS: u32 = BASE + 32;
    /// Not 0: the page-fault handler writes [`MAP_VALUE`] there and retries.
    pub const MAP_AT: u32 = BASE + 36;
    /// Low half of the entry it writes.
    pub const MAP_VALUE: u32 = BASE + 40;
    /// A register while an exception handler runs.
    pub const SAVED: u32 = BASE + 44;
    /// For a ROM's own use.
    pub const SCRATCH: u32 = BASE + 64;
    /// Room for a decimal number, ends here.
    pub const DIGITS_END: u32 = BASE + 256;
    /// What no vector equals.
    pub const NOTHING_EXPECTED: u32 = u32::MAX;
}

/// Where the stack of protected and long mode starts.
pub const STACK_TOP: u32 = 0x6_0000;
