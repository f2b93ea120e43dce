//! Canonical blocks and their cache.
//!
//! A block starts at a control-flow target or resume point and ends at a branch, a serialising or I/O
//! instruction, the page's end, or after [`MAX_OPS`] instructions. An instruction that crosses a page is a
//! block of its own. Blocks are found by RAM offset and code mode, in segments that aren't flat by RIP, too: flat code is
//! the same wherever its page is mapped, as everything in it counts from [`CODE_BASE`](crate::op::CODE_BASE). RAM lines
//! they were decoded from are marked, so that any store to such a line drops exactly the blocks on it.

mod aging;
mod pages;

use crate::core::{CODE_VARIANT, CodeSize, Core, code_bits, is_flat_mode};
use crate::decode::{DecodeError, decode_next, resolve};
use crate::isa::{self, Ends};
use crate::op::{Flow, Op, Stop};
use iced_x86::{Decoder, DecoderOptions};
use pages::Pages;
use smallvec::SmallVec;
use umbra_arch::paging::{Access, AccessKind};
use umbra_arch::segment::Seg;
use umbra_arch::{Bus, Fault, Gva, PAGE_SIZE};
use umbra_memory::{Backing, PageFlags, RamOffset};

/// Most instructions in a block.
pub const MAX_OPS: usize = 32;
/// Most blocks in the cache; then it starts over.
const MAX_BLOCKS: usize = 1 << 17;
const JUMP_SLOTS: usize = 1 << 14;
/// Ticks that one instruction costs until there is a cycle model.
const COST: u32 = 1;

/// Where a block went before: tried before the jump table. Holds only while the fetch stamp is the same and
/// the target's number still means the block it meant.
#[derive(Clone, Copy)]
struct Link {
    rip: u64,
    stamp: u64,
    block: u32,
    generation: u32,
}

const NO_LINK: Link = Link { rip: 0, stamp: u64::MAX, block: 0, generation: u32::MAX };

/// A decoded block. What the loop reads comes first.
#[repr(C)]
pub struct Block {
    /// RIP of its first instruction from [`CODE_BASE`](crate::op::CODE_BASE).
    pub rip: u64,
    /// RIP behind its last, likewise.
    pub end_rip: u64,
    /// Its operations.
    pub ops: Box<[Op]>,
    links: [Link; 2],
    /// Cost of all of it.
    pub cost: u32,
    /// Counts the blocks that had this number.
    generation: u32,
    valid: bool,
    /// Asked for since the last look at what is in use.
    used: bool,
    kept: bool,
    /// Bytes in its first page.
    len: u32,
    offset: u64,
    mode: u64,
    /// Where its one instruction goes on, if it crosses a page.
    second: Option<Box<Second>>,
}

/// The part of an instruction that lies in the next page.
struct Second {
    offset: u64,
    len: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    offset: u64,
    /// See [`Block::rip`].
    rip: u64,
    mode: u64,
}

#[derive(Clone, Copy)]
struct Jump {
    rip: u64,
    stamp: u64,
    mode: u64,
    block: u32,
    generation: u32,
}

const NO_JUMP: Jump = Jump { rip: 1, stamp: u64::MAX, mode: u64::MAX, block: 0, generation: u32::MAX };

/// What a block is found by besides its place.
#[inline(always)]
fn mode_of(c: &Core) -> u64 {
    c.code_mode | c.code_variant
}

