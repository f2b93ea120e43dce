//! Guest-physical memory: RAM, ROM, page flags and the journal of flagged writes.
