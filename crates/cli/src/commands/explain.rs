//! `umbra explain`.

use crate::exit_code;
use crate::run::{explain, finish, report};
use crate::size::parse_address;
use clap::Args as ClapArgs;

/// Run a guest to its end (or to --timeout) and explain the state it left: registers bit by bit, the
/// paging mode, the walks of RIP, RSP, CR2 and of any address given, level by level. The explanation goes
/// to stderr, the guest's serial port to stdout. Exit codes are those of `umbra run`.
#[derive(ClapArgs, Debug)]
#[group(id = "explain")]
pub struct Args {
    /// A linear address to walk; may be given several times
    #[arg(id = "explained", long = "address", value_name = "GVA", value_parser = parse_address)]
    addresses: Vec<u64>,
    #[command(flatten)]
    run: crate::run::Args,
}

/// Runs and explains; gives the exit code of the run.
pub fn execute(args: &Args) -> u8 {
    let (mut report, guest) = match finish(&args.run) {
        Ok(finished) => finished,
        Err(error) => {
            report::print_error(&error, args.run.json);
            return exit_code::HOST;
        }
    };
    let state = explain::state(&guest, &args.addresses);
    match (&mut report.explanation, state) {
        // A fault's report comes first; the state's adds the addresses asked for.
        (Some(fault), Some(state)) if !fault.causes.is_empty() => {
            fault.text.push_str("final state:\n");
            fault.text.push_str(&state.text);
        }
        (explanation, state) => *explanation = state.or(explanation.take()),
    }
    report.print(args.run.json);
    report.exit_code
}
