//! RDMSR and WRMSR ("Model-Specific Registers"). Unknown numbers and reserved bits are #GP(0).

use crate::core::Core;
use crate::op::{Flow, Op, Stop};
use umbra_arch::cpuid::{Feature, Vendor};
use umbra_arch::msr::*;
use umbra_arch::segment::Seg;
use umbra_arch::state::Msrs;
use umbra_arch::{Bus, Fault};

impl Core {
    /// The value of MSR `number`.
    pub fn read_msr(&mut self, bus: &mut dyn Bus, op: &Op, number: u32) -> Result<u64, Stop> {
        if self.is_outside(number) {
            let reply = bus.apic_msr_read(self.now(op.prefix), number);
            let reply = self.check(reply)?;
            return Ok(self.settle(reply));
        }
        if let Some(register) = mtrr(&mut self.s.msr, number) {
            return Ok(*register);
        }
        let m = &self.s.msr;
        Ok(match number {
            IA32_TSC => self.read_tsc(bus, op),
            IA32_TSC_ADJUST if self.profile.has(Feature::TscAdjust) => m.tsc_adjust,
            IA32_PLATFORM_ID | IA32_MCG_CAP | IA32_MCG_STATUS => 0,
            IA32_BIOS_SIGN_ID => m.bios_sign_id,
            IA32_FEATURE_CONTROL => m.feature_control,
            IA32_SPEC_CTRL if self.profile.has(Feature::SpecCtrl) => m.spec_ctrl,
            IA32_ARCH_CAPABILITIES if self.profile.has(Feature::ArchCapabilities) => self.profile.arch_capabilities(),
            // Eight variable ranges, fixed ranges, write-combining.
            IA32_MTRRCAP => 0x508,
            IA32_MTRR_DEF_TYPE => m.mtrr_def_type,
            IA32_SYSENTER_CS => m.sysenter_cs,
            IA32_SYSENTER_ESP => m.sysenter_esp,
            IA32_SYSENTER_EIP => m.sysenter_eip,
            IA32_MISC_ENABLE => m.misc_enable,
            IA32_DEBUGCTL => m.debugctl,
            IA32_PAT => m.pat,
            IA32_XSS if self.profile.has(Feature::Xsaves) => m.xss,
            IA32_PKRS if self.profile.has(Feature::Pks) => m.pkrs,
            IA32_EFER => self.s.efer.raw(),
            IA32_STAR => m.star,
            IA32_LSTAR => m.lstar,
            IA32_CSTAR => m.cstar,
            IA32_FMASK => m.fmask,
            IA32_FS_BASE => self.s.segment(Seg::Fs).base,
            IA32_GS_BASE => self.s.segment(Seg::Gs).base,
            IA32_KERNEL_GS_BASE => m.kernel_gs_base,
            IA32_TSC_AUX if self.profile.has(Feature::Rdtscp) => m.tsc_aux,
            _ if self.is_amd_counter(number) => 0,
            _ => return self.raise(Fault::GP0),
        })
    }

    /// Writes MSR `number`.
    pub fn write_msr(&mut self, bus: &mut dyn Bus, op: &Op, number: u32, value: u64) -> Flow {
        if self.is_outside(number) {
            let reply = bus.apic_msr_write(self.now(op.prefix), number, value);
            let reply = self.check(reply)?;
            self.settle(reply);
            self.check_events = true;
            return Ok(());
        }
        if let Some(register) = mtrr(&mut self.s.msr, number) {
            *register = value;
            return Ok(());
        }
        match number {
            IA32_TSC => {
                let by = value.wrapping_sub(self.read_tsc(bus, op));
                self.move_tsc(bus, op, by);
            }
            IA32_TSC_ADJUST if self.profile.has(Feature::TscAdjust) => {
                self.move_tsc(bus, op, value.wrapping_sub(self.s.msr.tsc_adjust));
            }
            IA32_EFER => {
                let effects = self.control_regs().write_efer(value, &self.limits);
                let effects = self.check(effects)?;
                self.commit(&effects);
            }
            IA32_FS_BASE | IA32_GS_BASE => {
                self.need_canonical(value)?;
                self.set_segment_base(if number == IA32_FS_BASE { 4 } else { 5 }, value);
            }
            IA32_PKRS if self.profile.has(Feature::Pks) => {
                self.need_zero(value >> 32)?;
                self.s.msr.pkrs = value;
                self.mmu.set_pkrs(value as u32);
            }
            _ => return self.write_plain_msr(number, value),
        }
        Ok(())
    }

