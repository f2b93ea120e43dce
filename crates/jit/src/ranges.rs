//! Range registers: runs of linear addresses that lie in neighbouring RAM, one for each register that addresses are
//! made with. Most accesses are found in one with four instructions, none of them on the way of the address.
//!
//! A range holds only what the MMU's fast table has said for the table in force, and is forgotten as soon as that
//! may say less ([`Mmu::withdrawals`]). What misses is looked up in the table by the range's [stub](crate::stubs).

use crate::emitter::Mem;
use crate::frame::{Frame, Table, frame_field, table_of};
use crate::memory_path::Access;
use crate::registers::guest;
use crate::translate::of_site;
use hashbrown::HashMap;
use std::mem::offset_of;
use umbra_arch::Gva;
use umbra_cpu::op::CODE_BASE;
use umbra_mmu::Mmu;

/// A run of linear addresses.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Range {
    /// Its first linear address.
    pub first: u64,
    /// Bytes of it that an access may begin in.
    pub limit: u64,
    /// What to add to a linear address to get its host address.
    pub addend: u64,
    /// Misses until the engine is asked for a longer run.
    pub patience: u32,
    /// Not zero: misses leave the range alone.
    pub fixed: u32,
}

/// Bytes at a range's end where no access of any size may begin, and no [group](crate::groups) of them.
pub const MARGIN: u64 = 128;
/// Misses between two looks for a longer run.
pub const PATIENCE: u32 = 64;
/// Likewise at most.
const MOST_PATIENCE: u32 = 8192;
/// Instructions a miss between two looks, above which the next one comes as soon as it can.
const SELDOM: u64 = 1024;
/// Instructions from one miss of a site to the next, when its range is missed too often. Going through memory misses
/// [`MARGIN`] times a page in a row, which is still better than a lookup each time.
const OFTEN: u64 = 128;
/// Pages of a run in each direction.
const LONGEST: u64 = 1024;
/// From so many pages on, a run is kept however much is missed.
const FIXED_PAGES: u64 = 4;

pub const EMPTY: Range = Range { first: 0, limit: 0, addend: 0, patience: PATIENCE, fixed: 0 };

/// Number of a range's register: a general one, [`CODE_BASE`] for RIP-relative addresses, one of those below.
pub type Name = u8;
/// Addresses without a register.
pub const ABSOLUTE: Name = 16;
const _: () = assert!(CODE_BASE == 17);
/// Addresses in FS or GS without a general register.
pub const SEGMENT: Name = 18;
/// Ranges for each kind of access.
pub const NAMES: usize = 19;

/// The ranges, those of reads first. The stack's are elsewhere.
pub type Ranges = [[Range; NAMES]; 2];

/// All of them empty.
pub const NONE: Ranges = [[EMPTY; NAMES]; 2];

/// Where a field of a range is.
pub fn field(name: Name, access: Access, offset: usize) -> Mem {
    let write = usize::from(access == Access::Write);
    let (start, index) = match name {
        guest::RSP => (frame_field!(stack), write),
        _ => (frame_field!(ranges), NAMES * write + usize::from(name)),
    };
    Mem { disp: start.disp + (index * size_of::<Range>() + offset) as i32, ..start }
}

/// Which ranges aren't empty, by bits.
pub fn used(access: Access) -> Mem {
    let start = frame_field!(used_ranges);
    Mem { disp: start.disp + 4 * i32::from(access == Access::Write), ..start }
}

/// First linear address.
pub fn first(name: Name, access: Access) -> Mem {
    field(name, access, offset_of!(Range, first))
}

/// Bytes.
pub fn limit(name: Name, access: Access) -> Mem {
    field(name, access, offset_of!(Range, limit))
}

/// From linear to host.
pub fn addend(name: Name, access: Access) -> Mem {
    field(name, access, offset_of!(Range, addend))
}

/// The stack's ranges, those of reads first.
pub type StackRanges = [Range; 2];

/// Ranges of tables that aren't in force, for when they are again: the stack's, the only ones that copying is worth it
/// for.
pub struct Saved {
    tables: Vec<(Table, StackRanges)>,
    next: usize,
    withdrawals: u64,
}

const TABLES: usize = 8;

impl Saved {
    pub fn new() -> Self {
        Self { tables: Vec::with_capacity(TABLES), next: 0, withdrawals: u64::MAX }
    }

