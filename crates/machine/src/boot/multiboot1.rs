//! Multiboot 1 ("Multiboot Specification version 0.6.96").

use super::bytes::{align_up, put, range, u32_at};
use super::elf::{self, Elf};
use super::placement::Placement;
use super::{BootError, BootPlan, BootRequest, ImageKind, entry_state};
use crate::memory_map::{CONVENTIONAL_END, FOUR_GIB, HIGH_MEMORY, RangeKind};
use umbra_arch::PAGE_SIZE;
use umbra_arch::state::reg;

const KIND: ImageKind = ImageKind::Multiboot1;
const HEADER_MAGIC: u32 = 0x1bad_b002;
const BOOT_MAGIC: u64 = 0x2bad_b002;
const SEARCH_BYTES: usize = 8192;

/// Header flags.
mod wants {
    pub const VIDEO: u32 = 1 << 2;
    pub const ADDRESS_FIELDS: u32 = 1 << 16;
    /// Bits 15:0 are demands; these are the ones we meet. Video is a wish that may stay unmet.
    pub const KNOWN: u32 = 1 | 1 << 1 | VIDEO;
}

/// Flags of the information structure.
mod has {
    pub const MEMORY: u32 = 1;
    pub const COMMAND_LINE: u32 = 1 << 2;
    pub const MODULES: u32 = 1 << 3;
    pub const MEMORY_MAP: u32 = 1 << 6;
    pub const LOADER_NAME: u32 = 1 << 9;
}

const INFO_BYTES: usize = 116;
const LOADER_NAME: &[u8] = b"umbra\0";
/// Kernels skip the command line's first word, where loaders put the file's name.
const KERNEL_NAME: &[u8] = b"kernel ";
const MODULE_STRING: &[u8] = b"module\0";

/// Offset of the Multiboot header, if there is one with a right checksum in the first 8 KiB.
pub(super) fn find_header(image: &[u8]) -> Option<u64> {
    let area = &image[..image.len().min(SEARCH_BYTES)];
    (0..area.len() as u64).step_by(4).find(|&at| {
        let field = |offset| u32_at(area, at + offset);
        field(0) == Some(HEADER_MAGIC)
            && matches!((field(4), field(8)), (Some(flags), Some(sum))
                if HEADER_MAGIC.wrapping_add(flags).wrapping_add(sum) == 0)
    })
}

pub(super) fn plan<'a>(request: &BootRequest<'a>) -> Result<BootPlan<'a>, BootError> {
    let image = request.kernel;
    let header = find_header(image).ok_or(BootError::Unrecognised)?;
    let flags = u32_at(image, header + 4).unwrap_or(0);
    let unknown = flags & 0xffff & !wants::KNOWN;
    if unknown != 0 {
        return Err(BootError::Unsupported { kind: KIND, what: format!("header flags {unknown:#x}") });
    }
    let mut place = Placement::new(request.map);
    let (entry, top) = if flags & wants::ADDRESS_FIELDS != 0 {
        load_by_address_fields(image, header, &mut place)?
    } else {
        load_elf(image, &mut place)?
    };
    let module = match request.initrd {
        Some(bytes) => {
            let len = bytes.len() as u64;
            let low = top.max(HIGH_MEMORY);
            let padded = align_up(len, PAGE_SIZE).unwrap_or(len);
            let at = place.lowest("the initrd", padded, PAGE_SIZE, low, FOUR_GIB)?;
            place.put("the initrd", at, bytes);
            Some((at, at + len))
        }
        None => None,
    };
    let gdt = place.put_low("the boot GDT", entry_state::gdt(false))?;
    let info = information(&mut place, module, request)?;
    let mut state = entry_state::protected32(entry, gdt);
    state.gpr[reg::RAX] = BOOT_MAGIC;
    state.gpr[reg::RBX] = info;
    Ok(BootPlan { kind: Some(KIND), pieces: place.into_pieces(), state: Box::new(state) })
}

