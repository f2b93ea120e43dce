use super::*;
use crate::soak;
use proptest::prelude::*;

fn at(tick: u64) -> VirtualTime {
    VirtualTime::of_ticks(tick, PIT_HZ)
}

fn out(p: &mut Pit, tick: u64, port: u16, value: u8) {
    p.port_write(at(tick), port, AccessWidth::Byte, value.into());
}

fn inb(p: &mut Pit, tick: u64, port: u16) -> u8 {
    p.port_read(at(tick), port, AccessWidth::Byte) as u8
}

/// The 8254 as its data sheet's waveform diagrams have it: a counter that is clocked, one channel,
/// gate high, count written at tick `start`. Output at each tick, loading at the clock after the write.
fn clocked(mode: u8, n: u32, ticks: usize) -> Vec<bool> {
    let mut outputs = Vec::new();
    let mut output = mode != 0;
    let mut counter = None::<u32>;
    let mut half_left = 0;
    let mut fired = false;
    for _ in 0..ticks {
        outputs.push(output);
        let Some(c) = &mut counter else {
            counter = Some(n);
            half_left = n.div_ceil(2);
            continue;
        };
        match mode {
            0 => {
                *c = c.wrapping_sub(1);
                output |= *c == 0;
            }
            2 => {
                *c -= 1;
                if *c == 0 {
                    *c = n;
                }
                output = *c != 1;
            }
            3 => {
                half_left -= 1;
                if half_left == 0 {
                    output = !output;
                    half_left = if output { n.div_ceil(2) } else { n / 2 };
                }
            }
            _ => {
                *c = c.wrapping_sub(1);
                output = *c != 0 || fired;
                fired |= *c == 0;
            }
        }
    }
    outputs
}

#[test]
fn waveforms_against_a_clocked_counter() {
    for mode in [0u8, 2, 3, 4] {
        for n in 2..12u8 {
            let expected = clocked(mode, n.into(), 60);
            let mut p = Pit::default();
            out(&mut p, 0, 0x43, 0x10 | mode << 1);
            out(&mut p, 0, 0x40, n);
            p.take_irq0_rise();
            let mut previous = p.irq0();
            for (tick, &level) in expected.iter().enumerate() {
                let event = p.next_event();
                p.advance(at(tick as u64));
                assert_eq!(p.irq0(), level, "mode {mode} count {n} tick {tick}");
                assert_eq!(p.take_irq0_rise(), level && !previous, "rise, mode {mode} count {n} tick {tick}");
                if level != previous {
                    assert_eq!(event, Some(at(tick as u64)), "mode {mode} count {n}");
                }
                previous = level;
            }
        }
    }
}

#[test]
fn events_alone_show_every_edge() {
    for mode in [2u8, 3] {
        let mut p = Pit::default();
        out(&mut p, 5, 0x43, 0x30 | mode << 1);
        out(&mut p, 5, 0x40, 0xa9);
        out(&mut p, 5, 0x40, 0x04);
        assert!(p.take_irq0_rise(), "leaving mode 0 raises the output");
        let mut rises = Vec::new();
        while rises.len() < 1000 {
            let event = p.next_event().unwrap();
            p.advance(event);
            if p.take_irq0_rise() {
                assert!(p.irq0());
                rises.push(event);
            }
        }
        let expected: Vec<_> = (1..=1000).map(|k| at(6 + k * 1193)).collect();
        assert_eq!(rises, expected, "no drift in mode {mode}");
    }
}

#[test]
fn a_long_gap_shows_one_rise() {
    let mut p = Pit::default();
    out(&mut p, 0, 0x43, 0x34);
    out(&mut p, 0, 0x40, 0);
    out(&mut p, 0, 0x40, 0);
    p.advance(VirtualTime(u64::MAX / 2));
    assert!(p.take_irq0_rise());
    assert!(!p.take_irq0_rise());
    assert!(p.next_event().unwrap() > VirtualTime(u64::MAX / 2));
}

#[test]
fn new_count_in_mode_2_waits_for_the_period() {
    let mut p = Pit::default();
    out(&mut p, 0, 0x43, 0x14);
    out(&mut p, 0, 0x40, 10);
    out(&mut p, 3, 0x40, 20);
    p.take_irq0_rise();
    let mut rises = Vec::new();
    for tick in 4..60 {
        p.advance(at(tick));
        if p.take_irq0_rise() {
            rises.push(tick);
        }
    }
    assert_eq!(rises, [11, 31, 51]);
}

#[test]
fn new_count_in_mode_3_waits_for_the_half_period() {
    let mut p = Pit::default();
    out(&mut p, 0, 0x43, 0x16);
    out(&mut p, 0, 0x40, 10);
    out(&mut p, 3, 0x40, 20);
    let levels: Vec<bool> = (4..50)
        .map(|tick| {
            p.advance(at(tick));
            p.irq0()
        })
        .collect();
    let expected: Vec<bool> =
        (4..50).map(|tick| tick < 6 || (16..26).contains(&tick) || (36..46).contains(&tick)).collect();
    assert_eq!(levels, expected);
}

#[test]
fn calibration_loop_of_linux_on_channel_2() {
    let mut p = Pit::default();
    out(&mut p, 0, 0x61, 0x01);
    out(&mut p, 0, 0x43, 0xb0);
    out(&mut p, 0, 0x42, 0x9c);
    out(&mut p, 0, 0x42, 0x2e);
    let n = 0x2e9c;
    assert_eq!(inb(&mut p, n, 0x61) & 0x20, 0);
    assert_eq!(inb(&mut p, n + 1, 0x61) & 0x20, 0x20);
    // Unlatched reads alternate low and high byte.
    let mut p = Pit::default();
    out(&mut p, 0, 0x61, 0x01);
    out(&mut p, 0, 0x43, 0xb0);
    out(&mut p, 0, 0x42, 0xff);
    out(&mut p, 0, 0x42, 0xff);
    assert_eq!(inb(&mut p, 0x101, 0x42), 0xff);
    assert_eq!(inb(&mut p, 0x101, 0x42), 0xfe);
    assert_eq!(inb(&mut p, 0x102, 0x42), 0xfe);
}

