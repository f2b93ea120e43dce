//! Every control-register write over all bit combinations that matter, against a predictor that is a
//! list of the manual's rules and shares no code with the implementation.

mod host;
mod predictor;

use predictor::*;
use proptest::prelude::*;
use umbra_arch::Fault;
use umbra_arch::control::{CodeContext, ControlLimits, ControlRegs, Cr0, Cr3, Cr4, Efer, FlushScope};

struct Cr0Case {
    old: u64,
    value: u64,
    cr4: u64,
    efer: u64,
    cs_long: bool,
    tss16: bool,
    table: Table,
}

impl Cr0Case {
    fn rises(&self) -> bool {
        self.old & bit(31) == 0 && self.value & bit(31) != 0
    }
    fn loads_pdptes(&self) -> bool {
        let pae_paging_after = self.value & bit(31) != 0
            && self.cr4 & bit(5) != 0
            && self.efer & bit(10) == 0
            && !(self.rises() && self.efer & bit(8) != 0);
        pae_paging_after && (self.old ^ self.value) & (bit(31) | bit(30) | bit(29)) != 0
    }
}

#[test]
fn cr0() {
    let mut rules = rules::<Cr0Case>(&[
        ("bits 63:32", |c| c.value >= bit(32)),
        ("PG without PE", |c| c.value & bit(31) != 0 && c.value & bit(0) == 0),
        ("NW without CD", |c| c.value & bit(29) != 0 && c.value & bit(30) == 0),
        ("LME without PAE", |c| c.rises() && c.efer & bit(8) != 0 && c.cr4 & bit(5) == 0),
        ("long mode entered from CS.L", |c| c.rises() && c.efer & bit(8) != 0 && c.cs_long),
        ("long mode entered with a 16-bit TSS", |c| c.rises() && c.efer & bit(8) != 0 && c.tss16),
        ("bad PDPTE", |c| c.loads_pdptes() && matches!(c.table, Table::Bad(_))),
        ("PG cleared in 64-bit code", |c| c.value & bit(31) == 0 && c.efer & bit(10) != 0 && c.cs_long),
        ("PG clear with PCIDE", |c| c.value & bit(31) == 0 && c.cr4 & bit(17) != 0),
        ("WP clear with CET", |c| c.value & bit(16) == 0 && c.cr4 & bit(23) != 0),
    ]);
    let mut cases = 0u64;
    for old in combinations(&[0, 16, 29, 30, 31]) {
        for cr4 in combinations(&[5, 17, 23]) {
            for efer in combinations(&[8, 10]).filter(|e| e & bit(10) == 0 || old & bit(31) != 0) {
                for value in combinations(&[0, 1, 16, 29, 30, 31, 40]) {
                    for code in 0..4u8 {
                        for table in TABLES {
                            let (cs_long, tss16) = (code & 1 != 0, code & 2 != 0);
                            let case = Cr0Case { old, value, cr4, efer, cs_long, tss16, table };
                            check_cr0(&case, &mut rules);
                            cases += 1;
                        }
                    }
                }
            }
        }
    }
    assert!(cases > 500_000);
    each_rule_mattered(&rules);
}

fn check_cr0(c: &Cr0Case, rules: &mut [Rule<Cr0Case>]) {
    let regs = ControlRegs {
        cr0: Cr0::new(c.old | bit(4)),
        cr3: Cr3::new(0x1234_5678_9abc),
        cr4: Cr4::new(c.cr4),
        efer: Efer::new(c.efer),
        pdpte: [7; 4],
    };
    let code = CodeContext { cs_long: c.cs_long, tss16: c.tss16 };
    let (result, reads) = observe(&regs, c.table, |r, read| r.write_cr0(c.value, code, &limits(), read));
    let what = || format!("CR0 {:#x} -> {:#x}, CR4 {:#x}, EFER {:#x}, {code:?}", c.old, c.value, c.cr4, c.efer);
    if judge(rules, c) {
        assert_eq!(result, Err(Fault::GP0), "{}", what());
        return;
    }
    let effects = result.unwrap_or_else(|f| panic!("{f}: {}", what()));
    let lma = match (c.old >> 31 & 1, c.value >> 31 & 1) {
        (_, 0) => 0,
        (0, _) => c.efer << 2 & bit(10),
        _ => c.efer & bit(10),
    };
    let loads = c.loads_pdptes();
    let expected = ControlRegs {
        cr0: Cr0::new(c.value | bit(4)),
        efer: Efer::new(c.efer & !bit(10) | lma),
        pdpte: if loads { c.table.entries() } else { [7; 4] },
        ..regs
    };
    assert_eq!(effects.regs, expected, "{}", what());
    assert_eq!(effects.pdptes_loaded, loads, "{}", what());
    assert_eq!(reads, if loads { vec![0x5678_9aa0] } else { vec![] }, "{}", what());
    let falls = c.old & bit(31) != 0 && c.value & bit(31) == 0;
    assert_eq!(gone(effects.flush), if falls { 0x3f } else { 0 }, "{}", what());
}

