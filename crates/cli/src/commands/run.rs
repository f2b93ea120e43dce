//! `umbra run`.

use crate::exit_code;
use crate::run::{Args, report};

/// Runs the guest and reports; gives the exit code.
pub fn execute(args: &Args) -> u8 {
    match crate::run::run(args) {
        Ok(report) => {
            report.print(args.json);
            report.exit_code
        }
        Err(error) => {
            report::print_error(&error, args.json);
            exit_code::HOST
        }
    }
}
