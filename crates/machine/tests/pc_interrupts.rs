//! Interrupt lines and messages on their way from devices to the CPU, seen through the bus.

use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::{AccessWidth, ApicMessage, Bus, Gpa, VirtualTime};
use umbra_devices::test_device;
use umbra_machine::pc::{Pc, PcConfig, Request};

const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;
const SVR: u64 = 0xf0;
const EOI: u64 = 0xb0;
const ICR_LOW: u64 = 0x300;
const LVT_TIMER: u64 = 0x320;
const LVT_LINT0: u64 = 0x350;
const INITIAL_COUNT: u64 = 0x380;
const DIVIDE: u64 = 0x3e0;

/// A PC and a clock that moves on with every access.
struct Bench {
    pc: Pc,
    now: VirtualTime,
    attention: bool,
}

impl Bench {
    fn new() -> Self {
        let profile = CpuidProfile::named("umbra-v2").unwrap();
        let pc = Pc::new(&PcConfig { vcpus: 1, profile: &profile, rtc_start: 0, ram: (64 << 20, 0) });
        Self { pc, now: VirtualTime(0), attention: false }
    }
    fn until(mut self, slice_end: u64) -> Self {
        self.now = VirtualTime(slice_end);
        self
    }
    fn bus<T>(&mut self, access: impl FnOnce(&mut dyn Bus, VirtualTime) -> (T, bool)) -> T {
        self.now = self.now.plus(1000);
        let (value, attention) = access(&mut self.pc.bus(0, VirtualTime(u64::MAX - 1)), self.now);
        self.attention = attention;
        value
    }
    fn out(&mut self, port: u16, value: u8) {
        self.bus(|bus, now| {
            let reply = bus.port_write(now, port, AccessWidth::Byte, value.into());
            assert_eq!(reply.cost, 1000, "delay loops count on a microsecond an access");
            ((), reply.attention)
        });
    }
    fn read(&mut self, gpa: u64) -> u32 {
        self.bus(|bus, now| {
            let reply = bus.mmio_read(now, Gpa::new(gpa), AccessWidth::Dword);
            (reply.value as u32, reply.attention)
        })
    }
    fn write(&mut self, gpa: u64, value: u32) {
        self.bus(|bus, now| ((), bus.mmio_write(now, Gpa::new(gpa), AccessWidth::Dword, value.into()).attention));
    }
    fn pending(&self) -> bool {
        self.pc.interrupt_pending(0)
    }
    fn acknowledge(&mut self) -> Option<u8> {
        self.bus(|bus, now| (bus.interrupt_acknowledge(now), false))
    }
    /// Both 8259s at 20h and 28h, only `irqs` open.
    fn initialise_pics(&mut self, irqs: u16) {
        for (command, vector, cascade, mask) in [(0x20, 0x20, 4, !irqs as u8), (0xa0, 0x28, 2, (!irqs >> 8) as u8)] {
            for (port, value) in [(command, 0x11), (command + 1, vector), (command + 1, cascade), (command + 1, 1)] {
                self.out(port, value);
            }
            self.out(command + 1, mask);
        }
    }
    /// Routes an I/O APIC pin to CPU 0 with `entry`'s low half: a vector, fixed, edge-triggered, and what else is set.
    fn route(&mut self, pin: u32, entry: u32) {
        for (register, value) in [(0x11 + pin * 2, 0), (0x10 + pin * 2, entry)] {
            self.write(IOAPIC, register);
            self.write(IOAPIC + 0x10, value);
        }
    }
    /// Lets time pass, event by event.
    fn pass(&mut self, ns: u64) {
        let end = self.now.plus(ns);
        while let Some(event) = self.pc.next_event().filter(|&event| event <= end) {
            self.pc.deliver_due(event);
        }
        self.now = end;
    }
}

#[test]
fn uart_interrupt_reaches_the_cpu_through_the_8259() {
    let mut b = Bench::new();
    b.initialise_pics(1 << 4);
    b.out(0x3fc, 8);
    assert!(!b.pending());
    b.out(0x3f9, 2);
    assert!(b.pending() && b.attention, "the empty transmitter interrupts at once");
    assert_eq!(b.acknowledge(), Some(0x24));
    assert!(!b.pending());
}

#[test]
fn uart_interrupt_reaches_the_cpu_through_the_ioapic() {
    let mut b = Bench::new();
    b.write(LAPIC + SVR, 0x1ff);
    b.write(LAPIC + LVT_LINT0, 0x1_0000);
    b.route(4, 0x51);
    b.out(0x3fc, 8);
    b.out(0x3f9, 2);
    assert_eq!(b.acknowledge(), Some(0x51));
    b.write(LAPIC + EOI, 0);
    assert_eq!(b.acknowledge(), None);
}

