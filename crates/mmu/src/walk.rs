//! The reference walk of guest tables: pure but for its parameter, which reads and updates entries.
//!
//! Order of checks, top down: at each level not-present, then reserved bits; rights only after the
//! whole walk; accessed and dirty bits only if the access is allowed ("Page-Fault Exceptions",
//! "Accessed and Dirty Flags").

use crate::format::{Decoded, Format};
use crate::rights::{self, Rights};
use crate::role::{EntryFormat, PageRole, View};
use umbra_arch::paging::{Access, AccessKind, entry, pfec};
use umbra_arch::{Fault, Gpa, Gva};

/// What became of an entry's update.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exchange {
    /// The entry was replaced.
    Done,
    /// The entry cannot be written (ROM, no memory at all): it stays as it is.
    Ignored,
    /// Somebody changed the entry since it was read.
    Changed,
}

/// How a walk reaches table entries.
pub trait Tables {
    /// Reads the entry of `bytes` (4 or 8) bytes at `gpa`; absent memory reads as all ones.
    fn read(&mut self, gpa: Gpa, bytes: u64) -> u64;
    /// Replaces `old` by `new` atomically.
    fn exchange(&mut self, gpa: Gpa, bytes: u64, old: u64, new: u64) -> Exchange;
}

/// Where a walk starts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Top {
    /// Paging is off.
    Direct,
    /// The table at this physical address.
    Table(Gpa),
    /// The latched PDPTEs of PAE paging, bits that nothing reads cleared.
    Pdptes([u64; 4]),
}

/// Everything that decides what a linear address means.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Regime {
    /// Where a walk starts.
    pub top: Top,
    /// Role of the first table read.
    pub role: PageRole,
    /// CPUID facts.
    pub format: Format,
}

/// One entry that a walk used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// First byte of the table.
    pub table: Gpa,
    /// Role of the table.
    pub role: PageRole,
    /// Index of the entry.
    pub index: u16,
    /// The entry as it is after the walk.
    pub raw: u64,
}

impl Step {
    /// The entry's address.
    #[inline(always)]
    pub const fn entry(&self) -> Gpa {
        self.table.add(self.index as u64 * self.role.format.entry_bytes())
    }
}

/// The entries that a walk used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Path {
    steps: [Step; 5],
    count: usize,
}

impl Path {
    /// No entry.
    pub(crate) const EMPTY: Path = Path { steps: [NO_STEP; 5], count: 0 };

    /// Topmost first; none with paging off.
    pub(crate) fn steps(&self) -> &[Step] {
        &self.steps[..self.count]
    }

    fn push(&mut self, step: Step) {
        self.steps[self.count] = step;
        self.count += 1;
    }
}

/// Where a walk led.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reached {
    /// The byte's physical address.
    pub gpa: Gpa,
    /// Rights over all levels.
    pub rights: Rights,
    /// The leaf's own rights.
    pub own: Rights,
    /// First byte of the leaf's page.
    pub base: Gpa,
    /// D of the leaf.
    pub dirty: bool,
    /// The walk has set D.
    pub dirtied: bool,
}

/// A successful walk.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    path: Path,
    /// The byte's physical address.
    pub gpa: Gpa,
    /// Rights over all levels.
    pub rights: Rights,
    /// D of the leaf.
    pub dirty: bool,
}

impl Walk {
    fn of(path: Path, reached: Reached) -> Walk {
        Walk { path, gpa: reached.gpa, rights: reached.rights, dirty: reached.dirty }
    }

    /// The entries used, topmost first; none with paging off.
    pub fn steps(&self) -> &[Step] {
        self.path.steps()
    }
}

const NO_STEP: Step = Step {
    table: Gpa::new(0),
    role: PageRole {
        level: 0,
        format: EntryFormat::None,
        nxe: false,
        pse: false,
        smm: false,
        guest_mode: false,
        wp: false,
        smep: false,
        smap: false,
    },
    index: 0,
    raw: 0,
};

/// Lost races against other writers of the tables before A and D are given up: guests can provoke
/// no more than a few, by entries that are walked twice.
const RETRIES: usize = 64;

/// Translates `gva` for `access`, setting A and D bits.
///
/// # Errors
/// #PF with the code of "Page-Fault Exceptions" and `gva` for CR2.
#[inline]
pub fn walk<T: Tables>(tables: &mut T, regime: &Regime, gva: Gva, access: Access, view: &View) -> Result<Walk, Fault> {
    let mut path = Path::EMPTY;
    let reached = walk_below(tables, regime, Rights::ALL, gva, access, view, &mut path)?;
    Ok(Walk::of(path, reached))
}

