//! The tables by which generated code finds the translation of a RIP: by RIP and context, else by where its code is in
//! RAM.

use hashbrown::HashMap;
use smallvec::SmallVec;

/// Slots of a [`Jumps`]; a power of two. Few, so that they stay in the host's nearer caches: what they forget is found by its
/// place.
const SLOTS: usize = 1 << 10;
/// A RIP times this, within [`SLOT_MASK`], is its slot's offset.
pub const SPREAD: u64 = 9;
pub const SLOT_MASK: u64 = ((SLOTS - 1) * size_of::<Slot>()) as u64;
/// Shift of the RAM offset's upper part in the hash of [`Places`].
pub const FOLD: u8 = 13;

/// A slot.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Slot {
    pub rip: u64,
    /// Host address.
    pub code: u64,
}

/// From a slot's address to that of the other one of its pair, which has what it forgot last: by XOR.
pub const OTHER: i32 = size_of::<Slot>() as i32;

#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct SlotPair([Slot; 2]);

/// No RIP of a pair but the first one is 0.
const EMPTY: SlotPair = SlotPair([Slot { rip: 0, code: 0 }; 2]);
/// Nor is this one the first pair's.
const FIRST_EMPTY: SlotPair = SlotPair([Slot { rip: 32, code: 0 }; 2]);

/// The jump table of a [context](crate::contexts).
pub struct Jumps(Box<[SlotPair]>);

impl Jumps {
    pub fn new() -> Self {
        let mut jumps = Self(vec![EMPTY; SLOTS / 2].into_boxed_slice());
        jumps.clear();
        jumps
    }

    pub fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// A RIP's pair, and which slot there is its own.
    fn pair(&mut self, rip: u64) -> (&mut [Slot; 2], usize) {
        let slot = (rip.wrapping_mul(SPREAD) & SLOT_MASK) as usize / size_of::<Slot>();
        (&mut self.0[slot / 2].0, slot % 2)
    }

    pub fn enter(&mut self, rip: u64, code: u64) {
        let (pair, own) = self.pair(rip);
        if pair[own].rip != rip && pair[own].code != 0 {
            pair[1 - own] = pair[own];
        }
        pair[own] = Slot { rip, code };
    }

    /// Host address of the RIP's translation.
    pub fn find(&mut self, rip: u64) -> Option<u64> {
        let (pair, own) = self.pair(rip);
        let found = [pair[own], pair[1 - own]].into_iter().find(|slot| slot.rip == rip);
        found.map(|slot| slot.code).filter(|&code| code != 0)
    }

    pub fn clear(&mut self) {
        self.0.fill(EMPTY);
        self.0[0] = FIRST_EMPTY;
    }
}

/// Pairs of slots in [`Places`]; a power of two.
pub const PLACES: usize = 1 << 16;
/// log2 of a pair's size.
pub const PAIR_SHIFT: u8 = 5;

/// This bit of a place's offset says that its translation is one of 32-bit code.
pub const NARROW_AT: u8 = 62;

/// A slot of [`Places`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Place {
    /// RAM offset of the block, and [`NARROW_AT`].
    pub offset: u64,
    /// Host address.
    pub code: u64,
}

const NOWHERE: Place = Place { offset: u64::MAX, code: 0 };

/// Two slots, the last one used first.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub struct Pair(pub [Place; 2]);

/// Translations of flat code that lies in one page, by RAM offset, and [`NARROW_AT`]: they hold in whatever context.
pub struct Places(Box<[Pair]>);

impl Places {
    pub fn new() -> Self {
        Self(vec![Pair([NOWHERE; 2]); PLACES].into_boxed_slice())
    }

    pub fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    fn pair(&mut self, offset: u64) -> &mut [Place; 2] {
        &mut self.0[(offset ^ offset >> FOLD) as usize & (PLACES - 1)].0
    }

    /// Knows a translation from now on, if need be instead of another one.
    pub fn enter(&mut self, place: Place) {
        let pair = self.pair(place.offset);
        if pair[0].offset != place.offset {
            pair[1] = pair[0];
        }
        pair[0] = place;
    }

