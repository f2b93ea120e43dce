//! Host code of guest instructions, as it was when somebody last looked at it: `tests/golden/*.txt`.
//!
//! A line `== HEX NOTE` asks for the listing of this code, which follows: 64-bit code, but for that in `narrow.txt`. After a change of code generation
//! `cargo xtask bless` writes the listings anew, and the change shows in review.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use umbra_jit::{JitOptions, SampleMode, translations_of};

/// Set by `cargo xtask bless`.
const BLESS: &str = "UMBRA_BLESS";

fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// The listing of one case.
fn listing(case: &str, mode: SampleMode) -> String {
    let hex = case.split_whitespace().next().unwrap_or_default();
    let code: Vec<u8> = (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
    let blocks = translations_of(&code, mode, JitOptions::DEFAULT);
    let blocks = blocks.unwrap_or_else(|error| panic!("{case}: {error}"));
    blocks.iter().map(ToString::to_string).collect()
}

/// A file with the listings of its cases as they are now.
fn renewed(text: &str, mode: SampleMode) -> String {
    let mut out = String::new();
    for line in text.lines() {
        if let Some(case) = line.strip_prefix("== ") {
            write!(out, "{line}\n{}\n", listing(case, mode)).unwrap();
        } else if line.starts_with('#') {
            writeln!(out, "{line}\n").unwrap();
        }
    }
    out
}

#[test]
fn host_code_is_as_it_was_looked_at() {
    let mut differences = String::new();
    for file in files() {
        let text = std::fs::read_to_string(&file).unwrap();
        let mode = if file.ends_with("narrow.txt") { SampleMode::Bits32 } else { SampleMode::Bits64 };
        let now = renewed(&text, mode);
        if std::env::var_os(BLESS).is_some() {
            std::fs::write(&file, now).unwrap();
        } else if let Some((line, (was, is))) = text.lines().zip(now.lines()).enumerate().find(|(_, (a, b))| a != b) {
            writeln!(differences, "{}:{}\n  was {was}\n  is  {is}", file.display(), line + 1).unwrap();
        } else if text != now {
            writeln!(differences, "{}: its end", file.display()).unwrap();
        }
    }
    assert!(differences.is_empty(), "{differences}cargo xtask bless writes them anew; git diff shows all changes");
}

/// The ways of doing an instruction: the variants of `Kind`.
fn ways() -> Vec<&'static str> {
    let source = include_str!("../src/plan.rs");
    let (_, kinds) = source.split_once("pub enum Kind {\n").unwrap();
    let (kinds, _) = kinds.split_once("\n}\n").unwrap();
    let variant = |line: &'static str| line.strip_prefix("    ").filter(|name| name.starts_with(char::is_uppercase));
    kinds.lines().filter_map(variant).map(|name| name.split(|c: char| !c.is_alphanumeric()).next().unwrap()).collect()
}

#[test]
fn every_way_has_a_case() {
    let text: String = files().iter().map(|file| std::fs::read_to_string(file).unwrap()).collect();
    let ways = ways();
    assert!(ways.len() > 10 && ways.contains(&"Helper"), "{ways:?}");
    for way in ways {
        let column = format!("  {way}");
        let has =
            |line: &str| line.split_once(&column).is_some_and(|(_, rest)| !rest.starts_with(char::is_alphanumeric));
        assert!(text.lines().any(has), "no case in tests/golden is done by {way}");
    }
}