impl Block {
    /// RAM offset of its first byte.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u32 {
        self.pieces().map(|(_, len)| len).sum()
    }

    /// The index of one of its operations.
    #[cold]
    #[inline(never)]
    pub(crate) fn index_of(&self, op: &Op) -> usize {
        std::ptr::from_ref(op).addr().wrapping_sub(self.ops.as_ptr().addr()) / size_of::<Op>()
    }

    /// Code mode it was decoded for, as [`Core::code_mode`].
    pub fn mode(&self) -> u64 {
        self.mode
    }

    /// Code size: 16, 32 or 64.
    pub fn bits(&self) -> u32 {
        code_bits(self.mode)
    }

    /// Whether it is 16- or 32-bit code.
    pub fn is_legacy(&self) -> bool {
        self.bits() != 64
    }

    /// Whether its RIPs count from its page: 64-bit code, and 32-bit code in flat segments but for the last page, behind
    /// which RIP wraps.
    pub fn is_relative(&self) -> bool {
        is_relative(self.mode, self.rip)
    }

    /// Whether it is relative 32-bit code: addresses, RIPs and the stack pointer have 32 bits.
    pub fn is_narrow(&self) -> bool {
        self.is_legacy() && self.is_relative()
    }

    /// Whether it was found by an engine's [`CODE_VARIANT`].
    pub fn is_variant(&self) -> bool {
        self.mode & CODE_VARIANT != 0
    }

    /// Whether its one instruction goes on in another page.
    pub fn crosses(&self) -> bool {
        self.second.is_some()
    }

    fn key(&self) -> Key {
        Key { offset: self.offset, rip: self.rip, mode: self.mode }
    }

    /// The bytes it was decoded from: RAM offset and length in each page.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, u32)> + use<> {
        let second = self.second.as_ref().map(|second| (second.offset, second.len));
        std::iter::once((self.offset, self.len)).chain(second)
    }
}

/// All decoded blocks.
pub struct BlockCache {
    blocks: Vec<Block>,
    free: Vec<u32>,
    jumps: Box<[Jump; JUMP_SLOTS]>,
    pages: Pages,
    /// Blocks built since the last look at what is in use.
    built: usize,
    /// Numbers of dropped blocks, if somebody wants to know.
    dropped: Option<Vec<u32>>,
}

impl Default for BlockCache {
    fn default() -> Self {
        Self {
            blocks: Vec::new(),
            free: Vec::new(),
            jumps: no_jumps(),
            pages: Pages::default(),
            built: 0,
            dropped: None,
        }
    }
}

/// Made on the heap: half a megabyte.
fn no_jumps() -> Box<[Jump; JUMP_SLOTS]> {
    match vec![NO_JUMP; JUMP_SLOTS].into_boxed_slice().try_into() {
        Ok(jumps) => jumps,
        Err(_) => unreachable!("it has that length"),
    }
}

#[inline(always)]
fn slot_of(rip: u64) -> usize {
    (rip ^ rip >> 14) as usize & (JUMP_SLOTS - 1)
}

impl BlockCache {
    /// A block by the number that [`find`](Self::find) gave.
    #[inline(always)]
    pub fn block(&self, number: u32) -> &Block {
        &self.blocks[number as usize]
    }

    /// How many there are.
    pub fn live(&self) -> usize {
        self.blocks.len() - self.free.len()
    }

    /// The block at `c.next_rip`, decoded if need be. Faults are those of the fetch.
    #[inline(always)]
    pub fn find(&mut self, c: &mut Core) -> Result<u32, Stop> {
        debug_assert!(c.knows_segments(), "all that loads segment registers says so");
        let rip = c.next_rip;
        let jump = &self.jumps[slot_of(rip)];
        let known = jump.rip == rip && jump.stamp == c.mmu.fetch_stamp() && jump.mode == mode_of(c);
        if known && jump.generation == self.blocks[jump.block as usize].generation {
            return Ok(jump.block);
        }
        self.find_slow(c, rip)
    }

    /// The block that a link of `from` says comes next, and its number. CS and code size are those of `from`.
    #[inline(always)]
    pub(crate) fn linked(&self, from: &Block, c: &Core) -> Option<(u32, &Block)> {
        let (rip, stamp) = (c.next_rip, c.mmu.fetch_stamp());
        from.links.iter().find_map(|link| {
            let target = self.block(link.block);
            let holds = link.rip == rip && link.stamp == stamp && link.generation == target.generation;
            holds.then_some((link.block, target))
        })
    }

    /// The block that follows `from`, which ran to its end without breaking and has no link to it yet.
    #[inline(never)]
    pub(crate) fn link(&mut self, c: &mut Core, from: u32) -> Result<u32, Stop> {
        let generation = self.blocks[from as usize].generation;
        c.recent.push(c.block_rip, c.next_rip);
        let rip = c.next_rip;
        let found = self.find(c)?;
        let generation_found = self.blocks[found as usize].generation;
        let link = Link { rip, stamp: c.mmu.fetch_stamp(), block: found, generation: generation_found };
        // Finding may have dropped the block we come from.
        let from = &mut self.blocks[from as usize];
        if from.generation == generation {
            from.links = [link, from.links[0]];
        }
        Ok(found)
    }

