use super::*;
use crate::interrupt::BROADCAST;
use crate::soak;
use proptest::prelude::*;
use umbra_arch::Fault;
use umbra_arch::msr::{IA32_APIC_BASE, IA32_TSC_DEADLINE};

const NOW: VirtualTime = VirtualTime(0);

fn config(id: u32) -> LapicConfig {
    LapicConfig { id, bsp: id == 0, physical_bits: 40, x2apic: true, tsc_deadline: true }
}

fn enabled(id: u32) -> Lapic {
    let mut l = Lapic::new(config(id));
    write(&mut l, index::SVR, 0x1ff);
    l
}

fn write(l: &mut Lapic, index: u16, value: u32) {
    l.mmio_write(NOW, u64::from(index) * 16, AccessWidth::Dword, value.into());
}

fn read(l: &mut Lapic, index: u16) -> u32 {
    l.mmio_read(NOW, u64::from(index) * 16, AccessWidth::Dword) as u32
}

fn into_x2apic(l: &mut Lapic) {
    let base = l.msr_read(NOW, IA32_APIC_BASE).unwrap();
    l.msr_write(NOW, IA32_APIC_BASE, base | base::EXTD).unwrap();
}

#[test]
fn power_on_values() {
    let mut l = Lapic::new(config(3));
    for (index, value) in [
        (index::ID, 3 << 24),
        (index::VERSION, 0x0005_0014),
        (index::TPR, 0),
        (index::LDR, 0),
        (index::DFR, 0xffff_ffff),
        (index::SVR, 0xff),
        (index::ESR, 0),
        (index::LVT_TIMER, 0x1_0000),
        (index::LVT_LINT0, 0x1_0000),
        (index::LVT_ERROR, 0x1_0000),
        (index::INITIAL_COUNT, 0),
        (index::DIVIDE, 0),
    ] {
        assert_eq!(read(&mut l, index), value, "register {index:#x}");
    }
    assert_eq!(l.apic_base(), 0xfee0_0800);
    assert_eq!(Lapic::new(config(0)).apic_base(), 0xfee0_0900);
    assert!(!l.accepts_extint());
    l.set_virtual_wire();
    assert!(!l.accepts_extint(), "only the bootstrap processor takes the 8259's interrupts");
}

#[test]
fn base_register_transitions() {
    // Mode bits EN << 1 | EXTD; legal changes by "x2APIC State Transitions".
    let legal = |from: u64, to: u64| !matches!((from, to), (_, 1) | (0, 3) | (3, 2));
    let bits = |mode: u64| (mode >> 1) << 11 | (mode & 1) << 10;
    for from in [0u64, 2, 3] {
        for to in 0..4u64 {
            let mut l = Lapic::new(config(1));
            match from {
                0 => l.msr_write(NOW, IA32_APIC_BASE, 0xfee0_0000).unwrap(),
                3 => into_x2apic(&mut l),
                _ => {}
            }
            let result = l.msr_write(NOW, IA32_APIC_BASE, 0xfee0_0000 | bits(to));
            assert_eq!(result.is_ok(), legal(from, to), "from {from} to {to}");
            assert_eq!(l.mmio_base().is_some(), if legal(from, to) { to == 2 } else { from == 2 });
        }
    }
    let mut l = Lapic::new(config(0));
    for bad in [0xfee0_0801u64, 0xfee0_0a00, 1 << 40 | 0x800] {
        assert_eq!(l.msr_write(NOW, IA32_APIC_BASE, bad), Err(Fault::GP0), "{bad:#x}");
    }
    l.msr_write(NOW, IA32_APIC_BASE, 0x12_3456_7000 | 0x900).unwrap();
    assert_eq!(l.mmio_base(), Some(0x12_3456_7000));
}

