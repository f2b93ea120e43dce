//! A guest that writes all over its page tables and devices: the machine never panics, the MMU's caches stay true
//! to the tables, and the run is the same whatever they forget and wherever it was saved.

use crate::engines::{EAGER, Whole};
use std::sync::Arc;
use umbra_arch::control::{Cr0, Cr3, Cr4, Efer};
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::segment::{Seg, Segment, TableRegister};
use umbra_arch::{CpuState, Gpa, VirtualTime, rflags};
use umbra_cpu::{EngineOptions, Interpreter};
use umbra_jit::Jit;
use umbra_machine::boot::{BootPlan, Piece};
use umbra_machine::{End, Host, Machine, MachineConfig, guest_memory};
use umbra_memory::{GuestMemory, PageFlags};
use umbra_mmu::{MmuMode, MmuOptions};

const RAM: u64 = 4 << 20;
const GDT: u64 = 0x1000;
const IDT: u64 = 0x1800;
const HANDLER: u32 = 0x2000;
const CODE: u32 = 0x1_0000;
const STACK: u32 = 0x8_0000;
/// Pages of tables, the root first.
const TABLES: u64 = 0x10_0000;
const TABLE_PAGES: u64 = 5;
const PAGE: u64 = 0x1000;
/// Instructions' worth of time that a guest gets, and how often the caches are audited.
const TICKS: u64 = 4_000;
const AUDIT_TICKS: u64 = 1_000;
/// Bytes of input for an operation, and most of them.
const OP_BYTES: usize = 8;
const MAX_OPS: usize = 256;
/// Where devices have registers in memory, a hole, and the end of RAM.
const WINDOWS: [u32; 6] = [0xfee0_0000, 0xfec0_0000, 0xfed0_0000, 0xfffc_0000, 0xa_0000, 0x3f_f000];
/// Present, writable, user, accessed, dirty, large.
const USUAL_BITS: u32 = 0xe7;

/// How the guest's tables are read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Paging {
    TwoLevel,
    Pae,
    FourLevel,
}

/// The property. Byte 0 chooses the paging mode; each eight bytes after it are an operation.
pub fn hostile_guest(data: &[u8]) {
    let [mode, ops @ ..] = data else { return };
    let paging = [Paging::TwoLevel, Paging::Pae, Paging::FourLevel][usize::from(mode % 3)];
    let plan = plan(paging, ops);
    let kept = finish(booted(MmuMode::NoUnload, &plan));
    let seed = u64::from(*mode);
    assert_eq!(finish(booted(MmuMode::DropAtRandom(seed), &plan)), kept, "caches that forget change the run");

    assert_eq!(finish(translated(&plan)), kept, "the translator differs from the interpreter");

    let mut machine = booted(MmuMode::NoUnload, &plan);
    if machine.run(&mut Deaf, Some(VirtualTime(TICKS / 3))) == End::Limit {
        let saved = machine.save().expect("a machine between instructions can be saved");
        let mut other = fresh(MmuMode::NoUnload);
        other.restore(&saved).expect("its own save file");
        assert_eq!(finish(other), kept, "a restored run differs");
    }
}

/// How a run ended, and everything that the guest can see of it.
type Left = (End, u64, CpuState, Vec<(u64, Vec<u8>)>);

/// Runs to the end with audits.
fn finish<V: Whole>(mut machine: Machine<V>) -> Left {
    let end = loop {
        let until = VirtualTime((machine.now().0 + AUDIT_TICKS).min(TICKS));
        let end = machine.run(&mut Deaf, Some(until));
        machine
            .vcpu(0)
            .expect("a CPU")
            .interpreter()
            .core()
            .mmu
            .audit()
            .expect("the MMU's caches agree with the guest's tables");
        if end != End::Limit || machine.now().0 >= TICKS {
            break end;
        }
    };
    (end, machine.retired(), machine.vcpu(0).expect("a CPU").state(), pages(machine.memory()))
}

/// Pages of memory that hold something, by offset. What was never written isn't read: that would cost more than the run.
fn pages(memory: &GuestMemory) -> Vec<(u64, Vec<u8>)> {
    let mut all = Vec::new();
    for off in memory.pages_with(PageFlags::DIRTY) {
        let mut page = vec![0; PAGE as usize];
        memory.load_bytes(off, &mut page);
        if page.iter().any(|&byte| byte != 0) {
            all.push((off.raw(), page));
        }
    }
    all
}

fn fresh(mode: MmuMode) -> Machine<Interpreter> {
    let profile = CpuidProfile::named("umbra-v3").expect("the default profile");
    let memory = guest_memory(RAM).expect("four MiB of RAM");
    let options = EngineOptions { mmu: MmuOptions { mode, ..MmuOptions::default() } };
    let engine = Interpreter::new(Arc::clone(&memory), &profile, 0, &options).expect("an engine");
    Machine::new(memory, &MachineConfig { profile, rtc_start: 0 }, vec![engine]).expect("a machine")
}

