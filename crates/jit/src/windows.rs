//! Windows: where a program has run for long, the host's MMU translates for it. Regions of 4 GiB of its address space have
//! reserved addresses of the host's each, at which the pages that it has accessed are mapped once more. An access compares
//! the upper half of its address and adds what leads to the window; for a page that isn't there the host raises a fault,
//! from which it goes on in its operation's slow path.
//!
//! What is mapped is what the MMU's table of the user's accesses has; what is withdrawn from that is unmapped before
//! generated code runs again.

mod faults;
mod known;

pub use faults::{Fault, Faults, Running};
pub use known::{Known, is_of_use};

use crate::emitter::Mem;
use crate::frame::{Frame, NEAR_REGIONS, frame_field};
use faults::Hit;
use hashbrown::HashMap;
use smallvec::SmallVec;
use std::mem::offset_of;
use std::sync::Arc;
use umbra_arch::Gva;
use umbra_cpu::Core;
use umbra_cpu::core::{CODE_VARIANT, CodeSize};
use umbra_cpu::op::{CODE_BASE, NO_REG};
use umbra_memory::{GuestMemory, Window};
use umbra_mmu::{Mmu, UserPage};

/// Regions of an address space that have windows at most.
pub const REGIONS: usize = 8;

/// A region as generated code sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Region {
    /// The upper half of its addresses.
    id: u64,
    /// What to add to one to get the host's.
    addend: u64,
}

/// No region: no canonical address is in it, and what isn't is no address of the host's, either.
pub const NOWHERE: Region = Region { id: 0x8000_0000, addend: 0 };

fn field(region: u8, offset: usize) -> Mem {
    let region = usize::from(region) % REGIONS;
    let (start, index) = match region.checked_sub(NEAR_REGIONS) {
        None => (frame_field!(regions), region),
        Some(far) => (frame_field!(far_regions), far),
    };
    Mem { disp: start.disp + (index * size_of::<Region>() + offset) as i32, ..start }
}

/// The upper half of a region's addresses, 32 bits.
pub fn id(region: u8) -> Mem {
    field(region, offset_of!(Region, id))
}

/// What to add to them.
pub fn addend(region: u8) -> Mem {
    field(region, offset_of!(Region, addend))
}

/// Bytes of a region.
const REGION: usize = 1 << 32;
/// Around a window: further than displacements reach, and what registers change by without another look.
const MARGIN: usize = 1 << 32;
/// Most pages mapped, each of which may part a mapping in three: the host has 65,530 for a process by default.
const MOST_PAGES: usize = 28_000;
/// Most address spaces with windows.
const MOST_SPACES: usize = 4;

/// No number: what is in force has to be found out.
const NO_SPACE: u8 = u8::MAX;

/// Pages that have to be known for it to be of any use.
const FEWEST_PAGES: usize = 6;

/// Pages mapped to either side of one that is accessed.
const MOST_AROUND: i64 = 32;

/// An address space's windows.
struct Space {
    regions: SmallVec<[(u32, Window); REGIONS]>,
    /// Pages that are mapped, and whether they may be written.
    mapped: HashMap<u64, bool>,
    /// Instructions when it got them, faults and withdrawals since.
    since: u64,
    events: u64,
}

impl Space {
    fn region_at(&self, number: usize) -> Region {
        let Some((id, window)) = self.regions.get(number) else { return NOWHERE };
        let id = u64::from(*id);
        Region { id, addend: (window.address() + MARGIN as u64).wrapping_sub(id << 32) }
    }

    fn region(&self, gva: u64) -> Option<u8> {
        self.regions.iter().position(|(id, _)| *id == (gva >> 32) as u32).map(|at| at as u8)
    }

    /// The guest's address of a host's in a window.
    fn gva(&self, address: u64) -> Option<u64> {
        self.regions.iter().find_map(|(id, window)| {
            let into = address.wrapping_sub(window.address() + MARGIN as u64);
            (into < REGION as u64).then_some(u64::from(*id) << 32 | into)
        })
    }

    /// Whether it is an address that an access may have, by a window or its margins. The host says 0 of what isn't canonical.
    fn covers(&self, address: u64) -> bool {
        let is_in = |window: &Window| address.wrapping_sub(window.address()) < window.bytes() as u64;
        address == 0 || self.regions.iter().any(|(_, window)| is_in(window))
    }

    /// The pages around one that can be mapped with it and aren't yet.
    fn unmapped_run(&self, mmu: &Mmu, page: UserPage) -> (UserPage, u64) {
        let follows = |by: i64| {
            let gva = page.gva.raw().wrapping_add_signed(by << 12);
            let next =
                mmu.user_page(Gva::new(gva)).filter(|_| self.mapped.get(&gva).is_none_or(|&w| w != page.writable))?;
            let off = page.off.raw().wrapping_add_signed(by << 12);
            (next.writable == page.writable && next.off.raw() == off).then_some(next)
        };
        let before = (1..=MOST_AROUND).map_while(|n| follows(-n)).last();
        let after = (1..=MOST_AROUND).map_while(follows).count() as u64;
        let first = before.unwrap_or(page);
        (first, ((page.gva.raw() - first.gva.raw()) >> 12) + 1 + after)
    }

