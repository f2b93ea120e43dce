//! `--smp`: counts that are refused, and CPUs that only wait change nothing in what a guest says.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

fn umbra(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_umbra"));
    command.args(["run", "-m", "4M", "--cpu", "umbra-v2"]).args(args).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn counts_out_of_range_are_refused() {
    for count in ["0", "33", "-1", "two"] {
        let output = umbra(&[&format!("--smp={count}")]);
        assert_eq!(output.status.code(), Some(125), "{count}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("--smp"), "{count}");
    }
}

#[test]
fn waiting_cpus_cost_no_instruction() {
    // mov al, '!'; mov dx, 3F8h; out dx, al; mov dx, 605h; mov al, 20h; out dx, al; jmp $
    let mut image = b"\xb0!\xba\xf8\x03\xee\xba\x05\x06\xb0\x20\xee\xeb\xfe".to_vec();
    image.resize(510, 0);
    image.extend([0x55, 0xaa]);
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("smp-{}.bin", std::process::id()));
    std::fs::write(&path, image).unwrap();
    let run = |smp: &str| {
        let output = umbra(&["--kernel", path.to_str().unwrap(), "--smp", smp, "--json"]);
        let json: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
        (output.status.code(), output.stdout, json["retired"].clone(), json["guest_ns"].clone())
    };
    let one = run("1");
    assert_eq!((one.0, one.1.as_slice()), (Some(0), b"!".as_slice()));
    for smp in ["2", "32"] {
        assert_eq!(run(smp), one, "--smp {smp}");
    }
    std::fs::remove_file(path).unwrap();
}