/// Loads by the header's own address fields; gives the entry and the first byte after the image.
fn load_by_address_fields<'a>(
    image: &'a [u8],
    header: u64,
    place: &mut Placement<'a, '_>,
) -> Result<(u32, u64), BootError> {
    let has = image.len() as u64;
    let needs = header + 32;
    let field = |offset| {
        u32_at(image, header + offset).ok_or(BootError::Truncated { kind: KIND, what: "Multiboot header", needs, has })
    };
    let bad = |what, value: u32| BootError::BadField { kind: KIND, what, value: u64::from(value) };
    let (header_addr, load, load_end, bss_end, entry) = (field(12)?, field(16)?, field(20)?, field(24)?, field(28)?);
    let before = header_addr.checked_sub(load).ok_or(bad("load_addr above header_addr", load))?;
    let offset = header.checked_sub(u64::from(before)).ok_or(bad("load_addr", load))?;
    let len = match load_end {
        0 => has - offset,
        end => u64::from(end.checked_sub(load).ok_or(bad("load_end_addr", end))?),
    };
    let bytes = range(image, offset, len).ok_or(BootError::Truncated {
        kind: KIND,
        what: "loaded part",
        needs: offset + len,
        has,
    })?;
    let top = (u64::from(load) + len).max(u64::from(bss_end));
    place.claim("the kernel", u64::from(load), top - u64::from(load))?;
    place.put("the kernel", u64::from(load), bytes);
    Ok((entry, top))
}

/// Loads an ELF file's segments; the entry is a physical address or one that a segment translates.
fn load_elf<'a>(image: &'a [u8], place: &mut Placement<'a, '_>) -> Result<(u32, u64), BootError> {
    if !elf::looks_like(image) {
        let what = "the address fields' flag of a file that isn't ELF";
        return Err(BootError::BadField { kind: KIND, what, value: 0 });
    }
    let elf = Elf::parse(image)?;
    let top = elf.load(KIND, place)?;
    let entry = elf.physical(elf.entry).unwrap_or(elf.entry);
    let entry = u32::try_from(entry).map_err(|_| BootError::BadField { kind: KIND, what: "e_entry", value: entry })?;
    Ok((entry, top))
}

/// The information structure with everything that it points to, at a free low page.
fn information(
    place: &mut Placement<'_, '_>,
    module: Option<(u64, u64)>,
    request: &BootRequest<'_>,
) -> Result<u64, BootError> {
    let text = [KERNEL_NAME, request.command_line.as_bytes(), b"\0"].concat();
    let map_entries: Vec<_> = place.e820().collect();
    let modules = INFO_BYTES.next_multiple_of(16);
    let memory_map = modules + 16;
    let name = memory_map + map_entries.len() * 24;
    let module_string = name + LOADER_NAME.len();
    let line = module_string + MODULE_STRING.len();
    let bytes = line + text.len();
    let at = place.lowest("the Multiboot information", bytes as u64, PAGE_SIZE, 0, CONVENTIONAL_END)?;
    let address = |offset: usize| (at as u32 + offset as u32).to_le_bytes();

    let mut info = vec![0; bytes];
    let mut flags = has::MEMORY | has::COMMAND_LINE | has::MEMORY_MAP | has::LOADER_NAME;
    put(&mut info, 4, ((CONVENTIONAL_END / 1024) as u32).to_le_bytes());
    let upper = request.map.low_ram_end().saturating_sub(HIGH_MEMORY) / 1024;
    put(&mut info, 8, (upper as u32).to_le_bytes());
    put(&mut info, 16, address(line));
    if let Some((start, end)) = module {
        flags |= has::MODULES;
        put(&mut info, 20, 1u32.to_le_bytes());
        put(&mut info, 24, address(modules));
        put(&mut info, modules, (start as u32).to_le_bytes());
        put(&mut info, modules + 4, (end as u32).to_le_bytes());
        put(&mut info, modules + 8, address(module_string));
    }
    put(&mut info, 44, (map_entries.len() as u32 * 24).to_le_bytes());
    put(&mut info, 48, address(memory_map));
    for (index, (start, len, kind)) in map_entries.into_iter().enumerate() {
        put_map_entry(&mut info[memory_map + index * 24..], start, len, kind);
    }
    put(&mut info, 64, address(name));
    info[name..module_string].copy_from_slice(LOADER_NAME);
    info[module_string..line].copy_from_slice(MODULE_STRING);
    info[line..].copy_from_slice(&text);
    put(&mut info, 0, flags.to_le_bytes());
    place.put("the Multiboot information", at, info);
    Ok(at)
}

