//! Every way a guest can end, as boot sectors through the built command: exit codes, streams, JSON.

use iced_x86::code_asm::*;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// A boot sector that says `hi` on the first serial port, then does what `end` says.
fn boot_sector(name: &str, end: impl FnOnce(&mut CodeAssembler)) -> PathBuf {
    let mut a = CodeAssembler::new(16).unwrap();
    a.cli().unwrap();
    a.mov(dx, 0x3f8).unwrap();
    for byte in b"hi\n" {
        a.mov(al, i32::from(*byte)).unwrap();
        a.out(dx, al).unwrap();
    }
    end(&mut a);
    let mut image = a.assemble(0x7c00).unwrap();
    assert!(image.len() <= 510);
    image.resize(510, 0);
    image.extend([0x55, 0xaa]);
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}.bin", std::process::id()));
    std::fs::write(&path, image).unwrap();
    path
}

fn out(a: &mut CodeAssembler, port: u32, value: i32) {
    a.mov(dx, port).unwrap();
    a.mov(al, value).unwrap();
    a.out(dx, al).unwrap();
}

fn forever(a: &mut CodeAssembler) {
    let mut again = a.create_label();
    a.set_label(&mut again).unwrap();
    a.jmp(again).unwrap();
}

fn umbra(image: &PathBuf, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_umbra"));
    command.args(["run", "-m", "4M", "--cpu", "umbra-v2", "--kernel"]).arg(image).args(args);
    command.stdin(Stdio::null()).output().unwrap()
}

/// Runs it plainly and with `--json`, and compares both with what is expected.
#[track_caller]
fn ends(name: &str, args: &[&str], code: i32, end: &str, guest: impl FnOnce(&mut CodeAssembler)) -> serde_json::Value {
    let image = boot_sector(name, guest);
    let plain = umbra(&image, args);
    let message = String::from_utf8_lossy(&plain.stderr).into_owned();
    assert_eq!(plain.status.code(), Some(code), "{name}: {message}");
    assert!(message.starts_with("umbra: "), "{name}: {message}");
    assert_eq!(plain.stdout, b"hi\n", "the guest's serial alone is on stdout");
    let report = umbra(&image, &[args, &["--json"]].concat());
    assert_eq!((report.status.code(), &report.stdout), (Some(code), &plain.stdout));
    let json: serde_json::Value = serde_json::from_slice(&report.stderr).unwrap();
    assert_eq!(json["end"], end);
    assert_eq!(json["exit_code"], code);
    std::fs::remove_file(image).unwrap();
    json
}

fn power_off(a: &mut CodeAssembler) {
    out(a, 0x605, 0x20);
    forever(a);
}

#[test]
fn power_off_and_reboot_are_clean() {
    ends("power-off", &[], 0, "power-off", power_off);
    ends("reboot", &[], 0, "reset", |a| {
        out(a, 0xcf9, 6);
        forever(a);
    });
    ends("keyboard-reset", &[], 0, "reset", |a| {
        out(a, 0x64, 0xfe);
        forever(a);
    });
}

#[test]
fn debug_exit_is_shifted() {
    for (value, code) in [(0, 1), (0x10, 0x21), (0x3e, 125)] {
        let json = ends(&format!("debug-exit-{value}"), &[], code, "debug-exit", |a| {
            out(a, 0xf4, value);
            forever(a);
        });
        assert_eq!(json["debug_exit"], value, "JSON tells 125 from a host error");
    }
}

#[test]
fn triple_fault_names_its_chain() {
    let json = ends("triple-fault", &[], 127, "triple-fault", |a| {
        // An empty IDT, then #UD.
        a.lidt(fword_ptr(0x600)).unwrap();
        a.ud2().unwrap();
    });
    assert_eq!(json["faults"].as_array().unwrap().len(), 3);
}

#[test]
fn halt_with_interrupts_off_is_reported() {
    let json = ends("halted", &[], 122, "halted", |a| {
        a.hlt().unwrap();
    });
    assert_eq!(json["interrupts_enabled"], false);
}

#[test]
fn timeout_ends_a_busy_guest() {
    ends("timeout", &["--timeout", "0.3"], 124, "timeout", forever);
}

#[test]
fn expectations() {
    ends("expected", &["--expect", "hi\n"], 0, "expected", forever);
    ends("not-seen", &["--expect", "ho"], 123, "power-off", power_off);
    ends("too-late", &["--expect", "ho", "--timeout", "0.3"], 124, "timeout", forever);
}

#[test]
fn stdin_reaches_the_serial_port_when_asked() {
    // Echoes three bytes, polling for each, then powers off.
    let image = boot_sector("echo", |a| {
        for _ in 0..3 {
            let mut wait = a.create_label();
            a.mov(dx, 0x3fd).unwrap();
            a.set_label(&mut wait).unwrap();
            a.in_(al, dx).unwrap();
            a.test(al, 1).unwrap();
            a.je(wait).unwrap();
            a.mov(dx, 0x3f8).unwrap();
            a.in_(al, dx).unwrap();
            a.out(dx, al).unwrap();
        }
        power_off(a);
    });
    let mut child = Command::new(env!("CARGO_BIN_EXE_umbra"))
        .args(["run", "-m", "4M", "--cpu", "umbra-v2", "--serial-stdin", "--timeout", "20", "--kernel"])
        .arg(&image)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"xyz").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.stdout, b"hi\nxyz");
    std::fs::remove_file(image).unwrap();
}

#[test]
fn a_signal_ends_the_run_with_its_number() {
    let image = boot_sector("signal", forever);
    let child = Command::new(env!("CARGO_BIN_EXE_umbra"))
        .args(["run", "-m", "4M", "--cpu", "umbra-v2", "--timeout", "20", "--kernel"])
        .arg(&image)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(500));
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(128 + 15), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.stdout, b"hi\n");
    std::fs::remove_file(image).unwrap();
}

#[test]
fn ram_comes_from_a_file() {
    let ram = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("ram-{}.bin", std::process::id()));
    let mut contents = vec![0; 0x3_0010];
    contents[0x3_000f] = 0x21;
    std::fs::write(&ram, &contents).unwrap();
    let ram = ram.display().to_string();
    let guest = |a: &mut CodeAssembler| {
        a.mov(ax, 0x3000).unwrap();
        a.mov(ds, ax).unwrap();
        a.mov(al, byte_ptr(0xf)).unwrap();
        // What lies behind the file's end is zero.
        a.add(al, byte_ptr(0x10)).unwrap();
        a.out(0xf4, al).unwrap();
    };
    let json = ends("memory-file", &["--memory-file", &ram, "--memory-latency", "3ms"], 0x43, "debug-exit", guest);
    // In real-address mode nobody is told: the CPU waits.
    assert_eq!((&json["pages"]["waits"], &json["pages"]["events"]), (&1.into(), &0.into()));
    assert!(json["guest_ns"].as_u64().unwrap() > 3_000_000);
    std::fs::remove_file(ram).unwrap();
}
