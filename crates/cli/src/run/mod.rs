//! Running one guest: from arguments to a report.

mod args;
mod clock;
mod engine;
mod escape;
pub mod explain;
mod guest;
mod host;
mod image;
mod lockstep;
mod measure;
pub mod report;
pub mod rom;
mod stdin;
mod terminal;
mod trace;
mod translations;

pub use args::{AccelArgs, Args, EngineChoice, JitOffArgs, MmuArgs, TraceArgs};
pub use guest::Guest;

use crate::error::CliError;
use crate::exit_code;
use engine::Engine;
use host::ConsoleHost;
use lockstep::{Course, Lockstep};
use measure::Measurements;
use report::{Acceleration, Report};
use std::time::Instant;
use umbra_machine::{End, Stop};

/// Builds the guest, runs it to its end and says how it went.
///
/// # Errors
/// [`CliError`] when nothing could be run.
pub fn run(args: &Args) -> Result<Report, CliError> {
    finish(args).map(|(report, _)| report)
}

/// As [`run`], with the guest as it is at the end.
///
/// # Errors
/// [`CliError`] when nothing could be run.
pub fn finish(args: &Args) -> Result<(Report, Guest), CliError> {
    let start = Instant::now();
    let mut measurements = Measurements::default();
    let mut turns = None;
    let (guest, mut host, course) = match args.jit.lockstep {
        None => {
            let mut guest = guest::build(args)?;
            let mut host = ConsoleHost::new(args)?;
            let end = to_the_end(&mut guest, &mut host, &mut measurements);
            (guest, host, Course::Same(end))
        }
        Some(blocks) => {
            let mut both = Lockstep::new(args, blocks)?;
            let mut host = ConsoleHost::new(args)?;
            let course = both.run(&mut host);
            turns = Some(both.turns());
            (both.into_guest(), host, course)
        }
    };
    let (end, difference) = match course {
        Course::Same(end) => (end, None),
        Course::Different(what) => (End::Stopped(Stop::Difference), Some(what)),
    };
    let verdict_missing = guest.verdict.is_some_and(|text| !host.has_sent(text.as_bytes()));
    drop(host);
    let mut exit_code = exit_code::of(&end, args.expect.is_some());
    if verdict_missing && exit_code == exit_code::CLEAN {
        exit_code = exit_code::NOT_SEEN;
    }
    let explanation = explain::end(&guest, &end);
    let report = Report {
        end,
        turns,
        difference,
        explanation,
        exit_code,
        verdict_missing,
        kind: guest.kind,
        state: guest.machine.vcpu(0).map(umbra_arch::Vcpu::state),
        guest_ns: guest.machine.now().0,
        retired: guest.machine.retired(),
        written_bytes: guest.written_bytes(),
        host: start.elapsed(),
        mmu: Some(guest.mmu_stats()),
        pages: guest.machine.page_stats(),
        jit: guest.jit_stats(),
        phases: measurements.finish(),
        acceleration: Acceleration::of(&guest),
        stats: args.stats || guest.is_embedded,
    };
    Ok((report, guest))
}

fn to_the_end(guest: &mut Guest, host: &mut ConsoleHost, measurements: &mut Measurements) -> End {
    loop {
        match guest.machine.run(host, None) {
            End::Mark(id) => measurements.mark(id, &guest.mmu_stats()),
            End::Stopped(Stop::HandOver) => guest.machine.vcpus_mut().for_each(Engine::hand_over),
            end => return end,
        }
    }
}
