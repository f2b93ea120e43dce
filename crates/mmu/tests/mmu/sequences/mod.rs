//! Random sequences of register writes, table edits, accesses and what the host does, on one and on two processors:
//! every #GP, outcome, error code, CR2, accessed and dirty flag is the manual's; every outcome is in the set that a TLB
//! could give and is the fresh one; the audit holds after each step; all modes of the MMU give the same trace.
//!
//! `PROPTEST_CASES` and `PROPTEST_RNG_SEED` make more and other sequences.

mod ops;

use crate::checked::{self, Image, Store};
use crate::manual::{self, Attempt, Cpuid, Kind, Machine};
use crate::processor::{Processor, Refused};
use crate::support::*;
use ops::{ARENA, Op, PAGES, PDPT, Start, op, start, steps};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{RngSeed, TestRunner};
use std::collections::BTreeMap;
use std::sync::Arc;
use umbra_arch::control::{Cr0, Cr4, Efer};
use umbra_arch::paging::{Access, AccessKind};
use umbra_arch::{Gpa, Gva};
use umbra_memory::{GuestMemory, PageFlags, RamOffset, Watcher};
use umbra_mmu::format::Format;
use umbra_mmu::{MmuMode, MmuOptions, MmuStats};

fn value(target: u64, flags: u64) -> u64 {
    (ARENA + (target << 12)) | flags
}

/// A processor under test, and what the manual says it is.
struct Cpu {
    rig: Rig,
    model: Processor,
    /// Fetches from pages claimed as code so far: stamp, address, result.
    fetches: BTreeMap<(u64, u64), u64>,
}

struct Run {
    cpus: Vec<Cpu>,
    image: Image,
    /// Everything that a guest could see, in order.
    digest: u64,
    /// Accesses that were allowed.
    allowed: u64,
    /// Accesses for which a TLB could have given another outcome than the fresh one.
    could_differ: u64,
}

impl Run {
    fn new(options: MmuOptions, start: Start, cpus: usize) -> Self {
        let mem = Arc::new(GuestMemory::new(8 << 20).expect("8 MiB"));
        let watchers: Vec<Watcher> = if cpus == 1 {
            vec![Watcher::sole(mem.clone())]
        } else {
            (0..cpus).map(|_| Watcher::register(mem.clone()).expect("room")).collect()
        };
        let rigs = watchers.into_iter().map(|watcher| Rig::watching(watcher, options));
        let cpus = rigs.map(Cpu::new).collect();
        let mut run = Run { cpus, image: Image::new(), digest: 0, allowed: 0, could_differ: 0 };
        run.prepare(0);
        for cpu in &mut run.cpus {
            cpu.start(start);
        }
        run
    }

    /// Tables that lead somewhere in every mode: the low entries of each page point at later pages.
    fn prepare(&mut self, cpu: usize) {
        let mut put = |gpa: u64, value: u64| {
            checked::store(&mut self.cpus[cpu].rig, &mut self.image, gpa, &value.to_le_bytes(), Store::Device);
        };
        for page in 0..PAGES {
            for index in 0..4 {
                let target = if page < PAGES - 4 { (page + 1 + index) % PAGES } else { (page * 3 + index) % PAGES };
                put(ARENA + (page << 12) + index * 8, value(target, PWU | A));
            }
            put(ARENA + (page << 12) + 256 * 8, value((page + 1) % PAGES, PWU));
        }
        for index in 0..8 {
            put(PDPT + index * 8, value((index * 5) % PAGES, P));
        }
    }

    fn note(&mut self, what: u64) {
        self.digest = (self.digest.rotate_left(7) ^ what).wrapping_mul(0x0100_0000_01b3);
    }

