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

/// Sections of the test ROM `scenarios`, titled by numbers as in `"24, 26: ..."` and `"34-36: ..."`.
const ROM: [&str; 6] = ["address_spaces", "legacy", "rights", "rings", "tables", "trips"];

/// Why no section of it shows a scenario.
const NOT_IN_THE_ROM: [(&[u32], &str); 9] = [
    (&[1, 2, 57], "a guest sees no counts; the ROMs `embedded` and `costs` do the work that is counted"),
    (&[9], "about emulated writes beside others: here there is one way for all"),
    (&[43], "no profile offers CET: to a guest CR4.CET is reserved"),
    (&[25], "needs a 16-bit TSS and CS.L outside IA-32e mode; the tests of `arch` have all combinations"),
    (&[46, 47, 48, 76, 77], "what the host does between runs: registers, INIT, CPUID, the memory map"),
    (
        &[29, 70, 71, 73],
        "about which roots and entries are kept, which a guest sees no more of than in the sections it has",
    ),
    (&[78, 81, 82], "SMM and nested guests are not offered"),
    (&[79, 80], "asynchronous page faults need memory that arrives on demand"),
    (&[83, 84], "several CPUs and random sequences are other tests'"),
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

/// The numbers in a section's title.
fn titled(title: &str) -> Vec<u32> {
    let Some((numbers, _)) = title.split_once(':') else { return Vec::new() };
    let mut found = Vec::new();
    for part in numbers.split(", ") {
        let mut ends = part.split('-').map(str::parse::<u32>);
        match (ends.next(), ends.next()) {
            (Some(Ok(n)), None) => found.push(n),
            (Some(Ok(first)), Some(Ok(last))) => found.extend(first..=last),
            _ => return Vec::new(),
        }
    }
    found
}

#[test]
fn every_scenario_has_a_section_of_the_rom_or_a_reason() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../test-roms/src/scenarios");
    let text = |name: &str| std::fs::read_to_string(folder.join(name).with_extension("rs")).expect("a file of the ROM");
    let texts: Vec<String> = ROM.iter().map(|name| text(name)).collect();
    let shown: BTreeSet<u32> = texts.iter().flat_map(|text| text.split('"')).flat_map(titled).collect();
    let reasons: BTreeSet<u32> = NOT_IN_THE_ROM.iter().flat_map(|(numbers, _)| numbers.iter().copied()).collect();
    for n in 1..=LAST {
        assert!(shown.contains(&n) != reasons.contains(&n), "scenario {n}: a section, or a reason, and not both");
    }
    assert_eq!(shown.len() + reasons.len(), LAST as usize);
}

#[test]
fn every_hazard_has_a_test() {
    let text = include_str!("hazards.rs");
    for n in 1..=8 {
        assert!(text.contains(&format!("fn hazard_h{n}_")), "H{n}");
    }
}
