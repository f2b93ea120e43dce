//! Random sequences of control-register writes, table edits and accesses: every answer, error code,
//! accessed and dirty bit equals that of the pure walk on a copy of memory, in all modes.

use crate::support::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use umbra_arch::control::{Cr0, Cr4, Efer};
use umbra_arch::paging::{Access, AccessKind, PagingMode};
use umbra_arch::{Fault, Gpa, Gva};
use umbra_memory::PageFlags;
use umbra_mmu::format::Format;
use umbra_mmu::walk::{self, Exchange, Regime, Tables, Top};
use umbra_mmu::{CpuRole, MmuMode, MmuOptions, View};

/// All tables and data live in this many pages from `ARENA` on, so that tables map tables.
const PAGES: u64 = 20;
const ARENA: u64 = 0x20_0000;
/// Pages that CR3 selects; the last holds PDPTEs without reserved bits.
const ROOTS: u64 = 4;
const PDPT: u64 = ARENA + ((ROOTS - 1) << 12);

#[derive(Clone, Debug)]
enum Op {
    Entry { page: u64, index: u64, target: u64, flags: u64, width: u8 },
    Zero { page: u64 },
    Cr0(u64),
    Cr3 { page: u64, bits: u64 },
    Cr4(u64),
    Efer(u64),
    View { cpl: u8, ac: bool },
    Pkru(u32),
    Pkrs(u32),
    Invlpg(u64),
    Access { gva: u64, kind: AccessKind, implicit: bool },
    Store { gva: u64, target: u64, flags: u64 },
    Code { page: u64 },
    Clean { page: u64 },
    Format { gib_pages: bool, amd: bool },
    Environment { smm: bool, guest: bool },
    DropContexts,
    DropShadow,
}

/// The mode that a sequence starts in.
#[derive(Clone, Copy, Debug)]
enum Start {
    Long,
    FiveLevel,
    Pae,
    TwoLevel,
}

fn flags() -> impl Strategy<Value = u64> {
    let rare = |bit: u64| prop_oneof![15 => Just(0), 1 => Just(bit)];
    let often = |bit: u64| prop_oneof![1 => Just(0), 4 => Just(bit)];
    let even = |bit: u64| prop_oneof![1 => Just(0), 1 => Just(bit)];
    let key = prop_oneof![3 => Just(0u64), 1 => (0u64..4).prop_map(|k| k << 59)];
    (
        (prop_oneof![1 => Just(0), 15 => Just(P)], often(W), even(U), even(A), even(D), rare(PS), even(G)),
        (rare(XD), rare(1 << 51), rare(1 << 45), rare(1 << 13), key),
    )
        .prop_map(|(a, b)| a.0 | a.1 | a.2 | a.3 | a.4 | a.5 | a.6 | b.0 | b.1 | b.2 | b.3 | b.4)
}

/// Few indices, so that paths meet.
fn gva() -> impl Strategy<Value = u64> {
    let index = || prop_oneof![4 => 0u64..2, 1 => 2u64..4];
    (index(), index(), index(), index(), 0u64..4096, prop_oneof![6 => Just(0u64), 1 => Just(1)]).prop_map(
        |(a, b, c, d, offset, high)| {
            let low = a << 39 | b << 30 | c << 21 | d << 12 | offset;
            if high == 1 { 0xffff_8000_0000_0000 | low } else { low }
        },
    )
}

