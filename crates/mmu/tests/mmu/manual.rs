//! What the manual says about one access to a linear address, from registers and memory alone.
//!
//! Written from the chapter "Paging" with constants of its own, without caches, and without anything from the
//! crates under test, so that agreement with them means something.

/// The forms of paging.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    Off,
    TwoLevel,
    Pae,
    FourLevel,
    FiveLevel,
}

/// What CPUID says about paging.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cpuid {
    pub maxphyaddr: u32,
    pub gib_pages: bool,
    pub pse36: bool,
    pub amd: bool,
}

/// Everything in a processor that an access's outcome depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Machine {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub pdpte: [u64; 4],
    pub pkru: u32,
    pub pkrs: u32,
    pub ac: bool,
    pub cpuid: Cpuid,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Read,
    Write,
    Fetch,
}

/// One access. A user-mode access is never implicit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attempt {
    pub kind: Kind,
    pub user: bool,
    pub implicit: bool,
}

/// Physical memory as table entries see it.
pub trait Memory {
    /// The entry of 4 or 8 bytes at `gpa`.
    fn entry(&self, gpa: u64, bytes: u64) -> u64;
}

/// A table entry that a walk read, as it is afterwards.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Used {
    pub gpa: u64,
    pub bytes: u64,
    pub value: u64,
}

/// A translation as a TLB may keep it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// log2 of the page's size.
    pub shift: u32,
    pub frame: u64,
    pub writable: bool,
    pub user: bool,
    pub executable: bool,
    pub key: u32,
    pub global: bool,
}

/// The outcome of an access: the physical address, or the error code of its #PF, whose CR2 is the linear address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verdict {
    pub outcome: Result<u64, u32>,
    entries: [Used; 5],
    count: usize,
    /// What was found, rights aside, if the walk came to its end.
    pub mapping: Option<Mapping>,
}

impl Verdict {
    /// The entries read, topmost first.
    pub fn used(&self) -> &[Used] {
        &self.entries[..self.count]
    }
}

const fn on(register: u64, bit: u32) -> bool {
    register >> bit & 1 == 1
}

/// Ones in bits `high` down to `low`; nothing if there are none.
const fn ones(high: u32, low: u32) -> u64 {
    let mut bits = 0;
    let mut at = low;
    while at <= high {
        bits |= 1 << at;
        at += 1;
    }
    bits
}

impl Machine {
    /// "Four Paging Modes": CR0.PG (31), CR4.PAE (5), EFER.LMA (10), CR4.LA57 (12).
    pub const fn form(&self) -> Form {
        match (on(self.cr0, 31), on(self.cr4, 5), on(self.efer, 10), on(self.cr4, 12)) {
            (false, ..) => Form::Off,
            (true, false, ..) => Form::TwoLevel,
            (true, true, false, _) => Form::Pae,
            (true, true, true, false) => Form::FourLevel,
            (true, true, true, true) => Form::FiveLevel,
        }
    }

    pub const fn is_long(&self) -> bool {
        matches!(self.form(), Form::FourLevel | Form::FiveLevel)
    }

    /// Execute-disable exists: EFER.NXE (11), but not with 4-byte entries.
    const fn has_xd(&self) -> bool {
        on(self.efer, 11) && !matches!(self.form(), Form::TwoLevel)
    }

    const fn wp(&self) -> bool {
        on(self.cr0, 16)
    }
    const fn smep(&self) -> bool {
        on(self.cr4, 20)
    }
    const fn smap(&self) -> bool {
        on(self.cr4, 21)
    }
}

/// One level of a form's tables: the lowest linear-address bit of its index, and what an entry with PS (bit 7) set is.
#[derive(Clone, Copy)]
struct Level {
    shift: u32,
    ps: Ps,
}

#[derive(Clone, Copy, PartialEq)]
enum Ps {
    /// It maps a page: there is no lower level.
    Last,
    /// It maps a large page.
    Page,
    /// It is ignored.
    Ignored,
    /// It is reserved.
    Reserved,
}

