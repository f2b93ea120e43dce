//! Breakpoints, single-stepping and general detection ("Debug Registers", "Debug Exceptions"), and the
//! alignment checks that make every data access take the slow path in the same way.

use crate::core::Core;
use crate::deliver::Event;
use crate::op::Flow;
use umbra_arch::paging::AccessKind;
use umbra_arch::segment::Seg;
use umbra_arch::state::{Activity, Shadow};
use umbra_arch::{Bus, Fault, rflags};

/// DR6.BD: a debug register was about to be accessed with DR7.GD set.
pub const DR6_BD: u64 = 1 << 13;
/// DR6.BS: single step.
pub const DR6_BS: u64 = 1 << 14;
/// DR6.BT: the T flag of the task switched to.
pub const DR6_BT: u64 = 1 << 15;
/// DR7.GD: general detection.
pub const DR7_GD: u64 = 1 << 13;
/// DR6.B0 to B3.
const HITS: u64 = 0xf;

/// What follows from the debug registers and alignment flags, and what the running instruction did to them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Watch {
    /// Data accesses take the slow path, which looks at them.
    pub guarded: bool,
    /// Misaligned data accesses raise #AC.
    aligned: bool,
    /// Instruction breakpoints are enabled.
    pub fetches: bool,
    data: bool,
    /// Port breakpoints are enabled.
    pub ports: bool,
    /// Breakpoints that the running instruction's accesses hit, as in DR6.
    hits: u64,
    /// The running instruction loaded RF: it stays for the next one.
    pub keep_rf: bool,
    /// The running instruction takes no single-step trap although TF was set.
    pub no_step: bool,
}

impl Watch {
    /// Whether the running instruction's accesses have hit a breakpoint.
    #[inline]
    pub fn has_hit(&self) -> bool {
        self.hits != 0
    }
}

/// One breakpoint of DR7.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Breakpoint {
    /// R/W field: 0 execution, 1 writes, 2 ports, 3 reads and writes.
    kind: u64,
    bytes: u64,
}

fn breakpoint(dr7: u64, n: usize) -> Option<Breakpoint> {
    if dr7 >> (2 * n) & 3 == 0 {
        return None;
    }
    let field = dr7 >> (16 + 4 * n) & 0xf;
    let bytes = [1, 2, 8, 4][(field >> 2) as usize];
    Some(Breakpoint { kind: field & 3, bytes })
}

/// Whether `len` bytes at `at` touch the breakpoint's naturally aligned bytes.
fn touches(b: Breakpoint, address: u64, at: u64, len: u64) -> bool {
    let start = address & !(b.bytes - 1);
    at <= start.wrapping_add(b.bytes - 1) && start <= at.wrapping_add(len.max(1) - 1)
}

/// Alignment that a data access of `bytes` bytes needs ("Alignment Check Exception (#AC)").
const fn alignment(bytes: u64) -> u64 {
    match bytes {
        2 | 4 => bytes,
        6 => 4,
        8 | 10 | 16 | 32 => 8,
        _ => 1,
    }
}

impl Core {
    /// After a change of DR0 to DR3, DR7 or CR4.DE.
    pub fn debug_changed(&mut self) {
        let kinds =
            |wanted: &[u64]| (0..4).any(|n| breakpoint(self.s.dr7, n).is_some_and(|b| wanted.contains(&b.kind)));
        let (fetches, data, ports) = (kinds(&[0]), kinds(&[1, 3]), self.s.cr4.de() && kinds(&[2]));
        (self.watch.fetches, self.watch.data, self.watch.ports) = (fetches, data, ports);
        self.check_events = true;
        self.break_block = true;
        self.guard_changed();
    }

    /// After a change of CPL, RFLAGS.AC, CR0.AM or data breakpoints.
    #[inline]
    pub fn guard_changed(&mut self) {
        let aligned = self.s.cpl == 3 && self.s.cr0.am() && self.s.rflags & rflags::AC != 0;
        let guarded = aligned || self.watch.data;
        self.watch.aligned = aligned;
        if guarded != self.watch.guarded {
            self.watch.guarded = guarded;
            self.mmu.set_guarded(guarded);
        }
    }

    /// Looks at a data access of the running instruction: #AC, or a breakpoint noted for its end.
    #[cold]
    pub fn guard(&mut self, lin: u64, bytes: u64, kind: AccessKind) -> Flow {
        if self.watch.aligned && lin & (alignment(bytes) - 1) != 0 {
            return self.raise(Fault::ALIGNMENT);
        }
        if self.watch.data {
            self.note_hits(lin, bytes, |b| b.kind == 3 || b.kind == 1 && kind == AccessKind::Write);
        }
        Ok(())
    }

    /// Notes port breakpoints that an IN or OUT hits.
    #[cold]
    pub fn watch_port(&mut self, port: u16, bytes: u64) {
        self.note_hits(u64::from(port), bytes, |b| b.kind == 2);
    }

    fn note_hits(&mut self, at: u64, bytes: u64, counts: impl Fn(Breakpoint) -> bool) {
        for n in 0..4 {
            let hit = breakpoint(self.s.dr7, n).is_some_and(|b| counts(b) && touches(b, self.s.dr[n], at, bytes));
            if hit {
                self.watch.hits |= 1 << n;
                self.break_block = true;
            }
        }
    }

