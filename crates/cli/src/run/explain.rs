//! What a guest's final state means.

use super::Guest;
use umbra_arch::state::Activity;
use umbra_arch::{Gva, Vcpu};
use umbra_cpu::Interpreter;
use umbra_machine::End;
use umbra_machine::explain::{self, Branch, Explanation, Scene};

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
fn engine(guest: &Guest) -> Option<&Interpreter> {
    let all = || (0..).map_while(|index| guest.machine.vcpu(index));
    all().find(|engine| engine.core().s.activity == Activity::Shutdown).or_else(|| all().next())
}

fn with_scene(guest: &Guest, tell: impl FnOnce(&Scene<'_>, &Interpreter) -> Explanation) -> Option<Explanation> {
    let engine = engine(guest)?;
    let state = engine.state();
    let branches: Vec<Branch> = engine.core().recent.list().into_iter().map(|(from, to)| Branch { from, to }).collect();
    let scene =
        Scene { state: &state, memory: guest.machine.memory(), limits: engine.core().limits, branches: &branches };
    Some(tell(&scene, engine))
}

/// The role in force, the root it selects, and what the fast tables hold of some addresses.
fn mmu(engine: &Interpreter, addresses: &[u64]) -> String {
    let mmu = &engine.core().mmu;
    let role = mmu.cpu_role();
    let mut flags = String::new();
    for (set, name) in [
        (role.wp, "WP"),
        (role.smep, "SMEP"),
        (role.smap, "SMAP"),
        (role.nxe, "NXE"),
        (role.pse, "PSE"),
        (role.pke, "PKE"),
        (role.pks, "PKS"),
    ] {
        if set {
            flags.push(' ');
            flags.push_str(name);
        }
    }
    let stats = mmu.stats();
    let mut out = format!(
        "MMU: role {:?}{flags}; {} roots cached ({} built, {} found again), {} shadow pages\n",
        role.mode,
        mmu.cached_roots(),
        stats.roots_built,
        stats.root_hits,
        mmu.shadow_pages()
    );
    for &address in addresses {
        let gva = Gva::new(address);
        let held = [
            (mmu.lookup_read(gva, 1).is_some(), "read"),
            (mmu.lookup_write(gva, 1).is_some(), "write"),
            (mmu.lookup_fetch(gva).is_some(), "fetch"),
        ];
        let names: Vec<&str> = held.iter().filter(|(is, _)| *is).map(|&(_, name)| name).collect();
        let names = if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
        out.push_str(&format!("  fast entry of {address:#x} in this view: {names}\n"));
    }
    out
}