    fn step(&mut self, (cpu, op): &(usize, Op)) {
        let at = cpu % self.cpus.len();
        self.cpus[at].rig.drain();
        match *op {
            Op::Access { gva, kind, implicit } => {
                let user = !implicit && self.cpus[at].model.cpl == 3;
                let _ = self.access(at, gva, Attempt { kind, user, implicit });
            }
            Op::Store { gva, target, flags } => {
                let user = self.cpus[at].model.cpl == 3;
                if let Ok(gpa) = self.access(at, gva, Attempt { kind: Kind::Write, user, implicit: false }) {
                    let new = value(target, flags);
                    let cpu = &mut self.cpus[at];
                    let gva = cpu.linear(gva);
                    cpu.rig.store64(gva, new).expect("just translated");
                    self.image.write(gpa, &new.to_le_bytes());
                }
            }
            Op::Entry { page, index, target, flags, width, skew, own } => {
                let gpa = (ARENA + (page << 12) + index * 8).saturating_sub(skew).max(ARENA);
                let entry = value(target, flags).to_le_bytes();
                let bytes = [entry, entry].concat();
                let width = width.min((ARENA + (PAGES << 12) - gpa) as usize);
                let by = if own { Store::Own } else { Store::Device };
                self.store(at, gpa, &bytes[..width], by);
            }
            Op::Dma { page, offset, bytes, target } => {
                let gpa = ARENA + (page << 12) + offset;
                let bytes = bytes.min((ARENA + (PAGES << 12) - gpa) as usize);
                let pattern = if target == 0 { 0 } else { value(target, PWU | A) };
                let data: Vec<u8> = pattern.to_le_bytes().into_iter().cycle().take(bytes).collect();
                self.store(at, gpa, &data, Store::Device);
            }
            Op::Afresh(start) => {
                self.prepare(at);
                self.cpus[at].start(start);
            }
            ref op => {
                let refused = self.cpus[at].register(op, &self.image).is_err();
                self.note(u64::from(refused));
            }
        }
        let cpu = &mut self.cpus[at];
        cpu.rig.drain();
        cpu.agrees();
        if let Err(what) = cpu.rig.mmu.audit() {
            panic!("audit after {op:x?}: {what}");
        }
        cpu.check_fetches();
    }

    /// Stores within pages, as processors and devices report them.
    fn store(&mut self, at: usize, gpa: u64, bytes: &[u8], by: Store) {
        let first = (0x1000 - (gpa & 0xfff)) as usize;
        let (head, tail) = bytes.split_at(first.min(bytes.len()));
        checked::store(&mut self.cpus[at].rig, &mut self.image, gpa, head, by);
        if !tail.is_empty() {
            self.store(at, gpa + first as u64, tail, by);
        }
    }

    fn access(&mut self, at: usize, gva: u64, attempt: Attempt) -> Result<u64, u32> {
        let cpu = &mut self.cpus[at];
        let linear = cpu.linear(gva);
        let machine = cpu.model.machine;
        let fresh = manual::access(&machine, &self.image, linear, attempt).outcome;
        let access = Access {
            kind: [AccessKind::Read, AccessKind::Write, AccessKind::Fetch][attempt.kind as usize],
            user: attempt.user,
            implicit: attempt.implicit,
        };
        let peeked = cpu.rig.mmu.peek(Gva::new(linear), access);
        assert_eq!(peeked.map(|t| t.gpa.raw()).map_err(|f| f.code), fresh.map_err(Some), "peek of {linear:#x}");
        // The fresh outcome is what the accesses below are held to; of what else hardware could answer, only the number counts.
        let stale = cpu.model.stale(linear, attempt);
        self.could_differ += u64::from(stale.iter().any(|&outcome| outcome != fresh));
        let verdict = checked::access(&mut cpu.rig, &machine, &mut self.image, linear, attempt);
        cpu.model.accessed(linear, &verdict);
        if let (Kind::Fetch, false, Ok(gpa)) = (attempt.kind, attempt.implicit, verdict.outcome) {
            cpu.decode(linear, gpa);
        }
        self.allowed += u64::from(verdict.outcome.is_ok());
        self.note(verdict.outcome.unwrap_or_else(|code| u64::from(code) << 56));
        verdict.outcome
    }

    /// The end of a sequence: everybody hears of everything.
    fn finish(&mut self) {
        for cpu in &mut self.cpus {
            cpu.rig.drain();
            cpu.rig.audit();
        }
        checked::same_memory(&self.cpus[0].rig, &self.image, ARENA, (PAGES << 12) as usize);
        let sum = self
            .image
            .bytes(ARENA, (PAGES << 12) as usize)
            .chunks(8)
            .fold(0u64, |sum, bytes| sum.rotate_left(3) ^ bytes.iter().fold(0, |v, &b| v << 8 | u64::from(b)));
        self.note(sum);
    }
}

