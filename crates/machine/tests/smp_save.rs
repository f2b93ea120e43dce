//! Four CPUs on the real engine that race for shared words: the same race in every run, however often it is
//! stopped, saved and restored.

use iced_x86::code_asm::*;
use std::sync::Arc;
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::{CpuState, Vcpu, VirtualTime};
use umbra_cpu::{EngineOptions, Interpreter};
use umbra_machine::boot::{self, BootRequest};
use umbra_machine::{End, Host, Machine, MachineConfig, guest_memory};

const CPUS: u32 = 4;
/// The others' code lies behind the first jump.
const OTHERS: u32 = boot::BOOT_SECTOR_AT as u32 + 2;
/// Page of the start-up interrupt: a far jump to it.
const START: u32 = 0x8000;
/// Words that all write, and rounds that the others made.
const SHARED: u32 = 0x900;
const ROUNDS: u32 = 0x902;
const X2APIC_ICR: u32 = 0x830;

/// Collects serial output.
#[derive(Default)]
struct Listener(Vec<u8>);

impl Host for Listener {
    fn serial(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }
}

/// Mixes DI with what the others leave in the shared word.
fn race(a: &mut CodeAssembler, times: u32) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(cx, times)?;
    a.set_label(&mut again)?;
    a.imul_3(di, di, 31)?;
    a.add(di, cx)?;
    a.add(di, word_ptr(SHARED))?;
    a.lock().xadd(word_ptr(SHARED), di)?;
    a.loop_(again)?;
    a.rdtsc()?;
    a.add(di, ax)
}

/// The first CPU starts the others, then says a letter for each of 40 rounds in which they made one, too.
fn boot_sector() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    let (mut start, mut others, mut delay, mut next, mut wait) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label(), a.create_label());
    a.jmp(start)?;
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    a.set_label(&mut others)?;
    race(&mut a, 170)?;
    a.lock().inc(word_ptr(ROUNDS))?;
    a.jmp(others)?;
    a.set_label(&mut start)?;
    a.cli()?;
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    a.mov(byte_ptr(START), 0xea)?;
    a.mov(word_ptr(START + 1), OTHERS)?;
    a.mov(word_ptr(START + 3), 0)?;
    a.mov(ecx, 0x1b)?;
    a.rdmsr()?;
    a.or(ax, 0xc00)?;
    a.wrmsr()?;
    a.mov(ecx, X2APIC_ICR)?;
    a.xor(edx, edx)?;
    a.mov(eax, 0xc4500)?;
    a.wrmsr()?;
    a.mov(bx, 5000)?;
    a.set_label(&mut delay)?;
    a.dec(bx)?;
    a.jne(delay)?;
    a.mov(eax, 0xc4600 | START >> 12)?;
    a.wrmsr()?;
    a.xor(bp, bp)?;
    a.xor(si, si)?;
    a.set_label(&mut next)?;
    race(&mut a, 90)?;
    a.set_label(&mut wait)?;
    a.pause()?;
    a.inc(di)?;
    a.cmp(word_ptr(ROUNDS), si)?;
    a.je(wait)?;
    a.mov(si, word_ptr(ROUNDS))?;
    a.mov(dx, 0x3f8)?;
    a.mov(ax, di)?;
    a.and(al, 0xf)?;
    a.add(al, b'a' as i32)?;
    a.out(dx, al)?;
    a.inc(bp)?;
    a.cmp(bp, 40)?;
    a.jb(next)?;
    a.mov(al, 0x21)?;
    a.out(0xf4, al)?;
    a.hlt()?;
    let mut image = a.assemble(boot::BOOT_SECTOR_AT)?;
    assert!(image.len() <= 510 && image[0] == 0xeb, "a short jump over the others' code");
    image.resize(510, 0);
    image.extend([0x55, 0xaa]);
    Ok(image)
}

fn fresh() -> Machine<Interpreter> {
    let profile = CpuidProfile::named("umbra-v2").unwrap();
    let memory = guest_memory(4 << 20).unwrap();
    let engine = |id| {
        let mut engine = Interpreter::new(Arc::clone(&memory), &profile, id, &EngineOptions::default()).unwrap();
        engine.set_cpus(CPUS);
        engine
    };
    let engines = (0..CPUS).map(engine).collect();
    let config = MachineConfig { profile: profile.clone(), rtc_start: 1_000_000 };
    Machine::new(memory, &config, engines).unwrap()
}

fn booted() -> Machine<Interpreter> {
    let mut machine = fresh();
    let (image, map) = (boot_sector().unwrap(), machine.map().clone());
    let request = BootRequest { kernel: &image, initrd: None, command_line: "", map: &map, rsdp: machine.rsdp() };
    let plan = boot::plan(&request).unwrap();
    machine.boot(&plan);
    machine
}

/// Everything one can see of a machine at its end.
#[derive(PartialEq, Debug)]
struct Seen {
    end: End,
    serial: Vec<u8>,
    now: VirtualTime,
    retired: u64,
    states: Vec<CpuState>,
    ram: Vec<u8>,
}

fn finish(machine: &mut Machine<Interpreter>) -> Seen {
    let mut listener = Listener::default();
    let end = machine.run(&mut listener, None);
    let mut ram = vec![0; 0x9000];
    machine.memory().read(umbra_arch::Gpa::new(0), &mut ram);
    let states = machine.vcpus().map(Vcpu::state).collect();
    Seen { end, serial: listener.0, now: machine.now(), retired: machine.retired(), states, ram }
}

#[test]
fn the_race_is_one_and_always_the_same() {
    let seen = finish(&mut booted());
    assert_eq!(seen.end, End::DebugExit(0x21), "at {:x?}", seen.now);
    assert_eq!(seen.serial.len(), 40);
    assert!(seen.serial.iter().collect::<std::collections::BTreeSet<_>>().len() > 8, "the hash varies");
    let rounds = u16::from_le_bytes([seen.ram[ROUNDS as usize], seen.ram[ROUNDS as usize + 1]]);
    assert!(rounds > 60, "three others made {rounds} rounds");
    assert_eq!(finish(&mut booted()), seen);
}

#[test]
fn continued_and_restored_runs_agree_wherever_they_were_saved() {
    let whole = finish(&mut booted());
    let mut saves = 0;
    for moment in (1..whole.now.0).step_by(whole.now.0 as usize / 23).chain([4_000, 5_500, 12_345]) {
        let mut machine = booted();
        let mut before = Listener::default();
        if machine.run(&mut before, Some(VirtualTime(moment))) != End::Limit {
            continue;
        }
        saves += 1;
        let saved = machine.save().unwrap();
        let mut continued = finish(&mut machine);
        for mut other in [fresh(), machine] {
            other.restore(&saved).unwrap();
            assert_eq!(other.save().unwrap(), saved, "saved at {moment}: saving again gives the same file");
            assert_eq!(finish(&mut other), continued, "saved at {moment}");
        }
        before.0.append(&mut continued.serial);
        continued.serial = before.0;
        assert_eq!(continued, whole, "stopping at {moment} changes nothing");
    }
    assert!(saves >= 10);
}
