//! The subcommands.

mod diff;
mod doctor;
mod dump;
mod explain;
mod isa;
mod rom;
mod run;

use clap::Subcommand;

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run a guest; without --kernel the embedded one
    Run(Box<crate::run::Args>),
    /// Run a guest to its end and explain the state it left
    Explain(Box<explain::Args>),
    /// Compare engines with each other on generated cases
    Diff(Box<diff::Args>),
    /// Say what this host offers and what Umbra will use
    Doctor(doctor::Args),
    /// Show the host code that the translator makes of guest code
    Dump(Box<dump::Args>),
    /// List the instructions and which of them are verified
    Isa(isa::Args),
    /// List or run the test ROMs
    Rom(rom::Args),
}

/// Executes a subcommand; gives the exit code.
pub fn execute(command: Command) -> u8 {
    match command {
        Command::Run(args) => run::execute(&args),
        Command::Explain(args) => explain::execute(&args),
        Command::Diff(args) => diff::execute(&args),
        Command::Doctor(args) => doctor::execute(&args),
        Command::Dump(args) => dump::execute(&args),
        Command::Isa(args) => isa::execute(&args),
        Command::Rom(args) => rom::execute(&args),
    }
}
