//! The guest's own instructions on host registers and with a memory operand of the host: by their [bytes](crate::rewrite) where
//! these are ordinary, else by an encoder.

use crate::emitter::Mem;
use crate::frame::{code_base, gpr};
use crate::memory_path::{Access, Address, Place};
use crate::native::writes_first;
use crate::plan::{has_memory, width};
use crate::registers::{A, B, Reg, home};
use crate::rewrite::{Form, Rewritten, Rm};
use crate::translate::Translator;
use iced_x86::{Code, Instruction, Mnemonic as M, OpKind, Register};
use smallvec::SmallVec;
use umbra_cpu::decode::register_index;
use umbra_cpu::op::{CODE_BASE, HIGH_BYTE, NO_REG, Op};

/// The encoder refused an instruction.
#[derive(Debug)]
pub struct Unencodable;

/// An instruction's register operands.
pub type Operands = SmallVec<[Renamed; 4]>;

/// A register operand and where it is while its instruction executes.
#[derive(Clone, Copy)]
pub struct Renamed {
    pub operand: u32,
    pub guest: u8,
    pub host: Reg,
}

impl<'a> Translator<'a> {
    /// The bytes of `op`, taken apart, if that is of use.
    pub fn form(&self, op: &Op) -> Option<Form<'a>> {
        let bytes = self.bytes.get(usize::from(op.start)..)?.get(..usize::from(op.len))?;
        let high_byte = (op.dst | op.src) & HIGH_BYTE != 0;
        if high_byte || self.block.bits() == 16 { None } else { Form::of(bytes, self.narrow) }
    }

    /// Emits `i` on host registers, its memory operand looked up; where its register operands were.
    pub fn renamed(&mut self, i: &Instruction, op: &Op, needs_flags: bool) -> Result<Operands, Unencodable> {
        self.renamed_as(self.form(op), i, op, needs_flags)
    }

    /// Likewise by its bytes, if they are of use.
    pub fn renamed_as(
        &mut self,
        form: Option<Form<'_>>,
        i: &Instruction,
        op: &Op,
        needs_flags: bool,
    ) -> Result<Operands, Unencodable> {
        // LEA's address is used up when the first scratch register is written.
        let mut free = A;
        let memory = if i.mnemonic() == M::Lea {
            Some(self.plain_address(op))
        } else if has_memory(i) {
            let writes = i.op0_kind() == OpKind::Memory && writes_first(i);
            let access = if writes { Access::Write } else { Access::Read };
            let place = self.lookup(&Address::of(op), i.memory_size().size() as u32, access);
            free = place.free;
            Some(place.mem)
        } else {
            None
        };
        let renamed = self.rename(i, free);
        if needs_flags {
            self.need_flags();
        }
        match form {
            Some(form) => self.on_these(&form, i, &renamed, memory)?,
            None => self.e.instruction(&by_encoder(i, &renamed, memory))?,
        }
        for r in renamed.iter().filter(|r| r.guest & HIGH_BYTE == 0) {
            let written = r.operand == 0 && writes_first(i) || matches!(i.mnemonic(), M::Xchg | M::Xadd);
            if written && home(r.guest).is_none() {
                self.e.store(gpr(r.guest), r.host);
            }
        }
        Ok(renamed)
    }

    /// Emits `i`, the bytes of which are `form`, with these operands.
    fn on_these(
        &mut self,
        form: &Form<'_>,
        i: &Instruction,
        renamed: &Operands,
        memory: Option<Mem>,
    ) -> Result<(), Unencodable> {
        let host = |guest: u8| renamed.iter().find(|r| r.guest == guest).map(|r| r.host);
        let reg = form.reg().map_or(Some(0), host).ok_or(Unencodable)?;
        let rm = match (memory, form.rm()) {
            (Some(memory), _) => Rm::Memory(memory),
            (None, Some(rm)) => Rm::Register(host(rm).ok_or(Unencodable)?),
            (None, None) => return Err(Unencodable),
        };
        let is_low_byte = |r: &Renamed| (4..8).contains(&r.host) && i.op_register(r.operand).is_gpr8();
        self.e.rewritten(form, Rewritten { reg, rm, low_bytes: renamed.iter().any(is_low_byte) });
        Ok(())
    }

    /// Loads register operands that live in memory; where all are.
    fn rename(&mut self, i: &Instruction, first_free: Reg) -> Operands {
        let mut renamed = Operands::new();
        let mut free = first_free;
        for operand in 0..i.op_count() {
            if i.op_kind(operand) != OpKind::Register {
                continue;
            }
            let guest = register_index(i.op_register(operand));
            if guest & HIGH_BYTE != 0 && renamed.iter().all(|r| r.guest != guest) {
                self.take_high_byte(guest, free);
                renamed.push(Renamed { operand, guest, host: free });
                free = B;
            }
            let known = renamed.iter().find(|r| r.guest == guest).map(|r| r.host);
            let host = known.or(home(guest)).unwrap_or_else(|| {
                if operand > 0 || !only_written(i, guest) {
                    self.e.load(free, gpr(guest));
                }
                std::mem::replace(&mut free, B)
            });
            renamed.push(Renamed { operand, guest, host });
        }
        renamed
    }

    /// AH, CH, DH or BH to `to`. Clobbers the host's flags.
    fn take_high_byte(&mut self, guest: u8, to: Reg) {
        if let Some(r) = home(guest & !HIGH_BYTE) {
            self.e.mov(to, r);
            self.e.shr(true, to, 8);
            self.host_flags = false;
        }
    }

    /// AH, CH, DH or BH, if the first operand is one and is written, from where it was renamed to. Clobbers the
    /// host's flags.
    pub fn put_high_byte(&mut self, i: &Instruction, renamed: &[Renamed]) {
        let Some(r) = renamed.iter().find(|r| r.operand == 0 && r.guest & HIGH_BYTE != 0) else { return };
        if let (Some(whole), true) = (home(r.guest & !HIGH_BYTE), writes_first(i)) {
            self.e.rr(true, &[0xc1], 1, whole); // ror
            self.e.raw(&[8]);
            self.e.rr(false, &[0x8a], whole, r.host); // mov
            self.e.rr(true, &[0xc1], 0, whole); // rol
            self.e.raw(&[8]);
            self.host_flags = false;
        }
    }

    /// LEA's address on host registers: its base or index is loaded if it lives in memory.
    fn plain_address(&mut self, op: &Op) -> Mem {
        let mut resident = |n: u8, scratch: Reg| {
            home(n).unwrap_or_else(|| {
                self.e.load(scratch, if n == CODE_BASE { code_base() } else { gpr(n) });
                scratch
            })
        };
        let base = (op.base != NO_REG).then(|| resident(op.base, A));
        let index = (op.index != NO_REG).then(|| (resident(op.index, B), op.scale));
        // The host's address may have any upper half where the guest's has 32 bits.
        Mem { base, index, disp: op.disp as i32 }
    }
}

