//! Registers in text, control registers bit by bit.

use super::Scene;
use std::fmt::Write;
use umbra_arch::paging::PagingMode;
use umbra_arch::segment::{Attr, Seg, Segment};

type Bits = &'static [(u32, &'static str)];

const CR0: Bits = &[
    (0, "PE"),
    (1, "MP"),
    (2, "EM"),
    (3, "TS"),
    (4, "ET"),
    (5, "NE"),
    (16, "WP"),
    (18, "AM"),
    (29, "NW"),
    (30, "CD"),
    (31, "PG"),
];
const CR4: Bits = &[
    (0, "VME"),
    (1, "PVI"),
    (2, "TSD"),
    (3, "DE"),
    (4, "PSE"),
    (5, "PAE"),
    (6, "MCE"),
    (7, "PGE"),
    (8, "PCE"),
    (9, "OSFXSR"),
    (10, "OSXMMEXCPT"),
    (11, "UMIP"),
    (12, "LA57"),
    (13, "VMXE"),
    (14, "SMXE"),
    (16, "FSGSBASE"),
    (17, "PCIDE"),
    (18, "OSXSAVE"),
    (20, "SMEP"),
    (21, "SMAP"),
    (22, "PKE"),
    (23, "CET"),
    (24, "PKS"),
];
const EFER: Bits = &[(0, "SCE"), (8, "LME"), (10, "LMA"), (11, "NXE")];
const RFLAGS: Bits = &[
    (0, "CF"),
    (2, "PF"),
    (4, "AF"),
    (6, "ZF"),
    (7, "SF"),
    (8, "TF"),
    (9, "IF"),
    (10, "DF"),
    (11, "OF"),
    (14, "NT"),
    (16, "RF"),
    (17, "VM"),
    (18, "AC"),
    (19, "VIF"),
    (20, "VIP"),
    (21, "ID"),
];

fn named(value: u64, bits: Bits) -> String {
    let set: Vec<&str> = bits.iter().filter(|(bit, _)| value >> bit & 1 != 0).map(|&(_, name)| name).collect();
    set.join(" ")
}

/// The paging mode's name.
pub(super) const fn mode_name(mode: PagingMode) -> &'static str {
    match mode {
        PagingMode::Off => "no paging",
        PagingMode::TwoLevel => "2-level (32-bit) paging",
        PagingMode::Pae => "PAE paging",
        PagingMode::FourLevel => "4-level paging",
        PagingMode::FiveLevel => "5-level paging",
    }
}

fn execution_mode(scene: &Scene<'_>) -> &'static str {
    let s = scene.state;
    let big = s.segment(Seg::Cs).attr.is_big();
    match (s.cr0.pe(), s.is_v86(), s.efer.lma(), s.segment(Seg::Cs).attr.is_long(), big) {
        (false, ..) => "real-address mode",
        (_, true, ..) => "virtual-8086 mode",
        (_, _, true, true, _) => "64-bit mode",
        (_, _, true, false, true) => "compatibility mode, 32-bit code",
        (_, _, true, false, false) => "compatibility mode, 16-bit code",
        (_, _, false, _, true) => "protected mode, 32-bit code",
        (_, _, false, _, false) => "protected mode, 16-bit code",
    }
}

fn segment_kind(attr: Attr) -> String {
    if attr.is_unusable() {
        return "unusable (null)".into();
    }
    let kind = if !attr.is_code_or_data() {
        "system".to_owned()
    } else if attr.is_code() {
        let size = match (attr.is_long(), attr.is_big()) {
            (true, _) => "64-bit",
            (_, true) => "32-bit",
            _ => "16-bit",
        };
        let conforming = if attr.is_conforming() { " conforming" } else { "" };
        format!("{size}{conforming} code")
    } else if attr.is_expand_down() {
        "expand-down data".to_owned()
    } else if attr.is_writable_data() {
        "data".to_owned()
    } else {
        "read-only data".to_owned()
    };
    let present = if attr.is_present() { "" } else { ", not present" };
    format!("{kind}, DPL {}{present}", attr.dpl())
}

/// A segment's base, limit and kind.
pub(super) fn segment_text(segment: &Segment) -> String {
    format!("base {:#x} limit {:#x} {}", segment.base, segment.limit, segment_kind(segment.attr))
}

/// All of them.
pub(super) fn all(scene: &Scene<'_>) -> String {
    const NAMES: [&str; 16] =
        ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
    let s = scene.state;
    let mut out = String::from("registers:\n");
    // Writing to a String can't fail.
    for (index, (name, value)) in NAMES.iter().zip(s.gpr).enumerate() {
        let _ = write!(out, "{name:>5} {value:016x}{}", if index % 4 == 3 { "\n" } else { " " });
    }
    let _ = writeln!(out, "  rip {:016x}  rflags {:#x}: {}", s.rip, s.rflags, named(s.rflags, RFLAGS));
    let mode = scene.control_regs().mode();
    let _ = writeln!(out, "  {}, CPL {}, {}", execution_mode(scene), s.cpl, mode_name(mode));
    let _ = writeln!(out, "  cr0  {:#x}: {}", s.cr0.raw(), named(s.cr0.raw(), CR0));
    let _ = writeln!(out, "  cr2  {:#x}", s.cr2);
    let pcid = if s.cr4.pcide() { format!(", PCID {:#x}", s.cr3.pcid()) } else { String::new() };
    let _ = writeln!(out, "  cr3  {:#x}: table at {}{pcid}", s.cr3.raw(), s.cr3.table(mode));
    let _ = writeln!(out, "  cr4  {:#x}: {}", s.cr4.raw(), named(s.cr4.raw(), CR4));
    let _ = writeln!(out, "  efer {:#x}: {}", s.efer.raw(), named(s.efer.raw(), EFER));
    let names = ["es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"];
    for (name, segment) in names.iter().zip(&s.seg) {
        let _ = writeln!(out, "  {name:<4} {:04x} {}", segment.selector, segment_text(segment));
    }
    let _ = writeln!(out, "  gdtr base {:#x} limit {:#x}", s.gdtr.base, s.gdtr.limit);
    let _ = writeln!(out, "  idtr base {:#x} limit {:#x}", s.idtr.base, s.idtr.limit);
    if mode == PagingMode::Pae {
        let _ = writeln!(out, "  pdpte {:#x} {:#x} {:#x} {:#x}", s.pdpte[0], s.pdpte[1], s.pdpte[2], s.pdpte[3]);
    }
    out
}
