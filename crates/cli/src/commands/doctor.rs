//! `umbra doctor`: what this host offers, and what Umbra will use.

use crate::exit_code;
use clap::Args as ClapArgs;
use serde_json::json;
use std::fs;
use umbra_accel::kvm::{Irqchip, fit};
use umbra_accel::{Backend, defects};
use umbra_arch::cpuid::{CpuidProfile, HostOffer, PROFILE_NAMES};

/// Say what this host offers and what Umbra will use of it. Exit code 0 when Umbra can run here, else 125.
#[derive(ClapArgs, Debug)]
pub struct Args {
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// Everything found out.
struct Findings {
    kvm: &'static str,
    backend: Backend,
    /// What KVM can't offer of the default CPU model, or why it can't be used.
    lost: Result<Vec<String>, String>,
    /// Whether KVM has a local APIC for a machine that keeps its I/O APIC and 8259s.
    irqchip: Option<Irqchip>,
    features: Vec<(&'static str, bool)>,
    models: Vec<(&'static str, Option<String>)>,
    memory_kib: Option<u64>,
    available_kib: Option<u64>,
    huge_pages: Option<String>,
    overcommit: Option<String>,
    limit: Option<String>,
    executable_memory: Option<String>,
}

/// Looks and reports; gives the exit code.
pub fn execute(args: &Args) -> u8 {
    let found = look();
    if args.json {
        println!("{}", found.json());
    } else {
        print!("{}", found.text());
    }
    if found.can_run() { exit_code::CLEAN } else { exit_code::HOST }
}

fn look() -> Findings {
    let host = HostOffer::from_cpuid(|leaf, subleaf| {
        let answer = std::arch::x86_64::__cpuid_count(leaf, subleaf);
        [answer.eax, answer.ebx, answer.ecx, answer.edx]
    });
    let model = |name: &&'static str| (*name, CpuidProfile::parse(name, &host).err().map(|error| error.to_string()));
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    Findings {
        kvm: kvm(),
        backend: Backend::of_kvm(),
        lost: lost(&host),
        irqchip: Irqchip::offered().ok(),
        features: umbra_hostexec::host_features().iter().collect(),
        models: PROFILE_NAMES.iter().map(model).collect(),
        memory_kib: kib_of(&meminfo, "MemTotal:"),
        available_kib: kib_of(&meminfo, "MemAvailable:"),
        huge_pages: line("/sys/kernel/mm/transparent_hugepage/enabled").and_then(|text| chosen(&text)),
        overcommit: line("/proc/sys/vm/overcommit_memory"),
        limit: address_space(&fs::read_to_string("/proc/self/limits").unwrap_or_default()),
        executable_memory: umbra_hostexec::HostExec::new().err().map(|error| error.to_string()),
    }
}

fn kvm() -> &'static str {
    let device = std::path::Path::new("/dev/kvm");
    if !device.exists() {
        return "absent";
    }
    match fs::OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => "usable",
        Err(_) => "present, but this user can't open it",
    }
}

/// The features of the default CPU model that a guest under KVM does without.
fn lost(host: &HostOffer) -> Result<Vec<String>, String> {
    let profile = CpuidProfile::parse(PROFILE_NAMES[0], host).map_err(|error| error.to_string())?;
    let fitted = Irqchip::preferred().and_then(|irqchip| fit(&profile, irqchip)).map_err(|error| error.to_string())?;
    Ok(fitted.dropped.iter().map(ToString::to_string).collect())
}

fn kib_of(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// The word in brackets.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

/// The limit on this process's address space, unless there is none.
fn address_space(limits: &str) -> Option<String> {
    let line = limits.lines().find(|line| line.starts_with("Max address space"))?;
    let soft = line.split_whitespace().nth(3)?;
    (soft != "unlimited").then(|| format!("{soft} bytes"))
}

impl Findings {
    fn can_run(&self) -> bool {
        self.executable_memory.is_none() && self.models.iter().any(|(_, problem)| problem.is_none())
    }

    fn missing(&self) -> Vec<&'static str> {
        self.features.iter().filter(|(_, has)| !has).map(|&(name, _)| name).collect()
    }

    fn text(&self) -> String {
        use std::fmt::Write;
        let mut out = String::new();
        let unknown = || "unknown".to_owned();
        let mib = |kib: Option<u64>| kib.map_or_else(unknown, |kib| format!("{} MiB", kib >> 10));
        let missing = self.missing();
        let missing = if missing.is_empty() { "nothing".to_owned() } else { missing.join(", ") };
        // Writing to a String can't fail.
        let _ = writeln!(out, "engine:           interpreter (Umbra needs neither KVM nor VT-x)");
        let auto = if self.backend.is_hardware() { "kvm" } else { "soft" };
        let _ =
            writeln!(out, "/dev/kvm:         {}; executed by: {}; --accel auto means {auto}", self.kvm, self.backend);
        match &self.lost {
            Ok(lost) => {
                let _ = writeln!(out, "--accel kvm:      can't offer: {}", lost.join(" "));
            }
            Err(why) => {
                let _ = writeln!(out, "--accel kvm:      {why}");
            }
        }
        let irqchip = match (self.irqchip, defects::of_split_irqchip(self.backend)) {
            (Some(Irqchip::Split), None) => {
                "offered by KVM and used: local APIC KVM's, I/O APIC and 8259s Umbra's".to_owned()
            }
            (Some(Irqchip::Split), Some(defect)) => {
                format!("offered by KVM, used with --irqchip split only: {}: {}", defect.name, defect.what)
            }
            (Some(Irqchip::User), _) => "not offered by KVM: no x2APIC, no TSC deadline".to_owned(),
            (None, _) => unknown(),
        };
        let _ = writeln!(out, "split irqchip:    {irqchip}");
        let has: Vec<&str> = self.features.iter().filter(|(_, has)| *has).map(|&(name, _)| name).collect();
        let _ = writeln!(out, "CPU features:     {}", has.join(" "));
        let _ = writeln!(out, "missing:          {missing}");
        for (name, problem) in &self.models {
            let _ = writeln!(out, "--cpu {name:<12}{}", problem.as_deref().unwrap_or("works"));
        }
        let _ = writeln!(out, "memory:           {}, {} available", mib(self.memory_kib), mib(self.available_kib));
        let huge = self.huge_pages.clone().unwrap_or_else(unknown);
        let _ = writeln!(out, "huge pages:       transparent: {huge}");
        let overcommit = self.overcommit.clone().unwrap_or_else(unknown);
        let _ = writeln!(out, "overcommit:       {overcommit}");
        let _ = writeln!(out, "address space:    {}", self.limit.as_deref().unwrap_or("unlimited"));
        let executable = self.executable_memory.as_deref().unwrap_or("can be had");
        let _ = writeln!(out, "executable memory: {executable}");
        let _ = writeln!(out, "{}", if self.can_run() { "Umbra can run here." } else { "Umbra can't run here." });
        out
    }

    fn json(&self) -> serde_json::Value {
        let models: Vec<_> = self
            .models
            .iter()
            .map(|(name, problem)| json!({ "name": name, "works": problem.is_none(), "problem": problem }))
            .collect();
        json!({
            "can_run": self.can_run(),
            "engine": "interpreter",
            "kvm": { "device": self.kvm, "backend": self.backend.label(), "hardware": self.backend.is_hardware(),
                "lost_features": self.lost.as_ref().ok(), "problem": self.lost.as_ref().err(), "split_irqchip": self.irqchip.map(|irqchip| irqchip == Irqchip::Split) },
            "cpu_features": self.features.iter().filter(|(_, has)| *has).map(|(name, _)| name).collect::<Vec<_>>(),
            "missing_features": self.missing(),
            "cpu_models": models,
            "memory_kib": self.memory_kib,
            "available_kib": self.available_kib,
            "transparent_huge_pages": self.huge_pages,
            "overcommit": self.overcommit,
            "address_space_limit": self.limit,
            "executable_memory": self.executable_memory.is_none(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_files_are_read() {
        assert_eq!(kib_of("MemFree: 5 kB\nMemTotal:   123 kB\n", "MemTotal:"), Some(123));
        assert_eq!(chosen("always [madvise] never"), Some("madvise".into()));
        assert_eq!(address_space("Max address space  unlimited  unlimited  bytes\n"), None);
        assert_eq!(address_space("Max address space  4096  unlimited  bytes\n"), Some("4096 bytes".into()));
    }
}
