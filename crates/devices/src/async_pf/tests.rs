//! Against a model that keeps what a guest could know in plain lists.

use super::*;
use proptest::prelude::*;
use umbra_arch::VirtualTime;

const AREA: u64 = 0x1_2340;
const ALL: u64 = AREA | 0b1011;

fn context(cpl: u8, paging: bool, interruptible: bool) -> PageContext {
    PageContext { cpl, paging, interruptible }
}

const RING3: PageContext = PageContext { cpl: 3, paging: true, interruptible: true };

fn enabled(control: u64) -> AsyncPf {
    let mut apf = AsyncPf::new(5);
    apf.msr_write(KVM_ASYNC_PF_INT, 0xf3).unwrap();
    apf.msr_write(KVM_ASYNC_PF_EN, control).unwrap();
    assert_eq!(apf.take_ready(0), Some(Ready { token: WAKE_ALL, vector: 0xf3 }));
    apf
}

#[test]
fn reserved_bits_are_refused_and_change_nothing() {
    let mut apf = enabled(ALL);
    for bit in 0..64 {
        let value = AREA | 1 << bit;
        let refused = matches!(bit, 2 | 4 | 5);
        assert_eq!(apf.msr_write(KVM_ASYNC_PF_EN, value).is_err(), refused, "bit {bit}");
        if !refused {
            assert_eq!(apf.msr_read(KVM_ASYNC_PF_EN), Ok(value));
        }
    }
    assert!(apf.msr_write(KVM_ASYNC_PF_INT, 0x100).is_err());
    assert_eq!(apf.msr_read(KVM_ASYNC_PF_INT), Ok(0xf3));
    assert!(apf.msr_write(0x4b56_4d00, 0).is_err() && apf.msr_read(0x4b56_4d03).is_err());
}

#[test]
fn every_gate_is_judged_when_the_event_is_due() {
    for bits in 0..64u64 {
        let control = AREA | bits & 1 | bits >> 1 & 1 << 1 | bits & 1 << 3;
        let (cpl, paging, interruptible) = (if bits & 2 != 0 { 3 } else { 0 }, bits & 16 != 0, bits & 32 != 0);
        let mut apf = AsyncPf::new(0);
        apf.msr_write(KVM_ASYNC_PF_EN, control).unwrap();
        let on = control & 1 != 0 && control & 8 != 0;
        let expected = on && paging && interruptible && (cpl == 3 || control & 2 != 0);
        assert_eq!(apf.begin(GpaPage::new(7), context(cpl, paging, interruptible)).is_some(), expected, "{bits:#b}");
    }
}

#[test]
fn counters_of_tokens_are_never_0() {
    let mut apf = enabled(ALL);
    apf.counter = 0xf_fffe;
    let tokens: Vec<_> = (0..3).filter_map(|page| apf.begin(GpaPage::new(page), RING3)).collect();
    assert_eq!(tokens, [0xffff_f005, 0x1005, 0x2005]);
}

#[test]
fn init_disables_and_tokens_go_on() {
    let mut apf = enabled(ALL);
    let first = apf.begin(GpaPage::new(1), RING3).unwrap();
    apf.init();
    apf.page_arrived(GpaPage::new(1));
    assert!(!apf.has_ready() && apf.begin(GpaPage::new(2), RING3).is_none());
    assert_eq!((apf.msr_read(KVM_ASYNC_PF_EN), apf.msr_read(KVM_ASYNC_PF_INT)), (Ok(0), Ok(0)));
    apf.msr_write(KVM_ASYNC_PF_EN, ALL).unwrap();
    assert!(apf.begin(GpaPage::new(1), RING3).is_some_and(|token| token > first));
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Access { page: u64, cpl: u8, paging: bool, interruptible: bool },
    Arrive(u64),
    Take,
    Clear,
    Enable { always: bool, interrupt: bool, on: bool },
    Save,
}

