//! CPUID profiles as data: which features a virtual CPU has, and what CPUID therefore answers.
//!
//! Everything that depends on a feature is derived from [`CpuidProfile::features`] and nothing else:
//! the leaves, the bits that control registers and MSRs accept, XCR0. A profile is fixed, so that a
//! guest sees the same CPU on every host; what the host must lend is checked by
//! [`CpuidProfile::restrict_to`]. A profile never offers what isn't implemented
//! ([`Feature::is_implemented`]).

mod feature;
mod leaves;
mod profile;
pub mod xsave;

pub use feature::{Feature, FeatureSet, Place, Register};
pub use leaves::{CpuidDynamic, HYPERVISOR_SIGNATURE, KVM_SIGNATURE};
pub use profile::{BadProfile, CpuidProfile, HostOffer, MissingFeature, PROFILE_NAMES, Vendor};
