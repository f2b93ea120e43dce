//! What was known of a descriptor holds only as long as its bytes: events and returns after each kind of change.

mod bus;
mod long_mode;
mod protected;

use iced_x86::code_asm::{rbx, rsp};
use long_mode::Guest;
use umbra_arch::fault::vector;
use umbra_arch::segment::TableRegister;

const GDT: u64 = 0x5000;
const IDT: u64 = 0x4000;
/// A table without what the first one has.
const OTHER_GDT: u64 = 0x7000;
const CODE: u16 = 24;
const STACK: u16 = 32;
const GOOD_CODE: u64 = 0x00af_9b00_0000_ffff;
const GOOD_STACK: u64 = 0x00cf_9300_0000_ffff;
const ACCESSED: u64 = 1 << 40;

/// INT3's gate leads to [`CODE`]; faults go on with their own selector.
fn guest() -> Guest {
    let mut g = Guest::new();
    g.s.gdtr.limit = 39;
    put(&g, CODE, GOOD_CODE);
    put(&g, STACK, GOOD_STACK);
    let gate: u64 = u64::from_le_bytes(g.read(IDT + 16 * 3));
    g.write(IDT + 16 * 3, &(gate & !(0xffff << 16) | u64::from(CODE) << 16).to_le_bytes());
    let table: [u8; 24] = g.read(GDT);
    g.write(OTHER_GDT, &table);
    g
}

fn put(g: &Guest, selector: u16, raw: u64) {
    g.write(GDT + u64::from(selector), &raw.to_le_bytes());
}

fn get(g: &Guest, selector: u16) -> u64 {
    u64::from_le_bytes(g.read(GDT + u64::from(selector)))
}

/// IRETQ to [`CODE`] and [`STACK`]: `None` if it got there.
fn iretq(g: &mut Guest) -> Option<u8> {
    g.run(|a| {
        let mut target = a.create_label();
        a.mov(rbx, rsp).unwrap();
        a.push(i32::from(STACK)).unwrap();
        a.push(rbx).unwrap();
        a.push(2).unwrap();
        a.push(i32::from(CODE)).unwrap();
        a.lea(rbx, iced_x86::code_asm::ptr(target)).unwrap();
        a.push(rbx).unwrap();
        a.iretq().unwrap();
        a.set_label(&mut target).unwrap();
        a.nop().unwrap();
    })
}

fn int3(g: &mut Guest) -> Option<u8> {
    g.run(|a| a.int3().unwrap())
}

/// Does `what` with the state that `g` had, twice: what is known already gives the same answer.
fn twice(g: &mut Guest, what: fn(&mut Guest) -> Option<u8>) -> Option<u8> {
    let before = g.s.clone();
    let first = what(g);
    g.s = before.clone();
    assert_eq!(what(g), first);
    g.s = before;
    first
}

const CHANGED_CODE: [(u64, u8, &str); 6] = [
    (GOOD_CODE & !(1 << 47), vector::NP, "not present"),
    (GOOD_STACK, vector::GP, "data"),
    (GOOD_CODE | 1 << 54, vector::GP, "L and D"),
    (GOOD_CODE | 3 << 45, vector::GP, "DPL 3"),
    (GOOD_CODE & !(1 << 44), vector::GP, "system"),
    (0, vector::GP, "nothing"),
];

const CHANGED_STACK: [(u64, u8, &str); 4] = [
    (GOOD_STACK & !(1 << 47), vector::SS, "not present"),
    (GOOD_STACK & !(1 << 41), vector::GP, "read-only"),
    (GOOD_STACK | 3 << 45, vector::GP, "DPL 3"),
    (GOOD_CODE, vector::GP, "code"),
];

#[test]
fn an_event_sees_each_change_of_its_handlers_descriptor() {
    let mut g = guest();
    for (raw, fault, what) in CHANGED_CODE {
        assert_eq!(twice(&mut g, int3), Some(vector::BP));
        put(&g, CODE, raw);
        assert_eq!(twice(&mut g, int3), Some(fault), "{what}");
        put(&g, CODE, GOOD_CODE);
    }
}

#[test]
fn a_return_sees_each_change_of_its_segments_descriptors() {
    let mut g = guest();
    for (selector, good, changes) in [(CODE, GOOD_CODE, &CHANGED_CODE[..]), (STACK, GOOD_STACK, &CHANGED_STACK[..])] {
        for &(raw, fault, what) in changes {
            assert_eq!(twice(&mut g, iretq), None);
            put(&g, selector, raw);
            assert_eq!(twice(&mut g, iretq), Some(fault), "{what}");
            put(&g, selector, good);
        }
    }
}

#[test]
fn another_table_and_another_limit_count_at_once() {
    for what in [int3, iretq] {
        let mut g = guest();
        let good = what(&mut guest());
        let table = g.s.gdtr;
        for other in [TableRegister { base: OTHER_GDT, ..table }, TableRegister { limit: 30, ..table }] {
            assert_eq!(twice(&mut g, what), good);
            g.s.gdtr = other;
            assert_eq!(twice(&mut g, what), Some(vector::GP), "{other:x?}");
            g.s.gdtr = table;
        }
    }
}

#[test]
fn accessed_is_set_again_whenever_somebody_has_cleared_it() {
    let mut g = guest();
    for _ in 0..3 {
        put(&g, CODE, GOOD_CODE & !ACCESSED);
        put(&g, STACK, GOOD_STACK & !ACCESSED);
        assert_eq!(twice(&mut g, int3), Some(vector::BP));
        assert_eq!((get(&g, CODE), get(&g, STACK)), (GOOD_CODE, GOOD_STACK & !ACCESSED));
        put(&g, CODE, GOOD_CODE & !ACCESSED);
        assert_eq!(twice(&mut g, iretq), None);
        assert_eq!((get(&g, CODE), get(&g, STACK)), (GOOD_CODE, GOOD_STACK));
    }
}

#[test]
fn two_selectors_in_one_place_keep_their_own_segments() {
    // Two selectors in one place of the cache, by turns.
    let mut g = guest();
    g.s.gdtr.limit = 0x7f;
    let far = CODE + 64;
    put(&g, far, GOOD_CODE | 1 << 47 | 1 << 52);
    for selector in [CODE, far, CODE, far] {
        let gate: u64 = u64::from_le_bytes(g.read(IDT + 16 * 3));
        g.write(IDT + 16 * 3, &(gate & !(0xffff << 16) | u64::from(selector) << 16).to_le_bytes());
        assert_eq!(twice(&mut g, int3), Some(vector::BP));
        let before = g.s.clone();
        int3(&mut g);
        let cs = g.s.segment(umbra_arch::segment::Seg::Cs);
        assert_eq!((cs.selector, cs.attr.0 >> 12 & 1), (selector, u32::from(selector == far)), "AVL tells them apart");
        g.s = before;
    }
}
