//! Interrupts of every kind under KVM, with the local APIC in the kernel and in the machine, and while the guest
//! changes between KVM and the interpreter all the time. Where there is no KVM, these say so.
#![cfg(target_os = "linux")]

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use std::sync::Arc;
use umbra_accel::handover::Side;
use umbra_accel::kvm::{Fitted, Irqchip, KvmVcpu, fit};
use umbra_accel::{Backend, HandOver, defects};
use umbra_arch::control::{Cr0, Cr3, Cr4, Efer};
use umbra_arch::cpuid::{CpuidProfile, Feature};
use umbra_arch::local_apic::index;
use umbra_arch::segment::{Attr, Seg, Segment, TableRegister};
use umbra_arch::{AccessWidth, Bus, CpuState, Gpa, VirtualTime};
use umbra_cpu::{EngineOptions, Interpreter};
use umbra_machine::boot::BootPlan;
use umbra_machine::{End, Host, Machine, MachineConfig, guest_memory};

const CODE: u64 = 0x2_0000;
const STACK: u64 = 0x8_0000;
/// A counter for each vector.
const COUNTERS: u64 = 0x7000;
/// ISR as the level-triggered interrupt's handler found it.
const IN_SERVICE: u64 = 0x7800;
const HANDLERS: u64 = 0x9000;
const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;
/// The test device's interrupt line 11.
const LINE: u32 = 0x200b;
const PIT: u8 = 0x20;
const TIMER: u8 = 0x40;
const IPI: u8 = 0x41;
const LEVEL: u8 = 0x51;
/// How often each kind comes.
const ROUNDS: u64 = 10;

/// How the guest uses its local APIC.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    /// By its page, with a periodic timer.
    Xapic,
    /// By its page, with a timer that every interrupt starts anew.
    OneShot,
    /// By MSRs, with a TSC deadline.
    X2apic,
}

struct Silent;

impl Host for Silent {
    fn serial(&mut self, _: &[u8]) {}
}

type Pair = HandOver<KvmVcpu, Interpreter>;

/// What KVM can be here; `None`, loudly, where there is none.
fn kvm(irqchip: Irqchip) -> Option<Fitted> {
    let is_offered = Irqchip::offered().map(|offered| irqchip == Irqchip::User || offered == irqchip);
    match is_offered.and_then(|is_offered| fit(&CpuidProfile::default(), irqchip).map(|fitted| (is_offered, fitted))) {
        Ok((true, fitted)) => Some(fitted),
        Ok((false, _)) => {
            eprintln!("SKIPPED, nothing was tested: this KVM has no split irqchip");
            None
        }
        Err(error) => {
            eprintln!("SKIPPED, nothing was tested: {error}");
            None
        }
    }
}

/// Writes a register of the local APIC. RAX, RCX, RDX and RDI are lost.
fn write(a: &mut CodeAssembler, mode: Mode, register: u16, value: u32) -> Result<(), IcedError> {
    if mode == Mode::X2apic {
        a.mov(ecx, 0x800 + i32::from(register))?;
        a.mov(eax, value)?;
        a.xor(edx, edx)?;
        return a.wrmsr();
    }
    a.mov(rdi, LAPIC + u64::from(register) * 16)?;
    a.mov(dword_ptr(rdi), value)
}

/// The register of ISR that [`LEVEL`] is in, to EAX. RCX, RDX and RDI are lost.
fn read_in_service(a: &mut CodeAssembler, mode: Mode) -> Result<(), IcedError> {
    let register = index::ISR0 + u16::from(LEVEL / 32);
    if mode == Mode::X2apic {
        a.mov(ecx, 0x800 + i32::from(register))?;
        return a.rdmsr();
    }
    a.mov(rdi, LAPIC + u64::from(register) * 16)?;
    a.mov(eax, dword_ptr(rdi))
}

fn out(a: &mut CodeAssembler, port: u32, value: u32) -> Result<(), IcedError> {
    a.mov(dx, port)?;
    a.mov(al, value)?;
    a.out(dx, al)
}

/// A millisecond or less from now on, in whatever unit.
fn start_timer(a: &mut CodeAssembler, mode: Mode) -> Result<(), IcedError> {
    if mode != Mode::X2apic {
        return write(a, mode, index::INITIAL_COUNT, 500_000);
    }
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)?;
    a.add(rax, 500_000)?;
    a.mov(rdx, rax)?;
    a.shr(rdx, 32)?;
    a.mov(ecx, 0x6e0)?;
    a.wrmsr()
}

