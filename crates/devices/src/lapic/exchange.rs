//! The registers as a whole, out and in: for accelerators that have a local APIC of their own.

use super::Lapic;
use super::registers::{SVR_ENABLE, lvt, lvt_writable};
use super::timer::{self, Mode, Timer};
use super::vectors::VectorSet;
use crate::Device as _;
use umbra_arch::local_apic::{APIC_REGISTERS, index};
use umbra_arch::{LocalApic, VirtualTime};

impl Lapic {
    /// Everything that software can see. An NMI that waits goes with it.
    pub fn take_state(&mut self, now: VirtualTime) -> LocalApic {
        self.advance(now);
        let mut registers = [0; APIC_REGISTERS];
        for (index, register) in (0..).zip(&mut registers) {
            *register = self.read_register(now, index).unwrap_or(0);
        }
        LocalApic { base: self.base, registers, tsc_deadline: self.timer.deadline(), nmi: self.take_nmi() }
    }

    /// Takes over a state. What software can't see stays: pins, errors that ESR doesn't show yet.
    pub fn set_state(&mut self, now: VirtualTime, state: &LocalApic) {
        let register = |index: u16| state.registers[usize::from(index) % APIC_REGISTERS];
        let set = |first: u16| VectorSet::of_dwords(&std::array::from_fn(|n| register(first + n as u16)));
        self.base = state.base;
        self.tpr = register(index::TPR) as u8;
        if !self.is_x2apic() {
            self.ldr = register(index::LDR) & 0xff00_0000;
        }
        self.dfr = register(index::DFR) | 0x0fff_ffff;
        self.svr = register(index::SVR) & 0x3ff;
        self.in_service = set(index::ISR0);
        self.trigger_mode = set(index::TMR0);
        self.requests = set(index::IRR0);
        self.error_status = register(index::ESR);
        self.icr = u64::from(register(index::ICR_HIGH)) << 32 | u64::from(register(index::ICR_LOW) & 0x000c_cfff);
        let masked = if self.svr & SVR_ENABLE == 0 { lvt::MASKED } else { 0 };
        for (index, entry) in (index::LVT_TIMER..).zip(&mut self.lvt) {
            let kept = lvt_writable(index, self.config.tsc_deadline) | lvt::REMOTE_IRR;
            *entry = register(index) & kept | masked;
        }
        let timer = timer::Registers {
            mode: Mode::of_lvt(self.lvt[0]),
            initial: register(index::INITIAL_COUNT),
            current: register(index::CURRENT_COUNT),
            divide: register(index::DIVIDE),
            deadline: state.tsc_deadline,
        };
        self.timer = Timer::of_registers(now, &timer, self.timer.tsc_offset());
        self.nmi |= state.nmi;
        self.advance(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MmioDevice as _;
    use crate::lapic::LapicConfig;
    use proptest::prelude::*;
    use umbra_arch::AccessWidth;
    use umbra_arch::msr::{IA32_APIC_BASE, IA32_TSC_DEADLINE, X2APIC_FIRST};

    /// One thing that happens to a local APIC.
    #[derive(Clone, Debug)]
    enum Step {
        Write(u16, u32),
        Msr(u32, u64),
        Accept(u8, bool),
        Acknowledge,
        Nmi,
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let index = prop_oneof![
            prop::sample::select(vec![
                index::TPR,
                index::LDR,
                index::DFR,
                index::SVR,
                index::ESR,
                index::INITIAL_COUNT,
                index::DIVIDE,
                index::EOI,
            ]),
            index::ICR_LOW..=index::INITIAL_COUNT,
        ];
        let value = prop_oneof![any::<u32>(), 0x100u32..0x400, 0u32..0x8_0000];
        let base = prop::sample::select(vec![0xfee0_0900u64, 0xfee0_0d00, 0xfee0_0100, 0xfed0_0900]);
        prop_oneof![
            4 => (index.clone(), value.clone()).prop_map(|(index, value)| Step::Write(index, value)),
            2 => (index, value).prop_map(|(index, value)| Step::Msr(X2APIC_FIRST + u32::from(index), value.into())),
            1 => base.prop_map(|base| Step::Msr(IA32_APIC_BASE, base)),
            1 => (0u64..1 << 20).prop_map(|deadline| Step::Msr(IA32_TSC_DEADLINE, deadline)),
            2 => (any::<u8>(), any::<bool>()).prop_map(|(vector, level)| Step::Accept(vector, level)),
            2 => Just(Step::Acknowledge),
            1 => Just(Step::Nmi),
            1 => (0u64..1 << 16).prop_map(Step::Wait),
        ]
    }

    /// The APIC that the steps lead to, enabled at first.
    fn lead(steps: &[Step]) -> (Lapic, VirtualTime) {
        let config = LapicConfig { id: 3, bsp: true, physical_bits: 40, x2apic: true, tsc_deadline: true };
        let mut lapic = Lapic::new(config);
        lapic.set_virtual_wire();
        let mut now = VirtualTime(1000);
        for step in steps {
            match *step {
                Step::Write(index, value) => {
                    lapic.mmio_write(now, u64::from(index) * 16, AccessWidth::Dword, value.into());
                }
                Step::Msr(msr, value) => drop(lapic.msr_write(now, msr, value)),
                Step::Accept(vector, level) => lapic.accept(vector, level),
                Step::Acknowledge => drop(lapic.acknowledge()),
                Step::Nmi => lapic.nmi = true,
                Step::Wait(ns) => {
                    now = now.plus(ns);
                    lapic.advance(now);
                }
            }
            let _ = lapic.take_ipi();
            let _ = lapic.take_eoi();
        }
        (lapic, now)
    }

    proptest! {
        /// Into a new APIC at another time: the same registers there, the same ones again, and the timer is due
        /// after the same time, to a tick of its divider.
        #[test]
        fn all_of_it_goes_out_and_in(steps in prop::collection::vec(step(), 0..60), later in 0u64..1 << 20) {
            let (mut from, now) = lead(&steps);
            let nmi = from.nmi_pending();
            let state = from.take_state(now);
            prop_assert!(!from.nmi_pending() && state.nmi == nmi);
            let there = now.plus(later);
            let mut into = Lapic::new(from.config);
            into.set_tsc_offset(there, 0u64.wrapping_sub(later));
            into.set_state(there, &state);
            prop_assert_eq!(into.nmi_pending(), nmi);
            prop_assert_eq!((into.interrupt_pending(), into.accepts_extint()), (from.interrupt_pending(), from.accepts_extint()));
            let mut same = Lapic { lint_lines: from.lint_lines, errors: from.errors, ..from.clone() };
            let due = |lapic: &Lapic, now: VirtualTime| lapic.next_event().map(|at| at.since(now));
            match (due(&from, now), due(&into, there)) {
                (Some(left), Some(then)) => prop_assert!((left..left + 128).contains(&then), "{left} became {then}"),
                (left, then) => prop_assert_eq!(left, then),
            }
            prop_assert_eq!(into.take_state(there), LocalApic { nmi, ..state });
            // And back, where everything else is still as it was.
            same.set_state(now, &state);
            prop_assert_eq!(same.take_state(now), state);
            prop_assert_eq!((same.lint_lines, same.errors), (from.lint_lines, from.errors));
        }
    }
}
