//! Linux' bzImage by its 64-bit entry if it has one, else by its 32-bit entry ("The Linux/x86 Boot Protocol").

use super::bytes::{align_up, put, range, u8_at, u16_at, u32_at, u64_at};
use super::placement::Placement;
use super::{BootError, BootPlan, BootRequest, ImageKind, entry_state};
use crate::memory_map::{CONVENTIONAL_END, FOUR_GIB, HIGH_MEMORY};
use umbra_arch::PAGE_SIZE;
use umbra_arch::state::reg;

/// Offsets in the file and in the zero page alike.
mod field {
    pub const SETUP_SECTS: u64 = 0x1f1;
    pub const SYSSIZE: u64 = 0x1f4;
    pub const JUMP: u64 = 0x200;
    pub const MAGIC: u64 = 0x202;
    pub const VERSION: u64 = 0x206;
    pub const LOADER: usize = 0x210;
    pub const LOADFLAGS: u64 = 0x211;
    pub const CODE32_START: usize = 0x214;
    pub const RAMDISK_IMAGE: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21c;
    pub const CMD_LINE_PTR: usize = 0x228;
    pub const INITRD_ADDR_MAX: u64 = 0x22c;
    pub const KERNEL_ALIGNMENT: u64 = 0x230;
    pub const RELOCATABLE: u64 = 0x234;
    pub const XLOADFLAGS: u64 = 0x236;
    pub const CMDLINE_SIZE: u64 = 0x238;
    pub const PREF_ADDRESS: u64 = 0x258;
    pub const INIT_SIZE: u64 = 0x260;
}

/// Offsets in the zero page only.
mod zero_page {
    pub const ACPI_RSDP_ADDR: usize = 0x070;
    pub const E820_ENTRIES: usize = 0x1e8;
    pub const E820_TABLE: usize = 0x2d0;
    pub const E820_MAX: usize = 128;
}

const KIND: ImageKind = ImageKind::BzImage;
const LOADED_HIGH: u8 = 1;
const KERNEL_64: u16 = 1;
/// xloadflags exist since 2.12, init_size since 2.10.
const OLDEST_64: u16 = 0x20c;
const OLDEST_32: u16 = 0x20a;
/// "A boot loader without an assigned id".
const LOADER_UNDEFINED: u8 = 0xff;
/// The entry's offset from the load address.
const ENTRY_64: u64 = 0x200;

/// Whether the file has the setup header's magic number.
pub(super) fn looks_like(image: &[u8]) -> bool {
    range(image, field::MAGIC, 4) == Some(b"HdrS")
}

/// The entry that is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Entry {
    /// 64-bit code, at an offset from the load address.
    Long,
    /// 32-bit code, at the load address.
    Protected,
}

/// The header's fields, checked.
#[derive(Debug)]
struct Header<'a> {
    entry: Entry,
    /// Bytes 1F1h up to the header's end: what the zero page gets.
    raw: &'a [u8],
    /// The protected-mode part of the file.
    kernel: &'a [u8],
    relocatable: bool,
    pref_address: u64,
    alignment: u64,
    init_size: u64,
    initrd_addr_max: u64,
    cmdline_size: u64,
}

fn bad(what: &'static str, value: u64) -> BootError {
    BootError::BadField { kind: KIND, what, value }
}

