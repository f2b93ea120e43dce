//! The walk of a linear address, level by level.

use super::{Scene, is_canonical};
use std::fmt::Write;
use umbra_arch::paging::{Access, AccessKind, PagingMode, entry};
use umbra_arch::{Gpa, rflags};
use umbra_memory::Backing;
use umbra_mmu::format::{Decoded, Format};
use umbra_mmu::rights::{self, Rights};
use umbra_mmu::role::{CpuRole, EntryFormat, PageRole, View};

/// One entry that a walk reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Level {
    /// The manual's name of the entry.
    pub name: &'static str,
    /// Where the entry lies; `None` for PAE's PDPTE registers.
    pub at: Option<Gpa>,
    /// Its index in its table.
    pub index: usize,
    /// Its value; absent memory reads as all ones.
    pub raw: u64,
    /// What it says.
    pub decoded: Decoded,
    /// Bits that may not be set and are.
    pub reserved: u64,
}

/// Where a walk ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PathEnd {
    /// At a byte.
    Mapped(Gpa),
    /// The last level's entry has P = 0.
    NotPresent,
    /// The last level's entry has a reserved bit set.
    Reserved,
    /// There is no such linear address.
    NotCanonical,
}

/// A walk.
#[derive(Clone, Debug)]
pub struct Path {
    /// The entries read, topmost first.
    pub levels: Vec<Level>,
    /// Where it ended.
    pub end: PathEnd,
    /// Rights over all levels read.
    pub rights: Rights,
}

/// What keeps an access to a mapped page out, in words.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Denial(pub String);

/// Walks `gva`.
pub fn path(scene: &Scene<'_>, gva: u64) -> Path {
    let regs = scene.control_regs();
    let mut path = Path { levels: Vec::new(), end: PathEnd::NotPresent, rights: Rights::ALL };
    if !is_canonical(scene, gva) {
        path.end = PathEnd::NotCanonical;
        return path;
    }
    let mode = regs.mode();
    let mut table = regs.cr3.table(mode);
    match mode {
        PagingMode::Off => {
            path.end = PathEnd::Mapped(Gpa::new(gva & 0xffff_ffff));
            return path;
        }
        PagingMode::Pae => match pdpte_register(&regs.pdpte, gva) {
            (level, Some(next)) => {
                path.levels.push(level);
                table = next;
            }
            (level, None) => {
                path.levels.push(level);
                return path;
            }
        },
        _ => {}
    }
    let role = CpuRole::of(&regs).root_page_role(false);
    walk(scene, gva, table, role, &mut path);
    path
}

fn pdpte_register(pdptes: &[u64; 4], gva: u64) -> (Level, Option<Gpa>) {
    let index = (gva >> 30 & 3) as usize;
    let raw = pdptes[index];
    let present = raw & entry::P != 0;
    let table = Gpa::new(raw & 0x000f_ffff_ffff_f000);
    let decoded =
        if present { Decoded::Table { table, rights: Rights::ALL, accessed: true } } else { Decoded::NotPresent };
    (Level { name: "PDPTE register", at: None, index, raw, decoded, reserved: 0 }, present.then_some(table))
}

fn walk(scene: &Scene<'_>, gva: u64, top: Gpa, top_role: PageRole, path: &mut Path) {
    let format = Format::intel(scene.limits.maxphyaddr);
    let (mut table, mut role) = (top, top_role);
    loop {
        let index = role.format.index(role.level, gva);
        let at = table.add(index as u64 * role.format.entry_bytes());
        let raw = read_entry(scene, at, role.format.entry_bytes());
        let decoded = format.decode(raw, role);
        let reserved = if decoded == Decoded::Reserved { culprits(&format, raw, role) } else { 0 };
        path.levels.push(Level { name: name(role), at: Some(at), index, raw, decoded, reserved });
        match decoded {
            Decoded::NotPresent => path.end = PathEnd::NotPresent,
            Decoded::Reserved => path.end = PathEnd::Reserved,
            Decoded::Table { table: next, rights, .. } => {
                path.rights = path.rights.and(rights);
                (table, role) = (next, role.child());
                continue;
            }
            Decoded::Leaf { base, rights, .. } => {
                path.rights = path.rights.and(rights);
                let within = gva & ((1 << role.format.shift(role.level)) - 1);
                path.end = PathEnd::Mapped(base.add(within));
            }
        }
        return;
    }
}