fn step() -> impl Strategy<Value = Step> {
    let often = |p| proptest::bool::weighted(p);
    prop_oneof![
        8 => (0u64..90, prop::sample::select(vec![0u8, 3]), often(0.9), often(0.9))
            .prop_map(|(page, cpl, paging, interruptible)| Step::Access { page, cpl, paging, interruptible }),
        4 => (0u64..90).prop_map(Step::Arrive),
        4 => Just(Step::Take),
        2 => Just(Step::Clear),
        1 => (often(0.5), often(0.9), often(0.8)).prop_map(|(always, interrupt, on)| Step::Enable { always, interrupt, on }),
        1 => Just(Step::Save),
    ]
}

/// What must hold, said in another way: a list of (token, page, arrived) in the order of arrival.
#[derive(Default)]
struct Model {
    events: Vec<(u32, u64, bool)>,
    always: bool,
    on: bool,
    broadcast: bool,
    used: Vec<u32>,
    word: u32,
}

proptest! {
    #[test]
    fn agrees_with_plain_lists(steps in prop::collection::vec(step(), 1..400)) {
        let mut apf = AsyncPf::new(3);
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Access { page, cpl, paging, interruptible } => {
                    let token = apf.begin(GpaPage::new(page), context(cpl, paging, interruptible));
                    let free = model.events.len() < 64 && !model.events.iter().any(|e| e.1 == page);
                    let wanted = model.on && paging && interruptible && (model.always || cpl == 3);
                    prop_assert_eq!(token.is_some(), free && wanted);
                    if let Some(token) = token {
                        prop_assert!(!model.used.contains(&token) && token & 0xfff == 3 && token >> 12 != 0);
                        model.used.push(token);
                        model.events.push((token, page, false));
                    }
                }
                Step::Arrive(page) => {
                    apf.page_arrived(GpaPage::new(page));
                    if let Some(at) = model.events.iter().position(|e| e.1 == page && !e.2) {
                        let (token, page, _) = model.events.remove(at);
                        model.events.push((token, page, true));
                    }
                }
                Step::Take => {
                    let ready = apf.take_ready(model.word);
                    let next = model.events.iter().position(|e| e.2);
                    let expected = match (model.broadcast, next) {
                        _ if model.word != 0 || !model.on => None,
                        (true, _) => Some(WAKE_ALL),
                        (false, at) => at.map(|at| model.events[at].0),
                    };
                    prop_assert_eq!(ready.map(|r| r.token), expected);
                    if let Some(token) = expected {
                        model.word = token;
                        model.broadcast &= token != WAKE_ALL;
                        model.events.retain(|e| e.0 != token);
                    }
                }
                Step::Clear => model.word = 0,
                Step::Enable { always, interrupt, on } => {
                    let bits = u64::from(on) | u64::from(always) << 1 | u64::from(interrupt) << 3;
                    apf.msr_write(KVM_ASYNC_PF_EN, AREA | bits).unwrap();
                    (model.always, model.on) = (always, on && interrupt);
                    if model.on {
                        model.broadcast |= !model.events.iter().any(|e| e.2);
                    } else {
                        model.events.clear();
                        model.broadcast = false;
                    }
                }
                Step::Save => apf = postcard::from_bytes(&postcard::to_stdvec(&apf).unwrap()).unwrap(),
            }
            prop_assert_eq!(apf.has_ready(), model.broadcast || model.events.iter().any(|e| e.2));
        }
    }

    /// Pages arrive a latency after they were first needed, in order, once.
    #[test]
    fn pages_arrive_once(needs in prop::collection::vec((0u64..9, 0u64..30), 1..100)) {
        const LATENCY: u64 = 25;
        let mut arrivals = PageArrivals::default();
        arrivals.set_latency(LATENCY);
        let (mut now, mut expected) = (0, Vec::<(u64, u64)>::new());
        for (page, pass) in needs {
            now += pass;
            while let Some(arrived) = arrivals.take_arrived(VirtualTime(now)) {
                prop_assert_eq!(expected.remove(0).1, arrived.raw());
            }
            prop_assert!(expected.first().is_none_or(|e| e.0 > now));
            let time = arrivals.need(VirtualTime(now), GpaPage::new(page)).0;
            if !expected.iter().any(|e| e.1 == page) {
                expected.push((now + LATENCY, page));
                expected.sort_unstable();
            }
            prop_assert!(expected.contains(&(time, page)));
            prop_assert_eq!(arrivals.next_event().map(|t| t.0), Some(expected[0].0));
        }
    }
}
