//! Raw rights of a translation, and whether they allow an access ("Determination of Access Rights").

use crate::role::View;
use umbra_arch::paging::{Access, AccessKind, pfec};

/// Rights as the tables say them, combined over all levels. Nothing in here depends on WP, SMEP,
/// SMAP, AC or key registers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Rights {
    /// R/W is set in every entry.
    pub write: bool,
    /// U/S is set in every entry: a user-mode address.
    pub user: bool,
    /// No entry has execute-disable set.
    pub exec: bool,
    /// The leaf's protection key; 0 where keys don't exist.
    pub key: u8,
}

impl Rights {
    /// No restriction at all: what a walk starts with, and what paging off gives.
    pub const ALL: Rights = Rights { write: true, user: true, exec: true, key: 0 };

    /// The rights of a path through two entries; the key is the lower entry's.
    #[inline(always)]
    pub const fn and(self, lower: Rights) -> Rights {
        Rights {
            write: self.write & lower.write,
            user: self.user & lower.user,
            exec: self.exec & lower.exec,
            key: lower.key,
        }
    }
}

/// Decides about an access to a present page. The error gives the #PF error code, P included.
///
/// # Errors
/// The error code of "Page-Fault Exceptions".
#[inline(always)]
pub const fn check(rights: Rights, access: Access, view: &View) -> Result<(), u32> {
    let key_denies = key_denies(rights, access, view);
    if key_denies || !allowed_without_keys(rights, access, view) {
        let key = if key_denies { pfec::PK } else { 0 };
        return Err(pfec::P | key | attempt_code(access, view));
    }
    Ok(())
}

/// The error-code bits that describe the attempt: W, U and I.
pub const fn attempt_code(access: Access, view: &View) -> u32 {
    let mut code = 0;
    if matches!(access.kind, AccessKind::Write) {
        code |= pfec::W;
    }
    if access.user {
        code |= pfec::U;
    }
    if matches!(access.kind, AccessKind::Fetch) && view.reports_fetches {
        code |= pfec::I;
    }
    code
}

const fn allowed_without_keys(rights: Rights, access: Access, view: &View) -> bool {
    if access.user {
        return rights.user
            && match access.kind {
                AccessKind::Read => true,
                AccessKind::Write => rights.write,
                AccessKind::Fetch => rights.exec,
            };
    }
    let smap_denies = rights.user && view.smap_enforced(access.implicit);
    match access.kind {
        AccessKind::Read => !smap_denies,
        AccessKind::Write => (rights.write || !view.wp) && !smap_denies,
        AccessKind::Fetch => rights.exec && !(rights.user && view.smep),
    }
}

/// Keys restrict data accesses only; write-disable holds for supervisor writes only with CR0.WP
/// ("Protection Keys").
const fn key_denies(rights: Rights, access: Access, view: &View) -> bool {
    let register = match (rights.user, view.pke, view.pks) {
        (true, true, _) => view.pkru,
        (false, _, true) => view.pkrs,
        _ => return false,
    };
    let bits = register >> (2 * (rights.key & 15));
    let (access_disable, write_disable) = (bits & 1 != 0, bits & 2 != 0);
    match access.kind {
        AccessKind::Fetch => false,
        AccessKind::Read => access_disable,
        AccessKind::Write => access_disable || write_disable && (access.user || view.wp),
    }
}
