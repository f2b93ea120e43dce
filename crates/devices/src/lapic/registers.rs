//! Register file of a local APIC, addressed by index: xAPIC offset / 16, x2APIC MSR - 800h.

use super::Lapic;
use super::timer::Mode;
use crate::interrupt::{DeliveryMode, InterruptMessage, Ipi, Shorthand};
use umbra_arch::VirtualTime;
use umbra_arch::local_apic::index;

/// Error status register bits.
pub(super) mod error {
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Local vector table fields.
pub(super) mod lvt {
    pub const VECTOR: u32 = 0xff;
    pub const REMOTE_IRR: u32 = 1 << 14;
    pub const LEVEL: u32 = 1 << 15;
    pub const MASKED: u32 = 1 << 16;
    pub const TIMER_MODE: u32 = 3 << 17;
}

/// Version 14h with six LVT entries, no suppression of EOI broadcasts.
const VERSION: u32 = 0x0005_0014;

/// Software enable in SVR.
pub(super) const SVR_ENABLE: u32 = 1 << 8;

/// Writable bits of LVT register `index`.
pub(super) fn lvt_writable(index: u16, tsc_deadline: bool) -> u32 {
    match index {
        index::LVT_TIMER if tsc_deadline => 0x7_00ff,
        index::LVT_TIMER => 0x3_00ff,
        index::LVT_THERMAL | index::LVT_PERFORMANCE => 0x1_07ff,
        index::LVT_LINT0 | index::LVT_LINT1 => 0x1_a7ff,
        _ => 0x1_00ff,
    }
}

impl Lapic {
    /// A register's value; `None` if there is no such register.
    pub(super) fn read_register(&self, now: VirtualTime, index: u16) -> Option<u32> {
        Some(match index {
            index::ID if self.is_x2apic() => self.config.id,
            index::ID => self.config.id << 24,
            index::VERSION => VERSION,
            index::TPR => self.tpr.into(),
            index::APR | index::RRD => 0,
            index::PPR => self.processor_priority().into(),
            index::EOI => 0,
            index::LDR => self.logical_id(),
            index::DFR => self.dfr,
            index::SVR => self.svr,
            index::ISR0..=index::ISR7 => self.in_service.dword(usize::from(index - index::ISR0)),
            index::TMR0..=index::TMR7 => self.trigger_mode.dword(usize::from(index - index::TMR0)),
            index::IRR0..=index::IRR7 => self.requests.dword(usize::from(index - index::IRR0)),
            index::ESR => self.error_status,
            index::ICR_LOW => self.icr as u32,
            index::ICR_HIGH => (self.icr >> 32) as u32,
            index::LVT_TIMER..=index::LVT_ERROR => self.lvt[usize::from(index - index::LVT_TIMER)],
            index::INITIAL_COUNT => self.timer.initial(),
            index::CURRENT_COUNT => self.timer.current(now),
            index::DIVIDE => self.timer.divide(),
            _ => return None,
        })
    }

    /// Writes a register; false if there is no such register. Reserved bits are ignored.
    pub(super) fn write_register(&mut self, now: VirtualTime, index: u16, value: u32) -> bool {
        match index {
            index::TPR => self.tpr = value as u8,
            index::EOI => self.end_of_interrupt(),
            index::LDR if !self.is_x2apic() => self.ldr = value & 0xff00_0000,
            index::DFR => self.dfr = value | 0x0fff_ffff,
            index::SVR => self.set_svr(value & 0x3ff),
            index::ESR => self.error_status = std::mem::take(&mut self.errors),
            index::ICR_LOW => {
                self.icr = self.icr & 0xffff_ffff_0000_0000 | u64::from(value & 0x000c_cfff);
                self.send_ipi();
            }
            index::ICR_HIGH => self.icr = u64::from(value) << 32 | self.icr & 0xffff_ffff,
            index::LVT_TIMER..=index::LVT_ERROR => self.set_lvt(index, value),
            index::INITIAL_COUNT => self.timer.set_initial(now, value),
            index::DIVIDE => self.timer.set_divide(now, value),
            // Read-only ones swallow the write.
            _ => return self.read_register(now, index).is_some(),
        }
        true
    }

    /// The interrupt command register was written.
    pub(super) fn send_ipi(&mut self) {
        let low = self.icr as u32;
        let Some(mode) = DeliveryMode::of_field(low >> 8) else { return };
        let vector = low as u8;
        let level = low & 1 << 15 != 0;
        let assert = low & 1 << 14 != 0;
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority if vector < 16 => {
                return self.record_error(error::SEND_ILLEGAL_VECTOR);
            }
            DeliveryMode::ExtInt => return,
            // The level de-assert message only synchronises arbitration ids, which no longer exist.
            DeliveryMode::Init if level && !assert => return,
            _ => {}
        }
        let logical = low & 1 << 11 != 0;
        let destination = (self.icr >> 32) as u32;
        self.ipi = Some(Ipi {
            message: InterruptMessage {
                destination: if self.is_x2apic() {
                    destination
                } else {
                    InterruptMessage::destination8((destination >> 24) as u8, logical)
                },
                logical,
                mode,
                vector,
                level: false,
                assert: true,
            },
            shorthand: [Shorthand::None, Shorthand::SelfOnly, Shorthand::All, Shorthand::AllButSelf]
                [(low >> 18 & 3) as usize],
        });
    }

    fn set_svr(&mut self, value: u32) {
        self.svr = value;
        if value & SVR_ENABLE == 0 {
            for entry in &mut self.lvt {
                *entry |= lvt::MASKED;
            }
        }
    }

    pub(super) fn set_lvt(&mut self, index: u16, value: u32) {
        let entry = &mut self.lvt[usize::from(index - index::LVT_TIMER)];
        *entry = value & lvt_writable(index, self.config.tsc_deadline) | *entry & lvt::REMOTE_IRR;
        if self.svr & SVR_ENABLE == 0 {
            *entry |= lvt::MASKED;
        }
        let value = *entry;
        match index {
            index::LVT_TIMER => self.timer.set_mode(Mode::of_lvt(value)),
            index::LVT_LINT0 => self.raise_level_lint(0),
            index::LVT_LINT1 => self.raise_level_lint(1),
            _ => {}
        }
    }
}
