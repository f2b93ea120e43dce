use super::*;
use crate::soak;
use proptest::prelude::*;

fn out(p: &mut PicPair, port: u16, value: u8) {
    p.port_write(VirtualTime(0), port, AccessWidth::Byte, value.into());
}

fn inb(p: &mut PicPair, port: u16) -> u8 {
    p.port_read(VirtualTime(0), port, AccessWidth::Byte) as u8
}

fn initialised(icw4: u8) -> PicPair {
    let mut p = PicPair::default();
    for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, icw4)] {
        out(&mut p, port, value);
    }
    for (port, value) in [(0xa0, 0x11), (0xa1, 0x38), (0xa1, 2), (0xa1, icw4 & !0x10)] {
        out(&mut p, port, value);
    }
    p
}

#[test]
fn quiet_before_initialisation() {
    let mut p = PicPair::default();
    for n in 0..16 {
        p.set_line(n, true);
    }
    assert!(!p.intr());
}

#[test]
fn every_input_gives_its_vector_and_needs_an_edge() {
    for n in (0..16).filter(|&n| n != 2) {
        let mut p = initialised(1);
        p.set_line(n, true);
        assert!(p.intr(), "input {n}");
        assert_eq!(p.acknowledge(), 0x30 + n);
        assert!(!p.intr());
        if n >= 8 {
            out(&mut p, 0xa0, 0x20);
        }
        out(&mut p, 0x20, 0x20);
        assert!(!p.intr(), "still high, but no new edge");
        p.set_line(n, false);
        p.set_line(n, true);
        assert!(p.intr());
    }
}

#[test]
fn level_triggered_inputs_repeat() {
    let mut p = initialised(1);
    out(&mut p, 0x4d0, 0xff);
    out(&mut p, 0x4d1, 0xff);
    assert_eq!((inb(&mut p, 0x4d0), inb(&mut p, 0x4d1)), (0xf8, 0xde));
    for n in [5u8, 11] {
        p.set_line(n, true);
        for _ in 0..3 {
            assert_eq!(p.acknowledge(), 0x30 + n);
            assert!(!p.intr());
            out(&mut p, 0xa0, 0x20);
            out(&mut p, 0x20, 0x20);
            assert!(p.intr());
        }
        p.set_line(n, false);
        assert!(!p.intr());
    }
}

#[test]
fn higher_priority_nests_and_lower_waits() {
    let mut p = initialised(1);
    p.set_line(4, true);
    assert_eq!(p.acknowledge(), 0x34);
    p.set_line(5, true);
    assert!(!p.intr());
    p.set_line(1, true);
    assert_eq!(p.acknowledge(), 0x31);
    out(&mut p, 0x20, 0x0b);
    assert_eq!(inb(&mut p, 0x20), 0x12);
    out(&mut p, 0x20, 0x0a);
    assert_eq!(inb(&mut p, 0x20), 0x20);
    out(&mut p, 0x20, 0x20);
    assert!(!p.intr(), "4 is still in service");
    out(&mut p, 0x20, 0x64);
    assert_eq!(p.acknowledge(), 0x35);
}

#[test]
fn spurious_vectors() {
    let mut p = initialised(1);
    p.set_line(3, true);
    p.set_line(3, false);
    assert!(!p.intr());
    assert_eq!(p.acknowledge(), 0x37);
    out(&mut p, 0x20, 0x0b);
    assert_eq!(inb(&mut p, 0x20), 0, "nothing in service");
}

#[test]
fn mask_hides_but_keeps_the_request() {
    let mut p = initialised(1);
    out(&mut p, 0x21, 0x10);
    assert_eq!(inb(&mut p, 0x21), 0x10);
    p.set_line(4, true);
    assert!(!p.intr());
    out(&mut p, 0x21, 0);
    assert!(p.intr());
}

