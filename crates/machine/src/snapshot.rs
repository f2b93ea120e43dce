//! Save files: a machine at a moment between two slices.
//!
//! Magic, version, then sections of name, length and contents. A section that this version doesn't
//! know is refused by its name; so is a missing one. Contents are postcard forms of CPU and devices,
//! and for memory the pages written since power-on.

use crate::events::Events;
use crate::machine::{Machine, Rest};
use crate::pc::SerialOutput;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use umbra_arch::{CpuState, Gpa, GpaPage, PAGE_SIZE, Vcpu, VirtualTime};
use umbra_memory::{Backing, GuestMemory, PageFlags};

const MAGIC: &[u8; 8] = b"UMBRASAV";
const VERSION: u32 = 2;
const PAGE: usize = PAGE_SIZE as usize;

/// Why a machine can't be saved or restored.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Not our magic number.
    #[error("not an Umbra save file")]
    NotASave,
    /// Another version's file.
    #[error("save file version {0}, this Umbra reads version {VERSION}: save again with this version")]
    Version(u32),
    /// The file ends early.
    #[error("the save file is truncated in section {0:?}: copy it again")]
    Truncated(String),
    /// A section we don't know.
    #[error("the save file has a section {0:?} that this Umbra doesn't know: restore with the version that saved it")]
    UnknownSection(String),
    /// A section is twice there or not at all.
    #[error("the save file has no section {0:?}, or two of them")]
    SectionCount(String),
    /// A section's contents make no sense.
    #[error("section {0:?} of the save file is damaged")]
    Damaged(String),
    /// The local APIC is in the kernel.
    #[error("an accelerator has the local APIC: hand over to Umbra's own engine first")]
    ApicLent,
    /// The save file is of another machine.
    #[error("the save file is of a machine with {what} {saved}, this one has {here}: start with the same options")]
    OtherMachine {
        /// What differs.
        what: &'static str,
        /// In the file.
        saved: String,
        /// In this machine.
        here: String,
    },
}

/// What must agree before anything is restored, and the clocks.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    ram_bytes: u64,
    profile: String,
    vcpus: u32,
    lazy: Option<OnDemand>,
    now: VirtualTime,
    idle_since: Option<VirtualTime>,
}

/// RAM that arrives on demand.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct OnDemand {
    bytes: u64,
    /// Nanoseconds that a page takes.
    latency: u64,
    /// Most pages that are present.
    limit: Option<u64>,
}

impl std::fmt::Display for OnDemand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "of {} bytes, {} ns a page", self.bytes, self.latency)?;
        self.limit.map_or(Ok(()), |pages| write!(f, ", {pages} pages present"))
    }
}

/// One CPU with its place in time.
#[derive(Debug, Serialize, Deserialize)]
struct SavedCpu {
    state: CpuState,
    time: VirtualTime,
    rest: Rest,
    retired: u64,
}

/// What the PC knows beside its devices.
#[derive(Debug, Serialize, Deserialize)]
struct Wiring {
    latest: VirtualTime,
    lines: (u32, u32),
    events: Events,
    serial: SerialOutput,
    /// Pages that have to arrive again.
    swapped: Vec<u64>,
}

/// Names of all sections, in the order in which they are written.
const SECTIONS: [&str; 5] = ["header", "cpus", "devices", "wiring", "memory"];

impl<V: Vcpu> Machine<V> {
    /// The whole machine as bytes. The same machine state always gives the same bytes.
    ///
    /// # Errors
    /// [`SnapshotError::Damaged`] names a section that can't be encoded; [`SnapshotError::ApicLent`] while an
    /// accelerator has the local APIC.
    pub fn save(&self) -> Result<Vec<u8>, SnapshotError> {
        if self.pc.is_apic_lent() {
            return Err(SnapshotError::ApicLent);
        }
        let header = Header {
            ram_bytes: self.memory.ram_bytes(),
            profile: self.profile.name.clone(),
            vcpus: self.cpus.len() as u32,
            lazy: self.lazy(),
            now: self.now,
            idle_since: self.idle_since,
        };
        let cpus: Vec<SavedCpu> = self
            .cpus
            .iter()
            .map(|cpu| SavedCpu {
                state: cpu.engine.state(),
                time: cpu.time,
                rest: cpu.rest,
                retired: cpu.retired_offset.wrapping_add(cpu.engine.retired()),
            })
            .collect();
        let swapped = self.memory.swapped_pages().iter().map(|page| page.raw()).collect();
        let wiring = self.pc.wiring(swapped);
        let mut file = MAGIC.to_vec();
        file.extend_from_slice(&VERSION.to_le_bytes());
        for (name, contents) in [
            ("header", encode("header", &header)?),
            ("cpus", encode("cpus", &cpus)?),
            ("devices", encode("devices", &self.pc.devices)?),
            ("wiring", encode("wiring", &wiring)?),
            ("memory", save_memory(&self.memory)),
        ] {
            file.push(name.len() as u8);
            file.extend_from_slice(name.as_bytes());
            file.extend_from_slice(&(contents.len() as u64).to_le_bytes());
            file.extend_from_slice(&contents);
        }
        Ok(file)
    }

