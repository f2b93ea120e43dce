//! Moves between general registers and memory, LEA, exchanges, conditional moves and sets.

use super::Row;
use crate::core::Core;
use crate::decode::{Form, Loc};
use crate::op::{ExecFn, Flow, Op, Stop};
use crate::word::Word;
use crate::{by_wide, by_width};
use iced_x86::{Code, Mnemonic as M};
use umbra_arch::Bus;
use umbra_arch::cpuid::Feature;
use umbra_arch::paging::AccessKind;
use umbra_arch::state::reg;
use umbra_mmu::{End, Look};

const CMOV: &str = "CMOVcc-Conditional Move";
const SET: &str = "SETcc-Set Byte on Condition";

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Mov, "MOV-Move", mov).only(is_general),
    Row::new(M::Movnti, "MOVNTI-Store Doubleword Using Non-Temporal Hint", mov),
    Row::new(M::Movbe, "MOVBE-Move Data After Swapping Bytes", movbe).needs(Feature::Movbe),
    Row::new(M::Lea, "LEA-Load Effective Address", |f| by_wide!(f.bytes, W => lea::<W>)),
    Row::new(M::Xchg, "XCHG-Exchange Register/Memory With Register", xchg),
    Row::new(M::Xlatb, "XLAT/XLATB-Table Look-up Translation", |_| Some(xlat)),
    Row::new(M::Cmovo, CMOV, cmov::<0>),
    Row::new(M::Cmovno, CMOV, cmov::<1>),
    Row::new(M::Cmovb, CMOV, cmov::<2>),
    Row::new(M::Cmovae, CMOV, cmov::<3>),
    Row::new(M::Cmove, CMOV, cmov::<4>),
    Row::new(M::Cmovne, CMOV, cmov::<5>),
    Row::new(M::Cmovbe, CMOV, cmov::<6>),
    Row::new(M::Cmova, CMOV, cmov::<7>),
    Row::new(M::Cmovs, CMOV, cmov::<8>),
    Row::new(M::Cmovns, CMOV, cmov::<9>),
    Row::new(M::Cmovp, CMOV, cmov::<10>),
    Row::new(M::Cmovnp, CMOV, cmov::<11>),
    Row::new(M::Cmovl, CMOV, cmov::<12>),
    Row::new(M::Cmovge, CMOV, cmov::<13>),
    Row::new(M::Cmovle, CMOV, cmov::<14>),
    Row::new(M::Cmovg, CMOV, cmov::<15>),
    Row::new(M::Seto, SET, set::<0>),
    Row::new(M::Setno, SET, set::<1>),
    Row::new(M::Setb, SET, set::<2>),
    Row::new(M::Setae, SET, set::<3>),
    Row::new(M::Sete, SET, set::<4>),
    Row::new(M::Setne, SET, set::<5>),
    Row::new(M::Setbe, SET, set::<6>),
    Row::new(M::Seta, SET, set::<7>),
    Row::new(M::Sets, SET, set::<8>),
    Row::new(M::Setns, SET, set::<9>),
    Row::new(M::Setp, SET, set::<10>),
    Row::new(M::Setnp, SET, set::<11>),
    Row::new(M::Setl, SET, set::<12>),
    Row::new(M::Setge, SET, set::<13>),
    Row::new(M::Setle, SET, set::<14>),
    Row::new(M::Setg, SET, set::<15>),
];

/// MOV between general registers, memory and immediates; segment, control and debug registers are elsewhere.
fn is_general(code: Code) -> bool {
    use iced_x86::OpCodeOperandKind as K;
    let info = code.op_code();
    (0..info.op_count()).all(|n| !matches!(info.op_kind(n), K::seg_reg | K::cr_reg | K::dr_reg | K::tr_reg))
}

fn mov(form: &mut Form) -> Option<ExecFn> {
    match (form.dst, form.src) {
        (Loc::Reg, Loc::Reg) => by_width!(form.bytes, W => mov_reg::<W>),
        (Loc::Reg, Loc::Imm) => by_width!(form.bytes, W => mov_imm::<W>),
        (Loc::Reg, Loc::Mem) => by_width!(form.bytes, W => load::<W>),
        (Loc::Mem, Loc::Reg) => by_width!(form.bytes, W => store::<W>),
        (Loc::Mem, Loc::Imm) => by_width!(form.bytes, W => store_imm::<W>),
        _ => None,
    }
}

fn mov_reg<W: Word>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let value = c.reg::<W>(op.src);
    c.set_reg::<W>(op.dst, value);
    Ok(())
}

fn mov_imm<W: Word>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    c.set_reg::<W>(op.dst, op.imm);
    Ok(())
}

fn load<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let Some(lin) = c.unchecked(op) else { return load_checked::<W>(c, bus, op) };
    let Some(off) = c.mmu.lookup_read(lin, W::BYTES) else { return load_missed::<W>(c, bus, op, lin.raw()) };
    let value = c.mem.load::<W>(off).zext();
    c.set_reg::<W>(op.dst, value);
    Ok(())
}

#[inline(never)]
fn load_checked<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let value = c.load_operand::<W>(bus, op)?;
    c.set_reg::<W>(op.dst, value);
    Ok(())
}