fn handler(a: &mut CodeAssembler, mode: Mode, vector: u8) -> Result<(), IcedError> {
    a.inc(qword_ptr(COUNTERS + 8 * u64::from(vector)))?;
    let saved = [rax, rcx, rdx, rdi];
    saved.into_iter().try_for_each(|register| a.push(register))?;
    match vector {
        PIT => out(a, 0x20, 0x20)?,
        LEVEL => {
            read_in_service(a, mode)?;
            a.mov(dword_ptr(IN_SERVICE), eax)?;
            out(a, LINE, 0)?;
        }
        TIMER if mode != Mode::Xapic => start_timer(a, mode)?,
        _ => {}
    }
    if vector != PIT {
        write(a, mode, index::EOI, 0)?;
    }
    saved.into_iter().rev().try_for_each(|register| a.pop(register))?;
    a.iretq()
}

/// Waits, asleep or not, until the counter of `vector` has reached R8.
fn await_round(a: &mut CodeAssembler, vector: u8, asleep: bool) -> Result<(), IcedError> {
    let (mut again, mut done) = (a.create_label(), a.create_label());
    a.set_label(&mut again)?;
    if asleep {
        a.cli()?;
    }
    a.cmp(qword_ptr(COUNTERS + 8 * u64::from(vector)), r8)?;
    a.jae(done)?;
    if asleep {
        a.sti()?;
        a.hlt()?;
    }
    a.jmp(again)?;
    a.set_label(&mut done)?;
    a.sti()
}

fn program(a: &mut CodeAssembler, mode: Mode) -> Result<(), IcedError> {
    if mode == Mode::X2apic {
        a.mov(ecx, 0x1b)?;
        a.rdmsr()?;
        a.or(eax, 0xc00)?;
        a.wrmsr()?;
    }
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xfe), (0xa1, 0xff)] {
        out(a, port, value)?;
    }
    for (port, value) in [(0x43, 0x34), (0x40, 0x50), (0x40, 2)] {
        out(a, port, value)?;
    }
    for (register, value) in [(0x26, 0x8000 | u32::from(LEVEL)), (0x27, 0)] {
        a.mov(rdi, IOAPIC)?;
        a.mov(dword_ptr(rdi), register)?;
        a.mov(dword_ptr(rdi + 0x10), value)?;
    }
    let timer_mode = match mode {
        Mode::Xapic => 0x2_0000,
        Mode::OneShot => 0,
        Mode::X2apic => 0x4_0000,
    };
    for (register, value) in
        [(index::SVR, 0x1ff), (index::DIVIDE, 0xb), (index::LVT_TIMER, timer_mode | u32::from(TIMER))]
    {
        write(a, mode, register, value)?;
    }
    start_timer(a, mode)?;
    a.sti()?;
    a.mov(r8, 1u64)?;
    let mut round = a.create_label();
    a.set_label(&mut round)?;
    write(a, mode, index::ICR_LOW, 0x4_4000 | u32::from(IPI))?;
    await_round(a, IPI, false)?;
    out(a, LINE, 1)?;
    await_round(a, LEVEL, false)?;
    await_round(a, PIT, false)?;
    await_round(a, TIMER, true)?;
    a.inc(r8)?;
    a.cmp(r8, ROUNDS as i32)?;
    a.jbe(round)?;
    // Power off.
    a.cli()?;
    out(a, 0x605, 0x20)?;
    let mut off = a.create_label();
    a.set_label(&mut off)?;
    a.hlt()?;
    a.jmp(off)
}

