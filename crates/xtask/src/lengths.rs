//! No file is longer than a reader's patience.

use crate::sources::{self, Source};
use crate::{Findings, XtaskError};

const WARN: usize = 500;
const FAIL: usize = 800;

/// Checks every source file.
pub fn check() -> Result<Findings, XtaskError> {
    Ok(judge(&sources::all()?))
}

fn judge(sources: &[Source]) -> Findings {
    let mut findings = Findings { examined: format!("{} files", sources.len()), ..Findings::default() };
    for source in sources.iter().filter(|s| !s.path.ends_with(".table.rs")) {
        let lines = source.text.lines().count();
        if lines > FAIL {
            findings.errors.push(format!("{} has {lines} lines, more than {FAIL}: split it", source.path));
        } else if lines > WARN {
            findings.warnings.push(format!("{} has {lines} lines, more than {WARN}", source.path));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_files_warn_then_fail_and_tables_may_be_long() {
        let source = |path: &str, lines: usize| Source { path: path.to_owned(), text: "x\n".repeat(lines) };
        let sources = [source("a.rs", 500), source("b.rs", 501), source("c.rs", 801), source("d.table.rs", 9000)];
        let findings = judge(&sources);
        assert_eq!((findings.warnings.len(), findings.errors.len()), (1, 1));
        assert!(findings.warnings[0].starts_with("b.rs") && findings.errors[0].starts_with("c.rs"));
    }
}
