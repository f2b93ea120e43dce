//! [`Machine`]: CPUs, memory and the PC around them, from power-on to a booted image.

use crate::acpi::{self, AcpiConfig};
use crate::boot::{BootPlan, ImageKind, bios};
use crate::memory_map::{CONVENTIONAL_END, FOUR_GIB, MemoryMap};
use crate::pc::{LazyRam, PageStats, Pc, PcConfig};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::Arc;
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::state::{Activity, reg};
use umbra_arch::{CpuState, Gpa, Vcpu, VirtualTime};
use umbra_memory::{GuestMemory, MemoryError};

/// Smallest RAM a PC can have here: conventional memory, the BIOS area and a first piece of extended memory.
pub const MIN_RAM: u64 = 2 << 20;

/// Most CPUs of a machine.
pub const MAX_VCPUS: usize = 32;

/// BIOS data area: segment of the extended area, and kibibytes of conventional memory.
const BDA_EXTENDED_SEGMENT: Gpa = Gpa::new(0x40e);
const BDA_MEMORY_KIB: Gpa = Gpa::new(0x413);

/// Host-side mistakes in building a machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Too little RAM for any guest.
    #[error("{0} bytes of guest RAM are too few: give at least 2M with -m")]
    TooLittleRam(u64),
    /// A number of CPUs we can't run.
    #[error("{0} virtual CPUs are not supported: use 1 to {MAX_VCPUS}")]
    VcpuCount(usize),
    /// The memory crate refused.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// What a machine is made of besides its CPUs and memory.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// The CPUs' CPUID profile.
    pub profile: CpuidProfile,
    /// What the clock shows at virtual time 0, in seconds since 1970 (UTC).
    pub rtc_start: i64,
}

/// What a CPU does between slices.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Rest {
    Running,
    /// After HLT or MWAIT: whether RFLAGS.IF is 0, whether NMIs are blocked too, and whether it was MWAIT.
    Halted {
        masked: bool,
        nmi_blocked: bool,
        watching: bool,
    },
    WaitForSipi,
}

/// One virtual CPU: its engine and its place in time.
#[derive(Debug)]
pub(crate) struct Cpu<V> {
    pub(crate) engine: V,
    pub(crate) time: VirtualTime,
    pub(crate) rest: Rest,
    /// Instructions retired before the engine was made (in the run that was restored), wrapping.
    pub(crate) retired_offset: u64,
}

/// A whole PC with engines of type `V`.
#[derive(Debug)]
pub struct Machine<V> {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) map: MemoryMap,
    pub(crate) pc: Pc,
    pub(crate) cpus: Vec<Cpu<V>>,
    pub(crate) profile: CpuidProfile,
    pub(crate) rsdp: Gpa,
    /// Events up to here have happened.
    pub(crate) now: VirtualTime,
    /// Since when no CPU has run.
    pub(crate) idle_since: Option<VirtualTime>,
    /// Host input that the serial port has not taken yet.
    pub(crate) input: VecDeque<u8>,
}

/// The guest-physical memory of a PC with `ram_bytes` of RAM.
///
/// # Errors
/// [`MachineError`] when the size makes no sense or the host refuses it.
pub fn guest_memory(ram_bytes: u64) -> Result<Arc<GuestMemory>, MachineError> {
    if ram_bytes < MIN_RAM {
        return Err(MachineError::TooLittleRam(ram_bytes));
    }
    Ok(Arc::new(GuestMemory::new(ram_bytes)?))
}

/// The memory map that `memory` gives a guest.
pub fn map_of(memory: &GuestMemory) -> MemoryMap {
    let ram: Vec<_> = memory.ram_ranges().into_iter().map(|(start, bytes)| (start.raw(), bytes)).collect();
    MemoryMap::of_ram(&ram)
}

/// A CPU after power-on: all but the first wait for a start-up IPI.
fn powered_on<V: Vcpu>(index: usize, mut engine: V) -> Cpu<V> {
    let mut rest = Rest::Running;
    if index > 0 {
        rest = Rest::WaitForSipi;
        engine.set_state(&CpuState { activity: Activity::WaitForSipi, ..engine.state() });
    }
    Cpu { engine, time: VirtualTime(0), rest, retired_offset: 0 }
}