fn op() -> impl Strategy<Value = Op> {
    let index = prop_oneof![8 => 0u64..4, 1 => Just(256u64), 1 => 0u64..512];
    let kind = prop_oneof![Just(AccessKind::Read), Just(AccessKind::Write), Just(AccessKind::Fetch)];
    let width = prop_oneof![6 => Just(8u8), 1 => Just(4), 1 => Just(1)];
    let cr0 = prop_oneof![4 => Just(Cr0::WP), 1 => Just(Cr0::PG), 1 => Just(Cr0::CD)];
    let cr4 = prop_oneof![
        Just(Cr4::SMEP),
        Just(Cr4::SMAP),
        Just(Cr4::PKE),
        Just(Cr4::PKS),
        Just(Cr4::PGE),
        Just(Cr4::PSE),
        Just(Cr4::PAE),
        Just(Cr4::LA57),
        Just(Cr4::PCIDE),
    ];
    prop_oneof![
        8 => (0..PAGES, index, 0..PAGES, flags(), width)
            .prop_map(|(page, index, target, flags, width)| Op::Entry { page, index, target, flags, width }),
        1 => (0..PAGES).prop_map(|page| Op::Zero { page }),
        3 => cr0.prop_map(Op::Cr0),
        3 => (0..ROOTS, prop_oneof![4 => Just(0u64), 1 => Just(1u64 << 63), 1 => Just(0x20u64)])
            .prop_map(|(page, bits)| Op::Cr3 { page, bits }),
        3 => cr4.prop_map(Op::Cr4),
        1 => prop_oneof![Just(Efer::NXE), Just(Efer::LME)].prop_map(Op::Efer),
        4 => (prop_oneof![Just(0u8), Just(3)], any::<bool>()).prop_map(|(cpl, ac)| Op::View { cpl, ac }),
        1 => any::<u32>().prop_map(|v| Op::Pkru(v & 0xff)),
        1 => any::<u32>().prop_map(|v| Op::Pkrs(v & 0xff)),
        1 => gva().prop_map(Op::Invlpg),
        20 => (gva(), kind, prop_oneof![5 => Just(false), 1 => Just(true)])
            .prop_map(|(gva, kind, implicit)| Op::Access { gva, kind, implicit }),
        4 => (gva(), 0..PAGES, flags()).prop_map(|(gva, target, flags)| Op::Store { gva: gva & !7, target, flags }),
        1 => (0..PAGES).prop_map(|page| Op::Code { page }),
        1 => (0..PAGES).prop_map(|page| Op::Clean { page }),
        1 => (any::<bool>(), any::<bool>()).prop_map(|(gib_pages, amd)| Op::Format { gib_pages, amd }),
        1 => (any::<bool>(), any::<bool>()).prop_map(|(smm, guest)| Op::Environment { smm, guest }),
        1 => Just(Op::DropContexts),
        1 => Just(Op::DropShadow),
    ]
}

/// The arena as plain bytes.
struct Copy(Vec<u8>);

impl Copy {
    fn at(&self, gpa: Gpa) -> Option<usize> {
        let at = gpa.raw().checked_sub(ARENA)? as usize;
        (at + 8 <= self.0.len()).then_some(at)
    }
}

impl Tables for Copy {
    fn read(&mut self, gpa: Gpa, bytes: u64) -> u64 {
        let n = bytes as usize;
        let mut raw = [0; 8];
        match self.at(gpa) {
            Some(at) => raw[..n].copy_from_slice(&self.0[at..at + n]),
            // Outside the arena the test's memory is zero up to 8 MiB, and absent above.
            None if gpa.raw() < 8 << 20 && !(0xa_0000..0xc_0000).contains(&gpa.raw()) => {}
            None => raw[..n].fill(0xff),
        }
        u64::from_le_bytes(raw)
    }
    fn exchange(&mut self, gpa: Gpa, bytes: u64, old: u64, new: u64) -> Exchange {
        if self.read(gpa, bytes) != old {
            return Exchange::Changed;
        }
        if let Some(at) = self.at(gpa) {
            self.0[at..at + bytes as usize].copy_from_slice(&new.to_le_bytes()[..bytes as usize]);
            return Exchange::Done;
        }
        Exchange::Ignored
    }
}

fn arena(rig: &Rig) -> Vec<u8> {
    let mut bytes = vec![0; (PAGES << 12) as usize];
    rig.mem.read(Gpa::new(ARENA), &mut bytes);
    bytes
}

fn value(target: u64, flags: u64) -> u64 {
    (ARENA + (target << 12)) | flags
}

/// Tables that lead somewhere in every mode: the low entries of each page point at later pages.
fn prepare(rig: &mut Rig) {
    for page in 0..PAGES {
        for index in 0..4 {
            let target = if page < PAGES - 4 { (page + 1 + index) % PAGES } else { (page * 3 + index) % PAGES };
            rig.poke(ARENA + (page << 12) + index * 8, value(target, PWU | A));
        }
        rig.poke(ARENA + (page << 12) + 256 * 8, value((page + 1) % PAGES, PWU));
    }
    for index in 0..8 {
        rig.poke(PDPT + index * 8, value((index * 5) % PAGES, P));
    }
    rig.cr3(ARENA).expect("legal");
}

