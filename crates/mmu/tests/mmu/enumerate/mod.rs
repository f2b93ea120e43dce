//! The enumerating test: leaf bits x bits of one upper level x CR0.WP, SMEP, SMAP with AC, NXE, protection keys x kinds
//! of access, in every form of paging and page size, against the manual's predictor. Nothing is ever invalidated and
//! all caches live on between cases, so an entry that went stale is caught.
//!
//! Pruned by these equivalences; what they leave out is drawn at random for each block:
//! - an entry that is not present means nothing else: one case of it, with random other bits;
//! - AC counts only with SMAP set;
//! - PKRU and PKRS count only with their CR4 bit set and in 4- and 5-level paging; both take the same rights at a time,
//!   since a page is either a user's or the supervisor's;
//! - all reserved bits are alike, as are all ignored bits, the 16 keys, and the levels that aren't varied;
//! - G, PWT, PCD and PAT have no say in an outcome.
//!
//! `cargo test` takes a window of every block. `UMBRA_ENUMERATE=0..` runs everything, `UMBRA_ENUMERATE=100..200` the
//! blocks of one share; both say how far they are, so that a run can be taken up again.

mod plan;

use crate::checked::{self, Image, Store};
use crate::manual::{Attempt, Cpuid, Machine};
use crate::support::*;
use plan::*;
use std::ops::Range;
use std::time::Instant;
use umbra_arch::control::{Cr0, Cr4, Efer};
use umbra_mmu::format::Format;
use umbra_mmu::{MmuMode, MmuOptions};

/// Cases of a block that the short run takes.
const WINDOW: u64 = 1536;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }
    fn of<T: std::marker::Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

/// The processor under test, and what it does at present.
struct Run {
    rig: Rig,
    image: Image,
    machine: Machine,
    random: Random,
    plan: Plan,
    /// Ignored and free bits of each slot's leaf and of the upper entries.
    leaf_noise: [u64; SLOTS as usize],
    upper_noise: u64,
    reserved: u64,
    cases: u64,
    accesses: u64,
    /// Over all outcomes, in order.
    digest: u64,
    /// Outcomes by error code; 0 counts what is allowed and what is just not present.
    by_code: [u64; 64],
}

impl Run {
    fn new(options: MmuOptions) -> Self {
        let cpuid = Cpuid { maxphyaddr: 40, gib_pages: true, pse36: true, amd: false };
        let machine = Machine { cr0: 0, cr3: 0, cr4: 0, efer: 0, pdpte: [0; 4], pkru: 0, pkrs: 0, ac: false, cpuid };
        Run {
            rig: Rig::with(options),
            image: Image::new(),
            machine,
            random: Random(1),
            plan: plans()[0],
            leaf_noise: [0; SLOTS as usize],
            upper_noise: 0,
            reserved: 0,
            cases: 0,
            accesses: 0,
            digest: 0,
            by_code: [0; 64],
        }
    }

    /// Another form of paging, by way of paging off; tables and caches stay.
    fn enter(&mut self, mode: Mode) {
        let rig = &mut self.rig;
        rig.set_cr0(Cr0::PG, false);
        let long = matches!(mode, Mode::Long { .. });
        rig.set_cr4(Cr4::PAE, !mode.is_short());
        rig.set_cr4(Cr4::PSE, mode == Mode::TwoLevel { pse: true });
        rig.set_cr4(Cr4::LA57, mode == Mode::Long { levels: 5 });
        rig.efer(if long { Efer::LME } else { 0 }).expect("paging is off");
        let root = if mode == Mode::Pae { PDPTES } else { mode.table(mode.top()) };
        rig.cr3(root).expect("legal");
        rig.set_cr0(Cr0::PG, true);
    }

