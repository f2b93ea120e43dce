//! Takes the host code that the translator makes now for right: `crates/jit/tests/golden` is written anew.

use crate::XtaskError;
use std::process::Command;

/// Renews the listings, and says how to look at what changed.
///
/// # Errors
/// When cargo can't be run.
pub fn run() -> Result<bool, XtaskError> {
    let status = Command::new("cargo")
        .args(["test", "-q", "-p", "umbra-jit", "--test", "golden", "host_code"])
        .env("UMBRA_BLESS", "1")
        .status()
        .map_err(|error| XtaskError::Start("cargo", error))?;
    println!("git diff crates/jit/tests/golden shows what changed");
    Ok(status.success())
}
