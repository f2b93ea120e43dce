//! The guest-physical map: which pages are RAM, ROM or nothing.

use crate::{Backing, RamOffset};
use umbra_arch::{Gpa, GpaPage};

/// First page of the legacy video hole.
pub const HOLE_START: Gpa = Gpa::new(0xa_0000);
/// End of the legacy video hole.
pub const HOLE_END: Gpa = Gpa::new(0xc_0000);
/// RAM below 4 GiB ends here at the latest; the rest starts at 4 GiB.
pub const LOW_RAM_END: Gpa = Gpa::new(0xc000_0000);
const HIGH_RAM_START: u64 = 1 << 32;

/// A run of pages with consecutive offsets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Region {
    pub start: u64,
    pub pages: u64,
    pub offset: u64,
    pub rom: bool,
}

impl Region {
    fn end(&self) -> u64 {
        self.start + self.pages
    }
    fn backing(&self, page: u64) -> Backing {
        let off = RamOffset::new(self.offset + ((page - self.start) << 12));
        if self.rom { Backing::Rom(off) } else { Backing::Ram(off) }
    }
    /// The part of this region inside `[start, end)`.
    fn cut(&self, start: u64, end: u64) -> Option<Region> {
        let (from, to) = (self.start.max(start), self.end().min(end));
        (from < to).then(|| Region {
            start: from,
            pages: to - from,
            offset: self.offset + ((from - self.start) << 12),
            rom: self.rom,
        })
    }
}

/// The part of the map that never changes its arithmetic: RAM as it was at power-on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlainRam {
    low_pages: u64,
    high_pages: u64,
}

impl PlainRam {
    pub(crate) fn new(ram_bytes: u64) -> Self {
        let low = ram_bytes.min(LOW_RAM_END.raw());
        Self { low_pages: low >> 12, high_pages: (ram_bytes - low) >> 12 }
    }

    #[inline(always)]
    pub(crate) fn map(&self, page: u64) -> Option<RamOffset> {
        if page < self.low_pages {
            let hole = HOLE_START.raw() >> 12..HOLE_END.raw() >> 12;
            return (!hole.contains(&page)).then(|| RamOffset::new(page << 12));
        }
        let high = page.wrapping_sub(HIGH_RAM_START >> 12);
        (high < self.high_pages).then(|| RamOffset::new((self.low_pages + high) << 12))
    }

    fn regions(&self) -> Vec<Region> {
        let (hole_start, hole_end) = (HOLE_START.raw() >> 12, HOLE_END.raw() >> 12);
        let whole = Region { start: 0, pages: self.low_pages, offset: 0, rom: false };
        let high =
            Region { start: HIGH_RAM_START >> 12, pages: self.high_pages, offset: self.low_pages << 12, rom: false };
        let low = [whole.cut(0, hole_start), whole.cut(hole_end, u64::MAX)];
        low.into_iter().flatten().chain((high.pages > 0).then_some(high)).collect()
    }
}

/// All regions, later ones over earlier ones.
#[derive(Debug)]
pub(crate) struct Layout {
    regions: Vec<Region>,
}

impl Layout {
    pub(crate) fn new(plain: &PlainRam) -> Self {
        Self { regions: plain.regions() }
    }

    pub(crate) fn map(&self, page: GpaPage) -> Backing {
        let page = page.raw();
        let found = self.regions.iter().rev().find(|r| page >= r.start && page < r.end());
        found.map_or(Backing::Mmio, |r| r.backing(page))
    }

    /// Adds a region over whatever is there.
    pub(crate) fn add(&mut self, region: Region) {
        self.regions.push(region);
    }

    /// Takes `[start, start + pages)` out of every region; answers whether anything was there.
    pub(crate) fn remove(&mut self, start: u64, pages: u64) -> bool {
        let end = start.saturating_add(pages);
        let before: u64 = self.regions.iter().map(|r| r.pages).sum();
        self.regions = self.regions.iter().flat_map(|r| [r.cut(0, start), r.cut(end, u64::MAX)]).flatten().collect();
        before != self.regions.iter().map(|r| r.pages).sum::<u64>()
    }

    /// Whether any RAM lies in the range.
    pub(crate) fn has_ram(&self, start: u64, pages: u64) -> bool {
        let end = start.saturating_add(pages);
        self.regions.iter().any(|r| !r.rom && r.cut(start, end).is_some())
    }

    /// The regions without overlaps, sorted by address: later ones hide earlier ones.
    pub(crate) fn flat(&self) -> Vec<Region> {
        let mut flat: Vec<Region> = Vec::new();
        for region in &self.regions {
            flat =
                flat.iter().flat_map(|r| [r.cut(0, region.start), r.cut(region.end(), u64::MAX)]).flatten().collect();
            flat.push(*region);
        }
        flat.sort_by_key(|r| r.start);
        flat
    }

    /// RAM as sorted ranges, without the parts that ROM hides.
    pub(crate) fn ram_ranges(&self) -> Vec<(Gpa, u64)> {
        let ram = self.flat().into_iter().filter(|r| !r.rom);
        ram.map(|r| (GpaPage::new(r.start).base(), r.pages << 12)).collect()
    }
}
