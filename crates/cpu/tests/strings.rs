//! Repeated string instructions element by element, against the engine's chunks: registers, memory, the retired
//! count and virtual time, whatever lies behind the addresses and whatever the MMU has cached.

mod bus;
mod long_mode;

use long_mode::{DATA, Guest};
use proptest::prelude::*;
use umbra_arch::rflags;
use umbra_cpu::EngineOptions;
use umbra_mmu::{MmuMode, MmuOptions};

const PAGE: u64 = 4096;
/// What the guest maps.
const MAPPED: u64 = 4 << 20;
/// No RAM: reads give ones, writes vanish.
const HOLE: std::ops::Range<u64> = 0xa_0000..0xc_0000;
/// Holds a page table, of which the guest needs the first two entries.
const TABLE: u64 = 0x3000;
/// Holds code that has run.
const RUN_CODE: u64 = 0x21_0000;
/// Has served as a page table: the first stores end that it is watched.
const USED_TABLE: u64 = 0x22_0000;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Movs,
    Stos,
    Lods,
    Cmps,
    Scas,
}

impl Kind {
    fn opcode(self) -> u8 {
        match self {
            Kind::Movs => 0xa4,
            Kind::Stos => 0xaa,
            Kind::Lods => 0xac,
            Kind::Cmps => 0xa6,
            Kind::Scas => 0xae,
        }
    }
    fn reads_source(self) -> bool {
        matches!(self, Kind::Movs | Kind::Lods | Kind::Cmps)
    }
    fn has_target(self) -> bool {
        self != Kind::Lods
    }
    fn compares(self) -> bool {
        matches!(self, Kind::Cmps | Kind::Scas)
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    kind: Kind,
    bytes: u64,
    repne: bool,
    down: bool,
    source: u64,
    target: u64,
    count: u64,
    value: u64,
}

impl Case {
    fn code(&self) -> Vec<u8> {
        let mut code = vec![if self.repne { 0xf2 } else { 0xf3 }];
        match self.bytes {
            2 => code.insert(0, 0x66),
            8 => code.push(0x48),
            _ => {}
        }
        code.push(self.kind.opcode() + u8::from(self.bytes > 1));
        code
    }
}

/// The architecture's element by element, with the chunks' definition written out.
struct Model {
    memory: Vec<u8>,
    rax: u64,
    rsi: u64,
    rdi: u64,
    rcx: u64,
    zf: Option<bool>,
    written: std::ops::Range<u64>,
    chunks: u64,
    ticks: u64,
}

impl Model {
    fn load(&self, at: u64, bytes: u64) -> u64 {
        (0..bytes).rev().fold(0, |v, i| v << 8 | u64::from(self.memory[(at + i) as usize]))
    }

    fn store(&mut self, at: u64, bytes: u64, value: u64) {
        for i in 0..bytes {
            if !HOLE.contains(&(at + i)) {
                self.memory[(at + i) as usize] = (value >> (8 * i)) as u8;
            }
        }
        self.written = self.written.start.min(at)..self.written.end.max(at + bytes);
    }

    fn element(&mut self, c: &Case) {
        let mask = u64::MAX >> (64 - 8 * c.bytes);
        match c.kind {
            Kind::Movs => self.store(self.rdi, c.bytes, self.load(self.rsi, c.bytes)),
            Kind::Stos => self.store(self.rdi, c.bytes, self.rax),
            Kind::Lods => {
                let keep = if c.bytes >= 4 { 0 } else { self.rax & !mask };
                self.rax = keep | self.load(self.rsi, c.bytes);
            }
            Kind::Cmps => self.zf = Some(self.load(self.rsi, c.bytes) == self.load(self.rdi, c.bytes)),
            Kind::Scas => self.zf = Some(self.rax & mask == self.load(self.rdi, c.bytes)),
        }
        let step = if c.down { c.bytes.wrapping_neg() } else { c.bytes };
        if c.kind.reads_source() {
            self.rsi = self.rsi.wrapping_add(step);
        }
        if c.kind.has_target() {
            self.rdi = self.rdi.wrapping_add(step);
        }
        self.rcx -= 1;
    }

