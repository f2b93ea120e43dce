//! Operands, once for all rows: registers by width, the two- and one-operand shapes, the stack.

use crate::core::Core;
use crate::decode::{Form, Loc};
use crate::flags::Flags;
use crate::op::{ExecFn, Flow, HIGH_BYTE, Op, Stop};
use crate::word::Word;
use crate::{by_wide, by_width};
use umbra_arch::Bus;
use umbra_arch::paging::AccessKind;
use umbra_arch::segment::Seg;
use umbra_arch::state::reg;

impl Core {
    /// Reads a register operand, zero-extended.
    #[inline(always)]
    pub fn reg<W: Word>(&self, index: u8) -> u64 {
        if W::BITS == 8 && index & HIGH_BYTE != 0 {
            return self.gpr[index as usize & 3] >> 8 & 0xff;
        }
        self.gpr[index as usize & 31] & W::MASK
    }

    /// Writes a register operand: 32-bit results zero the upper half, smaller ones keep the rest.
    #[inline(always)]
    pub fn set_reg<W: Word>(&mut self, index: u8, value: u64) {
        match W::BITS {
            64 => self.gpr[index as usize & 15] = value,
            32 => self.gpr[index as usize & 15] = value & 0xffff_ffff,
            8 if index & HIGH_BYTE != 0 => {
                let r = &mut self.gpr[index as usize & 3];
                *r = *r & !0xff00 | (value & 0xff) << 8;
            }
            _ => {
                let r = &mut self.gpr[index as usize & 15];
                *r = *r & !W::MASK | value & W::MASK;
            }
        }
    }

    /// Reads the memory operand.
    #[inline(always)]
    pub fn load_operand<W: Word>(&mut self, bus: &mut dyn Bus, op: &Op) -> Result<u64, Stop> {
        let lin = self.linear(op, W::BYTES, AccessKind::Read)?;
        self.read::<W>(bus, op, lin)
    }

    /// Writes the memory operand.
    #[inline(always)]
    pub fn store_operand<W: Word>(&mut self, bus: &mut dyn Bus, op: &Op, value: u64) -> Flow {
        let lin = self.linear(op, W::BYTES, AccessKind::Write)?;
        self.write::<W>(bus, op, lin, value)
    }

    /// Pushes a value of width `W`; RSP changes only if the store succeeds.
    #[inline(always)]
    pub fn push<W: Word>(&mut self, bus: &mut dyn Bus, op: &Op, value: u64) -> Flow {
        let rsp = self.gpr[reg::RSP];
        let new = rsp.wrapping_sub(W::BYTES) & self.stack_mask;
        let Some(off) = self.push_at_once::<W>(op, new) else { return self.push_slow::<W>(bus, op, value, new) };
        self.mem.store::<W>(off, W::of(value));
        self.set_stack_pointer(new);
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn push_slow<W: Word>(&mut self, bus: &mut dyn Bus, op: &Op, value: u64, new: u64) -> Flow {
        let lin = self.linear_at(op, Seg::Ss, new, W::BYTES, AccessKind::Write)?;
        self.write::<W>(bus, op, lin, value)?;
        self.set_stack_pointer(new);
        Ok(())
    }

    /// Reads the value on top of the stack, `skip` bytes above the pointer, without popping.
    #[inline(always)]
    pub fn peek_stack<W: Word>(&mut self, bus: &mut dyn Bus, op: &Op, skip: u64) -> Result<u64, Stop> {
        let at = self.gpr[reg::RSP].wrapping_add(skip) & self.stack_mask;
        let lin = self.linear_at(op, Seg::Ss, at, W::BYTES, AccessKind::Read)?;
        self.read::<W>(bus, op, lin)
    }

    /// Moves the stack pointer up by `bytes`, within its width.
    #[inline(always)]
    pub fn drop_stack(&mut self, bytes: u64) {
        let new = self.gpr[reg::RSP].wrapping_add(bytes) & self.stack_mask;
        self.set_stack_pointer(new);
    }

    /// Replaces the stack pointer within its width.
    #[inline(always)]
    pub fn set_stack_pointer(&mut self, value: u64) {
        let rsp = &mut self.gpr[reg::RSP];
        *rsp = if self.stack_mask == 0xffff { *rsp & !0xffff | value & 0xffff } else { value & self.stack_mask };
    }
}

/// A two-operand operation `dst = f(dst, src)` with flags.
pub trait Binary: 'static {
    /// Whether the result goes to the first operand (CMP and TEST don't).
    const WRITES: bool = true;
    /// The result; operands and result masked to the width.
    fn apply<W: Word>(a: u64, b: u64, f: &mut Flags) -> u64;
}