/// One entry of the map: the size counts what follows the size field.
fn put_map_entry(entry: &mut [u8], start: u64, len: u64, kind: RangeKind) {
    put(entry, 0, 20u32.to_le_bytes());
    put(entry, 4, start.to_le_bytes());
    put(entry, 12, len.to_le_bytes());
    put(entry, 20, (kind as u32).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::super::bytes::u64_at;
    use super::super::synthetic::{self, piece};
    use super::*;
    use crate::memory_map::MemoryMap;

    #[test]
    fn address_fields_place_the_image_and_its_bss() {
        let image = synthetic::multiboot(0x10_0000, 64, 0x4000);
        let map = MemoryMap::of_ram(&[(0, 64 << 20)]);
        let initrd = [5; 10];
        let request = BootRequest { initrd: Some(&initrd), ..synthetic::request(&image, &map) };
        let plan = super::plan(&request).unwrap();
        assert_eq!(piece(&plan, "the kernel").gpa.raw(), 0x10_0000);
        let info = piece(&plan, "the Multiboot information");
        let field = |offset| u32_at(&info.bytes, offset).unwrap();
        assert_eq!(plan.state.gpr[reg::RAX], 0x2bad_b002);
        assert_eq!(plan.state.gpr[reg::RBX], info.gpa.raw());
        assert_eq!(plan.state.rip, 0x10_0020);
        assert_eq!((field(4), field(8)), (639, 63 << 10));
        let module = u64::from(field(24)) - info.gpa.raw();
        let start = u64::from(u32_at(&info.bytes, module).unwrap());
        assert_eq!(piece(&plan, "the initrd").gpa.raw(), start);
        assert!(start >= 0x10_4000, "module lies in the bss: {start:#x}");
        assert_eq!(u32_at(&info.bytes, module + 4).unwrap() as u64, start + 10);
        let first = u64::from(field(48)) - info.gpa.raw();
        assert_eq!(u32_at(&info.bytes, first), Some(20));
        assert_eq!(u64_at(&info.bytes, first + 12), Some(CONVENTIONAL_END));
        let text = |at: u32, len| &info.bytes[(u64::from(at) - info.gpa.raw()) as usize..][..len];
        assert_eq!(text(field(16), 19), b"kernel console=tty\0");
        assert_eq!(text(u32_at(&info.bytes, module + 8).unwrap(), 7), b"module\0");
    }

    #[test]
    fn unknown_demands_are_refused() {
        let mut image = synthetic::multiboot(0x10_0000, 64, 0);
        let flags = 0x1_0000u32 | 1 << 5;
        image[4..8].copy_from_slice(&flags.to_le_bytes());
        image[8..12].copy_from_slice(&0u32.wrapping_sub(HEADER_MAGIC.wrapping_add(flags)).to_le_bytes());
        let map = MemoryMap::of_ram(&[(0, 64 << 20)]);
        let error = super::plan(&synthetic::request(&image, &map)).unwrap_err();
        assert!(matches!(error, BootError::Unsupported { .. }));
    }

    #[test]
    fn kernel_outside_ram_is_refused() {
        let image = synthetic::multiboot(0x7000_0000, 64, 0);
        let map = MemoryMap::of_ram(&[(0, 64 << 20)]);
        let error = super::plan(&synthetic::request(&image, &map)).unwrap_err();
        assert!(matches!(error, BootError::DoesNotFit { .. }), "{error}");
    }

    #[test]
    fn header_beyond_8_kib_is_not_seen() {
        let mut image = vec![0; 8192];
        image.extend(synthetic::multiboot(0x10_0000, 64, 0));
        assert_eq!(find_header(&image), None);
    }
}
