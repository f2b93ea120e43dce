//! The MMU: what is selected at present, and how that changes.

use crate::active::Active;
use crate::context::{Pool, column_of};
use crate::event::{Event, EventLog};
use crate::format::Format;
use crate::hints::Hints;
use crate::role::{CpuRole, View};
use crate::roots::{Root, RootCache};
use crate::shadow::ShadowPages;
use crate::stats::{COUNTED_SLOTS, MmuStats};
use crate::tables::PeekedTables;
use crate::walk::{self, Regime, Top};
use crate::writers::Writers;
use std::sync::Arc;
use umbra_arch::control::{ControlLimits, ControlRegs, Effects, FlushScope};
use umbra_arch::paging::{Access, PagingMode, entry};
use umbra_arch::{Fault, Gpa, Gva};
use umbra_memory::{Backing, Change, GuestMemory, Watcher};

/// What a change of role or root does to the others.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum MmuMode {
    /// Nothing: they stay for later.
    #[default]
    NoUnload,
    /// All roots are unloaded, as KVM does at present.
    UnloadAlways,
    /// Caches are dropped at pseudo-random moments, drawn from this seed; a test of coherence.
    DropAtRandom(u64),
}

/// Choices at creation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MmuOptions {
    /// What a change of role or root does to the others.
    pub mode: MmuMode,
    /// Put WP, SMEP and SMAP into page roles, as KVM does.
    pub kvm_role: bool,
    /// Bound on shadow pages (of 4 KiB, or 8 KiB for 2-level paging).
    pub shadow_pages: usize,
}

impl Default for MmuOptions {
    fn default() -> Self {
        Self { mode: MmuMode::NoUnload, kvm_role: false, shadow_pages: 64 << 10 }
    }
}

/// A translated byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Translation {
    /// Its physical address.
    pub gpa: Gpa,
    /// Its backing; the offset is the byte's own.
    pub backing: Backing,
    /// The page has yet to arrive: the bytes behind `backing` mean nothing, and nothing was filled or
    /// marked for it.
    pub absent: bool,
}

/// The MMU of one processor.
///
/// Its caller reports each commit of control registers ([`apply`](Self::apply)), each change of CPL,
/// RFLAGS.AC and key registers, and each store to a WATCHED page
/// ([`table_written`](Self::table_written)); then nothing here is ever stale.
pub struct Mmu {
    pub(crate) active: Active,
    /// What implicit supervisor accesses read: the same column, or the supervisor's with AC clear.
    pub(crate) system: Active,
    pub(crate) pool: Pool,
    pub(crate) current: usize,
    pub(crate) roots: RootCache,
    pub(crate) shadow: ShadowPages,
    pub(crate) writers: Writers,
    pub(crate) hints: Hints,
    pub(crate) mem: Arc<GuestMemory>,
    pub(crate) watcher: Watcher,
    pub(crate) format: Format,
    pub(crate) view: View,
    /// Keys under any restriction, as `View::restricted_keys`.
    pub(crate) restricted: u32,
    pub(crate) stats: MmuStats,
    pub(crate) events: EventLog,
    regs: ControlRegs,
    role: CpuRole,
    cpl: u8,
    ac: bool,
    smm: bool,
    guest_mode: bool,
    pkru: u32,
    pkrs: u32,
    /// Whether the fast data paths always miss.
    pub(crate) guarded: bool,
    options: MmuOptions,
    random: u64,
    pub(crate) mem_generation: u64,
    /// Host address of RAM.
    pub(crate) ram: u64,
    last_stamp: u64,
    fetch_stamp: u64,
    /// Times that something else was selected than another root, CPL, RFLAGS.AC or CR0.WP do.
    pub(crate) selections: u64,
}

impl Mmu {
    /// The only MMU over `mem`, with paging off at CPL 0.
    pub fn new(mem: Arc<GuestMemory>, limits: ControlLimits, options: MmuOptions) -> Mmu {
        Self::watching(Watcher::sole(mem), limits, options)
    }

