//! Hostile kernels: planning a boot never panics, and what it plans stays inside guest RAM.

use umbra_arch::Gpa;
use umbra_machine::boot::{BootRequest, plan};
use umbra_machine::{guest_memory, map_of};

const RAM: u64 = 64 << 20;

/// The property. Byte 0: how much of the input is the initial RAM disk; the rest is the kernel file.
pub fn boot_images(data: &[u8]) {
    let [split, rest @ ..] = data else { return };
    let (initrd, kernel) = rest.split_at(usize::from(*split).min(rest.len()));
    let memory = guest_memory(RAM).expect("64 MiB of RAM");
    let map = map_of(&memory);
    let request = BootRequest {
        kernel,
        initrd: (!initrd.is_empty()).then_some(initrd),
        command_line: "console=ttyS0",
        map: &map,
        rsdp: Gpa::new(0xe_0000),
    };
    if let Ok(plan) = plan(&request) {
        for piece in &plan.pieces {
            let end = piece.gpa.raw().checked_add(piece.bytes.len() as u64);
            assert!(end.is_some_and(|end| end <= RAM), "a piece at {} reaches outside RAM", piece.gpa);
        }
    }
}