const fn level(shift: u32, ps: Ps) -> Level {
    Level { shift, ps }
}

const LONG: [Level; 5] =
    [level(48, Ps::Reserved), level(39, Ps::Reserved), level(30, Ps::Page), level(21, Ps::Page), level(12, Ps::Last)];
const LONG_WITHOUT_GIB: [Level; 5] = [LONG[0], LONG[1], level(30, Ps::Reserved), LONG[3], LONG[4]];
const PAE: [Level; 2] = [level(21, Ps::Page), level(12, Ps::Last)];
const TWO: [Level; 2] = [level(22, Ps::Ignored), level(12, Ps::Last)];
const TWO_WITH_PSE: [Level; 2] = [level(22, Ps::Page), level(12, Ps::Last)];

fn levels(m: &Machine) -> &'static [Level] {
    let long = if m.cpuid.gib_pages { &LONG } else { &LONG_WITHOUT_GIB };
    match m.form() {
        Form::Off => &[],
        Form::TwoLevel if on(m.cr4, 4) => &TWO_WITH_PSE,
        Form::TwoLevel => &TWO,
        Form::Pae => &PAE,
        Form::FourLevel => &long[1..],
        Form::FiveLevel => long,
    }
}

/// The reserved bits of a present entry, by the tables of formats.
fn reserved(m: &Machine, level: Level, is_page: bool) -> u64 {
    let maxphyaddr = m.cpuid.maxphyaddr;
    let large = is_page && level.shift > 12;
    if m.form() == Form::TwoLevel {
        return match (large, m.cpuid.pse36) {
            (false, _) => 0,
            (true, false) => ones(21, 13),
            (true, true) => ones(21, maxphyaddr.min(40) - 19),
        };
    }
    let mut bits = ones(51, maxphyaddr);
    if m.form() == Form::Pae {
        bits |= ones(62, 52);
    }
    if !m.has_xd() {
        bits |= 1 << 63;
    }
    if large {
        bits |= ones(level.shift - 1, 13);
    }
    if level.ps == Ps::Reserved {
        bits |= 1 << 7;
    }
    if m.cpuid.amd && level.shift >= 39 {
        bits |= 1 << 8;
    }
    bits
}

/// The first byte of the page that `entry` maps.
fn frame(m: &Machine, level: Level, entry: u64) -> u64 {
    if m.form() == Form::TwoLevel {
        let low = entry & 0xffff_ffff & !ones(level.shift - 1, 0);
        let high = if level.shift == 22 && m.cpuid.pse36 { entry >> 13 & 0xff } else { 0 };
        return high << 32 | low;
    }
    entry & ones(51, level.shift)
}

/// "Determination of Access Rights", paragraph by paragraph; protection keys aside.
pub fn permits(m: &Machine, map: &Mapping, attempt: Attempt) -> bool {
    if attempt.user {
        return map.user
            && match attempt.kind {
                Kind::Read => true,
                Kind::Write => map.writable,
                Kind::Fetch => map.executable,
            };
    }
    // Data accesses to user pages, while CR4.SMAP is set: only explicit ones, and only with EFLAGS.AC set.
    let open = !map.user || !m.smap() || m.ac && !attempt.implicit;
    match attempt.kind {
        Kind::Read => open,
        Kind::Write => open && (map.writable || !m.wp()),
        Kind::Fetch => map.executable && !(map.user && m.smep()),
    }
}

/// "Protection Keys": CR4.PKE (22) with PKRU for user pages, CR4.PKS (24) with IA32_PKRS for supervisor pages.
pub fn key_forbids(m: &Machine, map: &Mapping, attempt: Attempt) -> bool {
    let (enabled, rights) = if map.user { (on(m.cr4, 22), m.pkru) } else { (on(m.cr4, 24), m.pkrs) };
    if !enabled || !m.is_long() || attempt.kind == Kind::Fetch {
        return false;
    }
    let access_disable = rights >> (2 * map.key) & 1 == 1;
    let write_disable = rights >> (2 * map.key + 1) & 1 == 1;
    access_disable || attempt.kind == Kind::Write && write_disable && (attempt.user || m.wp())
}

