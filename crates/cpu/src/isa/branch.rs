//! Near branches.

use super::Row;
use super::stack::stack_bytes;
use crate::by_wide;
use crate::core::Core;
use crate::decode::{Form, Loc};
use crate::op::{CODE_BASE, ExecFn, Flow, Op};
use crate::word::Word;
use iced_x86::{Code, Mnemonic as M};
use umbra_arch::segment::Seg;
use umbra_arch::state::reg;
use umbra_arch::{Bus, Fault, Gva};

const JCC: &str = "Jcc-Jump if Condition Is Met";
const LOOP: &str = "LOOP/LOOPcc-Loop According to ECX Counter";
const RET: &str = "RET-Return From Procedure";

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Jmp, "JMP-Jump", jmp).only(|c| !is_far(c)).ends(),
    Row::new(M::Call, "CALL-Call Procedure", call).only(|c| !is_far(c)).ends(),
    Row::new(M::Ret, RET, |f| by_wide!(return_bytes(f), W => ret::<W>)).ends(),
    Row::new(M::Jo, JCC, |_| Some(jcc::<0>)).ends(),
    Row::new(M::Jno, JCC, |_| Some(jcc::<1>)).ends(),
    Row::new(M::Jb, JCC, |_| Some(jcc::<2>)).ends(),
    Row::new(M::Jae, JCC, |_| Some(jcc::<3>)).ends(),
    Row::new(M::Je, JCC, |_| Some(jcc::<4>)).ends(),
    Row::new(M::Jne, JCC, |_| Some(jcc::<5>)).ends(),
    Row::new(M::Jbe, JCC, |_| Some(jcc::<6>)).ends(),
    Row::new(M::Ja, JCC, |_| Some(jcc::<7>)).ends(),
    Row::new(M::Js, JCC, |_| Some(jcc::<8>)).ends(),
    Row::new(M::Jns, JCC, |_| Some(jcc::<9>)).ends(),
    Row::new(M::Jp, JCC, |_| Some(jcc::<10>)).ends(),
    Row::new(M::Jnp, JCC, |_| Some(jcc::<11>)).ends(),
    Row::new(M::Jl, JCC, |_| Some(jcc::<12>)).ends(),
    Row::new(M::Jge, JCC, |_| Some(jcc::<13>)).ends(),
    Row::new(M::Jle, JCC, |_| Some(jcc::<14>)).ends(),
    Row::new(M::Jg, JCC, |_| Some(jcc::<15>)).ends(),
    Row::new(M::Jcxz, JCC, |_| Some(jrcxz)).ends(),
    Row::new(M::Jecxz, JCC, |_| Some(jrcxz)).ends(),
    Row::new(M::Jrcxz, JCC, |_| Some(jrcxz)).ends(),
    Row::new(M::Loop, LOOP, |_| Some(loop_if::<0>)).ends(),
    Row::new(M::Loope, LOOP, |_| Some(loop_if::<1>)).ends(),
    Row::new(M::Loopne, LOOP, |_| Some(loop_if::<2>)).ends(),
];

/// Whether a JMP or CALL is a far one.
pub fn is_far(code: Code) -> bool {
    code.op_code().instruction_string().contains(':')
}

impl Core {
    /// RIP of a near branch's target.
    #[inline(always)]
    fn branch_target(&self, op: &Op) -> u64 {
        self.gpr[CODE_BASE as usize].wrapping_add(op.imm) & op.disp
    }

    /// Goes to a near branch's target.
    #[inline(always)]
    fn branch(&mut self, op: &Op) -> Flow {
        self.jump(op, self.branch_target(op))
    }

    /// Goes to `target` in the present code segment: #GP(0) outside the limit or for a non-canonical one.
    #[inline(always)]
    pub fn jump(&mut self, op: &Op, target: u64) -> Flow {
        let legal = if op.legacy {
            target <= u64::from(self.s.seg[Seg::Cs as usize].limit)
        } else {
            Gva::new(target).is_canonical(self.s.linear_bits())
        };
        if !legal {
            return self.raise(Fault::GP0);
        }
        self.next_rip = target;
        Ok(())
    }
}

