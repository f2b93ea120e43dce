//! Error codes in words ("Error Code", "Page-Fault Exceptions").

use umbra_arch::fault::vector;
use umbra_arch::paging::{Access, AccessKind, pfec};
use umbra_arch::{CpuState, Fault};

/// The error code of `fault` in words; `None` if it has none.
pub fn error_code(state: &CpuState, fault: &Fault) -> Option<String> {
    let code = fault.code?;
    Some(match fault.vector {
        vector::PF => page_fault(code),
        vector::TS | vector::NP | vector::SS | vector::GP => selector(state, code),
        _ => return None,
    })
}

/// The access that a #PF error code describes.
pub(super) fn access_of(code: u32) -> Access {
    let kind = if code & pfec::I != 0 {
        AccessKind::Fetch
    } else if code & pfec::W != 0 {
        AccessKind::Write
    } else {
        AccessKind::Read
    };
    Access { kind, user: code & pfec::U != 0, implicit: false }
}

fn page_fault(code: u32) -> String {
    let what = match access_of(code).kind {
        AccessKind::Fetch => "instruction fetch",
        AccessKind::Write => "write",
        AccessKind::Read => "read",
    };
    let who = if code & pfec::U != 0 { "user-mode" } else { "supervisor" };
    let why = if code & pfec::RSVD != 0 {
        "a reserved bit is set in an entry (P, RSVD)"
    } else if code & pfec::PK != 0 {
        "a protection key forbids it (P, PK)"
    } else if code & pfec::P != 0 {
        "the page is present, its rights forbid it (P)"
    } else {
        "not present"
    };
    format!("{who} {what}: {why}")
}

fn selector(state: &CpuState, code: u32) -> String {
    if code == 0 {
        return "code 0: about no selector".into();
    }
    let external = if code & 1 != 0 { "EXT=1 (while delivering an event)" } else { "EXT=0" };
    let index = code >> 3 & 0x1fff;
    if code & 2 != 0 {
        return format!("IDT gate of vector {index}, {external}");
    }
    let (table, base) = if code & 4 != 0 { ("LDT", state.seg[6].base) } else { ("GDT", state.gdtr.base) };
    let at = base.wrapping_add(u64::from(index) * 8);
    format!("{table} selector {:#06x} (index {index}, descriptor at {at:#x}), {external}", code & 0xfffc)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_told_apart() {
        let state = CpuState::reset();
        let say = |fault| error_code(&state, &fault).unwrap_or_default();
        assert!(say(Fault::gp(13 * 8 + 2)).starts_with("IDT gate of vector 13, EXT=0"));
        assert!(say(Fault::np(0x2b)).starts_with("IDT gate of vector 5, EXT=1"));
        assert!(say(Fault::gp(0x10)).starts_with("GDT selector 0x0010 (index 2"));
        assert!(say(Fault::gp(0x14)).starts_with("LDT selector 0x0014 (index 2"));
        assert_eq!(say(Fault::page(0, 2)), "supervisor write: not present");
        assert!(say(Fault::page(0, 0x15)).starts_with("user-mode instruction fetch: the page is present"));
        assert_eq!(error_code(&state, &Fault::UNDEFINED), None);
    }
}
