//! `umbra diff`: engines compared with each other.

mod args;
mod files;
mod progress;
mod roms;

pub use args::Args;

use crate::exit_code;
use files::{FileError, Files};
use progress::Progress;
use std::path::Path;
use std::time::Instant;
use umbra_oracle::campaign::{self, Finding, Generator, Tally, Verdict, judge};
use umbra_oracle::case::Case;
use umbra_oracle::engine::Engine;
use umbra_oracle::engines::{self, MakeError};
use umbra_oracle::minimise::minimise;
use umbra_oracle::saved::{self, Origin};
use umbra_oracle::trace::{Kernel, TraceError};

/// A difference, or too few answers to say that there is none.
const DIFFERENT: u8 = 1;
/// Differences that are made smaller and written; the others are only listed.
const MINIMISED: usize = 5;

/// What keeps a comparison from being made.
#[derive(Debug, thiserror::Error)]
enum DiffError {
    #[error(transparent)]
    Engine(#[from] MakeError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("--kernel: {0}")]
    Trace(#[from] TraceError),
    #[error("--engines: name at least two, for example interp,host")]
    TooFew,
    #[error("no generator is called {name:?}: use {}", names())]
    Generator { name: String },
    #[error("no ROM is called {0:?}: see umbra rom list")]
    Rom(String),
}

fn names() -> String {
    Generator::NAMES.map(|(name, _)| name).join(", ")
}

/// Compares, replays or merges; gives the exit code.
pub fn execute(args: &Args) -> u8 {
    let done = match (&args.replay, &args.merge[..], &args.rom) {
        (Some(case), ..) => replay(args, case),
        (_, [_, ..], _) => merge(args),
        (.., Some(rom)) => engines_of(args).and_then(|mut engines| roms::compare(&mut engines, rom)),
        _ => compare(args),
    };
    done.map_or_else(
        |error| {
            eprintln!("umbra: {error}");
            exit_code::HOST
        },
        |good| if good { exit_code::CLEAN } else { DIFFERENT },
    )
}

fn engines_of(args: &Args) -> Result<Vec<Box<dyn Engine>>, DiffError> {
    if args.engines.len() < 2 {
        return Err(DiffError::TooFew);
    }
    Ok(engines::make_all(&args.engines)?)
}

fn compare(args: &Args) -> Result<bool, DiffError> {
    let (name, generator) = generator(args)?;
    let mut engines = engines_of(args)?;
    let (shard, of) = args.shard;
    let mut tally = Tally {
        engines: args.engines.clone(),
        generator: name,
        seed: args.seed,
        shards: vec![format!("{shard}/{of}")],
        ..Tally::default()
    };
    let indices = (shard..args.cases).step_by(of as usize);
    let start = Instant::now();
    let mut progress = Progress::new(start, (args.cases.saturating_sub(shard)).div_ceil(of));
    let files = Files::new(args.save.as_deref());
    campaign::run(&mut engines, &generator, indices, &mut tally, |tally| {
        progress.show(tally);
        args.keep_going || tally.findings.len() < MINIMISED
    });
    tally.seconds = start.elapsed().as_secs_f64();
    progress.end(&tally);
    for finding in tally.findings.iter().take(MINIMISED) {
        let case = generator.case(args.seed, finding.index);
        smaller(args, &mut engines, &case, finding, &files)?;
    }
    if let Some(more @ 1..) = tally.findings.len().checked_sub(MINIMISED) {
        println!("\n{more} more differences are not minimised");
    }
    if let Some(path) = &args.json {
        files::write_json(path, &tally)?;
    }
    Ok(tally.is_good())
}

/// What makes the cases, and its name.
fn generator(args: &Args) -> Result<(String, Generator), DiffError> {
    let Some(image) = &args.kernel else {
        let made = Generator::named(&args.generator);
        let generator = made.ok_or_else(|| DiffError::Generator { name: args.generator.clone() })?;
        return Ok((args.generator.clone(), generator));
    };
    let initrd = args.initrd.as_deref().map(files::read).transpose()?;
    let kernel = Kernel { image: files::read(image)?, initrd, command_line: args.append.clone() };
    Ok(("trace".into(), Generator::trace(&kernel, args.seed)?))
}

/// Minimises a finding, prints and writes it.
fn smaller(
    args: &Args,
    engines: &mut [Box<dyn Engine>],
    case: &Case,
    finding: &Finding,
    files: &Files,
) -> Result<(), DiffError> {
    let small = minimise(case, &mut |case| difference(engines, case).is_some());
    let text = difference(engines, &small).unwrap_or_else(|| finding.difference.clone());
    println!("\ncase {}: {text}", finding.index);
    for step in &small.code.steps {
        println!("    {}", saved::disassemble(small.layout, step));
    }
    let origin = Origin {
        engines: args.engines.clone(),
        generator: if args.kernel.is_some() { "trace".into() } else { args.generator.clone() },
        seed: args.seed.to_string(),
        index: finding.index,
        difference: text,
    };
    for path in files.write(&small, &origin)? {
        println!("    {}", path.display());
    }
    Ok(())
}

/// What differs, stray writes included.
fn difference(engines: &mut [Box<dyn Engine>], case: &Case) -> Option<String> {
    let verdict = judge(engines, case);
    let stray = engines.iter_mut().filter_map(|engine| engine.settle().err()).last();
    match verdict {
        Verdict::Different(text) => Some(text),
        _ => stray,
    }
}

fn replay(args: &Args, path: &Path) -> Result<bool, DiffError> {
    let (case, origin) = files::read_case(path)?;
    let names = if args.engines_given() { &args.engines } else { &origin.engines };
    if names.len() < 2 {
        return Err(DiffError::TooFew);
    }
    let mut engines = engines::make_all(names)?;
    for step in &case.code.steps {
        println!("    {}", saved::disassemble(case.layout, step));
    }
    let verdict = match difference(&mut engines, &case) {
        Some(text) => Verdict::Different(text),
        None => judge(&mut engines, &case),
    };
    match &verdict {
        Verdict::Same => println!("same: {}", names.join(" and ")),
        Verdict::Different(text) => println!("different: {text}"),
        Verdict::CannotAnswer(reasons) => println!("cannot answer: {}", reasons.join("; ")),
    }
    Ok(verdict == Verdict::Same)
}

fn merge(args: &Args) -> Result<bool, DiffError> {
    let mut all: Option<Tally> = None;
    for path in &args.merge {
        let tally = files::read_json(path)?;
        match &mut all {
            None => all = Some(tally),
            Some(sum) => sum.merge(&tally).map_err(|source| FileError::merge(path, source))?,
        }
    }
    let Some(sum) = all else { return Ok(true) };
    progress::summary(&sum);
    sum.findings.iter().for_each(|finding| println!("case {}: {}", finding.index, finding.difference));
    if let Some(path) = &args.json {
        files::write_json(path, &sum)?;
    }
    Ok(sum.is_good())
}