fn translated(plan: &BootPlan<'_>) -> Machine<Jit> {
    let profile = CpuidProfile::named("umbra-v3").expect("the default profile");
    let memory = guest_memory(RAM).expect("four MiB of RAM");
    let engine = Jit::new(Arc::clone(&memory), &profile, 0, &EngineOptions::default(), EAGER).expect("a translator");
    let config = MachineConfig { profile, rtc_start: 0 };
    let mut machine = Machine::new(memory, &config, vec![engine]).expect("a machine");
    machine.boot(plan);
    machine
}

fn booted(mode: MmuMode, plan: &BootPlan<'_>) -> Machine<Interpreter> {
    let mut machine = fresh(mode);
    machine.boot(plan);
    machine
}

/// The guest: operations one after the other for ever. Each says in EBP where to go on if it faults.
fn program(ops: &[u8]) -> Vec<u8> {
    let mut code = Vec::new();
    for op in ops.chunks_exact(OP_BYTES).take(MAX_OPS) {
        let body = operation(op);
        code.push(0xbd);
        code.extend((CODE + code.len() as u32 + 4 + body.len() as u32).to_le_bytes());
        code.extend(body);
    }
    // JMP back to the first.
    code.push(0xe9);
    let back = 0u32.wrapping_sub(code.len() as u32 + 4);
    code.extend(back.to_le_bytes());
    code
}

/// Machine code that means the same in 32-bit and 64-bit code.
fn operation(op: &[u8]) -> Vec<u8> {
    let [kind, shape, rest @ ..] = op else { return Vec::new() };
    let place = u32::from(u16::from_le_bytes([rest[0], rest[1]]));
    let raw = u32::from_le_bytes([rest[2], rest[3], rest[4], rest[5]]);
    let in_tables = TABLES as u32 + place % (TABLE_PAGES * PAGE) as u32;
    let in_window = WINDOWS[usize::from(shape >> 4) % WINDOWS.len()] + place % PAGE as u32;
    // A likely entry: a frame of RAM, often one of the tables, and some of the usual bits.
    let frame =
        if shape & 4 == 0 { TABLES as u32 + (raw >> 12) % TABLE_PAGES as u32 * PAGE as u32 } else { raw & 0x3f_f000 };
    let entry = frame | 1 | raw & USUAL_BITS;
    let value = if shape & 8 == 0 { entry } else { raw };
    let mut code = Vec::new();
    let mut load = |opcode: u8, value: u32| {
        code.push(opcode);
        code.extend(value.to_le_bytes());
    };
    const EAX: u8 = 0xb8;
    const ECX: u8 = 0xb9;
    const EDX: u8 = 0xba;
    const EDI: u8 = 0xbf;
    match kind % 10 {
        // Entries in their places, then anything anywhere.
        0 | 1 => {
            load(EAX, value);
            load(EDI, in_tables & !3);
            code.extend([0x89, 0x07]);
        }
        2 => {
            load(EAX, value);
            load(EDI, in_tables);
            code.extend(store(*shape));
        }
        // REP STOSD over a part of a table.
        3 => {
            load(EAX, value);
            load(ECX, u32::from(*shape));
            load(EDI, in_tables & !3);
            code.extend([0xf3, 0xab]);
        }
        // Reads and writes anywhere below 4 MiB, which need the tables.
        4 => {
            load(EDI, raw & 0x3f_ffff);
            code.extend([0x8b, 0x07]);
        }
        5 => {
            load(EDI, 0x20_0000 | raw & 0x1f_ffff);
            code.extend(store(*shape));
        }
        6 => {
            load(EAX, raw);
            load(EDI, in_window);
            code.extend(store(*shape));
        }
        7 => {
            load(EDI, in_window);
            code.extend([0x8b, 0x07]);
        }
        8 => {
            load(EAX, raw);
            load(EDX, port(place, *shape));
            code.extend([&[0xee][..], &[0x66, 0xef], &[0xef], &[0xec], &[0x66, 0xed], &[0xed]][usize::from(shape % 6)]);
        }
        _ => {
            load(EDI, raw & 0x3f_ffff);
            // The tables again; another page as tables; INVLPG; CR4 with PGE, PSE or both changed.
            let control: &[u8] = match shape % 4 {
                0 => &[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8],
                1 => &[0x0f, 0x01, 0x3f],
                2 => &[0x0f, 0x20, 0xe0, 0x34, 0x80, 0x0f, 0x22, 0xe0],
                _ => &[0x0f, 0x20, 0xc0, 0x35, 0, 0, 1, 0, 0x0f, 0x22, 0xc0],
            };
            code.extend(control);
        }
    }
    code
}

/// MOV [EDI], AL, AX or EAX; XADD [EDI], EAX.
fn store(shape: u8) -> &'static [u8] {
    [&[0x88, 0x07][..], &[0x66, 0x89, 0x07], &[0x89, 0x07], &[0x0f, 0xc1, 0x07]][usize::from(shape & 3)]
}

