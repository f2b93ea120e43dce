//! Small images made for tests, one for each protocol.

use super::bytes::put;
use super::{BootPlan, BootRequest, Piece};
use crate::memory_map::MemoryMap;
use umbra_arch::Gpa;

/// A request with a command line and an RSDP.
pub(super) fn request<'a>(kernel: &'a [u8], map: &'a MemoryMap) -> BootRequest<'a> {
    BootRequest { kernel, initrd: None, command_line: "console=tty", map, rsdp: Gpa::new(0xe_0000) }
}

/// The one piece of this name.
pub(super) fn piece<'p, 'a>(plan: &'p BootPlan<'a>, what: &str) -> &'p Piece<'a> {
    plan.pieces.iter().find(|piece| piece.what == what).unwrap_or_else(|| panic!("no piece {what}"))
}

/// A bzImage of protocol 2.15 with one setup sector and `kernel_bytes` of kernel, preferring 16 MiB.
pub(super) fn bzimage(kernel_bytes: usize) -> Vec<u8> {
    let mut image = vec![0x90; 1024 + kernel_bytes];
    image[..1024].fill(0);
    image[0x1f1] = 1;
    put(&mut image, 0x1f4, (kernel_bytes as u32 / 16).to_le_bytes());
    put(&mut image, 0x1fe, [0x55, 0xaa, 0xeb, 0x6a]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    put(&mut image, 0x206, 0x20fu16.to_le_bytes());
    image[0x211] = 1;
    put(&mut image, 0x22c, 0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x230, 0x20_0000u32.to_le_bytes());
    image[0x234] = 1;
    put(&mut image, 0x236, 1u16.to_le_bytes());
    put(&mut image, 0x238, 2047u32.to_le_bytes());
    put(&mut image, 0x258, 0x100_0000u64.to_le_bytes());
    put(&mut image, 0x260, 0x10_0000u32.to_le_bytes());
    image
}

/// An ELF file with one segment at 1 MiB and a PVH note naming 100040h.
pub(super) fn pvh_elf(wide: bool) -> Vec<u8> {
    let mut image = vec![0; 0x200];
    image[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', if wide { 2 } else { 1 }, 1, 1]);
    put(&mut image, 16, 2u16.to_le_bytes());
    put(&mut image, 18, (if wide { 62u16 } else { 3 }).to_le_bytes());
    let (load, note) = ([0x100u64, 0x10_0000, 0x40, 0x1000, 0x1000], [0x140u64, 0, 24, 24, 4]);
    if wide {
        put(&mut image, 0x20, 64u64.to_le_bytes());
        put(&mut image, 0x36, [56, 0, 2, 0]);
        for (index, (kind, p)) in [(1u32, load), (4, note)].into_iter().enumerate() {
            let at = 64 + index * 56;
            put(&mut image, at, kind.to_le_bytes());
            for (offset, value) in [(8, p[0]), (16, p[1]), (24, p[1]), (32, p[2]), (40, p[3]), (48, p[4])] {
                put(&mut image, at + offset, value.to_le_bytes());
            }
        }
    } else {
        put(&mut image, 0x1c, 52u32.to_le_bytes());
        put(&mut image, 0x2a, [32, 0, 2, 0]);
        for (index, (kind, p)) in [(1u32, load), (4, note)].into_iter().enumerate() {
            let at = 52 + index * 32;
            put(&mut image, at, kind.to_le_bytes());
            for (offset, value) in [(4, p[0]), (8, p[1]), (12, p[1]), (16, p[2]), (20, p[3]), (28, p[4])] {
                put(&mut image, at + offset, (value as u32).to_le_bytes());
            }
        }
    }
    for (offset, value) in [(0x140, 4u32), (0x144, 8), (0x148, 18), (0x150, 0x10_0040)] {
        put(&mut image, offset, value.to_le_bytes());
    }
    image[0x14c..0x150].copy_from_slice(b"Xen\0");
    image
}

/// A Multiboot image with address fields, loaded whole at `load` with `bss` bytes in all.
pub(super) fn multiboot(load: u32, len: usize, bss: u32) -> Vec<u8> {
    let mut image = vec![0xf4; len];
    let flags = 0x1_0003u32;
    let checksum = 0u32.wrapping_sub(0x1bad_b002u32.wrapping_add(flags));
    let bss_end = if bss == 0 { 0 } else { load + bss };
    let fields = [0x1bad_b002, flags, checksum, load, load, 0, bss_end, load + 0x20];
    for (index, field) in fields.into_iter().enumerate() {
        put(&mut image, index * 4, field.to_le_bytes());
    }
    image
}

/// A 32-bit ELF file with a Multiboot header without address fields in its one segment.
pub(super) fn multiboot_elf() -> Vec<u8> {
    let mut image = pvh_elf(false);
    let flags = 3u32;
    for (index, field) in [0x1bad_b002, flags, 0u32.wrapping_sub(0x1bad_b002 + flags)].into_iter().enumerate() {
        put(&mut image, 0x100 + index * 4, field.to_le_bytes());
    }
    put(&mut image, 0x18, 0x10_0020u32.to_le_bytes());
    image
}