/// What a decoder does with a page.
fn claim_code(rig: &mut Rig, off: RamOffset) {
    if rig.mmu.watcher().claim(off, PageFlags::CODE) {
        rig.mmu.code_page_changed(off);
    }
}

impl Cpu {
    fn new(rig: Rig) -> Self {
        let cpuid = Cpuid { maxphyaddr: 40, gib_pages: true, pse36: true, amd: false };
        let machine = Machine {
            cr0: 0x31 & !0x20 | 0x20,
            cr3: 0,
            cr4: 0,
            efer: 0,
            pdpte: [0; 4],
            pkru: 0,
            pkrs: 0,
            ac: false,
            cpuid,
        };
        let model = Processor::new(machine, CR4_ALL, 0xd01);
        Self { rig, model, fetches: BTreeMap::new() }
    }

    /// Into a mode, by the host's hand.
    fn start(&mut self, start: Start) {
        let (cr3, cr4, efer) = match start {
            Start::Long => (ARENA, Cr4::PAE, Efer::LME | Efer::LMA | Efer::NXE),
            Start::FiveLevel => (ARENA, Cr4::PAE | Cr4::LA57, Efer::LME | Efer::LMA | Efer::NXE),
            Start::Pae => (PDPT, Cr4::PAE, Efer::NXE),
            Start::TwoLevel => (ARENA, 0, 0),
        };
        let pdpte = [0, 5, 10, 15].map(|page| value(page, P));
        let cr0 = Cr0::PG | Cr0::WP | Cr0::ET | Cr0::PE;
        self.model.far_jump(false);
        self.rig.cs_long = false;
        assert!(self.rig.host_registers(cr0, cr3, cr4, efer, pdpte));
        self.model.host_write(Machine { cr0, cr3, cr4, efer, pdpte, ..self.model.machine });
        self.model.far_jump(true);
        self.rig.cs_long = self.model.cs_long;
    }

    /// A linear address that the mode knows: 32 bits outside 64-bit code, else canonical.
    fn linear(&self, gva: u64) -> u64 {
        let unused = match self.model.machine.form() {
            manual::Form::FourLevel if self.model.cs_long => 16,
            manual::Form::FiveLevel if self.model.cs_long => 7,
            _ => return gva & 0xffff_ffff,
        };
        ((gva << unused) as i64 >> unused) as u64
    }

    /// Both have the same registers.
    fn agrees(&self) {
        let (regs, m) = (&self.rig.regs, &self.model.machine);
        assert_eq!(
            (regs.cr0.raw(), regs.cr3.raw(), regs.cr4.raw(), regs.efer.raw()),
            (m.cr0, m.cr3, m.cr4, m.efer),
            "{regs:x?} and {m:x?}"
        );
        if m.form() == manual::Form::Pae {
            assert_eq!(regs.pdpte, m.pdpte);
        }
    }

    /// Decodes what was fetched, or not: half of the addresses are only looked at.
    fn decode(&mut self, linear: u64, gpa: u64) {
        if let Some(off) = self.rig.mem.map(Gpa::new(gpa).page()).readable().filter(|_| linear & 0x10 != 0) {
            claim_code(&mut self.rig, off);
            self.fetches.insert((self.rig.mmu.fetch_stamp(), linear), gpa);
        }
    }

    /// Every fetch translated under the present stamp is still what the tables say.
    fn check_fetches(&self) {
        let stamp = self.rig.mmu.fetch_stamp();
        for (&(_, gva), &gpa) in self.fetches.range((stamp, 0)..=(stamp, u64::MAX)) {
            let peeked = self.rig.mmu.peek(Gva::new(gva), Access::explicit(AccessKind::Fetch, self.rig.cpl));
            assert_eq!(peeked.map(|t| t.gpa.raw()), Ok(gpa), "fetch of {gva:#x} under stamp {stamp:#x}");
        }
    }

