//! Whole test ROMs on any virtual CPU: a machine around it, and what the ROM reports.

use crate::engine::RomAnswer;
use std::sync::Arc;
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::{Vcpu, VirtualTime};
use umbra_machine::{Host, Machine, MachineConfig, boot, guest_memory};
use umbra_memory::GuestMemory;
use umbra_test_roms::{MEASUREMENT_PORT, Rom};

/// Guest RAM in bytes.
const MEMORY: u64 = 16 << 20;
/// Virtual time after which a ROM hangs: all of them together take less.
const LIMIT: VirtualTime = VirtualTime(120_000_000_000);

#[derive(Default)]
struct Listener(Vec<u8>);

impl Host for Listener {
    fn serial(&mut self, bytes: &[u8]) {
        self.0.extend(bytes.iter().filter(|&&byte| byte != b'\r'));
    }
}

/// What `rom` reports on the CPU that `engine` makes for a memory.
pub fn report<V: Vcpu, E: std::fmt::Display>(
    rom: &Rom,
    profile: CpuidProfile,
    engine: impl FnOnce(Arc<GuestMemory>) -> Result<V, E>,
) -> RomAnswer {
    let failed = |why: &dyn std::fmt::Display| RomAnswer::CannotAnswer(why.to_string().into());
    let memory = match guest_memory(MEMORY) {
        Ok(memory) => memory,
        Err(error) => return failed(&error),
    };
    let engine = match engine(Arc::clone(&memory)) {
        Ok(engine) => engine,
        Err(error) => return failed(&error),
    };
    let config = MachineConfig { profile, rtc_start: 0 };
    let mut machine = match Machine::new(memory, &config, vec![engine]) {
        Ok(machine) => machine,
        Err(error) => return failed(&error),
    };
    if let Err(error) = load(rom, &mut machine) {
        return failed(&error);
    }
    let mut listener = Listener::default();
    let end = loop {
        match machine.run(&mut listener, Some(LIMIT)) {
            umbra_machine::End::Mark(_) => {}
            end => break end,
        }
    };
    let text = String::from_utf8_lossy(&listener.0).into_owned();
    match end {
        umbra_machine::End::Unsupported(what) => failed(&format!("unsupported: {}", what.what)),
        umbra_machine::End::Refused(refusal) => failed(&refusal),
        umbra_machine::End::PowerOff => RomAnswer::Report(text),
        end => RomAnswer::Report(format!("{text}({end:?})\n")),
    }
}

fn load<V: Vcpu>(rom: &Rom, machine: &mut Machine<V>) -> Result<(), Box<dyn std::error::Error>> {
    machine.add_reset_rom(&umbra_firmware::reset_image()?)?;
    machine.memory().write(rom.load(), &rom.image()?);
    machine.pc_mut().set_measurement_port(MEASUREMENT_PORT);
    machine.boot(&boot::reset_plan());
    Ok(())
}