/// Mostly ports that somebody answers.
fn port(place: u32, shape: u8) -> u32 {
    const BASES: [u32; 12] = [0x20, 0x40, 0x60, 0x70, 0xa0, 0x3f8, 0x4d0, 0x510, 0x600, 0xcf8, 0xe0, 0x92];
    match shape >> 4 {
        base @ 0..12 => BASES[base as usize] + place % 16,
        _ => place,
    }
}

fn quads(entries: impl IntoIterator<Item = (usize, u64)>) -> Vec<u8> {
    let mut page = vec![0; PAGE as usize];
    for (at, value) in entries {
        page[8 * at..8 * at + 8].copy_from_slice(&value.to_le_bytes());
    }
    page
}

fn doubles(entries: impl IntoIterator<Item = (usize, u32)>) -> Vec<u8> {
    let mut page = vec![0; PAGE as usize];
    for (at, value) in entries {
        page[4 * at..4 * at + 4].copy_from_slice(&value.to_le_bytes());
    }
    page
}

/// RAM by small pages up to 2 or 4 MiB, what lies at 3 GiB and above by large ones, all at their own addresses.
fn tables(paging: Paging) -> Vec<u8> {
    let table = |n: u64| TABLES + n * PAGE + 7;
    if paging == Paging::TwoLevel {
        let high = (768..1024).map(|i| (i, (i as u32) << 22 | 0x87));
        let root = doubles([(0, table(1) as u32)].into_iter().chain(high));
        let small = doubles((0..1024).map(|i| (i, (i as u32) << 12 | 7)));
        return [root, small].concat();
    }
    // A table of pointers has no rights in PAE mode.
    let pointer = |n| if paging == Paging::Pae { table(n) & !6 } else { table(n) };
    let pointers = quads([(0, pointer(1)), (3, pointer(2))]);
    let low = quads([(0, table(3)), (1, 2 << 20 | 0x87)]);
    let high = quads((0..512).map(|i| (i, 3 << 30 | (i as u64) << 21 | 0x87)));
    let small = quads((0..512).map(|i| (i, (i as u64) << 12 | 7)));
    let root = quads([(0, table(0))]);
    [pointers, low, high, small, root].concat()
}

fn plan(paging: Paging, ops: &[u8]) -> BootPlan<'static> {
    let long = paging == Paging::FourLevel;
    let code: u64 = if long { 0x00af_9b00_0000_ffff } else { 0x00cf_9b00_0000_ffff };
    let gdt: Vec<u8> = [0, code, 0x00cf_9300_0000_ffff].into_iter().flat_map(u64::to_le_bytes).collect();
    let gate = u64::from(HANDLER) & 0xffff | 8 << 16 | 0x8e00 << 32;
    let gate: &[u64] = if long { &[gate, 0] } else { &[gate] };
    let idt = gate.repeat(32).into_iter().flat_map(u64::to_le_bytes).collect();
    // MOV ESP, stack; JMP EBP.
    let handler = [&[0xbc][..], &STACK.to_le_bytes(), &[0xff, 0xe5]].concat();
    let piece = |what, at: u64, bytes: Vec<u8>| Piece { what, gpa: Gpa::new(at), bytes: bytes.into() };
    let pieces = vec![
        piece("GDT", GDT, gdt),
        piece("IDT", IDT, idt),
        piece("handler", u64::from(HANDLER), handler),
        piece("code", u64::from(CODE), program(ops)),
        piece("tables", TABLES, tables(paging)),
    ];
    BootPlan { kind: None, pieces, state: Box::new(start(paging)) }
}

fn start(paging: Paging) -> CpuState {
    let mut s = CpuState::reset();
    s.rip = u64::from(CODE);
    s.rflags = rflags::FIXED;
    s.gpr[4] = u64::from(STACK);
    s.gdtr = TableRegister { base: GDT, limit: 23 };
    s.idtr = TableRegister { base: IDT, limit: 0x1ff };
    for seg in [Seg::Ds, Seg::Es, Seg::Ss, Seg::Fs, Seg::Gs] {
        s.seg[seg as usize] = Segment::flat_data(16, 0);
    }
    s.seg[Seg::Cs as usize] =
        if paging == Paging::FourLevel { Segment::code64(8, 0) } else { Segment::flat_code32(8, 0) };
    s.cr0 = Cr0::new(Cr0::PE | Cr0::ET | Cr0::NE | Cr0::PG);
    s.cr3 = Cr3::new(TABLES);
    match paging {
        Paging::TwoLevel => s.cr4 = Cr4::new(Cr4::PSE),
        Paging::Pae => {
            s.cr4 = Cr4::new(Cr4::PAE);
            s.pdpte = [TABLES + PAGE + 1, 0, 0, TABLES + 2 * PAGE + 1];
        }
        Paging::FourLevel => {
            s.cr3 = Cr3::new(TABLES + 4 * PAGE);
            s.cr4 = Cr4::new(Cr4::PAE);
            s.efer = Efer::new(Efer::LME | Efer::LMA | Efer::NXE);
        }
    }
    s
}

/// A host that neither hears nor says anything.
struct Deaf;

impl Host for Deaf {
    fn serial(&mut self, _: &[u8]) {}
}
