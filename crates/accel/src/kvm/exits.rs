//! What KVM_RUN came back for, and device accesses as calls on the bus.
#![allow(unsafe_code, reason = "kvm_run is a union, and port data lies behind it")]

use super::error::KvmError;
use crate::device_memory;
use kvm_bindings::*;
use kvm_ioctls::VcpuFd;
use umbra_arch::exit::RefusalKind;
use umbra_arch::{AccessWidth, Bus, VirtualTime};

/// Why KVM_RUN came back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Event {
    /// A device access was carried out; the instruction completes at the next KVM_RUN. Whether somebody wants
    /// the machine's attention.
    Device { attention: bool },
    /// A signal or `immediate_exit`.
    Kicked,
    /// HLT.
    Halted,
    /// The I/O APIC was told of an interrupt's end.
    EndOfInterrupt,
    /// Interrupts can be taken now.
    Window,
    /// A single step or a breakpoint; DR6 tells.
    Debug { dr6: u64 },
    /// Triple fault.
    Shutdown,
    /// No answer.
    Refused { kind: RefusalKind, detail: String, bytes: Vec<u8> },
}

/// Runs until something is up.
pub(super) fn run(vcpu: &mut VcpuFd, bus: &mut dyn Bus, now: VirtualTime) -> Event {
    match vcpu.run().map(|_| ()) {
        Ok(()) => decode(vcpu.get_kvm_run(), bus, now),
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Event::Kicked,
        Err(error) => refused(RefusalKind::Host, format!("KVM_RUN: {}", std::io::Error::from(error))),
    }
}

fn refused(kind: RefusalKind, detail: String) -> Event {
    Event::Refused { kind, detail, bytes: Vec::new() }
}

/// The state was not taken.
pub(super) fn state_refused(error: &KvmError) -> Event {
    refused(RefusalKind::State, error.to_string())
}

fn decode(run: &mut kvm_run, bus: &mut dyn Bus, now: VirtualTime) -> Event {
    match run.exit_reason {
        KVM_EXIT_IO => port(run, bus, now),
        KVM_EXIT_MMIO => mmio(run, bus, now),
        KVM_EXIT_SET_TPR => Event::Device { attention: true },
        KVM_EXIT_HLT => Event::Halted,
        KVM_EXIT_IOAPIC_EOI => {
            // SAFETY: the exit reason says that this is the member which the kernel filled in.
            let vector = unsafe { run.__bindgen_anon_1.eoi.vector };
            if let Some(apics) = bus.apic_bus() {
                apics.end_of_interrupt(now, vector);
            }
            Event::EndOfInterrupt
        }
        KVM_EXIT_IRQ_WINDOW_OPEN => Event::Window,
        KVM_EXIT_INTR => Event::Kicked,
        KVM_EXIT_SHUTDOWN => Event::Shutdown,
        // SAFETY: the exit reason says that this is the member which the kernel filled in.
        KVM_EXIT_DEBUG => Event::Debug { dr6: unsafe { run.__bindgen_anon_1.debug.arch.dr6 } },
        KVM_EXIT_INTERNAL_ERROR => internal_error(run),
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: as above.
            let reason = unsafe { run.__bindgen_anon_1.fail_entry.hardware_entry_failure_reason };
            refused(RefusalKind::State, format!("KVM_EXIT_FAIL_ENTRY {reason:#x}"))
        }
        other => refused(RefusalKind::Backend, format!("KVM exit reason {other}")),
    }
}

fn internal_error(run: &kvm_run) -> Event {
    // SAFETY: the exit reason says so; the emulation failure's fields overlay the same member.
    let (failure, suberror) =
        unsafe { (run.__bindgen_anon_1.emulation_failure, run.__bindgen_anon_1.internal.suberror) };
    let (kind, name) = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => (RefusalKind::Emulation, "KVM_INTERNAL_ERROR_EMULATION"),
        KVM_INTERNAL_ERROR_SIMUL_EX => (RefusalKind::Delivery, "KVM_INTERNAL_ERROR_SIMUL_EX"),
        KVM_INTERNAL_ERROR_DELIVERY_EV => (RefusalKind::Delivery, "KVM_INTERNAL_ERROR_DELIVERY_EV"),
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            (RefusalKind::Backend, "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON")
        }
        _ => return refused(RefusalKind::Backend, format!("KVM internal error {suberror}")),
    };
    let has_bytes = suberror == KVM_INTERNAL_ERROR_EMULATION
        && failure.ndata >= 1
        && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
    let bytes = if has_bytes {
        // SAFETY: the flag says that these fields of the union were filled in.
        let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
        let len = usize::from(instruction.insn_size).min(instruction.insn_bytes.len());
        instruction.insn_bytes[..len].to_vec()
    } else {
        Vec::new()
    };
    Event::Refused { kind, detail: name.to_owned(), bytes }
}

fn port(run: &mut kvm_run, bus: &mut dyn Bus, now: VirtualTime) -> Event {
    // SAFETY: the exit reason says so.
    let io = unsafe { run.__bindgen_anon_1.io };
    let Some(width) = AccessWidth::of_bytes(io.size.into()) else {
        return refused(RefusalKind::Backend, format!("a port access of {} bytes", io.size));
    };
    let size = usize::from(io.size);
    // SAFETY: the kernel puts `count` items of `size` bytes at this offset inside the pages of kvm_run, all of
    // which are mapped for as long as `run` is borrowed.
    let data = unsafe {
        let first = std::ptr::from_mut(run).cast::<u8>().add(io.data_offset as usize);
        std::slice::from_raw_parts_mut(first, size * io.count as usize)
    };
    let mut attention = false;
    for item in data.chunks_exact_mut(size) {
        let mut value = [0; 4];
        if u32::from(io.direction) == KVM_EXIT_IO_IN {
            let reply = bus.port_read(now, io.port, width);
            attention |= reply.attention;
            item.copy_from_slice(&reply.value.to_le_bytes()[..size]);
        } else {
            value[..size].copy_from_slice(item);
            attention |= bus.port_write(now, io.port, width, u32::from_le_bytes(value)).attention;
        }
    }
    Event::Device { attention }
}

fn mmio(run: &mut kvm_run, bus: &mut dyn Bus, now: VirtualTime) -> Event {
    // SAFETY: the exit reason says so.
    let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
    let len = (mmio.len as usize).min(mmio.data.len());
    let attention = device_memory::access(bus, now, mmio.phys_addr, &mut mmio.data[..len], mmio.is_write != 0);
    Event::Device { attention }
}