#[test]
fn cr0_ignores_undefined_low_bits() {
    for n in [6, 7, 8, 12, 15, 17, 19, 28] {
        let effects = ControlRegs::default()
            .write_cr0(bit(n), CodeContext::default(), &limits(), &mut |_| [0; 4])
            .expect("reserved low bits are ignored");
        assert_eq!(effects.regs.cr0.raw(), bit(4), "bit {n}");
    }
}

struct Cr4Case {
    old: u64,
    value: u64,
    pg: bool,
    wp: bool,
    lma: bool,
    cr3_low: u64,
    table: Table,
}

impl Cr4Case {
    fn changed(&self, n: u32) -> bool {
        (self.old ^ self.value) & bit(n) != 0
    }
    fn set(&self, n: u32) -> bool {
        self.value & bit(n) != 0
    }
    fn loads_pdptes(&self) -> bool {
        self.pg && !self.lma && self.set(5) && [4, 5, 7, 20].iter().any(|&n| self.changed(n))
    }
    /// The union of what each rule makes stale.
    fn gone(&self) -> Gone {
        let pcid = if self.old & bit(17) != 0 { self.cr3_low as u16 } else { 0 };
        let current = entry(pcid, false) | entry(pcid, true);
        let everything = 0x3f;
        let mut gone = 0;
        for (applies, what) in [
            (self.changed(7), everything),
            (self.changed(17) && !self.set(17), everything),
            (self.changed(5), current),
            (self.changed(20) && self.set(20), current),
        ] {
            gone |= if applies { what } else { 0 };
        }
        gone
    }
}

#[test]
fn cr4() {
    let mut rules = rules::<Cr4Case>(&[
        ("PAE clear in long mode", |c| c.lma && !c.set(5)),
        ("LA57 changed in long mode", |c| c.lma && c.changed(12)),
        ("PCIDE set outside long mode", |c| c.changed(17) && c.set(17) && !c.lma),
        ("PCIDE set with CR3[11:0] not 0", |c| c.changed(17) && c.set(17) && c.cr3_low != 0),
        ("CET without WP", |c| c.set(23) && !c.wp),
        ("bad PDPTE", |c| c.loads_pdptes() && matches!(c.table, Table::Bad(_))),
    ]);
    let bits = [4, 5, 7, 12, 17, 20, 21, 23];
    for (old, value) in combinations(&bits).flat_map(|old| combinations(&bits).map(move |value| (old, value))) {
        for (pg, lma) in [(false, false), (true, false), (true, true)] {
            for wp in [false, true] {
                for cr3_low in [0, u64::from(CURRENT)] {
                    for table in TABLES {
                        check_cr4(&Cr4Case { old, value, pg, wp, lma, cr3_low, table }, &mut rules);
                    }
                }
            }
        }
    }
    each_rule_mattered(&rules);
}

fn check_cr4(c: &Cr4Case, rules: &mut [Rule<Cr4Case>]) {
    let cr0 = u64::from(c.pg) << 31 | u64::from(c.wp) << 16 | 0x11;
    let regs = ControlRegs {
        cr0: Cr0::new(cr0),
        cr3: Cr3::new(0x7000 | c.cr3_low),
        cr4: Cr4::new(c.old),
        efer: Efer::new(if c.lma { 0x500 } else { 0 }),
        pdpte: [7; 4],
    };
    let (result, reads) = observe(&regs, c.table, |r, read| r.write_cr4(c.value, &limits(), read));
    let what = || format!("CR4 {:#x} -> {:#x}, {regs:x?}", c.old, c.value);
    if judge(rules, c) {
        assert_eq!(result, Err(Fault::GP0), "{}", what());
        return;
    }
    let effects = result.unwrap_or_else(|f| panic!("{f}: {}", what()));
    let loads = c.loads_pdptes();
    let pdpte = if loads { c.table.entries() } else { [7; 4] };
    assert_eq!(effects.regs, ControlRegs { cr4: Cr4::new(c.value), pdpte, ..regs }, "{}", what());
    assert_eq!((effects.pdptes_loaded, reads.len()), (loads, usize::from(loads)), "{}", what());
    assert_eq!(gone(effects.flush), c.gone(), "{}", what());
    assert_eq!(effects.forget_pcids, c.changed(17) && c.set(17), "{}", what());
}

