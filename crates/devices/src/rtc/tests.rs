use super::calendar::BINARY;
use super::*;
use crate::soak;
use proptest::prelude::*;

/// 2024-02-29 23:59:58 UTC.
const START: i64 = 1_709_251_198;

fn read(r: &mut Rtc, now: u64, index: u8) -> u8 {
    r.port_write(VirtualTime(now), 0x70, AccessWidth::Byte, index.into());
    r.port_read(VirtualTime(now), 0x71, AccessWidth::Byte) as u8
}

fn write(r: &mut Rtc, now: u64, index: u8, value: u8) {
    r.port_write(VirtualTime(now), 0x70, AccessWidth::Byte, index.into());
    r.port_write(VirtualTime(now), 0x71, AccessWidth::Byte, value.into());
}

fn time(r: &mut Rtc, now: u64) -> [u8; 8] {
    [0, 2, 4, 6, 7, 8, 9, 0x32].map(|index| read(r, now, index))
}

#[test]
fn shows_the_start_and_goes_on() {
    let mut r = Rtc::new(START);
    assert_eq!(time(&mut r, 0), [0x58, 0x59, 0x23, 5, 0x29, 2, 0x24, 0x20]);
    assert_eq!(time(&mut r, SECOND - 1)[0], 0x58);
    assert_eq!(time(&mut r, 2 * SECOND), [0, 0, 0, 6, 1, 3, 0x24, 0x20]);
    assert_eq!(read(&mut r, 2 * SECOND, cmos::D), 0x80);
    assert_eq!(read(&mut r, 2 * SECOND, cmos::B), 0x02);
}

#[test]
fn update_in_progress_before_each_second() {
    let mut r = Rtc::new(START);
    for (now, uip) in [
        (0, 0),
        (SECOND - 244_001, 0),
        (SECOND - 244_000, 0x80),
        (SECOND - 1, 0x80),
        (SECOND, 0),
        (2 * SECOND - 1, 0x80),
    ] {
        assert_eq!(read(&mut r, now, cmos::A), 0x26 | uip, "{now}");
    }
}

#[test]
fn setting_the_time() {
    let mut r = Rtc::new(START);
    write(&mut r, 100, cmos::B, B_SET | HOURS_24 | BINARY);
    for (index, value) in [(0, 1u8), (2, 2), (4, 3), (7, 4), (8, 5), (9, 6), (0x32, 21)] {
        write(&mut r, 200, index, value);
    }
    assert_eq!(read(&mut r, 5 * SECOND, 0), 1, "stopped");
    write(&mut r, 5 * SECOND + 1, cmos::B, HOURS_24 | BINARY);
    assert_eq!(time(&mut r, 6 * SECOND - 1), [1, 2, 3, 3, 4, 5, 6, 21]);
    assert_eq!(time(&mut r, 6 * SECOND)[0], 2, "the divider went on meanwhile");
    write(&mut r, 6 * SECOND, 2, 40);
    assert_eq!(time(&mut r, 6 * SECOND)[..3], [2, 40, 3]);
}

#[test]
fn divider_reset_gives_half_a_second() {
    let mut r = Rtc::new(START);
    write(&mut r, 700_000_000, cmos::A, 0x70);
    write(&mut r, 700_000_100, cmos::A, 0x26);
    let second = read(&mut r, 700_000_100, 0);
    assert_eq!(read(&mut r, 1_200_000_099, 0), second);
    assert_ne!(read(&mut r, 1_200_000_100, 0), second);
}

#[test]
fn periodic_interrupt_at_every_rate() {
    for rate in 1..16u8 {
        let hz = match rate {
            1 => 256,
            2 => 128,
            _ => 65_536u64 >> rate,
        };
        let mut r = Rtc::new(START);
        write(&mut r, 0, cmos::A, 0x20 | rate);
        write(&mut r, 0, cmos::B, PERIODIC | HOURS_24);
        for n in 1..=5 * hz {
            let due = VirtualTime((n * SECOND).div_ceil(hz));
            assert_eq!(r.next_event(), Some(due), "rate {rate}");
            r.advance(VirtualTime(due.0 - 1));
            assert!(!r.irq());
            r.advance(due);
            assert!(r.irq());
            assert_eq!(r.next_event(), None, "nothing changes until C is read");
            let flags = read(&mut r, due.0, cmos::C);
            assert_eq!(flags & 0xc0, 0xc0);
            assert!(!r.irq());
        }
    }
}

