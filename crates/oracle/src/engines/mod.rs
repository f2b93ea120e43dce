//! Engines by name.

mod blank;
mod host;
mod interp;
mod window;

pub use blank::Blank;
pub use host::Host;
pub use interp::Interp;
pub use window::{Window, WindowError};

use crate::engine::Engine;
use crate::ring0::model::Model;
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
    /// The interpreter can't be made.
    #[error("interp: {0}")]
    Interp(#[from] WindowError),
}

/// Names of all engines.
pub const NAMES: &[&str] = &["interp", "interp-unload", "interp-drop", "interp-kvm-role", "host", "model"];

/// The engine of that name.
///
/// # Errors
/// [`MakeError`] says what this host lacks.
pub fn make(name: &str) -> Result<Box<dyn Engine>, MakeError> {
    let interp = |name, mmu| Interp::new(name, mmu);
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
        "host" => Box::new(Host::new()?),
        "model" => Box::new(Model),
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
