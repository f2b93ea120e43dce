//! `--trace`, `--trace-range`, `--trace-file`, `--trace-json`.

use super::args::{TraceArgs, TraceChoice};
use crate::error::CliError;
use serde_json::json;
use std::fs::File;
use std::io::{BufWriter, Write, stderr};
use std::sync::{Arc, Mutex};
use umbra_cpu::trace::{Record, Sink, Trace, What};

/// The traces of `cpus` CPUs that the arguments ask for; none if they ask for nothing.
///
/// # Errors
/// When the file can't be made.
pub fn of(args: &TraceArgs, cpus: u32) -> Result<Vec<Trace>, CliError> {
    if args.trace.is_empty() {
        return Ok(Vec::new());
    }
    let wants = |choice| args.trace.contains(&choice);
    let what = What {
        instructions: wants(TraceChoice::Insn),
        exceptions: wants(TraceChoice::Exc),
        io: wants(TraceChoice::Io),
        mmu: wants(TraceChoice::Mmu),
    };
    let out: Box<dyn Write + Send> = match &args.trace_file {
        None => Box::new(stderr()),
        Some(path) => {
            let file = File::create(path).map_err(|source| CliError::Trace { path: path.clone(), source })?;
            Box::new(BufWriter::new(file))
        }
    };
    let sink = sink(out, args.trace_json, cpus > 1);
    let range = args.trace_range.clone().unwrap_or(0..u64::MAX);
    Ok((0..cpus).map(|cpu| Trace { what, range: range.clone(), cpu, sink: Arc::clone(&sink) }).collect())
}

/// Nobody is left to tell when a trace can't be written any more.
fn sink(mut out: Box<dyn Write + Send>, as_json: bool, several: bool) -> Sink {
    Arc::new(Mutex::new(move |record: &Record<'_>| {
        let _ = match (as_json, several) {
            (true, _) => writeln!(out, "{}", line_of(record)),
            (false, true) => writeln!(out, "{} {} cpu {} {}", record.kind, record.time.0, record.cpu, record.text),
            (false, false) => writeln!(out, "{} {} {}", record.kind, record.time.0, record.text),
        };
    }))
}

fn line_of(record: &Record<'_>) -> serde_json::Value {
    let mut line = json!({ "kind": record.kind, "time_ns": record.time.0, "cpu": record.cpu, "text": record.text });
    if let Some(event) = record.event {
        line["mmu"] = serde_json::to_value(event).unwrap_or_default();
    }
    line
}
