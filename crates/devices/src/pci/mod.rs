//! PCI bus 0 behind configuration mechanism 1, with the i440FX and PIIX functions of a classic PC.

mod function;

pub use function::{BarKind, BarWindow, PciFunction, PciIdentity, command, offset};

use crate::acpi_pm::PM_BASE;
use crate::{Device, PortDevice, regmap};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use umbra_arch::{AccessWidth, VirtualTime};

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const ENABLE: u32 = 1 << 31;
/// First of the PIIX's four PIRQ route control bytes; bit 7 set means not routed.
const PIRQ_ROUTE: u8 = 0x60;

/// The bus and its configuration ports CF8h (double words only) and CFCh to CFFh.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PciBus {
    address: u32,
    /// By device * 8 + function.
    functions: BTreeMap<u8, PciFunction>,
    /// The functions as they were plugged in, which is what a reset returns to.
    power_on: BTreeMap<u8, PciFunction>,
    layout_changed: bool,
}

impl PciBus {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[CONFIG_ADDRESS, 0xcfc, 0xcfd, 0xcfe, 0xcff];

    /// A bus with the chipset: host bridge 00:00.0, ISA bridge 00:01.0, power management 00:01.3.
    pub fn chipset() -> Self {
        let mut bus = Self::default();
        bus.add(0, 0, host_bridge());
        bus.add(1, 0, isa_bridge());
        bus.add(1, 3, power_management());
        bus
    }

    /// Plugs in a function at `device` (0..32), `function` (0..8), replacing one that is there.
    pub fn add(&mut self, device: u8, function: u8, config: PciFunction) {
        let devfn = devfn(device, function);
        self.power_on.insert(devfn, config.clone());
        self.functions.insert(devfn, config);
        self.layout_changed = true;
    }

    /// The function at `device`, `function`.
    pub fn function(&self, device: u8, function: u8) -> Option<&PciFunction> {
        self.functions.get(&devfn(device, function))
    }

    /// The function at `device`, `function`, for the device behind it.
    pub fn function_mut(&mut self, device: u8, function: u8) -> Option<&mut PciFunction> {
        self.functions.get_mut(&devfn(device, function))
    }

    /// Whether a BAR or a command register changed since the last call: look at the BARs again.
    pub fn take_layout_change(&mut self) -> bool {
        std::mem::take(&mut self.layout_changed)
    }

    /// ISA interrupt that the PIIX routes PIRQ A to D (0..4) to, if any.
    pub fn pirq_route(&self, pirq: u8) -> Option<u8> {
        let route = self.function(1, 0)?.byte(PIRQ_ROUTE + (pirq & 3));
        (route & 0x80 == 0).then_some(route & 0xf)
    }

    /// The function and register that the address port selects, for the data port `port`.
    fn selected(&self, port: u16) -> Option<(u8, u8)> {
        let on_bus_0 = self.address & (ENABLE | 0x00ff_0000) == ENABLE;
        let register = self.address as u8 & 0xfc | (port & 3) as u8;
        on_bus_0.then_some(((self.address >> 8) as u8, register))
    }

    fn read_data(&self, port: u16, width: AccessWidth) -> u32 {
        regmap::read_bytes(port, width, |port| {
            let selected = self.selected(port).filter(|_| (CONFIG_DATA..CONFIG_DATA + 4).contains(&port));
            let function = selected.and_then(|(devfn, register)| Some((self.functions.get(&devfn)?, register)));
            function.map_or(0xff, |(function, register)| function.byte(register))
        })
    }

    fn write_data(&mut self, port: u16, width: AccessWidth, value: u32) {
        regmap::write_bytes(port, width, value, |port, byte| {
            let selected = self.selected(port).filter(|_| (CONFIG_DATA..CONFIG_DATA + 4).contains(&port));
            let Some((devfn, register)) = selected else { return };
            if let Some(function) = self.functions.get_mut(&devfn) {
                self.layout_changed |= function.write(register, AccessWidth::Byte, byte.into());
            }
        });
    }
}

fn devfn(device: u8, function: u8) -> u8 {
    (device & 0x1f) << 3 | function & 7
}

fn host_bridge() -> PciFunction {
    let identity =
        PciIdentity { vendor: 0x8086, device: 0x1237, revision: 2, class: 0x06_0000, subsystem: (0x1af4, 0x1100) };
    // Programmable attribute map and SMRAM control: stored; shadow RAM is the machine's matter.
    (0x59..=0x5f).chain([0x72]).fold(PciFunction::new(identity), |f, offset| f.with_byte(offset, 0, 0xff))
}

fn isa_bridge() -> PciFunction {
    let identity =
        PciIdentity { vendor: 0x8086, device: 0x7000, revision: 0, class: 0x06_0100, subsystem: (0x1af4, 0x1100) };
    (PIRQ_ROUTE..PIRQ_ROUTE + 4)
        .fold(PciFunction::new(identity).multifunction(), |f, offset| f.with_byte(offset, 0x80, 0x8f))
}

fn power_management() -> PciFunction {
    let identity =
        PciIdentity { vendor: 0x8086, device: 0x7113, revision: 3, class: 0x06_8000, subsystem: (0x1af4, 0x1100) };
    let [base_low, base_high] = PM_BASE.to_le_bytes();
    PciFunction::new(identity)
        .with_interrupt_pin(1)
        // The I/O base is where the block really is; PMREGMISC says it is decoded.
        .with_byte(0x40, base_low | 1, 0)
        .with_byte(0x41, base_high, 0)
        .with_byte(0x80, 1, 1)
        .with_byte(0x90, 1, 0xc0)
        .with_byte(0x91, 0, 0xff)
        .with_byte(0xd2, 0, 0xff)
        .with_byte(offset::INTERRUPT_LINE, 9, 0xff)
}

impl Device for PciBus {
    fn advance(&mut self, _now: VirtualTime) {}
    fn next_event(&self) -> Option<VirtualTime> {
        None
    }
    fn reset(&mut self) {
        self.address = 0;
        self.functions = self.power_on.clone();
        self.layout_changed = true;
    }
}

impl PortDevice for PciBus {
    fn port_read(&mut self, _now: VirtualTime, port: u16, width: AccessWidth) -> u32 {
        match (port, width) {
            (CONFIG_ADDRESS, AccessWidth::Dword) => self.address,
            (CONFIG_DATA..=0xcff, _) => self.read_data(port, width),
            _ => width.mask() as u32,
        }
    }
    fn port_write(&mut self, _now: VirtualTime, port: u16, width: AccessWidth, value: u32) {
        match (port, width) {
            (CONFIG_ADDRESS, AccessWidth::Dword) => self.address = value & 0x80ff_fffc,
            (CONFIG_DATA..=0xcff, _) => self.write_data(port, width, value),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