#[test]
fn x2apic_register_access() {
    let readable =
        |i: u16| matches!(i, 0x02 | 0x03 | 0x08 | 0x0a | 0x0d | 0x0f | 0x10..=0x28 | 0x30 | 0x32..=0x39 | 0x3e);
    let writable = |i: u16| matches!(i, 0x08 | 0x0b | 0x0f | 0x28 | 0x30 | 0x32..=0x38 | 0x3e | 0x3f);
    for i in 0..=0xffu16 {
        let mut l = Lapic::new(config(1));
        assert_eq!(l.msr_read(NOW, 0x800 + u32::from(i)), Err(Fault::GP0), "xAPIC mode has no such MSRs");
        into_x2apic(&mut l);
        assert_eq!(l.msr_read(NOW, 0x800 + u32::from(i)).is_ok(), readable(i), "read {i:#x}");
        assert_eq!(l.msr_write(NOW, 0x800 + u32::from(i), 0).is_ok(), writable(i), "write {i:#x}");
    }
}

#[test]
fn x2apic_reserved_bits() {
    let ok_bits: &[(u32, u64)] = &[
        (0x808, 0xff),
        (0x80b, 0),
        (0x80f, 0x3ff),
        (0x828, 0),
        (0x830, 0xffff_ffff_000c_cfff),
        (0x832, 0x7_50ff),
        (0x833, 0x1_57ff),
        (0x834, 0x1_57ff),
        (0x835, 0x1_f7ff),
        (0x836, 0x1_f7ff),
        (0x837, 0x1_50ff),
        (0x838, 0xffff_ffff),
        (0x83e, 0xb),
        (0x83f, 0xff),
    ];
    for &(msr, ok) in ok_bits {
        for bit in 0..64 {
            let mut l = Lapic::new(config(1));
            into_x2apic(&mut l);
            assert_eq!(l.msr_write(NOW, msr, 1 << bit).is_ok(), ok >> bit & 1 != 0, "{msr:#x} bit {bit}");
        }
    }
}

#[test]
fn x2apic_identity() {
    let mut l = enabled(0x25);
    into_x2apic(&mut l);
    assert_eq!(l.msr_read(NOW, 0x802), Ok(0x25));
    assert_eq!(l.msr_read(NOW, 0x80d), Ok(0x2_0020));
    assert_eq!(l.mmio_base(), None);
    l.msr_write(NOW, 0x83f, 0x77).unwrap();
    let ipi = l.take_ipi().unwrap();
    deliver_ipi(std::slice::from_mut(&mut l), 0, &ipi);
    assert_eq!(l.acknowledge(), 0x77);
}

/// Requests, service and priorities against lists kept sorted.
#[derive(Default)]
struct Model {
    requests: Vec<u8>,
    serving: Vec<u8>,
    tpr: u8,
}

impl Model {
    fn class(&self) -> u8 {
        (self.tpr >> 4).max(self.serving.iter().max().map_or(0, |v| v >> 4))
    }
    fn pending(&self) -> Option<u8> {
        self.requests.iter().copied().max().filter(|v| v >> 4 > self.class())
    }
}