    /// After anything that may have selected another table or withdrawn translations.
    #[inline]
    pub fn follow(&mut self, frame: &mut Frame, mmu: &Mmu) {
        let table = table_of(mmu);
        if self.withdrawals != mmu.withdrawals() {
            self.withdrawals = mmu.withdrawals();
            self.tables.clear();
            frame.forget_ranges();
        } else if table == frame.table() {
            return;
        } else {
            self.exchange(frame, table);
        }
        frame.take_table(table);
        frame.withdrawals = self.withdrawals;
    }

    /// Keeps the stack's ranges of the table that was in force and finds those of `table`.
    fn exchange(&mut self, frame: &mut Frame, table: Table) {
        let old = frame.stack;
        frame.forget_ranges();
        if let Some((_, known)) = self.tables.iter().find(|(known, _)| *known == table) {
            frame.take_stack_ranges(*known);
        }
        let table = frame.table();
        match self.tables.iter().position(|(known, _)| *known == table) {
            Some(at) => self.tables[at].1 = old,
            None if self.tables.len() < TABLES => self.tables.push((table, old)),
            None => {
                self.next = (self.next + 1) % TABLES;
                self.tables[self.next] = (table, old);
            }
        }
    }
}

impl Frame {
    /// Empties the ranges.
    #[inline]
    pub fn forget_ranges(&mut self) {
        self.stack = [EMPTY; 2];
        for (ranges, used) in self.ranges.iter_mut().zip(&mut self.used_ranges) {
            while *used != 0 {
                ranges[used.trailing_zeros() as usize] = EMPTY;
                *used &= *used - 1;
            }
        }
    }

    /// The stack's ranges are these again.
    #[inline]
    pub fn take_stack_ranges(&mut self, ranges: StackRanges) {
        self.stack = ranges;
        self.used_ranges.iter_mut().for_each(|used| *used |= 1 << guest::RSP);
    }

    fn range(&mut self, name: usize, write: bool) -> &mut Range {
        match name as u8 {
            guest::RSP => &mut self.stack[usize::from(write)],
            _ => &mut self.ranges[usize::from(write)][name],
        }
    }
}

/// Counters of misses; a power of two. Each belongs to the sites whose numbers agree so far.
pub const COUNTERS: usize = 1 << 10;
/// Misses of a site until the engine looks how often they come.
pub const STRIKES: u32 = 128;
/// No site.
pub const NO_SITE: u32 = u32::MAX;

const fn counter_of(site: u32) -> usize {
    site.wrapping_mul(0x9e37_79b1) as usize >> 20 & (COUNTERS - 1)
}

/// Where the misses of a site are counted down.
pub fn counter(site: u32) -> Mem {
    let start = frame_field!(strikes);
    Mem { disp: start.disp + 4 * counter_of(site) as i32, ..start }
}

/// What is known of accesses that miss their ranges.
pub struct Misses {
    /// By counter: when it was last down, and what it began with then.
    struck: Box<[(u64, u32)]>,
    /// When each range was last missed [`PATIENCE`] times.
    last: [[u64; NAMES]; 2],
    /// Misses of each range until the next look: more each time that there was no long run or that it didn't help.
    patience: [[u32; NAMES]; 2],
    /// By block number: operations, by bits, that are better looked up in the table.
    operations: HashMap<u32, u64>,
    /// By block number: how often a group missed, and since when.
    rests: HashMap<u32, (u32, u64)>,
    /// By block number: base registers, by bits, that groups are no good for.
    alone: HashMap<u32, u32>,
    /// Blocks to be translated again.
    again: Vec<u32>,
}

/// Misses of a block's groups until it is given up, if they come so many instructions apart or less.
const GROUP_MISSES: u32 = 32;
const GROUP_INTERVAL: u64 = 1 << 12;

impl Misses {
    pub fn new() -> Self {
        Self {
            struck: vec![(0, STRIKES); COUNTERS].into_boxed_slice(),
            last: [[0; NAMES]; 2],
            patience: [[PATIENCE; NAMES]; 2],
            operations: HashMap::new(),
            rests: HashMap::new(),
            alone: HashMap::new(),
            again: Vec::new(),
        }
    }

    /// All code was emptied.
    pub fn forget_code(&mut self) {
        self.again.clear();
    }

    /// A block was dropped.
    pub fn forget_block(&mut self, number: u32) {
        self.operations.remove(&number);
        self.rests.remove(&number);
        self.alone.remove(&number);
    }

