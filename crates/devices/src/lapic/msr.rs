//! MSRs of a local APIC: IA32_APIC_BASE, IA32_TSC_DEADLINE and the x2APIC registers.

use super::Lapic;
use super::registers::lvt_writable;
use crate::Device as _;
use umbra_arch::local_apic::index;
use umbra_arch::msr::{IA32_APIC_BASE, IA32_TSC_DEADLINE, X2APIC_FIRST, X2APIC_LAST};
use umbra_arch::{Fault, VirtualTime};

/// IA32_APIC_BASE fields.
pub(super) mod base {
    pub const BSP: u64 = 1 << 8;
    pub const EXTD: u64 = 1 << 10;
    pub const EN: u64 = 1 << 11;
    pub const MODE: u64 = EXTD | EN;
}

impl Lapic {
    /// RDMSR. #GP outside x2APIC mode for its range, and for registers that cannot be read.
    pub fn msr_read(&mut self, now: VirtualTime, msr: u32) -> Result<u64, Fault> {
        self.advance(now);
        match msr {
            IA32_APIC_BASE => Ok(self.base),
            IA32_TSC_DEADLINE if self.config.tsc_deadline => Ok(self.timer.deadline()),
            X2APIC_FIRST..=X2APIC_LAST if self.is_x2apic() => self.read_x2apic(now, (msr - X2APIC_FIRST) as u16),
            _ => Err(Fault::GP0),
        }
    }

    /// WRMSR. #GP for reserved bits, read-only registers and illegal changes of mode.
    pub fn msr_write(&mut self, now: VirtualTime, msr: u32, value: u64) -> Result<(), Fault> {
        self.advance(now);
        match msr {
            IA32_APIC_BASE => self.write_base(value)?,
            IA32_TSC_DEADLINE if self.config.tsc_deadline => self.timer.set_deadline(now, value),
            X2APIC_FIRST..=X2APIC_LAST if self.is_x2apic() => {
                self.write_x2apic(now, (msr - X2APIC_FIRST) as u16, value)?;
            }
            _ => return Err(Fault::GP0),
        }
        self.advance(now);
        Ok(())
    }

    /// "x2APIC State Transitions": from disabled only to xAPIC, from x2APIC only to disabled.
    fn write_base(&mut self, value: u64) -> Result<(), Fault> {
        let address_bits = (1u64 << self.config.physical_bits.clamp(32, 52)) - 4096;
        let extd = if self.config.x2apic { base::EXTD } else { 0 };
        if value & !(address_bits | base::EN | base::BSP | extd) != 0 {
            return Err(Fault::GP0);
        }
        const X2APIC: u64 = base::MODE;
        match (self.base & base::MODE, value & base::MODE) {
            (_, base::EXTD) | (0, X2APIC) | (X2APIC, base::EN) => return Err(Fault::GP0),
            (old, 0) if old != 0 => self.reset_registers(),
            (base::EN, X2APIC) => self.icr &= 0xffff_ffff,
            _ => {}
        }
        self.base = value;
        Ok(())
    }

    fn read_x2apic(&mut self, now: VirtualTime, index: u16) -> Result<u64, Fault> {
        match index {
            index::ICR_LOW => Ok(self.icr),
            index::ICR_HIGH | index::DFR | index::APR | index::RRD | index::EOI => Err(Fault::GP0),
            _ => self.read_register(now, index).map(u64::from).ok_or(Fault::GP0),
        }
    }

    /// "x2APIC Register Availability": what can be written, and its reserved bits.
    fn write_x2apic(&mut self, now: VirtualTime, index: u16, value: u64) -> Result<(), Fault> {
        let writable = match index {
            index::TPR | index::SELF_IPI => 0xff,
            index::EOI | index::ESR => 0,
            index::SVR => 0x3ff,
            index::ICR_LOW => 0xffff_ffff_000c_cfff,
            index::LVT_TIMER..=index::LVT_ERROR => {
                // Delivery status and remote IRR are read-only, not reserved.
                u64::from(lvt_writable(index, self.config.tsc_deadline)) | 1 << 12 | 1 << 14
            }
            index::INITIAL_COUNT => 0xffff_ffff,
            index::DIVIDE => 0xb,
            _ => return Err(Fault::GP0),
        };
        if value & !writable != 0 {
            return Err(Fault::GP0);
        }
        match index {
            index::ICR_LOW => {
                self.icr = value;
                self.send_ipi();
            }
            index::SELF_IPI => self.send_self(value as u8),
            _ => {
                self.write_register(now, index, value as u32);
            }
        }
        Ok(())
    }
}
