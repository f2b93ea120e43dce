//! Shadow pages: what was read from a guest table, decoded, for as long as the table says the same.
//!
//! A page is keyed by its table's frame and its [`PageRole`]; inherited rights are not part of the key,
//! since entries keep raw rights and a lookup combines them on its way down. A link to a child names a
//! page's index and serial number, so a freed child leaves no dangling link: the serial differs.

use crate::format::{Decoded, EntryMasks, Format, is_leaf};
use crate::rights::Rights;
use crate::role::PageRole;
use smallvec::SmallVec;
use umbra_arch::paging::entry;
use umbra_arch::{Gpa, GpaPage};
use umbra_memory::{Backing, GuestMemory, RamOffset};

/// An entry of a shadow page. Bits 1..=3 are W, U and X so that combining rights is an AND.
///
/// Leaf: the page's physical address in bits 51:12. Link: child's index in bits 29:10, serial above.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct ShadowEntry(pub u64);

impl ShadowEntry {
    pub(crate) const P: u64 = 1;
    pub(crate) const W: u64 = 2;
    pub(crate) const U: u64 = 4;
    pub(crate) const X: u64 = 8;
    pub(crate) const RIGHTS: u64 = Self::W | Self::U | Self::X;
    pub(crate) const D: u64 = 1 << 4;
    const LEAF: u64 = 1 << 5;
    const KEY_SHIFT: u32 = 6;
    const FRAME: u64 = 0x000f_ffff_ffff_f000;
    const INDEX_SHIFT: u32 = 10;
    const SERIAL_SHIFT: u32 = 30;

    #[inline(always)]
    fn rights_bits(rights: Rights) -> u64 {
        let bit = |on, bit| if on { bit } else { 0 };
        bit(rights.write, Self::W) | bit(rights.user, Self::U) | bit(rights.exec, Self::X)
    }
    #[inline(always)]
    pub(crate) fn leaf(base: Gpa, rights: Rights, dirty: bool) -> Self {
        let key = u64::from(rights.key) << Self::KEY_SHIFT;
        let dirty = if dirty { Self::D } else { 0 };
        Self(Self::P | Self::LEAF | Self::rights_bits(rights) | dirty | key | base.raw() & Self::FRAME)
    }
    pub(crate) fn link(child: Link, rights: Rights) -> Self {
        let index = u64::from(child.index) << Self::INDEX_SHIFT;
        Self(Self::P | Self::rights_bits(rights) | index | child.serial << Self::SERIAL_SHIFT)
    }
    #[inline(always)]
    pub(crate) fn is_present(self) -> bool {
        self.0 & Self::P != 0
    }
    #[inline(always)]
    pub(crate) fn is_leaf(self) -> bool {
        self.0 & Self::LEAF != 0
    }
    /// Present, and names a table.
    #[inline(always)]
    pub(crate) fn is_link(self) -> bool {
        self.0 & (Self::P | Self::LEAF) == Self::P
    }
    #[inline(always)]
    pub(crate) fn is_dirty(self) -> bool {
        self.0 & Self::D != 0
    }
    pub(crate) fn is_executable(self) -> bool {
        self.0 & Self::X != 0
    }
    #[inline(always)]
    pub(crate) fn key(self) -> u8 {
        (self.0 >> Self::KEY_SHIFT) as u8 & 15
    }
    #[inline(always)]
    pub(crate) fn frame(self) -> Gpa {
        Gpa::new(self.0 & Self::FRAME)
    }
    #[inline(always)]
    pub(crate) fn child(self) -> Link {
        Link { index: (self.0 >> Self::INDEX_SHIFT) as u32 & (MAX_PAGES - 1), serial: self.0 >> Self::SERIAL_SHIFT }
    }
    fn set_dirty(self) -> Self {
        Self(self.0 | Self::D)
    }
    /// The entry below links whose rights bits are `above`.
    #[inline(always)]
    pub(crate) fn below(self, above: u64) -> Self {
        Self(self.0 & (above | !Self::RIGHTS))
    }
    /// Raw rights.
    #[inline(always)]
    pub(crate) fn rights(self) -> Rights {
        rights_of(self.0, self.key())
    }
    /// W, U and X as bits 0 to 2.
    #[inline(always)]
    pub(crate) fn rights_index(self) -> usize {
        (self.0 & Self::RIGHTS) as usize >> 1
    }
    /// Its key, as in `View::restricted_keys`.
    #[inline(always)]
    pub(crate) fn key_bit(self) -> u32 {
        1 << (self.key() + if self.0 & Self::U != 0 { 0 } else { 16 })
    }
}

