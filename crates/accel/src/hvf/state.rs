//! [`CpuState`] in the framework's registers and VMCS fields. VMX keeps segment attributes as we do.

use super::controls;
use super::framework::{Framework, HvfError, Register};
use super::vmcs::*;
use umbra_arch::control::{Cr0, Cr3, Cr4, Efer};
use umbra_arch::segment::{Attr, Segment, TableRegister};
use umbra_arch::state::Shadow;
use umbra_arch::{CpuState, rflags};

/// General registers in the order of [`CpuState::gpr`].
pub(super) const GENERAL: [Register; 16] = [
    Register::Rax,
    Register::Rcx,
    Register::Rdx,
    Register::Rbx,
    Register::Rsp,
    Register::Rbp,
    Register::Rsi,
    Register::Rdi,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];
/// Interruptibility state ("Guest Non-Register State").
const BLOCKING_BY_STI: u64 = 1 << 0;
const BLOCKING_BY_MOV_SS: u64 = 1 << 1;
const BLOCKING_BY_NMI: u64 = 1 << 3;
/// VMX operation needs it, whatever the guest sees.
const CR4_VMXE: u64 = Cr4::VMXE;
/// As above; NE is fixed to 1.
const CR0_NE: u64 = Cr0::NE;

/// Replaces what VMX holds of the state.
pub(super) fn set(hv: &mut impl Framework, s: &CpuState) -> Result<(), HvfError> {
    for (register, value) in GENERAL.into_iter().zip(s.gpr) {
        hv.write_register(register, value)?;
    }
    hv.write_register(Register::Rip, s.rip)?;
    hv.write_register(Register::Rflags, s.rflags)?;
    for (field, segment) in (0..).step_by(2).zip(&s.seg) {
        hv.write_vmcs(GUEST_ES_SELECTOR + field, segment.selector.into())?;
        hv.write_vmcs(GUEST_ES_LIMIT + field, segment.limit.into())?;
        hv.write_vmcs(GUEST_ES_ACCESS_RIGHTS + field, segment.attr.0.into())?;
        hv.write_vmcs(GUEST_ES_BASE + field, segment.base)?;
    }
    for (base, limit, table) in tables(s) {
        hv.write_vmcs(base, table.base)?;
        hv.write_vmcs(limit, table.limit.into())?;
    }
    hv.write_vmcs(GUEST_CR0, s.cr0.raw() | CR0_NE)?;
    hv.write_vmcs(CR0_READ_SHADOW, s.cr0.raw())?;
    hv.write_vmcs(GUEST_CR3, s.cr3.raw())?;
    hv.write_vmcs(GUEST_CR4, s.cr4.raw() | CR4_VMXE)?;
    hv.write_vmcs(CR4_READ_SHADOW, s.cr4.raw())?;
    hv.write_vmcs(GUEST_EFER, s.efer.raw())?;
    controls::set_long_mode(hv, s.efer.lma())?;
    hv.write_vmcs(GUEST_DR7, s.dr7)?;
    for (n, pdpte) in (0..).zip(s.pdpte) {
        hv.write_vmcs(GUEST_PDPTE0 + 2 * n, pdpte)?;
    }
    hv.write_vmcs(GUEST_INTERRUPTIBILITY, interruptibility(s))
}

/// Reads what VMX holds into `s`.
pub(super) fn get(hv: &impl Framework, s: &mut CpuState) -> Result<(), HvfError> {
    for (register, value) in GENERAL.into_iter().zip(&mut s.gpr) {
        *value = hv.read_register(register)?;
    }
    s.rip = hv.read_register(Register::Rip)?;
    s.rflags = hv.read_register(Register::Rflags)? & rflags::WRITABLE | rflags::FIXED;
    for (field, segment) in (0..).step_by(2).zip(&mut s.seg) {
        *segment = Segment {
            base: hv.read_vmcs(GUEST_ES_BASE + field)?,
            limit: hv.read_vmcs(GUEST_ES_LIMIT + field)? as u32,
            attr: Attr(hv.read_vmcs(GUEST_ES_ACCESS_RIGHTS + field)? as u32),
            selector: hv.read_vmcs(GUEST_ES_SELECTOR + field)? as u16,
        };
    }
    let table = |base, limit| -> Result<TableRegister, HvfError> {
        Ok(TableRegister { base: hv.read_vmcs(base)?, limit: hv.read_vmcs(limit)? as u16 })
    };
    s.gdtr = table(GUEST_GDTR_BASE, GUEST_GDTR_LIMIT)?;
    s.idtr = table(GUEST_IDTR_BASE, GUEST_IDTR_LIMIT)?;
    let seen = |value: u64, shadow: u64, fixed: u64| value & !fixed | shadow & fixed;
    s.cr0 = Cr0::new(seen(hv.read_vmcs(GUEST_CR0)?, hv.read_vmcs(CR0_READ_SHADOW)?, CR0_NE));
    s.cr3 = Cr3::new(hv.read_vmcs(GUEST_CR3)?);
    s.cr4 = Cr4::new(seen(hv.read_vmcs(GUEST_CR4)?, hv.read_vmcs(CR4_READ_SHADOW)?, CR4_VMXE));
    s.efer = Efer::new(hv.read_vmcs(GUEST_EFER)?);
    s.dr7 = hv.read_vmcs(GUEST_DR7)?;
    for (n, pdpte) in (0..).zip(&mut s.pdpte) {
        *pdpte = hv.read_vmcs(GUEST_PDPTE0 + 2 * n)?;
    }
    let blocking = hv.read_vmcs(GUEST_INTERRUPTIBILITY)?;
    s.nmi_blocked = blocking & BLOCKING_BY_NMI != 0;
    s.shadow = match blocking {
        b if b & BLOCKING_BY_MOV_SS != 0 => Shadow::MovSs,
        b if b & BLOCKING_BY_STI != 0 => Shadow::Sti,
        _ => Shadow::None,
    };
    s.cpl = match (s.cr0.pe(), s.is_v86()) {
        (false, _) => 0,
        (true, true) => 3,
        (true, false) => s.seg[umbra_arch::segment::Seg::Ss as usize].attr.dpl(),
    };
    Ok(())
}

fn tables(s: &CpuState) -> [(u32, u32, TableRegister); 2] {
    [(GUEST_GDTR_BASE, GUEST_GDTR_LIMIT, s.gdtr), (GUEST_IDTR_BASE, GUEST_IDTR_LIMIT, s.idtr)]
}

fn interruptibility(s: &CpuState) -> u64 {
    let shadow = match s.shadow {
        Shadow::None => 0,
        Shadow::Sti => BLOCKING_BY_STI,
        Shadow::MovSs => BLOCKING_BY_MOV_SS,
    };
    shadow | if s.nmi_blocked { BLOCKING_BY_NMI } else { 0 }
}
