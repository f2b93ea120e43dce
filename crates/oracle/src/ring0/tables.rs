//! Page tables of ring-0 cases: a fixed low part, and the entries on the arena's path.

use super::{DATA, Paging, TABLES, USER};
use crate::case::Piece;
use umbra_arch::paging::entry::{A, D, P, U, W};

/// The arena of `control`: eight pages in the second 4 MiB, whose offset in a large page is that of the data.
pub const ARENA_LOW: u64 = 0x40_0000 + DATA;

/// Where the tables of a root lie: root 0 or 1.
#[derive(Clone, Copy, Debug)]
pub struct Root {
    paging: Paging,
    number: u64,
}

impl Root {
    /// Root 0 or 1 of a case.
    pub fn new(paging: Paging, number: u64) -> Self {
        Self { paging, number }
    }

    fn table(self, n: u64) -> u64 {
        TABLES + (2 * n + self.number) * 0x1000
    }

    /// The paging it is for.
    pub fn paging(self) -> Paging {
        self.paging
    }

    /// PAE's first PDPTE.
    pub fn first_pdpte(self) -> u64 {
        self.directory() | P
    }

    /// CR3.
    pub fn cr3(self) -> u64 {
        self.table(0)
    }

    /// Bytes of an entry.
    pub fn entry_bytes(self) -> u64 {
        if self.paging == Paging::TwoLevel { 4 } else { 8 }
    }

    /// The table that points to page tables.
    fn directory(self) -> u64 {
        match self.paging {
            Paging::TwoLevel => self.table(0),
            Paging::Pae => self.table(1),
            Paging::Long => self.table(2),
        }
    }

    /// The arena's page table.
    pub fn page_table(self) -> u64 {
        self.table(3)
    }

    /// Address of the directory's entry for the arena of `control`.
    pub fn arena_directory_entry(self) -> u64 {
        let index = if self.paging == Paging::TwoLevel { 1 } else { 2 };
        self.directory() + index * self.entry_bytes()
    }

    /// Address of the entry for page `page` of the arena of `control`.
    pub fn arena_page_entry(self, page: u64) -> u64 {
        self.page_table() + ((DATA >> 12) + page) * self.entry_bytes()
    }

    /// The fixed part, and pointers down to the directory. Both roots share the low page table.
    pub fn fixed(self) -> Vec<Piece> {
        const LOW: u64 = TABLES + 0x8000;
        let size = self.entry_bytes() as usize;
        let quad = |gpa: u64, value: u64| Piece { gpa, bytes: value.to_le_bytes()[..size].to_vec() };
        let all = P | W | U | A | D;
        let low = (0..4096 / size as u64).flat_map(|page| {
            let rights = if page == USER >> 12 { all } else { all & !U };
            (page << 12 | rights).to_le_bytes()[..size].to_vec()
        });
        let mut pieces = vec![Piece { gpa: LOW, bytes: low.collect() }, quad(self.directory(), LOW | all)];
        match self.paging {
            Paging::TwoLevel => {}
            Paging::Pae => pieces.push(quad(self.table(0), self.directory() | P)),
            Paging::Long => {
                pieces.push(quad(self.table(0), self.table(1) | all));
                pieces.push(quad(self.table(1), self.directory() | all));
            }
        }
        pieces
    }
}