#[test]
fn timer_arrives_at_pin_2_and_at_input_0() {
    let mut b = Bench::new();
    b.initialise_pics(1);
    b.write(LAPIC + SVR, 0x1ff);
    b.route(2, 0x61);
    b.route(0, 0x62);
    for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
        b.out(port, value);
    }
    b.pass(1_100_000);
    let mut vectors: Vec<u8> = (0..2).filter_map(|_| b.acknowledge()).collect();
    vectors.sort_unstable();
    assert_eq!(vectors, [0x20, 0x61], "one from the 8259 as ExtINT, one from pin 2, none from pin 0");
}

#[test]
fn masked_lint0_keeps_the_8259_out_and_a_disabled_apic_lets_it_in() {
    let mut b = Bench::new();
    b.initialise_pics(1 << 4);
    b.write(LAPIC + LVT_LINT0, 0x1_0700);
    b.out(0x3fc, 8);
    b.out(0x3f9, 2);
    assert!(!b.pending());
    b.bus(|bus, now| {
        let base = bus.apic_msr_read(now, umbra_arch::msr::IA32_APIC_BASE).unwrap().value;
        let reply = bus.apic_msr_write(now, umbra_arch::msr::IA32_APIC_BASE, base & !0x800).unwrap();
        ((), reply.attention)
    });
    assert!(b.pending() && b.attention, "without a local APIC, INTR is the CPU's own pin");
    assert_eq!(b.acknowledge(), Some(0x24));
    assert_eq!(b.read(LAPIC + 0x30), u32::MAX, "no registers there any more");
}

#[test]
fn local_timer_is_an_event_and_asks_for_attention() {
    let mut b = Bench::new();
    b.write(LAPIC + SVR, 0x1ff);
    b.write(LAPIC + DIVIDE, 0xb);
    b.write(LAPIC + LVT_TIMER, 0x40);
    assert!(!b.attention);
    b.write(LAPIC + INITIAL_COUNT, 5_000);
    assert!(b.attention, "the next event is earlier than the slice's end now");
    let due = b.pc.next_event().unwrap();
    assert_eq!(due, b.now.plus(5_000));
    b.pass(4_999);
    assert!(!b.pending());
    b.pass(1);
    assert_eq!(b.acknowledge(), Some(0x40));
}

#[test]
fn ipi_to_self_and_message_signalled_interrupt() {
    let mut b = Bench::new();
    b.write(LAPIC + SVR, 0x1ff);
    b.write(LAPIC + ICR_LOW, 0x0004_0000 | 0x77);
    assert!(b.attention);
    assert_eq!(b.acknowledge(), Some(0x77));
    b.write(LAPIC + EOI, 0);
    b.pc.message_signalled(0xfee0_0000, 0x78);
    assert_eq!(b.acknowledge(), Some(0x78));
    b.pc.message_signalled(0x1000, 0x79);
    assert_eq!(b.acknowledge(), None, "ordinary memory isn't the message window");
}

#[test]
fn each_way_to_end_the_machine_is_a_request() {
    let ask = |writes: &[(u16, u8)]| {
        let mut b = Bench::new();
        for &(port, value) in writes {
            b.out(port, value);
        }
        let attention = b.attention;
        b.pass(10_000_000);
        (b.pc.take_request(), attention)
    };
    assert_eq!(ask(&[(0xf4, 0x10)]), (Some(Request::DebugExit(0x10)), true));
    assert_eq!(ask(&[(0xcf9, 6)]), (Some(Request::Reset), true));
    assert_eq!(ask(&[(0x92, 1)]), (Some(Request::Reset), true));
    assert_eq!(ask(&[(0x64, 0xfe)]).0, Some(Request::Reset));
    assert_eq!(ask(&[(0x605, 0x20)]).0, Some(Request::PowerOff));
    assert_eq!(ask(&[(0x80, 1), (0x3f8, b'x')]).0, None);
}

#[test]
fn nobody_answers_with_ones() {
    let mut b = Bench::new().until(5);
    let mut value = 0;
    b.bus(|bus, now| {
        value = bus.port_read(now, 0x1234, AccessWidth::Word).value;
        ((), false)
    });
    assert_eq!(value, 0xffff);
    assert_eq!(b.read(0xd000_0000), u32::MAX);
    b.write(0xd000_0000, 0);
}