    /// Does `op` in both; they refuse alike.
    fn register(&mut self, op: &Op, image: &Image) -> Result<(), Refused> {
        let (rig, model) = (&mut self.rig, &mut self.model);
        let old = model.machine;
        let (got, expected) = match *op {
            Op::MovCr0(bits) => (rig.cr0(old.cr0 ^ bits), model.mov_cr0(old.cr0 ^ bits, image)),
            Op::MovCr3 { page, bits } => {
                let value = (ARENA + (page << 12)) | bits;
                (rig.cr3(value), model.mov_cr3(value, image))
            }
            Op::MovCr4(bits) => (rig.cr4(old.cr4 ^ bits), model.mov_cr4(old.cr4 ^ bits, image)),
            Op::Efer(bits) => (rig.efer(old.efer ^ bits), model.wrmsr_efer(old.efer ^ bits)),
            Op::Invpcid { kind, pcid, gva } => {
                let done = model.invpcid(kind, pcid, gva);
                if done.is_ok() {
                    rig.mmu.invpcid(kind, pcid as u16, Gva::new(gva));
                }
                return done;
            }
            ref other => {
                self.always(other);
                return Ok(());
            }
        };
        assert_eq!(got.is_err(), expected.is_err(), "{op:x?} with {old:x?}");
        if model.machine.efer & Efer::LMA == 0 {
            model.cs_long = false;
        }
        rig.cs_long = model.cs_long;
        expected
    }

    /// What cannot be refused.
    fn always(&mut self, op: &Op) {
        let (rig, model) = (&mut self.rig, &mut self.model);
        let off = |rig: &Rig, page: u64| rig.mem.map(Gpa::new(ARENA + (page << 12)).page()).readable().expect("RAM");
        match *op {
            Op::FarJump { long } => {
                model.far_jump(long);
                rig.cs_long = model.cs_long;
            }
            Op::View { cpl, ac } => {
                rig.view(cpl, ac);
                (model.cpl, model.machine.ac) = (cpl, ac);
            }
            Op::Pkru(pkru) => {
                rig.mmu.set_pkru(pkru);
                model.machine.pkru = pkru;
            }
            Op::Pkrs(pkrs) => {
                rig.mmu.set_pkrs(pkrs);
                model.machine.pkrs = pkrs;
            }
            Op::Invlpg(gva) => {
                rig.mmu.invlpg(Gva::new(gva));
                model.invlpg(gva);
            }
            Op::HostEfer(bits) => {
                let efer = (model.machine.efer ^ bits) & !Efer::LMA | model.machine.efer & Efer::LMA;
                rig.host_efer(efer);
                model.host_write(Machine { efer, ..model.machine });
            }
            Op::HostRegisters { cr0, cr4, efer, page } => {
                let new = Machine {
                    cr0: model.machine.cr0 ^ cr0,
                    cr3: ARENA + (page << 12),
                    cr4: model.machine.cr4 ^ cr4,
                    efer: model.machine.efer ^ efer,
                    // Given, not read: whatever memory says.
                    pdpte: [page, page + 1, page + 2, page + 3].map(|page| value(page, P)),
                    ..model.machine
                };
                if rig.host_registers(new.cr0, new.cr3, new.cr4, new.efer, new.pdpte) {
                    model.host_write(new);
                }
            }
            Op::Init => {
                rig.init();
                let cr0 = model.machine.cr0 & (Cr0::CD | Cr0::NW) | Cr0::ET;
                model.host_write(Machine { cr0, cr3: 0, cr4: 0, efer: 0, pdpte: [0; 4], ..model.machine });
                // Into protected mode again, where most sequences live.
                rig.cr0(cr0 | Cr0::PE).expect("legal");
                model.machine.cr0 |= Cr0::PE;
            }
            Op::Cpuid { maxphyaddr, gib_pages, amd } => {
                let cpuid = Cpuid { maxphyaddr, gib_pages, amd, ..model.machine.cpuid };
                model.host_write(Machine { cpuid, ..model.machine });
                rig.limits.maxphyaddr = maxphyaddr as u8;
                rig.mmu.set_limits(rig.limits);
                rig.mmu.set_format(Format { gib_pages, amd, ..Format::intel(maxphyaddr as u8) });
            }
            Op::Code { page } => {
                let off = off(rig, page);
                claim_code(rig, off);
            }
            Op::Clean { page } => {
                let off = off(rig, page);
                rig.mmu.watcher().release(off, PageFlags::CODE);
                rig.mmu.clean_page(off);
                self.fetches.retain(|_, gpa| *gpa & !0xfff != ARENA + (page << 12));
            }
            Op::Environment { smm, guest } => rig.mmu.set_environment(smm, guest),
            Op::DropContexts => rig.mmu.drop_all_contexts(),
            Op::DropShadow => rig.mmu.drop_all_shadow(),
            ref other => unreachable!("{other:?}"),
        }
        if model.machine.efer & Efer::LMA == 0 {
            model.cs_long = false;
        }
        rig.cs_long = model.cs_long;
    }
}

