//! What a guest's final state means.

use super::Guest;
use super::engine::Engine;
use std::fmt::Write;
use umbra_arch::state::Activity;
use umbra_arch::{Gva, Vcpu};
use umbra_machine::End;
use umbra_machine::explain::{self, Branch, Explanation, Scene};
use umbra_mmu::Mmu;
use umbra_mmu::walk::Top;

/// Explains an end that needs it.
pub fn end(guest: &Guest, end: &End) -> Option<Explanation> {
    match end {
        End::TripleFault(triple) => with_scene(guest, |scene, _| explain::triple_fault(scene, triple)),
        End::Unsupported(what) => with_scene(guest, |scene, _| explain::unsupported(scene, what)),
        End::HaltedForever(_) => with_scene(guest, |scene, _| explain::state(scene, &[])),
        _ => None,
    }
}

/// Explains the state, however the guest ended, with the walks of `addresses`.
pub fn state(guest: &Guest, addresses: &[u64]) -> Option<Explanation> {
    with_scene(guest, |scene, engine| {
        let mut explanation = explain::state(scene, addresses);
        explanation.text.push_str(&mmu(engine, addresses));
        explanation
    })
}

/// The processor to look at: the one that shut down, else the first.
fn engine(guest: &Guest) -> Option<&Engine> {
    let all = || (0..).map_while(|index| guest.machine.vcpu(index));
    all().find(|engine| engine.soft().core().s.activity == Activity::Shutdown).or_else(|| all().next())
}

fn with_scene(guest: &Guest, tell: impl FnOnce(&Scene<'_>, &Engine) -> Explanation) -> Option<Explanation> {
    let engine = engine(guest)?;
    let state = engine.state();
    let core = engine.soft().core();
    let branches: Vec<Branch> = core.recent.list().into_iter().map(|(from, to)| Branch { from, to }).collect();
    let scene = Scene { state: &state, memory: guest.machine.memory(), limits: core.limits, branches: &branches };
    Some(tell(&scene, engine))
}

/// The role in force, the roots kept, and what is cached of some addresses.
fn mmu(engine: &Engine, addresses: &[u64]) -> String {
    if engine.is_accelerated() {
        return String::new();
    }
    let mmu = &engine.soft().core().mmu;
    let stats = mmu.stats();
    let mut out = format!("MMU: role {}\n", mmu.cpu_role());
    // Writing to a String can't fail.
    let _ = writeln!(
        out,
        "  {} roots kept ({} built, {} times found again), {} shadow pages",
        mmu.cached_roots(),
        stats.roots_built,
        stats.root_hits,
        mmu.shadow_pages()
    );
    for root in mmu.root_infos() {
        let current = if root.is_current { ", the current one" } else { "" };
        let top = match root.top {
            Top::Direct => "no tables".to_owned(),
            Top::Table(table) => format!("table {table}"),
            Top::Pdptes(pdptes) => format!("PDPTEs {pdptes:#x?}"),
        };
        let _ = writeln!(out, "  root {}: {top}, {}; {} fills{current}", root.slot, root.role, root.held);
    }
    for &address in addresses {
        out.push_str(&cached(mmu, Gva::new(address)));
    }
    out
}

/// What the shadow tree and the fast table hold of one address.
fn cached(mmu: &Mmu, gva: Gva) -> String {
    let mut out = format!("  cached of {gva}:\n");
    for level in mmu.shadow_path(gva) {
        let entry = if level.is_present { "present" } else { "absent: the next access walks the guest's tables" };
        let _ = writeln!(out, "    shadow of {} ({}): entry {entry}", level.table, level.role);
    }
    let held = [
        (mmu.lookup_read(gva, 1).is_some(), "read"),
        (mmu.lookup_write(gva, 1).is_some(), "write"),
        (mmu.lookup_fetch(gva).is_some(), "fetch"),
    ];
    let names: Vec<&str> = held.iter().filter(|(is, _)| *is).map(|&(_, name)| name).collect();
    let names = if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
    let _ = writeln!(out, "    fast entry in this view: {names}");
    out
}
