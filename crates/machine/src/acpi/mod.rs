//! The ACPI tables of the PC, as a BIOS would leave them in the BIOS area.
//!
//! Names and offsets are those of the "ACPI Software Programming Model" chapter of the ACPI
//! specification. Everything is built before the guest starts and lies in ordinary RAM.

mod dsdt;
mod fixed;
mod interrupts;
mod table;

pub(crate) use fixed::SCI_IRQ;
pub(crate) use interrupts::{IOAPIC_ID, TIMER_PIN};

use crate::memory_map::BIOS_AREA;
use table::{Table, checksum};
use umbra_arch::Gpa;

/// What the tables have to describe.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AcpiConfig {
    /// Number of virtual CPUs; their local APIC ids count from 0.
    pub vcpus: u32,
    /// First address that PCI devices may decode: the end of RAM below 4 GiB.
    pub pci_memory: u64,
}

/// All tables as one block of bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AcpiTables {
    /// Where the block goes; the root pointer is its first byte.
    pub rsdp: Gpa,
    /// The block.
    pub bytes: Vec<u8>,
}

/// Appends tables to the block and knows their addresses.
struct Block {
    bytes: Vec<u8>,
}

impl Block {
    fn add(&mut self, align: usize, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(align), 0);
        let at = BIOS_AREA + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        at
    }
}

const RSDP_BYTES: usize = 36;

/// Builds every table for this machine.
pub fn tables(config: &AcpiConfig) -> AcpiTables {
    let mut block = Block { bytes: vec![0; RSDP_BYTES] };
    let dsdt = block.add(16, &dsdt::dsdt(config));
    let facs = block.add(64, &fixed::facs());
    let fadt = block.add(16, &fixed::fadt(facs, dsdt));
    let madt = block.add(16, &interrupts::madt(config.vcpus));
    let mut rsdt = Table::new(b"RSDT", 1);
    let mut xsdt = Table::new(b"XSDT", 1);
    let hpet = block.add(16, &fixed::hpet());
    for table in [fadt, madt, hpet] {
        rsdt.u32(table as u32);
        xsdt.u64(table);
    }
    let rsdt = block.add(16, &rsdt.finish());
    let xsdt = block.add(16, &xsdt.finish());
    let root = rsdp(rsdt, xsdt);
    block.bytes[..RSDP_BYTES].copy_from_slice(&root);
    AcpiTables { rsdp: Gpa::new(BIOS_AREA), bytes: block.bytes }
}

/// "Root System Description Pointer (RSDP) Structure", revision 2.
fn rsdp(rsdt: u64, xsdt: u64) -> [u8; RSDP_BYTES] {
    let mut root = [0; RSDP_BYTES];
    root[..8].copy_from_slice(b"RSD PTR ");
    root[9..15].copy_from_slice(table::OEM_ID);
    root[15] = 2;
    root[16..20].copy_from_slice(&(rsdt as u32).to_le_bytes());
    root[20..24].copy_from_slice(&(RSDP_BYTES as u32).to_le_bytes());
    root[24..32].copy_from_slice(&xsdt.to_le_bytes());
    root[8] = checksum(&root[..20]);
    root[32] = checksum(&root);
    root
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory_map::HIGH_MEMORY;

    fn built() -> AcpiTables {
        tables(&AcpiConfig { vcpus: 3, pci_memory: 0x2000_0000 })
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn at(tables: &AcpiTables, gpa: u64) -> &[u8] {
        &tables.bytes[(gpa - BIOS_AREA) as usize..]
    }

    fn table(tables: &AcpiTables, gpa: u64) -> &[u8] {
        let bytes = at(tables, gpa);
        let len = u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize;
        &bytes[..len]
    }

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }

    /// A walk as a guest's scan does it, from the root pointer to each table.
    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let built = built();
        let root = at(&built, built.rsdp.raw());
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!((sum(&root[..20]), sum(&root[..36])), (0, 0));
        let rsdt = table(&built, u32_at(root, 16).into());
        let xsdt = table(&built, u64::from_le_bytes(root[24..32].try_into().unwrap()));
        assert_eq!((sum(rsdt), sum(xsdt)), (0, 0));
        let mut names = Vec::new();
        for (index, entry) in xsdt[36..].chunks(8).enumerate() {
            let gpa = u64::from_le_bytes(entry.try_into().unwrap());
            assert_eq!(u64::from(u32_at(rsdt, 36 + index * 4)), gpa);
            let table = table(&built, gpa);
            assert_eq!(sum(table), 0);
            names.push(String::from_utf8_lossy(&table[..4]).into_owned());
            if table.starts_with(b"FACP") {
                let dsdt = self::table(&built, u32_at(table, 40).into());
                assert!(dsdt.starts_with(b"DSDT") && sum(dsdt) == 0);
                let facs = u32_at(table, 36);
                assert!(at(&built, facs.into()).starts_with(b"FACS") && facs.is_multiple_of(64));
                assert_eq!(u64::from_le_bytes(table[140..148].try_into().unwrap()), u32_at(table, 40).into());
            }
        }
        assert_eq!(names, ["FACP", "APIC", "HPET"]);
        assert!(built.rsdp.raw().is_multiple_of(16), "a scan looks at multiples of 16");
        assert!(built.rsdp.raw() + built.bytes.len() as u64 <= HIGH_MEMORY);
    }

    /// Vectors depend on these: without the overrides Linux stops in its timer check.
    #[test]
    fn madt_lists_cpus_and_overrides() {
        let built = built();
        let madt = built.bytes.windows(4).position(|w| w == b"APIC").unwrap();
        let madt = table(&built, BIOS_AREA + madt as u64);
        let (mut cpus, mut overrides, mut rest) = (Vec::new(), Vec::new(), &madt[44..]);
        while let [kind, len, ..] = *rest {
            match kind {
                0 => cpus.push(rest[3]),
                2 => overrides.push((rest[3], u32_at(rest, 4), u16::from_le_bytes([rest[8], rest[9]]))),
                _ => {}
            }
            rest = &rest[len as usize..];
        }
        assert_eq!(cpus, [0, 1, 2]);
        assert!(overrides.contains(&(0, 2, 0)));
        assert!(overrides.contains(&(9, 9, 0xd)), "the SCI is level-triggered");
    }
}
