//! PUSH, POP and their relatives.

use super::Row;
use crate::by_wide;
use crate::core::Core;
use crate::decode::{Form, Loc};
use crate::op::{ExecFn, Flow, Op, Stop};
use crate::word::Word;
use iced_x86::Mnemonic as M;
use umbra_arch::paging::AccessKind;
use umbra_arch::segment::Seg;
use umbra_arch::state::{Shadow, reg};
use umbra_arch::{Bus, Fault, rflags};

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Push, "PUSH-Push Word, Doubleword, or Quadword Onto the Stack", push),
    Row::new(M::Pop, "POP-Pop a Value From the Stack", pop).only(|c| !pops_segment(c)),
    Row::new(M::Pop, "POP-Pop a Value From the Stack", pop_segment).only(pops_segment).ends(),
    Row::new(M::Pusha, "PUSHA/PUSHAD-Push All General-Purpose Registers", |_| Some(pusha::<u16>)),
    Row::new(M::Pushad, "PUSHA/PUSHAD-Push All General-Purpose Registers", |_| Some(pusha::<u32>)),
    Row::new(M::Popa, "POPA/POPAD-Pop All General-Purpose Registers", |_| Some(popa::<u16>)),
    Row::new(M::Popad, "POPA/POPAD-Pop All General-Purpose Registers", |_| Some(popa::<u32>)),
    Row::new(M::Pushf, "PUSHF/PUSHFD/PUSHFQ-Push EFLAGS Register Onto the Stack", |_| Some(pushf::<u16>)),
    Row::new(M::Pushfd, "PUSHF/PUSHFD/PUSHFQ-Push EFLAGS Register Onto the Stack", |_| Some(pushf::<u32>)),
    Row::new(M::Pushfq, "PUSHF/PUSHFD/PUSHFQ-Push EFLAGS Register Onto the Stack", |_| Some(pushf::<u64>)),
    Row::new(M::Popf, "POPF/POPFD/POPFQ-Pop Stack Into EFLAGS Register", |_| Some(popf::<u16>)).ends(),
    Row::new(M::Popfd, "POPF/POPFD/POPFQ-Pop Stack Into EFLAGS Register", |_| Some(popf::<u32>)).ends(),
    Row::new(M::Popfq, "POPF/POPFD/POPFQ-Pop Stack Into EFLAGS Register", |_| Some(popf::<u64>)).ends(),
    Row::new(M::Enter, "ENTER-Make Stack Frame for Procedure Parameters", enter),
    Row::new(M::Leave, "LEAVE-High Level Procedure Exit", |f| by_wide!(frame_bytes(f), W => leave::<W>)),
];

/// Bytes that a stack instruction moves.
pub fn stack_bytes(form: &Form) -> u64 {
    form.i.stack_pointer_increment().unsigned_abs().into()
}

fn pops_segment(code: iced_x86::Code) -> bool {
    use iced_x86::Code as C;
    matches!(
        code,
        C::Popw_ES
            | C::Popd_ES
            | C::Popw_SS
            | C::Popd_SS
            | C::Popw_DS
            | C::Popd_DS
            | C::Popw_FS
            | C::Popd_FS
            | C::Popq_FS
            | C::Popw_GS
            | C::Popd_GS
            | C::Popq_GS
    )
}

fn push(form: &mut Form) -> Option<ExecFn> {
    let bytes = stack_bytes(form);
    match form.dst {
        Loc::Reg => by_wide!(bytes, W => push_reg::<W>),
        Loc::Mem => by_wide!(bytes, W => push_mem::<W>),
        Loc::Imm => by_wide!(bytes, W => push_imm::<W>),
        Loc::Other => by_wide!(bytes, W => push_segment::<W>),
        _ => None,
    }
}

fn push_reg<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let value = c.reg::<W>(op.dst);
    c.push::<W>(bus, op, value)
}

fn push_mem<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let value = c.load_operand::<W>(bus, op)?;
    c.push::<W>(bus, op, value)
}

