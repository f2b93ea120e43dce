//! Raw bytes as code, in every mode: the engine never panics, its MMU's caches stay true, and the run can be
//! repeated and resumed exactly, and translated.

use crate::devices::InputBus;
use crate::engines::{EAGER, Whole};
use std::fmt;
use std::sync::Arc;
use umbra_arch::control::{Cr0, Cr3, Cr4, Efer};
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::segment::{Attr, Seg, Segment, TableRegister};
use umbra_arch::state::Activity;
use umbra_arch::{CpuState, Exit, Gpa, Slice, VirtualTime, descriptor, rflags};
use umbra_cpu::{EngineOptions, Interpreter};
use umbra_jit::Jit;
use umbra_memory::GuestMemory;

const RAM: u64 = 2 << 20;
const CODE: u64 = 0x1_0000;
const TABLES: u64 = 0x2000;
const GDT: u64 = 0x1000;
const IDT: u64 = 0x1800;
const STACK: u64 = 0x8_0000;
/// Ticks that each input runs.
const TICKS: u64 = 3000;

/// Mode that the code starts in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    Real,
    Protected16,
    Protected32,
    TwoLevel,
    Pae,
    Compatibility,
    Long,
    LongUser,
}

const MODES: [Mode; 8] = [
    Mode::Real,
    Mode::Protected16,
    Mode::Protected32,
    Mode::TwoLevel,
    Mode::Pae,
    Mode::Compatibility,
    Mode::Long,
    Mode::LongUser,
];

/// The property. Byte 0 chooses the mode, byte 1 how many of the rest answer device accesses; the rest is code.
pub fn decode_execute(data: &[u8]) {
    let [mode, split, rest @ ..] = data else { return };
    let mode = MODES[usize::from(mode & 7)];
    let (device, code) = rest.split_at(usize::from(*split).min(rest.len()));
    let whole = run(interpreter, mode, device, code, &[TICKS]);
    let pieces = run(interpreter, mode, device, code, &[7, 100, 101, 1000, TICKS]);
    let translated = run(translator, mode, device, code, &[TICKS]);
    assert_eq!(whole, translated, "the translator differs from the interpreter ({mode:?})");
    // Devices that ask for attention end slices anywhere, so only quiet runs stop at the same points.
    if device.is_empty() {
        assert_eq!(whole, pieces, "a run in slices differs from a run in one piece ({mode:?})");
    }
}

/// Bytes of RAM that are compared: code, tables, stack.
const SEEN: u64 = 0xa_0000;

/// What is comparable between runs.
#[derive(PartialEq)]
pub(crate) struct Seen {
    state: Option<CpuState>,
    retired: u64,
    ram: Vec<u8>,
}

impl fmt::Debug for Seen {
    /// Not all of RAM.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let written: Vec<_> =
            self.ram.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|b| *b != 0)).collect();
        let pages = written
            .iter()
            .map(|(number, page)| (number, page.iter().fold(0u64, |sum, b| sum.rotate_left(5) ^ u64::from(*b))));
        write!(f, "retired {}, {:x?}, checksums of pages {:x?}", self.retired, self.state, pages.collect::<Vec<_>>())
    }
}

/// Runs until each of the given times; returns what is comparable between runs.
pub(crate) fn run<V: Whole>(
    engine: fn(Arc<GuestMemory>, &CpuidProfile) -> V,
    mode: Mode,
    device: &[u8],
    code: &[u8],
    stops: &[u64],
) -> Seen {
    let mem = Arc::new(GuestMemory::new(RAM).expect("two MiB of RAM"));
    let profile = CpuidProfile::named("umbra-v3").expect("the default profile");
    let mut engine = engine(mem.clone(), &profile);
    tables(&mem, mode);
    mem.write(Gpa::new(CODE), &code[..code.len().min(0x8000)]);
    engine.set_state(&start(mode));
    let mut bus = InputBus::new(device);
    let mut now = VirtualTime(0);
    for &stop in stops {
        while now.0 < stop {
            let stopped = engine.run(&mut bus, Slice { now, until: VirtualTime(stop) });
            now = stopped.now;
            match stopped.exit {
                Exit::BudgetSpent | Exit::Attention => {}
                Exit::Halted => now = VirtualTime(stop),
                _ => return Seen { state: None, retired: engine.retired(), ram: Vec::new() },
            }
        }
        engine.interpreter().core().mmu.audit().expect("the MMU's caches agree with the guest's tables");
    }
    let state = engine.state();
    let mut ram = vec![0; SEEN as usize];
    mem.read(Gpa::new(0), &mut ram);
    Seen { state: (state.activity == Activity::Running).then_some(state), retired: engine.retired(), ram }
}

