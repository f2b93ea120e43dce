//! ELF files: the loader's view, and PVH ("x86/HVM direct boot ABI") for those that carry its note.

use super::bytes::{align_up, put, range, u8_at, u16_at, u32_at, u64_at};
use super::placement::Placement;
use super::{BootError, BootPlan, BootRequest, ImageKind, entry_state};
use crate::memory_map::{FOUR_GIB, HIGH_MEMORY};
use umbra_arch::PAGE_SIZE;
use umbra_arch::state::reg;

const KIND: ImageKind = ImageKind::Elf;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// "xEn3" with the high bit of the "E" set.
const START_MAGIC: u32 = 0x336e_c578;
const START_INFO_BYTES: usize = 56;
/// More program headers than any kernel has; bounds the work a hostile file can ask for.
const MAX_PROGRAM_HEADERS: u64 = 256;

/// Whether the file has ELF's magic number.
pub(super) fn looks_like(image: &[u8]) -> bool {
    image.starts_with(b"\x7fELF")
}

/// A program header.
#[derive(Clone, Copy, Debug)]
struct Program {
    kind: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
    align: u64,
}

/// What a loader needs of an ELF file.
#[derive(Debug)]
pub(super) struct Elf<'a> {
    image: &'a [u8],
    /// The entry point, a virtual address.
    pub(super) entry: u64,
    programs: Vec<Program>,
}

fn bad(what: &'static str, value: u64) -> BootError {
    BootError::BadField { kind: KIND, what, value }
}

impl<'a> Elf<'a> {
    /// Reads the file and program headers.
    pub(super) fn parse(image: &'a [u8]) -> Result<Self, BootError> {
        let has = image.len() as u64;
        let cut = |what, needs| BootError::Truncated { kind: KIND, what, needs, has };
        let class = u8_at(image, 4).ok_or(cut("file header", 52))?;
        let wide = match class {
            1 => false,
            2 => true,
            other => return Err(bad("EI_CLASS", u64::from(other))),
        };
        let header_bytes = if wide { 64 } else { 52 };
        if has < header_bytes {
            return Err(cut("file header", header_bytes));
        }
        check_machine(image)?;
        let word = |at| u64::from(u16_at(image, at).unwrap_or(0));
        let dword = |at| u64::from(u32_at(image, at).unwrap_or(0));
        let qword = |at| u64_at(image, at).unwrap_or(0);
        let (entry, table, size, count) = if wide {
            (qword(0x18), qword(0x20), word(0x36), word(0x38))
        } else {
            (dword(0x18), dword(0x1c), word(0x2a), word(0x2c))
        };
        if size != if wide { 56 } else { 32 } {
            return Err(bad("e_phentsize", size));
        }
        if count == 0 || count > MAX_PROGRAM_HEADERS {
            return Err(bad("e_phnum", count));
        }
        let end = table.checked_add(size * count).ok_or(bad("e_phoff", table))?;
        if end > has {
            return Err(cut("program header table", end));
        }
        let programs = (0..count).map(|i| program(image, table + i * size, wide)).collect();
        Ok(Self { image, entry, programs })
    }

    /// Claims and puts every loadable segment at its physical address. Gives the first byte after them.
    pub(super) fn load(&self, kind: ImageKind, place: &mut Placement<'a, '_>) -> Result<u64, BootError> {
        let mut top = 0;
        for program in self.programs.iter().filter(|p| p.kind == PT_LOAD && p.memsz != 0) {
            if program.filesz > program.memsz {
                return Err(BootError::BadField { kind, what: "p_filesz beyond p_memsz", value: program.filesz });
            }
            let bytes = self.contents(kind, program, "segment")?;
            place.claim("the kernel", program.paddr, program.memsz)?;
            place.put("the kernel", program.paddr, bytes);
            top = top.max(program.paddr.saturating_add(program.memsz));
        }
        if top == 0 {
            return Err(BootError::BadField { kind, what: "the number of loadable segments", value: 0 });
        }
        Ok(top)
    }

    /// The physical address of a virtual one, by the segment that holds it.
    pub(super) fn physical(&self, gva: u64) -> Option<u64> {
        self.programs.iter().filter(|p| p.kind == PT_LOAD).find_map(|p| {
            let offset = gva.checked_sub(p.vaddr)?;
            (offset < p.memsz).then(|| p.paddr.wrapping_add(offset))
        })
    }

