//! Random access sequences that every device must survive, and the save/restore comparison.

use crate::{Device, MmioDevice, PortDevice};
use proptest::prelude::*;
use serde::{Serialize, de::DeserializeOwned};
use std::fmt::Debug;
use umbra_arch::{AccessWidth, VirtualTime};

/// One step of a random sequence. `place` picks a port or register, `pass` nanoseconds go by before.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pass: u64,
    place: u64,
    width: AccessWidth,
    /// `None` reads.
    write: Option<u64>,
    /// Save and restore before this step.
    save: bool,
}

fn width() -> impl Strategy<Value = AccessWidth> {
    prop_oneof![
        6 => Just(AccessWidth::Byte),
        2 => Just(AccessWidth::Word),
        4 => Just(AccessWidth::Dword),
        1 => Just(AccessWidth::Qword),
    ]
}

fn gap() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => Just(0u64),
        4 => 0u64..2_000,
        3 => 0u64..2_000_000,
        2 => 0u64..4_000_000_000,
        1 => 0u64..(1 << 50),
    ]
}

/// Sequences of up to 120 steps.
pub fn steps() -> impl Strategy<Value = Vec<Step>> {
    let value = prop_oneof![any::<u64>(), 0u64..256, Just(0u64), Just(u64::MAX)];
    let step = (gap(), any::<u64>(), width(), proptest::option::weighted(0.7, value), proptest::bool::weighted(0.1))
        .prop_map(|(pass, place, width, write, save)| Step { pass, place, width, write, save });
    proptest::collection::vec(step, 1..120)
}

fn restored<D: Serialize + DeserializeOwned>(device: &D) -> D {
    postcard::from_bytes(&postcard::to_stdvec(device).unwrap()).unwrap()
}

/// After `advance(now)` the next event lies in the future, and advancing there step by step ends in
/// the state that one long step gives (checked by `jump`).
fn check_events<D: Device + Clone + PartialEq + Debug>(device: &mut D, now: VirtualTime) {
    device.advance(now);
    let once = device.clone();
    device.advance(now);
    assert_eq!(once, *device, "advance is idempotent");
    let mut stepped = device.clone();
    let mut last = now;
    for _ in 0..4 {
        let Some(event) = stepped.next_event() else { break };
        assert!(event > last, "{event:?} is not after {last:?}: {stepped:?}");
        if event == VirtualTime::NEVER {
            break;
        }
        stepped.advance(event);
        last = event;
    }
    let mut jumped = device.clone();
    jumped.advance(last);
    assert_eq!(stepped, jumped, "one long step is many short ones");
}

fn soak<D>(mut device: D, steps: &[Step], mut access: impl FnMut(&mut D, VirtualTime, Step) -> u64)
where
    D: Device + Clone + PartialEq + Debug + Serialize + DeserializeOwned,
{
    let mut now = VirtualTime(0);
    let mut twin: Option<D> = None;
    for &step in steps {
        now = now.plus(step.pass);
        if step.save {
            twin = Some(restored(&device));
        }
        let value = access(&mut device, now, step);
        if let Some(twin) = &mut twin {
            assert_eq!(access(twin, now, step), value, "restored device differs");
            assert_eq!(*twin, device);
        }
        check_events(&mut device, now);
        if let Some(twin) = &mut twin {
            check_events(twin, now);
        }
    }
}

/// Runs `steps` on a device with ports; `after` may poll outputs.
pub fn ports<D>(device: D, ports: &[u16], steps: &[Step], mut after: impl FnMut(&mut D, VirtualTime))
where
    D: PortDevice + Clone + PartialEq + Debug + Serialize + DeserializeOwned,
{
    soak(device, steps, |device, now, step| {
        let port = ports[(step.place % ports.len() as u64) as usize];
        let value = match step.write {
            Some(value) => {
                device.port_write(now, port, step.width, value as u32);
                0
            }
            None => device.port_read(now, port, step.width).into(),
        };
        assert_eq!(value & !step.width.mask(), 0);
        after(device, now);
        value
    });
}

/// Runs `steps` on a device with memory-mapped registers: `places` are the likely offsets.
pub fn mmio<D>(device: D, places: &[u64], steps: &[Step], mut after: impl FnMut(&mut D, VirtualTime))
where
    D: MmioDevice + Clone + PartialEq + Debug + Serialize + DeserializeOwned,
{
    soak(device, steps, |device, now, step| {
        let offset = match step.place % (places.len() as u64 + 1) {
            i if i < places.len() as u64 => places[i as usize],
            _ => (step.place >> 32) % 4096,
        };
        let value = match step.write {
            Some(value) => {
                device.mmio_write(now, offset, step.width, value);
                0
            }
            None => device.mmio_read(now, offset, step.width),
        };
        assert_eq!(value & !step.width.mask(), 0);
        after(device, now);
        value
    });
}