fn read_entry(scene: &Scene<'_>, at: Gpa, bytes: u64) -> u64 {
    let mut raw = [0; 8];
    scene.memory.read(at, &mut raw[..bytes as usize]);
    u64::from_le_bytes(raw)
}

/// The set bits without which the entry would be legal.
fn culprits(format: &Format, raw: u64, role: PageRole) -> u64 {
    let alone = |bit: u64| raw & (entry::P | entry::PS) | bit;
    let bits = (1..64).map(|n| 1u64 << n).filter(|bit| raw & bit != 0);
    bits.filter(|&bit| format.decode(alone(bit), role) == Decoded::Reserved).sum()
}

const fn name(role: PageRole) -> &'static str {
    match (role.format, role.level) {
        (_, 5) => "PML5E",
        (_, 4) => "PML4E",
        (EntryFormat::Long, 3) => "PDPTE",
        (_, 2) => "PDE",
        _ => "PTE",
    }
}

/// The entry's bits by name.
fn bits(level: &Level) -> String {
    let leaf = matches!(level.decoded, Decoded::Leaf { .. });
    let mut out = String::new();
    let mut add = |set: bool, name: &str| {
        if set {
            out.push(' ');
            out.push_str(name);
        }
    };
    let raw = level.raw;
    add(raw & entry::P != 0, "P");
    if level.at.is_some() && raw & entry::P != 0 {
        add(true, if raw & entry::W != 0 { "R/W" } else { "read-only" });
        add(true, if raw & entry::U != 0 { "user" } else { "supervisor" });
    }
    for (bit, name) in [(entry::PWT, "PWT"), (entry::PCD, "PCD"), (entry::A, "A"), (entry::XD, "XD")] {
        add(raw & bit != 0, name);
    }
    add(leaf && raw & entry::D != 0, "D");
    add(leaf && raw & entry::G != 0, "G");
    add(raw & entry::PS != 0 && level.name != "PTE", "PS");
    if let Decoded::Leaf { rights, .. } = level.decoded {
        add(rights.key != 0, &format!("key {}", rights.key));
    }
    out
}

/// Which right keeps `access` out, in words.
pub(super) fn denial(scene: &Scene<'_>, path: &Path, access: Access) -> Option<Denial> {
    let regs = scene.control_regs();
    let s = scene.state;
    let view = View::of(&CpuRole::of(&regs), s.cpl, s.rflags & rflags::AC != 0, s.pkru, s.msr.pkrs as u32);
    rights::check(path.rights, access, &view).err()?;
    let denying = |test: fn(u64) -> bool| {
        let level = path.levels.iter().find(|level| level.at.is_some() && test(level.raw));
        level.map_or("the tables", |level| level.name)
    };
    let r = path.rights;
    let why = match access.kind {
        _ if access.user && !r.user => format!("U/S is 0 in the {}", denying(|raw| raw & entry::U == 0)),
        AccessKind::Fetch if !r.exec => format!("XD is set in the {}", denying(|raw| raw & entry::XD != 0)),
        AccessKind::Fetch => "a user page, and CR4.SMEP keeps the supervisor from executing it".into(),
        AccessKind::Write if !r.write && (access.user || view.wp) => {
            let level = denying(|raw| raw & entry::W == 0);
            let wp = if access.user { "" } else { " and CR0.WP is 1" };
            format!("R/W is 0 in the {level}{wp}")
        }
        _ if !access.user && r.user && view.smap_enforced(access.implicit) => {
            "a user page, and CR4.SMAP keeps the supervisor out (RFLAGS.AC is 0 or doesn't count)".into()
        }
        _ => format!("protection key {} forbids it", r.key),
    };
    Some(Denial(why))
}

