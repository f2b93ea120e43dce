//! Mnemonics that exist for MMX registers only, and EMMS; the others' MMX forms are with [`sse`](super::sse).

use super::Row;
use super::host_data::{Mmx, Unit, host_rows, select};
use crate::core::Core;
use crate::op::{Flow, Op};
use iced_x86::Mnemonic as M;
use umbra_arch::Bus;
use umbra_arch::cpuid::Feature;

/// The rows that the host runs.
pub const ROWS: &[Row] = host_rows! {
    Cvtpd2pi Cvtps2pi Cvttpd2pi Cvttps2pi Movdq2q Movntq Movq2dq Pshufw
};

/// The rows of our own.
pub const STATE_ROWS: &[Row] =
    &[Row::new(M::Emms, "EMMS-Empty MMX Technology State", |_| Some(emms)).needs(Feature::Mmx)];

fn emms(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    Mmx::ready(c)?;
    let fp = &mut c.s.fp;
    fp.ftw = 0;
    // TOP becomes 0; `st` is in stack order, and the registers themselves stay.
    fp.st.rotate_right(usize::from(fp.fsw >> 11 & 7));
    fp.fsw &= !0x3800;
    Ok(())
}
