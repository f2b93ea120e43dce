//! Engines by name.

mod blank;
mod gdb;
mod host;
mod interp;
mod jit;
mod kvm;
mod kvm_defects;
mod qemu;
mod window;

pub use blank::{Blank, EAGER, Whole};
pub use host::Host;
pub use interp::Interp;
pub use jit::Translator;
pub use kvm::Kvm;
pub use qemu::{Qemu, QemuError};
pub use window::{Window, WindowError};

use crate::engine::Engine;
use crate::ring0::model::Model;
use umbra_accel::kvm::{Irqchip, KvmError, fit};
use umbra_arch::cpuid::{CpuidProfile, HostOffer};
use umbra_hostexec::native::NativeError;
use umbra_mmu::{MmuMode, MmuOptions};

/// An engine that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// No such name.
    #[error("no engine is called {name:?}: use {}", NAMES.join(", "))]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The host can't run instructions natively.
    #[error("host: {0}")]
    Host(#[from] NativeError),
    /// There is no usable KVM.
    #[error("kvm: {0}")]
    Kvm(#[from] KvmError),
    /// There is no QEMU.
    #[error("qemu: {0}")]
    Qemu(#[from] QemuError),
    /// The interpreter can't be made.
    #[error("interp: {0}")]
    Interp(#[from] WindowError),
}

/// Names of all engines.
pub const NAMES: &[&str] =
    &["interp", "interp-unload", "interp-drop", "interp-kvm-role", "jit", "host", "model", "kvm", "qemu"];

/// The engines of these names, to be compared with each other: all are the CPU that the poorest of them can be.
///
/// # Errors
/// [`MakeError`] says what this host lacks.
pub fn make_all<S: AsRef<str>>(names: &[S]) -> Result<Vec<Box<dyn Engine>>, MakeError> {
    let mut profile = profile();
    if names.iter().any(|name| name.as_ref() == "kvm") {
        profile = fit(&profile, Irqchip::User)?.profile;
    }
    names.iter().map(|name| make_of(name.as_ref(), &profile)).collect()
}

/// The engine of that name, on the richest CPU that this host can compare.
///
/// # Errors
/// [`MakeError`] says what this host lacks.
pub fn make(name: &str) -> Result<Box<dyn Engine>, MakeError> {
    make_of(name, &profile())
}

fn make_of(name: &str, profile: &CpuidProfile) -> Result<Box<dyn Engine>, MakeError> {
    let interp = |name, mmu| Interp::new(name, profile, mmu);
    Ok(match name {
        "interp" => Box::new(interp("interp", MmuOptions::default())?),
        "interp-unload" => {
            Box::new(interp("interp-unload", MmuOptions { mode: MmuMode::UnloadAlways, ..MmuOptions::default() })?)
        }
        "interp-drop" => {
            Box::new(interp("interp-drop", MmuOptions { mode: MmuMode::DropAtRandom(1), ..MmuOptions::default() })?)
        }
        "interp-kvm-role" => {
            Box::new(interp("interp-kvm-role", MmuOptions { kvm_role: true, ..MmuOptions::default() })?)
        }
        "jit" => Box::new(Translator::new(profile)?),
        "host" => Box::new(Host::new()?),
        "model" => Box::new(Model),
        "kvm" => Box::new(Kvm::new(profile)?),
        "qemu" => Box::new(Qemu::new()?),
        _ => return Err(MakeError::Unknown { name: name.to_owned() }),
    })
}

/// The CPU that cases run on: everything that this host can compare.
pub fn profile() -> CpuidProfile {
    let host = HostOffer::from_cpuid(|leaf, subleaf| {
        let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
        [r.eax, r.ebx, r.ecx, r.edx]
    });
    CpuidProfile::parse("max", &host).unwrap_or_default()
}
