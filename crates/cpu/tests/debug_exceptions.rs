//! Breakpoints, single steps, shadows and alignment checks, against the manual's rules written out.

mod bus;
mod long_mode;
mod protected;

use long_mode::{CODE, DATA, Guest};
use umbra_arch::control::Cr0;
use umbra_arch::fault::vector;
use umbra_arch::rflags;
use umbra_arch::segment::{Attr, Seg, Segment};

const BS: u64 = 1 << 14;
const BD: u64 = 1 << 13;

/// RIP and RFLAGS in the frame of a handler without error code, and its stack pointer.
fn frame(g: &Guest) -> (u64, u64) {
    let at = g.s.gpr[4];
    (u64::from_le_bytes(g.read(at)), u64::from_le_bytes(g.read(at + 16)))
}

/// MOV of 1, 2, 4, 8 bytes between [RBX] and RAX, and its length.
fn mov(bytes: u64, write: bool) -> Vec<u8> {
    let op = if write { 0x88 } else { 0x8a } + u8::from(bytes > 1);
    match bytes {
        2 => vec![0x66, op, 0x03],
        8 => vec![0x48, op, 0x03],
        _ => vec![op, 0x03],
    }
}

#[test]
fn data_breakpoints_hit_exactly_what_overlaps() {
    let mut g = Guest::new();
    let clean = g.s.clone();
    for (kind, len_field, len) in [1u64, 3].into_iter().flat_map(|k| [(k, 0u64, 1u64), (k, 1, 2), (k, 3, 4), (k, 2, 8)])
    {
        for bytes in [1u64, 2, 4, 8] {
            for offset in 0..24u64 {
                for write in [false, true] {
                    g.s = clean.clone();
                    g.s.dr[2] = DATA + 8;
                    g.s.dr7 = 0x400 | 0x10 | (len_field << 2 | kind) << 24;
                    g.s.dr6 = 0xffff_0ff0 | 1;
                    g.s.gpr[3] = DATA + offset;
                    let code = mov(bytes, write);
                    let hit = offset < 8 + len && offset + bytes > 8 && (kind == 3 || write);
                    let what = format!("kind {kind} len {len} bytes {bytes} offset {offset} write {write}");
                    let got = g.run_bytes(&code);
                    assert_eq!(got, hit.then_some(vector::DB), "{what}");
                    if hit {
                        assert_eq!(g.s.dr6, 0xffff_0ff4, "{what}");
                        let (rip, flags) = frame(&g);
                        assert_eq!(rip % 64, code.len() as u64, "a trap: {what}");
                        assert_eq!(flags & rflags::RF, 0);
                    }
                }
            }
        }
    }
}

#[test]
fn instruction_breakpoint_is_a_fault_that_rf_holds_off_once() {
    for rf in [false, true] {
        let mut g = Guest::new();
        g.s.dr[0] = CODE;
        g.s.dr7 = 0x401;
        if rf {
            g.s.rflags |= rflags::RF;
        }
        // A loop back to the breakpoint: with RF it hits the second time.
        g.s.gpr[0] = 0;
        let got = g.run_bytes(&[0x48, 0xff, 0xc0, 0xeb, 0xfb]);
        assert_eq!((got, g.s.gpr[0]), (Some(vector::DB), u64::from(rf)));
        assert_eq!((frame(&g).0, g.s.dr6 & 0xf), (CODE, 1));
    }
}

#[test]
fn rf_is_for_one_instruction_of_a_block() {
    let (nop, int) = (0x90, [0xcd, 5]);
    for nops in 1..4 {
        let mut g = Guest::new();
        g.s.rflags |= rflags::RF;
        let got = g.run_bytes(&[&vec![nop; nops][..], &int].concat());
        assert_eq!(got, Some(5));
        let (rip, flags) = frame(&g);
        assert_eq!((rip, flags & rflags::RF), (CODE + nops as u64 + 2, 0), "{nops}");
    }
}

#[test]
fn single_step_comes_after_the_instruction() {
    let mut g = Guest::new();
    g.s.rflags |= rflags::TF;
    assert_eq!(g.run_bytes(&[0x90, 0x90]), Some(vector::DB));
    assert_eq!((frame(&g).0, g.s.dr6 & BS), (CODE + 1, BS));
    assert_eq!((frame(&g).1 & rflags::TF, g.s.rflags & rflags::TF), (rflags::TF, 0));
}

#[test]
fn software_interrupts_take_no_single_step() {
    // INT1, INT3 and INT 5 under TF: their own handler, no BS.
    for (code, expected) in [(&[0xf1u8][..], vector::DB), (&[0xcc], vector::BP), (&[0xcd, 5], 5)] {
        let mut g = Guest::new();
        g.s.rflags |= rflags::TF;
        assert_eq!(g.run_bytes(code), Some(expected));
        assert_eq!(g.s.dr6 & BS, 0);
        assert_eq!(frame(&g).0, CODE + code.len() as u64);
        // The next step counts again.
        let mut next = g.s.clone();
        next.rflags |= rflags::TF;
        g.s = next;
        assert_eq!(g.run_bytes(&[0x90]), Some(vector::DB));
    }
}

