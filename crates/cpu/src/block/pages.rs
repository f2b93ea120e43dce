//! Which blocks lie on which pages of RAM, and by that where a block is.

use super::MAX_OPS;
use hashbrown::HashMap;
use smallvec::SmallVec;
use umbra_arch::PAGE_SIZE;

/// Most bytes of a block in a page.
const LONGEST: u16 = MAX_OPS as u16 * 15;

/// The bytes of a block that lie in one page.
#[derive(Clone, Copy)]
struct Part {
    /// The first one's place in the page.
    first: u16,
    len: u16,
    /// The block's number.
    number: u32,
}

/// A page's blocks.
#[derive(Default)]
struct Page {
    /// By their first bytes. They are looked at whenever something is stored near them, the blocks aren't.
    parts: Vec<Part>,
    /// How often some were dropped since the last one was entered.
    drops: u8,
}

/// So many drops, and a page is being written anew.
const REWRITTEN: u8 = 4;

/// Numbers of blocks.
pub(super) type Numbers = SmallVec<[u32; 8]>;

/// The blocks of all pages. Places are RAM offsets; bytes lie in one page.
#[derive(Default)]
pub(super) struct Pages(HashMap<u64, Page>);

impl Page {
    /// Parts of which some byte is among these of the page.
    fn touching(&self, from: u64, to: u64) -> impl Iterator<Item = &Part> {
        let near = self.parts.partition_point(|part| u64::from(part.first) + u64::from(LONGEST) <= from);
        let begun = self.parts[near..].iter().take_while(move |part| u64::from(part.first) < to);
        begun.filter(move |part| u64::from(part.first) + u64::from(part.len) > from)
    }

    /// Of its 64-byte lines, those that bytes of it touch, but not those that a block does.
    fn free_lines(&self, mut lines: u64) -> u64 {
        let mut free = lines;
        while lines != 0 {
            let line = lines.trailing_zeros();
            let from = u64::from(line) * 64;
            if self.touching(from, from + 64).next().is_some() {
                free &= !(1 << line);
            }
            lines &= lines - 1;
        }
        free
    }
}

impl Pages {
    /// Enters the bytes of a block.
    pub(super) fn enter(&mut self, number: u32, offset: u64, len: u32) {
        let page = self.0.entry(offset >> 12).or_default();
        let first = in_page(offset) as u16;
        debug_assert!(len <= LONGEST.into() && u64::from(first) + u64::from(len) <= PAGE_SIZE);
        let at = page.parts.partition_point(|part| part.first <= first);
        page.parts.insert(at, Part { first, len: len as u16, number });
        page.drops = 0;
    }

    /// Removes them again: which `lines` of the page no block has bytes in any more, and whether there is any block on the
    /// page.
    pub(super) fn remove(&mut self, number: u32, offset: u64, lines: u64) -> (u64, bool) {
        let Some(page) = self.0.get_mut(&(offset >> 12)) else { return (lines, false) };
        let first = in_page(offset) as u16;
        let from = page.parts.partition_point(|part| part.first < first);
        let same = page.parts[from..].iter().take_while(|part| part.first == first);
        if let Some(at) = same.enumerate().find_map(|(at, part)| (part.number == number).then_some(from + at)) {
            page.parts.remove(at);
        }
        if page.parts.is_empty() {
            self.0.remove(&(offset >> 12));
            return (lines, false);
        }
        (page.free_lines(lines), true)
    }

    /// Numbers of the blocks that have bytes beginning at `offset`.
    pub(super) fn beginning_at(&self, offset: u64) -> impl Iterator<Item = u32> {
        let first = in_page(offset) as u16;
        let parts = self.0.get(&(offset >> 12)).map_or(&[][..], |page| &page.parts);
        let from = parts.partition_point(|part| part.first < first);
        parts[from..].iter().take_while(move |part| part.first == first).map(|part| part.number)
    }

    /// Numbers of the blocks that have any of the `len` bytes at `offset`, which may go beyond its page; some more than once.
    pub(super) fn touching(&self, offset: u64, len: u32) -> Numbers {
        let end = offset.saturating_add(len.max(1).into());
        let mut numbers = Numbers::new();
        for number in offset >> 12..=(end - 1) >> 12 {
            let start = number << 12;
            let Some(page) = self.0.get(&number) else { continue };
            let touching = page.touching(offset.saturating_sub(start), (end - start).min(PAGE_SIZE));
            numbers.extend(touching.map(|part| part.number));
        }
        numbers
    }