/// `i` with these operands, for an encoder.
pub fn by_encoder(i: &Instruction, renamed: &Operands, memory: Option<Mem>) -> Instruction {
    let mut host = *i;
    host.set_has_lock_prefix(false);
    host.set_code(general_form(i.code()));
    if let Some(mem) = memory {
        host_operand(&mut host, &Place { mem, free: A });
    }
    for r in renamed {
        host.set_op_register(r.operand, sized(r.host, i.op_register(r.operand).size()));
    }
    host
}

/// Whether the first operand, guest register `guest`, is written without its old value being looked at.
fn only_written(i: &Instruction, guest: u8) -> bool {
    let moves = matches!(i.mnemonic(), M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Lea);
    let is_source =
        (1..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && register_index(i.op_register(n)) == guest);
    width(i) >= 4 && (moves || i.mnemonic() == M::Imul && i.op_count() == 3) && !is_source
}

/// Puts the host's address of the memory operand in.
pub fn host_operand(host: &mut Instruction, place: &Place) {
    let Mem { base, index, disp } = place.mem;
    let register = |r: Option<Reg>| r.map_or(Register::None, |r| sized(r, 8));
    host.set_memory_base(register(base));
    host.set_memory_index(register(index.map(|(r, _)| r)));
    host.set_memory_index_scale(1 << index.map_or(0, |(_, shift)| shift));
    host.set_memory_displacement64(i64::from(disp) as u64);
    host.set_memory_displ_size(match disp {
        0 => 0,
        -128..=127 => 1,
        _ => 8,
    });
    host.set_segment_prefix(Register::None);
}

