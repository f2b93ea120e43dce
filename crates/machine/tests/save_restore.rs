//! Save, restore, same bytes: a guest on the real engine, saved at many moments.

use iced_x86::code_asm::*;
use std::sync::Arc;
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::{CpuState, Vcpu, VirtualTime};
use umbra_cpu::{EngineOptions, Interpreter};
use umbra_machine::boot::{self, BootRequest};
use umbra_machine::{End, Host, Machine, MachineConfig, SnapshotError, guest_memory};

/// Collects serial output; the host never interferes.
#[derive(Default)]
struct Listener(Vec<u8>);

impl Host for Listener {
    fn serial(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }
}

/// The interrupt handler lies behind the first jump.
const HANDLER: u32 = boot::BOOT_SECTOR_AT as u32 + 2;

/// A boot sector that mixes everything time-dependent: an 8254 interrupt each millisecond, HLT, a busy
/// hash over memory it writes, RDTSC, the clock's seconds and port 61h; it prints what it finds as
/// letters on COM1 and ends after 40 ticks.
fn boot_sector() -> Vec<u8> {
    let mut a = CodeAssembler::new(16).unwrap();
    let (mut start, mut next, mut busy, mut done) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    a.jmp(start).unwrap();
    a.push(ax).unwrap();
    a.inc(bp).unwrap();
    a.mov(al, 0x20).unwrap();
    a.out(0x20, al).unwrap();
    a.pop(ax).unwrap();
    a.iret().unwrap();
    a.set_label(&mut start).unwrap();
    a.cli().unwrap();
    a.xor(ax, ax).unwrap();
    for segment in [ds, es, ss] {
        a.mov(segment, ax).unwrap();
    }
    a.mov(sp, 0x7c00).unwrap();
    a.mov(word_ptr(0x20 * 4 + 2), 0).unwrap();
    a.mov(word_ptr(0x20 * 4), HANDLER).unwrap();
    for (port, value) in [
        (0x43, 0x34),
        (0x40, 0xa9),
        (0x40, 0x04),
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xfe),
        (0xa1, 0xff),
    ] {
        a.mov(al, value).unwrap();
        a.out(port, al).unwrap();
    }
    a.xor(bp, bp).unwrap();
    a.xor(di, di).unwrap();
    a.set_label(&mut next).unwrap();
    a.sti().unwrap();
    a.hlt().unwrap();
    a.mov(cx, 300).unwrap();
    a.set_label(&mut busy).unwrap();
    a.imul_3(di, di, 31).unwrap();
    a.add(di, cx).unwrap();
    a.mov(bx, di).unwrap();
    a.and(bx, 0xffe).unwrap();
    a.add(word_ptr(bx + 0x1000), di).unwrap();
    a.add(di, word_ptr(bx + 0x1000)).unwrap();
    a.loop_(busy).unwrap();
    a.rdtsc().unwrap();
    a.add(di, ax).unwrap();
    a.mov(al, 0).unwrap();
    a.out(0x70, al).unwrap();
    a.in_(al, 0x71).unwrap();
    a.mov(ah, 0).unwrap();
    a.add(di, ax).unwrap();
    a.in_(al, 0x61).unwrap();
    a.add(di, ax).unwrap();
    a.mov(dx, 0x3f8).unwrap();
    a.mov(ax, di).unwrap();
    a.and(al, 0xf).unwrap();
    a.add(al, b'a' as i32).unwrap();
    a.out(dx, al).unwrap();
    a.cmp(bp, 40).unwrap();
    a.jb(next).unwrap();
    a.set_label(&mut done).unwrap();
    a.mov(al, 0x21).unwrap();
    a.out(0xf4, al).unwrap();
    a.jmp(done).unwrap();
    let mut image = a.assemble(boot::BOOT_SECTOR_AT).unwrap();
    assert!(image.len() <= 510 && image[0] == 0xeb, "a short jump over the handler");
    image.resize(510, 0);
    image.extend([0x55, 0xaa]);
    image
}

fn fresh() -> Machine<Interpreter> {
    let profile = CpuidProfile::named("umbra-v2").unwrap();
    let memory = guest_memory(4 << 20).unwrap();
    let engine = Interpreter::new(Arc::clone(&memory), &profile, 0, &EngineOptions::default()).unwrap();
    Machine::new(memory, &MachineConfig { profile, rtc_start: 1_000_000 }, vec![engine]).unwrap()
}

