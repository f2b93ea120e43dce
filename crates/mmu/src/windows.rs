//! What somebody has to know of who keeps translations of a root's user pages by himself, outside of the fast tables: which
//! of them hold no more.

use crate::context::Entry;
use crate::mmu::Mmu;
use umbra_arch::Gva;
use umbra_memory::RamOffset;

/// Pages that are told one by one; then all of theirs are withdrawn.
const MOST: usize = 4096;

/// The column of CPL 3.
const USER: usize = 0;

/// What was withdrawn from the columns that have a number.
#[derive(Default)]
pub(crate) struct Withdrawn {
    pages: Vec<(u8, u64)>,
    /// By bits: columns all of whose translations were.
    all: u32,
}

impl Withdrawn {
    /// A page of a column; number 0 is nobody's.
    #[inline(always)]
    pub(crate) fn page(&mut self, window: u8, page: u64) {
        if window != 0 {
            self.push(window, page);
        }
    }

    #[cold]
    fn push(&mut self, window: u8, page: u64) {
        if self.pages.len() < MOST {
            self.pages.push((window, page));
        } else {
            self.column(window);
        }
    }

    /// All of a column.
    pub(crate) fn column(&mut self, window: u8) {
        self.all |= 1 << window & !1;
    }
}

/// A user page that the fast table has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UserPage {
    /// Its first byte.
    pub gva: Gva,
    /// Likewise in RAM.
    pub off: RamOffset,
    /// It may be written, and nobody has to be told of that.
    pub writable: bool,
    /// It may hold code.
    pub executable: bool,
}

impl Mmu {
    /// Numbers below this can be given to columns.
    pub const WINDOWS: u8 = 32;

    /// The number of the user's column of the root in force; 0: it has none.
    #[inline(always)]
    pub fn window(&self) -> u8 {
        self.roots.slots[self.current].as_ref().map_or(0, |root| root.columns[USER].window)
    }

    /// Gives that column a number, 1 or more: what is withdrawn from it is told from now on, until the column is no more.
    /// False if there is no such column yet.
    pub fn number_window(&mut self, window: u8) -> bool {
        let Some(root) = self.roots.slots[self.current].as_mut() else { return false };
        let column = &mut root.columns[USER];
        let can = column.exists() && window < Self::WINDOWS;
        if can {
            column.window = window;
        }
        can
    }

    /// Whether a root has a column of that number.
    pub fn has_window(&self, window: u8) -> bool {
        self.roots.slots.iter().flatten().any(|root| root.columns[USER].window == window)
    }

    /// Takes a column's number away.
    pub fn forget_window(&mut self, window: u8) {
        let roots = self.roots.slots.iter_mut().flatten();
        roots.map(|root| &mut root.columns[USER]).filter(|c| c.window == window).for_each(|c| c.window = 0);
    }

    /// What was withdrawn since this was asked last: columns, by bits of their numbers, and single pages.
    pub fn take_withdrawn(&mut self) -> (u32, Vec<(u8, u64)>) {
        let withdrawn = &mut self.pool.withdrawn;
        (std::mem::take(&mut withdrawn.all), std::mem::take(&mut withdrawn.pages))
    }

    /// What the user's column of the root in force says of a page.
    pub fn user_page(&self, gva: Gva) -> Option<UserPage> {
        let column = &self.roots.slots[self.current].as_ref()?.columns[USER];
        let page = gva.raw() & !0xfff;
        let slot = self.pool.block(column).get((page >> 12 & column.mask()) as usize)?;
        (slot.tag_read == page).then(|| self.as_user_page(slot, page))
    }

    /// All that it has.
    pub fn user_pages(&self) -> Vec<UserPage> {
        let Some(root) = self.roots.slots[self.current].as_ref() else { return Vec::new() };
        let column = &root.columns[USER];
        if !column.exists() {
            return Vec::new();
        }
        let slots = self.pool.block(column).iter().zip(0..);
        let held = slots.filter(|(slot, at)| slot.tag_read >> 12 & column.mask() == *at);
        held.map(|(slot, _)| self.as_user_page(slot, slot.tag_read)).collect()
    }

    fn as_user_page(&self, slot: &Entry, page: u64) -> UserPage {
        let gva = Gva::new(page);
        UserPage {
            gva,
            off: self.offset_in(slot, gva),
            writable: slot.tag_write == page,
            executable: slot.tag_fetch == page,
        }
    }
}