    /// Some blocks have been dropped as their page, that of `offset`, was stored to: numbers of the others there, if all of
    /// it seems to be written anew and had better not be watched meanwhile.
    pub(super) fn rewritten(&mut self, offset: u64) -> Numbers {
        let Some(page) = self.0.get_mut(&(offset >> 12)) else { return Numbers::new() };
        page.drops += 1;
        let others = page.parts.iter().filter(|_| page.drops >= REWRITTEN);
        others.map(|part| part.number).collect()
    }
}

fn in_page(offset: u64) -> u64 {
    offset & (PAGE_SIZE - 1)
}

#[cfg(test)]
mod tests {
    use super::{LONGEST, Pages, REWRITTEN};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// A block's bytes, by the number's place in the list: RAM offset and length, in one page of three.
    fn pieces() -> impl Strategy<Value = Vec<(u64, u32)>> {
        let piece =
            (0..3u64, 0..4096u64, 1..=u32::from(LONGEST), any::<bool>()).prop_map(|(page, first, len, near)| {
                // Many in a few lines of a page, so that they share them.
                let first = if near { first & 0x7f } else { first };
                (page << 12 | first, len.min(4096 - first as u32))
            });
        prop::collection::vec(piece, 1..40)
    }

    fn lines(offset: u64, len: u32) -> u64 {
        (offset & 0xfff..(offset & 0xfff) + u64::from(len)).fold(0, |lines, byte| lines | 1 << (byte >> 6))
    }

    fn overlap(&(a, a_len): &(u64, u32), (b, b_len): (u64, u32)) -> bool {
        (a..a + u64::from(a_len)).any(|byte| (b..b + u64::from(b_len)).contains(&byte))
    }

    proptest! {
        #[test]
        fn finds_what_a_search_of_all_finds(all in pieces(), at in 0..3 * 4096u64, len in 1..200u32, gone in any::<u64>()) {
            let mut pages = Pages::default();
            for (number, &(offset, len)) in all.iter().enumerate() {
                pages.enter(number as u32, offset, len);
            }
            let is_gone = |number: usize| gone >> (number & 63) & 1 != 0;
            let mut left: BTreeSet<usize> = (0..all.len()).collect();
            for number in (0..all.len()).filter(|&number| is_gone(number)) {
                let (offset, len) = all[number];
                left.remove(&number);
                let same_page = || left.iter().map(|&other| all[other]).filter(|piece| piece.0 >> 12 == offset >> 12);
                let others = same_page().fold(0, |set, (offset, len)| set | lines(offset, len));
                let (free, has_code) = pages.remove(number as u32, offset, lines(offset, len));
                prop_assert_eq!(has_code, same_page().count() > 0);
                prop_assert_eq!(free, lines(offset, len) & !others);
            }
            let len = len.min((3 * 4096 - at) as u32);
            let touching: BTreeSet<usize> = pages.touching(at, len).iter().map(|&number| number as usize).collect();
            let expected = left.iter().copied().filter(|&number| overlap(&all[number], (at, len)));
            prop_assert_eq!(touching, expected.collect::<BTreeSet<_>>());
            for &(offset, _) in &all {
                let found: BTreeSet<usize> = pages.beginning_at(offset).map(|number| number as usize).collect();
                let expected = left.iter().copied().filter(|&number| all[number].0 == offset);
                prop_assert_eq!(found, expected.collect::<BTreeSet<_>>());
            }
        }
    }

    #[test]
    fn a_page_whose_blocks_are_dropped_one_by_one_is_being_rewritten() {
        let mut pages = Pages::default();
        (0..10).for_each(|number| pages.enter(number, 0x1000 + u64::from(number) * 64, 12));
        for number in 0..u32::from(REWRITTEN) - 1 {
            pages.remove(number, 0x1000 + u64::from(number) * 64, 1 << number);
            assert!(pages.rewritten(0x1000).is_empty());
        }
        pages.enter(0, 0x1000, 12);
        assert!(pages.rewritten(0x1000).is_empty(), "there is a new block");
        (2..REWRITTEN).for_each(|_| assert!(pages.rewritten(0x1000).is_empty()));
        assert_eq!(pages.rewritten(0x1fff).len(), 10 - usize::from(REWRITTEN) + 2);
        assert!(pages.rewritten(0x2000).is_empty(), "no such page");
    }
}
