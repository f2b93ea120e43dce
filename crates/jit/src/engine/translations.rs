//! Translations: made, found by block, forgotten.

use super::links::KnownExit;
use super::{Engine, LARGEST};
use crate::contexts::Half;
use crate::frame::place_salt;
use crate::jumps::{NARROW_AT, Place};
use crate::listing::{self, Translated};
use crate::mechanisms::Mechanism;
use crate::traces::{Each, trace};
use crate::translate::{Code, Offsets, Settings, Source, Tools, dropped_code, jump, translate};
use smallvec::smallvec;
use umbra_cpu::block::{Block, is_relative};
use umbra_cpu::core::code_bits;
use umbra_memory::RamOffset;

/// How a block has run. Kept apart from translations, which most blocks that are interpreted have none of.
#[derive(Clone, Copy, Default)]
pub(super) struct Runs {
    /// How often it was interpreted, up to the threshold; a translated one has that.
    pub count: u8,
    /// How often it was left for another one than that behind it.
    pub went: u8,
}

/// A block's translation.
#[derive(Clone, Copy)]
pub(super) struct Translation {
    /// Offset in the code memory.
    pub entry: usize,
    /// RIP of its first instruction, from [`CODE_BASE`].
    pub rip: u64,
    /// RIP when it was made.
    pub seen_at: u64,
    /// RAM offset and code mode of the block.
    pub offset: u64,
    pub mode: u64,
    pub crosses: bool,
    /// What its head takes from the budget.
    pub charge: u32,
}

/// What is of use from one translation to the next.
#[derive(Default)]
pub(super) struct Kept {
    tools: Tools,
    /// A buffer for the bytes of the guest's code.
    bytes: Vec<u8>,
}

impl Translation {
    /// Whether it can be found by where its code is.
    pub(super) fn is_placed(&self) -> bool {
        !self.crosses && self.is_relative()
    }

    fn is_relative(&self) -> bool {
        is_relative(self.mode, self.rip)
    }

    /// What it is found by there.
    fn place(&self) -> u64 {
        self.offset | place_salt(self.mode) | u64::from(code_bits(self.mode) != 64) << NARROW_AT
    }
}

impl Engine {
    /// Translations of dropped blocks become lookups of their RIP; so do those to be made anew.
    pub(super) fn forget_dropped(&mut self) {
        for number in self.misses.take_again() {
            self.forget(number, true);
        }
        for number in self.interp.take_dropped() {
            self.misses.forget_block(number);
            self.moved.remove(&number);
            self.samples.remove(&number);
            self.runs.get_mut(number as usize).into_iter().for_each(|runs| runs.went = 0);
            if self.forget(number, false) {
                self.stats.dropped += 1;
            }
        }
    }

    /// Forgets a block's translation, and those it is a part of. True if it had one of its own. The next one is gone to
    /// from there, too, if the block is to be translated `again` as soon as it is run.
    pub(super) fn forget(&mut self, number: u32, again: bool) -> bool {
        for first in self.traces.remove(&number).into_iter().flatten() {
            self.forget(first, true);
        }
        let Some(runs) = self.runs.get_mut(number as usize) else { return false };
        runs.count = if again { self.options.threshold } else { 0 };
        let Some(old) = self.translations[number as usize].take() else { return false };
        let code = dropped_code(old.entry, old.rip, old.is_relative(), &self.stubs);
        self.patch(old.entry, &code);
        if again {
            self.moved.entry(number).or_default().push((old.entry, Half::of(old.seen_at)));
        }
        self.fetches.forget(old.offset);
        self.places.forget(old.place(), self.code.address() + old.entry as u64);
        true
    }

    pub(super) fn patch(&mut self, at: usize, code: &[u8]) {
        let patched = self.code.patch(at, code);
        debug_assert!(patched.is_ok(), "{at:#x} lies beyond the code in use");
    }

