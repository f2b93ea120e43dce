//! Data operations as host code: the guest's own instruction with registers renamed and its memory operand
//! replaced, or a short sequence where registers are implied or flags need care.

use crate::emitter::{Alu, Mem, cc};
use crate::frame::{code_base, frame_field, gpr};
use crate::memory_path::{Access, Address, Place};
use crate::plan::{Kind, Step, has_memory, reads_flags, width};
use crate::registers::{A, B, FLAGS, GUEST_RAX, RDX, Reg, guest, home};
use crate::translate::Translator;
use iced_x86::{Code, Instruction, Mnemonic as M, OpKind, Register};
use smallvec::SmallVec;
use umbra_cpu::decode::register_index;
use umbra_cpu::op::{HIGH_BYTE, Op};

/// The encoder refused an instruction.
#[derive(Debug)]
pub struct Unencodable;

/// An instruction's register operands.
pub type Operands = SmallVec<[Renamed; 4]>;

/// A register operand and where it is while its instruction executes.
#[derive(Clone, Copy)]
pub struct Renamed {
    operand: u32,
    guest: u8,
    pub host: Reg,
}

impl Translator<'_> {
    /// An operation that isn't a branch. Its slow path is open.
    pub fn data(&mut self, i: &Instruction, op: &Op, step: Step) -> Result<(), Unencodable> {
        match step.kind {
            Kind::Move => {
                let renamed = self.in_core_or_renamed(i, op, reads_flags(i))?;
                self.put_high_byte(i, &renamed);
                Ok(())
            }
            Kind::Exchange => self.renamed(i, op, false).map(drop),
            Kind::Arithmetic => self.arithmetic(i, op, step),
            Kind::Silent => self.silent(i, op).map(drop),
            Kind::Shift(kind) => {
                if step.keeps {
                    self.keep(op.dst);
                }
                self.shift(i, op, kind, step.live)
            }
            Kind::Turn(turn) => self.turn(i, op, turn),
            Kind::Imul => self.imul(i, op, step),
            Kind::Bits(bits) => self.bits(i, op, bits, step.live),
            Kind::BitTest => self.bit_test(i, op, step.live),
            Kind::BitString => {
                self.bit_string(i, op, step.live);
                Ok(())
            }
            Kind::CompareExchange => {
                self.compare_exchange(i, op, step.live);
                Ok(())
            }
            Kind::CompareExchange16 => {
                self.compare_exchange_16(op, step.live);
                Ok(())
            }
            Kind::Multiply => self.multiply(i, op, step.live),
            Kind::Divide { signed } => self.divide(i, op, signed),
            Kind::Extend => {
                self.extend(i);
                Ok(())
            }
            Kind::Push => {
                self.push(i, op);
                Ok(())
            }
            Kind::Pop => {
                self.pop(op);
                Ok(())
            }
            Kind::Leave => {
                self.leave();
                Ok(())
            }
            Kind::Repeated(which) => {
                self.repeated(which);
                Ok(())
            }
            Kind::System(system) => {
                self.system(i, op, system);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Emits `i` on host registers, its memory operand looked up; where its register operands were.
    pub fn renamed(&mut self, i: &Instruction, op: &Op, needs_flags: bool) -> Result<Operands, Unencodable> {
        let mut host = *i;
        host.set_has_lock_prefix(false);
        host.set_code(general_form(i.code()));
        // LEA's address is used up when the first scratch register is written.
        let mut free = A;
        if i.mnemonic() == M::Lea {
            self.plain_address(&mut host, op);
        } else if has_memory(i) {
            let writes = i.op0_kind() == OpKind::Memory && writes_first(i);
            let access = if writes { Access::Write } else { Access::Read };
            let place = self.lookup(&Address::of(op), i.memory_size().size() as u32, access);
            host_operand(&mut host, &place);
            free = place.free;
        }
        let renamed = self.rename(i, &mut host, free);
        if needs_flags {
            self.need_flags();
        }
        self.e.instruction(&host)?;
        for r in renamed.iter().filter(|r| r.guest & HIGH_BYTE == 0) {
            let written = r.operand == 0 && writes_first(i) || matches!(i.mnemonic(), M::Xchg | M::Xadd);
            if written && home(r.guest).is_none() {
                self.e.store(gpr(r.guest), r.host);
            }
        }
        Ok(renamed)
    }

    /// The guest's flags are in the host's from here on.
    pub fn need_flags(&mut self) {
        if !self.host_flags {
            self.e.restore_flags();
            self.host_flags = true;
        }
    }

    /// As [`renamed`](Self::renamed) for one after which the host's flags say nothing.
    pub fn silent(&mut self, i: &Instruction, op: &Op) -> Result<Operands, Unencodable> {
        let renamed = self.renamed(i, op, false);
        self.host_flags = false;
        renamed
    }

    /// Loads register operands that live in memory, and puts host registers into `host`.
    fn rename(&mut self, i: &Instruction, host: &mut Instruction, first_free: Reg) -> Operands {
        let mut renamed = Operands::new();
        let mut free = first_free;
        for operand in 0..i.op_count() {
            if i.op_kind(operand) != OpKind::Register {
                continue;
            }
            let register = i.op_register(operand);
            let guest = register_index(register);
            if guest & HIGH_BYTE != 0 && renamed.iter().all(|r| r.guest != guest) {
                self.take_high_byte(guest, free);
                renamed.push(Renamed { operand, guest, host: free });
                free = B;
            }
            let known = renamed.iter().find(|r| r.guest == guest).map(|r| r.host);
            let place = known.or(home(guest)).unwrap_or_else(|| {
                if operand > 0 || !only_written(i, guest) {
                    self.e.load(free, gpr(guest));
                }
                std::mem::replace(&mut free, B)
            });
            renamed.push(Renamed { operand, guest, host: place });
            host.set_op_register(operand, sized(place, register.size()));
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
    fn put_high_byte(&mut self, i: &Instruction, renamed: &[Renamed]) {
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
    fn plain_address(&mut self, host: &mut Instruction, op: &Op) {
        let narrow = self.narrow;
        let wide = |r: Register| if narrow { 8 } else { r.size() };
        if narrow {
            // The host's address may have any upper half.
            host.set_memory_displacement64(i64::from(op.disp as i32) as u64);
            host.set_memory_displ_size(if host.memory_displ_size() > 1 { 8 } else { host.memory_displ_size() });
        }
        let (base, index) = (host.memory_base(), host.memory_index());
        if host.is_ip_rel_memory_operand() {
            self.e.load(A, code_base());
            host.set_memory_base(Register::R12);
            host.set_memory_displacement64(op.disp);
            host.set_memory_displ_size(8);
            return;
        }
        for (register, scratch) in [(base, A), (index, B)] {
            if register == Register::None {
                continue;
            }
            let n = register_index(register);
            let place = home(n).unwrap_or_else(|| {
                self.e.load(scratch, gpr(n));
                scratch
            });
            let place = sized(place, wide(register));
            if scratch == A { host.set_memory_base(place) } else { host.set_memory_index(place) }
        }
        host.set_segment_prefix(Register::None);
    }

    fn arithmetic(&mut self, i: &Instruction, op: &Op, step: Step) -> Result<(), Unencodable> {
        // INC and DEC need CF only to keep it.
        let needs = reads_flags(i) && (step.live || !matches!(i.mnemonic(), M::Inc | M::Dec));
        let renamed = self.in_core_or_renamed(i, op, needs)?;
        self.host_flags = step.live;
        if step.live && !step.unsaved {
            self.e.save_flags();
        }
        self.put_high_byte(i, &renamed);
        Ok(())
    }

    fn imul(&mut self, i: &Instruction, op: &Op, step: Step) -> Result<(), Unencodable> {
        let renamed = self.silent(i, op)?;
        if let (true, Some(result)) = (step.live, renamed.first()) {
            self.e.set_al(0);
            self.product_flags(result.host, width(i));
        }
        if step.keeps {
            self.e.rm(false, &[0x0f, 0x90], 0, frame_field!(kept)); // seto
        }
        Ok(())
    }

    /// CF and OF are in AL, the others follow from the low half.
    pub fn product_flags(&mut self, low: Reg, width: u32) {
        if width == 2 {
            self.e.raw(&[0x66]);
        }
        self.e.rr(width == 8, &[0x85], low, low); // test
        self.e.raw(&[0x9f, 0x08, 0xc4]); // lahf; or ah, al
    }

    /// The explicit operand of a one-operand instruction to a host register.
    fn operand(&mut self, i: &Instruction, op: &Op) -> Reg {
        if has_memory(i) {
            let width = width(i);
            let place = self.lookup(&Address::of(op), width, Access::Read);
            self.e.rm(width == 8, &[0x8b], A, place.mem);
            return A;
        }
        home(op.dst).unwrap_or_else(|| {
            self.e.load(A, gpr(op.dst));
            A
        })
    }

    fn multiply(&mut self, i: &Instruction, op: &Op, live: bool) -> Result<(), Unencodable> {
        let wide = width(i) == 8;
        let by = self.operand(i, op);
        self.host_flags = false;
        self.e.rr(wide, &[0x8b], FLAGS, GUEST_RAX);
        self.e.rr(wide, &[0xf7], if i.mnemonic() == M::Mul { 4 } else { 5 }, by);
        self.e.rr(wide, &[0x8b], GUEST_RAX, FLAGS);
        if live {
            self.e.set_al(0);
            self.product_flags(GUEST_RAX, width(i));
        }
        Ok(())
    }

    /// On the host only where it can't fault: a dividend whose upper half is less than the divisor, or if signed,
    /// one that fits into its lower half, by a positive divisor.
    fn divide(&mut self, i: &Instruction, op: &Op, signed: bool) -> Result<(), Unencodable> {
        let wide = width(i) == 8;
        let by = self.operand(i, op);
        self.host_flags = false;
        if signed {
            self.e.rr(wide, &[0x8b], B, GUEST_RAX);
            self.e.sar(wide, B, if wide { 63 } else { 31 });
            self.e.alu(Alu::Cmp, wide, B, RDX);
            let long = self.e.jcc(cc::NOT_EQUAL);
            self.slow(long);
            self.e.alu_imm(Alu::Cmp, wide, by, 0);
            let not_positive = self.e.jcc(cc::NOT_GREATER);
            self.slow(not_positive);
        } else {
            self.e.alu(Alu::Cmp, wide, RDX, by);
            let overflows = self.e.jcc(cc::NOT_BELOW);
            self.slow(overflows);
        }
        self.e.mov(B, FLAGS);
        self.e.rr(wide, &[0x8b], FLAGS, GUEST_RAX);
        self.e.rr(wide, &[0xf7], if signed { 7 } else { 6 }, by);
        self.e.rr(wide, &[0x8b], GUEST_RAX, FLAGS);
        self.e.mov(FLAGS, B);
        Ok(())
    }

    fn extend(&mut self, i: &Instruction) {
        match i.mnemonic() {
            M::Cdqe => self.e.rr(true, &[0x63], GUEST_RAX, GUEST_RAX),
            M::Cwde => self.e.rr(false, &[0x0f, 0xbf], GUEST_RAX, GUEST_RAX),
            other => {
                let wide = other == M::Cqo;
                self.e.rr(wide, &[0x8b], RDX, GUEST_RAX);
                self.e.sar(wide, RDX, if wide { 63 } else { 31 });
                self.host_flags = false;
            }
        }
    }

    fn push(&mut self, i: &Instruction, op: &Op) {
        if has_memory(i) {
            // The stack's place needs both scratch registers.
            let place = self.lookup(&Address::of(op), self.slot(), Access::Read);
            self.load_slot(A, place.mem);
            self.e.store(frame_field!(scratch), A);
        }
        let down = -(self.slot() as i32);
        let top = self.lookup(&Address::above(guest::RSP, down), self.slot(), Access::Write);
        if i.op0_kind() == OpKind::Register {
            let value = home(op.dst).unwrap_or_else(|| {
                self.e.load(top.free, gpr(op.dst));
                top.free
            });
            self.store_slot(top.mem, value);
        } else if has_memory(i) {
            self.e.load(top.free, frame_field!(scratch));
            self.store_slot(top.mem, top.free);
        } else if self.narrow {
            self.e.store_imm32(top.mem, op.imm as u32);
        } else {
            self.e.store_imm(top.mem, op.imm as i32);
        }
        self.move_stack(down);
    }

    fn pop(&mut self, op: &Op) {
        let top = self.lookup(&Address::above(guest::RSP, 0), self.slot(), Access::Read);
        // What POP RSP has loaded stays.
        let to = home(op.dst).filter(|_| op.dst != guest::RSP);
        self.load_slot(to.unwrap_or(A), top.mem);
        self.move_stack(self.slot() as i32);
        match home(op.dst) {
            _ if to.is_some() => {}
            Some(r) => self.e.mov(r, A),
            None => self.e.store(gpr(op.dst), A),
        }
    }

    fn leave(&mut self) {
        let saved = self.lookup(&Address::above(guest::RBP, 0), self.slot(), Access::Read);
        self.load_slot(A, saved.mem);
        // Guest RBP lives in the register of that name.
        self.set_stack_from(guest::RBP, self.slot() as i32);
        self.e.mov(guest::RBP, A);
    }
}

/// Whether the first operand is written.
pub fn writes_first(i: &Instruction) -> bool {
    !matches!(i.mnemonic(), M::Cmp | M::Test | M::Bt)
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