const fn verb(access: Access) -> &'static str {
    match (access.kind, access.user) {
        (AccessKind::Read, false) => "supervisor read",
        (AccessKind::Write, false) => "supervisor write",
        (AccessKind::Fetch, false) => "supervisor fetch",
        (AccessKind::Read, true) => "user read",
        (AccessKind::Write, true) => "user write",
        (AccessKind::Fetch, true) => "user fetch",
    }
}

/// One sentence: where the walk of `gva` for `access` ends; `None` if the access is allowed.
pub(super) fn failure(scene: &Scene<'_>, gva: u64, access: Access) -> Option<String> {
    let path = path(scene, gva);
    let last = path.levels.last();
    let entry = |level: &Level| match level.at {
        Some(at) => format!("its {} (index {}, at physical {at})", level.name, level.index),
        None => format!("its {} {}", level.name, level.index),
    };
    match (path.end, last) {
        (PathEnd::Mapped(gpa), _) => match denial(scene, &path, access) {
            Some(Denial(why)) => Some(why),
            None if matches!(scene.memory.map(gpa.page()), Backing::Mmio) => {
                Some(format!("physical address {gpa} is no memory"))
            }
            None => None,
        },
        (PathEnd::NotCanonical, _) => Some("the address is not canonical".into()),
        (PathEnd::NotPresent, Some(level)) => Some(format!("{} is not present", entry(level))),
        (PathEnd::Reserved, Some(level)) => Some(format!("{} has {}", entry(level), reserved(scene, level))),
        (_, None) => Some("the tables can't be read".into()),
    }
}

/// Which accesses to `gva` are allowed at present, and why the others are not.
pub(super) fn verdicts(scene: &Scene<'_>, gva: u64) -> String {
    let mut out = format!("  every access to {gva:#x}:\n");
    for cpl in [0, 3] {
        for kind in [AccessKind::Read, AccessKind::Write, AccessKind::Fetch] {
            let access = Access::explicit(kind, cpl);
            let verdict = failure(scene, gva, access).map_or("allowed".to_owned(), |why| format!("#PF: {why}"));
            // Writing to a String can't fail.
            let _ = writeln!(out, "    {:<16} {verdict}", verb(access));
        }
    }
    out
}

fn reserved(scene: &Scene<'_>, level: &Level) -> String {
    if level.raw == u64::MAX {
        return "all bits set: the table lies where there is no memory".into();
    }
    if level.reserved & entry::XD != 0 && !scene.state.efer.nxe() {
        return format!("reserved bits {:#x} set (XD, bit 63, is reserved while EFER.NXE is 0)", level.reserved);
    }
    format!("reserved bits {:#x} set", level.reserved)
}

/// The walk of `gva` in lines, with the verdict for `access`.
pub(super) fn describe(scene: &Scene<'_>, name: &str, gva: u64, access: Access) -> String {
    let path = path(scene, gva);
    let mut out = String::new();
    // Writing to a String can't fail.
    let _ = match failure(scene, gva, access) {
        None => writeln!(out, "  {name} {gva:#x}: {} allowed", verb(access)),
        Some(why) => writeln!(out, "  {name} {gva:#x}: {} fails: {why}", verb(access)),
    };
    for level in &path.levels {
        let at = level.at.map_or("-".to_owned(), |at| at.to_string());
        let _ = writeln!(
            out,
            "    {:<15} {:>4} at {at:<14} = {:#018x}{}",
            level.name,
            format!("[{}]", level.index),
            level.raw,
            bits(level)
        );
    }
    if let PathEnd::Mapped(gpa) = path.end {
        let kind = match scene.memory.map(gpa.page()) {
            Backing::Ram(_) => "RAM",
            Backing::Rom(_) => "ROM",
            Backing::Mmio => "no memory",
        };
        let how = if path.levels.is_empty() { " (paging off)" } else { "" };
        let _ = writeln!(out, "    physical {gpa}, {kind}{how}");
    }
    out
}