    /// An access by one of these base registers, by bits, has missed for its group, or inside of another's. True if the
    /// block is given up as it is.
    pub fn rest(&mut self, number: u32, bases: u32, now: u64) -> bool {
        let (count, since) = self.rests.entry(number).or_insert((0, now));
        *count += 1;
        if *count < GROUP_MISSES {
            return false;
        }
        let often = now.wrapping_sub(*since) < GROUP_INTERVAL * u64::from(*count);
        (*count, *since) = (0, now);
        let old = self.alone(number);
        if !often || old == u32::MAX {
            return false;
        }
        // Those already given up have missed inside of others' groups.
        let new = if old & bases == bases { u32::MAX } else { old | bases };
        self.alone.insert(number, new);
        self.again.push(number);
        true
    }

    /// A block's base registers, by bits, whose accesses are checked each by itself.
    pub fn alone(&self, number: u32) -> u32 {
        self.alone.get(&number).copied().unwrap_or(0)
    }

    /// The operations of a block that ranges are no good for, by bits.
    pub fn operations(&self, number: u32) -> u64 {
        self.operations.get(&number).copied().unwrap_or(0)
    }

    /// A block is to be translated again.
    pub fn translate_again(&mut self, number: u32) {
        self.again.push(number);
    }

    /// Blocks that are to be translated again.
    pub fn take_again(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.again)
    }

    /// If a range was missed [`PATIENCE`] times it gets the longest run around the last miss; a site that misses all the
    /// time is no good for ranges.
    #[inline]
    pub fn look(&mut self, frame: &mut Frame, mmu: &Mmu) {
        if let Some(number) = std::mem::take(&mut frame.missed).checked_sub(1) {
            self.widen(frame, mmu, (number as usize % NAMES, number as usize / NAMES != 0));
        }
        let site = std::mem::replace(&mut frame.struck, NO_SITE);
        if site != NO_SITE {
            self.strike(frame, site);
        }
    }

    fn widen(&mut self, frame: &mut Frame, mmu: &Mmu, (name, write): (usize, bool)) {
        let (ram, now) = (frame.ram, frame.now());
        let gva = Gva::new(frame.missed_gva);
        let range = frame.range(name, write);
        let since = now.wrapping_sub(std::mem::replace(&mut self.last[usize::from(write)][name], now));
        let (Some((first, pages)), Some(offset)) = (
            mmu.run_around(gva, write, LONGEST),
            if write { mmu.lookup_write(gva, 1) } else { mmu.lookup_read(gva, 1) },
        ) else {
            return;
        };
        let (first, pages) = below_4_gib(first.raw(), pages, gva.raw());
        let long = pages >= FIXED_PAGES;
        let patience = &mut self.patience[usize::from(write)][name];
        let worth_it = long && since > SELDOM * u64::from(*patience);
        *patience = if worth_it { PATIENCE } else { (*patience * 4).min(MOST_PATIENCE) };
        *range = Range {
            first,
            limit: (pages << 12) - MARGIN,
            addend: ram.wrapping_add(offset.raw()).wrapping_sub(gva.raw()),
            patience: *patience,
            fixed: long.into(),
        };
    }

    /// A site's counter is down: if its misses came [`OFTEN`] it is given up, else its next look comes later.
    /// A site whose counter is down begins anew.
    pub fn forgive(&mut self, frame: &mut Frame, site: u32) {
        let counter = counter_of(site);
        (self.struck[counter], frame.strikes[counter]) = ((frame.now(), STRIKES), STRIKES);
        frame.struck = NO_SITE;
    }

    fn strike(&mut self, frame: &mut Frame, site: u32) {
        let (counter, now) = (counter_of(site), frame.now());
        let (then, misses) = self.struck[counter];
        let often = now.wrapping_sub(then) < OFTEN * u64::from(misses);
        let next = if often { STRIKES } else { (misses * 4).min(MOST_PATIENCE) };
        (self.struck[counter], frame.strikes[counter]) = ((now, next), next);
        if often {
            self.give_up(site);
        }
    }

    /// Neither ranges nor windows are any good for a site.
    pub fn give_up(&mut self, site: u32) {
        let (number, op) = of_site(site);
        *self.operations.entry(number).or_default() |= 1 << op;
        self.again.push(number);
    }
}

/// The part of a run that is on the same side of 4 GiB as `gva`: 32-bit addresses wrap there.
fn below_4_gib(first: u64, pages: u64, gva: u64) -> (u64, u64) {
    const EDGE: u64 = 1 << 32;
    let end = first.wrapping_add(pages << 12);
    match (first < EDGE && end > EDGE, gva < EDGE) {
        (false, _) => (first, pages),
        (true, true) => (first, (EDGE - first) >> 12),
        (true, false) => (EDGE, (end - EDGE) >> 12),
    }
}
