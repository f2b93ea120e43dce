//! The list of all scenarios: each number has a test named for it here, or a line that says where it is proven or why
//! it is not offered.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const LAST: u32 = 84;

/// Files whose tests carry numbers: `scenario_07_...`, `scenario_03_and_04_...`, `scenario_53_to_55_...`.
const FILES: [&str; 6] = [
    include_str!("scenarios_rights.rs"),
    include_str!("scenarios_entry.rs"),
    include_str!("scenarios_modes.rs"),
    include_str!("scenarios_cr3.rs"),
    include_str!("scenarios_shadow.rs"),
    include_str!("scenarios_processors.rs"),
];

/// Scenarios of features that are not offered, or not here.
const NOT_HERE: [(u32, &str); 1] =
    [(81, "nested guests are not offered; 82 is tested as far as page roles keep guests apart")];

/// Scenarios proven by tests of other names, and what else sees a scenario from a guest: file, function, numbers.
const ALSO: [(&str, &str, &[u32]); 12] = [
    ("crates/machine/tests/async_pf/main.rs", "scenario_79_without_paging_or_at_cpl_0_the_cpu_waits", &[79]),
    ("crates/machine/tests/async_pf/main.rs", "scenario_80_events_survive_an_excursion_without_paging", &[80]),
    ("crates/mmu/tests/mmu/sequences/mod.rs", "every_mode_does_what_the_manual_says", &[84]),
    ("crates/mmu/tests/mmu/sequences/mod.rs", "two_processors_do_what_the_manual_says", &[83, 84]),
    (
        "crates/mmu/tests/mmu/enumerate/mod.rs",
        "every_combination_is_as_the_manual_says",
        &[5, 7, 13, 18, 20, 21, 22, 23],
    ),
    ("crates/mmu/tests/mmu/acceptance.rs", "toggling_wp_costs_nothing", &[1, 2]),
    ("crates/mmu/tests/mmu/acceptance.rs", "long_to_pae_and_back_costs_nothing", &[31]),
    ("crates/arch/tests/control_registers/main.rs", "cr0", &[24, 25, 26, 27, 43]),
    ("crates/arch/tests/control_registers/main.rs", "cr4", &[37, 38, 41, 43, 50]),
    ("crates/arch/tests/control_registers/host.rs", "host_replacement", &[46]),
    ("crates/cpu/tests/two_cpus.rs", "edited_entries_reach_a_cpu_that_used_them", &[83]),
    ("test-roms/src/pages.rs", "matrix", &[5, 6, 7, 15, 16, 17, 18, 20]),
];

/// The numbers in a test's name.
fn numbers(name: &str) -> BTreeSet<u32> {
    let words: Vec<&str> = name.split('_').collect();
    let number = |at: usize| words.get(at).and_then(|w| w.parse::<u32>().ok());
    let Some(first) = number(1) else { return BTreeSet::new() };
    match (words.get(2), number(3)) {
        (Some(&"and"), Some(second)) => [first, second].into(),
        (Some(&"to"), Some(last)) => (first..=last).collect(),
        _ => [first].into(),
    }
}

fn tests_by_number() -> BTreeMap<u32, Vec<String>> {
    let mut found: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for line in FILES.iter().flat_map(|text| text.lines()) {
        let Some(name) = line.strip_prefix("fn scenario_") else { continue };
        let name = format!("scenario_{}", name.split('(').next().unwrap_or_default());
        numbers(&name).into_iter().for_each(|n| found.entry(n).or_default().push(name.clone()));
    }
    found
}

#[test]
fn every_scenario_has_a_test_or_a_reason() {
    let tests = tests_by_number();
    let reasons: BTreeSet<u32> = NOT_HERE.iter().map(|&(n, _)| n).collect();
    for n in 1..=LAST {
        let proven = tests.contains_key(&n) || ALSO.iter().any(|(_, _, numbers)| numbers.contains(&n));
        assert!(proven != reasons.contains(&n), "scenario {n}: a test, or a reason, and not both");
    }
    assert!(tests.keys().all(|n| (1..=LAST).contains(n)));
}

#[test]
fn what_proves_a_scenario_elsewhere_exists() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for (file, function, _) in ALSO {
        let text = std::fs::read_to_string(top.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert!(text.contains(&format!("fn {function}(")), "{file} has no {function}");
    }
}

#[test]
fn every_hazard_has_a_test() {
    let text = include_str!("hazards.rs");
    for n in 1..=8 {
        assert!(text.contains(&format!("fn hazard_h{n}_")), "H{n}");
    }
}