    fn contents(&self, kind: ImageKind, program: &Program, what: &'static str) -> Result<&'a [u8], BootError> {
        range(self.image, program.offset, program.filesz).ok_or(BootError::Truncated {
            kind,
            what,
            needs: program.offset.saturating_add(program.filesz),
            has: self.image.len() as u64,
        })
    }

    /// The 32-bit entry that the PVH note names.
    fn pvh_entry(&self) -> Result<u32, BootError> {
        for program in self.programs.iter().filter(|p| p.kind == PT_NOTE) {
            let notes = self.contents(KIND, program, "note segment")?;
            let align = if program.align == 8 { 8 } else { 4 };
            if let Some(entry) = find_note(notes, align) {
                return u32::try_from(entry).map_err(|_| bad("the PVH entry", entry));
            }
        }
        Err(BootError::NoPvhNote)
    }
}

fn program(image: &[u8], at: u64, wide: bool) -> Program {
    let dword = |offset| u32_at(image, at + offset).unwrap_or(0);
    let qword = |offset| u64_at(image, at + offset).unwrap_or(0);
    let kind = dword(0);
    if wide {
        let (offset, vaddr, paddr, filesz) = (qword(8), qword(16), qword(24), qword(32));
        Program { kind, offset, vaddr, paddr, filesz, memsz: qword(40), align: qword(48) }
    } else {
        let field = |offset| u64::from(dword(offset));
        let (offset, vaddr, paddr, filesz) = (field(4), field(8), field(12), field(16));
        Program { kind, offset, vaddr, paddr, filesz, memsz: field(20), align: field(28) }
    }
}

/// Refuses big-endian files and other processors by name.
fn check_machine(image: &[u8]) -> Result<(), BootError> {
    let wrong = |machine: String| Err(BootError::WrongArchitecture { machine });
    let little = u8_at(image, 5) == Some(1);
    let raw = u16_at(image, 18).unwrap_or(0);
    let machine = if little { raw } else { raw.swap_bytes() };
    match machine {
        EM_386 | EM_X86_64 if little => Ok(()),
        2 | 43 => wrong("sparc".into()),
        8 => wrong("mips".into()),
        20 | 21 => wrong("powerpc".into()),
        22 => wrong("s390".into()),
        40 => wrong("arm".into()),
        183 => wrong("aarch64".into()),
        243 => wrong("riscv".into()),
        258 => wrong("loongarch".into()),
        other => wrong(format!("an unknown processor (ELF machine {other})")),
    }
}

/// Looks through a note segment for Xen's entry note. Stops at the first damaged note.
fn find_note(notes: &[u8], align: u64) -> Option<u64> {
    let mut at = 0u64;
    loop {
        let name_len = u64::from(u32_at(notes, at)?);
        let desc_len = u64::from(u32_at(notes, at + 4)?);
        let kind = u32_at(notes, at + 8)?;
        let name = at + 12;
        let desc = align_up(name + name_len, align)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && range(notes, name, name_len)? == b"Xen\0" {
            return match desc_len {
                8 => u64_at(notes, desc),
                _ => u32_at(notes, desc).map(u64::from),
            };
        }
        at = align_up(desc + desc_len, align)?;
    }
}

pub(super) fn plan<'a>(request: &BootRequest<'a>) -> Result<BootPlan<'a>, BootError> {
    let elf = Elf::parse(request.kernel)?;
    let entry = elf.pvh_entry()?;
    let mut place = Placement::new(request.map);
    elf.load(KIND, &mut place)?;
    let initrd = match request.initrd {
        Some(bytes) => {
            let len = bytes.len() as u64;
            let padded = align_up(len, PAGE_SIZE).unwrap_or(len);
            let at = place.highest("the initrd", padded, PAGE_SIZE, FOUR_GIB)?;
            place.put("the initrd", at, bytes);
            Some((at, len))
        }
        None => None,
    };
    let gdt = place.put_low("the boot GDT", entry_state::gdt(false))?;
    let mut line = request.command_line.as_bytes().to_vec();
    line.push(0);
    let line_at = place.put_low("the command line", line)?;
    let info = start_info(&mut place, line_at, initrd, request.rsdp.raw())?;
    let mut state = entry_state::protected32(entry, gdt);
    state.gpr[reg::RBX] = info;
    Ok(BootPlan { kind: Some(KIND), pieces: place.into_pieces(), state: Box::new(state) })
}

