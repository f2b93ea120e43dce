//! Damaged, foreign and lying images: each is refused with its own message, none panics.

use super::synthetic::{self, request};
use super::{BootError, BootPlan, BootRequest, ImageKind, plan};
use crate::memory_map::MemoryMap;
use proptest::prelude::*;

fn small_ram() -> MemoryMap {
    MemoryMap::of_ram(&[(0, 64 << 20)])
}

fn images() -> Vec<(ImageKind, Vec<u8>)> {
    vec![
        (ImageKind::BzImage, synthetic::bzimage(0x2000)),
        (ImageKind::Elf, synthetic::pvh_elf(true)),
        (ImageKind::Elf, synthetic::pvh_elf(false)),
        (ImageKind::Multiboot1, synthetic::multiboot(0x10_0000, 256, 0x1000)),
        (ImageKind::Multiboot1, synthetic::multiboot_elf()),
    ]
}

/// Pieces lie in usable RAM and don't overlap: what a boot may never get wrong, whatever the file says.
fn assert_sound(plan: &BootPlan<'_>, map: &MemoryMap) {
    let mut ranges: Vec<_> = Vec::new();
    for piece in &plan.pieces {
        assert!(map.is_usable(piece.gpa.raw(), piece.bytes.len() as u64), "{} at {}", piece.what, piece.gpa);
        ranges.push((piece.gpa.raw(), piece.gpa.raw() + piece.bytes.len() as u64));
    }
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|w| w[0].1 <= w[1].0), "{ranges:x?}");
}

#[test]
fn every_synthetic_image_is_recognised_and_boots() {
    let map = small_ram();
    for (kind, image) in images() {
        assert_eq!(ImageKind::of(&image), Some(kind));
        assert_sound(&plan(&request(&image, &map)).unwrap(), &map);
    }
}

#[test]
fn refusals_are_told_apart() {
    let map = small_ram();
    let error = |image: &[u8]| plan(&request(image, &map)).unwrap_err();
    assert_eq!(error(&[]), BootError::Empty);
    assert_eq!(error(b"#!/bin/sh\n"), BootError::Unrecognised);

    let bzimage = synthetic::bzimage(0x2000);
    assert!(matches!(error(&bzimage[..0x220]), BootError::Truncated { what: "setup header", .. }));
    assert!(matches!(error(&bzimage[..0x1000]), BootError::Truncated { what: "kernel", .. }));
    let mut old = bzimage.clone();
    old[0x211] = 0;
    assert!(matches!(error(&old), BootError::NoEntry { .. }));
    old[0x206] = 0x09;
    assert!(error(&old).to_string().contains("2.09"));

    let mut arm = synthetic::pvh_elf(true);
    arm[18] = 183;
    assert!(error(&arm).to_string().contains("aarch64"));
    let mut image = vec![0; 512];
    image[..2].copy_from_slice(b"MZ");
    image[0x38..0x3c].copy_from_slice(b"ARM\x64");
    assert!(error(&image).to_string().contains("aarch64"));
    assert!(matches!(error(&synthetic::pvh_elf(true)[..0x80]), BootError::Truncated { .. }));
    assert!(matches!(error(b"MZ\0\0"), BootError::Truncated { what: "setup header", .. }));
}

#[test]
fn kernel_larger_than_ram_is_refused() {
    let mut image = synthetic::bzimage(0x2000);
    image[0x260..0x264].copy_from_slice(&0x1000_0000u32.to_le_bytes());
    let map = small_ram();
    let error = plan(&request(&image, &map)).unwrap_err();
    assert!(matches!(error, BootError::NoRoom { .. }), "{error}");
}

#[test]
fn a_boot_sector_takes_neither_initrd_nor_command_line() {
    let mut image = vec![0; 512];
    image[510..].copy_from_slice(&[0x55, 0xaa]);
    let map = small_ram();
    let bare = BootRequest { command_line: "", ..request(&image, &map) };
    assert_eq!(plan(&bare).unwrap().state.rip, 0x7c00);
    assert!(matches!(plan(&request(&image, &map)), Err(BootError::NoCommandLineSupport { .. })));
    assert!(matches!(plan(&BootRequest { initrd: Some(&[1]), ..bare }), Err(BootError::NoInitrdSupport { .. })));
}

#[test]
fn every_truncation_is_an_error_or_sound() {
    let map = small_ram();
    for (_, image) in images() {
        for len in 0..image.len().min(0x480) {
            if let Ok(plan) = plan(&request(&image[..len], &map)) {
                assert_sound(&plan, &map);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_headers_never_panic_nor_place_anything_outside_ram(
        which in 0usize..5,
        edits in prop::collection::vec((0usize..0x280, prop_oneof![Just(0u8), Just(0xff), Just(0x80), any::<u8>()]), 1..12),
        initrd_len in prop_oneof![Just(0usize), 1usize..70_000],
        mib in prop_oneof![Just(1u64), Just(2), Just(20), Just(64)],
    ) {
        let (_, mut image) = images().swap_remove(which);
        for (at, value) in edits {
            if let Some(byte) = image.get_mut(at) {
                *byte = value;
            }
        }
        let map = MemoryMap::of_ram(&[(0, mib << 20)]);
        let initrd = vec![0xaa; initrd_len];
        let asked = BootRequest { initrd: (initrd_len != 0).then_some(&initrd[..]), ..request(&image, &map) };
        if let Ok(plan) = plan(&asked) {
            assert_sound(&plan, &map);
        }
    }

    #[test]
    fn extreme_fields_never_panic(which in 0usize..5, at in 0usize..0x270, wide in any::<bool>()) {
        let (_, mut image) = images().swap_remove(which);
        let len = if wide { 8 } else { 4 };
        if at + len <= image.len() {
            image[at..at + len].fill(0xff);
        }
        let map = small_ram();
        if let Ok(plan) = plan(&request(&image, &map)) {
            assert_sound(&plan, &map);
        }
    }
}