#[test]
fn general_detection_faults_before_the_move() {
    let mut g = Guest::new();
    g.s.dr7 = 0x400 | 1 << 13;
    g.s.gpr[0] = 0x1234;
    // MOV DR0, RAX.
    assert_eq!(g.run_bytes(&[0x0f, 0x23, 0xc0]), Some(vector::DB));
    assert_eq!((g.s.dr[0], g.s.dr6 & BD, g.s.dr7), (0, BD, 0x400));
    let (rip, flags) = frame(&g);
    assert_eq!((rip, flags & rflags::RF), (CODE, rflags::RF));
}

#[test]
fn mov_ss_holds_a_data_breakpoint_for_one_instruction() {
    // MOV SS, [RBX] from a watched word; then what follows.
    let watched = |next: &[u8]| {
        let mut g = Guest::new();
        g.write(DATA, &16u64.to_le_bytes());
        g.s.gpr[3] = DATA;
        g.s.dr[1] = DATA;
        g.s.dr7 = 0x400 | 8 | 0xf << 20;
        let mut code = vec![0x8e, 0x13];
        code.extend_from_slice(next);
        let got = g.run_bytes(&code);
        (got, g)
    };
    let (got, g) = watched(&[0x90, 0x90]);
    assert_eq!((got, frame(&g).0, g.s.dr6 & 0xf), (Some(vector::DB), CODE + 3, 2));
    // INT3 first, then the trap at its handler's first instruction.
    let (got, g) = watched(&[0xcc]);
    assert_eq!((got, g.s.dr6 & 0xf), (Some(vector::DB), 2));
    assert_eq!(frame(&g).0, 0x6000 + 16 * u64::from(vector::BP));
    // INT1 swallows it.
    let (got, g) = watched(&[0xf1]);
    assert_eq!((got, frame(&g).0), (Some(vector::DB), CODE + 3));
}

#[test]
fn alignment_check_needs_am_ac_and_ring_3() {
    const TSS: u64 = 0x8000;
    let mut g = Guest::new();
    let clean = g.s.clone();
    g.write(TSS + 4, &0x31_0000u64.to_le_bytes());
    for case in 0..8u32 {
        let (am, ac, user) = (case & 1 != 0, case & 2 != 0, case & 4 != 0);
        for bytes in [1u64, 2, 4, 8] {
            for offset in 0..8 {
                g.s = clean.clone();
                if am {
                    g.s.cr0 = Cr0::new(g.s.cr0.raw() | Cr0::AM);
                }
                if ac {
                    g.s.rflags |= rflags::AC;
                }
                if user {
                    g.s.cpl = 3;
                    g.s.seg[Seg::Cs as usize] = Segment::code64(0x1b, 3);
                    g.s.seg[Seg::Ss as usize] = Segment::flat_data(0x23, 3);
                }
                g.s.seg[Seg::Tr as usize] = Segment { base: TSS, limit: 0x67, attr: Attr(0x8b), selector: 0x28 };
                g.s.gpr[3] = DATA + offset;
                let misaligned = am && ac && user && offset % bytes != 0;
                // HLT at the end is #GP in ring 3.
                let end = user.then_some(vector::GP);
                let expected = if misaligned { Some(vector::AC) } else { end };
                assert_eq!(g.run_bytes(&mov(bytes, offset & 1 != 0)), expected, "{case} {bytes} {offset}");
                if misaligned {
                    assert_eq!(u64::from_le_bytes(g.read(g.s.gpr[4])), 0, "error code");
                }
            }
        }
    }
}

#[test]
fn sti_holds_interrupts_for_one_instruction() {
    // STI; INT 33h: the software interrupt comes first, and its handler has IF clear.
    let mut g = protected::Guest::new();
    g.bus.vector = Some(0x40);
    assert_eq!(g.run_a(&[0xfb, 0xcd, 0x33]), Some(0x33));
    assert_eq!(g.bus.vector, Some(0x40));
    // STI; NOP: the interrupt comes after the NOP.
    let mut g = protected::Guest::new();
    g.bus.vector = Some(0x40);
    assert_eq!(g.run_a(&[0xfb, 0x90, 0x90]), Some(0x40));
    assert_eq!(u64::from(g.u32(protected::STACK_A - 12)), protected::CODE_A + 2);
}

#[test]
fn sti_holds_nmis_too() {
    // The instruction before the first NOP was STI.
    let mut g = protected::Guest::new();
    g.s.shadow = umbra_arch::state::Shadow::Sti;
    g.s.rflags |= rflags::IF;
    g.bus.nmi = true;
    assert_eq!(g.run_a(&[0x90, 0x90]), Some(vector::NMI));
    assert_eq!(u64::from(g.u32(protected::STACK_A - 12)), protected::CODE_A + 1);
}

#[test]
fn a_gate_to_a_non_canonical_address_is_refused_at_the_gate() {
    let mut g = Guest::new();
    // Vector 3's gate: offset bits 63:32.
    g.write(0x4000 + 16 * 3 + 8, &0x8000_0000u32.to_le_bytes());
    assert_eq!(g.run_bytes(&[0xcc]), Some(vector::GP));
    let at = g.s.gpr[4];
    assert_eq!(u64::from_le_bytes(g.read(at + 8)), CODE, "a fault of INT3");
}
