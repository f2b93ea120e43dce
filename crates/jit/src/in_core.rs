//! Guest registers that live in memory, as memory operands of the host's instructions.

use crate::frame::gpr;
use crate::native::writes_first;
use crate::plan::has_memory;
use crate::registers::{A, home};
use crate::renaming::{Operands, Unencodable};
use crate::rewrite::{Form, Rewritten, Rm};
use crate::translate::Translator;
use iced_x86::{Instruction, Mnemonic as M, OpKind};
use umbra_cpu::decode::register_index;
use umbra_cpu::op::Op;

impl Translator<'_> {
    /// Emits `i` with the one register operand that lives in memory where that is, if there is such a form; else
    /// [`renamed`](Self::renamed).
    pub fn in_core_or_renamed(&mut self, i: &Instruction, op: &Op, needs_flags: bool) -> Result<Operands, Unencodable> {
        if self.move_in_core(i) {
            return Ok(Operands::new());
        }
        let form = self.form(op);
        let Some((form, operands)) = form.as_ref().and_then(|form| in_core(form, i)) else {
            return self.renamed_as(form, i, op, needs_flags);
        };
        if needs_flags {
            self.need_flags();
        }
        self.e.rewritten(&form, operands);
        Ok(Operands::new())
    }

    /// Whether it is a MOV to a register in memory from another one there, or of an immediate that a store has room for.
    fn move_in_core(&mut self, i: &Instruction) -> bool {
        let to = i.op0_register();
        if i.mnemonic() != M::Mov || i.op0_kind() != OpKind::Register || !(to.is_gpr32() || to.is_gpr64()) {
            return false;
        }
        let (to, from) = (register_index(to), i.op1_register());
        match i.op1_kind() {
            _ if home(to).is_some() => return false,
            OpKind::Immediate32 | OpKind::Immediate32to64 | OpKind::Immediate64 => {
                let Ok(value) = i32::try_from(i.immediate(1) as i64) else { return false };
                self.e.store_imm(gpr(to), value);
            }
            OpKind::Register if from.is_gpr() && home(register_index(from)).is_none() => {
                let from = gpr(register_index(from));
                if i.op0_register().is_gpr64() {
                    self.e.load(A, from)
                } else {
                    self.e.load32(A, from)
                }
                self.e.store(gpr(to), A);
            }
            _ => return false,
        }
        true
    }
}

/// `form`, which is `i`, with the one register operand that lives in memory there and the others on the host.
fn in_core<'a>(form: &Form<'a>, i: &Instruction) -> Option<(Form<'a>, Rewritten)> {
    if has_memory(i) || matches!(i.mnemonic(), M::Lea | M::Xchg | M::Xadd) {
        return None;
    }
    let (form, reg, absent) = match (form.reg().map(home), form.rm().map(home)) {
        (None, Some(None)) => (form.with_memory()?, 0, form.rm()?),
        (Some(Some(reg)), Some(None)) => (form.with_memory()?, reg, form.rm()?),
        (Some(None), Some(Some(reg))) => (form.other_direction()?, reg, form.reg()?),
        _ => return None,
    };
    // What is narrower clears the upper half, or would be read whole before it is in the host's cache.
    let is_first = i.op0_kind() == OpKind::Register && register_index(i.op0_register()) == absent;
    if is_first && writes_first(i) && !i.op0_register().is_gpr64() {
        return None;
    }
    Some((form, Rewritten { reg, rm: Rm::Memory(gpr(absent)), low_bytes: false }))
}
