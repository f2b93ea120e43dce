//! VMCS fields ("Field Encoding in VMCS").
#![allow(missing_docs, reason = "the names are the manual's")]

/// Guest segment fields of ES; those of CS, SS, DS, FS, GS, LDTR and TR follow at steps of 2.
pub const GUEST_ES_SELECTOR: u32 = 0x0800;
pub const GUEST_ES_LIMIT: u32 = 0x4800;
pub const GUEST_ES_ACCESS_RIGHTS: u32 = 0x4814;
pub const GUEST_ES_BASE: u32 = 0x6806;
pub const GUEST_GDTR_LIMIT: u32 = 0x4810;
pub const GUEST_IDTR_LIMIT: u32 = 0x4812;
pub const GUEST_GDTR_BASE: u32 = 0x6816;
pub const GUEST_IDTR_BASE: u32 = 0x6818;
pub const GUEST_CR0: u32 = 0x6800;
pub const GUEST_CR3: u32 = 0x6802;
pub const GUEST_CR4: u32 = 0x6804;
pub const GUEST_DR7: u32 = 0x681a;
pub const GUEST_EFER: u32 = 0x2806;
pub const GUEST_PDPTE0: u32 = 0x280a;
pub const GUEST_INTERRUPTIBILITY: u32 = 0x4824;
pub const CR0_READ_SHADOW: u32 = 0x6004;
pub const CR4_READ_SHADOW: u32 = 0x6006;
pub const PIN_CONTROLS: u32 = 0x4000;
pub const PROCESSOR_CONTROLS: u32 = 0x4002;
pub const EXCEPTION_BITMAP: u32 = 0x4004;
pub const EXIT_CONTROLS: u32 = 0x400c;
pub const ENTRY_CONTROLS: u32 = 0x4012;
pub const SECONDARY_CONTROLS: u32 = 0x401e;
pub const CR0_MASK: u32 = 0x6000;
pub const CR4_MASK: u32 = 0x6002;
pub const ENTRY_INTERRUPTION_INFO: u32 = 0x4016;
pub const EXIT_REASON: u32 = 0x4402;
pub const EXIT_INSTRUCTION_LENGTH: u32 = 0x440c;
pub const EXIT_QUALIFICATION: u32 = 0x6400;
