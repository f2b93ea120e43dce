//! Events and IRETD outside IA-32e mode, first with nothing known of the segments and then with all of it: the quick way
//! comes to what the long one did.

mod bus;
mod protected;

use protected::{CODE, CODE_A, DATA, GDT, Guest, HANDLERS, IDT, STACK_A};
use umbra_arch::CpuState;
use umbra_arch::rflags::{AC, AF, CF, DF, FIXED, ID, IF, IOPL, NT, OF, PF, RF, SF, ZF};
use umbra_arch::segment::{Attr, Seg};

/// UD2 is skipped by its handler.
const SKIPPED: [u8; 3] = [0x0f, 0x0b, 0xf4];
/// A load of a selector beyond the GDT, whose handler drops its error code, likewise.
const SKIPPED_WITH_CODE: [u8; 5] = [0x8e, 0xd8, 0x90, 0x90, 0xf4];
/// INT 40h.
const CALLED: [u8; 3] = [0xcd, 0x40, 0xf4];

/// Where a run ended, and what it left below the stack pointer.
type End = (Option<u8>, CpuState, Vec<u32>);

fn guest() -> Guest {
    let g = Guest::new();
    g.write(HANDLERS + 16 * 6, &[0x83, 0x04, 0x24, 2, 0xcf]);
    g.write(HANDLERS + 16 * 13, &[0x83, 0xc4, 4, 0x83, 0x04, 0x24, 2, 0xcf]);
    g.write(HANDLERS + 16 * 0x40, &[0xcf]);
    g
}

fn gate(g: &Guest, vector: u64, kind: u64) {
    let handler = HANDLERS + 16 * vector;
    g.write(IDT + 8 * vector, &(handler & 0xffff | u64::from(CODE) << 16 | kind << 40).to_le_bytes());
}

fn run(g: &mut Guest, code: &[u8]) -> End {
    g.write(STACK_A - 64, &[0x55; 64]);
    let vector = g.run_a(code);
    let below = (1..16).map(|n| g.u32(STACK_A - 4 * n)).collect();
    (vector, g.s.clone(), below)
}

/// Runs `code` twice with the state that `g` has: once with nothing known, once with all.
fn twice(mut g: Guest, code: &[u8]) -> End {
    let before = g.s.clone();
    let first = run(&mut g, code);
    g.s = before;
    let second = run(&mut g, code);
    assert_eq!(second.0, first.0);
    assert_eq!(second.2, first.2, "the frame");
    assert!(second.1 == first.1, "{:#x?}\n{:#x?}", second.1, first.1);
    first
}

#[test]
fn what_is_known_changes_no_flag_and_no_frame() {
    let flags = [0, CF | PF | AF, ZF | SF | OF, IF, DF | ID, AC, NT, IOPL | IF, RF, CF | ZF | IF | RF | AC];
    for value in flags {
        for kind in [0x8e, 0x8f, 0xee, 0x0e] {
            for (vector, code) in [(6, &SKIPPED[..]), (13, &SKIPPED_WITH_CODE), (0x40, &CALLED)] {
                let mut g = guest();
                gate(&g, vector, kind);
                g.s.rflags = value | FIXED;
                g.s.gpr[0] = 0x38;
                let (ended, after, below) = twice(g, code);
                if kind & 0x80 == 0 {
                    continue;
                }
                assert_eq!((ended, after.rip), (None, CODE_A + code.len() as u64), "{value:#x} {kind:#x} {vector}");
                assert_eq!(after.rflags, value & !RF | FIXED, "IRETD brings back what the handler was entered with");
                let pushed = if vector == 0x40 { value & RF } else { RF };
                assert_eq!(u64::from(below[0]), value & !RF | FIXED | pushed);
            }
        }
    }
}

#[test]
fn stacks_that_are_not_flat_are_not_taken_for_such() {
    let limited = (0x93 | 0x4000, 0x2_ffff);
    let of_16_bits = (0x93, 0xffff_ffff);
    let down = (0x97 | 0x4000, 0xffff);
    for ((attr, limit), esp) in [(limited, STACK_A), (of_16_bits, 0xff00), (down, STACK_A)] {
        let mut g = guest();
        let ss = &mut g.s.seg[Seg::Ss as usize];
        (ss.attr, ss.limit) = (Attr(attr), limit);
        g.s.gpr[4] = esp;
        let (ended, after, _) = twice(g, &SKIPPED);
        assert_eq!((ended, after.rip, after.gpr[4]), (None, CODE_A + 3, esp), "{attr:#x} {limit:#x}");
    }
}

#[test]
fn a_handler_in_another_segment_is_entered_there() {
    const OTHER: u16 = 0x30;
    let mut g = guest();
    g.s.gdtr.limit = 0x37;
    g.descriptor(OTHER, 0x00cf_9b00_0000_ffff);
    let raw = (HANDLERS + 16 * 6) & 0xffff | u64::from(OTHER) << 16 | 0x8e << 40;
    g.write(IDT + 8 * 6, &raw.to_le_bytes());
    let (ended, after, below) = twice(g, &SKIPPED);
    assert_eq!((ended, after.rip, after.segment(Seg::Cs).selector), (None, CODE_A + 3, CODE));
    assert_eq!(below[1], CODE.into());
    assert_eq!(after.segment(Seg::Ss).selector, DATA);
}