#[test]
fn rotation() {
    let mut p = initialised(1);
    p.set_line(3, true);
    assert_eq!(p.acknowledge(), 0x33);
    out(&mut p, 0x20, 0xa0);
    p.set_line(3, false);
    p.set_line(3, true);
    p.set_line(4, true);
    p.set_line(0, true);
    assert_eq!(p.acknowledge(), 0x34, "3 is the lowest now, 4 the highest");
    out(&mut p, 0x20, 0xc0 | 7);
    out(&mut p, 0x20, 0x20);
    assert_eq!(p.acknowledge(), 0x30);
}

#[test]
fn special_mask_mode_lets_lower_ones_through() {
    let mut p = initialised(1);
    p.set_line(1, true);
    assert_eq!(p.acknowledge(), 0x31);
    out(&mut p, 0x20, 0x68);
    out(&mut p, 0x21, 0x02);
    p.set_line(6, true);
    assert_eq!(p.acknowledge(), 0x36);
    out(&mut p, 0x20, 0x20);
    out(&mut p, 0x20, 0x0b);
    assert_eq!(inb(&mut p, 0x20), 0x02, "non-specific EOI spares the masked one");
}

#[test]
fn poll_acknowledges() {
    let mut p = initialised(1);
    out(&mut p, 0x20, 0x0c);
    assert_eq!(inb(&mut p, 0x20), 0);
    p.set_line(6, true);
    out(&mut p, 0x20, 0x0c);
    assert_eq!(inb(&mut p, 0x20), 0x86);
    assert!(!p.intr());
    out(&mut p, 0x20, 0x0b);
    assert_eq!(inb(&mut p, 0x20), 0x40);
}

#[test]
fn automatic_eoi() {
    let mut p = initialised(3);
    p.set_line(9, true);
    p.set_line(10, true);
    assert_eq!(p.acknowledge(), 0x39);
    assert!(p.intr(), "nothing stays in service");
    assert_eq!(p.acknowledge(), 0x3a);
    assert!(!p.intr());
}

#[test]
fn special_fully_nested_slave() {
    for (icw4, nests) in [(0x01, false), (0x11, true)] {
        let mut p = initialised(icw4);
        p.set_line(12, true);
        assert_eq!(p.acknowledge(), 0x3c);
        p.set_line(9, true);
        assert_eq!(p.intr(), nests);
    }
}

#[test]
fn initialisation_without_icw3_and_icw4() {
    let mut p = PicPair::default();
    out(&mut p, 0x20, 0x12);
    out(&mut p, 0x21, 0x47);
    p.set_line(0, true);
    assert_eq!(p.acknowledge(), 0x40, "low three bits of ICW2 are ignored");
}

/// Fully nested mode, edge-triggered, predicted by sorting.
#[test]
fn priority_order_against_a_sorted_list() {
    for set in 1u32..1 << 16 {
        let set = set & !4;
        let mut p = initialised(1);
        for n in 0..16 {
            p.set_line(n, set >> n & 1 != 0);
        }
        let mut expected: Vec<u8> =
            [0, 1, 8, 9, 10, 11, 12, 13, 14, 15, 3, 4, 5, 6, 7].into_iter().filter(|&n| set >> n & 1 != 0).collect();
        expected.reverse();
        while let Some(n) = expected.pop() {
            assert!(p.intr());
            assert_eq!(p.acknowledge(), 0x30 + n);
            if n >= 8 {
                out(&mut p, 0xa0, 0x20);
            }
            out(&mut p, 0x20, 0x20);
        }
        assert!(!p.intr());
    }
}

proptest! {
    #[test]
    fn survives_anything(steps in soak::steps()) {
        soak::ports(PicPair::default(), PicPair::PORTS, &steps, |p, now| {
            p.set_line((now.0 % 17) as u8, now.0 & 0x100 != 0);
            if now.0 & 0x200 != 0 && p.intr() {
                p.acknowledge();
            }
        });
    }
}
