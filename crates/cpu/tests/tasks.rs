//! Hardware task switches: who is busy, what is saved, and in whose name a switch fails.

mod bus;
mod protected;

use protected::*;
use umbra_arch::control::Cr0;
use umbra_arch::fault::vector;
use umbra_arch::rflags;
use umbra_arch::segment::Seg;

const HLT: u8 = 0xf4;

/// JMP (EAh) or CALL (9Ah) far to `selector`, whose offset doesn't matter.
fn far(opcode: u8, selector: u16) -> Vec<u8> {
    let [low, high] = selector.to_le_bytes();
    vec![opcode, 0xf4, 0xf4, 0xf4, 0xf4, low, high, HLT]
}

#[test]
fn jump_leaves_the_old_task_available() {
    for target in [TASK_B, GATE_B] {
        let mut g = Guest::new();
        g.write(CODE_B, &[HLT]);
        (g.s.gpr[3], g.s.dr7) = (0x1234_5678, 0x401);
        g.task_b(0x34, 0xabcd);
        assert_eq!(g.run_a(&far(0xea, target)), None);
        assert_eq!((g.s.rip, g.s.gpr[3], g.s.gpr[4]), (CODE_B + 1, 0xabcd, STACK_B));
        assert_eq!((g.kind(TASK_A), g.kind(TASK_B)), (0x89, 0x8b));
        assert_eq!((g.s.segment(Seg::Tr).selector, g.s.rflags & rflags::NT), (TASK_B, 0));
        assert!(g.s.cr0.raw() & Cr0::TS != 0);
        assert_eq!(g.s.dr7, 0x400, "local enables go");
        assert_eq!((g.u32(TSS_A + 0x20), g.u32(TSS_A + 0x34)), (CODE_A as u32 + 7, 0x1234_5678));
        assert_eq!((g.u32(TSS_A + 0x4c), g.u32(TSS_A + 0x50)), (CODE.into(), DATA.into()));
        assert_eq!(g.u32(TSS_B), 0, "a jump leaves no link");
    }
}

#[test]
fn call_nests_and_iret_returns() {
    let mut g = Guest::new();
    g.write(CODE_B, &[0xcf, HLT]);
    assert_eq!(g.run_a(&far(0x9a, TASK_B)), None);
    assert_eq!((g.s.rip, g.s.segment(Seg::Tr).selector), (CODE_A + 8, TASK_A));
    assert_eq!((g.kind(TASK_A), g.kind(TASK_B)), (0x8b, 0x89));
    assert_eq!(g.u32(TSS_B) & 0xffff, TASK_A.into());
    assert_eq!(u64::from(g.u32(TSS_B + 0x20)), CODE_B + 1);
    assert_eq!(u64::from(g.u32(TSS_B + 0x24)) & rflags::NT, 0, "IRET saves NT as 0");
    // Called again, the task goes on after its IRET.
    g.s.rip = CODE_A;
    assert_eq!(g.run(), None);
    assert_eq!(g.s.rip, CODE_B + 2);
    assert_eq!(g.s.rflags & rflags::NT, rflags::NT);
    assert_eq!((g.kind(TASK_A), g.kind(TASK_B)), (0x8b, 0x8b));
}

#[test]
fn exception_through_a_task_gate_pushes_its_code_on_the_new_stack() {
    let mut g = Guest::new();
    g.write(IDT + 8 * u64::from(vector::GP), &(u64::from(TASK_B) << 16 | 0x85 << 40).to_le_bytes());
    g.write(CODE_B, &[HLT]);
    // MOV ES, AX with a selector beyond the table.
    g.s.gpr[0] = 0x1230;
    assert_eq!(g.run_a(&[0x8e, 0xc0]), None);
    assert_eq!((g.s.rip, g.s.gpr[4]), (CODE_B + 1, STACK_B - 4));
    assert_eq!(g.u32(STACK_B - 4), 0x1230);
    assert_eq!(u64::from(g.u32(TSS_A + 0x20)), CODE_A);
    assert_eq!(u64::from(g.u32(TSS_A + 0x24)) & rflags::RF, rflags::RF);
    assert_eq!(g.s.rflags & rflags::NT, rflags::NT);
}

