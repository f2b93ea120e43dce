//! All clocks tell the same time, and their interrupts reach a CPU through the controllers.

use umbra_arch::{AccessWidth, VirtualTime};
use umbra_devices::acpi_pm::{PM_TIMER_HZ, PM_TMR_BLK};
use umbra_devices::hpet::HPET_HZ;
use umbra_devices::lapic::{self, index};
use umbra_devices::pit::PIT_HZ;
use umbra_devices::{
    AcpiPm, Device, Hpet, IoApic, LAPIC_HZ, Lapic, LapicConfig, MmioDevice, PicPair, Pit, PortDevice, Rtc, Uart,
};

const SECOND: u64 = 1_000_000_000;
const BYTE: AccessWidth = AccessWidth::Byte;
const DWORD: AccessWidth = AccessWidth::Dword;
const START: VirtualTime = VirtualTime(0);

fn lapic_enabled() -> Lapic {
    let config = LapicConfig { id: 0, bsp: true, physical_bits: 39, x2apic: true, tsc_deadline: true };
    let mut lapic = Lapic::new(config);
    write_lapic(&mut lapic, START, index::SVR, 0x1ff);
    lapic
}

fn write_lapic(lapic: &mut Lapic, now: VirtualTime, register: u16, value: u32) {
    lapic.mmio_write(now, u64::from(register) * 16, DWORD, value.into());
}

fn redirect(ioapic: &mut IoApic, pin: u64, entry: u64) {
    for (half, value) in [(0, entry & 0xffff_ffff), (1, entry >> 32)] {
        ioapic.mmio_write(START, 0, DWORD, 0x10 + 2 * pin + half);
        ioapic.mmio_write(START, 0x10, DWORD, value);
    }
}

/// Runs a device from event to event up to `end`; counts how often `happened` says so.
fn count_events<D: Device>(
    device: &mut D,
    end: VirtualTime,
    mut happened: impl FnMut(&mut D, VirtualTime) -> bool,
) -> u64 {
    let mut count = 0;
    while let Some(event) = device.next_event().filter(|&event| event <= end) {
        device.advance(event);
        count += u64::from(happened(device, event));
    }
    count
}

#[test]
fn periodic_interrupts_of_ten_minutes_are_neither_lost_nor_invented() {
    let end = VirtualTime(600 * SECOND);

    let mut pit = Pit::default();
    for (port, value) in [(0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e)] {
        pit.port_write(START, port, BYTE, value);
    }
    pit.take_irq0_rise();
    // Count 11932 is loaded one tick after it is written.
    let expected = (600 * PIT_HZ - 1) / 11_932;
    assert_eq!(count_events(&mut pit, end, |pit, _| pit.take_irq0_rise()), expected);

    let mut rtc = Rtc::new(0);
    for (index, value) in [(0x0a, 0x2a), (0x0b, 0x42)] {
        rtc.port_write(START, 0x70, BYTE, index);
        rtc.port_write(START, 0x71, BYTE, value);
    }
    let count = count_events(&mut rtc, end, |rtc, now| {
        rtc.port_write(now, 0x70, BYTE, 0x0c);
        rtc.port_read(now, 0x71, BYTE) & 0x40 != 0
    });
    assert_eq!(count, 600 * 64);

    let mut lapic = lapic_enabled();
    write_lapic(&mut lapic, START, index::DIVIDE, 0x3);
    write_lapic(&mut lapic, START, index::LVT_TIMER, 0x2_0040);
    write_lapic(&mut lapic, START, index::INITIAL_COUNT, 625_007);
    let count = count_events(&mut lapic, end, |lapic, now| {
        let taken = lapic.interrupt_pending() && lapic.acknowledge() == 0x40;
        write_lapic(lapic, now, index::EOI, 0);
        taken
    });
    assert_eq!(count, 600 * LAPIC_HZ / (16 * 625_007));

    let mut hpet = Hpet::new();
    hpet.mmio_write(START, 0x100, DWORD, 20 << 9 | 1 << 2 | 1 << 3 | 1 << 6);
    hpet.mmio_write(START, 0x108, AccessWidth::Qword, 123_457);
    hpet.mmio_write(START, 0x10, DWORD, 1);
    assert_eq!(count_events(&mut hpet, end, |hpet, _| hpet.take_pulses() == 1 << 20), 600 * HPET_HZ / 123_457);
}