#[test]
fn gate_stops_and_resumes_mode_0() {
    let mut p = Pit::default();
    out(&mut p, 0, 0x61, 1);
    out(&mut p, 0, 0x43, 0x90);
    out(&mut p, 0, 0x42, 100);
    out(&mut p, 11, 0x61, 0);
    assert_eq!(inb(&mut p, 500, 0x42), 90);
    out(&mut p, 500, 0x61, 1);
    assert_eq!(inb(&mut p, 589, 0x61) & 0x20, 0);
    assert_eq!(inb(&mut p, 590, 0x61) & 0x20, 0x20);
}

#[test]
fn gate_triggers_modes_1_and_5() {
    for mode in [1u8, 5] {
        let mut p = Pit::default();
        out(&mut p, 0, 0x43, 0x90 | mode << 1);
        out(&mut p, 0, 0x42, 5);
        assert_ne!(inb(&mut p, 100, 0x61) & 0x20, 0);
        out(&mut p, 100, 0x61, 1);
        for tick in 101..120 {
            let low = if mode == 1 { (101..106).contains(&tick) } else { tick == 106 };
            assert_eq!(inb(&mut p, tick, 0x61) & 0x20 == 0, low, "mode {mode} tick {tick}");
        }
        out(&mut p, 120, 0x61, 0);
        out(&mut p, 121, 0x61, 1);
        assert_eq!(inb(&mut p, if mode == 1 { 122 } else { 127 }, 0x61) & 0x20, 0, "triggers again");
    }
}

#[test]
fn mode_2_gate_raises_the_output_and_restarts() {
    let mut p = Pit::default();
    out(&mut p, 0, 0x61, 1);
    out(&mut p, 0, 0x43, 0x94);
    out(&mut p, 0, 0x42, 10);
    assert_eq!(inb(&mut p, 10, 0x61) & 0x20, 0);
    out(&mut p, 10, 0x61, 0);
    assert_ne!(inb(&mut p, 10, 0x61) & 0x20, 0);
    out(&mut p, 15, 0x61, 1);
    assert_eq!(inb(&mut p, 25, 0x61) & 0x20, 0);
}

#[test]
fn read_back_status_and_count() {
    let mut p = Pit::default();
    out(&mut p, 0, 0x43, 0x36);
    out(&mut p, 0, 0x43, 0xe2);
    assert_eq!(inb(&mut p, 0, 0x40), 0xf6, "null count: nothing loaded yet");
    out(&mut p, 0, 0x40, 0xe8);
    out(&mut p, 0, 0x40, 0x03);
    out(&mut p, 11, 0x43, 0xc2);
    assert_eq!(inb(&mut p, 30, 0x40), 0xb6, "status comes first");
    assert_eq!(inb(&mut p, 31, 0x40), 0xd4);
    assert_eq!(inb(&mut p, 32, 0x40), 0x03, "1000 - 2 * 10, as latched");
}

#[test]
fn latch_holds_until_read() {
    let mut p = Pit::default();
    out(&mut p, 0, 0x43, 0x30);
    out(&mut p, 0, 0x40, 0);
    out(&mut p, 0, 0x40, 0);
    out(&mut p, 1, 0x43, 0x00);
    out(&mut p, 50, 0x43, 0x00);
    assert_eq!((inb(&mut p, 100, 0x40), inb(&mut p, 101, 0x40)), (0, 0), "the second latch is ignored");
    assert_eq!(inb(&mut p, 0x102, 0x40), 0xff);
    assert_eq!(inb(&mut p, 0x102, 0x40), 0xfe);
}

#[test]
fn bcd_counts_in_decimal() {
    let mut p = Pit::default();
    out(&mut p, 0, 0x43, 0x35);
    out(&mut p, 0, 0x40, 0x00);
    out(&mut p, 0, 0x40, 0x10);
    out(&mut p, 2, 0x43, 0x00);
    assert_eq!((inb(&mut p, 2, 0x40), inb(&mut p, 2, 0x40)), (0x99, 0x09));
    assert_eq!(p.next_event(), Some(at(1000)));
}

#[test]
fn refresh_bit_toggles() {
    let mut p = Pit::default();
    let bits: Vec<u8> = (0..4).map(|k| inb(&mut p, 18 * k, 0x61) & 0x10).collect();
    assert_eq!(bits, [0, 0x10, 0, 0x10]);
}

proptest! {
    #[test]
    fn survives_anything(steps in soak::steps()) {
        soak::ports(Pit::default(), Pit::PORTS, &steps, |_, _| {});
    }

    /// Small counts and short gaps, so that reloads and gates meet running periods.
    #[test]
    fn rises_match_the_level(writes in proptest::collection::vec((0u64..40, 0usize..6, any::<u8>()), 1..60)) {
        let mut p = Pit::default();
        let mut tick = 0;
        for (gap, what, value) in writes {
            for _ in 0..gap {
                tick += 1;
                let before = p.irq0();
                p.take_irq0_rise();
                p.advance(at(tick));
                prop_assert_eq!(p.take_irq0_rise(), !before && p.irq0());
            }
            match what {
                0 => out(&mut p, tick, 0x43, 0x10 | value & 0x0e),
                1..4 => out(&mut p, tick, 0x40, value & 0x1f),
                _ => { inb(&mut p, tick, 0x40); }
            }
        }
    }
}