impl<V: Vcpu> Machine<V> {
    /// A machine after power-on, with its tables in the BIOS area. `engines` are its CPUs in the order
    /// of their APIC ids, made for the same `memory` and profile.
    ///
    /// # Errors
    /// [`MachineError::VcpuCount`] for no CPU or more than [`MAX_VCPUS`].
    pub fn new(memory: Arc<GuestMemory>, config: &MachineConfig, engines: Vec<V>) -> Result<Self, MachineError> {
        if !(1..=MAX_VCPUS).contains(&engines.len()) {
            return Err(MachineError::VcpuCount(engines.len()));
        }
        let map = map_of(&memory);
        let lazy = LazyRam::of(&memory, engines.len());
        let low = map.low_ram_end();
        let high =
            memory.ram_ranges().iter().filter(|(start, _)| start.raw() >= FOUR_GIB).map(|&(_, bytes)| bytes).sum();
        let vcpus = engines.len() as u32;
        let pc_config = PcConfig { vcpus, profile: &config.profile, rtc_start: config.rtc_start, ram: (low, high) };
        let tables = acpi::tables(&AcpiConfig { vcpus, pci_memory: low });
        memory.write(tables.rsdp, &tables.bytes);
        memory.write(BDA_EXTENDED_SEGMENT, &((CONVENTIONAL_END >> 4) as u16).to_le_bytes());
        memory.write(BDA_MEMORY_KIB, &((CONVENTIONAL_END >> 10) as u16).to_le_bytes());
        let mut pc = Pc::new(&pc_config);
        pc.lazy = lazy;
        Ok(Self {
            memory,
            map,
            pc,
            cpus: engines.into_iter().enumerate().map(|(index, engine)| powered_on(index, engine)).collect(),
            profile: config.profile.clone(),
            rsdp: tables.rsdp,
            now: VirtualTime(0),
            idle_since: None,
            input: VecDeque::new(),
        })
    }

    /// Carries out a boot plan: what it writes, and the first CPU's state.
    pub fn boot(&mut self, plan: &BootPlan<'_>) {
        if plan.kind == Some(ImageKind::Multiboot1) {
            bios::pieces().iter().for_each(|piece| self.memory.write(piece.gpa, &piece.bytes));
            self.pc.write_ports(&bios::PORT_WRITES);
        }
        for piece in &plan.pieces {
            self.memory.write(piece.gpa, &piece.bytes);
        }
        let mut state = plan.state.clone();
        if plan.kind.is_some() {
            self.pc.open_a20();
        } else {
            state.gpr[reg::RDX] = self.profile.signature().into();
        }
        if let Some(first) = self.cpus.first_mut() {
            first.engine.set_state(&state);
            first.rest = Rest::Running;
        }
    }

    /// Maps a ROM whose last byte lies just below 4 GiB, where the reset vector is.
    ///
    /// # Errors
    /// When its size is no multiple of a page.
    pub fn add_reset_rom(&mut self, image: &[u8]) -> Result<(), MachineError> {
        self.memory.add_rom(Gpa::new(FOUR_GIB - image.len() as u64), image)?;
        Ok(())
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The guest's memory map.
    pub fn map(&self) -> &MemoryMap {
        &self.map
    }

    /// Where the ACPI root pointer lies.
    pub fn rsdp(&self) -> Gpa {
        self.rsdp
    }

    /// The engine of one CPU, for its counters and its state.
    pub fn vcpu(&self, index: usize) -> Option<&V> {
        self.cpus.get(index).map(|cpu| &cpu.engine)
    }

    /// All CPUs' engines, in the order of their APIC ids.
    pub fn vcpus(&self) -> impl Iterator<Item = &V> {
        self.cpus.iter().map(|cpu| &cpu.engine)
    }

    /// As [`vcpus`](Self::vcpus), to change what no guest sees.
    pub fn vcpus_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.cpus.iter_mut().map(|cpu| &mut cpu.engine)
    }

    /// Counts of what happened to RAM that arrives on demand; `None` if no RAM does.
    pub fn page_stats(&self) -> Option<PageStats> {
        self.pc.page_stats()
    }

    /// The PC's devices and agenda.
    pub fn pc_mut(&mut self) -> &mut Pc {
        &mut self.pc
    }

    /// Virtual time since power-on.
    pub fn now(&self) -> VirtualTime {
        self.now
    }

    /// Instructions retired by all CPUs since power-on.
    pub fn retired(&self) -> u64 {
        self.cpus.iter().fold(0, |sum, cpu| sum.wrapping_add(cpu.retired_offset.wrapping_add(cpu.engine.retired())))
    }
}