#[test]
fn counters_agree_at_any_time() {
    let mut hpet = Hpet::new();
    hpet.mmio_write(START, 0x10, DWORD, 1);
    let mut pm = AcpiPm::new(true);
    let mut rtc = Rtc::new(1_000_000_000);
    let mut now = START;
    for step in 0..2000u64 {
        now = now.plus(step * 1_234_567 + 89);
        let ns = u128::from(now.0);
        let ticks = |hz: u64| (ns * u128::from(hz) / u128::from(SECOND)) as u64;
        assert_eq!(hpet.mmio_read(now, 0xf0, AccessWidth::Qword), ticks(HPET_HZ));
        assert_eq!(pm.port_read(now, PM_TMR_BLK, DWORD), ticks(PM_TIMER_HZ) as u32);
        rtc.port_write(now, 0x70, BYTE, 0);
        let seconds = rtc.port_read(now, 0x71, BYTE);
        // 2001-09-09 01:46:40 at the start.
        assert_eq!(u64::from((seconds >> 4) * 10 + (seconds & 15)), (40 + ticks(1)) % 60);
    }
}

#[test]
fn serial_interrupt_through_the_io_apic() {
    let (mut uart, mut ioapic, mut lapic) = (Uart::new(0x3f8), IoApic::new(0), lapic_enabled());
    redirect(&mut ioapic, 4, 0x34);
    for (port, value) in [(0x3fc, 0x0b), (0x3f9, 0x02)] {
        uart.port_write(START, port, BYTE, value);
    }
    let mut sent = Vec::new();
    for byte in *b"through" {
        ioapic.set_line(4, uart.irq());
        while let Some(message) = ioapic.take_message() {
            lapic::deliver(std::slice::from_mut(&mut lapic), &message);
        }
        assert!(lapic.interrupt_pending());
        assert_eq!(lapic.acknowledge(), 0x34);
        assert_eq!(uart.port_read(START, 0x3fa, BYTE), 0x02);
        ioapic.set_line(4, uart.irq());
        uart.port_write(START, 0x3f8, BYTE, byte.into());
        sent.extend(uart.take_output());
        write_lapic(&mut lapic, START, index::EOI, 0);
        assert_eq!(lapic.take_eoi(), None, "edge-triggered");
    }
    assert_eq!(sent, b"through");
}

#[test]
fn timer_interrupt_through_the_8259_and_lint0() {
    let (mut pit, mut pic, mut lapic) = (Pit::default(), PicPair::default(), lapic_enabled());
    lapic.set_virtual_wire();
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1)] {
        pic.port_write(START, port, BYTE, value);
    }
    for (port, value) in [(0x43, 0x34), (0x40, 0), (0x40, 1)] {
        pit.port_write(START, port, BYTE, value);
    }
    pic.set_line(0, pit.irq0());
    pit.take_irq0_rise();
    assert!(pic.intr() && lapic.accepts_extint(), "leaving mode 0 is a first edge");
    assert_eq!(pic.acknowledge(), 0x20);
    for _ in 0..10 {
        pic.port_write(START, 0x20, BYTE, 0x20);
        assert!(!pic.intr());
        while !pic.intr() {
            let event = pit.next_event().unwrap();
            pit.advance(event);
            pic.set_line(0, pit.irq0());
        }
        assert_eq!(pic.acknowledge(), 0x20);
    }
}

#[test]
fn level_interrupt_is_shared_until_both_sources_are_quiet() {
    let (mut pm, mut ioapic, mut lapic) = (AcpiPm::default(), IoApic::new(0), lapic_enabled());
    redirect(&mut ioapic, 9, 0x8000 | 0x59);
    pm.port_write(START, 0xb2, BYTE, 0xf1);
    pm.port_write(START, 0x602, AccessWidth::Word, 0x100);
    pm.press_power_button(START);
    let mut settle = |pm: &AcpiPm, lapic: &mut Lapic| {
        ioapic.set_line(9, pm.sci());
        if let Some(vector) = lapic.take_eoi() {
            ioapic.eoi(vector);
        }
        while let Some(message) = ioapic.take_message() {
            lapic::deliver(std::slice::from_mut(lapic), &message);
        }
    };
    for round in 0..3 {
        settle(&pm, &mut lapic);
        assert_eq!(lapic.acknowledge(), 0x59, "round {round}: still asserted");
        settle(&pm, &mut lapic);
        assert!(!lapic.interrupt_pending(), "remote IRR holds it back");
        if round == 2 {
            pm.port_write(START, 0x600, AccessWidth::Word, 0x100);
        }
        write_lapic(&mut lapic, START, index::EOI, 0);
    }
    settle(&pm, &mut lapic);
    assert!(!lapic.interrupt_pending());
}