    fn run(&mut self, c: &Case) {
        while self.rcx != 0 {
            let (rsi, rdi) = (self.rsi, self.rdi);
            let mut elements = 0;
            let decided = loop {
                self.element(c);
                elements += 1;
                let stays = |now: u64, first: u64| {
                    now / PAGE == first / PAGE && (c.down || (now + c.bytes - 1) / PAGE == first / PAGE)
                };
                let decided = c.kind.compares() && self.zf == Some(c.repne);
                let leaves =
                    c.kind.reads_source() && !stays(self.rsi, rsi) || c.kind.has_target() && !stays(self.rdi, rdi);
                if decided || leaves || self.rcx == 0 {
                    break decided;
                }
            };
            self.chunks += 1;
            self.ticks += match c.kind {
                Kind::Movs | Kind::Stos => (elements * c.bytes).div_ceil(8),
                _ => elements,
            };
            if decided {
                return;
            }
        }
    }
}

fn case() -> impl Strategy<Value = Case> {
    let kind = prop_oneof![Just(Kind::Movs), Just(Kind::Stos), Just(Kind::Lods), Just(Kind::Cmps), Just(Kind::Scas)];
    let place = || {
        prop_oneof![
            3 => DATA..DATA + 0x4000,
            2 => 0x8_0000u64..0x8_4000,
            // Two megabytes apart: the same slots of the MMU's tables.
            2 => (DATA + 0x8_0000)..DATA + 0x8_4000,
            1 => HOLE.start - 0x800..HOLE.start + 0x1800,
            1 => RUN_CODE - 0x800..RUN_CODE + 0x800,
            1 => USED_TABLE - 0x800..USED_TABLE + 0x800,
        ]
    };
    let target = prop_oneof![4 => place(), 1 => TABLE + 0x100..TABLE + 0x180];
    let count = prop_oneof![0u64..20, 0u64..1200];
    (kind, 0u32..4, any::<bool>(), any::<bool>(), place(), target, count, 0u8..3, -40i64..40).prop_map(
        |(kind, log, repne, down, source, target, count, value, near)| {
            let bytes = 1 << log;
            let in_table = (TABLE..TABLE + PAGE).contains(&target);
            // Overlapping operands, sometimes.
            let target = if near & 3 == 0 && !in_table { source.wrapping_add_signed(near) } else { target };
            Case {
                kind,
                bytes,
                repne,
                down: down && !in_table,
                source,
                target,
                count: if in_table { count.min(0x600 >> log) } else { count },
                value: u64::from(value) * 0x0101_0101_0101_0101,
            }
        },
    )
}

/// Runs `c` and compares everything with the model.
fn check(options: &EngineOptions, c: &Case) {
    let mut g = Guest::with(options);
    g.write(RUN_CODE, &[0xf4]);
    // Run it once: MOV EAX, imm32; JMP RAX.
    let mut jump = vec![0xb8];
    jump.extend((RUN_CODE as u32).to_le_bytes());
    jump.extend([0xff, 0xe0]);
    g.run_bytes(&jump);
    // The table maps a page behind all others: mov rax, [0x400000]
    g.write(TABLE + 16, &(USED_TABLE | 7).to_le_bytes());
    g.write(USED_TABLE, &(DATA | 7).to_le_bytes());
    assert_eq!(g.run_bytes(&[0x48, 0x8b, 0x04, 0x25, 0, 0, 0x40, 0]), None);
    // Few different values, long equal runs.
    let pattern: Vec<u8> = (0..0x1_0000u64).map(|i| (i / 700 % 2) as u8).collect();
    for at in [DATA - 0x4000, 0x7_c000, DATA + 0x7_c000, RUN_CODE] {
        g.write(at, &pattern[..0xc000]);
    }
    let mut memory = vec![0; MAPPED as usize];
    g.mem.read(umbra_arch::Gpa::new(0), &mut memory);
    let (rax, rsi, rdi, rcx) = (c.value, c.source, c.target, c.count);
    let written = std::ops::Range { start: MAPPED, end: 0 };
    let mut model = Model { memory, rax, rsi, rdi, rcx, zf: None, written, chunks: 0, ticks: 0 };
    model.run(c);

    (g.s.gpr[0], g.s.gpr[6], g.s.gpr[7], g.s.gpr[1]) = (rax, rsi, rdi, rcx);
    g.s.rflags = rflags::FIXED | if c.down { rflags::DF } else { 0 };
    let before = g.retired();
    assert_eq!(g.run_bytes(&c.code()), None);
    let got = (g.s.gpr[0], g.s.gpr[6], g.s.gpr[7], g.s.gpr[1]);
    assert_eq!(got, (model.rax, model.rsi, model.rdi, model.rcx));
    if let Some(zf) = model.zf {
        assert_eq!(g.s.rflags & rflags::ZF != 0, zf);
    }
    for at in model.written.clone() {
        assert_eq!(g.read::<1>(at)[0], if HOLE.contains(&at) { 0xff } else { model.memory[at as usize] }, "{at:#x}");
    }
    // One with the HLT; RCX = 0 takes a tick as well.
    assert_eq!(g.retired() - before, model.chunks.max(1) + 1, "retired");
    assert_eq!(g.took, model.ticks.max(1) + 1, "ticks");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn chunks_are_elements(c in case()) {
        check(&EngineOptions::default(), &c);
    }

    #[test]
    fn chunks_do_not_depend_on_caches(c in case(), seed in any::<u64>()) {
        check(&EngineOptions { mmu: MmuOptions { mode: MmuMode::DropAtRandom(seed), ..MmuOptions::default() } }, &c);
    }
}

#[test]
fn a_fault_keeps_what_was_done_and_its_time() {
    // STOSB up to the end of what is mapped, and one more.
    let mut g = Guest::new();
    (g.s.gpr[7], g.s.gpr[1]) = (MAPPED - 100, 1000);
    assert_eq!(g.run_bytes(&[0xf3, 0xaa]), Some(umbra_arch::fault::vector::PF));
    assert_eq!((g.s.gpr[7], g.s.gpr[1], g.s.cr2), (MAPPED, 900, MAPPED));
    // 13 for 100 bytes, the delivery, the handler's HLT.
    assert_eq!(g.took, 13 + 1 + 1);
}

#[test]
fn single_steps_come_between_elements() {
    let mut g = Guest::new();
    (g.s.gpr[7], g.s.gpr[1]) = (DATA, 5);
    g.s.rflags |= rflags::TF;
    assert_eq!(g.run_bytes(&[0xf3, 0xaa]), Some(umbra_arch::fault::vector::DB));
    assert_eq!((g.s.gpr[7], g.s.gpr[1]), (DATA + 1, 4));
}

#[test]
fn operands_that_share_a_slot_are_translated_once_a_page() {
    let mut g = Guest::new();
    let pages = 64;
    (g.s.gpr[6], g.s.gpr[7], g.s.gpr[1]) = (0x2_0000, DATA + 0x2_0000, pages * PAGE);
    let refills = |g: &Guest| g.mmu_stats().refills;
    let before = refills(&g);
    assert_eq!(g.run_bytes(&[0xf3, 0xa4]), None);
    let spent = refills(&g) - before;
    assert!((2 * pages..=2 * pages + 8).contains(&spent), "{spent} refills for {pages} pages");
}