/// "Page-Fault Exceptions": the bits that tell of the access itself, W/R (1), U/S (2) and I/D (4).
pub fn attempt_bits(m: &Machine, attempt: Attempt) -> u32 {
    let write = u32::from(attempt.kind == Kind::Write);
    let fetch = u32::from(attempt.kind == Kind::Fetch && (m.smep() || m.has_xd()));
    write << 1 | u32::from(attempt.user) << 2 | fetch << 4
}

/// The error code of an access to a translated page, or nothing if it is allowed.
pub fn denial(m: &Machine, map: &Mapping, attempt: Attempt) -> Option<u32> {
    let key = key_forbids(m, map, attempt);
    if !key && permits(m, map, attempt) {
        return None;
    }
    Some(1 | attempt_bits(m, attempt) | u32::from(key) << 5)
}

/// One access, walked afresh. With paging off linear addresses are physical; `linear` has 32 bits outside 4- and
/// 5-level paging.
pub fn access<M: Memory>(m: &Machine, memory: &M, linear: u64, attempt: Attempt) -> Verdict {
    let mut v = Verdict { outcome: Ok(linear & 0xffff_ffff), entries: Default::default(), count: 0, mapping: None };
    let fault = |bits: u32| Err(bits | attempt_bits(m, attempt));
    let mut table = match m.form() {
        Form::Off => return v,
        Form::TwoLevel => m.cr3 & ones(31, 12),
        Form::Pae => {
            let pdpte = m.pdpte[(linear >> 30 & 3) as usize];
            if pdpte & 1 == 0 {
                v.outcome = fault(0);
                return v;
            }
            pdpte & ones(51, 12)
        }
        Form::FourLevel | Form::FiveLevel => m.cr3 & ones(51, 12),
    };
    let (bytes, index_bits) = if m.form() == Form::TwoLevel { (4, 10) } else { (8, 9) };
    let mut map = Mapping { shift: 12, frame: 0, writable: true, user: true, executable: true, key: 0, global: false };
    for &level in levels(m) {
        let gpa = table + (linear >> level.shift & ((1 << index_bits) - 1)) * bytes;
        let entry = memory.entry(gpa, bytes);
        v.entries[v.count] = Used { gpa, bytes, value: entry };
        v.count += 1;
        if entry & 1 == 0 {
            v.outcome = fault(0);
            return v;
        }
        let is_page = level.ps == Ps::Last || level.ps == Ps::Page && on(entry, 7);
        if entry & reserved(m, level, is_page) != 0 {
            v.outcome = fault(1 | 8);
            return v;
        }
        map.writable &= on(entry, 1);
        map.user &= on(entry, 2);
        map.executable &= !(m.has_xd() && on(entry, 63));
        if is_page {
            map.shift = level.shift;
            map.frame = frame(m, level, entry);
            map.key = if m.is_long() { (entry >> 59 & 15) as u32 } else { 0 };
            map.global = on(entry, 8) && on(m.cr4, 7);
            break;
        }
        table = if bytes == 4 { entry & ones(31, 12) } else { entry & ones(51, 12) };
    }
    v.mapping = Some(map);
    v.outcome = match denial(m, &map, attempt) {
        Some(code) => Err(code),
        None => Ok(map.frame + linear % (1 << map.shift)),
    };
    if v.outcome.is_ok() {
        mark(&mut v, attempt.kind == Kind::Write);
    }
    v
}

/// "Accessed and Dirty Flags": A (5) in every entry used, D (6) in the last for a write. One entry may serve at two
/// levels.
fn mark(v: &mut Verdict, write: bool) {
    let Some(last) = v.used().last().copied() else { return };
    for used in &mut v.entries[..v.count] {
        let dirty = u64::from(write && used.gpa == last.gpa) << 6;
        used.value |= 1 << 5 | dirty;
    }
}
