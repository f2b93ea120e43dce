use super::*;
use crate::soak;
use proptest::prelude::*;

/// Port accesses a microsecond apart, as a driver makes them.
struct Driver {
    c: I8042,
    now: u64,
}

impl Driver {
    fn new() -> Self {
        Self { c: I8042::default(), now: 0 }
    }
    fn read(&mut self, port: u16) -> u8 {
        self.now += 1000;
        self.c.port_read(VirtualTime(self.now), port, AccessWidth::Byte) as u8
    }
    fn write(&mut self, port: u16, value: u8) {
        self.now += 1000;
        self.c.port_write(VirtualTime(self.now), port, AccessWidth::Byte, value.into());
    }
    /// Polls for a byte and says whether it came from the mouse.
    fn poll(&mut self) -> Option<(u8, bool)> {
        for _ in 0..100 {
            let status = self.read(0x64);
            if status & status::OUTPUT_FULL != 0 {
                return Some((self.read(0x60), status & status::OUTPUT_IS_MOUSE != 0));
            }
        }
        None
    }
    fn all(&mut self) -> Vec<(u8, bool)> {
        std::iter::from_fn(|| self.poll()).collect()
    }
}

#[test]
fn controller_commands() {
    for (command, reply) in [(0xaa, 0x55), (0xab, 0), (0xa9, 0), (0x20, 0x65), (0xd0, 0x03), (0xa4, 0xf1)] {
        let mut d = Driver::new();
        d.write(0x64, command);
        assert_eq!(d.all(), [(reply, false)], "{command:#x}");
    }
}

#[test]
fn command_byte_as_linux_probes_it() {
    let mut d = Driver::new();
    d.write(0x64, 0x60);
    d.write(0x60, 0x74);
    d.write(0x64, 0x20);
    assert_eq!(d.all(), [(0x74, false)]);
    d.write(0x64, 0xa7);
    d.write(0x64, 0x20);
    assert_eq!(d.all(), [(0x74, false)]);
    d.write(0x64, 0xa8);
    d.write(0x64, 0x20);
    assert_eq!(d.all(), [(0x54, false)]);
    d.write(0x64, 0xd3);
    d.write(0x60, 0x5a);
    assert_eq!(d.all(), [(0x5a, true)], "loop through the mouse's buffer");
    d.write(0x64, 0xd2);
    d.write(0x60, 0xa5);
    assert_eq!(d.all(), [(0xa5, false)]);
}

#[test]
fn devices_answer_through_the_buffer() {
    let mut d = Driver::new();
    d.write(0x60, 0xf2);
    assert_eq!(d.all(), [(0xfa, false), (0xab, false), (0x41, false)], "translated");
    d.write(0x64, 0xd4);
    d.write(0x60, 0xff);
    assert_eq!(d.all(), [(0xfa, true), (0xaa, true), (0x00, true)]);
    d.write(0x64, 0x60);
    d.write(0x60, 0x25);
    d.write(0x60, 0xf2);
    assert_eq!(d.all(), [(0xfa, false), (0xab, false), (0x83, false)], "raw");
}

#[test]
fn every_byte_makes_an_edge() {
    let mut c = I8042::default();
    let mut now = VirtualTime(100);
    assert!(c.receive_keys(now, &[0x1c, 0x32, 0xf0, 0x1c]));
    let mut got = Vec::new();
    while let Some(event) = c.next_event() {
        assert!(!c.irq1() && event > now);
        now = event;
        c.advance(now);
        assert!(c.irq1());
        assert_eq!(c.next_event(), None);
        got.push(c.port_read(now, 0x60, AccessWidth::Byte));
        assert!(!c.irq1(), "falls with the read");
    }
    assert_eq!(got, [0x1e, 0x30, 0x9e]);
    assert_eq!(now.0, 100 + 3 * BYTE_TIME);
}

#[test]
fn mouse_interrupt_and_disable() {
    let mut d = Driver::new();
    d.write(0x64, 0xd4);
    d.write(0x60, 0xf4);
    assert_eq!(d.all(), [(0xfa, true)]);
    d.write(0x64, 0x60);
    d.write(0x60, 0x47);
    assert!(d.c.receive_mouse(VirtualTime(d.now), 1, 2, 0, 0));
    d.c.advance(VirtualTime(d.now + BYTE_TIME));
    assert!(d.c.irq12() && !d.c.irq1());
    d.now += BYTE_TIME;
    d.write(0x64, 0xa7);
    assert_eq!(d.all(), [(0x08, true)], "what is in the buffer stays, the rest is held");
    d.write(0x64, 0xa8);
    assert_eq!(d.all(), [(1, true), (2, true)]);
}

#[test]
fn a20_and_reset() {
    let mut d = Driver::new();
    assert!(d.c.a20());
    d.write(0x64, 0xd1);
    d.write(0x60, 0xdd);
    assert!(!d.c.a20() && !d.c.take_reset_request());
    d.write(0x64, 0xd1);
    d.write(0x60, 0xdf);
    assert!(d.c.a20());
    d.write(0x64, 0xff);
    assert!(!d.c.take_reset_request());
    d.write(0x64, 0xfe);
    assert!(d.c.take_reset_request() && !d.c.take_reset_request());
}

proptest! {
    #[test]
    fn survives_anything(steps in soak::steps()) {
        soak::ports(I8042::default(), I8042::PORTS, &steps, |c, now| {
            if now.0 % 5 == 0 {
                c.receive_keys(now, &[0x1c, 0xf0, 0x1c]);
                c.receive_mouse(now, now.0 as i16, -5, 0, now.0 as u8);
            }
        });
    }
}
