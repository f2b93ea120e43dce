//! A first look at an address whose page the fast table lacks: without a frame of its own, so that whoever asks needn't save
//! registers to hear that there is a fault.

use super::Last;
use crate::hints::Hint;
use crate::mmu::{Mmu, Translation};
use crate::rights;
use umbra_arch::paging::{Access, entry};
use umbra_arch::{Fault, Gva};

/// Where the way to a linear address ends in the shadow tree, in one word, to be handed on until anything else is done
/// with the MMU: the index of the last page, that of the entry, the rights above.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct End(u64);

impl End {
    const AT: u32 = 32;
    const ABOVE: u32 = 48;

    #[inline(always)]
    fn of(hint: &Hint, at: usize) -> Self {
        Self(u64::from(hint.index) | (at as u64) << Self::AT | hint.above << Self::ABOVE)
    }
}

/// What a first look at the end of the way to a linear address gives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Look {
    /// The access faults with this error code: there is an entry without P. Counted as a walk.
    Faults(u32),
    /// A translation has to look further from here.
    Ends(End),
    /// Nothing.
    Unknown,
}

impl Mmu {
    /// Looks at the end of the way to `gva`, if that is known and nothing else asks for attention.
    #[inline(always)]
    pub fn look_at_end(&mut self, gva: Gva, access: Access) -> Look {
        if self.mem.generation() != self.mem_generation || self.drops_at_random() || self.events.is_on() {
            return Look::Unknown;
        }
        let Some(hint) = self.hints.get(gva.raw(), self.current) else { return Look::Unknown };
        // Without a panic on the way, nothing needs a frame.
        let Some(page) = self.shadow.try_page(hint.index) else { return Look::Unknown };
        let at = page.index(gva.raw());
        let Some(&found) = page.entries.get(at) else { return Look::Unknown };
        if found.is_link() {
            return Look::Unknown;
        }
        if found.is_present() || page.guest_entry(&self.mem, at) & entry::P != 0 {
            return Look::Ends(End::of(hint, at));
        }
        self.stats.walks += 1;
        self.stats.entries_read += 1;
        Look::Faults(rights::attempt_code(access, &self.view))
    }

    /// As [`translate`](Self::translate) from where [`look_at_end`](Self::look_at_end) ended.
    ///
    /// # Errors
    /// As [`translate`](Self::translate).
    #[inline(always)]
    pub fn translate_from(&mut self, gva: Gva, access: Access, end: End) -> Result<Translation, Fault> {
        let (index, at) = (end.0 as u32, (end.0 >> End::AT) as u16 as usize);
        let entry = self.shadow.page(index).entries[at];
        self.translate_last(gva, access, &Last { index, at, entry, above: end.0 >> End::ABOVE })
    }
}