/// Raw rights from combined entry bits.
#[inline(always)]
pub(crate) fn rights_of(bits: u64, key: u8) -> Rights {
    Rights {
        write: bits & ShadowEntry::W != 0,
        user: bits & ShadowEntry::U != 0,
        exec: bits & ShadowEntry::X != 0,
        key,
    }
}

/// A name of a shadow page that is void once the page is freed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Link {
    pub index: u32,
    pub serial: u64,
}

/// Indices fit a link's 20 bits.
const MAX_PAGES: u32 = 1 << 20;
const SERIAL_MASK: u64 = !0 >> ShadowEntry::SERIAL_SHIFT;
/// Linear bases remembered for a page; more of them mean "anywhere".
const MAX_BASES: usize = 4;

pub(crate) struct ShadowPage {
    pub entries: Box<[ShadowEntry]>,
    /// 0 while the slot is free.
    serial: u64,
    /// The table's frame.
    pub table: GpaPage,
    pub off: RamOffset,
    /// Walks can set A and D in it.
    pub is_ram: bool,
    pub role: PageRole,
    /// How its leaves are read.
    pub leaves: EntryMasks,
    /// log2 of the bytes that one entry covers.
    pub shift: u32,
    /// Present entries.
    pub present: u32,
    /// Root slots (a bit each) whose contexts may hold translations through this page.
    pub roots: u64,
    /// Linear addresses at which it was reached.
    pub bases: SmallVec<[u64; 2]>,
    /// Some entry has led here: it isn't only a topmost page.
    pub is_child: bool,
    /// More bases than remembered.
    pub anywhere: bool,
    /// Stores to the table since it was last used for a translation.
    pub idle_writes: u32,
    /// Used since the eviction's hand last came by.
    pub referenced: bool,
    /// Next page of the same frame, plus 1.
    next: u32,
}

impl ShadowPage {
    /// Bytes of linear address space that the whole page covers, as a shift.
    fn coverage_shift(&self) -> u32 {
        self.shift + self.role.format.index_bits()
    }

    /// The index of the entry for `gva`.
    #[inline(always)]
    pub(crate) fn index(&self, gva: u64) -> usize {
        (gva >> self.shift) as usize & (self.entries.len() - 1)
    }

    /// The page that shadows the same frame after this one.
    #[inline(always)]
    pub(crate) fn next(&self) -> Option<u32> {
        self.next.checked_sub(1)
    }

    /// The entry for `gva`, which may be absent.
    #[inline(always)]
    pub(crate) fn entry_for(&self, gva: u64) -> ShadowEntry {
        self.entries[self.index(gva)]
    }

    /// The leaf that the guest's entry `raw` is; `None` if it has a reserved bit set.
    #[inline(always)]
    pub(crate) fn leaf(&self, raw: u64) -> Option<ShadowEntry> {
        let Self { leaves, .. } = self;
        let leaf = ShadowEntry::leaf(leaves.base(raw), leaves.rights(raw), raw & entry::D != 0);
        leaves.are_legal(raw).then_some(leaf)
    }

    /// Where its entry `at` is.
    #[inline(always)]
    pub(crate) fn offset_of(&self, at: usize) -> RamOffset {
        self.off.add(at as u64 * self.role.format.entry_bytes())
    }

    /// What the guest's table has at `at` now.
    #[inline(always)]
    pub(crate) fn guest_entry(&self, mem: &GuestMemory, at: usize) -> u64 {
        match self.role.format.entry_bytes() {
            4 => u64::from(mem.load::<u32>(self.offset_of(at))),
            _ => mem.load::<u64>(self.offset_of(at)),
        }
    }

    /// Writes an entry and keeps the count.
    #[inline(always)]
    pub(crate) fn set(&mut self, at: usize, entry: ShadowEntry) {
        let old = std::mem::replace(&mut self.entries[at], entry);
        self.present = self.present + u32::from(entry.is_present()) - u32::from(old.is_present());
    }

    /// Clears a present entry and keeps the count.
    #[inline(always)]
    pub(crate) fn take(&mut self, at: usize) -> ShadowEntry {
        self.present -= 1;
        std::mem::take(&mut self.entries[at])
    }

    /// It serves as a table.
    #[inline(always)]
    pub(crate) fn used(&mut self) {
        self.idle_writes = 0;
        self.referenced = true;
    }

    /// Notes that root `slot` holds a translation of `gva` through this page.
    pub(crate) fn reached(&mut self, gva: u64, slot: usize) {
        self.used();
        self.roots |= 1 << slot;
        let base = gva >> self.coverage_shift() << self.coverage_shift();
        if self.bases.first() != Some(&base) {
            self.add_base(base);
        }
    }