    /// The translation at host address `code`, of what is at `offset`, is no more.
    pub fn forget(&mut self, offset: u64, code: u64) {
        for place in self.pair(offset).iter_mut().filter(|place| place.code == code) {
            *place = NOWHERE;
        }
    }

    pub fn clear(&mut self) {
        self.0.fill(Pair([NOWHERE; 2]));
    }
}

/// Slots of [`Fetches`]; a power of two.
pub const FETCHES: usize = 1 << 11;

/// A slot of [`Fetches`].
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub struct Fetch {
    /// Linear address of the page.
    pub page: u64,
    /// Number of the [context](crate::contexts) that it is fetched in; 0 is none.
    pub context: u64,
    /// What to add to a linear address there to get its RAM offset.
    pub addend: u64,
}

const UNFETCHED: Fetch = Fetch { page: 0, context: 0, addend: 0 };

/// Where pages of the upper half are fetched from, by context, which outlives the MMU's tables. Only pages of RAM that
/// hold a translated block, as fetch stamps speak of no others.
pub struct Fetches {
    slots: Box<[Fetch]>,
    /// By page of RAM: slots that may lead there.
    by_page: HashMap<u64, SmallVec<[u16; 4]>>,
}

impl Fetches {
    pub fn new() -> Self {
        Self { slots: vec![UNFETCHED; FETCHES].into_boxed_slice(), by_page: HashMap::new() }
    }

    pub fn address(&self) -> u64 {
        self.slots.as_ptr() as u64
    }

    /// The code at `rip` has been fetched from RAM offset `offset`.
    pub fn enter(&mut self, rip: u64, context: u32, offset: u64) {
        let page = rip & !0xfff;
        let at = ((page >> 12) as u32 ^ salt(context)) as usize & (FETCHES - 1);
        self.slots[at] = Fetch { page, context: context.into(), addend: offset.wrapping_sub(rip) };
        let known = self.by_page.entry(offset >> 12).or_default();
        if !known.contains(&(at as u16)) {
            known.push(at as u16);
        }
    }

    /// A translated block at `offset` is no more: it may have been its page's last.
    pub fn forget(&mut self, offset: u64) {
        for at in self.by_page.remove(&(offset >> 12)).into_iter().flatten() {
            let slot = &mut self.slots[usize::from(at)];
            if slot.page.wrapping_add(slot.addend) >> 12 == offset >> 12 {
                *slot = UNFETCHED;
            }
        }
    }

    pub fn clear(&mut self) {
        self.slots.fill(UNFETCHED);
        self.by_page.clear();
    }
}

/// What a context changes in the hash, so that several have the same page in slots of their own.
pub fn salt(context: u32) -> u32 {
    context.wrapping_mul(0x9e37_79b1) >> 12
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_rip_is_found_in_an_empty_table() {
        // Generated code compares nothing but the RIP.
        let mut jumps = Jumps::new();
        for empty in jumps.0.clone().iter().flat_map(|pair| pair.0) {
            assert!(jumps.pair(empty.rip).0.iter().all(|slot| slot.rip != empty.rip));
        }
    }

    #[test]
    fn aligned_targets_have_slots_of_their_own() {
        let mut jumps = Jumps::new();
        let targets = (0..SLOTS as u64).map(|n| 0x40_1000 + 16 * n);
        targets.clone().for_each(|rip| jumps.enter(rip, rip));
        assert!(targets.clone().all(|rip| jumps.pair(rip).0.iter().any(|slot| slot.rip == rip)));
    }

    #[test]
    fn two_targets_of_one_slot_are_known() {
        let mut jumps = Jumps::new();
        let (one, two) = (0x40_1230, 0x40_1230 + 16 * SLOTS as u64);
        [one, two, one].into_iter().for_each(|rip| jumps.enter(rip, rip + 1));
        assert_eq!([one, two].map(|rip| jumps.find(rip)), [Some(one + 1), Some(two + 1)]);
    }
}
