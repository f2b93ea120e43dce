//! What CPUID really says to a guest: backends that can't intercept it show the host's features.

use super::case::{CaseLimit, CaseRunner};
use super::cpuid::Fitted;
use super::error::KvmError;
use super::irqchip::Irqchip;
use std::sync::Arc;
use std::time::Duration;
use umbra_arch::cpuid::{CpuidProfile, FeatureSet, HostOffer};
use umbra_arch::segment::{Seg, Segment};
use umbra_arch::{AccessWidth, Bus, CpuState, Fault, Gpa, Reply, VirtualTime};
use umbra_memory::GuestMemory;

const RAM: u64 = 1 << 20;
/// CPUID; HLT.
const PROGRAM: [u8; 3] = [0x0f, 0xa2, 0xf4];
const AT: u64 = 0x1000;
const LIMIT: CaseLimit = CaseLimit { instructions: None, time: Duration::from_secs(1) };

/// The features that a guest sees when this profile is offered, as far as other engines can do them.
pub(super) fn seen(profile: &CpuidProfile) -> Result<FeatureSet, KvmError> {
    let memory = Arc::new(GuestMemory::new(RAM)?);
    memory.write(Gpa::new(AT), &PROGRAM);
    let mut runner = CaseRunner::new(memory, &Fitted::exactly(profile.clone(), Irqchip::User))?;
    let mut problem = None;
    let offer = HostOffer::from_cpuid(|leaf, subleaf| {
        answer(&mut runner, leaf, subleaf).unwrap_or_else(|error| {
            problem.get_or_insert(error);
            [0; 4]
        })
    });
    match problem {
        None => Ok(offer.features.iter().filter(|feature| feature.is_implemented()).collect()),
        Some(error) => Err(error),
    }
}

fn answer(runner: &mut CaseRunner, leaf: u32, subleaf: u32) -> Result<[u32; 4], KvmError> {
    let mut state = CpuState::reset();
    state.seg[Seg::Cs as usize] = Segment::real(0);
    state.rip = AT;
    (state.gpr[0], state.gpr[1]) = (leaf.into(), subleaf.into());
    let after = runner.run(&state, &mut Nothing, LIMIT)?.state;
    Ok([0, 3, 1, 2].map(|register| after.gpr[register] as u32))
}

/// A machine without devices.
struct Nothing;

impl Bus for Nothing {
    fn mmio_read(&mut self, _: VirtualTime, _: Gpa, width: AccessWidth) -> Reply<u64> {
        Reply::quiet(width.mask())
    }
    fn mmio_write(&mut self, _: VirtualTime, _: Gpa, _: AccessWidth, _: u64) -> Reply<()> {
        Reply::quiet(())
    }
    fn port_read(&mut self, _: VirtualTime, _: u16, width: AccessWidth) -> Reply<u32> {
        Reply::quiet(width.mask() as u32)
    }
    fn port_write(&mut self, _: VirtualTime, _: u16, _: AccessWidth, _: u32) -> Reply<()> {
        Reply::quiet(())
    }
    fn apic_msr_read(&mut self, _: VirtualTime, _: u32) -> Result<Reply<u64>, Fault> {
        Err(Fault::GP0)
    }
    fn apic_msr_write(&mut self, _: VirtualTime, _: u32, _: u64) -> Result<Reply<()>, Fault> {
        Err(Fault::GP0)
    }
    fn read_cr8(&mut self) -> u8 {
        0
    }
    fn write_cr8(&mut self, _: VirtualTime, _: u8) -> Reply<()> {
        Reply::quiet(())
    }
    fn interrupt_pending(&mut self) -> bool {
        false
    }
    fn interrupt_acknowledge(&mut self, _: VirtualTime) -> Option<u8> {
        None
    }
    fn take_nmi(&mut self) -> bool {
        false
    }
}
