//! The engine `qemu`: QEMU's own emulation, a further voter. Cases are started from their images and read through the
//! gdb stub when they halt; ROMs report on the serial port.
//!
//! Each case is a process of its own, so there are a few in a second. The stub shows neither the upper halves of YMM
//! nor PKRU, so vector instructions aren't answered, and of ring-0 cases memory only.

use super::gdb::{Gdb, GdbError};
use crate::case::{Case, Layout, Piece, Run};
use crate::engine::{Answer, End, Engine, Outcome, RomAnswer};
use crate::{image, ring0, rows, window};
use std::borrow::Cow;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use umbra_arch::CpuState;
use umbra_arch::segment::Seg;
use umbra_hostexec::native::Mode;
use umbra_test_roms::Rom;

const PROGRAM: &str = "qemu-system-x86_64";
/// How long a case or a ROM may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why there is no such engine.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// Not installed, or it doesn't start.
    #[error("{PROGRAM} doesn't start: {0}: install QEMU (Debian: qemu-system-x86), or leave this engine out")]
    Absent(std::io::Error),
    /// No place for the images.
    #[error("no directory for images: {0}: check TMPDIR")]
    Directory(std::io::Error),
}

/// QEMU.
pub struct Qemu {
    directory: PathBuf,
}

impl Qemu {
    /// Looks whether there is a QEMU.
    ///
    /// # Errors
    /// [`QemuError`].
    pub fn new() -> Result<Self, QemuError> {
        Command::new(PROGRAM)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .map_err(QemuError::Absent)?;
        let directory = std::env::temp_dir().join(format!("umbra-qemu-{}", std::process::id()));
        std::fs::create_dir_all(&directory).map_err(QemuError::Directory)?;
        Ok(Self { directory })
    }

    fn start(&self, extra: &[&str]) -> std::io::Result<Process> {
        let mut command = Command::new(PROGRAM);
        command.args(["-accel", "tcg", "-cpu", "max", "-m", "64", "-display", "none", "-nodefaults", "-no-reboot"]);
        command.args(extra).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        Ok(Process(command.spawn()?))
    }

