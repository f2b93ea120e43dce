//! MONITOR and MWAIT.
//!
//! The line's page is claimed as MONITORED, so that stores by other CPUs and devices to it are heard of.

use super::Row;
use super::string::segment_of;
use crate::core::Core;
use crate::decode::Form;
use crate::op::{ExecFn, Flow, Op};
use iced_x86::{Code, Mnemonic as M};
use umbra_arch::cpuid::Feature;
use umbra_arch::msr::MONITOR_ENABLED;
use umbra_arch::paging::{Access, AccessKind};
use umbra_arch::state::{Activity, reg};
use umbra_arch::{Bus, Fault, Gpa, Gva};
use umbra_memory::{Backing, PageFlags, RamOffset};
use umbra_mmu::Translation;

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Monitor, "MONITOR-Set Up Monitor Address", monitor_of).needs(Feature::Monitor),
    Row::new(M::Mwait, "MWAIT-Monitor Wait", |_| Some(mwait)).needs(Feature::Monitor).ends(),
];

fn monitor_of(f: &mut Form<'_>) -> Option<ExecFn> {
    Some(match f.i.code() {
        Code::Monitorw => monitor::<0xffff>,
        Code::Monitord => monitor::<0xffff_ffff>,
        _ => monitor::<{ u64::MAX }>,
    })
}

/// The address is rAX, `MASK` its size.
fn monitor<const MASK: u64>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    need_monitor(c)?;
    if c.gpr[reg::RCX] as u32 != 0 {
        return c.raise(Fault::GP0);
    }
    let lin = c.linear_at(op, segment_of(op), c.gpr[reg::RAX] & MASK, 1, AccessKind::Read)?;
    c.read::<u8>(bus, op, lin)?;
    c.arm_monitor(lin)
}

/// ECX bit 0: an interrupt ends it though IF is 0.
fn mwait(c: &mut Core, bus: &mut dyn Bus, _: &Op) -> Flow {
    const BREAK_IF_MASKED: u32 = 1;
    need_monitor(c)?;
    let extensions = c.gpr[reg::RCX] as u32;
    if extensions & !BREAK_IF_MASKED != 0 {
        return c.raise(Fault::GP0);
    }
    let pending = extensions & BREAK_IF_MASKED != 0 && bus.interrupt_pending();
    let armed = c.s.monitor.is_some() && !c.mmu.watcher().is_pending();
    if armed && !pending {
        c.halt(Activity::Waiting);
    }
    Ok(())
}

/// Bytes of a monitored line, as CPUID says.
const LINE: u64 = 64;

impl Core {
    /// Watches the line at linear address `lin`, which can be read.
    fn arm_monitor(&mut self, lin: u64) -> Flow {
        let found = self.mmu.translate(Gva::new(lin), Access::explicit(AccessKind::Read, self.s.cpl));
        let Translation { gpa, backing, .. } = self.check(found)?;
        self.s.monitor = None;
        if let Backing::Ram(off) = backing {
            self.claim_monitored(off);
            self.s.monitor = Some(Gpa::new(gpa.raw() & !(LINE - 1)));
        }
        Ok(())
    }

    /// One page is claimed at a time, and stays so until another one is.
    fn claim_monitored(&mut self, off: RamOffset) {
        let page = off.page_base();
        if self.monitored == Some(page) {
            return;
        }
        if let Some(old) = self.monitored.replace(page) {
            self.mmu.watcher().release(old, PageFlags::MONITORED);
        }
        if self.mmu.watcher().claim(page, PageFlags::MONITORED) {
            self.mmu.code_page_changed(page);
        }
    }

    /// After a state was loaded: claims what it watches.
    pub(crate) fn restore_monitor(&mut self) {
        let line = self.s.monitor;
        match line.map(|gpa| self.mem.map(gpa.page())) {
            Some(Backing::Ram(off)) => self.claim_monitored(off),
            _ => self.s.monitor = None,
        }
    }

    /// Somebody else stored to a monitored page.
    pub(crate) fn monitored_page_written(&mut self, gpa: Gpa, bytes: u32) {
        let hit = |line: Gpa| gpa.raw() < line.raw() + LINE && line.raw() < gpa.raw() + u64::from(bytes);
        if self.s.monitor.is_some_and(hit) {
            self.disarm_monitor();
        }
    }

    /// Ends a wait, or keeps the next MWAIT from waiting.
    pub(crate) fn disarm_monitor(&mut self) {
        self.s.monitor = None;
        if self.s.activity == Activity::Waiting {
            self.s.activity = Activity::Running;
        }
    }
}

/// #UD outside ring 0, and where software switched them off ("IA32_MISC_ENABLE", ENABLE MONITOR FSM).
fn need_monitor(c: &mut Core) -> Flow {
    let enabled = c.s.msr.misc_enable & MONITOR_ENABLED != 0;
    if c.s.cpl == 0 && enabled { Ok(()) } else { c.raise(Fault::UNDEFINED) }
}
