//! Reading image files: hostile sizes and odd paths are refused before anything is allocated.

use crate::error::CliError;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use umbra_memory::FileSource;

/// Reads a file of at most `ram` bytes.
///
/// # Errors
/// Names the flag and the file.
pub fn read(flag: &'static str, path: &Path, ram: u64) -> Result<Vec<u8>, CliError> {
    let failed = |source| CliError::Read { flag, path: path.into(), source };
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_dir() {
        return Err(CliError::NotAFile { flag, path: path.into() });
    }
    let too_large = || CliError::LargerThanRam { flag, path: path.into(), ram };
    if metadata.len() > ram {
        return Err(too_large());
    }
    // Devices and pipes have no length: one byte more than fits tells.
    let mut bytes = Vec::new();
    file.take(ram.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > ram {
        return Err(too_large());
    }
    Ok(bytes)
}

/// Opens the file of `--memory-file`.
///
/// # Errors
/// Names the flag and the file.
pub fn open_source(path: &Path) -> Result<FileSource, CliError> {
    const FLAG: &str = "--memory-file";
    let failed = |source| CliError::Read { flag: FLAG, path: path.into(), source };
    let file = File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(CliError::NotAFile { flag: FLAG, path: path.into() });
    }
    FileSource::new(file).map_err(failed)
}
