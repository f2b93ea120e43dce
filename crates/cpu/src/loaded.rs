//! Segments loaded lately: what checking a descriptor of the GDT came to, which holds for as long as its bytes say the
//! same and are looked at by the same rules.

use crate::core::Core;
use crate::segments::ACCESSED;
use umbra_arch::Gva;
use umbra_arch::descriptor::Descriptor;
use umbra_arch::segment::Segment;

const KEPT: usize = 32;

/// The rules that a descriptor was checked by, with the privilege level they ask for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rules {
    /// The code segment of an event's handler, entered from this CPL.
    Handler(u8),
    /// The code segment of a return, from this CPL.
    Return(u8),
    /// A stack segment for this CPL.
    Stack(u8),
}

impl Rules {
    /// These rules for `selector`, and whether they are IA-32e mode's, in a word that is never 0.
    #[inline(always)]
    fn key(self, selector: u16, long: bool) -> u64 {
        let (kind, cpl) = match self {
            Self::Handler(cpl) => (1, cpl),
            Self::Return(cpl) => (2, cpl),
            Self::Stack(cpl) => (3, cpl),
        };
        kind << 16 | u64::from(selector) | u64::from(cpl) << 18 | u64::from(long) << 20
    }
}

/// The place of what has this key, by kind of rules and selector.
#[inline(always)]
fn place(key: u64) -> usize {
    (key >> 16 & 3 | key >> 1 & 0x1c) as usize % KEPT
}

#[derive(Clone, Copy, Default)]
struct Loaded {
    /// [`Rules::key`]; no rules have 0.
    key: u64,
    raw: u64,
    segment: Segment,
}

/// The segments loaded last, by selector.
#[derive(Default)]
pub struct LoadedSegments(Box<[Loaded; KEPT]>);

/// Where a segment loaded lately is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place(usize);

impl LoadedSegments {
    /// The segment there; another one may take its place when the next is loaded.
    #[inline(always)]
    pub fn at(&self, place: Place) -> &Segment {
        &self.0[place.0 % KEPT].segment
    }
}

impl Core {
    /// What loading `selector` by `rules` comes to, if it came to that before and the descriptor hasn't changed since.
    #[inline(always)]
    pub fn loaded_before(&self, selector: u16, rules: Rules) -> Option<Place> {
        self.loaded_before_in(selector, rules, self.s.efer.lma())
    }

    /// As [`loaded_before`](Self::loaded_before) where EFER.LMA is known.
    #[inline(always)]
    pub(crate) fn loaded_before_in(&self, selector: u16, rules: Rules, long: bool) -> Option<Place> {
        let key = rules.key(selector, long);
        let known = &self.loaded.0[place(key)];
        let index = u64::from(selector & 0xfff8);
        if known.key != key || index + 7 > u64::from(self.s.gdtr.limit) {
            return None;
        }
        let at = self.s.gdtr.base.wrapping_add(index);
        let at = if long { at } else { at & 0xffff_ffff };
        let off = self.mmu.lookup_system_read(Gva::new(at), 8)?;
        (self.mem.load::<u64>(off) == known.raw).then_some(Place(place(key)))
    }

    /// What loading `selector` by `rules` came to before, and its descriptor, which hasn't changed since: that descriptor
    /// always comes to this in IA-32e mode, if that is the present one.
    pub fn known_segment(&self, selector: u16, rules: Rules) -> Option<(u64, Segment)> {
        let known = &self.loaded.0[self.loaded_before(selector, rules)?.0 % KEPT];
        Some((known.raw, known.segment))
    }

    /// The segment that `selector` with descriptor `d` gives, whose accessed bit is set; `rules` had nothing against it.
    pub fn loads(&mut self, selector: u16, d: Descriptor, rules: Rules) -> Place {
        let d = Descriptor(d.0 | ACCESSED);
        let key = rules.key(selector, self.s.efer.lma());
        // Of the LDT, which may be another one next time, none is found again.
        let found = if selector & 4 == 0 { key } else { 0 };
        self.loaded.0[place(key)] = Loaded { key: found, raw: d.0, segment: d.segment(selector) };
        Place(place(key))
    }
}
