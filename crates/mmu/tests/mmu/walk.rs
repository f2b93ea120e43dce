//! The reference walk against an independent reading of each format.

use proptest::prelude::*;
use std::collections::BTreeMap;
use umbra_arch::control::{ControlRegs, Cr0, Cr4, Efer};
use umbra_arch::paging::{Access, AccessKind, PagingMode};
use umbra_arch::{Gpa, Gva};
use umbra_mmu::format::Format;
use umbra_mmu::walk::{self, Exchange, Regime, Tables, Top};
use umbra_mmu::{CpuRole, View};

/// Entries by address; anything else reads as all ones.
#[derive(Clone, Default)]
struct Sparse(BTreeMap<u64, u64>);

impl Tables for Sparse {
    fn read(&mut self, gpa: Gpa, bytes: u64) -> u64 {
        let all = if bytes == 4 { 0xffff_ffff } else { !0 };
        self.0.get(&gpa.raw()).copied().unwrap_or(all) & all
    }
    fn exchange(&mut self, gpa: Gpa, _: u64, old: u64, new: u64) -> Exchange {
        let cell = self.0.get_mut(&gpa.raw()).expect("only entries that were read are replaced");
        if *cell != old {
            return Exchange::Changed;
        }
        *cell = new;
        Exchange::Done
    }
}

#[derive(Clone, Copy, Debug)]
struct Machine {
    mode: PagingMode,
    nxe: bool,
    pse: bool,
    format: Format,
}

impl Machine {
    fn regs(&self) -> ControlRegs {
        let long = matches!(self.mode, PagingMode::FourLevel | PagingMode::FiveLevel);
        let mut cr4 = 0;
        let mut efer = if self.nxe { Efer::NXE } else { 0 };
        if self.mode != PagingMode::TwoLevel {
            cr4 |= Cr4::PAE;
        }
        if self.mode == PagingMode::FiveLevel {
            cr4 |= Cr4::LA57;
        }
        if self.pse {
            cr4 |= Cr4::PSE;
        }
        if long {
            efer |= Efer::LME | Efer::LMA;
        }
        ControlRegs {
            cr0: Cr0::new(Cr0::PE | Cr0::PG | Cr0::WP),
            cr4: Cr4::new(cr4),
            efer: Efer::new(efer),
            ..ControlRegs::default()
        }
    }
}

const KIB4: u64 = 12;

/// One level of the independent reading: shift, whether PS can make a leaf, reserved bits of tables
/// and of leaves, as in the manual's figures.
struct Level {
    shift: u64,
    large: bool,
    reserved_table: u64,
    reserved_leaf: u64,
}

fn range(high: u64, low: u64) -> u64 {
    (low..=high).fold(0, |acc, bit| acc | 1 << bit)
}

fn range_or_none(high: u64, low: u64) -> u64 {
    if low > high { 0 } else { range(high, low) }
}

fn levels(m: &Machine) -> Vec<Level> {
    let maxphy = u64::from(m.format.maxphyaddr);
    let no_xd = if m.nxe { 0 } else { 1 << 63 };
    let high = range_or_none(51, maxphy) | no_xd;
    let pae = range_or_none(62, maxphy) | no_xd;
    let amd = if m.format.amd { 1 << 8 } else { 0 };
    let four_mib = if m.format.pse36 { range(21, maxphy.min(40) - 19) } else { range(21, 13) };
    let level = |shift, large, reserved_table, reserved_leaf| Level { shift, large, reserved_table, reserved_leaf };
    let gib = if m.format.gib_pages { range(29, 13) } else { 1 << 7 };
    let pml4 = level(39, false, high | 1 << 7 | amd, 0);
    let lower = vec![
        level(30, true, high, high | gib),
        level(21, true, high, high | range(20, 13)),
        level(KIB4, false, 0, high),
    ];
    match m.mode {
        PagingMode::Off => vec![],
        PagingMode::TwoLevel => vec![level(22, m.pse, 0, four_mib), level(KIB4, false, 0, 0)],
        PagingMode::Pae => vec![level(21, true, pae, pae | range(20, 13)), level(KIB4, false, 0, pae)],
        PagingMode::FourLevel => [vec![pml4], lower].concat_levels(),
        PagingMode::FiveLevel => [vec![level(48, false, high | 1 << 7 | amd, 0), pml4], lower].concat_levels(),
    }
}

trait ConcatLevels {
    fn concat_levels(self) -> Vec<Level>;
}
impl ConcatLevels for [Vec<Level>; 2] {
    fn concat_levels(self) -> Vec<Level> {
        self.into_iter().flatten().collect()
    }
}

/// Code of a user read (0: allowed) and the physical address.
fn predict(m: &Machine, entries: &[u64], gva: u64) -> (u32, u64) {
    let mut user = true;
    for (level, &e) in levels(m).iter().zip(entries) {
        if e % 2 == 0 {
            return (4, 0);
        }
        let leaf = level.shift == KIB4 || level.large && e & 0x80 != 0;
        let reserved = if leaf { level.reserved_leaf } else { level.reserved_table };
        if e & reserved != 0 {
            return (4 | 8 | 1, 0);
        }
        user &= e & 4 != 0;
        if leaf {
            let address = if m.mode == PagingMode::TwoLevel { e & 0xffff_f000 } else { e & range(51, 12) };
            let mut base = address >> level.shift << level.shift;
            if level.shift == 22 && m.format.pse36 {
                base += (e >> 13 & 0xff) << 32;
            }
            let gpa = base + gva % (1 << level.shift);
            return if user { (0, gpa) } else { (5, 0) };
        }
    }
    unreachable!("the last level is a leaf")
}