/// A one-operand operation `dst = f(dst)` with flags.
pub trait Unary: 'static {
    /// The result, masked to the width.
    fn apply<W: Word>(a: u64, f: &mut Flags) -> u64;
}

/// Selects the function of a [`Binary`] row.
pub fn binary<O: Binary>(form: &Form) -> Option<ExecFn> {
    match (form.dst, form.src) {
        (Loc::Reg, Loc::Reg) => by_width!(form.bytes, W => reg_reg::<O, W>),
        (Loc::Reg, Loc::Mem) => by_width!(form.bytes, W => reg_mem::<O, W>),
        (Loc::Reg, Loc::Imm) => by_width!(form.bytes, W => reg_imm::<O, W>),
        (Loc::Mem, Loc::Reg) => by_width!(form.bytes, W => mem_reg::<O, W>),
        (Loc::Mem, Loc::Imm) => by_width!(form.bytes, W => mem_imm::<O, W>),
        _ => None,
    }
}

fn reg_reg<O: Binary, W: Word>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let r = O::apply::<W>(c.reg::<W>(op.dst), c.reg::<W>(op.src), &mut c.flags);
    if O::WRITES {
        c.set_reg::<W>(op.dst, r);
    }
    Ok(())
}

fn reg_imm<O: Binary, W: Word>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let r = O::apply::<W>(c.reg::<W>(op.dst), op.imm & W::MASK, &mut c.flags);
    if O::WRITES {
        c.set_reg::<W>(op.dst, r);
    }
    Ok(())
}

fn reg_mem<O: Binary, W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let Some(off) = c.read_at_once::<W>(op) else { return reg_mem_slow::<O, W>(c, bus, op) };
    let b = c.mem.load::<W>(off).zext();
    reg_value::<O, W>(c, op, b)
}

#[cold]
#[inline(never)]
fn reg_mem_slow<O: Binary, W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let b = c.load_operand::<W>(bus, op)?;
    reg_value::<O, W>(c, op, b)
}

#[inline(always)]
fn reg_value<O: Binary, W: Word>(c: &mut Core, op: &Op, b: u64) -> Flow {
    let r = O::apply::<W>(c.reg::<W>(op.dst), b, &mut c.flags);
    if O::WRITES {
        c.set_reg::<W>(op.dst, r);
    }
    Ok(())
}

/// The memory operand with `b`, if it is found at once; `b` is asked for when it is.
#[inline(always)]
fn mem_at_once<O: Binary, W: Word>(c: &mut Core, op: &Op, b: impl FnOnce(&Core) -> u64) -> Option<()> {
    if !O::WRITES {
        let a = c.mem.load::<W>(c.read_at_once::<W>(op)?).zext();
        O::apply::<W>(a, b(c), &mut c.flags);
        return Some(());
    }
    let off = c.write_at_once::<W>(op)?;
    let a = c.mem.load::<W>(off).zext();
    let r = O::apply::<W>(a, b(c), &mut c.flags);
    c.mem.store::<W>(off, W::of(r));
    Some(())
}

#[cold]
#[inline(never)]
fn mem_slow<O: Binary, W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op, b: u64) -> Flow {
    if !O::WRITES {
        let a = c.load_operand::<W>(bus, op)?;
        O::apply::<W>(a, b, &mut c.flags);
        return Ok(());
    }
    let lin = c.linear(op, W::BYTES, AccessKind::Write)?;
    c.modify::<W, ()>(bus, op, lin, |c, a| (O::apply::<W>(a, b, &mut c.flags), ()))
}