fn push_imm<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    c.push::<W>(bus, op, op.imm & W::MASK)
}

/// A 32-bit push of a selector writes only 16 bits on processors since the P6.
fn push_segment<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let value = u64::from(c.s.seg[op.dst as usize & 7].selector);
    if W::BITS != 32 {
        return c.push::<W>(bus, op, value);
    }
    let new = c.gpr[reg::RSP].wrapping_sub(4) & c.stack_mask;
    let lin = c.linear_at(op, Seg::Ss, new, 4, AccessKind::Write)?;
    c.write::<u16>(bus, op, lin, value)?;
    c.set_stack_pointer(new);
    Ok(())
}

fn pop(form: &mut Form) -> Option<ExecFn> {
    let bytes = stack_bytes(form);
    match form.dst {
        Loc::Reg => by_wide!(bytes, W => pop_reg::<W>),
        Loc::Mem => by_wide!(bytes, W => pop_mem::<W>),
        _ => None,
    }
}

fn pop_reg<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let Some(off) = c.top_at_once::<W>(op) else { return pop_reg_slow::<W>(c, bus, op) };
    let value = c.mem.load::<W>(off).zext();
    c.drop_stack(W::BYTES);
    c.set_reg::<W>(op.dst, value);
    Ok(())
}

#[cold]
#[inline(never)]
fn pop_reg_slow<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let value = c.peek_stack::<W>(bus, op, 0)?;
    c.drop_stack(W::BYTES);
    c.set_reg::<W>(op.dst, value);
    Ok(())
}

/// The address is computed with the stack pointer after the pop.
fn pop_mem<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let value = c.peek_stack::<W>(bus, op, 0)?;
    let old = c.gpr[reg::RSP];
    c.drop_stack(W::BYTES);
    let done = c.store_operand::<W>(bus, op, value);
    if done.is_err() {
        c.gpr[reg::RSP] = old;
    }
    done
}

fn pop_segment(form: &mut Form) -> Option<ExecFn> {
    let bytes = stack_bytes(form);
    by_wide!(bytes, W => pop_to_segment::<W>)
}

fn pop_to_segment<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let selector = c.peek_stack::<u16>(bus, op, 0)? as u16;
    let seg = super::segment::seg_of(op.dst);
    // The pointer moves by the old stack segment's width.
    let new = c.gpr[reg::RSP].wrapping_add(W::BYTES) & c.stack_mask;
    let mask = c.stack_mask;
    c.load_segment(bus, seg, selector)?;
    let rsp = &mut c.gpr[reg::RSP];
    *rsp = if mask == 0xffff { *rsp & !0xffff | new } else { new };
    if seg == Seg::Ss {
        c.shadow_next = Shadow::MovSs;
        c.check_events = true;
    }
    Ok(())
}

fn pusha<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let mut data = [0u8; 32];
    let n = W::BYTES as usize;
    for (slot, r) in (0..8).rev().enumerate() {
        data[slot * n..slot * n + n].copy_from_slice(&c.gpr[r].to_le_bytes()[..n]);
    }
    let new = c.gpr[reg::RSP].wrapping_sub(8 * W::BYTES) & c.stack_mask;
    // Sixteen- or thirty-two-byte frames that wrap round the segment's end fault in the limit check.
    let lin = c.linear_at(op, Seg::Ss, new, 8 * W::BYTES, AccessKind::Write)?;
    // #PF comes from the first of the eight pushes that can't be done, and none is done then.
    for slot in (0..8).rev() {
        c.probe_write(op, lin.wrapping_add(slot * W::BYTES), W::BYTES)?;
    }
    c.write_bytes(bus, op, lin, &data[..8 * n])?;
    c.set_stack_pointer(new);
    Ok(())
}

