//! Arrows between crates point one way: ARCHITECTURE.md's table, as `cargo metadata` sees it.

use crate::{Findings, XtaskError};
use serde_json::Value;
use std::collections::BTreeMap;
use std::process::Command;

/// What each package may use, directly. Development dependencies count like others.
const ALLOWED: &[(&str, &[&str])] = &[
    ("umbra-arch", &[]),
    ("umbra-memory", &["umbra-arch"]),
    ("umbra-hostexec", &["umbra-arch"]),
    ("umbra-mmu", &["umbra-arch", "umbra-memory"]),
    ("umbra-cpu", &["umbra-arch", "umbra-memory", "umbra-mmu", "umbra-hostexec"]),
    ("umbra-timing", &["umbra-arch", "umbra-cpu"]),
    ("umbra-jit", &["umbra-arch", "umbra-memory", "umbra-mmu", "umbra-cpu", "umbra-hostexec"]),
    ("umbra-accel", &["umbra-arch", "umbra-memory"]),
    ("umbra-devices", &["umbra-arch", "umbra-memory"]),
    ("umbra-machine", ENGINE),
    ("umbra-test-roms", &["umbra-arch"]),
    ("umbra-firmware", &["umbra-arch"]),
    ("umbra-oracle", BELOW_ORACLE),
    ("umbra-cli", EVERYTHING),
    ("umbra-vm", EVERYTHING),
    ("umbra-bench", EVERYTHING),
    ("umbra-fuzz", EVERYTHING),
    ("xtask", EVERYTHING),
];

const ENGINE: &[&str] = &[
    "umbra-arch",
    "umbra-memory",
    "umbra-hostexec",
    "umbra-mmu",
    "umbra-cpu",
    "umbra-timing",
    "umbra-jit",
    "umbra-accel",
    "umbra-devices",
];

const BELOW_ORACLE: &[&str] = &[
    "umbra-arch",
    "umbra-memory",
    "umbra-hostexec",
    "umbra-mmu",
    "umbra-cpu",
    "umbra-timing",
    "umbra-jit",
    "umbra-accel",
    "umbra-devices",
    "umbra-machine",
    "umbra-test-roms",
    "umbra-firmware",
];

const EVERYTHING: &[&str] = &[
    "umbra-arch",
    "umbra-memory",
    "umbra-hostexec",
    "umbra-mmu",
    "umbra-cpu",
    "umbra-timing",
    "umbra-jit",
    "umbra-accel",
    "umbra-devices",
    "umbra-machine",
    "umbra-test-roms",
    "umbra-firmware",
    "umbra-oracle",
];

/// A package of the workspace with what it names as dependencies.
#[derive(Debug, PartialEq)]
struct Member {
    name: String,
    dependencies: Vec<String>,
}

/// Checks the workspace.
pub fn check() -> Result<Findings, XtaskError> {
    let metadata = metadata()?;
    let members = members(&metadata);
    let mut findings = judge(&members);
    findings.errors.extend(pre_releases(&metadata));
    Ok(findings)
}

fn metadata() -> Result<Value, XtaskError> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1"])
        .current_dir(crate::sources::root())
        .output()
        .map_err(XtaskError::Metadata)?;
    if !output.status.success() {
        return Err(XtaskError::MetadataFailed(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn packages(metadata: &Value) -> impl Iterator<Item = &Value> {
    metadata["packages"].as_array().into_iter().flatten()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn members(metadata: &Value) -> Vec<Member> {
    let ids = metadata["workspace_members"].as_array();
    let is_member = |p: &&Value| ids.is_some_and(|ids| ids.contains(&p["id"]));
    let dependencies =
        |p: &Value| p["dependencies"].as_array().into_iter().flatten().map(|d| text(&d["name"])).collect();
    packages(metadata)
        .filter(is_member)
        .map(|p| Member { name: text(&p["name"]), dependencies: dependencies(p) })
        .collect()
}

fn judge(members: &[Member]) -> Findings {
    let allowed: BTreeMap<_, _> = ALLOWED.iter().copied().collect();
    let mut findings = Findings { examined: format!("{} crates", members.len()), ..Findings::default() };
    for member in members {
        let Some(may) = allowed.get(member.name.as_str()) else {
            findings.errors.push(format!("{} is not in the table of crates: add it there and here", member.name));
            continue;
        };
        let inner = member.dependencies.iter().filter(|d| allowed.contains_key(d.as_str()));
        for used in inner.filter(|d| !may.contains(&d.as_str())) {
            findings.errors.push(format!("{} may not use {used}", member.name));
        }
    }
    findings
}

/// Whether a hyphen comes before the build metadata ("Semantic Versioning").
fn is_pre_release(version: &str) -> bool {
    version.split('+').next().is_some_and(|release| release.contains('-'))
}

/// Packages that workspace members use directly in a version that is not a release.
fn pre_releases(metadata: &Value) -> Vec<String> {
    let used: Vec<String> = members(metadata).into_iter().flat_map(|m| m.dependencies).collect();
    packages(metadata)
        .filter(|p| used.contains(&text(&p["name"])) && is_pre_release(&text(&p["version"])))
        .map(|p| format!("{} {} is not a released version", text(&p["name"]), text(&p["version"])))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, dependencies: &[&str]) -> Member {
        Member { name: name.to_owned(), dependencies: dependencies.iter().map(|d| (*d).to_owned()).collect() }
    }

    #[test]
    fn allowed_edges_pass_and_each_other_edge_fails() {
        for (name, may) in ALLOWED {
            for (other, _) in ALLOWED {
                let findings = judge(&[member(name, &[other, "serde"])]);
                assert_eq!(findings.errors.is_empty(), may.contains(other), "{name} -> {other}");
            }
        }
    }

    #[test]
    fn the_table_has_no_cycle() {
        let mut placed: Vec<&str> = Vec::new();
        for (name, may) in ALLOWED {
            assert!(may.iter().all(|used| placed.contains(used)), "{name} uses what comes later");
            placed.push(name);
        }
    }

    #[test]
    fn unknown_crates_fail() {
        assert_eq!(judge(&[member("umbra-new", &[])]).errors.len(), 1);
    }

    #[test]
    fn pre_release_versions_are_found_where_they_are_used() {
        let metadata = serde_json::json!({
            "workspace_members": ["a"],
            "packages": [
                {"id": "a", "name": "umbra-arch", "version": "0.1.0", "dependencies": [{"name": "good"}, {"name": "bad"}]},
                {"id": "g", "name": "good", "version": "1.0.0+spec-1.1.0", "dependencies": []},
                {"id": "b", "name": "bad", "version": "2.0.0-beta.1", "dependencies": []},
                {"id": "c", "name": "unused", "version": "2.0.0-beta.1", "dependencies": []},
            ],
        });
        assert_eq!(pre_releases(&metadata), ["bad 2.0.0-beta.1 is not a released version"]);
    }
}