/// `hvm_start_info`, its module list and its memory map, in one page.
fn start_info(
    place: &mut Placement<'_, '_>,
    line_at: u64,
    initrd: Option<(u64, u64)>,
    rsdp: u64,
) -> Result<u64, BootError> {
    let page_at = place.lowest("the start info", PAGE_SIZE, PAGE_SIZE, 0, HIGH_MEMORY)?;
    let mut page = vec![0; PAGE_SIZE as usize];
    let modules = START_INFO_BYTES.next_multiple_of(16);
    let memory_map = modules + 32;
    put(&mut page, 0, START_MAGIC.to_le_bytes());
    put(&mut page, 4, 1u32.to_le_bytes());
    if let Some((at, len)) = initrd {
        put(&mut page, 12, 1u32.to_le_bytes());
        put(&mut page, 16, (page_at + modules as u64).to_le_bytes());
        put(&mut page, modules, at.to_le_bytes());
        put(&mut page, modules + 8, len.to_le_bytes());
    }
    put(&mut page, 24, line_at.to_le_bytes());
    put(&mut page, 32, rsdp.to_le_bytes());
    put(&mut page, 40, (page_at + memory_map as u64).to_le_bytes());
    let mut count = 0u32;
    for (start, len, kind) in place.e820() {
        let entry = memory_map + count as usize * 24;
        put(&mut page, entry, start.to_le_bytes());
        put(&mut page, entry + 8, len.to_le_bytes());
        put(&mut page, entry + 16, (kind as u32).to_le_bytes());
        count += 1;
    }
    put(&mut page, 48, count.to_le_bytes());
    place.put("the start info", page_at, page);
    Ok(page_at)
}

#[cfg(test)]
mod tests {
    use super::super::synthetic::{self, piece};
    use super::*;
    use crate::memory_map::MemoryMap;

    #[test]
    fn pvh_start_info_describes_module_memory_and_rsdp() {
        let image = synthetic::pvh_elf(true);
        let initrd = vec![9; 4097];
        let map = MemoryMap::of_ram(&[(0, 64 << 20)]);
        let request = BootRequest { initrd: Some(&initrd), ..synthetic::request(&image, &map) };
        let plan = super::plan(&request).unwrap();
        let info = piece(&plan, "the start info");
        let at = |offset| u64_at(&info.bytes, offset).unwrap();
        assert_eq!(plan.state.gpr[reg::RBX], info.gpa.raw());
        assert_eq!(u32_at(&info.bytes, 0), Some(0x336e_c578));
        assert_eq!(at(32), request.rsdp.raw());
        let module = at(16) - info.gpa.raw();
        assert_eq!(at(module), piece(&plan, "the initrd").gpa.raw());
        assert_eq!(at(module + 8), 4097);
        let first = at(40) - info.gpa.raw();
        assert_eq!((at(first), at(first + 8)), (0, crate::memory_map::CONVENTIONAL_END));
        assert_eq!(u32_at(&info.bytes, 48), Some(map.entries().len() as u32));
        assert_eq!(plan.state.rip, 0x10_0040);
        assert!(plan.state.cr0.pe() && !plan.state.cr0.pg());
    }

    #[test]
    fn both_classes_are_read() {
        let map = MemoryMap::of_ram(&[(0, 64 << 20)]);
        for wide in [false, true] {
            let image = synthetic::pvh_elf(wide);
            let plan = super::plan(&synthetic::request(&image, &map)).unwrap();
            assert_eq!(piece(&plan, "the kernel").gpa.raw(), 0x10_0000);
        }
    }

    #[test]
    fn elf_without_the_note_says_what_to_do() {
        let mut image = synthetic::pvh_elf(true);
        let note = image.windows(4).position(|w| w == b"Xen\0").unwrap();
        image[note] = b'Y';
        let map = MemoryMap::of_ram(&[(0, 64 << 20)]);
        let error = super::plan(&synthetic::request(&image, &map)).unwrap_err();
        assert_eq!(error, BootError::NoPvhNote);
        assert!(error.to_string().contains("CONFIG_PVH"));
    }
}
