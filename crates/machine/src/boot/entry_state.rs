//! CPU states that the boot protocols prescribe.

use umbra_arch::control::{Cr0, Cr3, Cr4, Efer};
use umbra_arch::segment::{Attr, Seg, Segment, TableRegister};
use umbra_arch::{CpuState, PAGE_SIZE};

/// __BOOT_CS and __BOOT_DS of the Linux/x86 boot protocol; any flat pair suits the others.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Bytes of the identity tables: PML4, PDPT and a page directory for each of 4 GiB.
pub(super) const IDENTITY_TABLES_BYTES: u64 = 6 * PAGE_SIZE;

/// Present, writable, accessed, dirty.
const TABLE: u64 = 0x23;
const LARGE_PAGE: u64 = 0xe3;

/// Tables that map the first 4 GiB to themselves with 2 MiB pages, to lie at `gpa`.
pub(super) fn identity_tables(gpa: u64) -> Vec<u8> {
    let mut entries = vec![0u64; (IDENTITY_TABLES_BYTES / 8) as usize];
    entries[0] = (gpa + PAGE_SIZE) | TABLE;
    for gib in 0..4usize {
        entries[512 + gib] = (gpa + (2 + gib as u64) * PAGE_SIZE) | TABLE;
    }
    for (index, entry) in entries[1024..].iter_mut().enumerate() {
        *entry = (index as u64) << 21 | LARGE_PAGE;
    }
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// A descriptor for a flat segment with `attr` as [`Attr`] keeps it.
const fn flat_descriptor(attr: u64) -> u64 {
    0x000f_0000_0000_ffff | (attr & 0xf0ff) << 40
}

/// A GDT with 64-bit or 32-bit code at 10h, data at 18h and a busy TSS at 20h.
pub(super) fn gdt(long: bool) -> Vec<u8> {
    let code = if long { 0xa09b } else { 0xc09b };
    let tss = 0x0000_8b00_0000_0067;
    [0, 0, flat_descriptor(code), flat_descriptor(0xc093), tss, 0].iter().flat_map(|d: &u64| d.to_le_bytes()).collect()
}

/// Protected mode, paging off, flat 32-bit segments, interrupts off (PVH and Multiboot).
pub(super) fn protected32(entry: u32, gdt: u64) -> CpuState {
    let mut state = with_segments(Segment::flat_code32(CODE, 0), gdt, false);
    state.rip = u64::from(entry);
    state.cr0 = Cr0::new(Cr0::PE | Cr0::ET);
    state
}

/// 64-bit mode on identity tables, interrupts off ("64-bit Boot Protocol").
pub(super) fn long64(entry: u64, gdt: u64, tables: u64) -> CpuState {
    let mut state = with_segments(Segment::code64(CODE, 0), gdt, true);
    state.rip = entry;
    state.cr0 = Cr0::new(Cr0::PE | Cr0::ET | Cr0::PG);
    state.cr3 = Cr3::new(tables);
    state.cr4 = Cr4::new(Cr4::PAE);
    state.efer = Efer::new(Efer::LME | Efer::LMA);
    state
}

fn with_segments(code: Segment, gdt_at: u64, long: bool) -> CpuState {
    let mut state = CpuState::reset();
    let data = Segment::flat_data(DATA, 0);
    for seg in Seg::USER {
        state.seg[seg as usize] = data;
    }
    state.seg[Seg::Cs as usize] = code;
    state.seg[Seg::Ldtr as usize] = Segment::null(0);
    state.seg[Seg::Tr as usize] = Segment { base: 0, limit: 0x67, attr: Attr(0x8b), selector: TASK };
    state.gdtr = TableRegister { base: gdt_at, limit: gdt(long).len() as u16 - 1 };
    state.idtr = TableRegister { base: 0, limit: 0 };
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_tables_map_every_2_mib_to_itself() {
        let at = 0x5000;
        let bytes = identity_tables(at);
        let entry = |gpa: u64| {
            let offset = (gpa - at) as usize;
            u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
        };
        for gva in [0u64, 0x1f_ffff, 0x20_0000, 0x1234_5678, 0xffff_ffff] {
            let pml4e = entry(at + (gva >> 39) * 8);
            let pdpte = entry((pml4e & !0xfff) + (gva >> 30 & 511) * 8);
            let pde = entry((pdpte & !0xfff) + (gva >> 21 & 511) * 8);
            assert_eq!(pde & 0x80, 0x80);
            assert_eq!((pde & !0x1f_ffff) + (gva & 0x1f_ffff), gva);
        }
    }

    #[test]
    fn gdt_agrees_with_the_cached_segments() {
        for (long, state) in [(true, long64(0, 0x1000, 0x2000)), (false, protected32(0, 0x1000))] {
            let table = gdt(long);
            for seg in [Seg::Cs, Seg::Ds] {
                let cached = state.segment(seg);
                let offset = cached.selector as usize;
                let raw = u64::from_le_bytes(table[offset..offset + 8].try_into().unwrap());
                assert_eq!((raw >> 40 & 0xf0ff) as u32, cached.attr.0, "{seg:?}");
                assert_eq!(raw & 0xffff, 0xffff);
                assert_eq!(raw >> 48 & 0xf, 0xf);
            }
        }
    }
}