    /// One of several MMUs over one memory. Its caller hands it what the watcher hears, by
    /// [`memory_changed`](Self::memory_changed), before each time it runs.
    pub fn watching(watcher: Watcher, limits: ControlLimits, options: MmuOptions) -> Mmu {
        let mem = Arc::clone(watcher.memory());
        let frames = (mem.mapping_bytes() >> 12) as usize;
        let regs = ControlRegs::default();
        let role = CpuRole::of(&regs);
        let random = if let MmuMode::DropAtRandom(seed) = options.mode { seed | 1 } else { 1 };
        let mut mmu = Mmu {
            active: Active::default(),
            system: Active::NONE,
            pool: Pool::new(),
            current: 0,
            roots: RootCache::new(),
            shadow: ShadowPages::new(frames, options.shadow_pages),
            writers: Writers::new(frames),
            hints: Hints::new(),
            mem_generation: mem.generation(),
            ram: mem.mapping_address(),
            mem,
            watcher,
            format: Format::intel(limits.maxphyaddr),
            view: View::of(&role, 0, false, 0, 0),
            restricted: 0,
            stats: MmuStats::default(),
            events: EventLog::default(),
            regs,
            role,
            cpl: 0,
            ac: false,
            smm: false,
            guest_mode: false,
            pkru: 0,
            pkrs: 0,
            guarded: false,
            options,
            random,
            last_stamp: 0,
            fetch_stamp: 0,
            selections: 0,
        };
        mmu.select_root();
        mmu
    }

    /// CPUID changed: everything cached goes.
    pub fn set_limits(&mut self, limits: ControlLimits) {
        self.set_format(Format { maxphyaddr: Format::intel(limits.maxphyaddr).maxphyaddr, ..self.format });
    }

    /// CPUID facts beyond [`ControlLimits`] changed: everything cached goes.
    pub fn set_format(&mut self, format: Format) {
        self.format = format;
        if !cfg!(umbra_mutant = "cpuid-change-keeps-pages") {
            self.drop_everything();
        }
    }

    /// After every commit of control registers: counts the architectural flush, which drops nothing,
    /// and selects the root that the new registers name.
    pub fn apply(&mut self, effects: &Effects) {
        let cr3 = effects.regs.cr3 != self.regs.cr3 || matches!(effects.flush, FlushScope::PcidNonGlobal(_));
        self.count_flush(effects.flush);
        let same_root = cr3_and_pdptes(&effects.regs) == cr3_and_pdptes(&self.regs);
        let old_role = self.root_role();
        let role_changed = self.set_regs(&effects.regs);
        if self.options.mode == MmuMode::UnloadAlways && (role_changed || cr3) {
            self.unload_roots(effects.flush != FlushScope::None);
        }
        self.maybe_drop();
        self.check_memory_map();
        if same_root && self.root_role() == old_role && self.roots.slots[self.current].is_some() {
            self.select_view();
        } else {
            self.select_root();
        }
    }

    fn root_role(&self) -> u32 {
        self.role.root_page_role(self.options.kvm_role).word()
    }

    /// Host-initiated replacement of the control registers (reset, INIT, a restored snapshot).
    pub fn reset_to(&mut self, regs: &ControlRegs) {
        self.apply(&Effects { regs: *regs, flush: FlushScope::All, pdptes_loaded: false, forget_pcids: true });
    }

    /// Entering or leaving system-management mode or a nested guest.
    pub fn set_environment(&mut self, smm: bool, guest_mode: bool) {
        (self.smm, self.guest_mode) = (smm, guest_mode);
        let regs = self.regs;
        self.set_regs(&regs);
        self.select_root();
    }

    /// Takes over registers; true if the role changed.
    #[inline]
    fn set_regs(&mut self, regs: &ControlRegs) -> bool {
        self.regs = *regs;
        let role = CpuRole { smm: self.smm, guest_mode: self.guest_mode, ..CpuRole::of(regs) };
        let changed = role != self.role;
        if changed {
            self.selections += u64::from(role != CpuRole { wp: role.wp, ..self.role });
            self.role = role;
            self.stats.role_changes += 1;
            self.events.note(|| Event::Role { role });
            self.restricted = self.full_view().restricted_keys();
        }
        changed
    }

    /// The role in force.
    pub fn cpu_role(&self) -> &CpuRole {
        &self.role
    }

    /// CPL or RFLAGS.AC changed.
    #[inline]
    pub fn set_view(&mut self, cpl: u8, ac: bool) {
        if (cpl, ac) == (self.cpl, self.ac) {
            return;
        }
        self.cpl = cpl;
        self.ac = ac;
        self.select_view();
    }

    /// PKRU changed.
    pub fn set_pkru(&mut self, pkru: u32) {
        if pkru != self.pkru {
            self.pkru = pkru;
            self.select_keys();
        }
    }

    /// IA32_PKRS changed.
    pub fn set_pkrs(&mut self, pkrs: u32) {
        self.pkrs = pkrs;
        self.select_keys();
    }

    fn select_keys(&mut self) {
        self.restricted = self.full_view().restricted_keys();
        self.selections += 1;
        self.select_view();
    }

    fn full_view(&self) -> View {
        View::of(&self.role, self.cpl, self.ac, self.pkru, self.pkrs)
    }

