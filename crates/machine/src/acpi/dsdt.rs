//! DSDT: the PCI root bridge, the ISA devices and what S5 is, in AML.

use super::AcpiConfig;
use super::interrupts::PCI_IRQS;
use super::table::Table;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Name, Package, PackageBuilder, Path, ResourceTemplate,
    Scope,
};
use acpi_tables::{Aml, AmlSink};
use umbra_devices::acpi_pm::S5_SLP_TYP;
use umbra_devices::uart::{COM1_BASE, COM1_IRQ};

/// First byte of the I/O APIC's page: PCI memory ends before it.
const PCI_MEMORY_END: u32 = 0xfebf_ffff;

/// "IRQ Descriptor" (small, without flags): edge-triggered, exclusive, for ISA devices.
struct IsaIrq(u8);

impl Aml for IsaIrq {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.byte(0x22);
        sink.word(1 << self.0);
    }
}

struct Bytes(Vec<u8>);

impl AmlSink for Bytes {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

pub(super) fn dsdt(config: &AcpiConfig) -> Vec<u8> {
    let mut aml = Bytes(Vec::new());
    sleep_states().to_aml_bytes(&mut aml);
    let bridge = root_bridge(config);
    let scope = Scope::raw(Path::new("\\_SB_"), bridge);
    aml.vec(&scope);
    let mut table = Table::new(b"DSDT", 2);
    table.raw(&aml.0);
    table.finish()
}

fn sleep_states() -> Name {
    Name::new("\\_S5_".into(), &Package::new(vec![&S5_SLP_TYP, &S5_SLP_TYP, &0u8, &0u8]))
}

fn root_bridge(config: &AcpiConfig) -> Vec<u8> {
    let buses = AddressSpace::new_bus_number(0u16, 255u16);
    let config_ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let low_ports = AddressSpace::new_io(0u16, 0xcf7u16, None);
    let high_ports = AddressSpace::new_io(0xd00u16, 0xffffu16, None);
    let video = AddressSpace::new_memory(AddressSpaceCacheable::Cacheable, true, 0xa_0000u32, 0xb_ffffu32, None);
    let hole = u32::try_from(config.pci_memory).unwrap_or(PCI_MEMORY_END).min(PCI_MEMORY_END);
    let memory = AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, hole, PCI_MEMORY_END, None);
    let resources = ResourceTemplate::new(vec![&buses, &config_ports, &low_ports, &high_ports, &video, &memory]);
    let mut bytes = Bytes(Vec::new());
    Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &resources),
            &Name::new("_PRT".into(), &routing()),
            &com1(),
            &clock(),
            &keyboard(),
        ],
    )
    .to_aml_bytes(&mut bytes);
    bytes.0
}

/// A routing entry: address, pin, source index (none), interrupt.
struct Route(u32, u8, u8);

impl Aml for Route {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Package::new(vec![&self.0, &self.1, &0u8, &self.2]).to_aml_bytes(sink);
    }
}

/// Pins of neighbouring slots go to different interrupts. The interrupts are ISA ones, so that the
/// routing holds with the 8259s and with the I/O APIC.
fn routing() -> PackageBuilder {
    let mut routes = PackageBuilder::new();
    for slot in 1..32u32 {
        for pin in 0..4u8 {
            let irq = PCI_IRQS[(slot as usize + pin as usize) % PCI_IRQS.len()];
            routes.add_element(&Route(slot << 16 | 0xffff, pin, irq));
        }
    }
    routes
}

fn com1() -> AmlBytes {
    isa_device("COM1", "PNP0501", vec![&IO::new(COM1_BASE, COM1_BASE, 1, 8), &IsaIrq(COM1_IRQ)])
}

fn clock() -> AmlBytes {
    isa_device("RTC_", "PNP0B00", vec![&IO::new(0x70, 0x70, 1, 8), &IsaIrq(8)])
}

fn keyboard() -> AmlBytes {
    isa_device("KBD_", "PNP0303", vec![&IO::new(0x60, 0x60, 1, 1), &IO::new(0x64, 0x64, 1, 1), &IsaIrq(1)])
}

/// AML that was already written.
struct AmlBytes(Vec<u8>);

impl Aml for AmlBytes {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn isa_device(name: &str, id: &str, resources: Vec<&dyn Aml>) -> AmlBytes {
    let mut bytes = Bytes(Vec::new());
    Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new(id)),
            &Name::new("_UID".into(), &1u8),
            &Name::new("_STA".into(), &0xfu8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    )
    .to_aml_bytes(&mut bytes);
    AmlBytes(bytes.0)
}
