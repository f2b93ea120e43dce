//! Instructions that set or read single flags.

use super::Row;
use crate::core::Core;
use crate::flags::Flags;
use crate::op::{Flow, Op};
use iced_x86::Mnemonic as M;
use umbra_arch::cpuid::Feature;
use umbra_arch::state::Shadow;
use umbra_arch::{Bus, Fault, rflags};

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Clc, "CLC-Clear Carry Flag", |_| Some(|c, _, _| carry(c, false))),
    Row::new(M::Stc, "STC-Set Carry Flag", |_| Some(|c, _, _| carry(c, true))),
    Row::new(M::Cmc, "CMC-Complement Carry Flag", |_| {
        Some(|c, _, _| {
            let cf = c.flags.cf();
            carry(c, !cf)
        })
    }),
    Row::new(M::Cld, "CLD-Clear Direction Flag", |_| {
        Some(|c, _, _| {
            c.s.rflags &= !rflags::DF;
            Ok(())
        })
    }),
    Row::new(M::Std, "STD-Set Direction Flag", |_| {
        Some(|c, _, _| {
            c.s.rflags |= rflags::DF;
            Ok(())
        })
    }),
    Row::new(M::Lahf, "LAHF-Load Status Flags Into AH Register", |_| {
        Some(|c, _, _| {
            let ah = c.rflags() & 0xff;
            c.gpr[0] = c.gpr[0] & !0xff00 | ah << 8;
            Ok(())
        })
    }),
    Row::new(M::Sahf, "SAHF-Store AH Into Flags", |_| {
        Some(|c, _, _| {
            let of = c.flags.of();
            c.flags = Flags::from_rflags(c.gpr[0] >> 8 & 0xff);
            c.flags.set_of(of);
            Ok(())
        })
    }),
    Row::new(M::Cli, "CLI-Clear Interrupt Flag", |_| Some(cli)),
    Row::new(M::Sti, "STI-Set Interrupt Flag", |_| Some(sti)).ends(),
    Row::new(M::Clac, "CLAC-Clear AC Flag in EFLAGS Register", |_| Some(access_flag::<false>)).needs(Feature::Smap),
    Row::new(M::Stac, "STAC-Set AC Flag in EFLAGS Register", |_| Some(access_flag::<true>)).needs(Feature::Smap),
    Row::new(M::Salc, "SALC", |_| {
        Some(|c, _, _| {
            let al = if c.flags.cf() { 0xff } else { 0 };
            c.set_reg::<u8>(0, al);
            Ok(())
        })
    }),
];

fn carry(c: &mut Core, value: bool) -> Flow {
    c.flags.set_cf(value);
    Ok(())
}

/// CLI and STI need CPL <= IOPL (and IOPL 3 in virtual-8086 mode, where CPL is 3).
fn io_privilege(c: &mut Core) -> Flow {
    if c.s.cr0.pe() && u64::from(c.s.cpl) > c.s.rflags >> 12 & 3 {
        return c.raise(Fault::GP0);
    }
    Ok(())
}

fn cli(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    io_privilege(c)?;
    c.s.rflags &= !rflags::IF;
    Ok(())
}

fn sti(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    io_privilege(c)?;
    if c.s.rflags & rflags::IF == 0 {
        c.s.rflags |= rflags::IF;
        c.shadow_next = Shadow::Sti;
        c.check_events = true;
        c.break_block = true;
    }
    Ok(())
}

fn access_flag<const SET: bool>(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    if c.s.cpl != 0 {
        return c.raise(Fault::UNDEFINED);
    }
    c.s.rflags = if SET { c.s.rflags | rflags::AC } else { c.s.rflags & !rflags::AC };
    c.view_changed();
    Ok(())
}