fn parse(image: &[u8]) -> Result<Header<'_>, BootError> {
    let has = image.len() as u64;
    let cut = |what, needs| BootError::Truncated { kind: KIND, what, needs, has };
    let header_end = field::INIT_SIZE + 4;
    if has < header_end {
        return Err(cut("setup header", header_end));
    }
    let byte = |at| u8_at(image, at).unwrap_or(0);
    let dword = |at| u64::from(u32_at(image, at).unwrap_or(0));
    let entry = entry_of(image)?;

    let setup_sects = match byte(field::SETUP_SECTS) {
        0 => 4,
        n => u64::from(n),
    };
    let kernel_at = (setup_sects + 1) * 512;
    let kernel_len = dword(field::SYSSIZE) * 16;
    if kernel_len == 0 {
        return Err(bad("syssize", 0));
    }
    // syssize is rounded up to paragraphs, the file needn't be.
    let needs = kernel_at + kernel_len;
    if has + 15 < needs {
        return Err(cut("kernel", needs));
    }
    let kernel = image.get(kernel_at as usize..).ok_or(cut("kernel", needs))?;

    let raw_end = u64::from(byte(field::JUMP + 1)) + 0x202;
    if raw_end < header_end || raw_end > zero_page::E820_TABLE as u64 {
        return Err(bad("the setup header's end", raw_end));
    }
    let raw = range(image, field::SETUP_SECTS, raw_end - field::SETUP_SECTS).ok_or(cut("setup header", raw_end))?;

    let alignment = dword(field::KERNEL_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment < PAGE_SIZE {
        return Err(bad("kernel_alignment", alignment));
    }
    let pref_address = u64_at(image, field::PREF_ADDRESS).unwrap_or(0);
    let relocatable = byte(field::RELOCATABLE) != 0;
    if !(HIGH_MEMORY..FOUR_GIB).contains(&pref_address) || !pref_address.is_multiple_of(PAGE_SIZE) {
        return Err(bad("pref_address", pref_address));
    }
    Ok(Header {
        entry,
        raw,
        kernel,
        relocatable,
        pref_address,
        alignment,
        init_size: dword(field::INIT_SIZE).max(kernel.len() as u64),
        initrd_addr_max: dword(field::INITRD_ADDR_MAX),
        cmdline_size: dword(field::CMDLINE_SIZE),
    })
}

/// Chooses the entry; refuses images without one that we know.
fn entry_of(image: &[u8]) -> Result<Entry, BootError> {
    let version = u16_at(image, field::VERSION).unwrap_or(0);
    let no_entry = |why| Err(BootError::NoEntry { why });
    if version < OLDEST_32 {
        return no_entry(format!("boot protocol {}.{:02}, 2.10 is needed", version >> 8, version & 0xff));
    }
    if u8_at(image, field::LOADFLAGS).unwrap_or(0) & LOADED_HIGH == 0 {
        return no_entry("LOADED_HIGH is clear in loadflags".into());
    }
    let long = version >= OLDEST_64 && u16_at(image, field::XLOADFLAGS).unwrap_or(0) & KERNEL_64 != 0;
    Ok(if long { Entry::Long } else { Entry::Protected })
}

pub(super) fn plan<'a>(request: &BootRequest<'a>) -> Result<BootPlan<'a>, BootError> {
    let header = parse(request.kernel)?;
    if request.command_line.len() as u64 > header.cmdline_size {
        let (len, max) = (request.command_line.len(), header.cmdline_size);
        return Err(BootError::CommandLineTooLong { len, max });
    }
    let mut place = Placement::new(request.map);
    let load = place_kernel(&mut place, &header)?;
    place.put("the kernel", load, header.kernel);
    let initrd = match request.initrd {
        Some(initrd) => Some(place_initrd(&mut place, &header, initrd)?),
        None => None,
    };
    let gdt = place.put_low("the boot GDT", entry_state::gdt(header.entry == Entry::Long))?;
    let mut state = match header.entry {
        Entry::Long => entry_state::long64(load + ENTRY_64, gdt, place_tables(&mut place)?),
        // Kernels are placed below 4 GiB.
        Entry::Protected => entry_state::protected32(load as u32, gdt),
    };
    let mut line = request.command_line.as_bytes().to_vec();
    line.push(0);
    let line_at = place.put_low("the command line", line)?;
    let page = zero_page(&header, &place, load, initrd, line_at, request.rsdp.raw())?;
    let zero_page_at = place.put_low("the zero page", page)?;
    state.gpr[reg::RSI] = zero_page_at;
    Ok(BootPlan { kind: Some(KIND), pieces: place.into_pieces(), state: Box::new(state) })
}