fn entry() -> impl Strategy<Value = u64> {
    let one = prop_oneof![3 => Just(None), 1 => (0u32..64).prop_map(Some)];
    let flags = prop_oneof![1 => Just(6u64), 10 => Just(7u64), 1 => Just(3)];
    (flags, one.clone(), one, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(flags, a, b, ps, large, xd)| {
        let mut e = flags | [a, b].into_iter().flatten().fold(0, |acc, bit| acc ^ 1 << bit);
        e |= if ps && large { 0x80 } else { 0 };
        e |= if xd && large && ps { 1 << 63 } else { 0 };
        e
    })
}

fn machine() -> impl Strategy<Value = Machine> {
    let mode = prop_oneof![
        Just(PagingMode::TwoLevel),
        Just(PagingMode::Pae),
        Just(PagingMode::FourLevel),
        Just(PagingMode::FiveLevel)
    ];
    let format = (32u8..=52, any::<bool>(), any::<bool>(), any::<bool>())
        .prop_map(|(maxphyaddr, gib_pages, pse36, amd)| Format { maxphyaddr, gib_pages, pse36, amd });
    (mode, any::<bool>(), any::<bool>(), format).prop_map(|(mode, nxe, pse, format)| Machine { mode, nxe, pse, format })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_format_reads_as_the_figures_say(m in machine(), raw in prop::array::uniform5(entry()), gva in any::<u64>(), write in any::<bool>()) {
        let long = matches!(m.mode, PagingMode::FourLevel | PagingMode::FiveLevel);
        let gva = if long { (gva << 8) as i64 as u64 >> 8 & 0x00ff_ffff_ffff_ffff } else { gva & 0xffff_ffff };
        let width = if m.mode == PagingMode::TwoLevel { 4 } else { 8 };
        let index_bits = if width == 4 { 10 } else { 9 };
        let shifts = levels(&m);
        // A chain of tables at 1000h, 2000h ...: each entry's address bits are free for leaves only.
        let mut tables = Sparse::default();
        let mut chain = Vec::new();
        for (i, level) in shifts.iter().enumerate() {
            let table = 0x1000 * (i as u64 + 1);
            let at = table + (gva >> level.shift & ((1 << index_bits) - 1)) * width;
            let leaf = level.shift == KIB4 || level.large && raw[i] & 0x80 != 0;
            let mut e = if leaf { raw[i] } else { raw[i] & !range(31, 12) | (table + 0x1000) };
            if width == 4 {
                e &= 0xffff_ffff;
            }
            // A table beyond 4 GiB is absent; the chain stays below.
            if !leaf && e & level.reserved_table == 0 {
                e &= !range_or_none(51, 32) | level.reserved_table;
            }
            tables.0.insert(at, e);
            chain.push(e);
        }
        let role = CpuRole::of(&m.regs());
        let top = if m.mode == PagingMode::Pae { Top::Pdptes([0x1001; 4]) } else { Top::Table(Gpa::new(0x1000)) };
        let regime = Regime { top, role: role.root_page_role(false), format: m.format };
        let view = View::of(&role, 3, false, 0, 0);
        let (code, gpa) = predict(&m, &chain, gva);
        let before = tables.clone();
        let access = Access::explicit(AccessKind::Read, 3);
        let got = walk::look(&mut tables, &regime, Gva::new(gva), access, &view);
        prop_assert_eq!(got.as_ref().err().and_then(|f| f.code).unwrap_or(0), code);
        if let Ok(found) = got {
            prop_assert_eq!(found.gpa.raw(), gpa);
        }
        // A and D: everything used, on success only.
        let kind = if write { AccessKind::Write } else { AccessKind::Read };
        let done = walk::walk(&mut tables, &regime, Gva::new(gva), Access::explicit(kind, 3), &view);
        let Ok(done) = done else {
            prop_assert!(tables.0 == before.0);
            return Ok(());
        };
        let used: Vec<u64> = done.steps().iter().map(|s| s.entry().raw()).collect();
        for (at, old) in before.0 {
            let position = used.iter().position(|&u| u == at);
            let mut expected = old;
            if let Some(position) = position {
                expected |= 0x20;
                expected |= if write && position + 1 == used.len() { 0x40 } else { 0 };
            }
            prop_assert_eq!(tables.0[&at], expected);
        }
    }
}

#[test]
fn paging_off_is_the_identity_in_32_bits_and_without_rights() {
    let role = CpuRole::of(&ControlRegs { cr4: Cr4::new(Cr4::SMEP | Cr4::SMAP), ..ControlRegs::default() });
    let regime = Regime { top: Top::Direct, role: role.root_page_role(true), format: Format::intel(40) };
    for kind in [AccessKind::Read, AccessKind::Write, AccessKind::Fetch] {
        let view = View::of(&role, 0, false, !0, !0);
        let gva = Gva::new(0x1_2345_6789);
        let got =
            walk::walk(&mut Sparse::default(), &regime, gva, Access::explicit(kind, 0), &view).expect("no rights");
        assert_eq!(got.gpa.raw(), 0x2345_6789);
    }
}
