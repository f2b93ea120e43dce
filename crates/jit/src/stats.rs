//! What the translator did.

use std::fmt;

/// Counters since the engine was made.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct JitStats {
    /// Blocks translated.
    pub translated: u64,
    /// Guest instructions in them.
    pub translated_ops: u64,
    /// Of these, how many call their function.
    pub translated_helpers: u64,
    /// Bytes of host code in use.
    pub code_bytes: u64,
    /// Times the code memory was full and emptied.
    pub emptied: u64,
    /// Translations dropped because their block was.
    pub dropped: u64,
    /// Direct exits linked.
    pub linked: u64,
    /// Times generated code was left because an operation broke its block or stopped.
    pub left_by_op: u64,
    /// Likewise at a block's head, for the budget or to look at something.
    pub left_by_budget: u64,
    /// Likewise by a direct exit without a link.
    pub left_by_link: u64,
    /// Likewise because a target was not in the jump table.
    pub left_by_miss: u64,
    /// Instructions retired in generated code, helpers included.
    pub ops_translated: u64,
    /// Operations done by their functions from generated code.
    pub ops_by_helper: u64,
    /// Instructions retired in the interpreter's loop.
    pub ops_interpreted: u64,
    /// Address spaces that got windows.
    pub windows_opened: u64,
    /// Of these, those that lost them because they weren't worth it.
    pub windows_given_up: u64,
    /// Runs of pages mapped in windows.
    pub window_maps: u64,
    /// Pages unmapped, one by one or all of an address space.
    pub window_unmaps: u64,
    /// Faults of the host for pages that windows didn't have.
    pub window_faults: u64,
}

impl JitStats {
    /// Names and values.
    pub fn fields(&self) -> [(&'static str, u64); 19] {
        [
            ("translated", self.translated),
            ("translated_ops", self.translated_ops),
            ("translated_helpers", self.translated_helpers),
            ("code_bytes", self.code_bytes),
            ("emptied", self.emptied),
            ("dropped", self.dropped),
            ("linked", self.linked),
            ("left_by_op", self.left_by_op),
            ("left_by_budget", self.left_by_budget),
            ("left_by_link", self.left_by_link),
            ("left_by_miss", self.left_by_miss),
            ("ops_translated", self.ops_translated),
            ("ops_by_helper", self.ops_by_helper),
            ("ops_interpreted", self.ops_interpreted),
            ("windows_opened", self.windows_opened),
            ("windows_given_up", self.windows_given_up),
            ("window_maps", self.window_maps),
            ("window_unmaps", self.window_unmaps),
            ("window_faults", self.window_faults),
        ]
    }

    /// Adds another engine's.
    pub fn add(&mut self, other: &Self) {
        self.translated += other.translated;
        self.translated_ops += other.translated_ops;
        self.translated_helpers += other.translated_helpers;
        self.code_bytes += other.code_bytes;
        self.emptied += other.emptied;
        self.dropped += other.dropped;
        self.linked += other.linked;
        self.left_by_op += other.left_by_op;
        self.left_by_budget += other.left_by_budget;
        self.left_by_link += other.left_by_link;
        self.left_by_miss += other.left_by_miss;
        self.ops_translated += other.ops_translated;
        self.ops_by_helper += other.ops_by_helper;
        self.ops_interpreted += other.ops_interpreted;
        self.windows_opened += other.windows_opened;
        self.windows_given_up += other.windows_given_up;
        self.window_maps += other.window_maps;
        self.window_unmaps += other.window_unmaps;
        self.window_faults += other.window_faults;
    }
}

impl fmt::Display for JitStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.fields() {
            writeln!(f, "jit {:<22}{value:>16}", name.replace('_', " "))?;
        }
        Ok(())
    }
}