fn popa<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let mut values = [0u64; 8];
    for (slot, value) in values.iter_mut().enumerate() {
        *value = c.peek_stack::<W>(bus, op, slot as u64 * W::BYTES)?;
    }
    for (slot, value) in values.into_iter().enumerate() {
        let r = 7 - slot;
        if r != reg::RSP {
            c.set_reg::<W>(r as u8, value);
        }
    }
    c.drop_stack(8 * W::BYTES);
    Ok(())
}

/// In virtual-8086 mode PUSHF, POPF and friends need IOPL 3 (without VME).
fn v86_check(c: &mut Core) -> Result<(), Stop> {
    if c.s.is_v86() && c.s.rflags & rflags::IOPL != rflags::IOPL {
        return c.raise(Fault::GP0);
    }
    Ok(())
}

fn pushf<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    v86_check(c)?;
    let value = c.rflags() & !(rflags::VM | rflags::RF) & W::MASK;
    c.push::<W>(bus, op, value)
}

fn popf<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    v86_check(c)?;
    let value = c.peek_stack::<W>(bus, op, 0)?;
    c.drop_stack(W::BYTES);
    let mut change = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
    if W::BITS > 16 {
        change |= rflags::AC | rflags::ID;
    }
    let (cpl, iopl) = (c.s.cpl, (c.s.rflags >> 12 & 3) as u8);
    if cpl == 0 {
        change |= rflags::IOPL;
    }
    if cpl <= iopl {
        change |= rflags::IF;
    }
    let old = c.rflags();
    // POPF clears RF.
    c.set_rflags((old & !change | value & change) & !rflags::RF);
    Ok(())
}

/// Operand size of ENTER and LEAVE, whose stack movement isn't fixed.
fn frame_bytes(form: &Form) -> u64 {
    use iced_x86::Code;
    match form.i.code() {
        Code::Enterw_imm16_imm8 | Code::Leavew => 2,
        Code::Enterd_imm16_imm8 | Code::Leaved => 4,
        _ => 8,
    }
}

fn enter(form: &mut Form) -> Option<ExecFn> {
    form.aux = u64::from(form.i.immediate8_2nd());
    let bytes = frame_bytes(form);
    by_wide!(bytes, W => enter_any::<W>)
}

fn enter_any<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let level = op.aux & 31;
    let saved = c.gpr[reg::RSP];
    let result = enter_frame::<W>(c, bus, op, level);
    if result.is_err() {
        c.gpr[reg::RSP] = saved;
    }
    result
}

fn enter_frame<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op, level: u64) -> Flow {
    let rbp = c.gpr[reg::RBP];
    c.push::<W>(bus, op, rbp & W::MASK)?;
    let frame = c.gpr[reg::RSP];
    for n in 1..level {
        let at = rbp.wrapping_sub(n * W::BYTES) & c.stack_mask;
        let lin = c.linear_at(op, Seg::Ss, at, W::BYTES, AccessKind::Read)?;
        let value = c.read::<W>(bus, op, lin)?;
        c.push::<W>(bus, op, value)?;
    }
    if level > 0 {
        c.push::<W>(bus, op, frame & W::MASK)?;
    }
    let new = c.gpr[reg::RSP].wrapping_sub(op.imm & 0xffff) & c.stack_mask;
    // The new top must be writable ("ENTER": #SS, #PF), though nothing is written.
    let lin = c.linear_at(op, Seg::Ss, new, W::BYTES, AccessKind::Write)?;
    c.probe_write(op, lin, W::BYTES)?;
    c.set_stack_pointer(new);
    c.set_reg::<W>(reg::RBP as u8, frame);
    Ok(())
}

fn leave<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let at = c.gpr[reg::RBP] & c.stack_mask;
    let lin = c.linear_at(op, Seg::Ss, at, W::BYTES, AccessKind::Read)?;
    let value = c.read::<W>(bus, op, lin)?;
    c.set_stack_pointer(at.wrapping_add(W::BYTES));
    c.set_reg::<W>(reg::RBP as u8, value);
    Ok(())
}