fn assemble(at: u64, build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// 64-bit code in ring 0, with the first 2 MiB and the APICs mapped.
fn load(machine: &mut Machine<Pair>, mode: Mode, code: &[u8]) {
    let memory = Arc::clone(machine.memory());
    let put = |at: u64, value: u64| memory.write(Gpa::new(at), &value.to_le_bytes());
    for (at, value) in [(0x2000, 0x3003), (0x3000, 0x4003), (0x3018, 0x5003), (0x4000, 0x83)] {
        put(at, value);
    }
    for base in [IOAPIC, LAPIC] {
        put(0x5000 + 8 * (base >> 21 & 511), base | 0x9b);
    }
    put(0x1108, 0x00af_9b00_0000_ffff);
    put(0x1110, 0x00cf_9300_0000_ffff);
    for vector in [PIT, TIMER, IPI, LEVEL] {
        let at = HANDLERS + 0x100 * u64::from(vector - PIT);
        put(0x6000 + 16 * u64::from(vector), at & 0xffff | 8 << 16 | 0x8e << 40 | (at & 0xffff_0000) << 32);
        memory.write(Gpa::new(at), &assemble(at, |a| handler(a, mode, vector)));
    }
    memory.write(Gpa::new(CODE), code);
    let mut s = CpuState::reset();
    s.cr0 = Cr0::new(Cr0::PE | Cr0::PG | Cr0::ET | Cr0::NE | Cr0::WP);
    s.cr3 = Cr3::new(0x2000);
    s.cr4 = Cr4::new(Cr4::PAE | Cr4::OSFXSR);
    s.efer = Efer::new(Efer::LME | Efer::LMA | Efer::NXE);
    for seg in [Seg::Ds, Seg::Es, Seg::Ss, Seg::Fs, Seg::Gs] {
        s.seg[seg as usize] = Segment::flat_data(0x10, 0);
    }
    s.seg[Seg::Cs as usize] = Segment::code64(8, 0);
    s.seg[Seg::Tr as usize] = Segment { base: 0x1000, limit: 0x67, attr: Attr(0x8b), selector: 0x28 };
    s.gdtr = TableRegister { base: 0x1100, limit: 0x3f };
    s.idtr = TableRegister { base: 0x6000, limit: 0xfff };
    (s.rip, s.gpr[4]) = (CODE, STACK);
    machine.boot(&BootPlan { kind: None, pieces: Vec::new(), state: Box::new(s) });
    machine.pc_mut().open_a20();
}

fn machine(fitted: &Fitted) -> Machine<Pair> {
    let memory = guest_memory(16 << 20).unwrap();
    let accelerator = KvmVcpu::new(Arc::clone(&memory), fitted).unwrap();
    let soft = Interpreter::new(Arc::clone(&memory), &fitted.profile, 0, &EngineOptions::default()).unwrap();
    let config = MachineConfig { profile: fitted.profile.clone(), rtc_start: 0 };
    Machine::new(memory, &config, vec![HandOver::new(accelerator, soft)]).unwrap()
}

/// What a run came to.
struct Outcome {
    end: End,
    ipis: u64,
    levels: u64,
    pits: u64,
    timers: u64,
    /// Whether the level-triggered interrupt was in service in its handler.
    in_service: bool,
    switches: usize,
}

/// Runs the guest, with changes of sides after so many nanoseconds under KVM and in the interpreter.
fn run(fitted: &Fitted, mode: Mode, sides: Option<(u64, u64)>) -> Outcome {
    let mut machine = machine(fitted);
    load(&mut machine, mode, &assemble(CODE, |a| program(a, mode)));
    let deadline = machine.now().plus(60_000_000_000);
    let end = loop {
        let is_soft = machine.vcpu(0).is_some_and(|pair| pair.side() == Side::Soft);
        let limit = match sides {
            None => deadline,
            Some((kvm, soft)) => machine.now().plus(if is_soft { soft } else { kvm }).min(deadline),
        };
        match machine.run(&mut Silent, Some(limit)) {
            End::Limit if limit < deadline => machine.vcpus_mut().for_each(|pair| {
                pair.hand_over(if is_soft { Side::Accelerator } else { Side::Soft });
            }),
            end => break end,
        }
    };
    let word = |at: u64| {
        let mut bytes = [0; 8];
        machine.memory().read(Gpa::new(at), &mut bytes);
        u64::from_le_bytes(bytes)
    };
    let [ipis, levels, pits, timers] = [IPI, LEVEL, PIT, TIMER].map(|vector| word(COUNTERS + 8 * u64::from(vector)));
    let in_service = word(IN_SERVICE) >> (LEVEL % 32) & 1 != 0;
    Outcome {
        end,
        ipis,
        levels,
        pits,
        timers,
        in_service,
        switches: machine.vcpu(0).map_or(0, |pair| pair.switches().len()),
    }
}

/// All kinds of interrupts arrive, each once.
fn check(irqchip: Irqchip, modes: &[Mode], sides: &[Option<(u64, u64)>]) {
    let Some(fitted) = kvm(irqchip) else { return };
    let defect = defects::of_split_irqchip(Backend::of_kvm()).filter(|_| irqchip == Irqchip::Split);
    for (&mode, &sides) in modes.iter().flat_map(|mode| sides.iter().map(move |sides| (mode, sides))) {
        if let (Some(defect), Some(_)) = (defect, sides) {
            // What was ended isn't delivered yet, and shows nowhere: a hand-over loses it now and then.
            eprintln!("SKIPPED, not tested: hand-overs with interrupts under way: {}", defect.name);
            continue;
        }
        let Outcome { end, ipis, levels, pits, timers, in_service, switches } = run(&fitted, mode, sides);
        let text = format!("{irqchip} {mode:?} {sides:?}: {ipis} {levels} {pits} {timers}, {switches} switches");
        eprintln!("{text}");
        assert_eq!((end, ipis), (End::PowerOff, ROUNDS), "{text}");
        assert!(levels == ROUNDS || levels > ROUNDS && defect.is_some(), "{text}");
        assert!(pits >= ROUNDS && timers >= ROUNDS, "{text}");
        assert!(switches > 5 || sides.is_none(), "{text}");
        if sides.is_none() {
            // Should a backend's defect be gone, its name has to go.
            assert_eq!(in_service, defect.is_none(), "{text}: {defect:?}");
        }
    }
}

const SIDES: [Option<(u64, u64)>; 3] = [None, Some((300_000, 20_000)), Some((70_000, 3_000))];

#[test]
fn interrupts_reach_a_guest_whose_local_apic_is_in_the_kernel() {
    check(Irqchip::Split, &[Mode::Xapic, Mode::OneShot, Mode::X2apic], &SIDES);
}

#[test]
fn interrupts_reach_a_guest_whose_local_apic_is_the_machines() {
    check(Irqchip::User, &[Mode::Xapic, Mode::OneShot], &SIDES);
}

#[test]
fn cpuid_offers_what_the_irqchip_makes_possible() {
    for irqchip in [Irqchip::Split, Irqchip::User] {
        let Some(fitted) = kvm(irqchip) else { return };
        for feature in [Feature::X2apic, Feature::TscDeadline] {
            assert_eq!(fitted.offered().has(feature), irqchip == Irqchip::Split, "{irqchip} {feature}");
        }
        assert!(!fitted.offered().has(Feature::InvariantTsc), "not the machine's frequency");
    }
}

#[test]
fn a_guest_that_nothing_will_wake_is_noticed() {
    for irqchip in [Irqchip::Split, Irqchip::User] {
        let Some(fitted) = kvm(irqchip) else { continue };
        for enabled in [false, true] {
            let mut machine = machine(&fitted);
            let code = assemble(CODE, |a| {
                if enabled {
                    a.sti()?
                } else {
                    a.cli()?
                }
                a.hlt()
            });
            load(&mut machine, Mode::Xapic, &code);
            let end = machine.run(&mut Silent, Some(VirtualTime(10_000_000_000)));
            assert!(
                matches!(end, End::HaltedForever(halted) if halted.interrupts_enabled == enabled),
                "{irqchip} {enabled}: {end:?}"
            );
        }
    }
}

/// The registers that don't change by themselves, by their offsets in the page.
fn registers(machine: &mut Machine<Pair>) -> Vec<(u64, u64)> {
    let now = machine.now();
    let mut bus = machine.pc_mut().bus(0, VirtualTime(u64::MAX - 1));
    let kept = (0..64).filter(|&register| ![index::CURRENT_COUNT, index::EOI].contains(&register));
    kept.map(|register| {
        let offset = u64::from(register) * 16;
        (offset, bus.mmio_read(now, Gpa::new(LAPIC + offset), AccessWidth::Dword).value)
    })
    .collect()
}

#[test]
fn the_local_apic_comes_back_from_the_kernel_as_it_went() {
    let Some(fitted) = kvm(Irqchip::Split) else { return };
    let mut machine = machine(&fitted);
    // JMP to itself, interrupts off.
    load(&mut machine, Mode::Xapic, &[0xeb, 0xfe]);
    let now = machine.now();
    let mut bus = machine.pc_mut().bus(0, VirtualTime(u64::MAX - 1));
    let mut put = |register: u16, value: u64| {
        bus.mmio_write(now, Gpa::new(LAPIC + u64::from(register) * 16), AccessWidth::Dword, value);
    };
    for (register, value) in [
        (index::SVR, 0x1f3),
        (index::LDR, 0x5a00_0000),
        (index::DFR, 0x0fff_ffff),
        (index::DIVIDE, 0xa),
        (index::LVT_TIMER, 0x3_0061),
        (index::INITIAL_COUNT, 0x7fff_ffff),
        (index::LVT_PERFORMANCE, 0x1_0400),
        (index::LVT_LINT1, 0x1_8462),
        (index::LVT_ERROR, 0x63),
        (index::ICR_LOW, 0x4_4091),
    ] {
        put(register, value);
    }
    assert_eq!(bus.interrupt_acknowledge(now), Some(0x91), "in service from now on");
    for (register, value) in [(index::ICR_LOW, 0x4_4042), (index::ICR_LOW, 0x4_40e7), (index::TPR, 0xf3)] {
        bus.mmio_write(now, Gpa::new(LAPIC + u64::from(register) * 16), AccessWidth::Dword, value);
    }
    let went = registers(&mut machine);
    assert!(went.iter().filter(|(_, value)| *value != 0).count() > 15, "{went:x?}");
    for side in [Side::Soft, Side::Accelerator, Side::Soft] {
        let limit = machine.now().plus(500_000);
        assert_eq!(machine.run(&mut Silent, Some(limit)), End::Limit);
        machine.vcpus_mut().for_each(|pair| pair.hand_over(side));
    }
    let limit = machine.now().plus(1_000);
    assert_eq!(machine.run(&mut Silent, Some(limit)), End::Limit);
    assert_eq!(machine.vcpu(0).map(|pair| (pair.side(), pair.switches().len())), Some((Side::Soft, 3)));
    assert_eq!(registers(&mut machine), went);
}
