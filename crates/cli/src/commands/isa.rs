//! `umbra isa`: the instruction rows, and which of them are verified.

use crate::exit_code;
use serde_json::json;
use std::io::{self, Write};
use umbra_cpu::coverage::{self, RowCoverage};

/// Arguments of `umbra isa`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Sort the rows into verified and unverified ones, the latter with their codes and reasons
    #[arg(long)]
    verified: bool,
    /// List general-purpose and system instructions that no row covers (they raise #UD)
    #[arg(long, conflicts_with = "verified")]
    missing: bool,
    /// One JSON document
    #[arg(long)]
    json: bool,
}

/// Prints the listing; gives the exit code.
pub fn execute(args: &Args) -> u8 {
    let mut out = io::stdout().lock();
    let printed = match (args.json, args.missing, args.verified) {
        (true, ..) => print_json(&mut out),
        (_, true, _) => coverage::missing().try_for_each(|code| writeln!(out, "{code:?}")),
        (_, _, true) => print_verified(&mut out),
        _ => coverage::rows().iter().try_for_each(|row| print_row(&mut out, row)),
    };
    // A closed pipe is the reader's choice.
    match printed {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => exit_code::HOST,
        _ => 0,
    }
}

fn print_row(out: &mut impl Write, row: &RowCoverage) -> io::Result<()> {
    let (all, open) = (row.codes.len(), row.unverified.len());
    let name = format!("{:?}", row.row.mnemonic);
    writeln!(out, "{name:<20} {:>3} of {all:>3} codes verified  {}", all - open, row.row.section)
}

fn print_verified(out: &mut impl Write) -> io::Result<()> {
    let (verified, open): (Vec<_>, Vec<_>) = coverage::rows().into_iter().partition(|row| row.unverified.is_empty());
    writeln!(out, "Verified: every code ran natively and interpreted, with the same outcome")?;
    verified.iter().try_for_each(|row| print_row(out, row))?;
    writeln!(out, "\nUnverified, wholly or in part")?;
    for row in &open {
        print_row(out, row)?;
        for (code, reason) in &row.unverified {
            let name = format!("{code:?}");
            writeln!(out, "    {name:<32} {reason}")?;
        }
    }
    let codes = |rows: &[RowCoverage]| rows.iter().map(|row| row.codes.len()).sum::<usize>();
    let unverified: usize = open.iter().map(|row| row.unverified.len()).sum();
    let all = codes(&verified) + codes(&open);
    writeln!(
        out,
        "\n{} of {} rows, {} of {all} codes verified",
        verified.len(),
        verified.len() + open.len(),
        all - unverified
    )
}

fn print_json(out: &mut impl Write) -> io::Result<()> {
    let rows: Vec<_> = coverage::rows()
        .iter()
        .map(|row| {
            let names = |codes: &mut dyn Iterator<Item = String>| codes.collect::<Vec<_>>();
            let open: serde_json::Map<_, _> =
                row.unverified.iter().map(|(code, reason)| (format!("{code:?}"), json!(reason))).collect();
            json!({
                "mnemonic": format!("{:?}", row.row.mnemonic),
                "section": row.row.section,
                "codes": names(&mut row.codes.iter().map(|code| format!("{code:?}"))),
                "unverified": open,
            })
        })
        .collect();
    let missing: Vec<_> = coverage::missing().map(|code| format!("{code:?}")).collect();
    writeln!(out, "{}", json!({ "rows": rows, "missing": missing }))
}