#[test]
fn a_descriptor_that_has_changed_is_looked_at_again() {
    let mut g = guest();
    let before = g.s.clone();
    assert_eq!(run(&mut g, &SKIPPED).0, None);
    g.s = before;
    g.descriptor(CODE, 0x00cf_9300_0000_ffff);
    // No handler can be entered with that, not even a double fault's.
    let halted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&mut g, &SKIPPED)));
    assert!(halted.is_err(), "the guest shuts down instead of coming to HLT");
}

/// Runs UD2 with a guest that knows the way already and is changed then: it must come to what a new guest so changed comes to.
fn known_and_changed(change: impl Fn(&mut Guest)) -> End {
    let (mut known, mut fresh) = (guest(), guest());
    let before = known.s.clone();
    for _ in 0..2 {
        run(&mut known, &SKIPPED);
        known.s = before.clone();
    }
    change(&mut known);
    change(&mut fresh);
    let end = run(&mut fresh, &SKIPPED);
    assert!(run(&mut known, &SKIPPED) == end);
    end
}

#[test]
fn a_gate_that_has_changed_is_looked_at_again() {
    for kind in [0x8e, 0x8f, 0xee] {
        let (ended, after, _) = known_and_changed(|g| gate(g, 6, kind));
        assert_eq!((ended, after.rip), (None, CODE_A + 3), "{kind:#x}");
    }
    assert_eq!(known_and_changed(|g| gate(g, 6, 0x0e)).0, Some(11));
    // Of 16 bits: the stack has another form.
    let (_, after, below) = known_and_changed(|g| {
        gate(g, 6, 0x86);
        g.write(HANDLERS + 16 * 6, &[0xf4]);
    });
    assert_eq!((after.gpr[4], below[0] & 0xffff), (STACK_A - 6, CODE.into()));
    let elsewhere = known_and_changed(|g| g.write(IDT + 8 * 6, &((HANDLERS + 16 * 7) as u16).to_le_bytes()));
    assert_eq!(elsewhere.0, Some(7));
}

#[test]
fn the_handlers_segment_is_what_its_descriptor_says_now() {
    // AVL, another limit, conforming.
    for raw in [0x00df_9b00_0000_ffff, 0x00c1_9b00_0000_ffff, 0x00cf_9f00_0000_ffff] {
        let (ended, after, _) = known_and_changed(|g| g.descriptor(CODE, raw));
        assert_eq!((ended, after.rip), (None, CODE_A + 3));
        let cs = after.segment(Seg::Cs);
        assert_eq!(u64::from(cs.attr.0), raw >> 40 & 0xf0ff, "IRETD loads it, too");
    }
}

#[test]
fn iretd_sees_what_the_handler_did_to_the_descriptor() {
    let (ended, after, _) = known_and_changed(|g| {
        // MOV byte [descriptor + 6], DFh; ADD dword [ESP], 2; IRETD.
        let [low, high, ..] = (GDT as u16 + CODE + 6).to_le_bytes();
        g.write(HANDLERS + 16 * 6, &[0xc6, 0x05, low, high, 0, 0, 0xdf, 0x83, 0x04, 0x24, 2, 0xcf]);
    });
    assert_eq!((ended, after.rip), (None, CODE_A + 3));
    assert_eq!(after.segment(Seg::Cs).attr.0 >> 12 & 1, 1, "AVL");
}

/// IRETD with these flags to what follows it; then INT3, whose frame shows the RF that it found.
fn rf_after(popped: u64, then: &[u8]) -> bool {
    let mut g = guest();
    // PUSH flags; PUSH CS; CALL next: IRETD from behind its POP.
    let mut code = vec![0x68];
    code.extend((popped as u32).to_le_bytes());
    code.extend([0x0e, 0x68]);
    let target = CODE_A as u32 + 12;
    code.extend(target.to_le_bytes());
    code.push(0xcf);
    code.extend(then);
    code.push(0xcc);
    let (ended, _, below) = twice_from(&mut g, &code);
    assert_eq!(ended, Some(3));
    u64::from(below[0]) & RF != 0
}

fn twice_from(g: &mut Guest, code: &[u8]) -> End {
    let before = g.s.clone();
    let first = run(g, code);
    g.s = before;
    assert!(run(g, code) == first);
    first
}

#[test]
fn rf_lasts_for_one_instruction() {
    assert!(!rf_after(FIXED, &[]));
    assert!(rf_after(FIXED | RF, &[]));
    assert!(!rf_after(FIXED | RF, &[0x90]));
    // These end their block, the second one with a shadow: behind them RF is gone as well.
    assert!(!rf_after(FIXED | RF, &[0x0f, 0x22, 0xd8]));
    assert!(!rf_after(FIXED | RF, &[0xfb, 0xfa]));
    assert!(!rf_after(FIXED | RF, &[0xeb, 0x00]));
}
