use super::*;
use crate::soak;
use proptest::prelude::*;

const NOW: VirtualTime = VirtualTime(0);

fn select(b: &mut PciBus, bus: u32, device: u32, function: u32, register: u32) {
    let address = 1 << 31 | bus << 16 | device << 11 | function << 8 | register & 0xfc;
    b.port_write(NOW, 0xcf8, AccessWidth::Dword, address);
    assert_eq!(b.port_read(NOW, 0xcf8, AccessWidth::Dword), address);
}

fn read(b: &mut PciBus, place: (u32, u32, u32), register: u32) -> u32 {
    select(b, place.0, place.1, place.2, register);
    b.port_read(NOW, 0xcfc, AccessWidth::Dword)
}

fn write(b: &mut PciBus, place: (u32, u32, u32), register: u32, value: u32) {
    select(b, place.0, place.1, place.2, register);
    b.port_write(NOW, 0xcfc, AccessWidth::Dword, value);
}

fn card() -> PciFunction {
    let identity =
        PciIdentity { vendor: 0x1af4, device: 0x1041, revision: 1, class: 0x02_0000, subsystem: (0x1af4, 1) };
    PciFunction::new(identity)
        .with_bar(0, BarKind::Io, 0x40)
        .with_bar(1, BarKind::Memory32, 0x1000)
        .with_bar(4, BarKind::Memory64, 0x4000)
        .with_interrupt_pin(1)
}

#[test]
fn chipset_and_nobody_else() {
    let mut b = PciBus::chipset();
    let mut found = Vec::new();
    for bus in 0..3 {
        for device in 0..32 {
            for function in 0..8 {
                let id = read(&mut b, (bus, device, function), 0);
                if id != 0xffff_ffff {
                    found.push((bus, device, function, id));
                }
            }
        }
    }
    assert_eq!(found, [(0, 0, 0, 0x1237_8086), (0, 1, 0, 0x7000_8086), (0, 1, 3, 0x7113_8086)]);
    assert_eq!(read(&mut b, (0, 0, 0), 8) >> 8, 0x06_0000);
    assert_eq!(read(&mut b, (0, 1, 0), 8) >> 8, 0x06_0100);
    assert_eq!(read(&mut b, (0, 1, 0), 0xc) >> 16 & 0xff, 0x80);
    assert_eq!(read(&mut b, (0, 1, 3), 0x40), 0x601);
    assert_eq!(read(&mut b, (0, 1, 3), 0x3c), 0x0109);
}

#[test]
fn mechanism_1_needs_double_words_and_the_enable_bit() {
    let mut b = PciBus::chipset();
    select(&mut b, 0, 0, 0, 0);
    b.port_write(NOW, 0xcfb, AccessWidth::Byte, 1);
    assert_eq!(b.port_read(NOW, 0xcf8, AccessWidth::Dword), 0x8000_0000);
    for (port, width, expected) in [
        (0xcfc, AccessWidth::Byte, 0x86),
        (0xcfd, AccessWidth::Byte, 0x80),
        (0xcfe, AccessWidth::Word, 0x1237),
        (0xcfd, AccessWidth::Word, 0x3780),
        (0xcff, AccessWidth::Word, 0xff12),
    ] {
        assert_eq!(b.port_read(NOW, port, width), expected, "{port:#x}");
    }
    b.port_write(NOW, 0xcf8, AccessWidth::Dword, 0);
    assert_eq!(b.port_read(NOW, 0xcfc, AccessWidth::Dword), 0xffff_ffff);
}

#[test]
fn bars_are_sized_and_placed() {
    let mut b = PciBus::chipset();
    b.add(4, 0, card());
    let place = (0, 4, 0);
    assert!(b.take_layout_change() && !b.take_layout_change());
    for (bar, size) in
        [(0x10, 0xffff_ffc1u32), (0x14, 0xffff_f000), (0x18, 0), (0x20, 0xffff_c00c), (0x24, 0xffff_ffff)]
    {
        write(&mut b, place, bar, 0xffff_ffff);
        assert_eq!(read(&mut b, place, bar), size, "BAR at {bar:#x}");
    }
    write(&mut b, place, 0x10, 0xc040);
    write(&mut b, place, 0x14, 0xfebf_1000);
    write(&mut b, place, 0x20, 0x4000);
    write(&mut b, place, 0x24, 0x10);
    let f = |b: &PciBus| b.function(4, 0).unwrap().clone();
    assert_eq!(f(&b).bar(0), None, "not enabled");
    b.take_layout_change();
    write(&mut b, place, 4, 0x3);
    assert!(b.take_layout_change());
    assert_eq!(f(&b).bar(0), Some(BarWindow { kind: BarKind::Io, base: 0xc040, size: 0x40 }));
    assert_eq!(f(&b).bar(1), Some(BarWindow { kind: BarKind::Memory32, base: 0xfebf_1000, size: 0x1000 }));
    assert_eq!(f(&b).bar(4), Some(BarWindow { kind: BarKind::Memory64, base: 0x10_0000_4000, size: 0x4000 }));
    assert_eq!((f(&b).bar(2), f(&b).bar(5), f(&b).bar(9)), (None, None, None));
    b.reset();
    assert_eq!(f(&b), card());
}

#[test]
fn read_only_and_write_one_to_clear() {
    let mut b = PciBus::chipset();
    b.add(4, 0, card());
    write(&mut b, (0, 4, 0), 0, 0x1234_5678);
    assert_eq!(read(&mut b, (0, 4, 0), 0), 0x1041_1af4);
    write(&mut b, (0, 4, 0), 4, 0xffff);
    assert_eq!(read(&mut b, (0, 4, 0), 4), 0x0547);
    b.function_mut(4, 0).unwrap().set_byte(7, 0xa0);
    write(&mut b, (0, 4, 0), 4, 0x8000_0000);
    assert_eq!(read(&mut b, (0, 4, 0), 4), 0x2000_0000);
}

#[test]
fn capabilities_form_a_list() {
    let mut f = card();
    let first = f.add_capability(0x05, &[0; 12], &[0xff, 0, 0xfc]);
    let second = f.add_capability(0x09, &[1, 2, 3], &[]);
    assert_eq!((f.byte(0x34), f.byte(first), f.byte(first + 1)), (first, 5, second));
    assert_eq!((f.byte(second), f.byte(second + 1), f.byte(second + 4)), (9, 0, 3));
    assert_eq!(f.byte(6) & 0x10, 0x10);
    f.write(first + 2, AccessWidth::Dword, 0xffff_ffff);
    assert_eq!(f.read(first + 2, AccessWidth::Dword), 0x00fc_00ff);
    assert!(second.is_multiple_of(4));
}

#[test]
fn pirq_routing() {
    let mut b = PciBus::chipset();
    assert_eq!(b.pirq_route(0), None);
    write(&mut b, (0, 1, 0), 0x60, 0x800b_0a05);
    assert_eq!([0, 1, 2, 3].map(|n| b.pirq_route(n)), [Some(5), Some(10), Some(11), None]);
}

proptest! {
    #[test]
    fn survives_anything(steps in soak::steps()) {
        let mut b = PciBus::chipset();
        b.add(4, 0, card());
        select(&mut b, 0, 4, 0, 0x10);
        soak::ports(b, PciBus::PORTS, &steps, |b, _| {
            if b.take_layout_change() {
                for bar in 0..6 {
                    b.function(4, 0).unwrap().bar(bar);
                }
            }
        });
    }
}
