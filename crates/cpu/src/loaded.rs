//! Segments loaded lately: what checking a descriptor of the GDT came to, which holds for as long as its bytes say the
//! same and are looked at by the same rules.

use crate::core::Core;
use crate::segments::ACCESSED;
use umbra_arch::descriptor::{Descriptor, Gate};
use umbra_arch::segment::Segment;
use umbra_arch::{Gva, rflags};

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

const ENTRANCES: usize = 8;

/// Where a gate of 32 bits leads without a change of level: nothing but its bytes and the descriptor's decides that.
#[derive(Clone, Copy)]
pub(crate) struct Entrance {
    /// The gate's bytes.
    pub gate: u64,
    /// The descriptor's.
    pub descriptor: u64,
    /// Offset of the handler, within the segment's limit.
    pub offset: u64,
    /// RFLAGS bits that stay.
    pub keep: u64,
    /// The handler's code segment, its selector as CS will hold it.
    pub handler: Segment,
    /// Offset of the descriptor in the GDT.
    pub index: u16,
    /// The level that it is entered from.
    cpl: u8,
    /// The gate's DPL.
    pub dpl: u8,
}

impl Default for Entrance {
    fn default() -> Self {
        let handler = Segment::default();
        Self { gate: 0, descriptor: 0, offset: 0, keep: 0, handler, index: 0, cpl: u8::MAX, dpl: 0 }
    }
}

/// A segment that IRETD returns to, without a change of level.
#[derive(Clone, Copy)]
pub(crate) struct WayBack {
    selector: u16,
    cpl: u8,
    /// The descriptor's bytes.
    pub descriptor: u64,
    /// What it gives.
    pub segment: Segment,
}

impl Default for WayBack {
    fn default() -> Self {
        Self { selector: 0, cpl: u8::MAX, descriptor: 0, segment: Segment::default() }
    }
}

#[derive(Default)]
#[repr(C)]
struct Tables {
    kept: [Loaded; KEPT],
    entrances: [Entrance; ENTRANCES],
    way_back: WayBack,
}

/// The segments loaded last, by selector, and the entrances used last, by vector.
#[derive(Default)]
pub struct LoadedSegments(Box<Tables>);

/// Where a segment loaded lately is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place(usize);

impl LoadedSegments {
    /// What is known of a return to `selector` at `cpl`.
    #[inline(always)]
    pub(crate) fn way_back(&self, selector: u16, cpl: u8) -> Option<&WayBack> {
        let known = &self.0.way_back;
        (known.selector == selector && known.cpl == cpl).then_some(known)
    }

    /// The descriptor of the segment that IRETD returned to has changed.
    #[cold]
    pub(crate) fn forget_way_back(&mut self) -> Option<()> {
        self.0.way_back = WayBack::default();
        None
    }

    /// Nothing is known of the gate for vector `v`: its segment's descriptor has changed.
    #[cold]
    pub(crate) fn forget_entrance(&mut self, v: u8) -> Option<()> {
        self.0.entrances[usize::from(v) % ENTRANCES] = Entrance::default();
        None
    }

    /// What is known of the gate with these bytes for vector `v`, entered from `cpl`.
    #[inline(always)]
    pub(crate) fn entrance(&self, v: u8, gate: u64, cpl: u8) -> Option<&Entrance> {
        let known = &self.0.entrances[usize::from(v) % ENTRANCES];
        (known.gate == gate && known.cpl == cpl).then_some(known)
    }

    /// The segment there; another one may take its place when the next is loaded.
    #[inline(always)]
    pub fn at(&self, place: Place) -> &Segment {
        &self.0.kept[place.0 % KEPT].segment
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
        let known = &self.loaded.0.kept[place(key)];
        let index = u64::from(selector & 0xfff8);
        if known.key != key || index + 7 > u64::from(self.s.gdtr.limit) {
            return None;
        }
        let at = self.s.gdtr.base.wrapping_add(index);
        let at = if long { at } else { at & 0xffff_ffff };
        let off = self.mmu.lookup_system_read(Gva::new(at), 8)?;
        (self.mem.load::<u64>(off) == known.raw).then_some(Place(place(key)))
    }

    /// The descriptor at `index` in the GDT outside IA-32e mode, if it is found at once.
    #[inline(always)]
    pub(crate) fn descriptor_at_once(&self, index: u16) -> Option<u64> {
        if index | 7 > self.s.gdtr.limit {
            return None;
        }
        let at = self.s.gdtr.base.wrapping_add(index.into()) & 0xffff_ffff;
        Some(self.mem.load(self.mmu.lookup_system_read(Gva::new(at), 8)?))
    }

    /// Learns where the 32-bit gate with these bytes for vector `v` leads, if that is to the present level.
    #[inline(never)]
    pub(crate) fn learn_entrance(&mut self, v: u8, bytes: u64) -> Option<()> {
        let (gate, cpl) = (Gate::legacy(bytes), self.s.cpl);
        if gate.attr.0 & 0x9e != 0x8e {
            return None;
        }
        let place = self.loaded_before_in(gate.selector, Rules::Handler(cpl), false)?;
        let (descriptor, cs) = (self.loaded.0.kept[place.0 % KEPT].raw, self.loaded.at(place));
        let level = if cs.attr.is_conforming() { cpl } else { cs.attr.dpl() };
        if level != cpl || gate.offset > u64::from(cs.limit) {
            return None;
        }
        let mut clear = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
        if gate.attr.kind() & 1 == 0 {
            clear |= rflags::IF;
        }
        self.loaded.0.entrances[usize::from(v) % ENTRANCES] = Entrance {
            gate: bytes,
            descriptor,
            offset: gate.offset,
            keep: !clear,
            handler: Segment { selector: cs.selector & !3 | u16::from(cpl), ..*cs },
            index: gate.selector & 0xfff8,
            cpl,
            dpl: gate.attr.dpl(),
        };
        Some(())
    }

    /// Learns what a return to `selector` comes to outside IA-32e mode, if that is at the present level.
    #[inline(never)]
    pub(crate) fn learn_way_back(&mut self, selector: u16) -> Option<()> {
        let cpl = self.s.cpl;
        if (selector & 3) as u8 != cpl {
            return None;
        }
        let place = self.loaded_before_in(selector, Rules::Return(cpl), false)?;
        let Loaded { raw: descriptor, segment, .. } = self.loaded.0.kept[place.0 % KEPT];
        self.loaded.0.way_back = WayBack { selector, cpl, descriptor, segment };
        Some(())
    }

    /// What loading `selector` by `rules` came to before, and its descriptor, which hasn't changed since: that descriptor
    /// always comes to this in IA-32e mode, if that is the present one.
    pub fn known_segment(&self, selector: u16, rules: Rules) -> Option<(u64, Segment)> {
        let known = &self.loaded.0.kept[self.loaded_before(selector, rules)?.0 % KEPT];
        Some((known.raw, known.segment))
    }

    /// The segment that `selector` with descriptor `d` gives, whose accessed bit is set; `rules` had nothing against it.
    pub fn loads(&mut self, selector: u16, d: Descriptor, rules: Rules) -> Place {
        let d = Descriptor(d.0 | ACCESSED);
        let key = rules.key(selector, self.s.efer.lma());
        // Of the LDT, which may be another one next time, none is found again.
        let found = if selector & 4 == 0 { key } else { 0 };
        self.loaded.0.kept[place(key)] = Loaded { key: found, raw: d.0, segment: d.segment(selector) };
        Place(place(key))
    }
}