    fn map(&mut self, first: UserPage, pages: u64, writable: bool) {
        let gva = first.gva.raw();
        let Some((_, window)) = self.regions.iter_mut().find(|(id, _)| *id == (gva >> 32) as u32) else { return };
        let into = gva as u32 as usize;
        let pages = pages.min(((REGION - into) >> 12) as u64);
        self.events += 1;
        if window.map(MARGIN + into, first.off, (pages << 12) as usize, writable).is_err() {
            let _ = window.unmap(MARGIN + into, (pages << 12) as usize);
            return;
        }
        self.mapped.extend((0..pages).map(|n| (gva + (n << 12), writable)));
    }

    /// False if the host refuses. Those of `pages` that aren't mapped are ignored.
    fn unmap(&mut self, pages: &mut Vec<u64>) -> bool {
        pages.retain(|page| self.mapped.remove(page).is_some());
        pages.sort_unstable();
        let mut done = true;
        for run in pages.chunk_by(|page, next| page + 4096 == *next && next & 0xffff_ffff != 0) {
            self.events += 1;
            let Some((_, window)) = self.regions.iter_mut().find(|(id, _)| *id == (run[0] >> 32) as u32) else {
                continue;
            };
            done &= window.unmap(MARGIN + run[0] as u32 as usize, run.len() << 12).is_ok();
        }
        done
    }

    fn unmap_all(&mut self) -> bool {
        self.events += 1 + self.mapped.len() as u64 / 8;
        self.mapped.clear();
        self.regions.iter_mut().all(|(_, window)| window.unmap(0, window.bytes()).is_ok())
    }
}

/// Whether a region is in the lower half of 48-bit addresses.
fn is_of_users(id: u32) -> bool {
    id >> 15 == 0
}

/// Where the operands of a translation's operations probably are: regions, by site and by base register.
#[derive(Clone, Copy)]
pub struct Guess<'a> {
    /// See [`Windows`].
    sites: &'a HashMap<u32, (u8, u8)>,
    by_base: [u8; BASES],
}

const BASES: usize = CODE_BASE as usize + 1;

impl Guess<'_> {
    /// The region that the operand of the operation at `site` is looked for in.
    pub fn region(&self, site: u32, base: u8) -> u8 {
        let by_base = || self.by_base[if base == NO_REG { 0 } else { usize::from(base) % BASES }];
        self.sites.get(&site).map_or_else(by_base, |&(region, _)| region)
    }
}

/// What they were good for.
#[derive(Clone, Copy, Default)]
pub struct Counts {
    pub opened: u64,
    pub given_up: u64,
    pub maps: u64,
    pub unmaps: u64,
    pub faults: u64,
}

/// All windows.
pub struct Windows {
    pub counts: Counts,
    mem: Arc<GuestMemory>,
    /// By the number of the MMU's less one.
    spaces: Vec<Option<Space>>,
    /// The number in force.
    current: u8,
    /// How many there are.
    open: u32,
    withdrawals: u64,
    /// By root: instructions so far, and how many it is to have before all of its pages are mapped.
    heat: HashMap<usize, (u64, u64)>,
    /// By root: how much longer than others it waits for windows, a power of two.
    patience: HashMap<usize, u32>,
    /// By site: its region, and how often that was another one than was guessed.
    sites: HashMap<u32, (u8, u8)>,
    pub faults: Faults,
    /// Instructions of a program until it gets windows; `None`: never.
    after: Option<u64>,
    ran: u64,
}

/// Guesses for a site.
const GUESSES: u8 = 3;

/// Instructions that have to have run for each page that is to be mapped.
const PER_PAGE: u64 = 150_000;
/// Likewise for a page of code, which is translated anew.
const PER_PAGE_OF_CODE: u64 = 20 * PER_PAGE;
/// Instructions for each call of the host that are worth it.
const WORTH: u64 = 200_000;
/// Calls to begin with.
const BEGINNING: u64 = 1_000;

/// Whether generated code that uses windows may run, if there are any.
fn is_usable(core: &Core) -> bool {
    core.s.cpl == 3 && core.code_size == CodeSize::Bits64
}

/// What the code mode of the lower half is extended by.
#[inline]
pub fn variant(core: &Core) -> u64 {
    if core.mmu.window() != 0 && is_usable(core) && core.mmu.fast_table().is_some() { CODE_VARIANT } else { 0 }
}

