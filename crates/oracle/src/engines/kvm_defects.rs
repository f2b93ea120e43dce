//! Whether the known defects of KVM's software backend explain all of a difference.

use crate::case::{Case, Piece};
use crate::compare::{Comparison, compare};
use crate::engine::Outcome;
use crate::ring0::{LOG, TABLES, TABLES_END, shapes, step};
use std::borrow::Cow;
use umbra_accel::defects::{
    ALIGNMENT_WITHOUT_AM, Defect, EVENT_CLEARS_AC, GIB_PAGES_RESERVED, IRET_KEEPS_SEGMENTS, MODIFY_SETS_ACCESSED,
    NXE_OFF_KEEPS_TRANSLATIONS, PKE_WITHOUT_PKU,
};
use umbra_arch::control::{Cr4, Efer};
use umbra_arch::paging::entry::A;
use umbra_arch::segment::Seg;
use umbra_arch::{CpuState, rflags};

/// Vectors, as the log has them.
const AC: u32 = umbra_arch::fault::vector::AC as u32;
const PF: u32 = umbra_arch::fault::vector::PF as u32;
/// The error code's bits: present, a write, reserved bits in tables ("Page-Fault Exceptions").
const PRESENT: u32 = 1;
const WRITE: u32 = 1 << 1;
const RSVD: u32 = 1 << 3;

/// The names of the defects of the engine that answered `ours` that together are the whole difference; `None` if something is left.
pub(super) fn explain(case: &Case, ours: &Outcome, theirs: &Outcome) -> Option<Cow<'static, str>> {
    if case.code.steps.contains(&step::toggle_control(4, Cr4::PKE as u32)) {
        // What follows differs in all sorts of ways.
        return Some(PKE_WITHOUT_PKU.name.into());
    }
    if let Some(defect) = other_exception(case, ours, theirs) {
        // The next step starts from another place.
        return Some(defect.name.into());
    }
    let mut mended = ours.clone();
    let mut found = Vec::new();
    if let (Some(ours), Some(theirs)) = (&mut mended.state, &theirs.state) {
        note(&mut found, IRET_KEEPS_SEGMENTS, null_segments(ours, theirs));
        note(&mut found, EVENT_CLEARS_AC, alignment_flag(ours, theirs));
    }
    if case.code.steps.iter().any(|step| step.ends_with(&step::MODIFY)) {
        note(&mut found, MODIFY_SETS_ACCESSED, accessed_bits(&mut mended.memory, &theirs.memory));
    }
    let explained = compare(case, ("mended", &mended), ("other", theirs)) == Comparison::Same;
    (explained && !found.is_empty()).then(|| found.join(", ").into())
}

/// A defect by which the two logs of exceptions part.
fn other_exception(case: &Case, ours: &Outcome, theirs: &Outcome) -> Option<Defect> {
    let has = |step: Vec<u8>| case.code.steps.contains(&step);
    let parting = first_difference(&ours.memory, &theirs.memory)?;
    let ([vector, code], [their_vector, their_code]) = (parting.ours, parting.theirs);
    let checks = has(step::set_ac(true));
    let smap = checks && has(step::toggle_control(4, Cr4::SMAP as u32));
    let [before, its_code] = parting.before;
    if before == PF && its_code & RSVD != 0 && has(step::toggle_efer(Efer::NXE as u32)) {
        // Of an access to two pages only the second one faults.
        return Some(NXE_OFF_KEEPS_TRANSLATIONS);
    }
    match (vector, their_vector) {
        (AC, other) if other != AC && checks => Some(ALIGNMENT_WITHOUT_AM),
        (other, AC) if other != AC && checks => Some(EVENT_CLEARS_AC),
        (PF, _) if smap && parting.later && code & !WRITE == PRESENT => Some(EVENT_CLEARS_AC),
        (PF, other) if code & RSVD != 0 && (other != PF || their_code & RSVD == 0) && shapes::has_gib_page(case) => {
            Some(GIB_PAGES_RESERVED)
        }
        (vector, PF) if their_code & RSVD != 0 && (vector != PF || code & RSVD == 0) => {
            has(step::toggle_efer(Efer::NXE as u32)).then_some(NXE_OFF_KEEPS_TRANSLATIONS)
        }
        _ => None,
    }
}

/// Where the two logs part.
struct Parting {
    ours: [u32; 2],
    theirs: [u32; 2],
    /// There was an exception before.
    later: bool,
    /// The entry before, the same in both: if a #PF, then the addresses differ.
    before: [u32; 2],
}

/// Vector and error code of the first entries that differ in the two logs.
fn first_difference(ours: &[Piece], theirs: &[Piece]) -> Option<Parting> {
    let log = |pieces: &[Piece]| pieces.iter().find(|piece| piece.gpa == LOG).map(|piece| piece.bytes.clone());
    let (ours, theirs) = (log(ours)?, log(theirs)?);
    let entry = |bytes: &[u8]| {
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
        [word(0), word(4)]
    };
    let (mut later, mut before) = (false, [0; 2]);
    for (ours, theirs) in ours.chunks_exact(8).zip(theirs.chunks_exact(8)) {
        if ours != theirs {
            return Some(Parting { ours: entry(ours), theirs: entry(theirs), later, before });
        }
        before = entry(ours);
        later |= (1..32).contains(&before[0]);
    }
    None
}

fn note(found: &mut Vec<&'static str>, defect: Defect, was_there: bool) {
    if was_there {
        found.push(defect.name);
    }
}

/// Takes over null selectors where ours kept another one.
fn null_segments(ours: &mut CpuState, theirs: &CpuState) -> bool {
    let mut any = false;
    for seg in [Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs].map(|seg| seg as usize) {
        if theirs.seg[seg].selector < 4 && ours.seg[seg].selector >= 4 {
            ours.seg[seg] = theirs.seg[seg];
            any = true;
        }
    }
    any
}

/// Takes over RFLAGS.AC where ours lost it.
fn alignment_flag(ours: &mut CpuState, theirs: &CpuState) -> bool {
    let lost = theirs.rflags & !ours.rflags & rflags::AC;
    ours.rflags |= lost;
    lost != 0
}

/// Clears accessed bits of table entries that only ours set.
fn accessed_bits(ours: &mut [Piece], theirs: &[Piece]) -> bool {
    let tables = |piece: &Piece| (TABLES..TABLES_END).contains(&piece.gpa);
    let mut any = false;
    for (ours, theirs) in ours.iter_mut().zip(theirs).filter(|(ours, _)| tables(ours)) {
        let entries = ours.bytes.chunks_exact_mut(8).zip(theirs.bytes.chunks_exact(8));
        for (ours, theirs) in entries.filter(|(ours, theirs)| ours != theirs) {
            if ours[1..] == theirs[1..] && u64::from(ours[0]) == u64::from(theirs[0]) | A {
                ours[0] = theirs[0];
                any = true;
            }
        }
    }
    any
}
