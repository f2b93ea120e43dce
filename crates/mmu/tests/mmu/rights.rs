//! The permission rules, enumerated against the manual's table written down row by row.

use umbra_arch::paging::{Access, AccessKind};
use umbra_mmu::View;
use umbra_mmu::rights::{Rights, check};

const BOTH: [bool; 2] = [false, true];
const KINDS: [AccessKind; 3] = [AccessKind::Read, AccessKind::Write, AccessKind::Fetch];

/// "Determination of Access Rights" as a list of sentences: the error code, or 0.
fn predict(r: Rights, a: Access, v: &View) -> u32 {
    let (read, write, fetch) = (a.kind == AccessKind::Read, a.kind == AccessKind::Write, a.kind == AccessKind::Fetch);
    let user_page = r.user;
    let mut denied = false;
    // User-mode accesses need a user-mode address, and the right.
    denied |= a.user && !user_page;
    denied |= a.user && write && !r.write;
    denied |= a.user && fetch && !r.exec;
    // Supervisor writes to read-only pages need WP = 0.
    denied |= !a.user && write && !r.write && v.wp;
    // Supervisor data accesses to user pages: SMAP, unless AC overrides it for an explicit one.
    denied |= !a.user && (read || write) && user_page && v.smap && (a.implicit || !v.ac);
    // Supervisor fetches: XD always, SMEP for user pages.
    denied |= !a.user && fetch && !r.exec;
    denied |= !a.user && fetch && user_page && v.smep;
    let mut code = 0;
    // Keys: data accesses only, PKRU for user pages, PKRS for supervisor pages.
    let register = if user_page { v.pkru } else { v.pkrs };
    let in_force = if user_page { v.pke } else { v.pks };
    let ad = register & (1 << (2 * r.key)) != 0;
    let wd = register & (2 << (2 * r.key)) != 0;
    if in_force && !fetch && (ad || write && wd && (a.user || v.wp)) {
        denied = true;
        code |= 0x20;
    }
    if !denied {
        return 0;
    }
    code |= 1;
    code |= if write { 2 } else { 0 };
    code |= if a.user { 4 } else { 0 };
    code |= if fetch && v.reports_fetches { 0x10 } else { 0 };
    code
}

fn views() -> impl Iterator<Item = View> {
    (0..1u32 << 7).flat_map(|bits| {
        let on = move |n: u32| bits >> n & 1 != 0;
        // Key 2 gets every combination in both registers.
        (0..16u32).map(move |keys| View {
            user: false,
            ac: on(0),
            wp: on(1),
            smep: on(2),
            smap: on(3),
            reports_fetches: on(4),
            pke: on(5),
            pks: on(6),
            pkru: (keys & 3) << 4,
            pkrs: (keys >> 2) << 4,
        })
    })
}

#[test]
fn every_combination_follows_the_table() {
    let mut checked = 0u32;
    for view in views() {
        for bits in 0..16u8 {
            let rights = Rights {
                write: bits & 1 != 0,
                user: bits & 2 != 0,
                exec: bits & 4 != 0,
                key: if bits & 8 != 0 { 2 } else { 0 },
            };
            for kind in KINDS {
                for (user, implicit) in [(true, false), (false, false), (false, true)] {
                    let access = Access { kind, user, implicit };
                    let got = check(rights, access, &view).err().unwrap_or(0);
                    assert_eq!(got, predict(rights, access, &view), "{rights:?} {access:?} {view:?}");
                    checked += 1;
                }
            }
        }
    }
    assert_eq!(checked, 128 * 16 * 16 * 9);
}

#[test]
fn restricted_keys_are_those_with_any_bit() {
    for (pke, pks) in BOTH.into_iter().flat_map(|a| BOTH.map(|b| (a, b))) {
        for key in 0..16 {
            for bits in 1..4u32 {
                let view = View {
                    user: false,
                    ac: false,
                    wp: false,
                    smep: false,
                    smap: false,
                    reports_fetches: false,
                    pke,
                    pks,
                    pkru: bits << (2 * key),
                    pkrs: bits << (2 * (15 - key)),
                };
                let expected = u32::from(pke) << key | u32::from(pks) << (16 + 15 - key);
                assert_eq!(view.restricted_keys(), expected, "key {key} bits {bits}");
            }
        }
    }
}
