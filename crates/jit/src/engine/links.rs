//! Jumps from a translation straight to another.

use super::translations::Translation;
use super::{Engine, rip_mask};
use crate::contexts::Half;
use crate::emitter::displacement;
use crate::translate::{Exit, other_code};
use umbra_cpu::core::code_bits;

/// A direct exit, and the translation it belongs to.
pub(super) struct KnownExit {
    pub exit: Exit,
    pub number: u32,
    pub entry: u32,
}

impl Engine {
    /// Lets exit `number`, where RIPs count from `base`, go to `to` at `rip` directly, if that is what it goes to; in
    /// `context` if it leaves the page.
    pub(super) fn link(&mut self, number: usize, base: u64, to: &Translation, rip: u64, context: u32) {
        let Some(known) = self.exits.get(number) else { return };
        let (exit, from) = (known.exit, known.entry as usize);
        let source = self.translations.get(known.number as usize).and_then(Option::as_ref);
        let Some(source) = source.filter(|it| base.wrapping_add(exit.target) & rip_mask(it.mode) == rip) else {
            return;
        };
        let half = Half::of(source.seen_at);
        if source.entry != from || half != Half::of(base) || half != Half::of(rip) {
            return;
        }
        let same_page = source.offset >> 12 == to.offset >> 12 && source.mode == to.mode && !to.crosses;
        let (jump, unlinked) = (exit.jump as usize, exit.unlinked as usize);
        let other = other_code(unlinked, number as u32, exit.target, code_bits(source.mode), &self.stubs);
        match exit.guard {
            Some(guard) => {
                self.patch(guard.context as usize, &context.to_le_bytes());
                self.patch(guard.base as usize, &base.to_le_bytes());
                self.patch(jump, &displacement(jump, to.entry));
            }
            // What was fetched from this page comes from it as long as the block itself does.
            None if same_page => self.patch(jump, &displacement(jump, to.entry)),
            None => {}
        }
        self.patch(unlinked, &other);
        self.stats.linked += 1;
    }
}