/// As [`walk`], for a `regime` that names a table on the way, with the rights of the entries above it.
/// The entries used go to `path`.
///
/// # Errors
/// As [`walk`].
#[inline(always)]
pub(crate) fn walk_below<T: Tables>(
    tables: &mut T,
    regime: &Regime,
    above: Rights,
    gva: Gva,
    access: Access,
    view: &View,
    path: &mut Path,
) -> Result<Reached, Fault> {
    let mut tries = 0;
    loop {
        let mut reached = look_below(tables, regime, above, gva, access, view, path)?;
        if tries == RETRIES || set_accessed_dirty(tables, path, &mut reached, access) {
            if cfg!(umbra_mutant = "flags-set-before-rights-are-checked") {
                rights::check(reached.rights, access, view).map_err(|code| Fault::page(gva.raw(), code))?;
            }
            return Ok(reached);
        }
        tries += 1;
    }
}

/// Translates `gva` for `access` and changes nothing.
///
/// # Errors
/// As [`walk`].
#[inline]
pub fn look<T: Tables>(tables: &mut T, regime: &Regime, gva: Gva, access: Access, view: &View) -> Result<Walk, Fault> {
    let mut path = Path::EMPTY;
    let reached = look_below(tables, regime, Rights::ALL, gva, access, view, &mut path)?;
    Ok(Walk::of(path, reached))
}

#[inline(always)]
fn look_below<T: Tables>(
    tables: &mut T,
    regime: &Regime,
    above: Rights,
    gva: Gva,
    access: Access,
    view: &View,
    path: &mut Path,
) -> Result<Reached, Fault> {
    path.count = 0;
    let mut table = match regime.top {
        Top::Direct => return Ok(direct(gva)),
        Top::Table(table) => table,
        Top::Pdptes(pdptes) => {
            let pdpte = pdptes[(gva.raw() >> 30 & 3) as usize];
            if pdpte & entry::P == 0 {
                return Err(Fault::page(gva.raw(), rights::attempt_code(access, view)));
            }
            Gpa::new(pdpte & 0x000f_ffff_ffff_f000)
        }
    };
    let mut role = regime.role;
    let mut above = above;
    loop {
        let mut step = Step { table, role, index: role.format.index(role.level, gva.raw()) as u16, raw: 0 };
        step.raw = tables.read(step.entry(), role.format.entry_bytes());
        path.push(step);
        match follow(step.raw, role, above, &regime.format, gva, access, view)? {
            Next::Table(next, rights) => (table, above, role) = (next, rights, role.child()),
            Next::Leaf(reached) => return Ok(reached),
        }
    }
}

/// Where an entry leads.
enum Next {
    /// To this table, with the rights of all entries so far.
    Table(Gpa, Rights),
    Leaf(Reached),
}

/// Reads `raw` as the entry for `gva` in a table with `role`, below entries with the rights `above`.
#[inline(always)]
fn follow(
    raw: u64,
    role: PageRole,
    above: Rights,
    format: &Format,
    gva: Gva,
    access: Access,
    view: &View,
) -> Result<Next, Fault> {
    let fault = |code| Fault::page(gva.raw(), code | rights::attempt_code(access, view));
    match format.decode(raw, role) {
        Decoded::NotPresent => Err(fault(0)),
        Decoded::Reserved => Err(fault(pfec::P | pfec::RSVD)),
        Decoded::Table { table, rights, .. } => Ok(Next::Table(table, above.and(rights))),
        Decoded::Leaf { base, rights: own, dirty, .. } => {
            let rights = above.and(own);
            if !cfg!(umbra_mutant = "flags-set-before-rights-are-checked") {
                rights::check(rights, access, view).map_err(|code| Fault::page(gva.raw(), code))?;
            }
            let gpa = base.add(gva.raw() & ((1 << role.format.shift(role.level)) - 1));
            Ok(Next::Leaf(Reached { gpa, rights, own, base, dirty, dirtied: false }))
        }
    }
}

/// The identity of paging off; linear addresses have 32 bits there.
fn direct(gva: Gva) -> Reached {
    let gpa = Gpa::new(gva.raw() & 0xffff_ffff);
    Reached { gpa, rights: Rights::ALL, own: Rights::ALL, base: gpa.page().base(), dirty: true, dirtied: false }
}

/// False if an entry changed under the walk.
fn set_accessed_dirty<T: Tables>(tables: &mut T, path: &mut Path, reached: &mut Reached, access: Access) -> bool {
    let last = path.count.wrapping_sub(1);
    path.steps[..path.count]
        .iter_mut()
        .enumerate()
        .all(|(level, step)| set_flags(tables, step, level == last && access.kind == AccessKind::Write, reached))
}

/// Sets A, and with `dirty` D, in one entry. False if it changed under the walk.
#[inline(always)]
fn set_flags<T: Tables>(tables: &mut T, step: &mut Step, dirty: bool, reached: &mut Reached) -> bool {
    let dirty = if dirty { entry::D } else { 0 };
    let new = step.raw | entry::A | dirty;
    if new == step.raw {
        return true;
    }
    match tables.exchange(step.entry(), step.role.format.entry_bytes(), step.raw, new) {
        Exchange::Done => {
            reached.dirtied |= (new ^ step.raw) & dirty != 0;
            reached.dirty |= dirty != 0;
            step.raw = new;
        }
        Exchange::Ignored => {}
        Exchange::Changed => return false,
    }
    true
}
