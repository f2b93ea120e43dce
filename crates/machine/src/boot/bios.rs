//! What a BIOS leaves behind for a kernel that goes back to real mode: interrupt vectors whose handlers
//! acknowledge their interrupt, and a running system timer. There are no BIOS calls.

use super::Piece;
use std::borrow::Cow;
use umbra_arch::Gpa;

const SEGMENT: u16 = 0xf000;
const TICK: u16 = 0xfea5;
const MASTER: u16 = 0xfee0;
const SLAVE: u16 = 0xfef0;
const RETURN: u16 = 0xff53;

/// Counts the ticks in the BIOS data area (0:046Ch) and acknowledges.
const TICK_CODE: &[u8] = &[
    0x50, 0x1e, // push ax; push ds
    0x31, 0xc0, 0x8e, 0xd8, // xor ax, ax; mov ds, ax
    0x66, 0xff, 0x06, 0x6c, 0x04, // inc dword [046Ch]
    0xb0, 0x20, 0xe6, 0x20, // mov al, 20h; out 20h, al
    0x1f, 0x58, 0xcf, // pop ds; pop ax; iret
];
/// push ax; mov al, 20h; out 20h, al; pop ax; iret
const MASTER_CODE: &[u8] = &[0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf];
/// The same with out A0h, al before it.
const SLAVE_CODE: &[u8] = &[0x50, 0xb0, 0x20, 0xe6, 0xa0, 0xe6, 0x20, 0x58, 0xcf];
const RETURN_CODE: &[u8] = &[0xcf];

/// Port writes: the 8259s at vectors 8 and 70h with only timer, keyboard and cascade open, then the system
/// timer (channel 0, square wave, 65536: 18.2 Hz).
pub(crate) const PORT_WRITES: [(u16, u8); 13] = [
    (0x20, 0x11),
    (0xa0, 0x11),
    (0x21, 0x08),
    (0xa1, 0x70),
    (0x21, 0x04),
    (0xa1, 0x02),
    (0x21, 0x01),
    (0xa1, 0x01),
    (0x21, 0xf8),
    (0xa1, 0xff),
    (0x43, 0x36),
    (0x40, 0),
    (0x40, 0),
];

/// The handler of real-mode interrupt `n`, with the 8259s at vectors 8 and 70h.
const fn handler(n: usize) -> u16 {
    match n {
        8 => TICK,
        9..=0xf => MASTER,
        0x70..=0x77 => SLAVE,
        _ => RETURN,
    }
}

/// The vectors and their handlers.
pub(crate) fn pieces() -> Vec<Piece<'static>> {
    let mut vectors = Vec::with_capacity(1024);
    for n in 0..256 {
        vectors.extend_from_slice(&handler(n).to_le_bytes());
        vectors.extend_from_slice(&SEGMENT.to_le_bytes());
    }
    let code = |at: u16, bytes: &'static [u8]| Piece {
        what: "a BIOS interrupt handler",
        gpa: Gpa::new(u64::from(SEGMENT) * 16 + u64::from(at)),
        bytes: Cow::Borrowed(bytes),
    };
    vec![
        Piece { what: "the real-mode interrupt vectors", gpa: Gpa::new(0), bytes: Cow::Owned(vectors) },
        code(TICK, TICK_CODE),
        code(MASTER, MASTER_CODE),
        code(SLAVE, SLAVE_CODE),
        code(RETURN, RETURN_CODE),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vector_points_at_code_that_returns() {
        let pieces = pieces();
        let vectors = &pieces[0].bytes;
        assert_eq!(vectors.len(), 1024);
        for vector in vectors.chunks(4) {
            let offset = u64::from(u16::from_le_bytes([vector[0], vector[1]]));
            let segment = u64::from(u16::from_le_bytes([vector[2], vector[3]]));
            let code = pieces.iter().find(|piece| piece.gpa.raw() == segment * 16 + offset).unwrap();
            assert_eq!(code.bytes.last(), Some(&0xcf));
        }
    }

    #[test]
    fn handlers_do_not_overlap() {
        let mut ranges: Vec<_> =
            pieces().iter().map(|piece| (piece.gpa.raw(), piece.gpa.raw() + piece.bytes.len() as u64)).collect();
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0));
    }
}
