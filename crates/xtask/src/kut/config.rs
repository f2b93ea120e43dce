//! `unittests.cfg`: which file runs with what.

use crate::XtaskError;
use std::path::Path;

/// One section.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Section {
    /// Its name.
    pub name: String,
    /// The image.
    pub file: String,
    /// The test's command line.
    pub test_args: String,
    /// Options for the emulator, in QEMU's words.
    pub qemu_params: String,
    /// Number of virtual CPUs.
    pub smp: u32,
    /// Seconds.
    pub timeout: Option<u64>,
    groups: Vec<String>,
}

/// Groups that need a nested hypervisor, KVM's paravirtual interfaces or another machine.
const FOREIGN_GROUPS: [&str; 9] =
    ["vmx", "svm", "nodefault", "hyperv", "pmu", "nested_exception", "vmexit", "realmode_emulation", "tdp"];
/// Files that test what only KVM or special devices have.
const FOREIGN_FILES: [&str; 11] = [
    "hypercall.flat",
    "kvmclock_test.flat",
    "vmware_backdoors.flat",
    "hyperv_clock.flat",
    "hyperv_synic.flat",
    "hyperv_stimer.flat",
    "hyperv_connections.flat",
    "intel-iommu.flat",
    "svm.flat",
    "svm_npt.flat",
    "vmx.flat",
];

/// Reads the file.
///
/// # Errors
/// When it can't be read.
pub fn read(path: &Path) -> Result<Vec<Section>, XtaskError> {
    let text = std::fs::read_to_string(path).map_err(|error| XtaskError::Read(path.to_owned(), error))?;
    Ok(parse(&text))
}

fn parse(text: &str) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            sections.push(Section { name: name.to_owned(), smp: 1, ..Section::default() });
            continue;
        }
        let Some((key, value)) = line.split_once('=').filter(|_| !line.starts_with('#')) else { continue };
        let value = value.trim().trim_matches(['"', '\'']);
        let Some(section) = sections.last_mut() else { continue };
        match key.trim() {
            "file" => section.file = value.to_owned(),
            "test_args" => section.test_args = value.to_owned(),
            "qemu_params" | "extra_params" => section.qemu_params = value.to_owned(),
            "smp" => section.smp = value.parse().unwrap_or(1),
            "timeout" => section.timeout = value.parse().ok(),
            "groups" => section.groups = value.split_whitespace().map(str::to_owned).collect(),
            _ => {}
        }
    }
    sections
}

impl Section {
    /// Whether it tests the CPU and the PC rather than a hypervisor.
    pub fn is_for_pc(&self) -> bool {
        !FOREIGN_FILES.contains(&self.file.as_str())
            && !self.groups.iter().any(|group| FOREIGN_GROUPS.contains(&group.as_str()))
    }

    /// Arguments of `umbra run` beside the kernel.
    pub fn arguments(&self, smp: bool) -> Vec<String> {
        let mut arguments = vec!["--cpu".to_owned(), cpu(self.qemu_option("-cpu").unwrap_or("qemu64"))];
        if let Some(memory) = self.qemu_option("-m") {
            arguments.extend(["-m".to_owned(), memory.to_uppercase()]);
        }
        if smp && self.smp > 1 {
            arguments.extend(["--smp".to_owned(), self.smp.to_string()]);
        }
        if !self.test_args.is_empty() {
            arguments.extend(["--append".to_owned(), self.test_args.clone()]);
        }
        arguments
    }

    /// Whether it waits for pages that the host has swapped out, of 2 GiB of RAM.
    pub fn needs_swapping(&self) -> bool {
        self.file == "asyncpf.flat"
    }

    fn qemu_option(&self, name: &str) -> Option<&str> {
        let mut words = self.qemu_params.split_whitespace();
        words.find(|word| *word == name)?;
        words.next()
    }
}

/// Our CPU model for QEMU's: what QEMU's models with a name have, ours has; `max` includes LA57 there.
fn cpu(qemu: &str) -> String {
    let mut parts = qemu.split(',');
    let mut ours = match parts.next() {
        Some("max" | "host") => "max,+la57".to_owned(),
        _ => "umbra-v3".to_owned(),
    };
    for part in parts.filter(|part| part.starts_with(['+', '-']) || part.starts_with("vendor=")) {
        ours.push(',');
        ours.push_str(part);
    }
    ours
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_and_their_arguments() {
        let text = "# comment\n[a]\nfile = a.flat\nsmp = 2\ntimeout = 30\ntest_args = \"x y\"\n\
                    qemu_params = -cpu max,host-phys-bits,vendor=GenuineIntel -m 4g\n\n[b]\nfile = b.flat\ngroups = vmx\n";
        let sections = parse(text);
        assert_eq!(sections.len(), 2);
        let expected = ["--cpu", "max,+la57,vendor=GenuineIntel", "-m", "4G", "--smp", "2", "--append", "x y"];
        assert_eq!(sections[0].arguments(true), expected);
        assert_eq!(sections[0].timeout, Some(30));
        assert!(sections[0].is_for_pc() && !sections[1].is_for_pc());
        assert_eq!(sections[1].arguments(true), ["--cpu", "umbra-v3"]);
    }
}
