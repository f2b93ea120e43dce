//! What fuzzers found.

use std::path::Path;

/// Files that a fuzzer found, in the target's folder below `fuzz/findings`.
pub fn replay(target: &str, property: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/findings").join(target);
    let Ok(entries) = std::fs::read_dir(&folder) else { return };
    for entry in entries {
        let path = entry.expect("a readable folder").path();
        property(&std::fs::read(&path).expect("a readable finding"));
    }
}
