//! The repository's Rust files.

use crate::XtaskError;
use std::path::{Path, PathBuf};

/// A source file.
pub struct Source {
    /// Path from the repository's top, with `/`.
    pub path: String,
    pub text: String,
}

/// The repository's top.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Every `.rs` file outside build output, in the order of the paths.
pub fn all() -> Result<Vec<Source>, XtaskError> {
    let root = root();
    let mut sources = Vec::new();
    collect(&root, "", &mut sources)?;
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(sources)
}

fn collect(root: &Path, folder: &str, into: &mut Vec<Source>) -> Result<(), XtaskError> {
    let at = root.join(folder);
    let read = |e| XtaskError::Read(at.clone(), e);
    for entry in std::fs::read_dir(&at).map_err(read)? {
        let entry = entry.map_err(read)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
        if entry.file_type().map_err(read)?.is_dir() {
            if name != "target" && !name.starts_with('.') {
                collect(root, &path, into)?;
            }
        } else if name.ends_with(".rs") {
            let text = std::fs::read_to_string(root.join(&path)).map_err(|e| XtaskError::Read(root.join(&path), e))?;
            into.push(Source { path, text });
        }
    }
    Ok(())
}
