//! Generators driven by a fuzzer's input: every choice is a byte of it, and the engines have to agree.

use crate::asks_kvm::AsksKvm;
use crate::campaign::{Verdict, judge, settle};
use crate::case::Case;
use crate::engine::{Answer, Engine};
use crate::engines::{self, Blank};
use crate::programs;
use crate::random::Random;
use crate::ring0::{control, shapes};
use crate::rows::Rows;
use crate::saved::{self, Origin};
use std::cell::RefCell;
use umbra_mmu::MmuOptions;

/// Fails with the case as text, ready to be saved and replayed, if they differ.
fn agree(engines: &mut [Box<dyn Engine>], case: &Case) -> Verdict {
    let verdict = judge(engines, case);
    let stray = settle(engines).err();
    let difference = match (verdict, stray) {
        (Verdict::Different(text), _) | (_, Some(text)) => text,
        (verdict, None) => return verdict,
    };
    let names = engines.iter().map(|engine| engine.name().to_owned()).collect();
    let origin = Origin { engines: names, difference, ..Origin::default() };
    panic!("engines differ; as a case for umbra diff --replay:\n{}", saved::write(case, &origin));
}

fn made(names: &[&str]) -> Vec<Box<dyn Engine>> {
    names.iter().map(|name| engines::make(name).expect("engines of this host")).collect()
}

/// Control-register and EFER sequences with table edits and accesses: the same in every mode of the MMU, its caches
/// true to the tables afterwards, and some the same under KVM.
pub fn control_regs(data: &[u8]) {
    thread_local! {
        static ENGINES: RefCell<(Vec<Box<dyn Engine>>, Blank)> = RefCell::new((
            made(&["interp", "interp-drop", "interp-kvm-role"]),
            Blank::new(&engines::profile(), MmuOptions::default()).expect("an interpreter").audited(),
        ));
        static KVM: RefCell<AsksKvm> = RefCell::default();
    }
    let case = control::case(&mut Random::of(data));
    KVM.with_borrow_mut(|kvm| kvm.ask(data, agree));
    ENGINES.with_borrow_mut(|(engines, audited)| {
        agree(engines, &case);
        if let Answer::CannotAnswer(why) = audited.run(&case) {
            assert!(!why.starts_with("audit"), "{why}");
        }
    });
}

/// One access through tables of any shape, as the model predicts it.
pub fn page_walk(data: &[u8]) {
    thread_local! {
        static ENGINES: RefCell<Vec<Box<dyn Engine>>> = RefCell::new(made(&["interp", "model"]));
    }
    ENGINES.with_borrow_mut(|engines| agree(engines, &shapes::case(&mut Random::of(data))));
}

/// A program, or a ring-0 sequence, interpreted and translated.
pub fn jit_vs_interp(data: &[u8]) {
    thread_local! {
        static ENGINES: RefCell<(Rows, Vec<Box<dyn Engine>>)> =
            RefCell::new((Rows::new(&engines::profile()), made(&["interp", "jit"])));
    }
    let mut r = Random::of(data);
    ENGINES.with_borrow_mut(|(rows, engines)| {
        let case = if r.one_in(4) { control::case(&mut r) } else { programs::case(rows, &mut r) };
        agree(engines, &case);
    });
}

/// One instruction, interpreted and on the host CPU.
pub fn interp_vs_host(data: &[u8]) {
    thread_local! {
        static ENGINES: RefCell<(Rows, Vec<Box<dyn Engine>>)> =
            RefCell::new((Rows::new(&engines::profile()), made(&["interp", "host"])));
    }
    ENGINES.with_borrow_mut(|(rows, engines)| agree(engines, &rows.case(&mut Random::of(data))));
}
