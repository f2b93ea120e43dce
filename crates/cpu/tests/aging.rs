//! Code that runs once doesn't stay decoded, and code that runs on does what it did.

mod bus;
mod long_mode;

use long_mode::{DATA, Guest};

/// Blocks of code that run once each.
const CALLS: u64 = 20_000;
/// `inc rax; ret`.
const INCREMENT: u64 = 0x11_0000;

#[test]
fn blocks_that_ran_once_are_dropped() {
    let mut guest = Guest::new();
    guest.write(INCREMENT, &[0x48, 0xff, 0xc0, 0xc3]);
    let call = |n: u64| {
        let next = DATA + 5 * (n + 1);
        [&[0xe8][..], &(INCREMENT.wrapping_sub(next) as u32).to_le_bytes()].concat()
    };
    guest.write(DATA, &(0..CALLS).flat_map(call).collect::<Vec<_>>());
    guest.write(DATA + 5 * CALLS, &[0xc3]);
    for round in 1..=3 {
        let before = guest.retired();
        guest.run_bytes(&[0xbf, 0, 0, 0x20, 0, 0xff, 0xd7]);
        assert_eq!(guest.s.gpr[0], round * CALLS);
        assert_eq!(guest.retired() - before, 3 * CALLS + 4);
        assert!(guest.blocks() < 10_000, "{} blocks", guest.blocks());
    }
}