/// The preferred address if it is free, else (for relocatable kernels) the lowest aligned one.
fn place_kernel(place: &mut Placement<'_, '_>, header: &Header<'_>) -> Result<u64, BootError> {
    let what = "the kernel with its work space";
    match place.claim(what, header.pref_address, header.init_size) {
        Ok(()) => Ok(header.pref_address),
        Err(_) if header.relocatable => {
            place.lowest(what, header.init_size, header.alignment.max(PAGE_SIZE), HIGH_MEMORY, FOUR_GIB)
        }
        Err(error) => Err(error),
    }
}

/// As high as the kernel allows; gives its address and length.
fn place_initrd<'a>(
    place: &mut Placement<'a, '_>,
    header: &Header<'_>,
    initrd: &'a [u8],
) -> Result<(u64, u64), BootError> {
    let len = initrd.len() as u64;
    let padded = align_up(len, PAGE_SIZE).unwrap_or(len);
    let limit = (header.initrd_addr_max + 1).min(FOUR_GIB);
    let at = place.highest("the initrd", padded, PAGE_SIZE, limit)?;
    place.put("the initrd", at, initrd);
    Ok((at, len))
}

fn place_tables(place: &mut Placement<'_, '_>) -> Result<u64, BootError> {
    let what = "the boot page tables";
    let at = place.lowest(what, entry_state::IDENTITY_TABLES_BYTES, PAGE_SIZE, 0, CONVENTIONAL_END)?;
    place.put(what, at, entry_state::identity_tables(at));
    Ok(at)
}

