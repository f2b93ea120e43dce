use super::timer::config;
use super::*;
use crate::soak;
use proptest::prelude::*;

const TICK: u64 = 1_000_000_000 / HPET_HZ;

fn write(h: &mut Hpet, tick: u64, offset: u64, value: u64) {
    h.mmio_write(VirtualTime(tick * TICK), offset, AccessWidth::Qword, value);
}

fn read(h: &mut Hpet, tick: u64, offset: u64) -> u64 {
    h.mmio_read(VirtualTime(tick * TICK), offset, AccessWidth::Qword)
}

/// Ticks of the next `n` pulses, taken event by event.
fn pulses(h: &mut Hpet, n: usize) -> Vec<(u64, u32)> {
    let mut seen = Vec::new();
    while seen.len() < n {
        let Some(event) = h.next_event() else { break };
        h.advance(event);
        seen.push((event.0 / TICK, h.take_pulses()));
    }
    seen
}

#[test]
fn capabilities() {
    let mut h = Hpet::new();
    assert_eq!(read(&mut h, 0, 0), 10_000_000 << 32 | 0x8086_a201);
    assert_eq!(h.mmio_read(VirtualTime(0), 4, AccessWidth::Dword), 10_000_000);
    assert_eq!(read(&mut h, 0, 0x100), 0x00f0_0000_0000_0030);
    assert_eq!(read(&mut h, 0, 0x160), 0, "no fourth timer");
    assert_eq!(h.mmio_read(VirtualTime(0), 0, AccessWidth::Byte), 0);
}

#[test]
fn counter_runs_and_halts() {
    let mut h = Hpet::new();
    assert_eq!(read(&mut h, 50, 0xf0), 0);
    write(&mut h, 100, 0xf0, 0xffff_ffff_0000);
    write(&mut h, 100, 0x10, ENABLE);
    assert_eq!(read(&mut h, 0x1_0100, 0xf0), 0x1_0000_0000_009c);
    write(&mut h, 0x1_0200, 0x10, 0);
    assert_eq!(read(&mut h, 0x2_0000, 0xf0), 0x1_0000_0000_019c);
    h.mmio_write(VirtualTime(0x2_0000 * TICK), 0xf4, AccessWidth::Dword, 7);
    assert_eq!(read(&mut h, 0x2_0000, 0xf0), 0x0000_0007_0000_019c);
}

#[test]
fn one_shot_edge() {
    let mut h = Hpet::new();
    write(&mut h, 0, 0x10, ENABLE);
    write(&mut h, 0, 0x120, 21 << config::ROUTE_SHIFT | config::ENABLE);
    write(&mut h, 0, 0x128, 1000);
    assert_eq!(pulses(&mut h, 2), [(1000, 1 << 21)]);
    write(&mut h, 2000, 0x128, 2000);
    assert_eq!(h.take_pulses(), 1 << 21, "equal matches at once");
    write(&mut h, 3000, 0x128, 2999);
    assert_eq!(h.next_event(), None, "passed: not before the counter wraps");
}

#[test]
fn periodic_as_linux_programs_it() {
    let mut h = Hpet::new();
    write(&mut h, 0, 0x10, ENABLE | LEGACY_REPLACEMENT);
    assert!(h.replaces_legacy());
    let bits = config::ENABLE | config::PERIODIC | config::VALUE_SET | config::MODE_32;
    h.mmio_write(VirtualTime(100), 0x100, AccessWidth::Dword, bits);
    h.mmio_write(VirtualTime(100), 0x108, AccessWidth::Dword, 5000);
    h.mmio_write(VirtualTime(200), 0x108, AccessWidth::Dword, 400);
    let expected: Vec<(u64, u32)> = (0..1000).map(|k| (5000 + 400 * k, 1)).collect();
    assert_eq!(pulses(&mut h, 1000), expected);
    h.advance(VirtualTime(1 << 55));
    assert_eq!(h.take_pulses(), 1, "a long gap is one pulse");
    let next = h.next_event().unwrap().0 / TICK;
    assert!(next > (1 << 55) / TICK && (next - 5000).is_multiple_of(400));
}

#[test]
fn level_until_cleared() {
    let mut h = Hpet::new();
    write(&mut h, 0, 0x10, ENABLE);
    write(&mut h, 0, 0x140, 23 << config::ROUTE_SHIFT | config::ENABLE | config::LEVEL);
    write(&mut h, 0, 0x148, 10);
    assert_eq!(h.levels(), 0);
    h.advance(h.next_event().unwrap());
    assert_eq!((h.levels(), h.take_pulses()), (1 << 23, 0));
    assert_eq!(read(&mut h, 20, 0x20), 4);
    write(&mut h, 20, 0x20, 4);
    assert_eq!((h.levels(), read(&mut h, 20, 0x20)), (0, 0));
}

#[test]
fn narrow_timers_match_at_each_wrap() {
    let mut h = Hpet::new();
    write(&mut h, 0, 0x10, ENABLE);
    write(&mut h, 0, 0x100, 20 << config::ROUTE_SHIFT | config::ENABLE | config::MODE_32);
    write(&mut h, 100, 0x108, 50);
    assert_eq!(pulses(&mut h, 2), [(50 + (1 << 32), 1 << 20), (50 + (2 << 32), 1 << 20)]);
}

#[test]
fn routes_are_checked() {
    let mut h = Hpet::new();
    for route in 0..32u64 {
        write(&mut h, 0, 0x100, route << config::ROUTE_SHIFT);
        let kept = if (20..24).contains(&route) { route } else { 0 };
        assert_eq!(read(&mut h, 0, 0x100) >> config::ROUTE_SHIFT & 0x1f, kept);
    }
}

proptest! {
    #[test]
    fn survives_anything(steps in soak::steps()) {
        let places = [0x10, 0x10, 0x20, 0xf0, 0xf4, 0x100, 0x108, 0x10c, 0x120, 0x128, 0x140, 0x148];
        let mut h = Hpet::new();
        write(&mut h, 0, 0x10, ENABLE);
        soak::mmio(h, &places, &steps, |h, _| { h.take_pulses(); });
    }

    /// Edges against a counter that is clocked tick by tick.
    #[test]
    fn matches_against_a_clocked_counter(period in 1u64..20, first in 0u64..40, periodic: bool) {
        let mut h = Hpet::new();
        let mode = if periodic { config::PERIODIC | config::VALUE_SET } else { 0 };
        write(&mut h, 0, 0x100, 20 << config::ROUTE_SHIFT | config::ENABLE | mode);
        write(&mut h, 0, 0x108, first);
        write(&mut h, 0, 0x108, if periodic { period } else { first });
        write(&mut h, 0, 0x10, ENABLE);
        let mut comparator = first;
        for counter in 0..200 {
            h.advance(VirtualTime(counter * TICK));
            let hit = counter == comparator;
            if hit && periodic {
                comparator += period;
            }
            prop_assert_eq!(h.take_pulses() != 0, hit, "at {}", counter);
        }
    }
}
