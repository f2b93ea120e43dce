//! Unsafe code lives in few crates, and the others say so to the compiler.

use crate::sources::{self, Source};
use crate::{Findings, XtaskError};

/// Folders of the crates that may have unsafe code.
const MAY: [&str; 4] = ["crates/memory/", "crates/hostexec/", "crates/jit/", "crates/accel/"];
const FORBID: &str = "#![forbid(unsafe_code)]";

/// Checks every source file.
pub fn check() -> Result<Findings, XtaskError> {
    Ok(judge(&sources::all()?))
}

fn judge(sources: &[Source]) -> Findings {
    let restricted: Vec<_> = sources.iter().filter(|s| !MAY.iter().any(|may| s.path.starts_with(may))).collect();
    let mut findings =
        Findings { examined: format!("{} files that must be safe", restricted.len()), ..Findings::default() };
    for source in restricted {
        if is_crate_root(&source.path) && !source.text.contains(FORBID) {
            findings.errors.push(format!("{} lacks {FORBID}", source.path));
        }
        for (number, line) in source.text.lines().enumerate() {
            if has_unsafe(line) {
                findings.errors.push(format!("{}:{} has unsafe code", source.path, number + 1));
            }
        }
    }
    findings
}

/// Libraries and commands. Tests, benches and fuzz targets are only searched.
fn is_crate_root(path: &str) -> bool {
    path.ends_with("/src/lib.rs") || path.ends_with("/src/main.rs")
}

/// Whether a line has the keyword outside comments and strings, as far as one line can tell.
fn has_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let outside_strings: String = code.split('"').step_by(2).collect::<Vec<_>>().join(" ");
    outside_strings.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source { path: path.to_owned(), text: text.to_owned() }
    }

    #[test]
    fn the_keyword_is_found_and_words_that_contain_it_are_not() {
        for code in ["unsafe { x }", "pub unsafe fn f()", "x; unsafe{}", "#[unsafe(no_mangle)]"] {
            assert!(has_unsafe(code), "{code}");
        }
        for code in ["// unsafe { }", "deny(unsafe_code)", "\"unsafe\"", "mod unsafe_code;"] {
            assert!(!has_unsafe(code), "{code}");
        }
    }

    #[test]
    fn roots_must_forbid_and_the_listed_crates_may() {
        let sources = [
            source("crates/mmu/src/lib.rs", "pub mod a;"),
            source("crates/mmu/src/a.rs", "unsafe {}"),
            source("crates/memory/src/lib.rs", "unsafe {}"),
        ];
        assert_eq!(judge(&sources).errors.len(), 2);
    }
}
