//! Umbra's own firmware: what the CPU executes first, assembled in Rust.
//!
//! The image occupies the 64 KiB below 4 GiB. It makes the machine presentable to a real-mode guest
//! (interrupt vectors, BIOS data area, A20, the power-management ports) and starts the guest that the
//! machine has put at [`EMBEDDED_LOAD`]. It offers no BIOS services.
#![forbid(unsafe_code)]

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use umbra_arch::Gpa;

/// Where the machine puts the embedded guest or test ROM; it starts in real mode at its first byte.
pub const EMBEDDED_LOAD: Gpa = Gpa::new(0x1_0000);
/// CS:IP at which the guest starts, with DS = ES = CS, SS:SP = 0000:7C00h, interrupts off, A20 on.
pub const EMBEDDED_ENTRY: (u16, u16) = (0x1000, 0);
/// Size of the image in bytes; its last byte is at 4 GiB - 1.
pub const IMAGE_SIZE: usize = 0x1_0000;

/// Offset of the first instruction in the image: the CPU starts with CS base FFFF0000h.
const RESET_VECTOR: usize = 0xfff0;
const START: usize = 0xe000;
/// An IRET in RAM that all interrupt vectors point to, so that no alias of the image is needed.
const IRET_AT: u16 = 0x0500;
const EXTENDED_BDA_SEGMENT: u16 = 0x9fc0;
const BASE_MEMORY_KIB: u16 = 639;

/// The image failed to assemble: a defect of this crate.
#[derive(Debug, thiserror::Error)]
#[error("the firmware does not assemble: {0}")]
pub struct FirmwareError(#[from] IcedError);

/// The reset image: [`IMAGE_SIZE`] bytes that end at 4 GiB.
///
/// # Errors
/// None that a caller can cause; see [`FirmwareError`].
pub fn reset_image() -> Result<Vec<u8>, FirmwareError> {
    let mut image = vec![0xff; IMAGE_SIZE];
    let mut place = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    place(START, &start()?);
    let mut vector = CodeAssembler::new(16)?;
    vector.jmp(START as u64)?;
    place(RESET_VECTOR, &vector.assemble(RESET_VECTOR as u64)?);
    // Where PC software looks for the firmware's date and the machine's model byte.
    place(0xfff5, b"01/01/26");
    place(0xfffe, &[0xfc]);
    Ok(image)
}

fn start() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    a.cli()?;
    a.cld()?;
    interrupt_vectors(&mut a)?;
    bios_data_area(&mut a)?;
    chipset(&mut a)?;
    a.mov(ax, u32::from(EMBEDDED_ENTRY.0))?;
    a.mov(ds, ax)?;
    a.mov(es, ax)?;
    a.jmp_far(EMBEDDED_ENTRY.0, u32::from(EMBEDDED_ENTRY.1))?;
    a.assemble(START as u64)
}

/// A stack below 7C00h and 256 vectors to an IRET. Leaves DS = ES = SS = 0.
fn interrupt_vectors(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut next = a.create_label();
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    a.mov(es, ax)?;
    a.mov(ss, ax)?;
    a.mov(sp, 0x7c00u32)?;
    a.xor(di, di)?;
    a.mov(cx, 256u32)?;
    a.set_label(&mut next)?;
    a.mov(ax, u32::from(IRET_AT))?;
    a.stosw()?;
    a.xor(ax, ax)?;
    a.stosw()?;
    a.loop_(next)?;
    a.mov(byte_ptr(u32::from(IRET_AT)), 0xcfu32)
}

/// The words that kernels read to find the end of low memory ("BIOS data area" in PC references).
fn bios_data_area(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(di, 0x400u32)?;
    a.mov(cx, 0x80u32)?;
    a.xor(ax, ax)?;
    a.rep().stosw()?;
    a.mov(word_ptr(0x400u32), 0x3f8u32)?;
    a.mov(word_ptr(0x40eu32), u32::from(EXTENDED_BDA_SEGMENT))?;
    a.mov(word_ptr(0x413u32), u32::from(BASE_MEMORY_KIB))?;
    a.mov(ax, u32::from(EXTENDED_BDA_SEGMENT))?;
    a.mov(es, ax)?;
    // The extended area's first byte is its size in KiB.
    a.mov(byte_ptr(0u32).es(), 1u32)
}

fn chipset(a: &mut CodeAssembler) -> Result<(), IcedError> {
    // Both 8259s masked.
    a.mov(al, 0xffu32)?;
    a.out(0x21u32, al)?;
    a.out(0xa1u32, al)?;
    // A20 on, without pulsing reset (bit 0).
    a.in_(al, 0x92u32)?;
    a.or(al, 2u32)?;
    a.and(al, 0xfeu32)?;
    a.out(0x92u32, al)?;
    // The PIIX4's power-management function, 00:01.3: I/O base 600h, then decode it.
    pci_write(a, 0x8000_0b40, 0x601)?;
    pci_write(a, 0x8000_0b80, 1)
}

fn pci_write(a: &mut CodeAssembler, address: u32, value: u32) -> Result<(), IcedError> {
    a.mov(dx, 0xcf8u32)?;
    a.mov(eax, address)?;
    a.out(dx, eax)?;
    a.mov(dl, 0xfcu32)?;
    a.mov(eax, value)?;
    a.out(dx, eax)
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};

    #[test]
    fn the_reset_vector_reaches_the_guest() {
        let image = reset_image().expect("assembles");
        assert_eq!(image.len(), IMAGE_SIZE);
        let mut decoder = Decoder::with_ip(16, &image[RESET_VECTOR..], RESET_VECTOR as u64, DecoderOptions::NONE);
        let first = decoder.decode();
        assert_eq!((first.mnemonic(), first.near_branch_target()), (Mnemonic::Jmp, START as u64));
        assert!(first.next_ip() <= 0xfff5, "the jump must leave room for the date");
        let far = Decoder::with_ip(16, &image[START..], START as u64, DecoderOptions::NONE)
            .into_iter()
            .find(|i| i.mnemonic() == Mnemonic::Jmp)
            .expect("a far jump");
        assert_eq!((far.far_branch_selector(), far.far_branch16()), EMBEDDED_ENTRY);
        assert_eq!(u64::from(EMBEDDED_ENTRY.0) << 4, EMBEDDED_LOAD.raw());
    }

    #[test]
    fn two_builds_are_the_same() {
        assert_eq!(reset_image().expect("assembles"), reset_image().expect("assembles"));
    }
}