    fn add_base(&mut self, base: u64) {
        if self.anywhere || self.bases.contains(&base) {
            return;
        }
        if self.bases.len() == MAX_BASES {
            self.anywhere = true;
        } else {
            self.bases.push(base);
        }
    }

    /// Whether a drop would find a context entry of `gva` in root `slot`.
    pub(crate) fn knows(&self, gva: u64, slot: usize) -> bool {
        let base = gva >> self.coverage_shift() << self.coverage_shift();
        self.roots >> slot & 1 != 0 && (self.anywhere || self.bases.contains(&base))
    }
}

/// What became of a shadow entry when its guest entry was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fresh {
    /// It still says the same.
    Same,
    /// Only D was set, which the entry now has too.
    Dirtied,
    /// It must go.
    Stale,
}

/// All shadow pages.
pub(crate) struct ShadowPages {
    pages: Vec<ShadowPage>,
    free: Vec<u32>,
    /// Per frame of the host mapping: index of its first shadow page plus 1.
    heads: Vec<u32>,
    last_serial: u64,
    live: usize,
    limit: usize,
    hand: usize,
}

impl ShadowPages {
    pub(crate) fn new(frames: usize, limit: usize) -> Self {
        let limit = limit.clamp(16, MAX_PAGES as usize);
        Self { pages: Vec::new(), free: Vec::new(), heads: vec![0; frames], last_serial: 0, live: 0, limit, hand: 0 }
    }

    pub(crate) fn live(&self) -> usize {
        self.live
    }

    /// The page that a link names, unless it was freed.
    #[inline(always)]
    pub(crate) fn get(&self, link: Link) -> Option<&ShadowPage> {
        self.pages.get(link.index as usize).filter(|page| page.serial == link.serial)
    }

    /// Its index.
    #[inline(always)]
    pub(crate) fn index_of(&self, link: Link) -> Option<u32> {
        self.get(link).map(|_| link.index)
    }

    #[inline(always)]
    pub(crate) fn page(&self, index: u32) -> &ShadowPage {
        &self.pages[index as usize]
    }

    /// As [`page`](Self::page), if there is one.
    #[inline(always)]
    pub(crate) fn try_page(&self, index: u32) -> Option<&ShadowPage> {
        self.pages.get(index as usize)
    }

    #[inline(always)]
    pub(crate) fn try_page_mut(&mut self, index: u32) -> Option<&mut ShadowPage> {
        self.pages.get_mut(index as usize)
    }

    /// What the guest's table has at `at` now.
    #[inline]
    pub(crate) fn guest_entry(&self, mem: &GuestMemory, index: u32, at: usize) -> u64 {
        self.page(index).guest_entry(mem, at)
    }

    pub(crate) fn page_mut(&mut self, index: u32) -> &mut ShadowPage {
        &mut self.pages[index as usize]
    }

    pub(crate) fn link_of(&self, index: u32) -> Link {
        Link { index, serial: self.pages[index as usize].serial }
    }