    #[inline(never)]
    fn find_slow(&mut self, c: &mut Core, rip: u64) -> Result<u32, Stop> {
        let lin = fetch_address(c, rip)?;
        let offset = fetch_page(c, lin)?;
        let key = Key { offset: offset.raw(), rip: rip.wrapping_sub(code_base(c, rip)), mode: mode_of(c) };
        let number = match self.number_of(&key) {
            Some(number) if self.still_crosses(c, number, lin)? => number,
            found => {
                if let Some(number) = found {
                    self.drop_block(c, number);
                }
                self.build(c, key, lin)?
            }
        };
        let block = &mut self.blocks[number as usize];
        block.used = true;
        let generation = block.generation;
        // The stamp is read after the fetch: filling may have changed it.
        let stamp = c.mmu.fetch_stamp();
        self.jumps[slot_of(rip)] = Jump { rip, stamp, mode: mode_of(c), block: number, generation };
        Ok(number)
    }

    /// The block at `rip`, which counts as those of block `number` do, if that is from their page, which both lie in.
    pub fn in_page(&self, number: u32, rip: u64) -> Option<u32> {
        let block = self.block(number);
        let same_page = block.is_relative() && !block.crosses() && rip >> 12 == block.rip >> 12;
        let offset = block.offset.wrapping_add(rip.wrapping_sub(block.rip));
        let key = Key { offset, rip, mode: block.mode };
        self.number_of(&key).filter(|&other| same_page && !self.block(other).crosses())
    }

    /// The same block without an engine's [`CODE_VARIANT`].
    pub fn without_variant(&self, number: u32) -> Option<u32> {
        let key = self.block(number).key();
        self.number_of(&Key { mode: key.mode & !CODE_VARIANT, ..key })
    }

    fn number_of(&self, key: &Key) -> Option<u32> {
        self.pages.beginning_at(key.offset).find(|&number| self.block(number).key() == *key)
    }

    /// Whether a crossing block's second page is still where it was; #PF if it can't be fetched.
    fn still_crosses(&self, c: &mut Core, number: u32, lin: u64) -> Result<bool, Stop> {
        match &self.block(number).second {
            None => Ok(true),
            Some(second) => Ok(fetch_page(c, page_behind(c, lin))?.raw() == second.offset),
        }
    }

    fn build(&mut self, c: &mut Core, key: Key, lin: u64) -> Result<u32, Stop> {
        if self.live() >= MAX_BLOCKS {
            self.clear(c);
        }
        self.age(c);
        let block = decode_block(c, key, lin)?;
        let number = self.free.pop().unwrap_or(self.blocks.len() as u32);
        for (offset, len) in block.pieces() {
            mark_code(c, offset, len);
            self.pages.enter(number, offset, len);
        }
        if let Some(old) = self.blocks.get_mut(number as usize) {
            *old = Block { generation: old.generation, ..block };
        } else {
            self.blocks.push(block);
        }
        Ok(number)
    }

    /// Drops the blocks decoded from any of the `len` bytes at RAM offset `offset`.
    pub fn invalidate(&mut self, c: &mut Core, offset: u64, len: u32) {
        let touched = self.pages.touching(offset, len);
        if touched.is_empty() {
            return;
        }
        touched.into_iter().for_each(|number| self.drop_block(c, number));
        self.pages.rewritten(offset).into_iter().for_each(|number| self.drop_block(c, number));
    }

    pub(crate) fn watch(&mut self) {
        self.dropped.get_or_insert_default();
    }