    fn execute(&self, case: &Case) -> Result<Answer, GdbError> {
        let Ok(image) = image::build(case) else { return Ok(Answer::cannot("no image can start this case")) };
        let (path, socket) = (self.directory.join("case.img"), self.directory.join("gdb"));
        std::fs::write(&path, image)?;
        let listening = format!("unix:{},server=on,wait=off", socket.display());
        let kernel = path.display().to_string();
        let _process = self.start(&["-kernel", &kernel, "-S", "-gdb", &listening])?;
        let mut gdb = Gdb::connect(&socket, PATIENCE)?;
        for address in ends(case) {
            gdb.break_at(address)?;
        }
        if !gdb.go_on()? {
            return Ok(Answer::Outcome(Outcome { end: End::Shutdown, state: None, memory: Vec::new() }));
        }
        let registers = gdb.registers()?;
        gdb.physical_memory()?;
        let mut memory = Vec::new();
        for range in &case.watch {
            let bytes = gdb.read(range.start, range.end - range.start)?;
            memory.push(Piece { gpa: range.start, bytes });
        }
        if !case.layout.is_window() {
            return Ok(Answer::Outcome(Outcome { end: End::Halted, state: None, memory }));
        }
        let mut state = Box::new(case.state.clone());
        take(&registers, &mut state);
        // HLT itself wasn't executed.
        state.rip += 1;
        let read = |gpa: u64| {
            let bytes = gdb.read(gpa, 8).unwrap_or_default();
            bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
        };
        let end = window::caught(case.run, &mut state, read);
        Ok(end.map_or_else(
            || Answer::cannot("stopped elsewhere"),
            |end| Answer::Outcome(Outcome { end, state: Some(state), memory }),
        ))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Left-over files in the temporary directory are no reason to fail.
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// A process that ends with its owner.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Linear addresses of the HLTs that can end a case.
fn ends(case: &Case) -> Vec<u64> {
    match case.run {
        Run::Instruction(_) => window::stubs().collect(),
        Run::Halt { .. } => vec![case.code.gpa + case.code.bytes().len() as u64 - 1],
    }
}

/// Registers in the order of gdb's i386:x86-64 description, as far as cases of a window show them.
fn take(bytes: &[u8], s: &mut CpuState) {
    let mut rest = bytes;
    let mut next = |n: usize| {
        let (taken, left) = rest.split_at(n.min(rest.len()));
        rest = left;
        taken.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
    };
    for n in [0, 3, 1, 2, 6, 7, 5, 4, 8, 9, 10, 11, 12, 13, 14, 15] {
        s.gpr[n] = next(8);
    }
    s.rip = next(8);
    s.rflags = next(4);
    for seg in [Seg::Cs, Seg::Ss, Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs] {
        s.seg[seg as usize].selector = next(4) as u16;
    }
    // FS, GS and kernel GS base, CR0.
    for _ in 0..4 {
        next(8);
    }
    s.cr2 = next(8);
}

impl Engine for Qemu {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn run(&mut self, case: &Case) -> Answer {
        if let Layout::Window(mode) = case.layout
            && rows::uses_fp(rows::instruction(case, mode).code())
        {
            return Answer::cannot("the gdb stub doesn't show all vector registers");
        }
        if case.layout == Layout::Window(Mode::Bits16) {
            return Answer::cannot("IRET to a 16-bit stack leaves half of ESP as it was");
        }
        self.execute(case).unwrap_or_else(|error| Answer::cannot(error.to_string()))
    }

    fn excuse(&self, case: &Case, ours: &Outcome, theirs: &Outcome) -> Option<Cow<'static, str>> {
        let in_tables = |gpa: u64| (ring0::TABLES..ring0::TABLES_END).contains(&gpa);
        let early = |ours: &Piece, theirs: &Piece| {
            let differing = ours.bytes.iter().zip(&theirs.bytes).enumerate().filter(|(_, (a, b))| a != b);
            let mut marked = differing.map(|(n, (a, b))| in_tables(ours.gpa + n as u64) && *a == b | 0x20);
            ours.gpa == theirs.gpa && marked.all(|only_marked| only_marked)
        };
        let pairs = ours.memory.len() == theirs.memory.len() && ours.end == theirs.end;
        let all_early = pairs && ours.memory.iter().zip(&theirs.memory).all(|(a, b)| early(a, b));
        (all_early && !case.layout.is_window())
            .then(|| "marks entries as accessed, PDPTEs too, in walks that end in a fault".into())
    }

    fn run_rom(&mut self, rom: &Rom) -> RomAnswer {
        self.rom(rom).unwrap_or_else(|error| RomAnswer::CannotAnswer(error.to_string().into()))
    }
}

impl Qemu {
    fn rom(&self, rom: &Rom) -> Result<RomAnswer, Box<dyn std::error::Error>> {
        let (image, bios) = (self.directory.join("rom.bin"), self.directory.join("reset.bin"));
        std::fs::write(&image, rom.image()?)?;
        std::fs::write(&bios, umbra_firmware::reset_image()?)?;
        let loader = format!("loader,file={},addr={:#x},force-raw=on", image.display(), rom.load().raw());
        let bios = bios.display().to_string();
        let mut process = self.start(&["-bios", &bios, "-device", &loader, "-serial", "stdio"])?;
        let start = Instant::now();
        while process.0.try_wait()?.is_none() {
            if start.elapsed() > PATIENCE {
                return Ok(RomAnswer::CannotAnswer("too slow for this ROM, or it hangs there".into()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut text = String::new();
        if let Some(mut out) = process.0.stdout.take() {
            out.read_to_string(&mut text)?;
        }
        Ok(RomAnswer::Report(text.replace('\r', "")))
    }
}