    /// The block's translation, made if it has become hot.
    pub(super) fn translation(&mut self, number: u32) -> Option<Translation> {
        let index = number as usize;
        if index >= self.runs.len() {
            self.runs.resize(index + 1, Runs::default());
            self.translations.resize(index + 1, None);
        }
        if self.runs[index].count == 0 && self.interp.blocks().block(number).is_variant() {
            self.begin_as_plain(number);
        }
        let runs = &mut self.runs[index].count;
        if *runs < self.options.threshold {
            *runs += 1;
            return None;
        }
        self.translations[index].or_else(|| self.translate(number))
    }

    /// What is known of how the same block runs without windows.
    fn begin_as_plain(&mut self, number: u32) {
        let plain = self.interp.blocks().without_variant(number);
        if let Some(runs) = plain.and_then(|plain| self.runs.get(plain as usize).copied()) {
            self.runs[number as usize] = runs;
        }
    }

    pub(super) fn translate(&mut self, number: u32) -> Option<Translation> {
        if self.stats.translated >= self.options.limit {
            return None;
        }
        if self.code.room() < LARGEST || self.exits.len() > 1 << 30 {
            self.forget_everything();
        }
        let block = self.interp.blocks().block(number);
        // Ticks and instructions are counted by one register.
        if block.cost as usize != block.ops.len() {
            return None;
        }
        if !self.options.legacy && !block.is_relative() {
            return None;
        }
        let (at, rip) = (self.next(), self.interp.core().next_rip);
        let entry = at.often;
        let mut kept = self.tools.take().unwrap_or_default();
        let (trace, mut code) = self.translated(number, at, Half::of(rip), &mut kept);
        let (often, rare) = code.bytes.split_at(code.often);
        self.code.append(often).ok()?;
        self.code.append_rare(rare).ok()?;
        if let Some(mut listener) = self.listener.take() {
            listener(&self.listed(&trace, rip, &code, at));
            self.listener = Some(listener);
        }
        self.stats.translated += 1;
        self.stats.translated_ops += (code.starts.len() - 1) as u64;
        self.stats.translated_helpers += code.helpers as u64;
        let charge = code.charge;
        self.windows.faults.add(&code.faults);
        self.exits.extend(code.exits.drain(..).map(|exit| KnownExit { exit, number, entry: entry as u32 }));
        kept.tools.take_back(code);
        self.tools = Some(kept);
        let translation = Translation {
            entry,
            rip: block.rip,
            seen_at: rip,
            offset: block.offset(),
            mode: block.mode(),
            crosses: block.crosses(),
            charge,
        };
        if translation.is_placed() && !self.options.off.has(Mechanism::Jumps) {
            let code = self.code.address() + entry as u64;
            self.places.enter(Place { offset: translation.place(), code });
        }
        for (old, half) in self.moved.remove(&number).unwrap_or_default() {
            if half == Half::of(rip) {
                self.patch(old, &jump(old, entry));
            }
        }
        self.translations[number as usize] = Some(translation);
        for &member in &trace {
            self.interp.keep_block(member);
        }
        for &member in trace.iter().filter(|&&member| member != number) {
            let firsts = self.traces.entry(member).or_default();
            if !firsts.contains(&number) {
                firsts.push(number);
            }
        }
        Some(translation)
    }

    pub(super) fn listed(&self, trace: &[u32], rip: u64, code: &Code, at: Offsets) -> Translated {
        let base = self.code.address();
        let blocks: Vec<_> = trace.iter().map(|&number| self.interp.blocks().block(number)).collect();
        debug_assert!(blocks[1..].iter().all(|block| !block.crosses()), "traces lie in a page");
        let mut guest = Vec::new();
        trace.iter().for_each(|&number| self.append_bytes(number, &mut guest));
        Translated::of(&blocks, rip, guest, code, (base, at), listing::names(&self.stubs, base))
    }

    /// Where the next translation goes.
    pub(super) fn next(&self) -> Offsets {
        Offsets { often: self.code.next(), rare: self.code.next_rare() }
    }

