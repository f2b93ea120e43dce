//! Wrong usage and damaged images, through the built command: exit code 125, a message on stderr that
//! names the flag and the file, nothing on stdout.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A directory of one test's own, removed at its end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        path.display().to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn umbra(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_umbra")).args(args).stdin(Stdio::null()).output().unwrap()
}

/// The command refuses with 125 and a message that has all of `parts`.
#[track_caller]
fn refused(args: &[&str], parts: &[&str]) {
    let output = umbra(args);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{args:?}: {message}");
    assert!(output.stdout.is_empty(), "{args:?} wrote to stdout");
    for part in parts {
        assert!(message.contains(part), "{args:?}: no {part:?} in: {message}");
    }
    assert!(!message.contains("panicked"), "{message}");
}

/// A small bzImage: one setup sector, 8 KiB of kernel, protocol 2.15, 64-bit entry.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024 + 0x2000];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &0x200u32.to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 0, 1, 0]);
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    image
}

fn elf(machine: u16) -> Vec<u8> {
    let mut image = vec![0; 0x200];
    image[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    image[18..20].copy_from_slice(&machine.to_le_bytes());
    image[0x20] = 64;
    image[0x36..0x3a].copy_from_slice(&[56, 0, 1, 0]);
    image
}

#[test]
fn kernels_that_are_not_there() {
    let scratch = Scratch::new("absent");
    let directory = scratch.0.display().to_string();
    refused(&["run", "--kernel", "/no/such/file"], &["--kernel /no/such/file", "check the path"]);
    refused(&["run", "--kernel", &directory], &["--kernel", "not a file"]);
    let kernel = scratch.file("kernel", &bzimage());
    refused(
        &["run", "--kernel", &kernel, "--initrd", "/no/such/initrd"],
        &["--initrd /no/such/initrd", "check the path"],
    );
}

#[test]
fn kernels_that_are_damaged() {
    let scratch = Scratch::new("damaged");
    let whole = bzimage();
    let cases: [(&str, Vec<u8>, &str); 7] = [
        ("empty", Vec::new(), "empty"),
        ("text", b"#!/bin/sh\necho no kernel\n".to_vec(), "not a kernel"),
        ("header", whole[..0x230].to_vec(), "truncated"),
        ("body", whole[..0x1000].to_vec(), "copy the file again"),
        ("arm", elf(183), "aarch64"),
        ("powerpc", elf(21), "powerpc"),
        ("no-entry", elf(62), "CONFIG_PVH"),
    ];
    for (name, bytes, part) in cases {
        let path = scratch.file(name, &bytes);
        refused(&["run", "--kernel", &path], &["--kernel", &path, part]);
    }
    let mut old = whole;
    old[0x206..0x208].copy_from_slice(&0x209u16.to_le_bytes());
    let path = scratch.file("old", &old);
    refused(&["run", "--kernel", &path], &[&path, "boot protocol 2.09", "2.10 is needed"]);
}

#[test]
fn images_that_do_not_fit() {
    let scratch = Scratch::new("oversized");
    let large = scratch.file("large", &[]);
    fs::File::options().write(true).open(&large).unwrap().set_len(1 << 40).unwrap();
    refused(&["run", "--kernel", &large], &[&large, "larger than the guest's RAM", "-m"]);
    refused(&["run", "--kernel", "/dev/zero", "-m", "4M"], &["/dev/zero", "larger than the guest's RAM"]);

    let kernel = scratch.file("kernel", &bzimage());
    let initrd = scratch.file("initrd", &[]);
    fs::File::options().write(true).open(&initrd).unwrap().set_len(33 << 20).unwrap();
    refused(&["run", "-m", "32M", "--kernel", &kernel, "--initrd", &initrd], &["--initrd", &initrd, "-m"]);
    fs::File::options().write(true).open(&initrd).unwrap().set_len(31 << 20).unwrap();
    refused(&["run", "-m", "32M", "--kernel", &kernel, "--initrd", &initrd], &["--initrd", &initrd, "-m"]);

    let mut greedy = bzimage();
    greedy[0x260..0x264].copy_from_slice(&0x4000_0000u32.to_le_bytes());
    let greedy = scratch.file("greedy", &greedy);
    refused(&["run", "-m", "64M", "--kernel", &greedy], &["--kernel", &greedy, "-m"]);
}

#[test]
fn arguments_that_make_no_sense() {
    let scratch = Scratch::new("arguments");
    let kernel = scratch.file("kernel", &bzimage());
    refused(&["run", "-m", "lots"], &["lots", "512M"]);
    refused(&["run", "-m", "1M"], &["-m", "2M"]);
    refused(&["run", "--cpu", "i386"], &["--cpu", "umbra-v3"]);
    refused(&["run", "--cpu", "umbra-v3,+warp"], &["--cpu", "warp"]);
    refused(&["run", "--timeout", "soon"], &["soon", "seconds"]);
    refused(&["run", "--expect", ""], &["--expect"]);
    refused(&["run", "--append", "quiet"], &["--append", "--kernel"]);
    refused(&["run", "--initrd", &kernel], &["--initrd", "--kernel"]);
    refused(&["run", "--clock", "sundial"], &["sundial"]);
    refused(&["run", "--no-such-flag"], &["--no-such-flag"]);
    refused(&["dance"], &["dance"]);
    let line = "x".repeat(4000);
    refused(&["run", "--kernel", &kernel, "--append", &line], &["--append", "2047"]);
}

#[test]
fn memory_files_that_cannot_be_used() {
    let scratch = Scratch::new("memory-file");
    let (file, directory) = (scratch.file("ram", b"x"), scratch.0.display().to_string());
    refused(&["run", "--memory-file", "/no/such/ram"], &["--memory-file /no/such/ram", "check the path"]);
    for other in [&*directory, "/dev/zero"] {
        refused(&["run", "--memory-file", other], &["--memory-file", other, "not a file"]);
    }
    refused(&["run", "--memory-file", &file, "--memory-latency", "soon"], &["soon", "100us"]);
    refused(&["run", "--memory-latency", "1ms"], &["--memory-file"]);
    refused(&["run", "--memory-resident", "64M"], &["--memory-file"]);
    refused(&["run", "--memory-file", &file, "--memory-resident", "1M"], &["--memory-resident", "4M"]);
    refused(&["run", "--cpu", "umbra-v3,+kvm-asyncpf"], &["--cpu", "--memory-file"]);
}

#[test]
fn json_tells_a_program_the_same() {
    let output = umbra(&["run", "--json", "--kernel", "/no/such/file"]);
    assert_eq!(output.status.code(), Some(125));
    let report: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(report["end"], "error");
    assert_eq!(report["exit_code"], 125);
    assert!(report["message"].as_str().unwrap().contains("--kernel /no/such/file"));
}

#[test]
fn help_lists_every_exit_code() {
    let output = umbra(&["run", "--help"]);
    assert_eq!(output.status.code(), Some(0));
    let help = String::from_utf8(output.stdout).unwrap();
    for part in ["121", "122", "123", "124", "125", "126", "127", "(V << 1) | 1", "--expect", "--mmu", "Ctrl-A x"] {
        assert!(help.contains(part), "no {part:?} in the help");
    }
}

#[test]
fn hand_overs_without_an_accelerator_and_accelerated_machines_of_many() {
    refused(&["run", "--handover-at", "refusal"], &["--handover-at", "--accel kvm"]);
    refused(&["rom", "run", "strings", "--handover-at", "0x1000"], &["--handover-at", "--accel kvm"]);
    refused(&["run", "--irqchip", "split"], &["--irqchip", "--accel kvm"]);
    refused(&["rom", "run", "strings", "--irqchip", "user"], &["--irqchip", "--accel kvm"]);
    refused(&["run", "--accel", "kvm", "--smp", "2"], &["--accel kvm", "--smp"]);
    refused(&["run", "--accel", "kvm", "--handover-at", "later"], &["later", "refusal"]);
}

#[test]
fn options_of_the_translator_without_it() {
    refused(&["run", "--engine", "interp", "--jit-off", "links"], &["--jit-off", "--engine jit"]);
    refused(&["run", "--engine", "interp", "--lockstep"], &["--lockstep", "--engine jit"]);
    refused(&["run", "--engine", "jit", "--lockstep", "--smp", "2"], &["--lockstep", "--smp"]);
    refused(&["run", "--engine", "interp", "--jit-limit", "3"], &["--jit-limit", "--engine jit"]);
    refused(&["run", "--engine", "jit", "--jit-off", "everything"], &["everything", "native"]);
}
