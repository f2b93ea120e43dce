//! Instructions without architectural effect here: no-ops, hints, fences, cache control.

use super::Row;
use crate::core::Core;
use crate::op::{Flow, Op};
use iced_x86::Mnemonic as M;
use umbra_arch::Bus;
use umbra_arch::cpuid::Feature;
use umbra_arch::paging::AccessKind;

const PREFETCH: &str = "PREFETCHh-Prefetch Data Into Caches";

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Nop, "NOP-No Operation", |_| Some(nop)),
    Row::new(M::Pause, "PAUSE-Spin Loop Hint", |_| Some(pause)),
    Row::new(M::Endbr64, "ENDBR64-Terminate an Indirect Branch in 64-bit Mode", |_| Some(nop)),
    Row::new(M::Endbr32, "ENDBR32-Terminate an Indirect Branch in 32-bit and Compatibility Mode", |_| Some(nop)),
    Row::new(M::Reservednop, "NOP-No Operation", |_| Some(nop)),
    // Hints and shadow-stack reads are no-ops on processors without them, and programs rely on it.
    Row::new(M::Cldemote, "CLDEMOTE-Cache Line Demote", |_| Some(nop)),
    Row::new(M::Rdsspd, "RDSSPD/RDSSPQ-Read Shadow Stack Pointer", |_| Some(nop)),
    Row::new(M::Rdsspq, "RDSSPD/RDSSPQ-Read Shadow Stack Pointer", |_| Some(nop)),
    Row::new(M::Prefetchit0, PREFETCH, |_| Some(nop)),
    Row::new(M::Prefetchit1, PREFETCH, |_| Some(nop)),
    Row::new(M::Prefetchwt1, PREFETCH, |_| Some(nop)),
    Row::new(M::Wbnoinvd, "WBNOINVD-Write Back and Do Not Invalidate Cache", |_| Some(|c, _, _| c.need_ring0())).ends(),
    Row::new(M::Prefetchnta, PREFETCH, |_| Some(nop)),
    Row::new(M::Prefetcht0, PREFETCH, |_| Some(nop)),
    Row::new(M::Prefetcht1, PREFETCH, |_| Some(nop)),
    Row::new(M::Prefetcht2, PREFETCH, |_| Some(nop)),
    Row::new(M::Prefetchw, "PREFETCHW-Prefetch Data Into Caches in Anticipation of a Write", |_| Some(nop)),
    Row::new(M::Prefetch, PREFETCH, |_| Some(nop)),
    Row::new(M::Lfence, "LFENCE-Load Fence", |_| Some(nop)).needs(Feature::Sse2),
    Row::new(M::Mfence, "MFENCE-Memory Fence", |_| Some(nop)).needs(Feature::Sse2),
    Row::new(M::Sfence, "SFENCE-Store Fence", |_| Some(nop)).needs(Feature::Sse),
    Row::new(M::Clflush, "CLFLUSH-Flush Cache Line", |_| Some(flush_line)).needs(Feature::Clflush),
    Row::new(M::Clflushopt, "CLFLUSHOPT-Flush Cache Line Optimized", |_| Some(flush_line)).needs(Feature::Clflushopt),
    Row::new(M::Clwb, "CLWB-Cache Line Write Back", |_| Some(flush_line)).needs(Feature::Clwb),
    Row::new(M::Wait, "WAIT/FWAIT-Wait", |_| Some(wait)),
];

fn nop(_: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    Ok(())
}

/// Other CPUs may go first.
fn pause(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let reply = bus.pause(c.now(op.prefix));
    c.settle(reply);
    Ok(())
}

/// Caches don't exist, but the line must be readable.
fn flush_line(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let lin = c.linear(op, 1, AccessKind::Read)?;
    c.read::<u8>(bus, op, lin).map(drop)
}

/// #NM with CR0.MP and TS; #MF if an unmasked x87 exception is pending.
fn wait(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    if c.s.cr0.mp() && c.s.cr0.ts() {
        return c.raise(umbra_arch::Fault::DEVICE_NOT_AVAILABLE);
    }
    if c.s.fp.fsw & 0x80 != 0 {
        return c.raise(umbra_arch::Fault::X87);
    }
    Ok(())
}