proptest! {
    #[test]
    fn priorities_against_a_model(ops in proptest::collection::vec((0u8..4, any::<u8>()), 1..200)) {
        let mut l = enabled(0);
        let mut m = Model::default();
        for (op, value) in ops {
            match op {
                0 => {
                    l.accept(value, false);
                    if value >= 16 && !m.requests.contains(&value) {
                        m.requests.push(value);
                    }
                }
                1 => {
                    let expected = m.pending();
                    if let Some(v) = expected {
                        m.requests.retain(|r| *r != v);
                        m.serving.push(v);
                    }
                    prop_assert_eq!(l.acknowledge(), expected.unwrap_or(0xff));
                }
                2 => {
                    write(&mut l, index::EOI, 0);
                    if let Some(v) = m.serving.iter().copied().max() {
                        m.serving.retain(|r| *r != v);
                    }
                }
                _ => {
                    m.tpr = value;
                    if value & 1 == 0 {
                        write(&mut l, index::TPR, value.into());
                    } else {
                        m.tpr = value & 0xf0;
                        l.set_cr8(value >> 4);
                    }
                }
            }
            prop_assert_eq!(l.interrupt_pending(), m.pending().is_some());
            prop_assert_eq!(l.cr8(), m.tpr >> 4);
            prop_assert_eq!(read(&mut l, index::PPR) >> 4, u32::from(m.class()));
            for n in 0..8u16 {
                let bits = |list: &[u8]| list.iter().filter(|v| u16::from(**v >> 5) == n).fold(0u32, |b, v| b | 1 << (v & 31));
                prop_assert_eq!(read(&mut l, index::IRR0 + n), bits(&m.requests));
                prop_assert_eq!(read(&mut l, index::ISR0 + n), bits(&m.serving));
            }
        }
    }

    #[test]
    fn survives_anything(steps in soak::steps()) {
        let places: Vec<u64> = (0..0x40).map(|i| i * 16).collect();
        soak::mmio(enabled(2), &places, &steps, |l, now| {
            if let Some(ipi) = l.take_ipi() {
                l.receive(&ipi.message);
            }
            l.take_eoi();
            if now.0 % 3 == 0 {
                l.acknowledge();
            }
            l.set_lint((now.0 % 3) as usize, now.0 & 0x40 != 0);
        });
    }

    #[test]
    fn msrs_survive_anything(ops in proptest::collection::vec((0u32..0x48, any::<u64>(), 0u64..1 << 40, any::<bool>()), 1..100)) {
        let mut l = enabled(2);
        let mut now = NOW;
        for (msr, value, gap, write) in ops {
            now = now.plus(gap);
            let msr = match msr { 0x40..0x44 => IA32_APIC_BASE, 0x44..0x48 => IA32_TSC_DEADLINE, i => 0x800 + i };
            let value = if msr == IA32_APIC_BASE { 0xfee0_0000 | value & 0xc00 } else { value >> (value & 63) };
            if write {
                let _ = l.msr_write(now, msr, value);
            } else {
                let _ = l.msr_read(now, msr);
            }
            l.advance(now);
            prop_assert!(l.next_event().is_none_or(|event| event > now));
            let copy: Lapic = postcard::from_bytes(&postcard::to_stdvec(&l).unwrap()).unwrap();
            prop_assert_eq!(&copy, &l);
        }
    }
}

#[test]
fn level_interrupts_broadcast_their_eoi() {
    let mut l = enabled(0);
    l.accept(0x40, true);
    l.accept(0x50, false);
    assert_eq!(read(&mut l, index::TMR0 + 2), 1);
    assert_eq!(l.acknowledge(), 0x50);
    write(&mut l, index::EOI, 0);
    assert_eq!(l.take_eoi(), None);
    assert_eq!(l.acknowledge(), 0x40);
    write(&mut l, index::EOI, 0);
    assert_eq!(l.take_eoi(), Some(0x40));
    write(&mut l, index::EOI, 0);
    assert_eq!(l.take_eoi(), None, "nothing in service");
}

#[test]
fn software_disabled_masks_and_refuses() {
    let mut l = enabled(0);
    write(&mut l, index::LVT_TIMER, 0x40);
    l.accept(0x60, false);
    write(&mut l, index::SVR, 0xef);
    assert_eq!(read(&mut l, index::LVT_TIMER), 0x1_0040);
    write(&mut l, index::LVT_TIMER, 0x41);
    assert_eq!(read(&mut l, index::LVT_TIMER), 0x1_0041, "the mask cannot be cleared");
    l.accept(0x70, false);
    assert_eq!(l.acknowledge(), 0x60, "what was requested before is held");
    assert_eq!(l.acknowledge(), 0xef);
}

