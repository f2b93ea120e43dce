//! The subcommands.

mod run;

use clap::Subcommand;

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run a guest; without --kernel the embedded one
    Run(Box<crate::run::Args>),
}

/// Executes a subcommand; gives the exit code.
pub fn execute(command: Command) -> u8 {
    match command {
        Command::Run(args) => run::execute(&args),
    }
}