#[test]
fn cr4_accepts_exactly_the_enumerated_bits() {
    for n in 0..64 {
        let only = ControlLimits { cr4_allowed: bit(n), ..limits() };
        let none = ControlLimits { cr4_allowed: !bit(n), ..limits() };
        let regs = ControlRegs { cr0: Cr0::new(bit(16)), ..ControlRegs::default() };
        let write = |l: &ControlLimits| regs.write_cr4(bit(n), l, &mut |_| [0; 4]).is_ok();
        assert_eq!(write(&only), n != 17, "bit {n}: PCIDE needs long mode, the rest only CPUID");
        assert!(!write(&none), "bit {n}");
    }
}

struct Cr3Case {
    value: u64,
    lma: bool,
    pcide: bool,
    pae: bool,
    pg: bool,
    maxphyaddr: u8,
    table: Table,
}

impl Cr3Case {
    fn loads_pdptes(&self) -> bool {
        self.pg && self.pae && !self.lma
    }
}

#[test]
fn cr3() {
    let mut rules = rules::<Cr3Case>(&[
        ("address bits at or above MAXPHYADDR", |c| {
            c.lma && (u32::from(c.maxphyaddr)..63).any(|n| c.value & bit(n) != 0)
        }),
        ("bit 63 without PCIDE", |c| c.lma && !c.pcide && c.value & bit(63) != 0),
        ("bad PDPTE", |c| c.loads_pdptes() && matches!(c.table, Table::Bad(_))),
    ]);
    let singles = (0..64).map(bit);
    let values: Vec<u64> = singles
        .clone()
        .chain(singles.map(|b| b | bit(63) | u64::from(OTHER)))
        .chain(combinations(&[0, 3, 4, 5, 11, 12, 31, 32, 45, 46, 63]))
        .chain([0x1234_5fe5])
        .collect();
    for (value, maxphyaddr) in values.iter().flat_map(|&v| [32, 36, 46, 52].map(|m| (v, m))) {
        for (pg, pae, lma, pcide) in [
            (false, false, false, false),
            (false, true, false, false),
            (true, false, false, false),
            (true, true, false, false),
            (true, true, true, false),
            (true, true, true, true),
        ] {
            for table in TABLES {
                check_cr3(&Cr3Case { value, lma, pcide, pae, pg, maxphyaddr, table }, &mut rules);
            }
        }
    }
    each_rule_mattered(&rules);
}

fn check_cr3(c: &Cr3Case, rules: &mut [Rule<Cr3Case>]) {
    let regs = ControlRegs {
        cr0: Cr0::new(u64::from(c.pg) << 31 | 0x11),
        cr3: Cr3::new(u64::from(CURRENT)),
        cr4: Cr4::new(u64::from(c.pae) << 5 | u64::from(c.pcide) << 17),
        efer: Efer::new(if c.lma { 0x500 } else { 0 }),
        pdpte: [7; 4],
    };
    let limits = ControlLimits { maxphyaddr: c.maxphyaddr, ..limits() };
    let (result, reads) = observe(&regs, c.table, |r, read| r.write_cr3(c.value, &limits, read));
    let what = || format!("CR3 := {:#x}, M {}, {regs:x?}", c.value, c.maxphyaddr);
    if judge(rules, c) {
        assert_eq!(result, Err(Fault::GP0), "{}", what());
        return;
    }
    let effects = result.unwrap_or_else(|f| panic!("{f}: {}", what()));
    let loads = c.loads_pdptes();
    let stored = if c.lma { c.value << 1 >> 1 } else { c.value & 0xffff_ffff };
    let pdpte = if loads { c.table.entries() } else { [7; 4] };
    assert_eq!(effects.regs, ControlRegs { cr3: Cr3::new(stored), pdpte, ..regs }, "{}", what());
    assert_eq!(reads, if loads { vec![c.value & 0xffff_ffe0] } else { vec![] }, "{}", what());
    let expected = match (c.pcide, c.value >> 63) {
        (false, _) => entry(0, false),
        (true, 0) => entry((c.value & 0xfff) as u16, false),
        _ => 0,
    };
    assert_eq!(gone(effects.flush), expected, "{}", what());
}