/// The host register of that number and size in bytes.
pub fn sized(number: Reg, bytes: usize) -> Register {
    use Register as R;
    const BYTE: [Register; 16] = [
        R::AL,
        R::CL,
        R::DL,
        R::BL,
        R::SPL,
        R::BPL,
        R::SIL,
        R::DIL,
        R::R8L,
        R::R9L,
        R::R10L,
        R::R11L,
        R::R12L,
        R::R13L,
        R::R14L,
        R::R15L,
    ];
    let n = number as usize & 15;
    let from = |first: Register| Register::try_from(first as usize + n).unwrap_or(Register::None);
    match bytes {
        1 => BYTE[n],
        2 => from(R::AX),
        4 => from(R::EAX),
        _ => from(R::RAX),
    }
}

/// The form of an instruction that takes any register instead of the accumulator, and any address.
fn general_form(code: Code) -> Code {
    macro_rules! accumulator {
        ($($from:ident => $to:ident,)*) => {
            match code {
                $(Code::$from => Code::$to,)*
                other => other,
            }
        };
    }
    accumulator! {
        Add_AL_imm8 => Add_rm8_imm8, Add_AX_imm16 => Add_rm16_imm16, Add_EAX_imm32 => Add_rm32_imm32,
        Add_RAX_imm32 => Add_rm64_imm32,
        Or_AL_imm8 => Or_rm8_imm8, Or_AX_imm16 => Or_rm16_imm16, Or_EAX_imm32 => Or_rm32_imm32,
        Or_RAX_imm32 => Or_rm64_imm32,
        Adc_AL_imm8 => Adc_rm8_imm8, Adc_AX_imm16 => Adc_rm16_imm16, Adc_EAX_imm32 => Adc_rm32_imm32,
        Adc_RAX_imm32 => Adc_rm64_imm32,
        Sbb_AL_imm8 => Sbb_rm8_imm8, Sbb_AX_imm16 => Sbb_rm16_imm16, Sbb_EAX_imm32 => Sbb_rm32_imm32,
        Sbb_RAX_imm32 => Sbb_rm64_imm32,
        And_AL_imm8 => And_rm8_imm8, And_AX_imm16 => And_rm16_imm16, And_EAX_imm32 => And_rm32_imm32,
        And_RAX_imm32 => And_rm64_imm32,
        Sub_AL_imm8 => Sub_rm8_imm8, Sub_AX_imm16 => Sub_rm16_imm16, Sub_EAX_imm32 => Sub_rm32_imm32,
        Sub_RAX_imm32 => Sub_rm64_imm32,
        Xor_AL_imm8 => Xor_rm8_imm8, Xor_AX_imm16 => Xor_rm16_imm16, Xor_EAX_imm32 => Xor_rm32_imm32,
        Xor_RAX_imm32 => Xor_rm64_imm32,
        Cmp_AL_imm8 => Cmp_rm8_imm8, Cmp_AX_imm16 => Cmp_rm16_imm16, Cmp_EAX_imm32 => Cmp_rm32_imm32,
        Cmp_RAX_imm32 => Cmp_rm64_imm32,
        Test_AL_imm8 => Test_rm8_imm8, Test_AX_imm16 => Test_rm16_imm16, Test_EAX_imm32 => Test_rm32_imm32,
        Test_RAX_imm32 => Test_rm64_imm32,
        Mov_AL_moffs8 => Mov_r8_rm8, Mov_AX_moffs16 => Mov_r16_rm16, Mov_EAX_moffs32 => Mov_r32_rm32,
        Mov_RAX_moffs64 => Mov_r64_rm64,
        Mov_moffs8_AL => Mov_rm8_r8, Mov_moffs16_AX => Mov_rm16_r16, Mov_moffs32_EAX => Mov_rm32_r32,
        Mov_moffs64_RAX => Mov_rm64_r64,
        Add_rm8_imm8_82 => Add_rm8_imm8, Or_rm8_imm8_82 => Or_rm8_imm8, Adc_rm8_imm8_82 => Adc_rm8_imm8,
        Sbb_rm8_imm8_82 => Sbb_rm8_imm8, And_rm8_imm8_82 => And_rm8_imm8, Sub_rm8_imm8_82 => Sub_rm8_imm8,
        Xor_rm8_imm8_82 => Xor_rm8_imm8, Cmp_rm8_imm8_82 => Cmp_rm8_imm8,
        Inc_r16 => Inc_rm16, Inc_r32 => Inc_rm32, Dec_r16 => Dec_rm16, Dec_r32 => Dec_rm32,
        Xchg_r16_AX => Xchg_rm16_r16, Xchg_r32_EAX => Xchg_rm32_r32, Xchg_r64_RAX => Xchg_rm64_r64,
    }
}