    /// The key of the root that the registers name.
    pub(crate) fn regime(&self) -> Regime {
        let top = match self.role.mode {
            PagingMode::Off => Top::Direct,
            PagingMode::Pae => Top::Pdptes(self.regs.pdpte.map(used_pdpte_bits)),
            mode => Top::Table(self.regs.cr3.table(mode)),
        };
        Regime { top, role: self.role.root_page_role(self.options.kvm_role), format: self.format }
    }

    pub(crate) fn select_root(&mut self) {
        let regime = self.regime();
        match self.roots.find(&regime) {
            Some((slot, _)) if slot == self.current => {}
            Some((slot, position)) => {
                self.stats.root_hits += 1;
                self.stats.root_hits_by_slot[position.min(COUNTED_SLOTS - 1)] += 1;
                self.events.note(|| Event::RootHit { slot, position });
                self.current = slot;
            }
            None => self.build_root(regime),
        }
        self.select_view();
    }

    #[cold]
    fn build_root(&mut self, regime: Regime) {
        self.stats.root_misses += 1;
        self.stats.roots_built += 1;
        if let Some(slot) = self.roots.victim() {
            self.free_root(slot);
        }
        let (from, stamp, upper) = (self.current, self.next_stamp(), self.next_stamp());
        let (tops, columns) = ([None; 4], Default::default());
        let slot = self.roots.insert(Root { regime, tops, columns, existing: 0, stamp, upper });
        self.current = slot;
        self.events.note(|| Event::RootMiss { slot, role: regime.role });
        self.adopt_upper_half(from);
    }

    pub(crate) fn free_root(&mut self, slot: usize) {
        self.hints.forget();
        if let Some(mut root) = self.roots.remove(slot) {
            root.columns.iter_mut().for_each(|column| self.pool.release(column));
            self.stats.roots_freed += 1;
            self.events.note(|| Event::RootFreed { slot });
        }
    }

    fn unload_roots(&mut self, by_flush: bool) {
        for slot in self.roots.used() {
            if by_flush && let Some(root) = &self.roots.slots[slot] {
                self.stats.dropped_by_flush += root.columns.iter().map(|c| u64::from(c.held)).sum::<u64>();
            }
            self.free_root(slot);
        }
    }

    pub(crate) fn next_stamp(&mut self) -> u64 {
        self.last_stamp += 1;
        self.last_stamp
    }

    /// Points the fast paths at the column of the current root and view.
    #[inline]
    pub(crate) fn select_view(&mut self) {
        self.view = self.full_view();
        self.sync_fetch_stamp();
        let column = column_of(&self.view);
        let restricted = self.restricted;
        let Some(root) = &self.roots.slots[self.current] else { return };
        let chosen = &root.columns[column];
        let forbidden = chosen.keys & restricted != 0 && !cfg!(umbra_mutant = "keys-not-looked-at-on-a-change");
        if !chosen.exists() || forbidden {
            self.prepare_column(column);
        }
        self.sync_active();
    }

    /// Makes the chosen column, or clears it of pages whose keys have become restricted.
    #[cold]
    fn prepare_column(&mut self, column: usize) {
        let Some(root) = &mut self.roots.slots[self.current] else { return };
        let chosen = &mut root.columns[column];
        if chosen.exists() {
            self.pool.clear(chosen);
            self.stats.context_clears += 1;
        } else {
            self.pool.create(chosen);
            root.existing |= 1 << column;
        }
    }

    /// As long as this is the value it was when a fetch was translated, the translation is valid; it
    /// comes back when a root and view are selected again and nothing executable was dropped meanwhile.
    #[inline(always)]
    pub fn fetch_stamp(&self) -> u64 {
        self.fetch_stamp
    }

    /// After anything that selects a root or view, or renews roots' stamps.
    #[inline]
    pub(crate) fn sync_fetch_stamp(&mut self) {
        self.fetch_stamp = self.current_stamp();
    }

    /// As long as this is the same, a [root](Self::root), CPL, RFLAGS.AC and CR0.WP that come back bring back the same
    /// [table](Self::fast_table) and stamps.
    #[inline]
    pub fn epoch(&self) -> u64 {
        // None of them ever becomes less.
        self.pool.moves + self.last_stamp + self.selections
    }

    /// The root in force, by its slot.
    #[inline]
    pub fn root(&self) -> usize {
        self.current
    }

    /// What [`fetch_stamp`](Self::fetch_stamp) is made of.
    #[inline]
    pub(crate) fn current_stamp(&self) -> u64 {
        let stamp = self.roots.slots[self.current].as_ref().map_or(0, |root| root.stamp);
        stamp << 8 | (self.current as u64) << 2 | self.fetch_class()
    }

    /// What the view says of fetches: 0 to 2.
    #[inline(always)]
    pub(crate) fn fetch_class(&self) -> u64 {
        if self.view.user { 0 } else { 1 + self.view.smep as u64 }
    }