fn run(options: MmuOptions, start: Start, cpus: usize, steps: &[(usize, Op)]) -> Run {
    let mut run = Run::new(options, start, cpus);
    for step in steps {
        run.step(step);
    }
    run.finish();
    run
}

fn modes(seed: u64) -> [MmuOptions; 5] {
    [
        MmuOptions::default(),
        MmuOptions { kvm_role: true, ..MmuOptions::default() },
        MmuOptions { mode: MmuMode::UnloadAlways, ..MmuOptions::default() },
        MmuOptions { mode: MmuMode::DropAtRandom(seed), ..MmuOptions::default() },
        MmuOptions { shadow_pages: 16, ..MmuOptions::default() },
    ]
}

/// The same sequences every time, unless the environment says otherwise.
fn config() -> ProptestConfig {
    let mut config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 100;
    }
    if config.rng_seed == RngSeed::Random {
        config.rng_seed = RngSeed::Fixed(0x0075_6d62_7261);
    }
    config
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn every_mode_does_what_the_manual_says(steps in steps(), start in start(), seed in any::<u64>()) {
        let digests = modes(seed).map(|options| run(options, start, 1, &steps).digest);
        prop_assert_eq!(digests, [digests[0]; 5]);
    }

    #[test]
    fn two_processors_do_what_the_manual_says(steps in steps(), start in start(), seed in any::<u64>()) {
        let digests = modes(seed).map(|options| run(options, start, 2, &steps).digest);
        prop_assert_eq!(digests, [digests[0]; 5]);
    }
}

/// Long sequences, always the same.
fn long_sequences() -> Vec<(Start, Vec<(usize, Op)>)> {
    let mut runner = TestRunner::new(config());
    let mut draw = || {
        let steps = prop::collection::vec((0..2usize, op()), 2000).new_tree(&mut runner).expect("no filters").current();
        (start().new_tree(&mut runner).expect("no filters").current(), steps)
    };
    (0..4).map(|_| draw()).collect()
}

#[test]
fn the_other_modes_work_more_and_show_the_same() {
    let sequences = long_sequences();
    let results = modes(3).map(|options| {
        let mut stats = MmuStats::default();
        let digests: Vec<u64> = sequences
            .iter()
            .map(|(start, steps)| {
                let run = run(options, *start, 1, steps);
                stats.add(run.cpus[0].rig.mmu.stats());
                run.digest
            })
            .collect();
        (digests, stats)
    });
    let [(digests, plain), (_, kvm), (_, unload), (_, drop), (_, small)] = &results;
    assert!(results.iter().all(|(other, _)| other == digests));
    assert_eq!((plain.dropped_by_flush, plain.pages_evicted), (0, 0));
    assert!(kvm.roots_built > plain.roots_built, "WP, SMEP and SMAP make more roots");
    assert!(unload.roots_freed > plain.roots_freed && unload.roots_built > plain.roots_built);
    assert!(unload.dropped_by_flush > 0);
    assert!(drop.pages_freed > plain.pages_freed && drop.walks > plain.walks);
    assert!(small.pages_evicted > 0);
}

#[test]
fn long_sequences_live_and_a_tlb_could_often_have_answered_otherwise() {
    for cpus in [1, 2] {
        let (mut accesses, mut allowed, mut could) = (0, 0, 0);
        for (start, steps) in &long_sequences() {
            let run = run(MmuOptions::default(), *start, cpus, steps);
            accesses +=
                steps.iter().filter(|(_, op)| matches!(op, Op::Access { .. } | Op::Store { .. })).count() as u64;
            allowed += run.allowed;
            could += run.could_differ;
        }
        eprintln!("{cpus} processors: {accesses} accesses, {allowed} allowed, {could} with stale outcomes");
        assert!(allowed > accesses / 5 && could > 2, "{accesses} accesses, {allowed} allowed, {could} stale");
    }
}
