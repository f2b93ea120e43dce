//! `umbra explain`, the triple-fault report, `--trace`, `umbra doctor` and `umbra rom`, through the built command.

use iced_x86::code_asm::*;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

fn umbra(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_umbra")).args(args).stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A boot sector; removed when dropped.
struct Image(PathBuf);

impl Image {
    fn new(name: &str, code: impl FnOnce(&mut CodeAssembler)) -> Self {
        let mut a = CodeAssembler::new(16).unwrap();
        a.cli().unwrap();
        code(&mut a);
        let mut bytes = a.assemble(0x7c00).unwrap();
        assert!(bytes.len() <= 510);
        bytes.resize(510, 0);
        bytes.extend([0x55, 0xaa]);
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}.bin", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }

    fn run(&self, command: &str, more: &[&str]) -> Output {
        let path = self.0.display().to_string();
        umbra(&[&[command, "-m", "4M", "--cpu", "umbra-v2", "--timeout", "60", "--kernel", &path], more].concat())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The message of a triple fault has all of `parts`.
#[track_caller]
fn triple_fault_says(image: &Image, parts: &[&str]) {
    let output = image.run("run", &[]);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(127), "{message}");
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

/// Flat segments at 600h, then protected mode; `code` runs in 16-bit protected mode.
fn protected(a: &mut CodeAssembler) {
    a.xor(ax, ax).unwrap();
    a.mov(ds, ax).unwrap();
    let table = [0u64, 0x0000_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (at, word) in table.iter().flat_map(|entry| [*entry as u32, (entry >> 32) as u32]).enumerate() {
        a.mov(dword_ptr(0x600 + 4 * at as u32), word).unwrap();
    }
    a.mov(word_ptr(0x5f0), 23u32).unwrap();
    a.mov(dword_ptr(0x5f2), 0x600u32).unwrap();
    a.lgdt(fword_ptr(0x5f0)).unwrap();
    a.mov(eax, cr0).unwrap();
    a.or(al, 1u32).unwrap();
    a.mov(cr0, eax).unwrap();
    a.mov(ax, 0x10u32).unwrap();
    a.mov(ds, ax).unwrap();
}

#[test]
fn no_idt() {
    let image = Image::new("no-idt", |a| {
        a.lidt(fword_ptr(0x600)).unwrap();
        a.ud2().unwrap();
    });
    triple_fault_says(&image, &["UD2: the guest stopped itself", "no IDT is loaded", "ud2", "IDT gate of vector 6"]);
}

#[test]
fn reset_idt_in_protected_mode() {
    let image = Image::new("reset-idt", |a| {
        protected(a);
        a.xor(ecx, ecx).unwrap();
        a.div(ecx).unwrap();
    });
    triple_fault_says(&image, &["no IDT is loaded", "div ecx", "a division by zero", "PE ET"]);
}

#[test]
fn paging_without_the_code_mapped() {
    let image = Image::new("unmapped-code", |a| {
        protected(a);
        // A page directory of zeros.
        a.mov(eax, 0x10_0000).unwrap();
        a.mov(cr3, eax).unwrap();
        a.mov(eax, cr0).unwrap();
        a.or(eax, 0x8000_0000u32).unwrap();
        a.mov(cr0, eax).unwrap();
    });
    triple_fault_says(
        &image,
        &["the code itself at", "is not mapped (2-level", "its PDE (index 0, at physical 0x100000) is not present"],
    );
}

#[test]
fn long_mode_without_pae() {
    let image = Image::new("no-pae", |a| {
        protected(a);
        a.mov(ecx, 0xc000_0080u32).unwrap();
        a.mov(eax, 0x100).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.mov(eax, 0x8000_0001u32).unwrap();
        a.mov(cr0, eax).unwrap();
    });
    triple_fault_says(
        &image,
        &["EFER.LME is 1 and CR4.PAE is 0", "mov cr0,eax", "EFER", "LME"]
            .map(|s| if s == "EFER" { "efer 0x100: LME" } else { s }),
    );
}

#[test]
fn json_has_the_causes() {
    let image = Image::new("json-causes", |a| {
        a.lidt(fword_ptr(0x600)).unwrap();
        a.ud2().unwrap();
    });
    let json: serde_json::Value = serde_json::from_slice(&image.run("run", &["--json"]).stderr).unwrap();
    assert!(json["causes"].as_array().unwrap().len() >= 2);
    assert!(json["explanation"].as_str().unwrap().contains("the chain:"));
}

#[test]
fn explain_walks_addresses_of_a_clean_end() {
    let image = Image::new("explain", |a| {
        a.mov(dx, 0x605u32).unwrap();
        a.mov(al, 0x20u32).unwrap();
        a.out(dx, al).unwrap();
        a.hlt().unwrap();
    });
    let output = image.run("explain", &["--address", "0x7c00", "--address", "0xfff00000"]);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{message}");
    for part in [
        "real-address mode",
        "no paging",
        "--address 0x7c00: supervisor read allowed",
        "physical 0xfff00000, no memory",
        "MMU: role Off",
        "cr0  0x60000010: ET NW CD",
    ] {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

#[test]
fn traces_name_what_happens() {
    let image = Image::new("trace", |a| {
        a.mov(ax, 0x1234u32).unwrap();
        a.mov(dx, 0x80u32).unwrap();
        a.out(dx, al).unwrap();
        a.mov(eax, cr0).unwrap();
        a.and(eax, 0x6fff_ffff).unwrap();
        a.mov(cr0, eax).unwrap();
        a.lidt(fword_ptr(0x600)).unwrap();
        // EXTRQ, which no CPU model offers.
        a.db(&[0x66, 0x0f, 0x79, 0xc1]).unwrap();
    });
    let output = image.run("run", &["--trace", "insn,exc,io,mmu"]);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(127), "{message}");
    for part in ["mov ax,0x1234", "out 0x80 1 = 0x34", "mmu ", "not implemented: #UD", "#UD by extrq"] {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
    let ranged = text(&image.run("run", &["--trace", "insn", "--trace-range", "0x7c01..0x7c04"]).stderr);
    assert_eq!(ranged.lines().filter(|line| line.starts_with("insn ")).count(), 1, "{ranged}");
    let json = |more: &[&str]| -> serde_json::Value {
        let report = text(&image.run("run", &[&["--json"], more].concat()).stderr);
        serde_json::from_str(report.lines().last().unwrap()).unwrap()
    };
    let (plain, traced) = (json(&[]), json(&["--trace", "insn,io"]));
    for key in ["retired", "guest_ns", "rip", "faults"] {
        assert_eq!(plain[key], traced[key], "a trace changes nothing");
    }
}

#[test]
fn doctor_says_whether_it_can_run() {
    let output = umbra(&["doctor", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(if json["can_run"] == true { 0 } else { 125 }));
    assert!(json["cpu_models"].as_array().unwrap().iter().any(|model| model["name"] == "umbra-v2"));
    assert!(text(&umbra(&["doctor"]).stdout).contains("/dev/kvm"));
    let kvm = &json["kvm"];
    assert_eq!(kvm["split_irqchip"].is_boolean(), kvm["problem"].is_null(), "both need KVM: {kvm}");
}

#[test]
fn roms_are_listed_and_pass() {
    let listed: serde_json::Value = serde_json::from_slice(&umbra(&["rom", "list", "--json"]).stdout).unwrap();
    for rom in listed.as_array().unwrap() {
        let name = rom["name"].as_str().unwrap();
        if name == "embedded" {
            // Half a minute, and run by everybody all the time.
            continue;
        }
        let output = umbra(&["rom", "run", name, "--cpu", "umbra-v2", "--json"]);
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((output.status.code(), &json["passed"]), (Some(0), &true.into()), "{json}");
        assert!(!json["sections"].as_array().unwrap().is_empty(), "{json}");
    }
    assert_eq!(umbra(&["rom", "run", "no-such-rom"]).status.code(), Some(125));
}

/// `auto` never means a slow or absent backend, and everything says who executed the guest.
#[test]
fn auto_takes_hardware_only_and_reports_name_the_backend() {
    let doctor: serde_json::Value = serde_json::from_str(&text(&umbra(&["doctor", "--json"]).stdout)).unwrap();
    let kvm = &doctor["kvm"];
    let usable = kvm["device"] == "usable";
    let is_accelerated = usable && kvm["hardware"] == true;
    let result: serde_json::Value =
        serde_json::from_str(&text(&umbra(&["rom", "run", "strings", "--accel", "auto", "--json"]).stdout)).unwrap();
    assert_eq!(result["backend"].is_string(), is_accelerated, "{result}");
    if !usable {
        eprintln!("SKIPPED in part, nothing was run under KVM: {}", kvm["device"]);
        return;
    }
    let output = umbra(&["rom", "run", "embedded", "--accel", "kvm", "--handover-at", "refusal", "--json"]);
    let result: serde_json::Value = serde_json::from_str(&text(&output.stdout)).unwrap();
    assert_eq!((&result["passed"], &result["backend"]), (&true.into(), &kvm["backend"]), "{result}");
}
