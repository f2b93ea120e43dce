//! What becomes of each translation besides being run: `--dump-blocks`, `--jitdump`.

use super::args::JitArgs;
use crate::error::CliError;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Arc, Mutex, PoisonError};
use umbra_hostexec::ProfilerMark;
use umbra_jit::{Jit, Translated};

/// Somebody who is told of translations.
trait Reader: Send {
    fn read(&mut self, translated: &Translated) -> std::io::Result<()>;
}

/// All of them, for every CPU.
#[derive(Clone, Default)]
pub struct Readers(Arc<Mutex<Vec<Box<dyn Reader>>>>);

impl Readers {
    /// Those that the arguments ask for.
    ///
    /// # Errors
    /// When a file can't be made.
    pub fn of(args: &JitArgs) -> Result<Self, CliError> {
        let mut all: Vec<Box<dyn Reader>> = Vec::new();
        if let Some(path) = &args.dump_blocks {
            all.push(Box::new(Listing(create("--dump-blocks", path)?)));
        }
        if args.jitdump {
            all.push(Box::new(JitDump::new()?));
        }
        Ok(Self(Arc::new(Mutex::new(all))))
    }

    /// Has a translator tell them.
    pub fn attach(&self, jit: &mut Jit) {
        if self.0.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            return;
        }
        let readers = Arc::clone(&self.0);
        jit.set_listener(Box::new(move |translated| {
            // A reader whose file can't be written is told of nothing more.
            readers.lock().unwrap_or_else(PoisonError::into_inner).retain_mut(|reader| reader.read(translated).is_ok());
        }));
    }
}

fn create(flag: &'static str, path: &Path) -> Result<BufWriter<File>, CliError> {
    let file = File::create(path).map_err(|source| CliError::Write { flag, path: path.to_owned(), source })?;
    Ok(BufWriter::new(file))
}

/// Guest and host instructions.
struct Listing(BufWriter<File>);

impl Reader for Listing {
    fn read(&mut self, translated: &Translated) -> std::io::Result<()> {
        writeln!(self.0, "{translated}")
    }
}

/// perf's "jitdump" file: symbols with their code, by time. `perf record -k mono`, then `perf inject --jit`.
struct JitDump {
    file: BufWriter<File>,
    index: u64,
    /// Tells perf by its mapping where the file is.
    _mark: ProfilerMark,
}

impl JitDump {
    const MAGIC: u32 = 0x4a69_5444;
    const VERSION: u32 = 1;
    /// Bytes of the file's header.
    const HEADER: u32 = 40;
    /// Bytes of a record of code, without name and code.
    const RECORD: usize = 56;
    /// ELF's number of x86-64.
    const X86_64: u32 = 62;
    /// A record with code.
    const LOAD: u32 = 0;

    fn new() -> Result<Self, CliError> {
        let path = PathBuf::from(format!("jit-{}.dump", process::id()));
        let failed = |source| CliError::Write { flag: "--jitdump", path: path.clone(), source };
        let open = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = open.map_err(failed)?;
        let mark = ProfilerMark::of(&file).map_err(failed)?;
        let mut file = BufWriter::new(file);
        file.write_all(&Self::header()).map_err(failed)?;
        Ok(Self { file, index: 0, _mark: mark })
    }

    fn header() -> Vec<u8> {
        let words = [Self::MAGIC, Self::VERSION, Self::HEADER, Self::X86_64, 0, process::id()];
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        // Time, and no flags.
        bytes.extend([now(), 0].iter().flat_map(|word| word.to_le_bytes()));
        bytes
    }

    fn record(&mut self, name: &str, address: u64, code: &[u8]) -> Vec<u8> {
        let size = Self::RECORD + name.len() + code.len();
        let mut bytes: Vec<u8> = [Self::LOAD, size as u32].iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(now().to_le_bytes());
        bytes.extend([process::id(), process::id()].iter().flat_map(|word| word.to_le_bytes()));
        let numbers = [address, address, code.len() as u64, self.index];
        self.index += 1;
        bytes.extend(numbers.iter().flat_map(|word| word.to_le_bytes()));
        bytes.extend(name.as_bytes());
        bytes.extend(code);
        bytes
    }
}

impl Reader for JitDump {
    fn read(&mut self, translated: &Translated) -> std::io::Result<()> {
        let (often, rare) = translated.host.split_at(translated.often);
        let often = self.record(&format!("guest_{:x}\0", translated.rip), translated.address, often);
        let rare = self.record(&format!("rare_{:x}\0", translated.rip), translated.rare_address, rare);
        self.file.write_all(&often)?;
        self.file.write_all(&rare)?;
        self.file.flush()
    }
}

/// The host's monotonic clock in nanoseconds: what perf compares with; no guest sees it.
fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