    fn write_plain_msr(&mut self, number: u32, value: u64) -> Flow {
        let has = |c: &Core, feature| c.profile.has(feature);
        match number {
            IA32_LSTAR | IA32_CSTAR | IA32_KERNEL_GS_BASE | IA32_SYSENTER_ESP | IA32_SYSENTER_EIP => {
                self.need_canonical(value)?;
            }
            IA32_PAT => {
                let bad = value.to_le_bytes().iter().any(|t| !matches!(t, 0 | 1 | 4..=7));
                self.need_zero(u64::from(bad))?;
            }
            IA32_FMASK | IA32_TSC_AUX => self.need_zero(value >> 32)?,
            IA32_XSS => self.need_zero(value & !self.profile.xss_supported())?,
            IA32_SPEC_CTRL => self.need_zero(value & !self.profile.spec_ctrl_supported())?,
            IA32_MTRR_DEF_TYPE => self.need_zero(value & !0xcff)?,
            IA32_PRED_CMD => {
                self.need_zero(value & !1)?;
                return if has(self, Feature::SpecCtrl) { Ok(()) } else { self.raise(Fault::GP0) };
            }
            IA32_FLUSH_CMD => {
                self.need_zero(value & !1)?;
                return if has(self, Feature::FlushL1d) { Ok(()) } else { self.raise(Fault::GP0) };
            }
            _ => {}
        }
        let offered = match number {
            IA32_XSS => has(self, Feature::Xsaves),
            IA32_SPEC_CTRL => has(self, Feature::SpecCtrl),
            IA32_TSC_AUX => has(self, Feature::Rdtscp),
            _ => true,
        };
        if self.is_amd_counter(number) {
            return self.need_zero(value);
        }
        // Engines may know what it makes system calls load.
        self.break_block |= number == IA32_STAR;
        let m = &mut self.s.msr;
        let register = match number {
            _ if !offered => return self.raise(Fault::GP0),
            IA32_STAR => &mut m.star,
            IA32_LSTAR => &mut m.lstar,
            IA32_CSTAR => &mut m.cstar,
            IA32_FMASK => &mut m.fmask,
            IA32_KERNEL_GS_BASE => &mut m.kernel_gs_base,
            IA32_SYSENTER_CS => &mut m.sysenter_cs,
            IA32_SYSENTER_ESP => &mut m.sysenter_esp,
            IA32_SYSENTER_EIP => &mut m.sysenter_eip,
            IA32_TSC_AUX => &mut m.tsc_aux,
            IA32_PAT => &mut m.pat,
            IA32_MISC_ENABLE => &mut m.misc_enable,
            IA32_DEBUGCTL => &mut m.debugctl,
            IA32_SPEC_CTRL => &mut m.spec_ctrl,
            IA32_XSS => &mut m.xss,
            IA32_MTRR_DEF_TYPE => &mut m.mtrr_def_type,
            IA32_BIOS_SIGN_ID => &mut m.bios_sign_id,
            // No machine-check banks: status can be cleared.
            IA32_MCG_STATUS if value == 0 => return Ok(()),
            _ => return self.raise(Fault::GP0),
        };
        *register = value;
        Ok(())
    }

    /// "IA32_TSC_ADJUST Register Support": a write to the TSC moves TSC_ADJUST and the reverse.
    fn move_tsc(&mut self, bus: &mut dyn Bus, op: &Op, by: u64) {
        let m = &mut self.s.msr;
        m.tsc_offset = m.tsc_offset.wrapping_add(by);
        m.tsc_adjust = m.tsc_adjust.wrapping_add(by);
        let offset = m.tsc_offset;
        let reply = bus.tsc_moved(self.now(op.prefix), offset);
        self.settle(reply);
    }

    /// Whether the MSR exists and lives behind the bus.
    fn is_outside(&self, number: u32) -> bool {
        is_apic(number) || kvm_feature(number).is_some_and(|feature| self.profile.has(feature))
    }

    /// AMD's first four performance counters and their selectors, which software clears without asking CPUID.
    /// They never count: nothing but 0 can be written.
    fn is_amd_counter(&self, number: u32) -> bool {
        self.profile.vendor == Vendor::Amd && (PERF_EVT_SEL0..PERF_EVT_SEL0 + 8).contains(&number)
    }

    fn need_canonical(&mut self, value: u64) -> Flow {
        if !self.fits_register(value) {
            return self.raise(Fault::GP0);
        }
        Ok(())
    }

    fn need_zero(&mut self, bits: u64) -> Flow {
        if bits != 0 {
            return self.raise(Fault::GP0);
        }
        Ok(())
    }
}

/// First of AMD's performance event-select registers; the counters follow the four of them ("MSR Cross-Reference").
const PERF_EVT_SEL0: u32 = 0xc001_0000;

/// The range MTRR with that number.
fn mtrr(m: &mut Msrs, number: u32) -> Option<&mut u64> {
    match number {
        IA32_MTRR_PHYSBASE0..=0x20f => Some(&mut m.mtrr_var[(number - IA32_MTRR_PHYSBASE0) as usize]),
        IA32_MTRR_FIX64K_00000 => Some(&mut m.mtrr_fix[0]),
        IA32_MTRR_FIX16K_80000 | IA32_MTRR_FIX16K_A0000 => {
            Some(&mut m.mtrr_fix[1 + (number - IA32_MTRR_FIX16K_80000) as usize])
        }
        IA32_MTRR_FIX4K_C0000..=IA32_MTRR_FIX4K_F8000 => {
            Some(&mut m.mtrr_fix[3 + (number - IA32_MTRR_FIX4K_C0000) as usize])
        }
        _ => None,
    }
}