    /// Whether instructions must run one at a time, with [`after_instruction`](Self::after_instruction) between.
    #[inline]
    pub fn must_step(&self) -> bool {
        self.s.rflags & rflags::TF != 0
            || self.s.shadow != Shadow::None
            || self.watch.fetches
            || self.s.pending_debug != 0
    }

    /// Whether RF is set, which ends with the next instruction.
    #[inline]
    pub fn resumes(&self) -> bool {
        self.s.rflags & rflags::RF != 0
    }

    /// Instruction breakpoints at the instruction about to run, as in DR6.
    #[inline]
    pub fn fetch_breakpoints(&self) -> u64 {
        if !self.watch.fetches || self.s.rflags & rflags::RF != 0 || self.s.shadow == Shadow::MovSs {
            return 0;
        }
        let lin = self.seg_base[Seg::Cs as usize].wrapping_add(self.next_rip);
        (0..4)
            .filter(|&n| self.s.dr[n] == lin && breakpoint(self.s.dr7, n).is_some_and(|b| b.kind == 0))
            .fold(0, |bits, n| bits | 1 << n)
    }

    /// At the end of an instruction that retired, with its shadow in force: RF, then what DR6 bits its
    /// #DB has; 0 is none.
    #[inline]
    pub fn after_instruction(&mut self) -> u64 {
        if !std::mem::take(&mut self.watch.keep_rf) {
            self.s.rflags &= !rflags::RF;
        }
        let no_step = std::mem::take(&mut self.watch.no_step);
        let step = std::mem::take(&mut self.trap_pending) && !no_step;
        self.s.pending_debug |= std::mem::take(&mut self.watch.hits);
        if self.s.shadow == Shadow::MovSs {
            // Data breakpoints wait; the single-step trap is lost.
            self.check_events |= self.s.pending_debug != 0;
            return 0;
        }
        std::mem::take(&mut self.s.pending_debug) | if step { DR6_BS } else { 0 }
    }

    /// As [`after_instruction`](Self::after_instruction), behind one that asked for the block's end. False, and nothing
    /// is done yet, if something has to be looked at before the next block: events, shadows, traps, stale code.
    #[inline(always)]
    pub(crate) fn ends_quietly(&mut self) -> bool {
        // Without a branch for each.
        let flags = self.check_events | self.attention | self.trap_pending | (self.shadow_next != Shadow::None);
        let due = u64::from(flags) | self.watch.hits | self.s.pending_debug != 0
            || self.trace.is_some()
            || self.mmu.watcher().is_pending()
            || !self.code_writes.is_empty();
        if due {
            return false;
        }
        self.s.shadow = Shadow::None;
        if !std::mem::take(&mut self.watch.keep_rf) {
            self.s.rflags &= !rflags::RF;
        }
        self.watch.no_step = false;
        true
    }

    /// Whether a #DB is due, or instructions have to be looked at for one.
    #[inline]
    pub fn must_look_for_debug(&self) -> bool {
        self.s.rflags & rflags::TF != 0 || self.watch.hits != 0 || self.s.pending_debug != 0 || self.watch.fetches
    }

    /// At the end of an instruction that faulted.
    pub fn forget_hits(&mut self) {
        self.watch = Watch { hits: 0, keep_rf: false, no_step: false, ..self.watch };
        self.trap_pending = false;
    }

    /// Raises a #DB that isn't a fault of an executing instruction.
    pub fn debug_trap(&mut self, bus: &mut dyn Bus, bits: u64, rip: u64) -> Flow {
        self.s.dr6 = self.s.dr6 & !HITS | bits;
        self.s.activity = Activity::Running;
        self.deliver(bus, Event::Trap(Fault::DEBUG), rip)
    }

    /// MOV to or from a debug register with DR7.GD: #DB before anything happens.
    pub fn general_detect(&mut self) -> Flow {
        if self.s.dr7 & DR7_GD != 0 {
            self.s.dr6 = self.s.dr6 & !HITS | DR6_BD;
            return self.raise(Fault::DEBUG);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn breakpoints_match_exactly_the_accesses_that_overlap_them() {
        for (field, bytes) in [(0u64, 1u64), (1, 2), (3, 4), (2, 8)] {
            let b = breakpoint(2 | (field << 2 | 1) << 16, 0).unwrap();
            assert_eq!(b, Breakpoint { kind: 1, bytes });
            for address in 0x100..0x108u64 {
                let covered: Vec<u64> = (0..0x200).filter(|byte| byte / bytes == address / bytes).collect();
                for at in 0xf0..0x118u64 {
                    for len in [1, 2, 4, 8, 16] {
                        let expected = (at..at + len).any(|byte| covered.contains(&byte));
                        assert_eq!(touches(b, address, at, len), expected, "{b:?} {address:#x} {at:#x} {len}");
                    }
                }
            }
        }
    }

    #[test]
    fn disabled_breakpoints_are_none() {
        assert_eq!(breakpoint(0xffff_0400, 3), None);
        assert!(breakpoint(0xffff_0440, 3).is_some());
        assert!(breakpoint(0xffff_0480, 3).is_some());
    }
}