#[test]
fn a_bad_tss_is_refused_in_the_old_task() {
    let b = u32::from(TASK_B);
    let cases = [
        (tss(TSS_B, 0x8b, 0x67), vector::GP),
        (tss(TSS_B, 0x09, 0x67), vector::NP),
        (tss(TSS_B, 0x89, 0x66), vector::TS),
        (tss(TSS_B, 0x82, 0x67), vector::GP),
    ];
    for (descriptor, expected) in cases {
        let mut g = Guest::new();
        g.descriptor(TASK_B, descriptor);
        assert_eq!(g.run_a(&far(0xea, TASK_B)), Some(expected), "{descriptor:#x}");
        assert_eq!(g.s.segment(Seg::Tr).selector, TASK_A);
        assert_eq!((g.u32(STACK_A - 16), u64::from(g.u32(STACK_A - 12))), (b, CODE_A));
        assert_eq!(g.kind(TASK_A), 0x8b);
    }
}

#[test]
fn bad_segments_fault_in_the_new_task() {
    // Field of the TSS, its value, vector, error code.
    let cases = [
        (0x4c, 0, vector::TS, 0),
        (0x4c, DATA.into(), vector::TS, DATA.into()),
        (0x50, u32::from(DATA) + 1, vector::TS, u32::from(DATA)),
        (0x54, 0x1000, vector::TS, 0x1000),
        (0x60, CODE.into(), vector::TS, CODE.into()),
    ];
    for (field, value, expected, code) in cases {
        let mut g = Guest::new();
        // The handler needs a stack even where the task's was not loaded.
        let gate = 0x85u64 << 40 | 0x30 << 16;
        g.write(IDT + 8 * u64::from(vector::TS), &gate.to_le_bytes());
        g.s.gdtr.limit = 0x37;
        g.descriptor(0x30, tss(TSS_B + 0x100, 0x89, 0x67));
        for at in (0..0x68).step_by(4) {
            let same = g.u32(TSS_B + at);
            g.write(TSS_B + 0x100 + at, &same.to_le_bytes());
        }
        g.write(CODE_B, &[HLT]);
        g.task_b(field, value);
        g.task_b(0x20, 0x5555);
        assert_eq!(g.run_a(&far(0xea, TASK_B)), None, "{field:#x}");
        assert_eq!(expected, vector::TS);
        assert_eq!((g.s.segment(Seg::Tr).selector, g.u32(STACK_B - 4)), (0x30, code), "{field:#x}");
        assert_eq!(g.u32(TSS_B + 0x20), 0x5555, "the new task's EIP is the return address");
        assert_eq!(g.u32(TSS_B + 0x100) & 0xffff, TASK_B.into());
    }
}

#[test]
fn iret_to_a_task_that_is_not_busy_is_a_bad_tss() {
    let mut g = Guest::new();
    g.write(TSS_A, &u32::from(TASK_B).to_le_bytes());
    g.s.rflags |= rflags::NT;
    assert_eq!(g.run_a(&[0xcf]), Some(vector::TS));
    assert_eq!(g.u32(STACK_A - 16), TASK_B.into());
}

#[test]
fn sixteen_bit_tasks_have_their_own_layout() {
    let mut g = Guest::new();
    g.descriptor(TASK_B, tss(TSS_B, 0x81, 0x2b));
    g.write(TSS_B, &[0; 0x68]);
    let field = |at: u64, value: u16| g.write(TSS_B + at, &value.to_le_bytes());
    field(0x0e, 0x8000);
    field(0x18, 0x7777);
    field(0x1a, 0x9000);
    for (at, selector) in [(0x22, DATA), (0x24, CODE), (0x26, DATA), (0x28, 0)] {
        field(at, selector);
    }
    g.write(0x8000, &[0xcf]);
    g.s.gpr[3] = 0x1111_2222;
    assert_eq!(g.run_a(&far(0x9a, TASK_B)), None);
    // Back in the 32-bit task, whose registers were saved in full.
    assert_eq!((g.s.rip, g.s.gpr[3]), (CODE_A + 8, 0x1111_2222));
    assert_eq!(g.u32(TSS_B) & 0xffff, TASK_A.into());
    assert_eq!(g.u32(TSS_B + 0x0e) & 0xffff, 0x8001);
    assert_eq!(g.u32(TSS_B + 0x18) & 0xffff, 0x7777, "BX");
}
