//! Engines agree with each other on a few cases of every generator.
#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use umbra_hostexec::native::Mode;
use umbra_mmu::MmuOptions;
use umbra_oracle::campaign::{Verdict, judge};
use umbra_oracle::case::Case;
use umbra_oracle::compare::{Comparison, compare};
use umbra_oracle::engine::{Answer, Outcome};
use umbra_oracle::engines::{self, Blank, Window, make};
use umbra_oracle::random::Random;
use umbra_oracle::ring0::{control, shapes};
use umbra_oracle::rows::Rows;
use umbra_oracle::saved;

fn outcome(answer: Answer, case: &Case) -> Outcome {
    match answer {
        Answer::Outcome(outcome) => outcome,
        Answer::CannotAnswer(why) => panic!("{why}: {case:x?}"),
    }
}

fn check(names: &[&str], cases: u64, generate: impl Fn(&mut Random) -> Case) {
    let mut engines: Vec<_> = names.iter().map(|name| make(name).unwrap()).collect();
    for seed in 0..cases {
        let case = generate(&mut Random::new(seed));
        let outcomes: Vec<_> = engines.iter_mut().map(|engine| outcome(engine.run(&case), &case)).collect();
        for (name, other) in names.iter().zip(&outcomes).skip(1) {
            let result = compare(&case, (names[0], &outcomes[0]), (name, other));
            assert_eq!(result, Comparison::Same, "seed {seed}: {:02x?} from {:x?}", case.code.steps, case.state);
        }
    }
}

/// The translator translates everything here.
#[test]
fn sequences_and_shapes_are_the_same_when_they_are_translated() {
    check(&["interp", "jit"], 150, control::case);
    check(&["interp", "jit"], 1000, shapes::case);
}

#[test]
fn test_roms_report_the_same_when_they_are_translated() {
    let (mut interp, mut jit) = (make("interp").unwrap(), make("jit").unwrap());
    for rom in umbra_test_roms::ROMS {
        assert_eq!(interp.run_rom(rom), jit.run_rom(rom), "{}", rom.name);
    }
}

#[test]
fn control_sequences_are_the_same_in_every_mmu_mode() {
    check(&["interp", "interp-unload", "interp-drop", "interp-kvm-role"], 150, control::case);
}

#[test]
fn page_table_shapes_are_as_the_model_says() {
    check(&["interp", "model"], 1000, shapes::case);
}

/// Single instructions end the same when the exception is delivered to ring 0 and taken from there.
#[test]
fn a_delivered_exception_is_the_raised_one() {
    let mut bare = Window::all(&engines::profile()).unwrap();
    let mut whole = Blank::new(&engines::profile(), MmuOptions::default()).unwrap();
    let rows = Rows::new(&engines::profile());
    let mut ends = BTreeMap::<String, usize>::new();
    for seed in 0..1500 {
        let case = rows.case(&mut Random::new(seed));
        let number = Mode::ALL.iter().position(|mode| case.layout == umbra_oracle::case::Layout::Window(*mode));
        let a = outcome(bare[number.unwrap()].run(&case), &case);
        let b = outcome(whole.run(&case), &case);
        let result = compare(&case, ("bare", &a), ("whole", &b));
        assert!(!matches!(result, Comparison::Different(_)), "{seed} {:02x?}: {result:?}", case.code.steps);
        *ends.entry(format!("{:?}", a.end).chars().take(20).collect()).or_default() += 1;
    }
    assert!(ends.len() > 5, "{ends:?}");
}

/// Differences that were found once, each on its engines.
#[test]
fn saved_cases_stay_the_same() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cases");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let (case, origin) = saved::read(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(saved::read(&saved::write(&case, &origin)).unwrap(), (case.clone(), origin.clone()));
        let mut engines: Vec<_> = origin.engines.iter().map(|name| make(name).unwrap()).collect();
        let verdict = judge(&mut engines, &case);
        // On this host's processor it may be one of several right answers.
        let free =
            matches!(&verdict, Verdict::CannotAnswer(why) if why.iter().all(|why| why.starts_with("undefined: ")));
        assert!(free || verdict == Verdict::Same, "{}: {verdict:?}", path.display());
        count += 1;
    }
    assert!(count > 0, "no cases in {folder}");
}