/// Bytes to change in a save file: place and new value.
pub fn damage() -> impl Strategy<Value = Vec<(usize, u8)>> {
    proptest::collection::vec((any::<usize>(), any::<u8>()), 1..12)
}

/// A device restored from a damaged save file, if that can be read at all. What it does is anybody's
/// guess, but it must not panic.
pub fn restored_damaged<D: Serialize + DeserializeOwned>(device: &D, damage: &[(usize, u8)]) -> Option<D> {
    let mut bytes = postcard::to_stdvec(device).unwrap();
    let length = bytes.len();
    for &(place, value) in damage {
        bytes[place % length] = value;
    }
    postcard::from_bytes(&bytes).ok()
}

/// Runs accesses with no expectation but survival.
pub fn damaged_ports<D: PortDevice>(device: &mut D, ports: &[u16], steps: &[Step]) {
    let mut now = VirtualTime(0);
    for step in steps {
        now = now.plus(step.pass);
        let port = ports[(step.place % ports.len() as u64) as usize];
        match step.write {
            Some(value) => device.port_write(now, port, step.width, value as u32),
            None => drop(device.port_read(now, port, step.width)),
        }
        device.advance(now);
        let _ = device.next_event();
    }
}

/// The same for memory-mapped registers.
pub fn damaged_mmio<D: MmioDevice>(device: &mut D, steps: &[Step]) {
    let mut now = VirtualTime(0);
    for step in steps {
        now = now.plus(step.pass);
        let offset = (step.place % 0x400) & !3;
        match step.write {
            Some(value) => device.mmio_write(now, offset, step.width, value),
            None => drop(device.mmio_read(now, offset, step.width)),
        }
        device.advance(now);
        let _ = device.next_event();
    }
}

macro_rules! damaged_save_files {
    ($($name:ident: $device:expr, $run:expr;)*) => {
        proptest! {
            $(#[test]
            fn $name(damage in damage(), before in steps(), after in steps()) {
                let mut device = $device;
                let run = $run;
                run(&mut device, &before);
                if let Some(mut device) = restored_damaged(&device, &damage) {
                    run(&mut device, &after);
                }
            })*
        }
    };
}

mod tests {
    use super::*;
    use crate::*;

    fn lapic() -> Lapic {
        Lapic::new(LapicConfig { id: 1, bsp: true, physical_bits: 40, x2apic: true, tsc_deadline: true })
    }

    fn card() -> PciBus {
        let identity = pci::PciIdentity { vendor: 1, device: 2, revision: 3, class: 4, subsystem: (5, 6) };
        let config =
            PciFunction::new(identity).with_bar(0, pci::BarKind::Io, 64).with_bar(1, pci::BarKind::Memory64, 4096);
        let mut bus = PciBus::default();
        bus.add(0, 0, config);
        bus
    }

    damaged_save_files! {
        uart: Uart::new(0x3f8), |d: &mut Uart, s: &[Step]| {
            damaged_ports(d, &[0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff], s);
        };
        pic: PicPair::default(), |d: &mut PicPair, s: &[Step]| {
            damaged_ports(d, PicPair::PORTS, s);
            d.set_line(9, true);
            d.acknowledge();
        };
        pit: Pit::default(), |d: &mut Pit, s: &[Step]| damaged_ports(d, Pit::PORTS, s);
        rtc: Rtc::new(0), |d: &mut Rtc, s: &[Step]| damaged_ports(d, Rtc::PORTS, s);
        i8042: I8042::default(), |d: &mut I8042, s: &[Step]| {
            d.receive_keys(VirtualTime(0), &[0x1c]);
            damaged_ports(d, I8042::PORTS, s);
        };
        acpi_pm: AcpiPm::default(), |d: &mut AcpiPm, s: &[Step]| damaged_ports(d, AcpiPm::PORTS, s);
        pci: card(), |d: &mut PciBus, s: &[Step]| {
            damaged_ports(d, PciBus::PORTS, s);
            for bar in 0..7 {
                let _ = d.function(0, 0).and_then(|f| f.bar(bar));
            }
        };
        fw_cfg: FwCfg::new(), |d: &mut FwCfg, s: &[Step]| damaged_ports(d, FwCfg::PORTS, s);
        local_apic: lapic(), |d: &mut Lapic, s: &[Step]| {
            damaged_mmio(d, s);
            d.accept(0x40, true);
            d.acknowledge();
        };
        ioapic: IoApic::new(0), |d: &mut IoApic, s: &[Step]| {
            damaged_mmio(d, s);
            d.set_line(3, true);
            while d.take_message().is_some() {}
        };
        hpet: Hpet::new(), |d: &mut Hpet, s: &[Step]| {
            damaged_mmio(d, s);
            d.levels();
        };
    }
}