    pub(crate) fn take_dropped(&mut self) -> Vec<u32> {
        self.dropped.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Drops everything.
    pub fn clear(&mut self, c: &mut Core) {
        for number in 0..self.blocks.len() as u32 {
            self.drop_block(c, number);
        }
    }

    /// Has a block no longer found, if it is there, and its lines no longer watched.
    fn drop_block(&mut self, c: &mut Core, number: u32) {
        let block = &mut self.blocks[number as usize];
        if !std::mem::take(&mut block.valid) {
            return;
        }
        block.generation = block.generation.wrapping_add(1);
        for (offset, len) in block.pieces() {
            self.forget_piece(c, number, offset, len);
        }
        if let Some(dropped) = &mut self.dropped {
            dropped.push(number);
        }
        self.free.push(number);
    }

    fn forget_piece(&mut self, c: &mut Core, number: u32, offset: u64, len: u32) {
        let (free, has_code) = self.pages.remove(number, offset, line_mask(offset, len));
        let page = offset >> 12;
        if !has_code {
            c.code_lines.remove(&page);
            c.mmu.watcher().release(RamOffset::new(page << 12), PageFlags::CODE);
        } else if let Some(lines) = c.code_lines.get_mut(&page) {
            *lines &= !free;
        }
    }
}

/// The 64-byte lines of their page that `len` bytes at `offset` touch.
fn line_mask(offset: u64, len: u32) -> u64 {
    let first = (offset & 0xfff) >> 6;
    let last = ((offset & 0xfff) + u64::from(len) - 1).min(0xfff) >> 6;
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

fn mark_code(c: &mut Core, offset: u64, len: u32) {
    *c.code_lines.entry(offset >> 12).or_insert(0) |= line_mask(offset, len);
    let off = RamOffset::new(offset);
    if c.mmu.watcher().claim(off, PageFlags::CODE) {
        c.mmu.code_page_changed(off);
    }
}

/// Linear address of the instruction at `rip`, with the code segment's limit or canonicality checked.
fn fetch_address(c: &mut Core, rip: u64) -> Result<u64, Stop> {
    let lin = c.seg_base[Seg::Cs as usize].wrapping_add(rip);
    if c.code_size == CodeSize::Bits64 {
        if !Gva::new(lin).is_canonical(c.s.linear_bits()) {
            return c.raise(Fault::GP0);
        }
        return Ok(lin);
    }
    if rip > u64::from(c.s.segment(Seg::Cs).limit) {
        return c.raise(Fault::GP0);
    }
    Ok(lin & 0xffff_ffff)
}

/// RAM offset of the code byte at linear address `lin`.
fn fetch_page(c: &mut Core, lin: u64) -> Result<RamOffset, Stop> {
    if let Some(offset) = c.mmu.lookup_fetch(Gva::new(lin)) {
        return Ok(offset);
    }
    let access = Access::explicit(AccessKind::Fetch, c.s.cpl);
    let found = c.translate(lin, access);
    if c.trace.is_some() {
        c.trace_mmu();
    }
    match found?.backing {
        Backing::Ram(offset) | Backing::Rom(offset) => Ok(offset),
        Backing::Mmio => {
            let rip = c.next_rip;
            c.unsupported("instruction fetch from device memory or a hole in RAM", rip)?;
            Err(Stop::Exit)
        }
    }
}

/// Bytes decoded so far and where they came from.
struct Source {
    bytes: [u8; MAX_OPS * 15 + 16],
    /// Valid bytes.
    len: usize,
    /// The page ends behind them.
    page_end: bool,
}

fn source(c: &Core, offset: u64, lin: u64) -> Source {
    let mut s = Source { bytes: [0; MAX_OPS * 15 + 16], len: 0, page_end: false };
    let left = (PAGE_SIZE - (lin & (PAGE_SIZE - 1))) as usize;
    s.len = left.min(MAX_OPS * 15);
    s.page_end = s.len == left;
    c.mem.load_bytes(RamOffset::new(offset), &mut s.bytes[..s.len]);
    s
}

fn decode_block(c: &mut Core, key: Key, lin: u64) -> Result<Block, Stop> {
    let mut s = source(c, key.offset, lin);
    let mut ops = Ops::new();
    let mut at = decode_ops(c, &s, key.rip, MAX_OPS, &mut ops);
    let mut second = None;
    if ops.is_empty() {
        second = Some(extend(c, &mut s, lin)?.raw());
        at = decode_ops(c, &s, key.rip, 1, &mut ops);
    }
    let first_len = at.min((PAGE_SIZE - (lin & (PAGE_SIZE - 1))) as usize);
    let rest = (at - first_len) as u32;
    let second = second.map(|offset| Box::new(Second { offset, len: rest.max(1) }));
    Ok(Block {
        cost: ops.len() as u32 * COST,
        ops: ops.as_slice().into(),
        rip: key.rip,
        end_rip: key.rip.wrapping_add(at as u64) & code_mask(c.code_size),
        links: [NO_LINK; 2],
        generation: 0,
        valid: true,
        used: true,
        kept: false,
        len: first_len as u32,
        offset: key.offset,
        mode: key.mode,
        second,
    })
}

/// The operations of a block that is being built.
type Ops = SmallVec<[Op; MAX_OPS]>;

/// The operations of a block of at most so many, as far as they lie in one page: none if not even the first does. How many
/// bytes they have.
fn decode_ops(c: &mut Core, s: &Source, first_rip: u64, most: usize, ops: &mut Ops) -> usize {
    let size = c.code_size;
    let limit = if size == CodeSize::Bits64 { u64::MAX } else { c.s.segment(Seg::Cs).limit.into() };
    let mut decoder = Decoder::with_ip(size as u32, &s.bytes[..s.len], first_rip, DecoderOptions::NONE);
    let mut at = 0usize;
    while ops.len() < most && at < s.len {
        let rip = first_rip.wrapping_add(at as u64);
        let (mut op, ends) = match decode_next(&mut decoder, &s.bytes[at..s.len], rip, size) {
            Err(DecodeError::More) if s.page_end => break,
            Ok(i) if rip.wrapping_add(i.len() as u64 - 1) > limit => (raising(gp), Ends::Block),
            Ok(i) => {
                let d = resolve(&i, size, &c.profile, &mut c.host);
                (d.op, d.ends)
            }
            Err(DecodeError::TooLong | DecodeError::More) => (raising(gp), Ends::Block),
            Err(DecodeError::Invalid) => (raising(isa::undefined), Ends::Block),
        };
        op.start = at as u16;
        op.prefix = ops.len() as u32 * COST;
        at += usize::from(op.len);
        ops.push(op);
        if ends == Ends::Block {
            break;
        }
    }
    at
}

/// RIP wraps at its width outside 64-bit mode.
const fn code_mask(size: CodeSize) -> u64 {
    match size {
        CodeSize::Bits64 => u64::MAX,
        _ => 0xffff_ffff,
    }
}

/// Adds the next page's first bytes for an instruction that crosses into it.
fn extend(c: &mut Core, s: &mut Source, lin: u64) -> Result<RamOffset, Stop> {
    let offset = fetch_page(c, page_behind(c, lin))?;
    let end = s.len + 15;
    c.mem.load_bytes(offset, &mut s.bytes[s.len..end]);
    s.len = end;
    s.page_end = false;
    Ok(offset)
}

/// Linear address of the page behind that of `lin`.
fn page_behind(c: &Core, lin: u64) -> u64 {
    let next = (lin & !(PAGE_SIZE - 1)).wrapping_add(PAGE_SIZE);
    if c.code_size == CodeSize::Bits64 { next } else { next & 0xffff_ffff }
}

/// What [`CODE_BASE`](crate::op::CODE_BASE) is while the code at `rip` runs.
fn code_base(c: &Core, rip: u64) -> u64 {
    if is_relative(c.code_mode, rip) { rip & !(PAGE_SIZE - 1) } else { 0 }
}

/// Whether RIPs of code of this mode at `rip`, or there from its page, count from that.
pub fn is_relative(mode: u64, rip: u64) -> bool {
    is_flat_mode(mode) && (code_bits(mode) == 64 || rip < LAST_PAGE)
}

/// The page that RIP wraps behind outside 64-bit mode.
const LAST_PAGE: u64 = 0xffff_f000;

fn raising(exec: crate::op::ExecFn) -> Op {
    Op { exec, ..isa::invalid_op() }
}

fn gp(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    c.raise(Fault::GP0)
}
