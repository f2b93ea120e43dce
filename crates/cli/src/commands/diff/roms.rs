//! Whole test ROMs on several engines.

use super::DiffError;
use umbra_oracle::engine::{Engine, RomAnswer};
use umbra_test_roms::{ROMS, Rom};

/// Compares the reports of the ROM of that name, or of all; true if none differs and enough were answered.
pub fn compare(engines: &mut [Box<dyn Engine>], name: &str) -> Result<bool, DiffError> {
    let chosen: Vec<&Rom> = ROMS.iter().filter(|rom| name == "all" || rom.name == name).collect();
    if chosen.is_empty() {
        return Err(DiffError::Rom(name.into()));
    }
    let (mut different, mut unanswered) = (0, 0);
    for rom in &chosen {
        let mut reports = Vec::new();
        for engine in engines.iter_mut() {
            match engine.run_rom(rom) {
                RomAnswer::Report(text) => reports.push((engine.name(), text)),
                RomAnswer::CannotAnswer(why) => println!("{}: {} cannot answer: {why}", rom.name, engine.name()),
            }
        }
        let [(first, reference), others @ ..] = reports.as_slice() else {
            unanswered += 1;
            continue;
        };
        unanswered += usize::from(others.is_empty());
        for (name, text) in others {
            let lines = reference.lines().zip(text.lines()).find(|(a, b)| a != b);
            match (reference == text, lines) {
                (true, _) => println!("{}: {first} and {name} say the same, {} lines", rom.name, text.lines().count()),
                (false, lines) => {
                    different += 1;
                    let (a, b) = lines.unwrap_or(("one report is longer", ""));
                    println!("{}: different\n  {first}: {a}\n  {name}: {b}", rom.name);
                }
            }
        }
    }
    Ok(different == 0 && 2 * unanswered <= chosen.len())
}
