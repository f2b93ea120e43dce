//! The umbra command. Each subcommand is one file in [`commands`].
#![forbid(unsafe_code)]

mod commands;
mod error;
mod exit_code;
mod run;
mod size;

use clap::Parser;
use std::process::ExitCode;

/// Full-system x86-64 emulator for hosts without VT-x.
#[derive(Parser, Debug)]
#[command(name = "umbra", version, about, after_help = exit_code::TABLE)]
struct Cli {
    #[command(subcommand)]
    command: commands::Command,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing is left to do if the terminal refuses even this.
            let _ = error.print();
            return if error.use_stderr() { exit_code::HOST.into() } else { ExitCode::SUCCESS };
        }
    };
    ExitCode::from(commands::execute(cli.command))
}