fn zero_page(
    header: &Header<'_>,
    place: &Placement<'_, '_>,
    load: u64,
    initrd: Option<(u64, u64)>,
    line_at: u64,
    rsdp: u64,
) -> Result<Vec<u8>, BootError> {
    let mut page = vec![0; PAGE_SIZE as usize];
    let at = field::SETUP_SECTS as usize;
    page[at..at + header.raw.len()].copy_from_slice(header.raw);
    put(&mut page, field::LOADER, [LOADER_UNDEFINED]);
    put(&mut page, field::CODE32_START, (load as u32).to_le_bytes());
    put(&mut page, field::CMD_LINE_PTR, (line_at as u32).to_le_bytes());
    let (initrd_at, initrd_len) = initrd.unwrap_or((0, 0));
    put(&mut page, field::RAMDISK_IMAGE, (initrd_at as u32).to_le_bytes());
    put(&mut page, field::RAMDISK_SIZE, (initrd_len as u32).to_le_bytes());
    put(&mut page, zero_page::ACPI_RSDP_ADDR, rsdp.to_le_bytes());
    let mut count = 0;
    for (start, len, kind) in place.e820().take(zero_page::E820_MAX) {
        let entry = zero_page::E820_TABLE + count * 20;
        put(&mut page, entry, start.to_le_bytes());
        put(&mut page, entry + 8, len.to_le_bytes());
        put(&mut page, entry + 16, (kind as u32).to_le_bytes());
        count += 1;
    }
    put(&mut page, zero_page::E820_ENTRIES, [count as u8]);
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::super::synthetic::{self, piece};
    use super::*;
    use crate::memory_map::MemoryMap;

    fn ram(mib: u64) -> MemoryMap {
        MemoryMap::of_ram(&[(0, mib << 20)])
    }

    #[test]
    fn zero_page_holds_what_the_protocol_demands() {
        let image = synthetic::bzimage(0x8000);
        let initrd = vec![7; 5000];
        let map = ram(64);
        let request = BootRequest { initrd: Some(&initrd), ..synthetic::request(&image, &map) };
        let plan = super::plan(&request).unwrap();
        let zero = piece(&plan, "the zero page");
        let z = &zero.bytes;
        assert_eq!(&z[0x202..0x206], b"HdrS");
        assert_eq!(z[0x210], 0xff);
        assert_eq!(u64_at(z, 0x70), Some(request.rsdp.raw()));
        assert_eq!(usize::from(z[0x1e8]), map.entries().len());
        let initrd_at = u64::from(u32_at(z, 0x218).unwrap());
        assert_eq!(piece(&plan, "the initrd").gpa.raw(), initrd_at);
        assert_eq!(u32_at(z, 0x21c), Some(5000));
        assert_eq!(initrd_at % PAGE_SIZE, 0);
        let line = piece(&plan, "the command line");
        assert_eq!(u64::from(u32_at(z, 0x228).unwrap()), line.gpa.raw());
        assert_eq!(line.bytes.last(), Some(&0));
        assert_eq!(plan.state.gpr[reg::RSI], zero.gpa.raw());
        assert_eq!(plan.state.rip, 0x100_0000 + 0x200);
        assert!(plan.state.is_64bit_code() && plan.state.cr0.pg());
        assert_eq!(plan.state.rflags & umbra_arch::rflags::IF, 0);
    }

    #[test]
    fn kernel_without_64_bit_code_is_entered_at_its_load_address() {
        let map = ram(64);
        for (version, flags) in [(0x20fu16, 0u16), (0x20b, 1), (0x20a, 0)] {
            let mut image = synthetic::bzimage(0x8000);
            image[0x206..0x208].copy_from_slice(&version.to_le_bytes());
            image[0x236..0x238].copy_from_slice(&flags.to_le_bytes());
            let plan = super::plan(&synthetic::request(&image, &map)).unwrap();
            let s = &plan.state;
            assert_eq!(s.rip, 0x100_0000);
            assert!(s.cr0.pe() && !s.cr0.pg() && !s.is_64bit_code() && !s.efer.lma());
            assert_eq!((s.gpr[reg::RBX], s.gpr[reg::RBP], s.gpr[reg::RDI]), (0, 0, 0));
            assert_eq!(s.gpr[reg::RSI], piece(&plan, "the zero page").gpa.raw());
            assert_eq!((s.seg[1].selector, s.seg[3].selector), (0x10, 0x18));
        }
    }

    #[test]
    fn protocol_before_2_10_is_refused() {
        let mut image = synthetic::bzimage(0x8000);
        image[0x206..0x208].copy_from_slice(&0x209u16.to_le_bytes());
        let map = ram(64);
        assert!(matches!(super::plan(&synthetic::request(&image, &map)), Err(BootError::NoEntry { .. })));
    }

    #[test]
    fn relocatable_kernel_moves_when_its_preferred_place_is_missing() {
        let mut image = synthetic::bzimage(0x8000);
        let map = ram(12);
        let plan = super::plan(&synthetic::request(&image, &map)).unwrap();
        assert_eq!(piece(&plan, "the kernel").gpa.raw(), 0x20_0000);
        image[0x234] = 0;
        assert!(matches!(super::plan(&synthetic::request(&image, &map)), Err(BootError::DoesNotFit { .. })));
    }

    #[test]
    fn initrd_stays_below_its_limit_and_out_of_the_kernel() {
        let mut image = synthetic::bzimage(0x8000);
        image[0x22c..0x230].copy_from_slice(&0x0180_0000u32.to_le_bytes());
        let initrd = vec![1; 0x10_0000];
        let map = ram(64);
        let request = BootRequest { initrd: Some(&initrd), ..synthetic::request(&image, &map) };
        let at = piece(&super::plan(&request).unwrap(), "the initrd").gpa.raw();
        assert!(at + 0x10_0000 <= 0x0180_0001, "{at:#x}");
        assert!(at >= 0x100_0000 + 0x10_0000, "{at:#x}");
    }

    #[test]
    fn initrd_larger_than_ram_is_refused() {
        let image = synthetic::bzimage(0x8000);
        let initrd = vec![1; 33 << 20];
        let map = ram(32);
        let request = BootRequest { initrd: Some(&initrd), ..synthetic::request(&image, &map) };
        let error = super::plan(&request).unwrap_err();
        assert!(matches!(error, BootError::NoRoom { what: "the initrd", .. }), "{error}");
    }

    #[test]
    fn command_line_of_the_limit_is_taken_and_one_more_is_not() {
        let image = synthetic::bzimage(0x8000);
        let map = ram(64);
        for (len, fits) in [(2047, true), (2048, false)] {
            let line = "x".repeat(len);
            let request = BootRequest { command_line: &line, ..synthetic::request(&image, &map) };
            assert_eq!(super::plan(&request).is_ok(), fits);
        }
    }
}