fn booted() -> Machine<Interpreter> {
    let mut machine = fresh();
    let (image, map) = (boot_sector(), machine.map().clone());
    let request = BootRequest { kernel: &image, initrd: None, command_line: "", map: &map, rsdp: machine.rsdp() };
    let plan = boot::plan(&request).unwrap();
    machine.boot(&plan);
    machine
}

/// Everything one can see of a machine at its end.
fn finish(machine: &mut Machine<Interpreter>) -> (End, Vec<u8>, VirtualTime, u64, CpuState, Vec<u8>) {
    let mut listener = Listener::default();
    let end = machine.run(&mut listener, None);
    let mut ram = vec![0; 0x8000];
    machine.memory().read(umbra_arch::Gpa::new(0), &mut ram);
    let state = machine.vcpu(0).unwrap().state();
    (end, listener.0, machine.now(), machine.retired(), state, ram)
}

#[test]
fn the_guest_does_what_the_test_needs() {
    let (end, serial, now, retired, ..) = finish(&mut booted());
    assert_eq!(end, End::DebugExit(0x21));
    assert_eq!(serial.len(), 40, "{}", String::from_utf8_lossy(&serial));
    assert!(serial.iter().collect::<std::collections::BTreeSet<_>>().len() > 8, "the hash varies");
    assert!((39_000_000..43_000_000).contains(&now.0), "{now:?}");
    assert!(retired > 40 * 300 * 5);
}

#[test]
fn continued_and_restored_runs_agree_wherever_they_were_saved() {
    let whole = finish(&mut booted());
    for moment in (0..42_000_000).step_by(1_234_567).chain([1, 999_999, 1_000_100, 20_000_000]) {
        let mut machine = booted();
        let mut before = Listener::default();
        if machine.run(&mut before, Some(VirtualTime(moment))) != End::Limit {
            continue;
        }
        let saved = machine.save().unwrap();
        let mut continued = finish(&mut machine);
        // Into a fresh machine, and into one that has run on and dirtied other pages.
        for mut other in [fresh(), machine] {
            other.memory().write(umbra_arch::Gpa::new(0x20_0000), b"stale");
            other.restore(&saved).unwrap();
            assert_eq!(other.save().unwrap(), saved, "saved at {moment}: saving again gives the same file");
            assert_eq!(finish(&mut other), continued, "saved at {moment}");
        }
        before.0.append(&mut continued.1);
        continued.1 = before.0;
        assert_eq!(continued, whole, "stopping at {moment} changes nothing");
    }
}

#[test]
fn damaged_files_are_refused_and_change_nothing() {
    let mut machine = booted();
    machine.run(&mut Listener::default(), Some(VirtualTime(5_000_000)));
    let saved = machine.save().unwrap();
    let mut other = fresh();
    let untouched = other.save().unwrap();

    assert_eq!(other.restore(b"PK\x03\x04"), Err(SnapshotError::NotASave));
    let mut version = saved.clone();
    version[8] = 99;
    assert_eq!(other.restore(&version), Err(SnapshotError::Version(99)));
    let mut unknown = saved.clone();
    unknown.extend([5, b'c', b'o', b'm', b'9', b'!', 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(other.restore(&unknown), Err(SnapshotError::UnknownSection("com9!".into())));
    for len in (0..saved.len()).step_by(97) {
        assert!(other.restore(&saved[..len]).is_err(), "cut at {len}");
    }
    assert_eq!(other.save().unwrap(), untouched);

    let profile = CpuidProfile::named("umbra-v2").unwrap();
    let memory = guest_memory(8 << 20).unwrap();
    let engine = Interpreter::new(Arc::clone(&memory), &profile, 0, &EngineOptions::default()).unwrap();
    let mut larger = Machine::new(memory, &MachineConfig { profile, rtc_start: 0 }, vec![engine]).unwrap();
    assert!(larger.restore(&saved).unwrap_err().to_string().contains("RAM bytes"));
}

/// Flipped bytes either are refused or give a machine that still can be run and saved.
#[test]
fn flipped_bytes_never_panic() {
    let mut machine = booted();
    machine.run(&mut Listener::default(), Some(VirtualTime(5_000_000)));
    let saved = machine.save().unwrap();
    let interesting = saved.len().min(6000);
    for at in (12..interesting).step_by(13) {
        let mut damaged = saved.clone();
        damaged[at] ^= 0xff;
        if machine.restore(&damaged).is_ok() {
            let limit = machine.now().plus(10_000);
            machine.run(&mut Listener::default(), Some(limit));
            machine.save().unwrap();
        }
    }
}