#[test]
fn icr_makes_messages() {
    let mut l = enabled(5);
    write(&mut l, index::ICR_HIGH, 0x0700_0000);
    for (low, mode, logical, shorthand) in [
        (0x0_00f1, Some(DeliveryMode::Fixed), false, Shorthand::None),
        (0x0_09f1, Some(DeliveryMode::LowestPriority), true, Shorthand::None),
        (0x4_0440, Some(DeliveryMode::Nmi), false, Shorthand::SelfOnly),
        (0x8_45f1, Some(DeliveryMode::Init), false, Shorthand::All),
        (0xc_0610, Some(DeliveryMode::StartUp), false, Shorthand::AllButSelf),
        (0x0_c500, Some(DeliveryMode::Init), false, Shorthand::None),
        (0x0_8500, None, false, Shorthand::None),
        (0x0_0300, None, false, Shorthand::None),
        (0x0_000f, None, false, Shorthand::None),
    ] {
        write(&mut l, index::ICR_LOW, low);
        let expected = mode.map(|mode| Ipi {
            message: InterruptMessage { destination: 7, logical, mode, vector: low as u8, level: false, assert: true },
            shorthand,
        });
        assert_eq!(l.take_ipi(), expected, "{low:#x}");
        assert_eq!(read(&mut l, index::ICR_LOW), low);
    }
    write(&mut l, index::ESR, 0);
    assert_eq!(read(&mut l, index::ESR), error::SEND_ILLEGAL_VECTOR);
}

#[test]
fn destinations() {
    let xapic = |id: u32, ldr: u32, dfr: u32| {
        let mut l = enabled(id);
        write(&mut l, index::LDR, ldr << 24);
        write(&mut l, index::DFR, dfr << 28);
        l
    };
    let mut x2 = enabled(0x13);
    into_x2apic(&mut x2);
    for (lapic, destination, logical, hit) in [
        (xapic(3, 0, 0xf), 3, false, true),
        (xapic(3, 0, 0xf), 4, false, false),
        (xapic(3, 0, 0xf), BROADCAST, false, true),
        (xapic(3, 0x08, 0xf), 0x0c, true, true),
        (xapic(3, 0x08, 0xf), 0x07, true, false),
        (xapic(3, 0x08, 0xf), 0xff, true, true),
        (xapic(3, 0x21, 0), 0x21, true, true),
        (xapic(3, 0x21, 0), 0x23, true, true),
        (xapic(3, 0x21, 0), 0x31, true, false),
        (xapic(3, 0x21, 0), 0xf1, true, true),
        (xapic(3, 0x21, 0), 0xf2, true, false),
        (x2.clone(), 0x13, false, true),
        (x2.clone(), 0x1_0008, true, true),
        (x2.clone(), 0x1_0006, true, false),
        (x2.clone(), 0x2_0008, true, false),
        (x2.clone(), BROADCAST, true, true),
        (Lapic { base: 0, ..enabled(3) }, 3, false, false),
    ] {
        assert_eq!(lapic.is_destination(destination, logical), hit, "{destination:#x} {logical} {lapic:?}");
    }
}

#[test]
fn shorthands_and_lowest_priority() {
    let mut all: Vec<Lapic> = (0..4).map(enabled).collect();
    let send = |all: &mut [Lapic], from: usize, high: u32, low: u32| {
        write(&mut all[from], index::ICR_HIGH, high);
        write(&mut all[from], index::ICR_LOW, low);
        let ipi = all[from].take_ipi().unwrap();
        deliver_ipi(all, from, &ipi);
        let hit: Vec<bool> = all.iter().map(Lapic::interrupt_pending).collect();
        for lapic in all.iter_mut() {
            while lapic.interrupt_pending() {
                lapic.acknowledge();
                write(lapic, index::EOI, 0);
            }
        }
        hit
    };
    assert_eq!(send(&mut all, 2, 0, 0x4_0040), [false, false, true, false]);
    assert_eq!(send(&mut all, 2, 0, 0x8_0040), [true; 4]);
    assert_eq!(send(&mut all, 2, 0, 0xc_0040), [true, true, false, true]);
    assert_eq!(send(&mut all, 2, 0x0300_0000, 0x0040), [false, false, false, true]);
    assert_eq!(send(&mut all, 2, 0xff00_0000, 0x0040), [true; 4]);
    write(&mut all[0], index::TPR, 0x20);
    assert_eq!(send(&mut all, 2, 0xff00_0000, 0x0140), [false, true, false, false]);
}