/// What the manual says, from registers and memory alone.
fn predict(run: &Run, gva: u64, access: Access) -> (Result<Gpa, Fault>, Vec<u8>) {
    let Run { rig, pkru, pkrs, format, .. } = run;
    let role = CpuRole::of(&rig.regs);
    let top = match role.mode {
        PagingMode::Off => Top::Direct,
        PagingMode::Pae => Top::Pdptes(rig.regs.pdpte),
        mode => Top::Table(rig.regs.cr3.table(mode)),
    };
    let regime = Regime { top, role: role.root_page_role(false), format: *format };
    let view = View::of(&role, rig.cpl, rig.ac, *pkru, *pkrs);
    let mut copy = Copy(arena(rig));
    let result = walk::walk(&mut copy, &regime, Gva::new(gva), access, &view).map(|walked| walked.gpa);
    (result, copy.0)
}

fn canonical(rig: &Rig, gva: u64) -> u64 {
    if rig.regs.mode().is_long() { gva } else { gva & 0xffff_ffff }
}

struct Run {
    rig: Rig,
    pkru: u32,
    pkrs: u32,
    format: Format,
    /// Fetches translated so far: stamp, address, result.
    fetches: BTreeMap<(u64, u64), Gpa>,
}

impl Run {
    fn access(&mut self, gva: u64, access: Access) -> Result<Gpa, Fault> {
        let gva = canonical(&self.rig, gva);
        let (expected, memory) = predict(self, gva, access);
        let peeked = self.rig.mmu.peek(Gva::new(gva), access).map(|t| t.gpa);
        assert_eq!(peeked, expected, "peek {access:?} at {gva:#x}");
        if !access.implicit {
            let fast = match access.kind {
                AccessKind::Read => self.rig.mmu.lookup_read(Gva::new(gva), 1),
                AccessKind::Write => self.rig.mmu.lookup_write(Gva::new(gva), 1),
                AccessKind::Fetch => self.rig.mmu.lookup_fetch(Gva::new(gva)),
            };
            if let Some(off) = fast {
                let gpa = expected.expect("a fast hit is no fault");
                assert_eq!(self.rig.mem.map(gpa.page()).at(gpa.offset()).readable(), Some(off));
                assert!(memory == arena(&self.rig), "a fast hit leaves A and D alone at {gva:#x}");
            }
        }
        let result = self.rig.mmu.translate(Gva::new(gva), access).map(|t| t.gpa);
        assert_eq!(result, expected, "{access:?} at {gva:#x} in {:?}", self.rig.regs.mode());
        assert!(memory == arena(&self.rig), "A and D bits after {access:?} at {gva:#x}");
        if let (AccessKind::Fetch, false, Ok(gpa)) = (access.kind, access.implicit, result) {
            self.fetches.insert((self.rig.mmu.fetch_stamp(), gva), gpa);
        }
        self.rig.drain();
        result
    }

    /// Every fetch translated under the present stamp is still what the tables say.
    fn check_fetches(&self) {
        let stamp = self.rig.mmu.fetch_stamp();
        for (&(_, gva), &gpa) in self.fetches.range((stamp, 0)..=(stamp, u64::MAX)) {
            let peeked = self.rig.mmu.peek(Gva::new(gva), Access::explicit(AccessKind::Fetch, self.rig.cpl));
            assert_eq!(peeked.map(|t| t.gpa), Ok(gpa), "fetch of {gva:#x} under stamp {stamp:#x}");
        }
    }