/// The table lacks the operand's page.
#[cold]
#[inline(never)]
fn load_missed<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op, lin: u64) -> Flow {
    match c.look_at_miss::<W>(op, lin, AccessKind::Read) {
        Look::Faults(_) => Err(Stop::Fault),
        Look::Ends(end) => load_from::<W>(c, bus, op, lin, end),
        Look::Unknown => load_slow::<W>(c, bus, op, lin),
    }
}

#[inline(never)]
fn load_from<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op, lin: u64, end: End) -> Flow {
    let value = c.read_from::<W>(bus, op, lin, end)?;
    c.set_reg::<W>(op.dst, value);
    Ok(())
}

#[cold]
#[inline(never)]
fn load_slow<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op, lin: u64) -> Flow {
    let value = c.read_missed::<W>(bus, op, lin)?;
    c.set_reg::<W>(op.dst, value);
    Ok(())
}

fn store<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let value = c.reg::<W>(op.src);
    store_value::<W>(c, bus, op, value)
}

fn store_imm<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    store_value::<W>(c, bus, op, op.imm)
}

#[inline(always)]
fn store_value<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op, value: u64) -> Flow {
    let Some(lin) = c.unchecked(op) else { return store_checked::<W>(c, bus, op, value) };
    c.write::<W>(bus, op, lin.raw(), value)
}

#[inline(never)]
fn store_checked<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op, value: u64) -> Flow {
    c.store_operand::<W>(bus, op, value)
}

fn movbe(form: &mut Form) -> Option<ExecFn> {
    match form.dst {
        Loc::Reg => by_wide!(form.bytes, W => movbe_load::<W>),
        Loc::Mem => by_wide!(form.bytes, W => movbe_store::<W>),
        _ => None,
    }
}

fn movbe_load<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let value = c.load_operand::<W>(bus, op)?;
    c.set_reg::<W>(op.dst, value.swap_bytes() >> W::TOP);
    Ok(())
}

fn movbe_store<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let value = c.reg::<W>(op.src).swap_bytes() >> W::TOP;
    c.store_operand::<W>(bus, op, value)
}

fn lea<W: Word>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let value = c.effective(op);
    c.set_reg::<W>(op.dst, value);
    Ok(())
}

fn xchg(form: &mut Form) -> Option<ExecFn> {
    match (form.dst, form.src) {
        (Loc::Reg, Loc::Reg) => by_width!(form.bytes, W => xchg_reg::<W>),
        (Loc::Mem, Loc::Reg) => by_width!(form.bytes, W => xchg_mem::<W>),
        _ => None,
    }
}

fn xchg_reg<W: Word>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let (a, b) = (c.reg::<W>(op.dst), c.reg::<W>(op.src));
    c.set_reg::<W>(op.dst, b);
    c.set_reg::<W>(op.src, a);
    Ok(())
}

fn xchg_mem<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let new = c.reg::<W>(op.src);
    let lin = c.linear(op, W::BYTES, AccessKind::Write)?;
    let old = c.modify::<W, u64>(bus, op, lin, |_, old| (new, old))?;
    c.set_reg::<W>(op.src, old);
    Ok(())
}

fn xlat(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let offset = c.gpr[reg::RBX].wrapping_add(c.gpr[reg::RAX] & 0xff) & op.ea_mask;
    let lin = c.linear_at(op, super::string::segment_of(op), offset, 1, AccessKind::Read)?;
    let value = c.read::<u8>(bus, op, lin)?;
    c.set_reg::<u8>(0, value);
    Ok(())
}

fn cmov<const CC: u8>(form: &mut Form) -> Option<ExecFn> {
    match form.src {
        Loc::Reg => by_wide!(form.bytes, W => cmov_reg::<W, CC>),
        Loc::Mem => by_wide!(form.bytes, W => cmov_mem::<W, CC>),
        _ => None,
    }
}

#[inline(always)]
fn cmov_any<W: Word, const CC: u8>(c: &mut Core, op: &Op, value: u64) -> Flow {
    // A 32-bit destination's upper half is zeroed even if the condition is false.
    let value = if c.flags.condition::<CC>() { value } else { c.reg::<W>(op.dst) };
    c.set_reg::<W>(op.dst, value);
    Ok(())
}

fn cmov_reg<W: Word, const CC: u8>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let value = c.reg::<W>(op.src);
    cmov_any::<W, CC>(c, op, value)
}

fn cmov_mem<W: Word, const CC: u8>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let value = c.load_operand::<W>(bus, op)?;
    cmov_any::<W, CC>(c, op, value)
}

fn set<const CC: u8>(form: &mut Form) -> Option<ExecFn> {
    match form.dst {
        Loc::Reg => Some(set_reg::<CC>),
        Loc::Mem => Some(set_mem::<CC>),
        _ => None,
    }
}

fn set_reg<const CC: u8>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let value = u64::from(c.flags.condition::<CC>());
    c.set_reg::<u8>(op.dst, value);
    Ok(())
}

fn set_mem<const CC: u8>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let value = u64::from(c.flags.condition::<CC>());
    c.store_operand::<u8>(bus, op, value)
}
