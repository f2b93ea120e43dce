//! What `umbra dump`, `--dump-blocks` and `--jitdump` say of translations.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

fn command(args: &[&str], directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_umbra"));
    command.args(args).current_dir(directory).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// An empty directory of one test's own.
fn scratch(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    fs::create_dir_all(&path).unwrap();
    path
}

#[track_caller]
fn dump(args: &[&str]) -> String {
    let output = command(&[&["dump"], args].concat(), Path::new(".")).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn code_is_shown_with_the_way_it_is_done() {
    // add rax, rbx; cpuid; add rcx, rdx
    let text = dump(&["4801d8 0fa2 4801d1"]);
    for part in
        ["4801d8           add rax,rbx", "Arithmetic", "add r10,rbx", "cpuid", "Helper", "call helper", "4801d1"]
    {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let text = dump(&["01d8", "--mode", "16"]);
    assert!(text.contains("add ax,bx") && text.contains("16-bit") && text.contains("Helper"), "{text}");
    let text = dump(&["4801d8", "--jit-off", "native"]);
    assert!(text.contains("Helper") && !text.contains("add r10"), "{text}");
}

#[test]
fn what_is_no_code_is_refused() {
    for (code, part) in [("4801d", "hexadecimal"), ("xy", "hexadecimal"), ("", "hexadecimal")] {
        let output = command(&["dump", code], Path::new(".")).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(125), "{message}");
        assert!(message.contains(part), "{message}");
    }
}

fn run(args: &[&str], directory: &Path) -> (u32, Output) {
    let args = [&["run", "--engine", "jit", "--timeout", "300"], args].concat();
    let child: Child = command(&args, directory).spawn().unwrap();
    let id = child.id();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    (id, output)
}

#[test]
fn a_run_tells_files_of_every_translation() {
    let directory = scratch("translations");
    let (id, output) = run(&["--json", "--dump-blocks", "blocks", "--jitdump"], &directory);
    let report: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    let translated = report["jit"]["translated"].as_u64().unwrap() as usize;
    let blocks = fs::read_to_string(directory.join("blocks")).unwrap();
    assert_eq!(blocks.lines().filter(|line| line.starts_with("block 0x")).count(), translated);
    let dump = fs::read(directory.join(format!("jit-{id}.dump"))).unwrap();
    let word = |at: usize| u32::from_le_bytes(dump[at..at + 4].try_into().unwrap());
    let long = |at: usize| u64::from_le_bytes(dump[at..at + 8].try_into().unwrap());
    assert_eq!((word(0), word(4), word(8), word(12), word(20)), (0x4a69_5444, 1, 40, 62, id));
    let (mut at, mut records) = (40, 0);
    while at < dump.len() {
        // Name and code fill the record up.
        let name = dump[at + 56..].iter().position(|&byte| byte == 0).unwrap();
        assert_eq!((word(at), word(at + 16), long(at + 48)), (0, id, records));
        assert_eq!(word(at + 4) as usize, 56 + name + 1 + long(at + 40) as usize);
        let often_or_rare: &[u8] = if records % 2 == 0 { b"guest_" } else { b"rare_" };
        assert!(dump[at + 56..].starts_with(often_or_rare));
        at += word(at + 4) as usize;
        records += 1;
    }
    assert_eq!(records as usize, 2 * translated);
    fs::remove_dir_all(&directory).unwrap();
}
