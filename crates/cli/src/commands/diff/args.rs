//! The arguments of `umbra diff`.

use clap::Args as ClapArgs;
use std::path::PathBuf;

const AFTER: &str = "\
Engines:
  interp            the interpreter
  interp-unload     the same, dropping all roots at each change of control registers
  interp-drop       the same, dropping caches at random moments
  interp-kvm-role   the same, with WP, SMEP and SMAP in the keys of shadow pages, as KVM has them
  jit               the translator, translating everything that it runs
  host              this host's CPU, natively: single ring-3 instructions
  model             a predictor of page walks, for the generator shapes
  kvm               this host's KVM (needs access to /dev/kvm)
  qemu              QEMU through its gdb stub (needs qemu-system-x86_64)

Generators:
  rows              one ring-3 instruction of any row, with edge values, in 16-, 32- and 64-bit code
  programs          loops of random 32- and 64-bit ring-3 instructions, for engines that do several at once
  control           ring-0 sequences of control-register and EFER writes, page-table edits and accesses
  control-plain     the same in 64-bit mode, without SMEP, SMAP and protection keys: what poor backends have too
  shapes            one access through page tables of any shape, under any rights
  (with --kernel)   up to 20000 instructions that the kernel executes while it boots, with their operands

Each case ends the same, different, or with an engine that cannot answer it, whose reasons are counted.

Exit codes:
  0    no difference
  1    a difference, or more than half of the cases could not be answered
  125  wrong usage, or the host lacks something

Examples:
  umbra diff --engines interp,host --cases 10000000
  umbra diff --engines interp,model --generator shapes --seed 7 --shard 3/16 --json shard-3.json
  umbra diff --engines interp,jit --generator programs --cases 100000
  umbra diff --merge shard-*.json
  umbra diff --engines interp,host --kernel vmlinuz --cases 20000
  umbra diff --engines interp,qemu --rom all
  umbra diff --replay diff-rows-1-4711.toml";

/// Run generated cases on several engines and compare registers, flags, memory, exceptions and page tables with
/// those of the first. What differs is made smaller and written as a case to replay and as an image to run.
#[derive(ClapArgs, Debug)]
#[command(after_help = AFTER)]
pub struct Args {
    /// Engines, comma-separated
    #[arg(long, value_name = "A,B", value_delimiter = ',', default_value = "interp,host")]
    pub engines: Vec<String>,
    /// What makes the cases
    #[arg(long, value_name = "NAME", default_value = "rows")]
    pub generator: String,
    /// Seed: the same seed gives the same cases
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Number of cases, of all shards together
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    pub cases: u64,
    /// Run only every Nth case, from the Ith on (I is less than N)
    #[arg(long, value_name = "I/N", value_parser = parse_shard, default_value = "0/1")]
    pub shard: (u64, u64),
    /// Go on after five differences
    #[arg(long)]
    pub keep_going: bool,
    /// Write differing cases into this directory [default: the working directory]
    #[arg(long, value_name = "DIR")]
    pub save: Option<PathBuf>,
    /// Write the counts as JSON, for --merge
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Compare the reports of a test ROM, or of all
    #[arg(long, value_name = "NAME", conflicts_with_all = ["generator", "shard", "json"])]
    pub rom: Option<String>,
    /// Boot this kernel under the interpreter and take its instructions as the cases
    #[arg(long, value_name = "FILE", conflicts_with_all = ["generator", "rom", "replay", "merge"])]
    pub kernel: Option<PathBuf>,
    /// Its initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Its command line
    #[arg(long, value_name = "STRING", requires = "kernel", default_value = "console=ttyS0")]
    pub append: String,
    /// Run a written case again, on the engines that it names unless --engines is given
    #[arg(long, value_name = "CASE", conflicts_with_all = ["generator", "shard", "json", "rom"])]
    pub replay: Option<PathBuf>,
    /// Add up the JSON results of a campaign's shards
    #[arg(long, value_name = "FILES", num_args = 1.., conflicts_with_all = ["generator", "shard", "rom", "replay"])]
    pub merge: Vec<PathBuf>,
}

impl Args {
    /// Whether --engines says something else than its default.
    pub fn engines_given(&self) -> bool {
        self.engines != ["interp", "host"]
    }
}

fn parse_shard(text: &str) -> Result<(u64, u64), String> {
    let parsed = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    match parsed {
        Some((i, n)) if i < n => Ok((i, n)),
        _ => Err("give I/N with I less than N, for example 0/4".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::{AFTER, parse_shard};
    use umbra_oracle::campaign::Generator;
    use umbra_oracle::engines;

    #[test]
    fn help_lists_every_engine_and_generator() {
        for name in engines::NAMES.iter().copied().chain(Generator::NAMES.map(|(name, _)| name)) {
            assert!(AFTER.lines().any(|line| line.split_whitespace().next() == Some(name)), "{name}");
        }
    }

    #[test]
    fn shards_are_numbered_from_0() {
        assert_eq!(parse_shard("3/4"), Ok((3, 4)));
        for bad in ["4/4", "0/0", "1", "-1/2", "1/2/3"] {
            assert!(parse_shard(bad).is_err(), "{bad}");
        }
    }
}