    /// Translates one byte and changes nothing: for debuggers.
    ///
    /// # Errors
    /// As [`translate`](Self::translate).
    pub fn peek(&self, gva: Gva, access: Access) -> Result<Translation, Fault> {
        let found = walk::look(&mut PeekedTables(&self.mem), &self.regime(), gva, access, &self.full_view())?;
        let page = found.gpa.page();
        let backing = self.mem.locate(page).at(found.gpa.offset());
        Ok(Translation { gpa: found.gpa, backing, absent: self.mem.is_away(page) })
    }

    /// INVLPG: counted. Entries are never stale, so nothing needs dropping.
    pub fn invlpg(&mut self, gva: Gva) {
        self.stats.flushes_page += 1;
        self.events.note(|| Event::FlushPage { gva });
    }

    /// CR0.WP was changed so often and came back: counted as by [`apply`](Self::apply).
    pub fn count_wp_changes(&mut self, count: u64) {
        self.stats.role_changes += count;
        self.stats.flushes_none += count;
    }

    /// Whether changes of roles drop nothing, nor anything else by chance.
    pub fn keeps_roots(&self) -> bool {
        self.options.mode == MmuMode::NoUnload
    }

    /// So many INVLPGs were executed: counted.
    pub fn count_page_flushes(&mut self, count: u64) {
        self.stats.flushes_page += count;
    }

    /// INVPCID of a legal type and operand: counted. Nothing needs dropping.
    pub fn invpcid(&mut self, kind: u64, pcid: u16, gva: Gva) {
        match kind {
            0 => self.invlpg(gva),
            1 => self.count_flush(FlushScope::PcidNonGlobal(pcid)),
            2 => self.count_flush(FlushScope::All),
            _ => self.count_flush(FlushScope::AllNonGlobal),
        }
    }

    fn count_flush(&mut self, scope: FlushScope) {
        self.stats.count_flush(scope);
        if scope != FlushScope::None {
            self.events.note(|| Event::Flush { scope });
        }
    }

    /// Notes [`Event`]s from now on, or no longer.
    pub fn record_events(&mut self, on: bool) {
        self.events.enable(on);
    }

    /// The events noted since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.events.take()
    }

    /// This MMU's ear at the memory.
    #[inline(always)]
    pub fn watcher(&self) -> &Watcher {
        &self.watcher
    }

    /// Another processor, a device or the host did something to memory.
    pub fn memory_changed(&mut self, change: Change) {
        match change {
            Change::Written { gpa, bytes } => self.table_written(gpa, bytes),
            Change::Flagged(off) => self.drop_write_tags(off),
            Change::Everything => {
                self.mem_generation = self.mem.generation();
                self.drop_everything();
            }
        }
    }

    /// Event counts.
    pub fn stats(&self) -> &MmuStats {
        &self.stats
    }

    /// Shadow pages at present.
    pub fn shadow_pages(&self) -> usize {
        self.shadow.live()
    }

    /// Roots at present.
    pub fn cached_roots(&self) -> usize {
        self.roots.used().count()
    }

    /// Drops everything if regions of memory came or went.
    #[inline]
    pub(crate) fn check_memory_map(&mut self) {
        if self.mem.generation() != self.mem_generation {
            self.mem_generation = self.mem.generation();
            self.drop_everything();
        }
    }

    /// For changes that no shadow page survives: CPUID, the memory map.
    #[cold]
    fn drop_everything(&mut self) {
        self.stats.full_drops += 1;
        self.drop_all_shadow();
        for slot in self.roots.used() {
            self.free_root(slot);
        }
        self.select_root();
    }

    /// With [`MmuMode::DropAtRandom`], sometimes drops some cache.
    #[inline]
    pub(crate) fn maybe_drop(&mut self) {
        if self.drops_at_random() {
            self.drop_at_random();
        }
    }

    #[inline(always)]
    pub(crate) fn drops_at_random(&self) -> bool {
        matches!(self.options.mode, MmuMode::DropAtRandom(_))
    }

    #[cold]
    fn drop_at_random(&mut self) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        match self.random >> 32 & 63 {
            0 => self.drop_all_shadow(),
            1..=4 => self.drop_all_contexts(),
            5 => {
                self.unload_roots(false);
                self.select_root();
            }
            _ => {}
        }
    }
}

fn cr3_and_pdptes(regs: &ControlRegs) -> (u64, [u64; 4]) {
    (regs.cr3.raw(), regs.pdpte)
}

/// A PDPTE without the bits that a walk never reads, so that they make no new root.
fn used_pdpte_bits(pdpte: u64) -> u64 {
    if pdpte & entry::P == 0 { 0 } else { pdpte & 0x000f_ffff_ffff_f000 | entry::P }
}