impl Windows {
    pub fn new(mem: Arc<GuestMemory>, code: u64, after: Option<u64>) -> Self {
        Self {
            counts: Counts::default(),
            mem,
            spaces: (0..MOST_SPACES).map(|_| None).collect(),
            current: NO_SPACE,
            open: 0,
            withdrawals: 0,
            heat: HashMap::new(),
            patience: HashMap::new(),
            sites: HashMap::new(),
            faults: Faults::new(code),
            after,
            ran: 0,
        }
    }

    /// Before generated code goes on.
    #[inline]
    pub fn follow(&mut self, frame: &mut Frame, core: &mut Core) {
        if self.withdrawals != core.mmu.withdrawals() && self.open != 0 {
            if core.s.cpl == 3 {
                self.withdrawals = core.mmu.withdrawals();
                if !self.unmap_withdrawn(&mut core.mmu) {
                    frame.forget_all_views();
                    frame.leave_soon();
                }
            } else {
                // Nobody uses windows until the way back leads through here.
                frame.forget_user_views();
            }
        }
        // Without a table each access has to be looked at.
        let number = if core.mmu.fast_table().is_some() { core.mmu.window() } else { 0 };
        if number != self.current {
            self.select(frame, number);
        }
    }

    fn select(&mut self, frame: &mut Frame, number: u8) {
        self.current = number;
        let space = self.space();
        let region = |number| space.as_ref().map_or(NOWHERE, |space| space.region_at(number));
        frame.regions = std::array::from_fn(region);
        frame.far_regions = std::array::from_fn(|far| region(NEAR_REGIONS + far));
    }

    fn space(&mut self) -> Option<&mut Space> {
        self.spaces.get_mut(usize::from(self.current).checked_sub(1)?)?.as_mut()
    }

    /// False if an address space has lost its windows.
    #[cold]
    fn unmap_withdrawn(&mut self, mmu: &mut Mmu) -> bool {
        let (all, pages) = mmu.take_withdrawn();
        let open = self.open;
        for number in 1..=self.spaces.len() as u8 {
            let Some(space) = &mut self.spaces[usize::from(number) - 1] else { continue };
            let done = if all >> number & 1 != 0 {
                self.counts.unmaps += 1;
                space.unmap_all()
            } else {
                let own = pages.iter().filter(|(window, _)| *window == number);
                let mut own = own.map(|&(_, page)| page).collect();
                let done = space.unmap(&mut own);
                self.counts.unmaps += own.len() as u64;
                done
            };
            if !done || all >> number & 1 != 0 && !mmu.has_window(number) {
                self.give_up(mmu, number);
            }
        }
        open == self.open
    }

    fn give_up(&mut self, mmu: &mut Mmu, number: u8) {
        mmu.forget_window(number);
        self.spaces[usize::from(number) - 1] = None;
        self.open -= 1;
        self.current = NO_SPACE;
    }

    /// After an operation was done by its function, an access of which had no page.
    #[inline]
    pub fn look(&mut self, frame: &mut Frame, core: &mut Core) {
        if let Some(hit) = self.faults.take_hit() {
            self.map_hit(frame, core, hit);
        }
    }

    #[cold]
    fn map_hit(&mut self, frame: &mut Frame, core: &mut Core, hit: Hit) {
        debug_assert!(self.space().is_none_or(|space| space.covers(hit.address)), "{hit:x?} is in no window");
        if !is_usable(core) {
            return;
        }
        self.counts.faults += 1;
        let number = core.mmu.window();
        let mapped: usize = self.spaces.iter().flatten().map(|space| space.mapped.len()).sum();
        let Some(space) = self.space().filter(|_| number != 0) else { return };
        space.events += 1;
        let Some(gva) = space.gva(hit.address).map(Gva::new) else { return };
        if mapped > MOST_PAGES && !space.unmap_all() {
            self.give_up(&mut core.mmu, number);
            frame.forget_all_views();
            frame.leave_soon();
            return self.select(frame, 0);
        }
        let Some(page) = core.mmu.user_page(gva).filter(|page| page.writable || !hit.write) else { return };
        let (first, pages) = space.unmapped_run(&core.mmu, page);
        space.map(first, pages, page.writable);
        self.counts.maps += 1;
    }

    /// For tests: every program gets windows as soon as there is anything to map.
    pub fn are_tried_at_once(&self) -> bool {
        self.after == Some(0)
    }

    /// After so many instructions. True if what code is translated for has changed.
    #[inline]
    pub fn ran(&mut self, core: &mut Core, instructions: u64) -> bool {
        self.ran += instructions;
        let Some(after) = self.after else { return false };
        if core.s.cpl != 3 && after != 0 {
            return false;
        }
        let root = core.mmu.root();
        if core.mmu.window() != 0 {
            return self.is_worthless(core);
        }
        let (heat, worth) = self.heat.entry(root).or_default();
        *heat += instructions;
        let (heat, worth) = (*heat, *worth);
        let patience = self.patience.get(&root).copied().unwrap_or(0);
        heat > worth.max(after << patience) && is_usable(core) && self.open(core, heat)
    }