#[test]
fn every_reserved_pdpte_bit_is_refused_only_where_present() {
    let regs = ControlRegs { cr0: Cr0::new(0x8000_0011), cr4: Cr4::new(bit(5)), ..ControlRegs::default() };
    for n in 1..64u32 {
        let reserved = matches!(n, 1 | 2 | 5..=8) || n >= u32::from(M);
        for (table, refused) in [(Table::Bad(n), reserved), (Table::BadButAbsent(n), false)] {
            let (result, _) = observe(&regs, table, |r, read| r.write_cr3(0x1000, &limits(), read));
            assert_eq!(result.is_err(), refused, "bit {n}, {table:?}");
        }
    }
}

#[test]
fn efer() {
    struct Case {
        old: u64,
        value: u64,
        pg: bool,
        allowed: u64,
    }
    let mut rules = rules::<Case>(&[
        ("bits CPUID doesn't enumerate", |c| c.value & !c.allowed & !bit(10) != 0),
        ("LME changed with paging on", |c| c.pg && (c.old ^ c.value) & bit(8) != 0),
    ]);
    for (old, pg) in [(0, false), (0x100, false), (0x801, false), (0, true), (0x500, true), (0xd01, true)] {
        for value in combinations(&[0, 8, 10, 11, 12, 13, 14, 15, 21, 63]) {
            for allowed in [0, 0x1, 0x501, 0x800, 0xd01] {
                let case = Case { old, value, pg, allowed };
                let regs = ControlRegs {
                    cr0: Cr0::new(u64::from(pg) << 31 | 0x11),
                    cr4: Cr4::new(bit(5)),
                    efer: Efer::new(old),
                    ..ControlRegs::default()
                };
                let limits = ControlLimits { efer_allowed: allowed, ..limits() };
                let result = regs.write_efer(value, &limits);
                if judge(&mut rules, &case) {
                    assert_eq!(result, Err(Fault::GP0), "EFER {old:#x} -> {value:#x}");
                    continue;
                }
                let effects = result.expect("a legal write");
                let efer = Efer::new(value & !bit(10) | old & bit(10));
                assert_eq!(effects.regs, ControlRegs { efer, ..regs });
                assert_eq!(effects.flush, FlushScope::None, "EFER is not on the list of invalidating writes");
            }
        }
    }
    each_rule_mattered(&rules);
}

#[test]
fn init_keeps_only_the_cache_bits() {
    let regs = ControlRegs {
        cr0: Cr0::new(0xe005_0033),
        cr3: Cr3::new(0x1000),
        cr4: Cr4::new(0x20),
        efer: Efer::new(0xd01),
        pdpte: [1; 4],
    };
    let effects = regs.init();
    assert_eq!(effects.regs, ControlRegs { cr0: Cr0::new(0x6000_0010), ..ControlRegs::default() });
    assert_eq!(effects.flush, FlushScope::All);
}

/// What holds in every state that guest writes can reach from reset.
fn is_reachable(r: &ControlRegs) -> bool {
    let (pg, pe) = (r.cr0.pg(), r.cr0.pe());
    r.efer.lma() == (r.efer.lme() && pg)
        && (!pg || pe)
        && (!r.cr0.nw() || r.cr0.cd())
        && (!r.efer.lma() || r.cr4.pae())
        && (!r.cr4.pcide() || r.efer.lma())
        && (!r.cr4.cet() || r.cr0.wp())
        && r.cr0.et()
}

proptest! {
    #[test]
    fn guest_writes_never_leave_the_reachable_states(
        steps in prop::collection::vec((0u8..4, any::<u32>(), any::<bool>(), any::<bool>()), 1..200)
    ) {
        let scatter = |bits: &[u32], pick: u32| {
            bits.iter().enumerate().fold(0, |v, (i, &n)| v | u64::from(pick >> i & 1) << n)
        };
        let mut regs = ControlRegs { cr0: Cr0::RESET, ..ControlRegs::default() };
        for (register, pick, cs_long, tss16) in steps {
            let table = TABLES[pick as usize % 3];
            let (result, _) = observe(&regs, table, |r, read| match register {
                0 => {
                    let value = scatter(&[0, 16, 29, 30, 31], pick);
                    r.write_cr0(value, CodeContext { cs_long: cs_long && r.efer.lma(), tss16 }, &limits(), read)
                }
                1 => r.write_cr3(scatter(&[0, 12, 13, 63], pick), &limits(), read),
                2 => r.write_cr4(scatter(&[4, 5, 7, 12, 17, 20, 21, 22, 23], pick), &limits(), read),
                _ => r.write_efer(scatter(&[0, 8, 10, 11], pick), &limits()),
            });
            if let Ok(effects) = result {
                regs = effects.regs;
            }
            prop_assert!(is_reachable(&regs), "{regs:x?}");
        }
    }
}