    /// Makes this machine the saved one. It must have been built with the same options.
    ///
    /// # Errors
    /// [`SnapshotError`] says what is wrong with the file; the machine is unchanged then.
    pub fn restore(&mut self, file: &[u8]) -> Result<(), SnapshotError> {
        if self.pc.is_apic_lent() {
            return Err(SnapshotError::ApicLent);
        }
        let sections = Sections::parse(file)?;
        let header: Header = decode("header", sections.one("header")?)?;
        self.check(&header)?;
        let cpus: Vec<SavedCpu> = decode("cpus", sections.one("cpus")?)?;
        if cpus.len() != self.cpus.len() {
            return Err(SnapshotError::Damaged("cpus".into()));
        }
        let devices = decode("devices", sections.one("devices")?)?;
        let wiring: Wiring = decode("wiring", sections.one("wiring")?)?;
        let pages = parse_pages(sections.one("memory")?)?;

        restore_memory(&self.memory, &pages);
        if self.memory.page_source_bytes().is_some() {
            let swapped: Vec<_> = wiring.swapped.iter().map(|&page| GpaPage::new(page)).collect();
            self.memory.restore_swapped(&swapped);
        }
        self.pc.restore(devices, wiring);
        for (cpu, saved) in self.cpus.iter_mut().zip(cpus) {
            cpu.engine.set_state(&saved.state);
            cpu.time = saved.time;
            cpu.rest = saved.rest;
            cpu.retired_offset = saved.retired.wrapping_sub(cpu.engine.retired());
        }
        self.now = header.now;
        self.idle_since = header.idle_since;
        self.input.clear();
        Ok(())
    }

    fn lazy(&self) -> Option<OnDemand> {
        let arrivals = &self.pc.devices.arrivals;
        let bytes = self.memory.page_source_bytes()?;
        Some(OnDemand { bytes, latency: arrivals.latency(), limit: arrivals.limit() })
    }

    fn check(&self, header: &Header) -> Result<(), SnapshotError> {
        let differ = |what, saved: String, here: String| {
            if saved == here { Ok(()) } else { Err(SnapshotError::OtherMachine { what, saved, here }) }
        };
        differ("RAM bytes", header.ram_bytes.to_string(), self.memory.ram_bytes().to_string())?;
        differ("CPU profile", header.profile.clone(), self.profile.name.clone())?;
        differ("virtual CPUs", header.vcpus.to_string(), self.cpus.len().to_string())?;
        let lazy = |lazy: Option<OnDemand>| lazy.map_or("none".into(), |lazy| lazy.to_string());
        differ("a memory file", lazy(header.lazy), lazy(self.lazy()))
    }
}

impl crate::pc::Pc {
    fn wiring(&self, swapped: Vec<u64>) -> Wiring {
        let (events, serial) = (self.events.clone(), self.serial.clone());
        Wiring { latest: self.latest, lines: self.lines(), events, serial, swapped }
    }

    fn restore(&mut self, devices: crate::pc::Devices, wiring: Wiring) {
        self.devices = devices;
        self.latest = wiring.latest;
        self.serial = wiring.serial;
        self.set_lines(wiring.lines);
        self.events = wiring.events;
        self.refresh();
    }
}

fn encode<T: Serialize>(name: &str, value: &T) -> Result<Vec<u8>, SnapshotError> {
    postcard::to_stdvec(value).map_err(|_| SnapshotError::Damaged(name.into()))
}

fn decode<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T, SnapshotError> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        _ => Err(SnapshotError::Damaged(name.into())),
    }
}

/// Name and contents.
type Section<'a> = (&'a str, &'a [u8]);

/// The file's sections by name.
struct Sections<'a> {
    list: Vec<Section<'a>>,
}

