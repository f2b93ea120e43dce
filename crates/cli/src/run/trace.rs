//! `--trace`, `--trace-range`, `--trace-file`.

use super::args::{TraceArgs, TraceChoice};
use crate::error::CliError;
use std::fs::File;
use std::io::{BufWriter, stderr};
use std::sync::{Arc, Mutex};
use umbra_cpu::trace::{Sink, Trace, What};

/// The trace that the arguments ask for.
///
/// # Errors
/// When the file can't be made.
pub fn of(args: &TraceArgs) -> Result<Option<Trace>, CliError> {
    if args.trace.is_empty() {
        return Ok(None);
    }
    let wants = |choice| args.trace.contains(&choice);
    let what = What {
        instructions: wants(TraceChoice::Insn),
        exceptions: wants(TraceChoice::Exc),
        io: wants(TraceChoice::Io),
        mmu: wants(TraceChoice::Mmu),
    };
    let sink: Sink = match &args.trace_file {
        None => Arc::new(Mutex::new(stderr())),
        Some(path) => {
            let file = File::create(path).map_err(|source| CliError::Trace { path: path.clone(), source })?;
            Arc::new(Mutex::new(BufWriter::new(file)))
        }
    };
    Ok(Some(Trace { what, range: args.trace_range.clone().unwrap_or(0..u64::MAX), sink }))
}