fn jmp(form: &mut Form) -> Option<ExecFn> {
    match form.dst {
        Loc::Near => Some(jmp_near),
        Loc::Reg => by_wide!(form.bytes, W => jmp_reg::<W>),
        Loc::Mem => by_wide!(form.bytes, W => jmp_mem::<W>),
        _ => None,
    }
}

fn jmp_near(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    c.branch(op)
}

fn jmp_reg<W: Word>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let target = c.reg::<W>(op.dst);
    c.jump(op, target)
}

fn jmp_mem<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let target = c.load_operand::<W>(bus, op)?;
    c.jump(op, target)
}

fn call(form: &mut Form) -> Option<ExecFn> {
    let bytes = stack_bytes(form);
    match form.dst {
        Loc::Near => by_wide!(bytes, W => call_near::<W>),
        Loc::Reg => by_wide!(bytes, W => call_reg::<W>),
        Loc::Mem => by_wide!(bytes, W => call_mem::<W>),
        _ => None,
    }
}

#[inline(always)]
fn call_to<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op, target: u64) -> Flow {
    let back = op.next_rip(c.block_rip) & W::MASK;
    let next = c.next_rip;
    c.jump(op, target)?;
    let pushed = c.push::<W>(bus, op, back);
    if pushed.is_err() {
        c.next_rip = next;
    }
    pushed
}

fn call_near<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let target = c.branch_target(op);
    call_to::<W>(c, bus, op, target)
}

fn call_reg<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let target = c.reg::<W>(op.dst);
    call_to::<W>(c, bus, op, target)
}

fn call_mem<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let target = c.load_operand::<W>(bus, op)?;
    call_to::<W>(c, bus, op, target)
}

fn return_bytes(form: &Form) -> u64 {
    match form.i.code() {
        Code::Retnw | Code::Retnw_imm16 => 2,
        Code::Retnd | Code::Retnd_imm16 => 4,
        _ => 8,
    }
}

fn ret<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let Some(off) = c.top_at_once::<W>(op) else { return ret_slow::<W>(c, bus, op) };
    let target = c.mem.load::<W>(off).zext();
    return_to::<W>(c, op, target)
}

#[cold]
#[inline(never)]
fn ret_slow<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let target = c.peek_stack::<W>(bus, op, 0)?;
    return_to::<W>(c, op, target)
}

#[inline(always)]
fn return_to<W: Word>(c: &mut Core, op: &Op, target: u64) -> Flow {
    c.jump(op, target)?;
    c.drop_stack(W::BYTES.wrapping_add(op.imm & 0xffff));
    Ok(())
}

fn jcc<const CC: u8>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    if c.flags.condition::<CC>() { c.branch(op) } else { Ok(()) }
}

fn jrcxz(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    if c.gpr[reg::RCX] & op.ea_mask == 0 { c.branch(op) } else { Ok(()) }
}

/// LOOP, LOOPE (`KIND` 1), LOOPNE (`KIND` 2).
fn loop_if<const KIND: u8>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let count = c.gpr[reg::RCX].wrapping_sub(1) & op.ea_mask;
    let wanted = match KIND {
        0 => true,
        1 => c.flags.zf(),
        _ => !c.flags.zf(),
    };
    if count != 0 && wanted {
        c.branch(op)?;
    }
    c.set_counter(op, count);
    Ok(())
}

impl Core {
    /// Writes RCX, ECX or CX, by the address size of `op`.
    #[inline(always)]
    pub fn set_counter(&mut self, op: &Op, count: u64) {
        match op.ea_mask {
            0xffff => self.set_reg::<u16>(reg::RCX as u8, count),
            0xffff_ffff => self.set_reg::<u32>(reg::RCX as u8, count),
            _ => self.gpr[reg::RCX] = count,
        }
    }
}
