//! Guest registers that live in memory, as memory operands of the host's instructions.

use crate::frame::gpr;
use crate::memory_path::Place;
use crate::native::{Operands, Unencodable, host_operand, sized, writes_first};
use crate::plan::has_memory;
use crate::registers::{A, home};
use crate::translate::Translator;
use iced_x86::{Code, Instruction, Mnemonic as M, OpCodeOperandKind, OpKind, Register};
use umbra_cpu::decode::register_index;
use umbra_cpu::op::{HIGH_BYTE, Op};

impl Translator<'_> {
    /// Emits `i` with the one register operand that lives in memory where that is, if there is such a form; else
    /// [`renamed`](Self::renamed).
    pub fn in_core_or_renamed(&mut self, i: &Instruction, op: &Op, needs_flags: bool) -> Result<Operands, Unencodable> {
        if self.move_in_core(i) {
            return Ok(Operands::new());
        }
        let Some(host) = in_core(i) else { return self.renamed(i, op, needs_flags) };
        if needs_flags {
            self.need_flags();
        }
        self.e.instruction(&host)?;
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

/// `i` with the others of its register operands renamed.
fn in_core(i: &Instruction) -> Option<Instruction> {
    if has_memory(i) || matches!(i.mnemonic(), M::Lea | M::Xchg | M::Xadd) {
        return None;
    }
    let mut host = *i;
    host.set_has_lock_prefix(false);
    let mut absent = None;
    for n in (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register) {
        let (register, guest) = (i.op_register(n), register_index(i.op_register(n)));
        match home(guest) {
            _ if guest & HIGH_BYTE != 0 => return None,
            Some(r) => host.set_op_register(n, sized(r, register.size())),
            None if absent.is_some() => return None,
            None => absent = Some((n, register, guest)),
        }
    }
    let (n, register, guest) = absent?;
    // What is narrower clears the upper half, or would be read whole before it is in the host's cache.
    if n == 0 && writes_first(i) && register.size() != 8 {
        return None;
    }
    host.set_code(with_memory(i.code(), n)?);
    host.set_op_kind(n, OpKind::Memory);
    host_operand(&mut host, &Place { mem: gpr(guest), free: A });
    debug_assert!(host.memory_base() == Register::R15);
    Some(host)
}

/// The form of an instruction whose operand `n` may be memory.
fn with_memory(code: Code, n: u32) -> Option<Code> {
    use OpCodeOperandKind as K;
    let may_be = |code: Code| {
        let kind = code.op_code().op_kind(n);
        matches!(kind, K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem)
    };
    [code, other_direction(code)].into_iter().find(|&code| may_be(code))
}

/// The same operation with the other operand in ModRM's r/m field.
fn other_direction(code: Code) -> Code {
    macro_rules! pairs {
        ($($one:ident $other:ident,)*) => {
            match code {
                $(Code::$one => Code::$other, Code::$other => Code::$one,)*
                same => same,
            }
        };
    }
    pairs! {
        Add_rm64_r64 Add_r64_rm64, Add_rm32_r32 Add_r32_rm32,
        Or_rm64_r64 Or_r64_rm64, Or_rm32_r32 Or_r32_rm32,
        Adc_rm64_r64 Adc_r64_rm64, Adc_rm32_r32 Adc_r32_rm32,
        Sbb_rm64_r64 Sbb_r64_rm64, Sbb_rm32_r32 Sbb_r32_rm32,
        And_rm64_r64 And_r64_rm64, And_rm32_r32 And_r32_rm32,
        Sub_rm64_r64 Sub_r64_rm64, Sub_rm32_r32 Sub_r32_rm32,
        Xor_rm64_r64 Xor_r64_rm64, Xor_rm32_r32 Xor_r32_rm32,
        Cmp_rm64_r64 Cmp_r64_rm64, Cmp_rm32_r32 Cmp_r32_rm32,
        Mov_rm64_r64 Mov_r64_rm64, Mov_rm32_r32 Mov_r32_rm32,
    }
}