#[test]
fn init_and_startup() {
    let mut all: Vec<Lapic> = (0..2).map(enabled).collect();
    write(&mut all[0], index::ICR_HIGH, 1 << 24);
    write(&mut all[0], index::ICR_LOW, 0x4500);
    let ipi = all[0].take_ipi().unwrap();
    deliver_ipi(&mut all, 0, &ipi);
    assert!(all[1].take_init() && !all[0].take_init());
    all[1].init();
    assert_eq!(read(&mut all[1], index::SVR), 0xff);
    write(&mut all[0], index::ICR_LOW, 0x4608);
    let ipi = all[0].take_ipi().unwrap();
    deliver_ipi(&mut all, 0, &ipi);
    assert_eq!(all[1].take_startup(), Some(8));
    assert_eq!(all[1].take_startup(), None);
}

#[test]
fn errors_and_their_interrupt() {
    let mut l = enabled(0);
    write(&mut l, index::LVT_ERROR, 0xe3);
    l.accept(3, false);
    assert_eq!(l.acknowledge(), 0xe3);
    assert_eq!(read(&mut l, index::ESR), 0, "not latched yet");
    l.mmio_read(NOW, 0x40, AccessWidth::Dword);
    write(&mut l, index::ESR, 0);
    assert_eq!(read(&mut l, index::ESR), error::RECEIVE_ILLEGAL_VECTOR | error::ILLEGAL_REGISTER);
    write(&mut l, index::ESR, 0);
    assert_eq!(read(&mut l, index::ESR), 0);
}

#[test]
fn local_pins() {
    let mut l = enabled(0);
    l.set_virtual_wire();
    assert!(l.accepts_extint());
    l.set_lint(1, true);
    assert!(l.take_nmi() && !l.nmi_pending());
    write(&mut l, index::LVT_LINT0, 0x8031);
    assert!(!l.accepts_extint());
    l.set_lint(0, true);
    assert_eq!(l.acknowledge(), 0x31);
    assert_eq!(read(&mut l, index::LVT_LINT0), 0xc031, "remote IRR");
    assert!(!l.interrupt_pending());
    write(&mut l, index::EOI, 0);
    assert!(l.interrupt_pending(), "the line is still up");
    l.set_lint(0, false);
    l.acknowledge();
    write(&mut l, index::EOI, 0);
    assert!(!l.interrupt_pending());
    l.msr_write(NOW, IA32_APIC_BASE, 0xfee0_0000).unwrap();
    assert!(l.accepts_extint());
}

#[test]
fn timer_interrupts() {
    let mut l = enabled(0);
    write(&mut l, index::DIVIDE, 0xb);
    write(&mut l, index::LVT_TIMER, 0x2_00ec);
    write(&mut l, index::INITIAL_COUNT, 1000);
    for k in 1..5 {
        let due = VirtualTime(1000 * k);
        assert_eq!(l.next_event(), Some(due));
        l.advance(due);
        assert_eq!(l.acknowledge(), 0xec);
        l.mmio_write(due, 0xb0, AccessWidth::Dword, 0);
    }
    write(&mut l, index::LVT_TIMER, 0x3_00ec);
    assert_eq!(l.next_event(), None, "masked");
    l.msr_write(VirtualTime(9000), IA32_TSC_DEADLINE, 9500).unwrap();
    assert_eq!(l.msr_read(VirtualTime(9000), IA32_TSC_DEADLINE), Ok(0), "not in deadline mode");
    l.mmio_write(VirtualTime(9000), 0x320, AccessWidth::Dword, 0x4_00ec);
    l.msr_write(VirtualTime(9000), IA32_TSC_DEADLINE, 9500).unwrap();
    assert_eq!(l.next_event(), Some(VirtualTime(9500)));
    l.advance(VirtualTime(9500));
    assert_eq!(l.acknowledge(), 0xec);
    assert_eq!(l.mmio_read(VirtualTime(9500), 0x390, AccessWidth::Dword), 0);
}
