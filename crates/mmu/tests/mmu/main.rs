//! The MMU's tests, in one binary.

mod absent;
mod acceptance;
mod checked;
mod counters;
mod enumerate;
mod hazards;
mod manual;
mod processor;
mod rights;
mod scenarios;
mod scenarios_cr3;
mod scenarios_entry;
mod scenarios_modes;
mod scenarios_processors;
mod scenarios_rights;
mod scenarios_shadow;
mod sequences;
mod support;
mod tlb;
mod upper_half;
mod walk;
