//! What a RIP means: which code is there, by the MMU's fetch stamp, and how it is decoded. Each such context has a number,
//! which links are guarded by, and a jump table.

use crate::jumps::Jumps;

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

/// Contexts of a half that are known at a time.
const KNOWN: usize = 64;
/// Slots in which a context is looked for first; a power of two.
const RECENT: usize = 256;

/// A context of one half.
pub struct Context {
    stamp: u64,
    mode: u64,
    /// Not 0, and never another one's.
    pub number: u32,
    pub jumps: Jumps,
}

/// The contexts of a half, the oldest of which a new one replaces.
struct Known {
    contexts: Vec<Context>,
    oldest: usize,
    recent: [u8; RECENT],
}

/// The contexts that are known.
pub struct Contexts {
    /// By [`Half`].
    known: [Known; 2],
    last: u32,
    replaced: Vec<u32>,
}

impl Contexts {
    pub fn new() -> Self {
        let none = || Known { contexts: Vec::new(), oldest: 0, recent: [0; RECENT] };
        Self { known: [none(), none()], last: 0, replaced: Vec::new() }
    }

    /// The context of that fetch stamp and code mode.
    #[inline]
    pub fn get(&mut self, half: Half, stamp: u64, mode: u64) -> &mut Context {
        let known = &mut self.known[half as usize];
        let recent = (stamp ^ stamp >> 8 ^ mode >> 37) as usize % RECENT;
        let at = usize::from(known.recent[recent]);
        let is_it = |context: &Context| (context.stamp, context.mode) == (stamp, mode);
        let at = if known.contexts.get(at).is_some_and(is_it) {
            at
        } else {
            let found = known.contexts.iter().position(is_it);
            found.unwrap_or_else(|| self.add(half, stamp, mode))
        };
        let known = &mut self.known[half as usize];
        known.recent[recent] = at as u8;
        &mut known.contexts[at]
    }

    fn add(&mut self, half: Half, stamp: u64, mode: u64) -> usize {
        self.last += 1;
        let number = self.last;
        let known = &mut self.known[half as usize];
        if known.contexts.len() < KNOWN {
            known.contexts.push(Context { stamp, mode, number, jumps: Jumps::new() });
            return known.contexts.len() - 1;
        }
        let at = known.oldest;
        known.oldest = (at + 1) % KNOWN;
        let context = &mut known.contexts[at];
        self.replaced.push(context.number);
        (context.stamp, context.mode, context.number) = (stamp, mode, number);
        context.jumps.clear();
        at
    }

    /// Numbers of the contexts that were replaced since this was asked last: their jump tables are other ones'.
    #[inline]
    pub fn take_replaced(&mut self) -> impl Iterator<Item = u32> {
        self.replaced.drain(..)
    }

    /// Forgets all translations.
    pub fn clear_jumps(&mut self) {
        self.known.iter_mut().flat_map(|known| &mut known.contexts).for_each(|context| context.jumps.clear());
    }

    /// Whether numbers are about to run out, so that everything has to be forgotten.
    pub fn is_exhausted(&self) -> bool {
        self.last > u32::MAX - 16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_context_is_replaced_and_its_jump_table_emptied() {
        let mut contexts = Contexts::new();
        let first = contexts.get(Half::Lower, 1, 0).number;
        contexts.get(Half::Lower, 1, 0).jumps.enter(0x401000, 7);
        let upper = contexts.get(Half::Upper, 1, 0).number;
        for stamp in 2..=KNOWN as u64 {
            contexts.get(Half::Lower, stamp, 0);
        }
        assert_eq!(contexts.get(Half::Lower, 1, 0).jumps.find(0x401000), Some(7));
        assert_eq!(contexts.take_replaced().count(), 0);
        let table = contexts.get(Half::Lower, 1, 0).jumps.address();
        let new = contexts.get(Half::Lower, 1, 1);
        assert_eq!((new.jumps.address(), new.jumps.find(0x401000)), (table, None));
        assert_eq!(contexts.take_replaced().collect::<Vec<_>>(), [first]);
        let again = contexts.get(Half::Lower, 1, 0).number;
        assert_ne!(again, first, "links that are guarded by the old number don't hold");
        assert_eq!(contexts.get(Half::Upper, 1, 0).number, upper);
    }
}
