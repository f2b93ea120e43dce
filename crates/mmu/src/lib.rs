//! Shadow paging with role-keyed roots that role changes never throw away.
//!
//! The guest's tables are the truth, [`walk`] reads them. Shadow pages keep what was read, decoded,
//! keyed by table frame and [`PageRole`]; every store to a shadowed table drops exactly what was
//! derived from it, so they are always coherent and architectural flushes drop nothing. Roots bind a
//! CR3 (or four PDPTEs) and a role to shadow pages and to *contexts*, direct-mapped tables of
//! translations that the interpreter's and the translator's fast paths read. A change of CR0.WP, CR3,
//! CR4 or EFER selects another root or another column of a context.
#![forbid(unsafe_code)]

pub mod event;
pub mod format;
pub mod inspect;
pub mod rights;
pub mod role;
pub mod stats;
pub mod walk;

mod active;
mod adopt;
mod audit;
mod context;
mod fill;
mod hints;
mod invalidate;
mod mmu;
mod roots;
mod shadow;
mod tables;
mod windows;
mod writers;

pub use active::FastTable;
pub use context::Entry;
pub use event::Event;
pub use fill::{End, Look};
pub use invalidate::Written;
pub use mmu::{Mmu, MmuMode, MmuOptions, Translation};
pub use role::{CpuRole, PageRole, View};
pub use stats::MmuStats;
pub use windows::UserPage;
