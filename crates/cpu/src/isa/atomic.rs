//! Exchange-and-add, compare-and-exchange.

use super::Row;
use crate::by_width;
use crate::core::Core;
use crate::decode::{Form, Loc};
use crate::op::{ExecFn, Flow, Op};
use crate::word::Word;
use iced_x86::Mnemonic as M;
use umbra_arch::cpuid::Feature;
use umbra_arch::paging::AccessKind;
use umbra_arch::{Bus, Fault};

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Xadd, "XADD-Exchange and Add", |f| match f.dst {
        Loc::Reg => by_width!(f.bytes, W => xadd_reg::<W>),
        Loc::Mem => by_width!(f.bytes, W => xadd_mem::<W>),
        _ => None,
    }),
    Row::new(M::Cmpxchg, "CMPXCHG-Compare and Exchange", cmpxchg),
    Row::new(M::Cmpxchg8b, "CMPXCHG8B/CMPXCHG16B-Compare and Exchange Bytes", |_| Some(pair::<u32>))
        .needs(Feature::Cx8),
    Row::new(M::Cmpxchg16b, "CMPXCHG8B/CMPXCHG16B-Compare and Exchange Bytes", |_| Some(pair::<u64>))
        .needs(Feature::Cx16),
];

fn xadd_reg<W: Word>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let (a, b) = (c.reg::<W>(op.dst), c.reg::<W>(op.src));
    let r = a.wrapping_add(b) & W::MASK;
    c.flags.set_add::<W>(a, b, r);
    c.set_reg::<W>(op.src, a);
    c.set_reg::<W>(op.dst, r);
    Ok(())
}

fn xadd_mem<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let b = c.reg::<W>(op.src);
    let lin = c.linear(op, W::BYTES, AccessKind::Write)?;
    let a = c.modify::<W, u64>(bus, op, lin, |c, a| {
        let r = a.wrapping_add(b) & W::MASK;
        c.flags.set_add::<W>(a, b, r);
        (r, a)
    })?;
    c.set_reg::<W>(op.src, a);
    Ok(())
}

fn cmpxchg(form: &mut Form) -> Option<ExecFn> {
    match form.dst {
        Loc::Reg => by_width!(form.bytes, W => cmpxchg_reg::<W>),
        Loc::Mem => by_width!(form.bytes, W => cmpxchg_mem::<W>),
        _ => None,
    }
}

fn cmpxchg_reg<W: Word>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let (old, acc) = (c.reg::<W>(op.dst), c.reg::<W>(0));
    c.flags.set_sub::<W>(acc, old, acc.wrapping_sub(old) & W::MASK);
    if acc == old {
        let new = c.reg::<W>(op.src);
        c.set_reg::<W>(op.dst, new);
    } else {
        c.set_reg::<W>(0, old);
    }
    Ok(())
}

/// The destination is always written ("the processor never produces a locked read without also producing
/// a locked write").
fn cmpxchg_mem<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let (acc, new) = (c.reg::<W>(0), c.reg::<W>(op.src));
    let lin = c.linear(op, W::BYTES, AccessKind::Write)?;
    let old = c.modify::<W, u64>(bus, op, lin, |_, old| (if old == acc { new } else { old }, old))?;
    c.flags.set_sub::<W>(acc, old, acc.wrapping_sub(old) & W::MASK);
    if old != acc {
        c.set_reg::<W>(0, old);
    }
    Ok(())
}

/// CMPXCHG8B (`W` = u32) and CMPXCHG16B (`W` = u64).
fn pair<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let n = W::BYTES as usize;
    let lin = c.linear(op, 2 * W::BYTES, AccessKind::Write)?;
    if n == 8 && lin & 15 != 0 {
        return c.raise(Fault::GP0);
    }
    c.probe_write(op, lin, 2 * W::BYTES)?;
    let mut raw = [0u8; 16];
    c.read_bytes(bus, op, lin, &mut raw[..2 * n])?;
    let join = |low: u64, high: u64| u128::from(low & W::MASK) | u128::from(high & W::MASK) << W::BITS;
    let old = u128::from_le_bytes(raw);
    let equal = old == join(c.gpr[0], c.gpr[2]);
    let new = if equal { join(c.gpr[3], c.gpr[1]) } else { old };
    c.write_bytes(bus, op, lin, &new.to_le_bytes()[..2 * n])?;
    c.flags.set_zf(equal);
    if !equal {
        c.set_reg::<W>(0, old as u64 & W::MASK);
        c.set_reg::<W>(2, (old >> W::BITS) as u64 & W::MASK);
    }
    Ok(())
}