#[test]
fn hpet_in_legacy_mode_takes_the_timers_line() {
    const HPET: u64 = 0xfed0_0000;
    let mut b = Bench::new();
    b.write(LAPIC + SVR, 0x1ff);
    b.route(2, 0x61);
    for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
        b.out(port, value);
    }
    b.pass(2_500_000);
    assert_eq!(b.acknowledge(), Some(0x61), "the PIT has the line at first");
    b.write(LAPIC + EOI, 0);
    // Legacy replacement and enable; timer 0 of 32 bits, one-shot at 100,000 ticks of 10 ns.
    b.write(HPET + 0x10, 3);
    b.write(HPET + 0x100, 0x104);
    b.write(HPET + 0x108, 100_000);
    b.pass(900_000);
    assert_eq!(b.acknowledge(), None, "the PIT is cut off, the HPET not yet due");
    b.pass(200_000);
    assert_eq!(b.acknowledge(), Some(0x61));
    b.write(LAPIC + EOI, 0);
    b.pass(5_000_000);
    assert_eq!(b.acknowledge(), None, "one-shot");
    b.write(HPET + 0x10, 0);
    b.pass(2_000_000);
    assert_eq!(b.acknowledge(), Some(0x61), "the PIT has its line back");
}

#[test]
fn hpet_edge_waits_at_the_8259_until_it_is_taken() {
    const HPET: u64 = 0xfed0_0000;
    let mut b = Bench::new();
    b.initialise_pics(1);
    b.write(HPET + 0x100, 0x104);
    b.write(HPET + 0x108, 100_000);
    b.write(HPET + 0x10, 3);
    for due in [100_000, 250_000] {
        b.write(HPET + 0x108, due);
        b.pass(1_100_000);
        assert!(b.pending(), "comparator {due}");
        b.pass(500_000);
        assert_eq!(b.acknowledge(), Some(0x20));
        b.out(0x20, 0x20);
        assert!(!b.pending(), "one edge, one interrupt");
    }
}

#[test]
fn messages_wait_for_a_local_apic_that_is_away_and_nothing_gets_lost() {
    let mut b = Bench::new();
    b.initialise_pics(1 << 4);
    b.write(LAPIC + SVR, 0x1ff);
    b.write(LAPIC + LVT_TIMER, 0x40);
    b.write(LAPIC + INITIAL_COUNT, 1_000_000);
    b.route(11, 0x8000 | 0x71);
    b.route(4, 0x51);
    b.out(test_device::LINES_PORT + 11, 1);
    assert_eq!(b.acknowledge(), Some(0x71), "in service when the APIC goes");
    let lent = |b: &mut Bench| b.bus(|bus, now| (bus.apic_bus().unwrap().lend(now), false));
    let loan = lent(&mut b);
    let pin11 = ApicMessage { address: 0xfee0_0000, data: 0xc071, pin: Some(11) };
    assert_eq!(loan.unfinished, [pin11]);
    assert_eq!(loan.apic.registers[0x13], 1 << (0x71 % 32), "ISR");
    assert_eq!(b.read(LAPIC + 0x30), u32::MAX, "no registers there");
    assert!(b.pc.next_event().is_none_or(|at| at > b.now.plus(2_000_000)), "nor a timer");
    assert!(!b.pending());
    b.out(0x3fc, 8);
    b.out(0x3f9, 2);
    assert!(b.pending() && !b.attention, "a sleeper has to look, one that runs does so anyway");
    let next = |b: &mut Bench| b.bus(|bus, _| (bus.apic_bus().unwrap().next_message(), false));
    assert_eq!(next(&mut b), Some(ApicMessage { address: 0xfee0_0000, data: 0x51, pin: Some(4) }));
    assert_eq!(next(&mut b), None);
    let intr = |b: &mut Bench| b.bus(|bus, _| (bus.apic_bus().unwrap().intr(), false));
    assert!(intr(&mut b) && b.pending(), "the same line at the 8259");
    assert_eq!(b.bus(|bus, now| (bus.apic_bus().unwrap().acknowledge_intr(now), false)), 0x24);
    assert!(!intr(&mut b) && !b.pending());
    b.bus(|bus, now| ((), bus.apic_bus().unwrap().end_of_interrupt(now, 0x71).attention));
    b.pc.message_signalled(0xfee0_0000, 0x61);
    assert_eq!(next(&mut b), Some(pin11), "its line is still up");
    b.bus(|bus, now| {
        bus.apic_bus().unwrap().take_back(now, &loan.apic);
        ((), false)
    });
    assert!(b.pc.next_event().is_some_and(|at| at <= b.now.plus(2_000_000)), "the timer again");
    assert!(!b.pending(), "61h waits for the end of 71h, which is in service again");
    b.write(LAPIC + EOI, 0);
    assert_eq!((b.acknowledge(), b.acknowledge()), (Some(0x71), None), "sent again, as no end came for what was taken");
    b.write(LAPIC + EOI, 0);
    assert_eq!(b.acknowledge(), Some(0x71));
}