impl<'a> Sections<'a> {
    fn parse(file: &'a [u8]) -> Result<Self, SnapshotError> {
        let rest = file.strip_prefix(MAGIC).ok_or(SnapshotError::NotASave)?;
        let (version, mut rest) = rest.split_first_chunk::<4>().ok_or(SnapshotError::NotASave)?;
        let version = u32::from_le_bytes(*version);
        if version != VERSION {
            return Err(SnapshotError::Version(version));
        }
        let mut list = Vec::new();
        while !rest.is_empty() {
            let (section, after) = Self::next(rest)?;
            if !SECTIONS.contains(&section.0) {
                return Err(SnapshotError::UnknownSection(section.0.into()));
            }
            list.push(section);
            rest = after;
        }
        Ok(Self { list })
    }

    /// The first section, and what follows it.
    fn next(rest: &'a [u8]) -> Result<(Section<'a>, &'a [u8]), SnapshotError> {
        let cut = |name: &str| SnapshotError::Truncated(name.into());
        let (&len, rest) = rest.split_first().ok_or_else(|| cut("?"))?;
        let (name, rest) = rest.split_at_checked(len.into()).ok_or_else(|| cut("?"))?;
        let name = std::str::from_utf8(name).map_err(|_| SnapshotError::Damaged("?".into()))?;
        let (len, rest) = rest.split_first_chunk::<8>().ok_or_else(|| cut(name))?;
        let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| cut(name))?;
        let (contents, rest) = rest.split_at_checked(len).ok_or_else(|| cut(name))?;
        Ok(((name, contents), rest))
    }

    fn one(&self, name: &str) -> Result<&'a [u8], SnapshotError> {
        let mut found = self.list.iter().filter(|section| section.0 == name);
        match (found.next(), found.next()) {
            (Some(section), None) => Ok(section.1),
            _ => Err(SnapshotError::SectionCount(name.into())),
        }
    }
}

/// Guest pages of RAM in order of address.
fn ram_pages(memory: &GuestMemory) -> impl Iterator<Item = GpaPage> {
    memory.ram_ranges().into_iter().flat_map(|(start, bytes)| {
        let first = start.page().raw();
        (first..first + (bytes >> 12)).map(GpaPage::new)
    })
}

fn is_dirty(memory: &GuestMemory, page: GpaPage) -> bool {
    matches!(memory.locate(page), Backing::Ram(off) if memory.page_flags(off).intersects(PageFlags::DIRTY))
}

/// Whether a page that isn't written is one that has yet to arrive.
fn is_lazy(memory: &GuestMemory, page: GpaPage) -> bool {
    memory.page_source_bytes().is_some_and(|bytes| page.base().raw() < bytes)
}

/// Page number and contents of every page that was written and isn't all zero, or could have been absent.
fn save_memory(memory: &GuestMemory) -> Vec<u8> {
    let mut out = Vec::new();
    let mut buffer = [0; PAGE];
    for page in ram_pages(memory).filter(|&page| is_dirty(memory, page)) {
        memory.read(page.base(), &mut buffer);
        if is_lazy(memory, page) || buffer.iter().any(|&byte| byte != 0) {
            out.extend_from_slice(&page.raw().to_le_bytes());
            out.extend_from_slice(&buffer);
        }
    }
    out
}

fn parse_pages(section: &[u8]) -> Result<Vec<(u64, &[u8])>, SnapshotError> {
    let damaged = || SnapshotError::Damaged("memory".into());
    let mut pages: Vec<(u64, &[u8])> = Vec::with_capacity(section.len() / (PAGE + 8));
    for record in section.chunks(PAGE + 8) {
        let (number, contents) = record.split_first_chunk::<8>().ok_or_else(damaged)?;
        let number = u64::from_le_bytes(*number);
        if contents.len() != PAGE || pages.last().is_some_and(|last| last.0 >= number) {
            return Err(damaged());
        }
        pages.push((number, contents));
    }
    Ok(pages)
}

/// Writes the saved pages. Those that were written since power-on and aren't among them become zero, or absent
/// again.
fn restore_memory(memory: &GuestMemory, pages: &[(u64, &[u8])]) {
    let stale: Vec<GpaPage> = ram_pages(memory)
        .filter(|&page| is_dirty(memory, page) && pages.binary_search_by_key(&page.raw(), |saved| saved.0).is_err())
        .collect();
    let (absent, zero): (Vec<_>, Vec<_>) = stale.into_iter().partition(|&page| is_lazy(memory, page));
    memory.forget_pages(absent);
    for page in zero {
        memory.write(page.base(), &[0; PAGE]);
    }
    for &(number, contents) in pages {
        memory.write(Gpa::new(number << 12), contents);
    }
}