fn mem_reg<O: Binary, W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    if mem_at_once::<O, W>(c, op, |c| c.reg::<W>(op.src)).is_some() {
        return Ok(());
    }
    mem_slow::<O, W>(c, bus, op, c.reg::<W>(op.src))
}

fn mem_imm<O: Binary, W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    if mem_at_once::<O, W>(c, op, |_| op.imm & W::MASK).is_some() {
        return Ok(());
    }
    mem_slow::<O, W>(c, bus, op, op.imm & W::MASK)
}

/// Selects the function of a [`Unary`] row.
pub fn unary<O: Unary>(form: &Form) -> Option<ExecFn> {
    match form.dst {
        Loc::Reg => by_width!(form.bytes, W => unary_reg::<O, W>),
        Loc::Mem => by_width!(form.bytes, W => unary_mem::<O, W>),
        _ => None,
    }
}

fn unary_reg<O: Unary, W: Word>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let r = O::apply::<W>(c.reg::<W>(op.dst), &mut c.flags);
    c.set_reg::<W>(op.dst, r);
    Ok(())
}

fn unary_mem<O: Unary, W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let Some(off) = c.write_at_once::<W>(op) else { return unary_mem_slow::<O, W>(c, bus, op) };
    let a = c.mem.load::<W>(off).zext();
    let r = O::apply::<W>(a, &mut c.flags);
    c.mem.store::<W>(off, W::of(r));
    Ok(())
}

#[cold]
#[inline(never)]
fn unary_mem_slow<O: Unary, W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let lin = c.linear(op, W::BYTES, AccessKind::Write)?;
    c.modify::<W, ()>(bus, op, lin, |c, a| (O::apply::<W>(a, &mut c.flags), ()))
}

/// An operation `dst = f(src)` whose destination is a register and isn't read unless `f` asks:
/// source and destination widths may differ.
pub trait Convert: 'static {
    /// With a zero source the destination stays, all of it (BSF, BSR).
    const ZERO_KEEPS: bool = false;
    /// The new destination from the source, both masked.
    fn apply<D: Word, S: Word>(src: u64, f: &mut Flags) -> u64;
}

/// Selects the function of a [`Convert`] row; the source's width is `form.src_bytes`.
pub fn convert<O: Convert>(form: &Form) -> Option<ExecFn> {
    match (form.src_bytes, form.src) {
        (1, Loc::Reg) => by_width!(form.bytes, W => convert_reg::<O, W, u8>),
        (1, Loc::Mem) => by_width!(form.bytes, W => convert_mem::<O, W, u8>),
        (2, Loc::Reg) => by_wide!(form.bytes, W => convert_reg::<O, W, u16>),
        (2, Loc::Mem) => by_wide!(form.bytes, W => convert_mem::<O, W, u16>),
        (4, Loc::Reg) => by_wide!(form.bytes, W => convert_reg::<O, W, u32>),
        (4, Loc::Mem) => by_wide!(form.bytes, W => convert_mem::<O, W, u32>),
        (8, Loc::Reg) => by_wide!(form.bytes, W => convert_reg::<O, W, u64>),
        (8, Loc::Mem) => by_wide!(form.bytes, W => convert_mem::<O, W, u64>),
        _ => None,
    }
}

#[inline(always)]
fn converted<O: Convert, D: Word, S: Word>(c: &mut Core, op: &Op, src: u64) -> Flow {
    let r = O::apply::<D, S>(src, &mut c.flags);
    if !O::ZERO_KEEPS || src != 0 {
        c.set_reg::<D>(op.dst, r);
    }
    Ok(())
}

fn convert_reg<O: Convert, D: Word, S: Word>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let src = c.reg::<S>(op.src);
    converted::<O, D, S>(c, op, src)
}

fn convert_mem<O: Convert, D: Word, S: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let Some(off) = c.read_at_once::<S>(op) else { return convert_mem_slow::<O, D, S>(c, bus, op) };
    let src = c.mem.load::<S>(off).zext();
    converted::<O, D, S>(c, op, src)
}

#[cold]
#[inline(never)]
fn convert_mem_slow<O: Convert, D: Word, S: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let src = c.load_operand::<S>(bus, op)?;
    converted::<O, D, S>(c, op, src)
}
