//! Builds instructions and machine states for the tests.
#![allow(dead_code, reason = "each test file uses a part of it")]

use iced_x86::code_asm::CodeAssembler;
use iced_x86::{Code, Decoder, DecoderOptions, Encoder, Instruction, OpCodeOperandKind as Kind, OpKind, Register};
use umbra_arch::fpu::FpState;
use umbra_hostexec::{HostExec, MemBuf, Outcome, Prepared};

/// One instruction from iced's assembler.
pub fn assembled(f: impl FnOnce(&mut CodeAssembler)) -> Instruction {
    let mut a = CodeAssembler::new(64).unwrap();
    f(&mut a);
    a.instructions()[0]
}

/// One instruction from bytes.
pub fn decoded(bits: u32, bytes: &[u8]) -> Instruction {
    Decoder::with_ip(bits, bytes, 0x1000, DecoderOptions::NONE).decode()
}

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    pub fn fill<const N: usize>(&mut self) -> [u64; N] {
        std::array::from_fn(|_| self.next())
    }
    pub fn lanes<const N: usize>(&mut self) -> [[u64; 2]; N] {
        std::array::from_fn(|_| self.fill())
    }
    pub fn mem(&mut self) -> MemBuf {
        let mut mem = MemBuf::default();
        mem.0.fill_with(|| self.next() as u8);
        mem
    }
}

/// A machine with random contents, floating-point exceptions masked.
#[derive(Clone, PartialEq, Debug)]
pub struct Machine {
    pub fp: FpState,
    pub gpr: [u64; 16],
    pub rflags: u64,
    pub mem: MemBuf,
}

impl Machine {
    pub fn random(r: &mut Random) -> Self {
        let mut fp = FpState {
            fcw: 0x037f,
            fsw: (r.next() as u16 & 0x7f00),
            ftw: r.next() as u8,
            fop: r.next() as u16 & 0x7ff,
            fip: r.next(),
            fdp: r.next(),
            xmm: r.lanes(),
            ymm_high: r.lanes(),
            tail: r.fill(),
            ..FpState::default()
        };
        for st in &mut fp.st {
            *st = [r.next() | 1 << 63, r.next() % 0x7ffe + 1];
        }
        let rflags = 0x202 | r.next() & 0x8d5 | 1 << 21 | 3 << 12;
        Self { fp, gpr: r.fill(), rflags, mem: r.mem() }
    }

    pub fn run(&mut self, host: &mut HostExec, prepared: &Prepared) -> Outcome {
        host.run(prepared.op, &mut self.fp, &mut self.gpr, &mut self.rflags, &mut self.mem)
    }

    /// Prepares and runs; must end well.
    pub fn exec(&mut self, host: &mut HostExec, instruction: &Instruction) {
        let prepared = host.prepare(instruction).unwrap();
        assert_eq!(self.run(host, &prepared), Outcome::Done);
    }

    pub fn ymm(&self, i: usize) -> [u64; 4] {
        let (low, high) = (self.fp.xmm[i], self.fp.ymm_high[i]);
        [low[0], low[1], high[0], high[1]]
    }
}

/// `code` with register operands of the given numbers, in order, `imm`, and memory where `memory` and
/// possible. `None` if the operands aren't plain ones.
pub fn instance(code: Code, regs: [u32; 4], imm: u8, memory: bool) -> Option<Instruction> {
    let info = code.op_code();
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    let mut seen_memory = false;
    let mut next = regs.into_iter();
    for k in 0..info.op_count() {
        let kind = info.op_kind(k);
        let or_memory = matches!(
            kind,
            Kind::r8_or_mem
                | Kind::r16_or_mem
                | Kind::r32_or_mem
                | Kind::r64_or_mem
                | Kind::mm_or_mem
                | Kind::xmm_or_mem
                | Kind::ymm_or_mem
        );
        if kind == Kind::mem || or_memory && memory {
            instruction.set_op_kind(k, OpKind::Memory);
            instruction.set_memory_base(Register::RBX);
            instruction.set_memory_displacement64(0x40);
            instruction.set_memory_displ_size(1);
            seen_memory = true;
            continue;
        }
        let first = match kind {
            Kind::imm8 | Kind::imm4_m2z => {
                instruction.set_op_kind(k, OpKind::Immediate8);
                instruction.set_immediate8(imm);
                continue;
            }
            Kind::r32_or_mem | Kind::r32_reg | Kind::r32_rm | Kind::r32_vvvv => Register::EAX,
            Kind::r64_or_mem | Kind::r64_reg | Kind::r64_rm | Kind::r64_vvvv => Register::RAX,
            Kind::mm_or_mem | Kind::mm_reg | Kind::mm_rm => Register::MM0,
            Kind::xmm_or_mem | Kind::xmm_reg | Kind::xmm_rm | Kind::xmm_vvvv | Kind::xmm_is4 => Register::XMM0,
            Kind::ymm_or_mem | Kind::ymm_reg | Kind::ymm_rm | Kind::ymm_vvvv | Kind::ymm_is4 => Register::YMM0,
            Kind::st0 => Register::ST0,
            Kind::sti_opcode => Register::ST0,
            _ => return None,
        };
        let number = next.next()?;
        let number = match kind {
            Kind::st0 => 0,
            _ if first == Register::MM0 || first == Register::ST0 => number % 8,
            _ => number,
        };
        instruction.set_op_kind(k, OpKind::Register);
        instruction.set_op_register(k, first + number);
    }
    if memory != seen_memory {
        return None;
    }
    let mut encoder = Encoder::new(64);
    encoder.encode(&instruction, 0x1000).ok()?;
    let round_trip = decoded(64, &encoder.take_buffer());
    (round_trip.code() == code).then_some(round_trip)
}
