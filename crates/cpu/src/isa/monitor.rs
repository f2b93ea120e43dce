//! MONITOR and MWAIT.
//!
//! No address is watched: a CPU that waits goes on whenever another CPU ran or a device did something, which
//! the architecture allows ("MWAIT-Monitor Wait": false wake-ups).

use super::Row;
use super::string::segment_of;
use crate::core::Core;
use crate::decode::Form;
use crate::op::{ExecFn, Flow, Op};
use iced_x86::{Code, Mnemonic as M};
use umbra_arch::cpuid::Feature;
use umbra_arch::paging::AccessKind;
use umbra_arch::state::{Activity, reg};
use umbra_arch::{Bus, Fault};

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
    need_supervisor(c)?;
    if c.gpr[reg::RCX] as u32 != 0 {
        return c.raise(Fault::GP0);
    }
    let lin = c.linear_at(op, segment_of(op), c.gpr[reg::RAX] & MASK, 1, AccessKind::Read)?;
    c.read::<u8>(bus, op, lin)?;
    c.s.monitor_armed = true;
    Ok(())
}

/// ECX bit 0: an interrupt ends it though IF is 0.
fn mwait(c: &mut Core, bus: &mut dyn Bus, _: &Op) -> Flow {
    const BREAK_IF_MASKED: u32 = 1;
    need_supervisor(c)?;
    let extensions = c.gpr[reg::RCX] as u32;
    if extensions & !BREAK_IF_MASKED != 0 {
        return c.raise(Fault::GP0);
    }
    let pending = extensions & BREAK_IF_MASKED != 0 && bus.interrupt_pending();
    if std::mem::take(&mut c.s.monitor_armed) && !pending {
        c.halt(Activity::Waiting);
    }
    Ok(())
}

/// At other levels they are undefined.
fn need_supervisor(c: &mut Core) -> Flow {
    if c.s.cpl == 0 { Ok(()) } else { c.raise(Fault::UNDEFINED) }
}
