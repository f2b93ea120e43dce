//! The TLB of the manual's processor itself: which invalidations take which stale translation, so that "stale is
//! allowed" means something where the sequences say it.

use crate::checked::Image;
use crate::manual::{self, Attempt, Cpuid, Kind, Machine};
use crate::processor::Processor;
use crate::support::{CR4_ALL, G, PWU};

const TABLE: u64 = 0x20_0000;
const OTHER: u64 = 0x20_1000;
/// The same page is mapped here by a self-reference at every level.
const LINEAR: u64 = 0x1000;
const READ: Attempt = Attempt { kind: Kind::Read, user: false, implicit: false };
const PCIDE: u64 = 1 << 17;
const PGE: u64 = 1 << 7;
const NO_FLUSH: u64 = 1 << 63;

/// 4-level paging on a table that links to itself at index 0 and maps `LINEAR` by entry 1, which was used once; then
/// entry 1 is cleared. With `global` the entry was.
fn used_then_cleared(cr4: u64, pcid: u64, global: bool) -> (Processor, Image) {
    let cpuid = Cpuid { maxphyaddr: 40, gib_pages: true, pse36: true, amd: false };
    let machine = Machine {
        cr0: 0x8001_0011,
        cr3: TABLE | pcid,
        cr4: 1 << 5 | cr4,
        efer: 0xd00,
        pdpte: [0; 4],
        pkru: 0,
        pkrs: 0,
        ac: false,
        cpuid,
    };
    let mut image = Image::new();
    for table in [TABLE, OTHER] {
        image.write(table, &(table | PWU).to_le_bytes());
        image.write(table + 8, &(table | PWU | if global { G } else { 0 }).to_le_bytes());
    }
    let mut cpu = Processor::new(machine, CR4_ALL, 0xd01);
    let verdict = manual::access(&machine, &image, LINEAR, READ);
    assert_eq!(verdict.outcome, Ok(TABLE));
    cpu.accessed(LINEAR, &verdict);
    image.write(TABLE + 8, &[0; 8]);
    image.write(OTHER + 8, &[0; 8]);
    assert_eq!(manual::access(&cpu.machine, &image, LINEAR, READ).outcome, Err(0));
    assert_eq!(cpu.stale(LINEAR, READ), [Ok(TABLE)], "nothing has taken it yet");
    (cpu, image)
}

/// Whether the translation can still be used after `what`, global or not.
fn survives(cr4: u64, pcid: u64, what: impl Fn(&mut Processor, &Image)) -> (bool, bool) {
    let of = |global| {
        let (mut cpu, image) = used_then_cleared(cr4, pcid, global);
        what(&mut cpu, &image);
        !cpu.stale(LINEAR, READ).is_empty()
    };
    (of(false), of(true))
}

#[test]
fn each_invalidation_takes_what_the_manual_says() {
    let cr3 = |value: u64| move |cpu: &mut Processor, image: &Image| cpu.mov_cr3(value, image).expect("legal");
    let cr4 = |bits: u64| {
        move |cpu: &mut Processor, image: &Image| cpu.mov_cr4(cpu.machine.cr4 ^ bits, image).expect("legal")
    };
    let invpcid =
        |kind, pcid, linear| move |cpu: &mut Processor, _: &Image| cpu.invpcid(kind, pcid, linear).expect("legal");
    let all = PGE | PCIDE;
    // INVLPG: this page, global or not; not another.
    assert_eq!(survives(all, 1, |cpu, _| cpu.invlpg(LINEAR + 5)), (false, false));
    assert_eq!(survives(all, 1, |cpu, _| cpu.invlpg(LINEAR + 0x1000)), (true, true));
    // MOV CR3: what is not global, of the PCID that it loads.
    assert_eq!(survives(PGE, 0, cr3(OTHER)), (false, true));
    assert_eq!(survives(all, 1, cr3(TABLE | 1)), (false, true));
    assert_eq!(survives(all, 1, cr3(TABLE | 1 | NO_FLUSH)), (true, true));
    // Another PCID's survive, and are not seen meanwhile unless global.
    assert_eq!(survives(all, 1, cr3(OTHER | 2)), (false, true));
    let there_and_back = |cpu: &mut Processor, image: &Image| {
        cpu.mov_cr3(OTHER | 2, image).expect("legal");
        cpu.mov_cr3(TABLE | 1 | NO_FLUSH, image).expect("legal");
    };
    assert_eq!(survives(all, 1, there_and_back), (true, true));
    // INVLPG under another PCID: global ones only.
    let invlpg_elsewhere = |cpu: &mut Processor, image: &Image| {
        cpu.mov_cr3(OTHER | 2, image).expect("legal");
        cpu.invlpg(LINEAR);
        cpu.mov_cr3(TABLE | 1 | NO_FLUSH, image).expect("legal");
    };
    assert_eq!(survives(all, 1, invlpg_elsewhere), (true, false));
    // INVPCID's four types.
    assert_eq!(survives(all, 1, invpcid(0, 1, LINEAR)), (false, true));
    assert_eq!(survives(all, 1, invpcid(0, 2, LINEAR)), (true, true));
    assert_eq!(survives(all, 1, invpcid(1, 1, 0)), (false, true));
    assert_eq!(survives(all, 1, invpcid(2, 0, 0)), (false, false));
    assert_eq!(survives(all, 1, invpcid(3, 0, 0)), (false, true));
    // CR4: PGE and PCIDE take everything, SMEP what is the PCID's, SMAP and PSE nothing.
    assert_eq!(survives(PGE, 0, cr4(PGE)), (false, false));
    assert_eq!(survives(all, 1, cr4(PCIDE)), (false, false));
    assert_eq!(survives(PGE, 0, cr4(1 << 20)), (false, false));
    assert_eq!(survives(PGE | 1 << 20, 0, cr4(1 << 20)), (true, true));
    assert_eq!(survives(PGE, 0, cr4(1 << 21 | 1 << 4)), (true, true));
    // CR0: only PG; WP works on what is cached.
    let cr0 = |bits: u64| {
        move |cpu: &mut Processor, image: &Image| {
            cpu.mov_cr0(cpu.machine.cr0 ^ bits, image).expect("legal");
            cpu.mov_cr0(cpu.machine.cr0 ^ bits, image).expect("legal");
        }
    };
    assert_eq!(survives(PGE, 0, cr0(1 << 16)), (true, true));
    assert_eq!(survives(PGE, 0, cr0(1 << 31)), (false, false));
    // A page fault takes what there was for its address.
    let fault = |cpu: &mut Processor, image: &Image| {
        let verdict = manual::access(&cpu.machine, image, LINEAR, READ);
        cpu.accessed(LINEAR, &verdict);
    };
    assert_eq!(survives(PGE, 0, fault), (false, false));
}