    /// Indices of all live pages.
    pub(crate) fn indices(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.pages.len() as u32).filter(|&i| self.pages[i as usize].serial != 0)
    }

    /// The first of the pages that shadow the frame at `off`.
    #[inline]
    pub(crate) fn first_of_frame(&self, off: RamOffset) -> Option<u32> {
        self.heads.get((off.raw() >> 12) as usize)?.checked_sub(1)
    }

    /// The page of this whole key.
    pub(crate) fn find(&self, off: RamOffset, table: GpaPage, role: PageRole) -> Option<u32> {
        let mut next = self.first_of_frame(off);
        while let Some(index) = next {
            let page = self.page(index);
            if (page.role == role || cfg!(umbra_mutant = "page-found-without-its-role")) && page.table == table {
                return Some(index);
            }
            next = page.next();
        }
        None
    }

    /// Makes an empty page; `None` where there is no memory. The caller marks the frame as watched.
    pub(crate) fn allocate(
        &mut self,
        backing: Backing,
        table: GpaPage,
        role: PageRole,
        format: &Format,
    ) -> Option<u32> {
        let off = backing.readable()?;
        self.last_serial = (self.last_serial + 1) & SERIAL_MASK;
        self.last_serial = self.last_serial.max(1);
        let length = 1 << role.format.index_bits();
        let head = self.heads[(off.raw() >> 12) as usize];
        let mut page = ShadowPage {
            entries: Box::default(),
            serial: self.last_serial,
            table,
            off: off.page_base(),
            is_ram: matches!(backing, Backing::Ram(_)),
            role,
            leaves: format.masks(role, true),
            shift: role.format.shift(role.level),
            present: 0,
            roots: 0,
            bases: SmallVec::new(),
            is_child: false,
            anywhere: false,
            idle_writes: 0,
            referenced: true,
            next: head,
        };
        let index = self.free.pop().unwrap_or(self.pages.len() as u32);
        if let Some(old) = self.pages.get_mut(index as usize) {
            // A freed page's entries are all clear: reuse the allocation.
            page.entries = std::mem::take(&mut old.entries);
        }
        if page.entries.len() != length {
            page.entries = vec![ShadowEntry::default(); length].into_boxed_slice();
        }
        if index as usize == self.pages.len() {
            self.pages.push(page);
        } else {
            self.pages[index as usize] = page;
        }
        self.heads[(off.raw() >> 12) as usize] = index + 1;
        self.live += 1;
        Some(index)
    }

    /// Frees a page; answers whether its frame is no longer shadowed at all.
    pub(crate) fn release(&mut self, index: u32) -> bool {
        let page = &mut self.pages[index as usize];
        let (off, next) = (page.off, page.next);
        if page.present != 0 {
            page.entries.fill(ShadowEntry::default());
        }
        page.serial = 0;
        page.present = 0;
        self.unlink(off, index, next);
        self.free.push(index);
        self.live -= 1;
        self.heads[(off.raw() >> 12) as usize] == 0
    }

    fn unlink(&mut self, off: RamOffset, index: u32, next: u32) {
        let head = &mut self.heads[(off.raw() >> 12) as usize];
        if *head == index + 1 {
            *head = next;
            return;
        }
        let mut at = *head;
        while at != 0 {
            let page = &mut self.pages[at as usize - 1];
            if page.next == index + 1 {
                page.next = next;
                return;
            }
            at = page.next;
        }
    }

    /// Writes an entry and keeps the count.
    pub(crate) fn set(&mut self, index: u32, at: usize, entry: ShadowEntry) {
        self.pages[index as usize].set(at, entry);
    }

    /// Compares a present entry with what the guest's entry `raw` says now.
    #[inline(always)]
    pub(crate) fn refresh(&mut self, index: u32, at: usize, raw: u64, format: &Format) -> Fresh {
        let page = &mut self.pages[index as usize];
        let old = page.entries[at];
        if !old.is_leaf() {
            return self.refresh_link(index, at, raw, format);
        }
        if raw & (entry::P | entry::A) != entry::P | entry::A {
            return Fresh::Stale;
        }
        match page.leaf(raw).filter(|_| is_leaf(raw, page.role)) {
            Some(new) if new == old => Fresh::Same,
            Some(new) if new == old.set_dirty() => {
                page.entries[at] = new;
                Fresh::Dirtied
            }
            _ => Fresh::Stale,
        }
    }

    #[inline(never)]
    fn refresh_link(&self, index: u32, at: usize, raw: u64, format: &Format) -> Fresh {
        let page = self.page(index);
        let same = self.says(page.entries[at], page.role, format.decode(raw, page.role));
        if same { Fresh::Same } else { Fresh::Stale }
    }

    /// Whether an entry of a page with `role` is what `decoded` asks for. A link to a freed child asks
    /// for nothing, so it fits any table.
    pub(crate) fn says(&self, entry: ShadowEntry, role: PageRole, decoded: Decoded) -> bool {
        match decoded {
            Decoded::NotPresent | Decoded::Reserved => false,
            Decoded::Leaf { base, rights, accessed, dirty } => {
                accessed && entry == ShadowEntry::leaf(base, rights, dirty)
            }
            Decoded::Table { table, rights, accessed } => {
                accessed
                    && !entry.is_leaf()
                    && entry.0 & ShadowEntry::RIGHTS == ShadowEntry::rights_bits(rights)
                    && (cfg!(umbra_mutant = "linked-child-not-compared")
                        || self.get(entry.child()).is_none_or(|c| c.table == table.page() && c.role == role.child()))
            }
        }
    }

    /// The next page to evict before `more` new ones fit, or `None` when they do.
    pub(crate) fn victim(&mut self, more: usize, keep: impl Fn(Link) -> bool) -> Option<u32> {
        if self.live + more <= self.limit {
            return None;
        }
        for _ in 0..2 * self.pages.len() {
            self.hand = (self.hand + 1) % self.pages.len();
            let link = self.link_of(self.hand as u32);
            let page = &mut self.pages[self.hand];
            if page.serial == 0 || keep(link) {
                continue;
            }
            if !std::mem::take(&mut page.referenced) {
                return Some(link.index);
            }
        }
        None
    }
}