    /// The blocks that a block is translated with, and host code of all of them for these offsets of the code memory.
    pub(super) fn translated(
        &self,
        number: u32,
        at: Offsets,
        half: Half,
        Kept { tools, bytes }: &mut Kept,
    ) -> (Each<u32>, Code) {
        let (off, blocks) = (self.options.off, self.interp.blocks());
        let alone = off.has(Mechanism::Traces);
        let mut trace = if alone {
            smallvec![number]
        } else {
            trace(number, blocks, &self.interp.core().mem, |number| self.goes(number))
        };
        bytes.clear();
        trace.iter().for_each(|&number| self.append_bytes(number, bytes));
        let mut left = &bytes[..];
        let sources = trace.iter().map(|&number| Source {
            block: blocks.block(number),
            number,
            bytes: take_bytes(&mut left, blocks.block(number)),
            missing: if off.has(Mechanism::Ranges) { u64::MAX } else { self.misses.operations(number) },
            hot: self.samples.get(&number).copied().unwrap_or(0) >= self.options.hot_after,
            alone: if blocks.block(number).is_variant() { u32::MAX } else { self.misses.alone(number) },
        });
        let sources: Each<_> = sources.collect();
        let uses_windows = blocks.block(number).is_variant();
        let windows = if uses_windows { self.windows.guess(self.interp.core()) } else { None };
        let code =
            translate(&sources, at, self.exits.len(), Settings { half, off, stubs: &self.stubs, windows }, tools);
        trace.truncate(code.parts);
        (trace, code)
    }

    /// The budget was used up at block `number`'s head, as it is now and then: time is spent there. Where it often is, range
    /// registers are worth looking for, and what they miss is known soon.
    pub(super) fn sample(&mut self, number: u32) {
        let samples = self.samples.entry(number).or_default();
        *samples = samples.saturating_add(1);
        if *samples == self.options.hot_after && !self.options.off.has(Mechanism::Ranges) {
            self.misses.translate_again(number);
        }
    }

    /// Whether a block has mostly been left for another than the one behind it, if that is known.
    fn goes(&self, number: u32) -> Option<bool> {
        let Runs { count, went } = *self.runs.get(number as usize)?;
        (count > 0).then_some(2 * u32::from(went) > count.into())
    }

    /// Interpreted block `number`, which began at RIP `from`, has been left.
    pub(super) fn note_way(&mut self, number: u32, from: u64) {
        let block = self.interp.blocks().block(number);
        let behind = from.wrapping_sub(block.rip).wrapping_add(block.end_rip);
        let went = self.interp.core().next_rip != behind;
        if let Some(runs) = self.runs.get_mut(number as usize) {
            runs.went = runs.went.saturating_add(went.into());
        }
    }

    /// Appends the bytes of a block.
    fn append_bytes(&self, number: u32, bytes: &mut Vec<u8>) {
        for (offset, len) in self.interp.blocks().block(number).pieces() {
            let at = bytes.len();
            bytes.resize(at + len as usize, 0);
            self.interp.core().mem.load_bytes(RamOffset::new(offset), &mut bytes[at..]);
        }
    }

    /// Empties the code memory.
    pub(super) fn forget_everything(&mut self) {
        self.code.truncate(self.stubs_end);
        self.translations.fill(None);
        self.runs.iter_mut().for_each(|runs| runs.count = 0);
        self.exits.clear();
        self.traces.clear();
        self.moved.clear();
        self.misses.forget_code();
        self.windows.forget_code();
        self.contexts.clear_jumps();
        self.fetches.clear();
        self.places.clear();
        self.pending = None;
        self.stats.emptied += 1;
    }
}

/// Those of a block's bytes that `left` begins with.
fn take_bytes<'a>(left: &mut &'a [u8], block: &Block) -> &'a [u8] {
    let (own, others) = left.split_at(block.bytes() as usize);
    *left = others;
    own
}