pub(crate) fn interpreter(mem: Arc<GuestMemory>, profile: &CpuidProfile) -> Interpreter {
    Interpreter::new(mem, profile, 0, &EngineOptions::default()).expect("an engine")
}

pub(crate) fn translator(mem: Arc<GuestMemory>, profile: &CpuidProfile) -> Jit {
    Jit::new(mem, profile, 0, &EngineOptions::default(), EAGER).expect("a translator")
}

fn tables(mem: &GuestMemory, mode: Mode) {
    let put = |at: u64, value: u64| mem.write(Gpa::new(at), &value.to_le_bytes());
    let code = |attr: u32| descriptor::encode(0, u32::MAX, Attr(attr));
    // Null, ring-0 code of the mode, data, ring-3 code, ring-3 data.
    let cs = match mode {
        Mode::Long | Mode::LongUser => 0xa09b,
        Mode::Real | Mode::Protected16 => 0x809b,
        _ => 0xc09b,
    };
    for (i, attr) in [cs, 0xc093, cs | 0x60, 0xc0f3].into_iter().enumerate() {
        put(GDT + 8 * (i as u64 + 1), code(attr));
    }
    let long = matches!(mode, Mode::Long | Mode::LongUser | Mode::Compatibility);
    for vector in 0..32u64 {
        // Handlers are in the code itself: hostile like everything else.
        let offset = CODE + 64 * vector;
        let gate = offset & 0xffff | 8 << 16 | 0x8e00 << 32 | (offset >> 16) << 48;
        put(IDT + vector * if long { 16 } else { 8 }, gate);
    }
    match mode {
        Mode::TwoLevel => mem.write(Gpa::new(TABLES), &0x87u32.to_le_bytes()),
        Mode::Pae => {
            put(TABLES, TABLES + 0x1001);
            put(TABLES + 0x1000, 0x87);
        }
        Mode::Long | Mode::LongUser | Mode::Compatibility => {
            put(TABLES, TABLES + 0x1007);
            put(TABLES + 0x1000, TABLES + 0x2007);
            put(TABLES + 0x2000, 0x87);
        }
        _ => {}
    }
}

fn start(mode: Mode) -> CpuState {
    let mut s = CpuState::reset();
    s.rip = CODE;
    s.gpr = std::array::from_fn(|i| CODE + 0x4000 + 0x111 * i as u64);
    s.gpr[4] = STACK;
    s.gdtr = TableRegister { base: GDT, limit: 39 };
    s.idtr = TableRegister { base: IDT, limit: 0x1ff };
    let pe = Cr0::PE | Cr0::ET | Cr0::NE;
    if mode == Mode::Real {
        s.rip = 0;
        s.seg[Seg::Cs as usize] = Segment::real((CODE >> 4) as u16);
        s.idtr = TableRegister { base: 0, limit: 0x3ff };
        return s;
    }
    let user = mode == Mode::LongUser;
    let dpl = if user { 3 } else { 0 };
    for seg in [Seg::Ds, Seg::Es, Seg::Ss, Seg::Fs, Seg::Gs] {
        s.seg[seg as usize] = Segment::flat_data(if user { 0x23 } else { 0x10 }, dpl);
    }
    s.seg[Seg::Cs as usize] = match mode {
        Mode::Long => Segment::code64(8, 0),
        Mode::LongUser => Segment::code64(0x1b, 3),
        Mode::Protected16 => Segment { attr: Attr(0x809b), ..Segment::flat_code32(8, 0) },
        _ => Segment::flat_code32(8, 0),
    };
    s.cpl = dpl;
    s.cr4 = Cr4::new(Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE);
    s.xcr0 = 7;
    s.cr3 = Cr3::new(TABLES);
    let paging = pe | Cr0::PG;
    match mode {
        Mode::TwoLevel => (s.cr0, s.cr4) = (Cr0::new(paging), Cr4::new(s.cr4.raw() | Cr4::PSE)),
        Mode::Pae => {
            (s.cr0, s.cr4) = (Cr0::new(paging), Cr4::new(s.cr4.raw() | Cr4::PAE));
            s.pdpte[0] = TABLES + 0x1001;
        }
        Mode::Compatibility | Mode::Long | Mode::LongUser => {
            (s.cr0, s.cr4) = (Cr0::new(paging), Cr4::new(s.cr4.raw() | Cr4::PAE));
            s.efer = Efer::new(Efer::LME | Efer::LMA | Efer::SCE | Efer::NXE);
        }
        _ => s.cr0 = Cr0::new(pe),
    }
    s.rflags = rflags::FIXED;
    s
}
