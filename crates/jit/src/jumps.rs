//! The tables by which generated code finds the translation of a RIP: by RIP and context, else by where its code is in
//! RAM.

/// Slots; a power of two.
pub const SLOTS: usize = 1 << 15;
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

/// Slots of [`Places`]; a power of two.
pub const PLACES: usize = 1 << 16;

/// A slot of [`Places`].
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub struct Place {
    /// RAM offset of the block.
    pub offset: u64,
    pub mode: u64,
    /// Host address.
    pub code: u64,
}

const NOWHERE: Place = Place { offset: u64::MAX, mode: 0, code: 0 };

/// Translations of 64-bit code that lies in one page, by RAM offset and code mode: they hold in whatever context.
pub struct Places(Box<[Place]>);

impl Places {
    pub fn new() -> Self {
        Self(vec![NOWHERE; PLACES].into_boxed_slice())
    }

    pub fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    fn slot(&mut self, offset: u64) -> &mut Place {
        &mut self.0[(offset ^ offset >> FOLD) as usize & (PLACES - 1)]
    }

    pub fn enter(&mut self, place: Place) {
        *self.slot(place.offset) = place;
    }

    /// The translation at host address `code` is no more.
    pub fn forget(&mut self, offset: u64, code: u64) {
        let slot = self.slot(offset);
        if slot.code == code {
            *slot = NOWHERE;
        }
    }

    pub fn clear(&mut self) {
        self.0.fill(NOWHERE);
    }
}

/// What a context changes in the hash, so that several have the same RIP in slots of their own.
pub fn salt(context: u32) -> u32 {
    context.wrapping_mul(0x9e37_79b1) >> 12
}

/// Numbers for pairs of fetch stamp and code mode, so that generated code compares 32 bits.
pub struct Contexts {
    recent: Box<[(u64, u64, u32)]>,
    last: u32,
}

impl Contexts {
    pub fn new() -> Self {
        Self { recent: vec![(0, 0, 0); 256].into_boxed_slice(), last: 0 }
    }

    /// The pair's number; a pair that was forgotten gets a new one.
    pub fn number(&mut self, stamp: u64, mode: u64) -> u32 {
        let slot = &mut self.recent[(stamp ^ stamp >> 8 ^ mode >> 37) as usize & 0xff];
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