    fn is_worthless(&mut self, core: &mut Core) -> bool {
        let ran = self.ran;
        let number = core.mmu.window();
        let Some(Some(space)) = self.spaces.get(usize::from(number) - 1) else { return false };
        if space.events < BEGINNING + (ran - space.since) / WORTH || self.after == Some(0) {
            return false;
        }
        self.counts.given_up += 1;
        self.give_up(&mut core.mmu, number);
        let patience = self.patience.entry(core.mmu.root()).or_insert(0);
        *patience = (*patience + 2).min(20);
        true
    }

    /// Gives the address space in force windows.
    #[cold]
    fn open(&mut self, core: &mut Core, ran: u64) -> bool {
        let number = match self.spaces.iter().position(Option::is_none) {
            Some(free) => free as u8 + 1,
            None => return false,
        };
        if !faults::install() || !core.mmu.number_window(number) {
            return false;
        }
        // What was withdrawn before concerns the others.
        let has_lost = !self.unmap_withdrawn(&mut core.mmu);
        let pages = core.mmu.user_pages();
        let code = pages.iter().filter(|page| page.executable).count();
        let worth = pages.len() as u64 * PER_PAGE + code as u64 * PER_PAGE_OF_CODE;
        if pages.len() < FEWEST_PAGES || ran < worth && self.after != Some(0) {
            core.mmu.forget_window(number);
            self.heat.insert(core.mmu.root(), (ran, worth));
            return has_lost;
        }
        self.heat.insert(core.mmu.root(), (0, 0));
        let mut by_region: HashMap<u32, usize> = HashMap::new();
        pages.iter().for_each(|page| *by_region.entry((page.gva.raw() >> 32) as u32).or_default() += 1);
        let mut ids: Vec<(u32, usize)> = by_region.into_iter().filter(|(id, _)| is_of_users(*id)).collect();
        ids.sort_by_key(|&(id, count)| (std::cmp::Reverse(count), id));
        let mut space = Space { regions: SmallVec::new(), mapped: HashMap::new(), since: self.ran, events: 0 };
        for (id, _) in ids.into_iter().take(REGIONS) {
            let Some(window) = self.mem.window(REGION + 2 * MARGIN) else { break };
            space.regions.push((id, window));
        }
        let mut pages = pages;
        pages.sort_by_key(|page| page.gva.raw());
        pages.truncate(MOST_PAGES / MOST_SPACES);
        let follows = |page: &UserPage, next: &UserPage| {
            let by = next.gva.raw().wrapping_sub(page.gva.raw());
            by == 4096 && next.off.raw() == page.off.raw() + by && next.writable == page.writable
        };
        for run in pages.chunk_by(follows) {
            space.map(run[0], run.len() as u64, run[0].writable);
            self.counts.maps += 1;
        }
        self.spaces[usize::from(number) - 1] = Some(space);
        self.counts.opened += 1;
        self.open += 1;
        self.current = NO_SPACE;
        true
    }

    /// An access of `site` isn't where it was guessed, at `gva` for instance. False if another guess is no better.
    pub fn learn(&mut self, site: u32, gva: u64) -> bool {
        let Some(region) = self.region_of(gva) else { return false };
        let (known, times) = self.sites.entry(site).or_insert((region, 0));
        *known = region;
        *times += 1;
        *times <= GUESSES
    }

    /// An address's region, which gets a window if there is room.
    fn region_of(&mut self, gva: u64) -> Option<u8> {
        let mem = Arc::clone(&self.mem);
        let space = self.space()?;
        let id = (gva >> 32) as u32;
        if let Some(known) = space.region(gva) {
            return Some(known);
        }
        if space.regions.len() == REGIONS || !is_of_users(id) {
            return None;
        }
        space.regions.push((id, mem.window(REGION + 2 * MARGIN)?));
        let added = space.regions.len() as u8 - 1;
        self.current = NO_SPACE;
        Some(added)
    }

    /// What is known of where operands are; `None` if the address space has no windows.
    pub fn guess(&self, core: &Core) -> Option<Guess<'_>> {
        let number = core.mmu.window();
        let space = self.spaces.get(usize::from(number).checked_sub(1)?)?.as_ref()?;
        let mut by_base = [0; BASES];
        for (region, value) in by_base.iter_mut().zip(core.gpr) {
            *region = space.region(value).unwrap_or(0);
        }
        Some(Guess { sites: &self.sites, by_base })
    }

    /// All code was emptied.
    pub fn forget_code(&mut self) {
        self.faults.clear();
        self.sites.clear();
    }
}