#[test]
fn update_and_alarm_interrupts() {
    let mut r = Rtc::new(START);
    write(&mut r, 0, cmos::B, UPDATE | HOURS_24);
    assert_eq!(r.next_event(), Some(VirtualTime(SECOND)));
    r.advance(VirtualTime(SECOND));
    assert_eq!(read(&mut r, SECOND, cmos::C), C_IRQF | UPDATE | PERIODIC);
    // 00:00:05, three and then 86400 seconds after midnight's start.
    for (index, value) in [(1, 0x05), (3, 0), (5, 0)] {
        write(&mut r, SECOND, index, value);
    }
    write(&mut r, SECOND, cmos::B, ALARM | HOURS_24);
    assert_eq!(r.next_event(), Some(VirtualTime(7 * SECOND)));
    r.advance(VirtualTime(7 * SECOND));
    assert!(r.irq());
    assert_eq!(read(&mut r, 7 * SECOND, cmos::C) & ALARM, ALARM);
    assert_eq!(r.next_event(), Some(VirtualTime(86_407 * SECOND)));
    write(&mut r, 7 * SECOND, 5, 0xff);
    assert_eq!(r.next_event(), Some(VirtualTime(3607 * SECOND)));
    write(&mut r, 7 * SECOND, 5, 0x99);
    assert_eq!(r.next_event(), None);
}

#[test]
fn flags_come_up_without_interrupt() {
    let mut r = Rtc::new(START);
    assert_eq!(read(&mut r, 10 * SECOND, cmos::C), UPDATE | PERIODIC | ALARM, "the alarm registers say midnight");
    assert_eq!(read(&mut r, 10 * SECOND, cmos::C), 0);
}

#[test]
fn memory_size_bytes() {
    let mut r = Rtc::new(START);
    r.set_memory_size(3 << 30, 5 << 30);
    let number =
        |r: &Rtc, index: u8, bytes: u8| (0..bytes).rev().fold(0u64, |n, i| n << 8 | u64::from(r.cmos(index + i)));
    assert_eq!(number(&r, 0x15, 2), 640);
    assert_eq!(number(&r, 0x17, 2), 0xffff);
    assert_eq!((number(&r, 0x34, 2) << 16) + (16 << 20), 3 << 30);
    assert_eq!(number(&r, 0x5b, 3) << 16, 5 << 30);
    r.set_memory_size(8 << 20, 0);
    assert_eq!((number(&r, 0x30, 2), number(&r, 0x34, 2)), (7 << 10, 0));
}

#[test]
fn index_ports_and_nmi_mask() {
    let mut r = Rtc::new(START);
    write(&mut r, 0, 0x80 | 0x40, 0x12);
    assert!(r.nmi_masked());
    assert_eq!(read(&mut r, 0, 0x40), 0x12);
    assert!(!r.nmi_masked());
    r.port_write(VirtualTime(0), 0x72, AccessWidth::Byte, 0x40);
    r.port_write(VirtualTime(0), 0x73, AccessWidth::Byte, 0x34);
    assert_eq!((r.cmos(0x40), r.cmos(0xc0)), (0x12, 0x34));
}

#[test]
fn reset_keeps_time_and_ram() {
    let mut r = Rtc::new(START);
    write(&mut r, 0, cmos::B, 0x72);
    write(&mut r, 0, 0x50, 7);
    r.reset();
    assert_eq!(read(&mut r, 0, cmos::B), 0x02);
    assert_eq!(read(&mut r, 0, 0x50), 7);
    assert_eq!(read(&mut r, 0, 0), 0x58);
}

proptest! {
    #[test]
    fn survives_anything(steps in soak::steps()) {
        let ports = [0x70, 0x71, 0x71, 0x71, 0x72, 0x73];
        soak::ports(Rtc::new(START), &ports, &steps, |_, _| {});
    }

    /// Only the registers with behaviour, so that interrupts, SET and the divider meet.
    #[test]
    fn clock_registers_survive_anything(ops in proptest::collection::vec((0u8..14, any::<u8>(), 0u64..3_000_000_000), 1..100)) {
        let mut r = Rtc::new(START);
        let mut now = 0;
        for (index, value, gap) in ops {
            now += gap;
            write(&mut r, now, index, value);
            let event = r.next_event();
            prop_assert!(event.is_none_or(|event| event.0 > now), "{:?} at {}", event, now);
            if let Some(event) = event {
                let mut early = r.clone();
                early.advance(VirtualTime(event.0 - 1));
                prop_assert!(!early.irq());
                early.advance(event);
                prop_assert!(early.irq());
            }
        }
    }
}
