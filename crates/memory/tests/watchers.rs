//! Several watchers of one memory, against a model that keeps every claim and every write.

use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::Arc;
use umbra_arch::Gpa;
use umbra_memory::{Change, GuestMemory, MemoryError, PageFlags, RamOffset, Watcher};

const WATCHERS: usize = 3;
const PAGES: u64 = 6;
const BASE: u64 = 0x10_0000;

#[derive(Clone, Copy, Debug)]
enum Op {
    Claim(usize, u64, bool),
    Release(usize, u64, bool),
    /// A store by a watcher's own instruction.
    Store(usize, u64, u32),
    /// A write by a device.
    Write(u64, u32),
    Drain(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let (who, page, at) = (0..WATCHERS, 0..PAGES, 0..PAGES * 4096 - 8);
    prop_oneof![
        (who.clone(), page.clone(), any::<bool>()).prop_map(|(w, p, c)| Op::Claim(w, p, c)),
        (who.clone(), page, any::<bool>()).prop_map(|(w, p, c)| Op::Release(w, p, c)),
        (who.clone(), at.clone()).prop_map(|(w, at)| Op::Store(w, at & !7, 8)),
        (at, 1..8u32).prop_map(|(at, n)| Op::Write(at & !7, n)),
        who.prop_map(Op::Drain),
    ]
}

fn flag(code: bool) -> PageFlags {
    if code { PageFlags::CODE } else { PageFlags::WATCHED }
}

/// What one watcher must have heard of when it drains.
#[derive(Default, Clone)]
struct Model {
    claims: BTreeSet<(u64, bool)>,
    written: BTreeSet<u64>,
    flagged: BTreeSet<u64>,
}

fn off(page: u64) -> RamOffset {
    RamOffset::new(BASE + (page << 12))
}

proptest! {
    #[test]
    fn each_hears_of_what_it_claimed(ops in prop::collection::vec(op(), 1..120)) {
        let mem = Arc::new(GuestMemory::new(4 << 20).unwrap());
        let ears: Vec<Watcher> = (0..WATCHERS).map(|_| Watcher::register(mem.clone()).unwrap()).collect();
        let mut models = vec![Model::default(); WATCHERS];
        let claims = |m: &Model, page| m.claims.contains(&(page, true)) || m.claims.contains(&(page, false));
        for op in ops {
            match op {
                Op::Claim(who, page, code) => {
                    if !models.iter().any(|m| claims(m, page)) {
                        models.iter_mut().enumerate().filter(|m| m.0 != who).for_each(|m| {
                            m.1.flagged.insert(page);
                        });
                    }
                    let new = models[who].claims.insert((page, code));
                    prop_assert_eq!(ears[who].claim(off(page), flag(code)), new);
                }
                Op::Release(who, page, code) => {
                    models[who].claims.remove(&(page, code));
                    ears[who].release(off(page), flag(code));
                }
                Op::Store(who, at, bytes) => {
                    let off = RamOffset::new(BASE + at);
                    ears[who].stored(Gpa::new(BASE + at), off, bytes);
                    for (n, model) in models.iter_mut().enumerate() {
                        if n != who && claims(model, at >> 12) {
                            model.written.extend(at..at + u64::from(bytes));
                        }
                    }
                }
                Op::Write(at, bytes) => {
                    mem.write(Gpa::new(BASE + at), &vec![1; bytes as usize]);
                    for model in &mut models {
                        if claims(model, at >> 12) {
                            model.written.extend(at..at + u64::from(bytes));
                        }
                    }
                }
                Op::Drain(who) => {
                    let model = &mut models[who];
                    let mut heard = (BTreeSet::new(), BTreeSet::new());
                    for change in ears[who].take_changes() {
                        match change {
                            Change::Written { gpa, bytes } => {
                                heard.0.extend(gpa.raw() - BASE..gpa.raw() - BASE + u64::from(bytes));
                            }
                            Change::Flagged(off) => { heard.1.insert((off.raw() - BASE) >> 12); }
                            Change::Everything => prop_assert!(false, "nothing overflowed"),
                        }
                    }
                    prop_assert_eq!(heard, (std::mem::take(&mut model.written), std::mem::take(&mut model.flagged)));
                }
            }
            for page in 0..PAGES {
                for code in [false, true] {
                    let owned: Vec<bool> = ears.iter().map(|e| e.has_claimed(off(page), flag(code))).collect();
                    let expected: Vec<bool> = models.iter().map(|m| m.claims.contains(&(page, code))).collect();
                    prop_assert_eq!(mem.page_flags(off(page)).contains(flag(code)), expected.contains(&true));
                    prop_assert_eq!(owned, expected);
                }
            }
        }
    }
}

#[test]
fn claims_made_alone_stay_when_a_second_comes() {
    let mem = Arc::new(GuestMemory::new(4 << 20).unwrap());
    let first = Watcher::register(mem.clone()).unwrap();
    first.claim(off(0), PageFlags::CODE);
    let second = Watcher::register(mem.clone()).unwrap();
    assert!(first.has_claimed(off(0), PageFlags::CODE) && !second.has_claimed(off(0), PageFlags::CODE));
    assert!(second.claim(off(0), PageFlags::CODE));
    first.release(off(0), PageFlags::CODE);
    assert!(mem.page_flags(off(0)).contains(PageFlags::CODE), "the second needs it");
    drop(second);
    assert_eq!(mem.page_flags(off(0)), PageFlags::NONE);
}

/// A watcher that never drains has a bounded queue, and whatever it claimed is still covered by it.
#[test]
fn queues_are_bounded() {
    let mem = Arc::new(GuestMemory::new(64 << 20).unwrap());
    let (busy, asleep) = (Watcher::register(mem.clone()).unwrap(), Watcher::register(mem.clone()).unwrap());
    (0..4096).for_each(|page| assert!(asleep.claim(off(page), PageFlags::CODE)));
    for n in 0..100_000u64 {
        let at = BASE + ((n % 16) << 12) + ((n * 24) & 0xff8);
        busy.stored(Gpa::new(at), RamOffset::new(at), 8);
    }
    let changes = asleep.take_changes();
    assert!(changes.len() <= 1100, "{}", changes.len());
    for page in 0..16 {
        let covers =
            |c: &Change| matches!(c, Change::Written { gpa, .. } if gpa.page() == Gpa::new(BASE + (page << 12)).page());
        assert!(changes.iter().any(covers), "page {page}");
    }
    for n in 0..100_000u64 {
        let at = BASE + ((n % 4096) << 12);
        busy.stored(Gpa::new(at), RamOffset::new(at), 8);
    }
    assert_eq!(asleep.take_changes(), [Change::Everything]);
}

#[test]
fn no_more_than_32() {
    let mem = Arc::new(GuestMemory::new(4 << 20).unwrap());
    let mut all: Vec<Watcher> = (0..32).map(|_| Watcher::register(mem.clone()).unwrap()).collect();
    assert!(matches!(Watcher::register(mem.clone()), Err(MemoryError::TooManyWatchers(32))));
    all.remove(7);
    assert!(Watcher::register(mem).is_ok(), "a place became free");
}
