//! KVM against the interpreter, and guests that change between them. Where there is no KVM, these say so.
#![cfg(target_os = "linux")]

use std::sync::Arc;
use umbra_accel::HandOver;
use umbra_accel::handover::{Reason, Side, Switch};
use umbra_accel::kvm::{Fitted, Irqchip, KvmVcpu, fit};
use umbra_arch::cpuid::CpuidProfile;
use umbra_cpu::{EngineOptions, Interpreter};
use umbra_machine::{End, Host, Machine, MachineConfig, boot, guest_memory};
use umbra_oracle::asks_kvm::AsksKvm;
use umbra_oracle::campaign::{Generator, Tally, judge, run};
use umbra_oracle::engines::make_all;
use umbra_oracle::random::Random;
use umbra_test_roms::{MEASUREMENT_PORT, Rom};

/// What KVM can be here; `None`, loudly, where there is none.
fn kvm() -> Option<Fitted> {
    kvm_with(Irqchip::User)
}

fn kvm_with(irqchip: Irqchip) -> Option<Fitted> {
    match fit(&CpuidProfile::default(), irqchip) {
        Ok(fitted) => Some(fitted),
        Err(error) => {
            eprintln!("SKIPPED, nothing was tested: {error}");
            None
        }
    }
}

#[test]
fn control_sequences_differ_by_named_defects_only_and_most_have_an_answer() {
    if kvm().is_none() {
        return;
    }
    let mut engines = make_all(&["interp", "kvm"]).unwrap();
    let mut tally = Tally { seed: 7, ..Tally::default() };
    run(&mut engines, &Generator::named("control-plain").unwrap(), 0..600, &mut tally, |_| true);
    assert!(tally.is_good(), "{tally:#?}");
}

#[derive(Default)]
struct Listener(Vec<u8>);

impl Host for Listener {
    fn serial(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }
}

/// Runs a ROM that changes sides all the time, and at each refusal.
fn ping_pong(rom: &Rom, fitted: &Fitted) -> (String, End, Vec<Switch>) {
    let memory = guest_memory(16 << 20).unwrap();
    let accelerator = KvmVcpu::new(Arc::clone(&memory), fitted).unwrap();
    let soft = Interpreter::new(Arc::clone(&memory), &fitted.profile, 0, &EngineOptions::default()).unwrap();
    let mut pair = HandOver::new(accelerator, soft);
    pair.set_at_refusal(true);
    let config = MachineConfig { profile: fitted.profile.clone(), rtc_start: 0 };
    let mut machine = Machine::new(memory, &config, vec![pair]).unwrap();
    machine.add_reset_rom(&umbra_firmware::reset_image().unwrap()).unwrap();
    machine.memory().write(rom.load(), &rom.image().unwrap());
    machine.pc_mut().set_measurement_port(MEASUREMENT_PORT);
    machine.boot(&boot::reset_plan());
    let mut listener = Listener::default();
    for _ in 0..20_000 {
        // The interpreter executes an instruction in a nanosecond, a slow backend a few thousand times less.
        let is_soft = machine.vcpu(0).is_some_and(|pair| pair.side() == Side::Soft);
        let limit = machine.now().plus(if is_soft { 500 } else { 300_000 });
        match machine.run(&mut listener, Some(limit)) {
            End::Mark(_) => {}
            End::Limit => machine.vcpus_mut().for_each(|pair| {
                pair.hand_over(if is_soft { Side::Accelerator } else { Side::Soft });
            }),
            end => {
                let switches = machine.vcpu(0).map(|pair| pair.switches().to_vec()).unwrap_or_default();
                return (String::from_utf8_lossy(&listener.0).into_owned(), end, switches);
            }
        }
    }
    panic!("{} hangs", rom.name)
}

#[test]
fn a_rom_passes_while_it_changes_sides_both_ways() {
    let offered = Irqchip::offered().unwrap_or(Irqchip::User);
    for (name, irqchip) in [("segments", Irqchip::User), ("exceptions", Irqchip::User), ("segments", offered)] {
        let Some(fitted) = kvm_with(irqchip) else { return };
        let rom = umbra_test_roms::rom(name).unwrap();
        let (report, end, switches) = ping_pong(rom, &fitted);
        let to = |side| switches.iter().filter(|switch| switch.to == side).count();
        eprintln!("{name}, irqchip {irqchip}: {} switches to soft, {} back", to(Side::Soft), to(Side::Accelerator));
        assert_eq!(end, End::PowerOff, "{report}");
        assert!(report.contains(rom.expect), "{report}\n{switches:#?}");
        assert!(to(Side::Accelerator) > 0 && to(Side::Soft) > 0);
        assert!(switches.iter().any(|switch| switch.reason == Reason::Asked));
    }
}

#[test]
fn some_of_a_fuzzers_sequences_are_asked_of_kvm_and_the_same_ones_each_time() {
    let inputs = (0..400u64).map(|n| Random::new(n).next().to_le_bytes().repeat(20));
    let mut asks = AsksKvm::default();
    let mut chosen = 0;
    for input in inputs {
        chosen += u64::from(AsksKvm::is_chosen(&input));
        asks.ask(&input, judge);
    }
    let count = asks.count();
    assert_eq!(count.chosen, chosen);
    assert!((30..70).contains(&chosen), "about one in eight: {chosen}");
    match kvm() {
        Some(_) => assert!(3 * count.same > chosen, "{}", asks.summary()),
        None => assert!(count.same == 0 && asks.summary().starts_with("SKIPPED"), "{}", asks.summary()),
    }
}
