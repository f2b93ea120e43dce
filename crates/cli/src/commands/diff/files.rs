//! Files that `umbra diff` reads and writes.

use std::path::{Path, PathBuf};
use umbra_oracle::campaign::{MergeError, Tally};
use umbra_oracle::case::Case;
use umbra_oracle::image::{self, ImageError};
use umbra_oracle::saved::{self, Origin, SavedError};

/// A file that can't be read, written or understood.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", path.display())]
pub struct FileError {
    path: PathBuf,
    why: Why,
}

#[derive(Debug, thiserror::Error)]
enum Why {
    #[error("{0}: check the path")]
    Io(#[from] std::io::Error),
    #[error("not a case: {0}")]
    Case(#[from] SavedError),
    #[error("not a result of umbra diff --json: {0}")]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    Merge(#[from] MergeError),
    #[error(transparent)]
    Image(#[from] ImageError),
}

impl FileError {
    fn new(path: &Path, why: impl Into<Why>) -> Self {
        Self { path: path.into(), why: why.into() }
    }

    /// Results that don't belong together.
    pub fn merge(path: &Path, why: MergeError) -> Self {
        Self::new(path, why)
    }
}

/// Where cases are written.
pub struct Files {
    directory: PathBuf,
}

impl Files {
    /// In that directory, or the working directory.
    pub fn new(directory: Option<&Path>) -> Self {
        Self { directory: directory.unwrap_or(Path::new(".")).into() }
    }

    /// Writes a case to replay and, where one can be made, an image to run; their paths.
    pub fn write(&self, case: &Case, origin: &Origin) -> Result<Vec<PathBuf>, FileError> {
        let name = format!("diff-{}-{}-{}", origin.generator, origin.seed, origin.index);
        let text = self.directory.join(format!("{name}.toml"));
        put(&text, saved::write(case, origin).as_bytes())?;
        let image = self.directory.join(format!("{name}.img"));
        put(&image, &image::build(case).map_err(|error| FileError::new(&image, error))?)?;
        Ok(vec![text, image])
    }
}

fn put(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    std::fs::write(path, bytes).map_err(|error| FileError::new(path, error))
}

/// A file's bytes.
pub fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    std::fs::read(path).map_err(|error| FileError::new(path, error))
}

/// A written case.
pub fn read_case(path: &Path) -> Result<(Case, Origin), FileError> {
    let text = std::fs::read_to_string(path).map_err(|error| FileError::new(path, error))?;
    saved::read(&text).map_err(|error| FileError::new(path, error))
}

/// A written result.
pub fn read_json(path: &Path) -> Result<Tally, FileError> {
    let text = std::fs::read(path).map_err(|error| FileError::new(path, error))?;
    serde_json::from_slice(&text).map_err(|error| FileError::new(path, error))
}

/// Writes a result, whole or not at all.
pub fn write_json(path: &Path, tally: &Tally) -> Result<(), FileError> {
    let text = serde_json::to_vec_pretty(tally).map_err(|error| FileError::new(path, error))?;
    let temporary = path.with_extension("part");
    put(&temporary, &text)?;
    std::fs::rename(&temporary, path).map_err(|error| FileError::new(path, error))
}
