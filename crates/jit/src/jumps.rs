//! The tables by which generated code finds the translation of a RIP: by RIP and context, else by where its code is in
//! RAM.

use smallvec::SmallVec;
use std::collections::HashMap;

/// Slots; a power of two. Few, so that they stay in the host's nearer caches: what they forget is found by its place.
pub const SLOTS: usize = 1 << 12;
/// Shift of the RIP's upper part in the hash.
pub const FOLD: u8 = 13;
/// log2 of a slot's size.
pub const SLOT_SHIFT: u8 = 5;

/// A slot.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub struct Slot {
    pub rip: u64,
    /// Number of the context in which `rip` was fetched; 0 is none.
    pub context: u64,
    /// Host address.
    pub code: u64,
    /// What RIPs in the translation count from.
    pub base: u64,
}

const EMPTY: Slot = Slot { rip: 0, context: 0, code: 0, base: 0 };

/// The table.
pub struct Jumps(Box<[Slot]>);

impl Jumps {
    pub fn new() -> Self {
        Self(vec![EMPTY; SLOTS].into_boxed_slice())
    }

    pub fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    fn slot(&mut self, rip: u64, context: u32) -> &mut Slot {
        let hash = (rip ^ rip >> FOLD) as u32 ^ salt(context);
        &mut self.0[hash as usize & (SLOTS - 1)]
    }

    pub fn enter(&mut self, rip: u64, context: u32, code: u64, base: u64) {
        *self.slot(rip, context) = Slot { rip, context: context.into(), code, base };
    }

    /// The slot of the RIP's translation.
    pub fn find(&mut self, rip: u64, context: u32) -> Option<Slot> {
        let slot = self.slot(rip, context);
        (slot.rip == rip && slot.context == u64::from(context)).then_some(*slot)
    }

    pub fn clear(&mut self) {
        self.0.fill(EMPTY);
    }
}

/// Pairs of slots in [`Places`]; a power of two.
pub const PLACES: usize = 1 << 16;
/// log2 of a pair's size.
pub const PAIR_SHIFT: u8 = 5;

/// A slot of [`Places`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Place {
    /// RAM offset of the block.
    pub offset: u64,
    /// Host address.
    pub code: u64,
}

const NOWHERE: Place = Place { offset: u64::MAX, code: 0 };

/// Two slots, the last one used first.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub struct Pair(pub [Place; 2]);

/// Translations of 64-bit code that lies in one page, by RAM offset: they hold in whatever context.
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
    /// See [`Slot::context`].
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

/// The halves of the canonical addresses: what code there is fetched by is numbered by itself, as the upper one is the
/// same in many address spaces.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Half {
    Lower,
    Upper,
}

impl Half {
    pub const BOTH: [Half; 2] = [Half::Lower, Half::Upper];

    pub fn of(rip: u64) -> Self {
        if rip >> 63 == 0 { Half::Lower } else { Half::Upper }
    }
}

/// What a context changes in the hash, so that several have the same RIP in slots of their own.
pub fn salt(context: u32) -> u32 {
    context.wrapping_mul(0x9e37_79b1) >> 12
}

/// Numbers for pairs of fetch stamp and code mode, so that generated code compares 32 bits.
pub struct Contexts {
    /// By [`Half`].
    recent: [Box<[(u64, u64, u32)]>; 2],
    last: u32,
}

impl Contexts {
    pub fn new() -> Self {
        Self { recent: [(); 2].map(|()| vec![(0, 0, 0); 256].into_boxed_slice()), last: 0 }
    }

    /// The pair's number; a pair that was forgotten gets a new one.
    #[inline]
    pub fn number(&mut self, half: Half, stamp: u64, mode: u64) -> u32 {
        let slot = &mut self.recent[half as usize][(stamp ^ stamp >> 8 ^ mode >> 37) as usize & 0xff];
        if (slot.0, slot.1) != (stamp, mode) || slot.2 == 0 {
            self.last += 1;
            *slot = (stamp, mode, self.last);
        }
        slot.2
    }

    /// Whether numbers are about to run out, so that everything has to be forgotten.
    pub fn is_exhausted(&self) -> bool {
        self.last > u32::MAX - 16
    }
}
