//! Where everything lies in guest-physical space, and what the guest is told about it.

use umbra_arch::PAGE_SIZE;

/// End of conventional memory: what lies above, up to A0000h, is the extended BIOS data area.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// First byte of the legacy video window.
pub const VGA_WINDOW: u64 = 0xa_0000;
/// First byte of the area where systems scan for tables (RSDP) and firmware lies.
pub const BIOS_AREA: u64 = 0xe_0000;
/// First byte above the first mebibyte.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// RAM below 4 GiB ends here at the latest; PCI memory windows follow.
pub const PCI_HOLE: u64 = 0xc000_0000;
/// The I/O APIC's registers.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// The HPET's registers.
pub const HPET_BASE: u64 = 0xfed0_0000;
/// Every local APIC's registers after reset.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// End of the 32-bit address space; the reset firmware ends here.
pub const FOUR_GIB: u64 = 1 << 32;

/// The kinds of the "Query System Address Map" interface (INT 15h, E820h).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum RangeKind {
    /// Usable RAM.
    Ram = 1,
    /// Not for the guest's allocator.
    Reserved = 2,
}

/// One line of the map that the guest gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapEntry {
    /// First byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// What it is.
    pub kind: RangeKind,
}

impl MapEntry {
    /// The first byte after the range.
    pub const fn end(&self) -> u64 {
        self.start + self.len
    }
}

/// The guest's physical memory map, sorted by address and without overlaps.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemoryMap {
    ram: Vec<(u64, u64)>,
    entries: Vec<MapEntry>,
}

impl MemoryMap {
    /// The map of a machine whose RAM lies at `ram` (start and length, ascending, not overlapping).
    pub fn of_ram(ram: &[(u64, u64)]) -> Self {
        let mut entries = Vec::new();
        for &(start, len) in ram {
            add_ram(&mut entries, start, start.saturating_add(len));
        }
        let reserved = [
            (CONVENTIONAL_END, VGA_WINDOW),
            (BIOS_AREA, HIGH_MEMORY),
            (IOAPIC_BASE, IOAPIC_BASE + PAGE_SIZE),
            (HPET_BASE, HPET_BASE + PAGE_SIZE),
            (LAPIC_BASE, LAPIC_BASE + PAGE_SIZE),
            (FOUR_GIB - 0x4_0000, FOUR_GIB),
        ];
        for (start, end) in reserved {
            entries.push(MapEntry { start, len: end - start, kind: RangeKind::Reserved });
        }
        entries.sort_by_key(|entry| entry.start);
        Self { ram: ram.to_vec(), entries }
    }

    /// The map as E820h tells it.
    pub fn entries(&self) -> &[MapEntry] {
        &self.entries
    }

    /// Whether `len` bytes at `start` are RAM that a boot image may occupy.
    pub fn is_usable(&self, start: u64, len: u64) -> bool {
        let Some(end) = start.checked_add(len) else { return false };
        self.usable().any(|entry| entry.start <= start && end <= entry.end())
    }

    /// The usable ranges, ascending.
    pub fn usable(&self) -> impl DoubleEndedIterator<Item = &MapEntry> {
        self.entries.iter().filter(|entry| entry.kind == RangeKind::Ram)
    }

    /// The first byte after RAM below 4 GiB.
    pub fn low_ram_end(&self) -> u64 {
        self.ram.iter().map(|&(start, len)| start + len).filter(|&end| end <= FOUR_GIB).max().unwrap_or(0)
    }

    /// Bytes of RAM in all.
    pub fn ram_bytes(&self) -> u64 {
        self.ram.iter().map(|&(_, len)| len).sum()
    }
}

/// Adds the parts of `start..end` that are neither EBDA, video window nor BIOS area.
fn add_ram(entries: &mut Vec<MapEntry>, start: u64, end: u64) {
    for (low, high) in [(0, CONVENTIONAL_END), (HIGH_MEMORY, u64::MAX)] {
        let (from, to) = (start.max(low), end.min(high));
        if from < to {
            entries.push(MapEntry { start: from, len: to - from, kind: RangeKind::Ram });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_sorted_without_overlap(map: &MemoryMap) {
        for pair in map.entries().windows(2) {
            assert!(pair[0].end() <= pair[1].start, "{pair:x?}");
        }
    }

    #[test]
    fn small_machine_has_one_high_range() {
        let map = MemoryMap::of_ram(&[(0, 64 << 20)]);
        let usable: Vec<_> = map.usable().map(|e| (e.start, e.end())).collect();
        assert_eq!(usable, [(0, CONVENTIONAL_END), (HIGH_MEMORY, 64 << 20)]);
        assert_eq!(map.low_ram_end(), 64 << 20);
        assert_sorted_without_overlap(&map);
    }

    #[test]
    fn ram_above_four_gib_is_a_range_of_its_own() {
        let map = MemoryMap::of_ram(&[(0, PCI_HOLE), (FOUR_GIB, 1 << 30)]);
        assert!(map.is_usable(FOUR_GIB, 1 << 30));
        assert!(!map.is_usable(FOUR_GIB, (1 << 30) + 1));
        assert_eq!(map.low_ram_end(), PCI_HOLE);
        assert_eq!(map.ram_bytes(), PCI_HOLE + (1 << 30));
        assert_sorted_without_overlap(&map);
    }

    #[test]
    fn holes_are_not_usable() {
        let map = MemoryMap::of_ram(&[(0, 64 << 20)]);
        for gpa in [CONVENTIONAL_END, VGA_WINDOW, BIOS_AREA, HIGH_MEMORY - 1, LAPIC_BASE, u64::MAX] {
            assert!(!map.is_usable(gpa, 1), "{gpa:#x}");
        }
        assert!(!map.is_usable(CONVENTIONAL_END - 1, 2));
        assert!(!map.is_usable(u64::MAX, u64::MAX));
    }
}
