//! KVM as an engine: stops, interrupts, time.

mod support;

use iced_x86::code_asm::*;
use std::sync::Arc;
use support::*;
use umbra_accel::Accelerator;
use umbra_accel::handover::StopAt;
use umbra_accel::kvm::KvmVcpu;
use umbra_arch::{Exit, Gpa, Slice, Vcpu, VirtualTime, rflags};
use umbra_memory::GuestMemory;

fn engine() -> Option<(KvmVcpu, Arc<GuestMemory>)> {
    let memory = Arc::new(GuestMemory::new(RAM).unwrap());
    kvm().map(|fitted| (KvmVcpu::new(Arc::clone(&memory), &fitted).unwrap(), memory))
}

const SECOND: Slice = Slice { now: VirtualTime(0), until: VirtualTime(1_000_000_000) };

#[test]
fn a_run_stops_before_the_instruction_at_an_address() {
    let Some((mut vcpu, memory)) = engine() else { return };
    load(&memory, 64, |a| {
        (0..10).try_for_each(|_| a.inc(eax))?;
        a.hlt()
    });
    vcpu.set_state(&long(&memory));
    // INC EAX is two bytes long.
    vcpu.stop_at(StopAt::Address(CODE + 8));
    assert_eq!(vcpu.run(&mut Recorder::default(), SECOND).exit, Exit::Attention);
    assert!(vcpu.is_stop_reached());
    assert_eq!((vcpu.state().rip, vcpu.state().gpr[0]), (CODE + 8, 4));
    vcpu.stop_at(StopAt::Never);
    assert_eq!(vcpu.run(&mut Recorder::default(), SECOND).exit, Exit::Halted);
    assert_eq!(vcpu.state().gpr[0], 10);
}

#[test]
fn a_halted_cpu_sleeps_until_an_interrupt_that_it_takes() {
    let Some((mut vcpu, memory)) = engine() else { return };
    // Vector 30h leads to 9000h.
    memory.write(Gpa::new(0x1200 + 0x30 * 16), &(0x9000_u64 | 8 << 16 | 0x8e << 40).to_le_bytes());
    memory.write(Gpa::new(0x1108), &0x00af_9b00_0000_ffff_u64.to_le_bytes());
    memory.write(Gpa::new(0x9000), &[0xff, 0xc3, 0xf4]);
    load(&memory, 64, |a| {
        a.sti()?;
        a.hlt()?;
        a.hlt()
    });
    vcpu.set_state(&long(&memory));
    let mut bus = Recorder::default();
    assert_eq!(vcpu.run(&mut bus, SECOND).exit, Exit::Halted);
    assert_eq!(vcpu.run(&mut bus, SECOND).exit, Exit::Halted, "nothing woke it");
    assert_ne!(vcpu.state().rflags & rflags::IF, 0);
    bus.interrupt = Some(0x30);
    assert_eq!(vcpu.run(&mut bus, SECOND).exit, Exit::Halted);
    assert_eq!((vcpu.state().gpr[3], vcpu.state().rip), (1, 0x9003), "the handler ran, once");
    bus.interrupt = Some(0x31);
    assert_eq!(vcpu.run(&mut bus, SECOND).exit, Exit::Halted, "the gate cleared IF");
    assert_eq!(bus.interrupt, Some(0x31));
}

#[test]
fn a_slice_ends_in_time_and_the_state_goes_on() {
    let Some((mut vcpu, memory)) = engine() else { return };
    memory.write(Gpa::new(CODE), &[0xff, 0xc0, 0xeb, 0xfc]);
    vcpu.set_state(&long(&memory));
    let mut now = VirtualTime(5_000);
    let mut last = 0;
    for _ in 0..3 {
        let until = now.plus(3_000_000);
        let stopped = vcpu.run(&mut Recorder::default(), Slice { now, until });
        assert_eq!(stopped.exit, Exit::BudgetSpent);
        assert!(stopped.now >= until);
        let count = vcpu.state().gpr[0];
        assert!(count > last, "{count} after {last}");
        (now, last) = (stopped.now, count);
    }
}
