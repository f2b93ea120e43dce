//! [`LocalApic`] as KVM's page of registers and back. Nothing here talks to the kernel.

use kvm_bindings::kvm_lapic_state;
use std::ffi::c_char;
use umbra_arch::LocalApic;
use umbra_arch::local_apic::{APIC_REGISTERS, index};

/// IA32_APIC_BASE with x2APIC mode on.
const X2APIC_MODE: u64 = 3 << 10;
/// Local vector table fields.
const VECTOR: u32 = 0xff;
const MASKED: u32 = 1 << 16;
const TIMER_MODE: u32 = 3 << 17;
const ONE_SHOT: u32 = 0;
const PERIODIC: u32 = 1 << 17;

type Registers = [u32; APIC_REGISTERS];

/// The page for KVM_SET_LAPIC.
pub(super) fn page_of(apic: &LocalApic) -> kvm_lapic_state {
    let mut registers = apic.registers;
    if is_x2apic(apic.base) {
        at(&mut registers, index::ID, |id| id << 24);
    }
    if is_timer_at_end(&apic.registers) {
        // KVM would fire it again.
        at(&mut registers, index::INITIAL_COUNT, |_| 0);
    }
    let mut page = kvm_lapic_state::default();
    for (bytes, register) in page.regs.as_chunks_mut::<16>().0.iter_mut().zip(registers) {
        bytes[..4].copy_from_slice(&register.to_le_bytes().map(|byte| byte as c_char));
    }
    page
}

/// The registers of KVM_GET_LAPIC's page, with the local APIC's mode by IA32_APIC_BASE.
pub(super) fn registers_of(page: &kvm_lapic_state, base: u64) -> Registers {
    let mut registers = [0; APIC_REGISTERS];
    for (register, bytes) in registers.iter_mut().zip(page.regs.as_chunks::<16>().0) {
        *register = u32::from_le_bytes([0, 1, 2, 3].map(|n| bytes[n] as u8));
    }
    if is_x2apic(base) {
        at(&mut registers, index::ID, |id| id >> 24);
    }
    if registers[usize::from(index::LVT_TIMER)] & TIMER_MODE == PERIODIC && is_timer_at_end(&registers) {
        // It goes on: KVM rounds down, we up.
        at(&mut registers, index::CURRENT_COUNT, |_| 1);
    }
    registers
}

/// The first register that KVM took otherwise, if any, in words. What time changes is left out.
pub(super) fn difference(wanted: &kvm_lapic_state, found: &kvm_lapic_state) -> Option<String> {
    let (wanted, found) = (registers_of(wanted, 0), registers_of(found, 0));
    let timer = wanted[usize::from(index::LVT_TIMER)];
    let ignored = |register: u16| match register {
        index::VERSION | index::APR | index::PPR | index::CURRENT_COUNT => u32::MAX,
        // The timer may have fired since.
        index::IRR0..=index::IRR7
            if timer & MASKED == 0 && u32::from(register - index::IRR0) == (timer & VECTOR) / 32 =>
        {
            1 << (timer % 32)
        }
        _ => 0,
    };
    let mut pairs = (0..).zip(wanted.into_iter().zip(found));
    let (register, (wanted, found)) = pairs.find(|&(n, (wanted, found))| (wanted ^ found) & !ignored(n) != 0)?;
    Some(format!("register {register:#x}: {wanted:#x} became {found:#x}"))
}

/// Whether the timer was started and has come to its end; what KVM made of that can't be seen here.
pub(super) fn is_timer_at_end(registers: &Registers) -> bool {
    let register = |index: u16| registers[usize::from(index)];
    matches!(register(index::LVT_TIMER) & TIMER_MODE, ONE_SHOT | PERIODIC)
        && register(index::INITIAL_COUNT) != 0
        && register(index::CURRENT_COUNT) == 0
}

/// Whether the timer will interrupt by itself.
pub(super) fn is_timer_armed(registers: &Registers, tsc_deadline: u64) -> bool {
    let register = |index: u16| registers[usize::from(index)];
    register(index::LVT_TIMER) & MASKED == 0 && (register(index::CURRENT_COUNT) != 0 || tsc_deadline != 0)
}

fn is_x2apic(base: u64) -> bool {
    base & X2APIC_MODE == X2APIC_MODE
}

fn at(registers: &mut Registers, index: u16, change: impl FnOnce(u32) -> u32) {
    let register = &mut registers[usize::from(index)];
    *register = change(*register);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apic(base: u64) -> LocalApic {
        LocalApic { base, registers: std::array::from_fn(|n| 0x0101_0101 * n as u32), tsc_deadline: 0, nmi: false }
    }

    #[test]
    fn each_register_has_its_place_in_the_page() {
        let page = page_of(&apic(0xfee0_0900));
        for (at, byte) in page.regs.iter().enumerate() {
            let expected = if at % 16 < 4 { at / 16 } else { 0 };
            assert_eq!(*byte as usize, expected, "byte {at:#x}");
        }
    }

    #[test]
    fn there_and_back_in_both_modes() {
        for base in [0xfee0_0900, 0xfee0_0d00] {
            let mut apic = apic(base);
            apic.registers[usize::from(index::ID)] = if is_x2apic(base) { 5 } else { 5 << 24 };
            let page = page_of(&apic);
            assert_eq!(page.regs[0x23], 5, "KVM has the id at the top in both");
            assert_eq!(registers_of(&page, base), apic.registers);
        }
    }

    #[test]
    fn a_fired_shot_is_not_fired_again_and_a_period_of_kvms_goes_on() {
        for (lvt, current, kept, read) in
            [(0x40, 0, 0, 0), (0x40, 7, 9, 7), (0x2_0040, 0, 0, 1), (0x2_0040, 7, 9, 7), (0x4_0040, 0, 9, 0)]
        {
            let mut apic = apic(0xfee0_0900);
            for (index, value) in [(index::LVT_TIMER, lvt), (index::INITIAL_COUNT, 9), (index::CURRENT_COUNT, current)]
            {
                at(&mut apic.registers, index, |_| value);
            }
            let mut page = page_of(&apic);
            let place = usize::from(index::INITIAL_COUNT) * 16;
            assert_eq!(page.regs[place], kept, "{lvt:#x} {current}");
            page.regs[place] = 9;
            assert_eq!(registers_of(&page, apic.base)[usize::from(index::CURRENT_COUNT)], read, "{lvt:#x} {current}");
        }
    }

    #[test]
    fn differences_but_for_what_time_changes() {
        let mut registers = [0; APIC_REGISTERS];
        at(&mut registers, index::LVT_TIMER, |_| 0x45);
        let page = |registers| page_of(&LocalApic { base: 0, registers, tsc_deadline: 0, nmi: false });
        let wanted = page(registers);
        for (index, bit, counts) in [
            (index::TPR, 1, true),
            (index::IRR0 + 2, 1 << 5, false),
            (index::IRR0 + 2, 1 << 6, true),
            (index::IRR0 + 1, 1 << 5, true),
            (index::CURRENT_COUNT, 1, false),
            (index::PPR, 1, false),
            (index::LVT_ERROR, 1 << 16, true),
        ] {
            let mut found = registers;
            at(&mut found, index, |value| value ^ bit);
            assert_eq!(difference(&wanted, &page(found)).is_some(), counts, "register {index:#x}");
        }
        at(&mut registers, index::LVT_TIMER, |value| value | MASKED);
        let mut found = registers;
        at(&mut found, index::IRR0 + 2, |_| 1 << 5);
        assert!(difference(&page(registers), &page(found)).is_some(), "a masked timer changes nothing");
    }
}