    fn step(&mut self, op: &Op) {
        let rig = &mut self.rig;
        match *op {
            Op::Entry { page, index, target, flags, width } => {
                let at = ARENA + (page << 12) + index * 8;
                rig.poke_bytes(at, &value(target, flags).to_le_bytes()[..width as usize]);
            }
            Op::Zero { page } => rig.poke_bytes(ARENA + (page << 12), &[0; 4096]),
            Op::Cr0(bit) => drop(rig.cr0(rig.regs.cr0.raw() ^ bit)),
            Op::Cr3 { page, bits } => drop(rig.cr3((ARENA + (page << 12)) | bits)),
            Op::Cr4(bit) => drop(rig.cr4(rig.regs.cr4.raw() ^ bit)),
            Op::Efer(bit) => drop(rig.efer(rig.regs.efer.raw() ^ bit)),
            Op::View { cpl, ac } => rig.view(cpl, ac),
            Op::Pkru(pkru) => {
                self.pkru = pkru;
                rig.mmu.set_pkru(pkru);
            }
            Op::Pkrs(pkrs) => {
                self.pkrs = pkrs;
                rig.mmu.set_pkrs(pkrs);
            }
            Op::Invlpg(gva) => rig.mmu.invlpg(Gva::new(gva)),
            Op::Access { gva, kind, implicit } => {
                let access = if implicit { Access::implicit(kind) } else { Access::explicit(kind, rig.cpl) };
                let _ = self.access(gva, access);
            }
            Op::Store { gva, target, flags } => {
                let access = Access::explicit(AccessKind::Write, rig.cpl);
                if self.access(gva, access).is_ok() {
                    let gva = canonical(&self.rig, gva);
                    self.rig.store64(gva, value(target, flags)).expect("just translated");
                }
            }
            Op::Code { page } => {
                let off = rig.mem.map(Gpa::new(ARENA + (page << 12)).page()).readable().expect("RAM");
                rig.mem.set_flags(off, PageFlags::CODE);
                rig.mmu.code_page_changed(off);
            }
            Op::Clean { page } => {
                let off = rig.mem.map(Gpa::new(ARENA + (page << 12)).page()).readable().expect("RAM");
                rig.mem.clear_flags(off, PageFlags::CODE);
                rig.mmu.clean_page(off);
            }
            Op::Format { gib_pages, amd } => {
                self.format = Format { gib_pages, amd, ..self.format };
                rig.mmu.set_format(self.format);
            }
            Op::Environment { smm, guest } => rig.mmu.set_environment(smm, guest),
            Op::DropContexts => rig.mmu.drop_all_contexts(),
            Op::DropShadow => rig.mmu.drop_all_shadow(),
        }
    }
}

fn run(options: MmuOptions, start: Start, ops: &[Op]) -> Vec<u8> {
    let mut rig = Rig::with(options);
    prepare(&mut rig);
    match start {
        Start::Long => rig.enter_long(ARENA),
        Start::FiveLevel => {
            rig.set_cr4(Cr4::LA57, true);
            rig.enter_long(ARENA);
        }
        Start::Pae => {
            rig.cr3(PDPT).expect("legal");
            rig.set_cr4(Cr4::PAE, true);
            rig.efer(Efer::NXE).expect("legal");
            rig.set_cr0(Cr0::PG, true);
        }
        Start::TwoLevel => rig.set_cr0(Cr0::PG, true),
    }
    let mut run = Run { rig, pkru: 0, pkrs: 0, format: Format::intel(LIMITS.maxphyaddr), fetches: BTreeMap::new() };
    for op in ops {
        run.step(op);
        if let Err(what) = run.rig.mmu.audit() {
            panic!("audit after {op:x?}: {what}");
        }
        run.check_fetches();
    }
    arena(&run.rig)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_mode_answers_as_the_walk_does(
        ops in prop::collection::vec(op(), 1..120),
        start in prop_oneof![2 => Just(Start::Long), 1 => Just(Start::FiveLevel), 1 => Just(Start::Pae), 1 => Just(Start::TwoLevel)],
        seed in any::<u64>(),
    ) {
        let all = [
            MmuOptions::default(),
            MmuOptions { kvm_role: true, ..MmuOptions::default() },
            MmuOptions { mode: MmuMode::UnloadAlways, ..MmuOptions::default() },
            MmuOptions { mode: MmuMode::DropAtRandom(seed), ..MmuOptions::default() },
            MmuOptions { shadow_pages: 16, ..MmuOptions::default() },
        ];
        let results = all.map(|options| run(options, start, &ops));
        prop_assert!(results.iter().all(|memory| *memory == results[0]));
    }
}