    fn start(&mut self, plan: Plan, block: u64) {
        self.random = Random(block.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let maxphyaddr = self.random.of(&[36, 40, 46, 52]);
        let (gib_pages, amd) = (self.random.below(4) != 0, self.random.below(4) == 0);
        let cpuid = Cpuid { maxphyaddr, gib_pages, pse36: true, amd };
        if cpuid != self.machine.cpuid {
            self.machine.cpuid = cpuid;
            self.rig.mmu.set_format(Format { gib_pages, amd, ..Format::intel(maxphyaddr as u8) });
        }
        let same_mode = block != 0 && plan.mode == self.plan.mode;
        self.plan = plan;
        for i in 0..4 {
            let table = if i == 1 { PD } else { PT };
            self.put(PDPTES + 8 * i, 8, table | P);
        }
        self.draw_noise();
        for level in plan.page + 1..=plan.mode.top() {
            let accessed = self.random.of(&[0, A]);
            let link = self.upper(level, Bits { flags: PWU | accessed, reserved: 0 });
            self.put(plan.mode.entry(plan.page, level, 0), plan.mode.bytes(), link);
        }
        if !same_mode {
            self.enter(plan.mode);
        }
    }

    fn draw_noise(&mut self) {
        let plan = self.plan;
        let random = &mut self.random;
        let long = matches!(plan.mode, Mode::Long { .. });
        for noise in &mut self.leaf_noise {
            // PWT, PCD, G, AVL; PAT where it is no PS.
            *noise = random.next() & (0xf18 | if plan.page == 1 { PS } else { 0 });
            if long {
                // Bits 58:52 and the key.
                *noise |= random.next() & 0x7ff << 52;
            }
        }
        self.upper_noise = random.next() & (0x018 | 0xe00 | if long { 0x7ff << 52 } else { 0 });
        let high = match plan.mode {
            Mode::Pae => 62,
            _ => 51,
        };
        let low = self.machine.cpuid.maxphyaddr;
        // With 52 address bits there is no such bit in the long formats: then the class is one more plain one.
        self.reserved = if low > high { 0 } else { 1 << (u64::from(low) + random.below(u64::from(high - low) + 1)) };
    }

    /// The page that a slot maps: RAM, a table, the video hole, addresses without memory.
    fn frame(&self, slot: u64) -> u64 {
        match (self.plan.mode.shift(self.plan.page), slot) {
            (12, 6) => PT,
            (12, 7) => 0xa_0000,
            (12, _) => 0x20_0000 + (slot << 12),
            (21 | 22, 0..=3) => (1 + slot % 3) << 21 & !((1 << self.plan.mode.shift(self.plan.page)) - 1),
            (21 | 22, _) => slot << 22,
            (shift, _) => (slot / 2) << shift,
        }
    }

    fn leaf(&mut self, slot: u64, bits: Bits) -> u64 {
        let mut entry = bits.flags | self.leaf_noise[slot as usize];
        if bits.flags & P == 0 {
            return self.absent();
        }
        entry |= self.frame(slot);
        if self.plan.page > 1 {
            entry |= PS;
        }
        entry
            | match (bits.reserved, self.plan.mode) {
                (0, _) => 0,
                (1, _) => self.reserved,
                (_, Mode::TwoLevel { .. }) => 1 << 21,
                _ => 1 << (13 + self.random.below(u64::from(self.plan.mode.shift(self.plan.page)) - 13)),
            }
    }

    fn upper(&mut self, level: u32, bits: Bits) -> u64 {
        if bits.flags & P == 0 {
            return self.absent();
        }
        let table = self.plan.mode.table(level - 1);
        let reserved = match bits.reserved {
            0 => 0,
            1 => self.reserved,
            _ => PS,
        };
        bits.flags | self.upper_noise | table | reserved
    }

    /// Random bits without P.
    fn absent(&mut self) -> u64 {
        let bits = self.random.next() & self.random.next() & !P;
        if self.plan.mode.is_short() { bits & 0xffff_ffff } else { bits }
    }

    /// Stores an entry if it says something else, in one of the ways that guests and devices do.
    fn put(&mut self, gpa: u64, width: usize, value: u64) {
        let new = value.to_le_bytes();
        let old: Vec<u8> = self.image.bytes(gpa, width).to_vec();
        if old == new[..width] {
            return;
        }
        let by = self.random.of(&[Store::Device, Store::Own]);
        let step = self.random.of(&[width, width, width, 1, 2, 4]);
        for at in (0..width).step_by(step).filter(|&at| old[at..at + step] != new[at..at + step]) {
            checked::store(&mut self.rig, &mut self.image, gpa + at as u64, &new[at..at + step], by);
        }
    }

    fn select(&mut self, control: &Control) {
        let rig = &mut self.rig;
        let keys = control.keys.is_some();
        let cr4 = [(Cr4::SMEP, control.smep), (Cr4::SMAP, control.smap), (Cr4::PKE, keys), (Cr4::PKS, keys)];
        let cr4 = cr4.into_iter().fold(rig.regs.cr4.raw(), |cr4, (bit, on)| if on { cr4 | bit } else { cr4 & !bit });
        if cr4 != rig.regs.cr4.raw() {
            rig.cr4(cr4).expect("legal");
        }
        if control.wp != rig.regs.cr0.wp() {
            rig.set_cr0(Cr0::WP, control.wp);
        }
        if control.nxe != rig.regs.efer.nxe() {
            rig.set_nxe(control.nxe);
        }
        // Without keys in force the registers deny everything.
        let rights = control.keys.unwrap_or(3) * 0x5555_5555;
        if rights != self.machine.pkru {
            rig.mmu.set_pkru(rights);
            rig.mmu.set_pkrs(rights);
            (self.machine.pkru, self.machine.pkrs) = (rights, rights);
        }
        self.machine.ac = control.ac;
    }

    fn attempt(&mut self, slot: u64, attempt: Attempt) {
        let regs = self.rig.regs;
        let machine = Machine {
            cr0: regs.cr0.raw(),
            cr3: regs.cr3.raw(),
            cr4: regs.cr4.raw(),
            efer: regs.efer.raw(),
            pdpte: regs.pdpte,
            ..self.machine
        };
        let cpl = if attempt.user || attempt.implicit && slot & 1 != 0 { 3 } else { 0 };
        self.rig.view(cpl, machine.ac);
        let offset = self.random.next() & ((1 << self.plan.mode.shift(self.plan.page)) - 1);
        // Two 4 KiB pages of a large one, so that both are met again.
        let linear = self.plan.mode.linear(self.plan.page, slot)
            | offset & 0x1fff & ((1 << self.plan.mode.shift(self.plan.page)) - 1);
        let verdict = checked::access(&mut self.rig, &machine, &mut self.image, linear, attempt);
        let outcome = verdict.outcome.unwrap_or_else(|code| u64::from(code) << 56);
        self.digest = (self.digest.rotate_left(5) ^ outcome).wrapping_mul(0x0100_0000_01b3);
        self.by_code[verdict.outcome.err().unwrap_or(0) as usize] += 1;
        self.accesses += 1;
    }

    fn case(&mut self, upper: Bits, leaf: Bits, control: &Control, attempt: Attempt) {
        self.select(control);
        let plan = self.plan;
        match plan.varied {
            0 => {}
            3 if plan.mode == Mode::Pae => self.pdpte(upper),
            level => {
                let entry = self.upper(level, upper);
                self.put(plan.mode.entry(plan.page, level, 0), plan.mode.bytes(), entry);
            }
        }
        let slot = self.random.below(SLOTS);
        let entry = self.leaf(slot, leaf);
        self.put(plan.mode.entry(plan.page, plan.page, slot), plan.mode.bytes(), entry);
        self.attempt(slot, attempt);
        self.cases += 1;
        // Whatever another page still says.
        if self.random.below(4) == 0 {
            let (slot, attempt) = (self.random.below(SLOTS), self.random.of(&ATTEMPTS));
            self.attempt(slot, attempt);
        }
    }

    /// PDPTEs count from the next load of CR3 on.
    fn pdpte(&mut self, upper: Bits) {
        let old = self.rig.regs.pdpte[1];
        self.put(PDPTES + 8, 8, PD | upper.flags);
        if old != PD | upper.flags {
            self.rig.cr3(PDPTES).expect("legal");
        }
    }

    /// One block's cases, or those of `window`. The digit that changes fastest differs from block to block.
    fn block(&mut self, plan: Plan, index: usize, number: u64, window: Option<u64>) {
        let (leaves, uppers, controls) = (plan.leaves(), plan.uppers(), plan.controls());
        self.start(plan, number);
        // Digits, slowest first.
        let (us, ls, order): (Vec<Bits>, Vec<Bits>, [usize; 4]) = match leaves.get(index) {
            Some(&leaf) => {
                let us = uppers.into_iter().enumerate().filter(|(i, _)| i % 5 != 4).map(|(_, u)| u).collect();
                (us, vec![leaf], [[1, 0, 2, 3], [1, 2, 0, 3], [1, 0, 3, 2], [1, 2, 3, 0]][index % 4])
            }
            None => (vec![uppers[(index - leaves.len()) * 5 + 4]], leaves, [2, 3, 0, 1]),
        };
        let radix = [us.len() as u64, ls.len() as u64, controls.len() as u64, ATTEMPTS.len() as u64];
        let total: u64 = radix.iter().product();
        let range = match window {
            Some(cases) if cases < total => {
                let from = self.random.below(total - cases);
                from..from + cases
            }
            _ => 0..total,
        };
        for case in range {
            let mut digit = [0; 4];
            let mut rest = case;
            for &d in order.iter().rev() {
                digit[d] = (rest % radix[d]) as usize;
                rest /= radix[d];
            }
            self.case(us[digit[0]], ls[digit[1]], &controls[digit[2]], ATTEMPTS[digit[3]]);
        }
        self.rig.audit();
        checked::same_memory(&self.rig, &self.image, PT, TABLE_BYTES);
    }
}

/// All blocks, plans taking turns so that forms of paging alternate over the same tables.
fn blocks() -> Vec<(Plan, usize)> {
    let plans = plans();
    let most = plans.iter().map(Plan::blocks).max().unwrap_or(0);
    (0..most).flat_map(|index| plans.iter().filter(move |p| index < p.blocks()).map(move |&p| (p, index))).collect()
}

/// The share of blocks that the environment asks for.
fn asked(all: usize) -> Option<Range<usize>> {
    let text = std::env::var("UMBRA_ENUMERATE").ok()?;
    let (from, to) = text.split_once("..").expect("UMBRA_ENUMERATE=FROM..TO");
    let number = |text: &str, default| if text.is_empty() { default } else { text.parse().expect("a block's number") };
    Some(number(from, 0)..number(to, all).min(all))
}

#[test]
fn every_combination_is_as_the_manual_says() {
    let blocks = blocks();
    let (share, window) = match asked(blocks.len()) {
        Some(share) => (share, None),
        None => (0..blocks.len(), Some(WINDOW)),
    };
    let mut run = Run::new(MmuOptions::default());
    let start = Instant::now();
    for number in share.clone() {
        let (plan, index) = blocks[number];
        run.block(plan, index, number as u64, window);
        if window.is_none() && number % 50 == 49 {
            let rate = run.accesses as f64 / start.elapsed().as_secs_f64();
            eprintln!(
                "blocks {}..{} of {} done: {} cases, {} accesses, {rate:.0} a second",
                share.start,
                number + 1,
                blocks.len(),
                run.cases,
                run.accesses,
            );
        }
    }
    eprintln!("{} cases, {} accesses, digest {:016x}", run.cases, run.accesses, run.digest);
    if share == (0..blocks.len()) {
        // P, W, U, RSVD, I and PK as they can meet: not RSVD with PK, and neither W nor PK with I.
        let possible = |code: &usize| match code {
            code if code & 1 == 0 => code & 0x28 == 0 && code & 0x12 != 0x12,
            code => code & 0x28 != 0x28 && code & 0x12 != 0x12 && code & 0x30 != 0x30,
        };
        let seen: Vec<usize> = (0..64).filter(|&code| run.by_code[code] > 100).collect();
        assert_eq!(seen, (0..64).filter(possible).collect::<Vec<_>>(), "each code, and no other");
    }
    assert!(run.cases as usize >= 100 * share.len());
    // Caches did live on: most accesses were answered without a walk.
    assert!(run.rig.mmu.stats().walks < run.accesses);
}

#[test]
fn every_mode_gives_the_same_answers() {
    let blocks = blocks();
    let digest = |options| {
        let mut run = Run::new(options);
        for (number, &(plan, index)) in blocks.iter().enumerate().step_by(7) {
            run.block(plan, index, number as u64, Some(64));
        }
        run.digest
    };
    let expected = digest(MmuOptions::default());
    for options in [
        MmuOptions { kvm_role: true, ..MmuOptions::default() },
        MmuOptions { mode: MmuMode::UnloadAlways, ..MmuOptions::default() },
        MmuOptions { mode: MmuMode::DropAtRandom(7), ..MmuOptions::default() },
        MmuOptions { shadow_pages: 16, ..MmuOptions::default() },
    ] {
        assert_eq!(digest(options), expected, "{options:?}");
    }
}

#[test]
fn the_predictor_shares_nothing_with_what_it_judges() {
    for (source, may_use) in [(include_str!("../manual.rs"), ""), (include_str!("../processor.rs"), "crate::manual::")]
    {
        for line in source.lines().filter(|line| !line.trim_start().starts_with("//")) {
            let used = line.trim_start().strip_prefix("use ");
            let own = used.is_none_or(|path| !may_use.is_empty() && path.starts_with(may_use));
            assert!(own && !line.contains("umbra"), "{line}");
        }
    }
}
