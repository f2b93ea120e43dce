//! Writes host instructions, the few forms that generated code is made of.

use crate::registers::Reg;
use crate::renaming::Unencodable;
use iced_x86::{Encoder, Instruction};

/// A memory operand.
#[derive(Clone, Copy)]
pub struct Mem {
    pub base: Option<Reg>,
    /// Register and shift count.
    pub index: Option<(Reg, u8)>,
    pub disp: i32,
}

impl Mem {
    /// `[base + disp]`.
    pub fn at(base: Reg, disp: usize) -> Self {
        Self { base: Some(base), index: None, disp: disp as i32 }
    }
}

/// Two-operand operations: the opcode of `op r, r/m`; the extension of their immediate form is its bits 5:3.
#[derive(Clone, Copy)]
#[repr(u8)]
pub enum Alu {
    Add = 0x03,
    Or = 0x0b,
    And = 0x23,
    Sub = 0x2b,
    Xor = 0x33,
    Cmp = 0x3b,
}

/// Conditions by their encoding.
pub mod cc {
    pub const BELOW: u8 = 2;
    pub const NOT_BELOW: u8 = 3;
    pub const EQUAL: u8 = 4;
    pub const NOT_EQUAL: u8 = 5;
    pub const SIGN: u8 = 8;
    pub const ODD: u8 = 11;
    pub const LESS: u8 = 12;
    pub const NOT_GREATER: u8 = 14;
}

/// A jump whose target isn't known yet: where its 32-bit displacement is.
#[derive(Clone, Copy)]
#[must_use]
pub struct Jump(pub usize);

/// Code to be placed at offset `base` of the code memory, what is rarely executed elsewhere.
#[derive(Default)]
pub struct Emitter {
    pub bytes: Vec<u8>,
    base: usize,
    /// Bytes that go to `base`, and the offset that those behind them go to.
    rare: Option<(usize, usize)>,
    has_bmi2: bool,
    encoder: Option<Box<Encoder>>,
}

/// Prefixes of an instruction.
#[derive(Clone, Copy, Default)]
pub struct Bits {
    /// Operands of 16 bits.
    pub half: bool,
    /// Operands of 64 bits.
    pub wide: bool,
    /// A REX prefix even if it says nothing else.
    pub rex: bool,
}

/// At most eight bytes, in a register.
#[derive(Clone, Copy, Default)]
struct Few {
    value: u64,
    len: u32,
}

impl Few {
    /// A REX prefix, if there must be one.
    #[inline]
    fn rex(wide: bool, reg: Reg, index: Reg, base: Reg) -> Self {
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3;
        let needed = rex != 0x40;
        Self { value: if needed { rex.into() } else { 0 }, len: needed.into() }
    }

    /// Likewise with other prefixes.
    fn prefixes(bits: Bits, reg: Reg, index: Reg, base: Reg) -> Self {
        let Self { value, len } = Self::rex(bits.wide, reg, index, base);
        let few = if len == 0 && bits.rex { Self { value: 0x40, len: 1 } } else { Self { value, len } };
        if bits.half { Self { value: few.value << 8 | 0x66, len: few.len + 1 } } else { few }
    }

    #[inline]
    fn byte(self, byte: u8) -> Self {
        Self { value: self.value | u64::from(byte) << (8 * self.len), len: self.len + 1 }
    }

    #[inline]
    fn and(self, bytes: &[u8]) -> Self {
        bytes.iter().fold(self, |few, &byte| few.byte(byte))
    }
}

impl Emitter {
    pub fn new(base: usize) -> Self {
        let has_bmi2 = is_x86_feature_detected!("bmi2");
        Self { bytes: Vec::with_capacity(32), base, rare: None, has_bmi2, encoder: None }
    }

    /// Begins anew for offset `base`.
    pub fn begin(&mut self, base: usize) {
        self.bytes.clear();
        (self.base, self.rare) = (base, None);
        self.has_bmi2 = is_x86_feature_detected!("bmi2");
    }

    /// What follows goes to offset `at`.
    pub fn go_on_at(&mut self, at: usize) {
        self.rare = Some((self.bytes.len(), at));
    }

    /// Offset in the code memory of the next byte.
    pub fn here(&self) -> usize {
        match self.rare {
            Some((split, at)) => at + self.bytes.len() - split,
            None => self.base + self.bytes.len(),
        }
    }

    /// The index in `bytes` of what goes to an offset.
    fn index(&self, offset: usize) -> usize {
        match self.rare {
            Some((split, at)) if offset >= at => offset - at + split,
            _ => offset - self.base,
        }
    }

    /// Appends a few bytes, all at once.
    #[inline]
    fn put(&mut self, Few { value, len }: Few) {
        let end = self.bytes.len() + len as usize;
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self.bytes.truncate(end);
    }

    #[inline]
    fn imm32(&mut self, value: i32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    #[inline]
    fn imm8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    /// `opcode reg, rm` with two registers.
    pub fn rr(&mut self, wide: bool, opcode: &[u8], reg: Reg, rm: Reg) {
        let few = Few::rex(wide, reg, 0, rm).and(opcode);
        self.put(few.byte(0xc0 | (reg & 7) << 3 | rm & 7));
    }

    /// `opcode reg, mem`.
    pub fn rm(&mut self, wide: bool, opcode: &[u8], reg: Reg, mem: Mem) {
        let index = mem.index.map_or(0, |(r, _)| r);
        let few = Few::rex(wide, reg, index, mem.base.unwrap_or(0)).and(opcode);
        self.with_memory(few, reg, mem);
    }

    /// As [`rr`](Self::rr) with prefixes.
    pub fn bits_rr(&mut self, bits: Bits, opcode: &[u8], reg: Reg, rm: Reg) {
        let few = Few::prefixes(bits, reg, 0, rm).and(opcode);
        self.put(few.byte(0xc0 | (reg & 7) << 3 | rm & 7));
    }

    /// As [`rm`](Self::rm) with prefixes.
    pub fn bits_rm(&mut self, bits: Bits, opcode: &[u8], reg: Reg, mem: Mem) {
        let index = mem.index.map_or(0, |(r, _)| r);
        let few = Few::prefixes(bits, reg, index, mem.base.unwrap_or(0)).and(opcode);
        self.with_memory(few, reg, mem);
    }

    /// `opcode`, with prefixes, that has a register in it.
    pub fn bits_short(&mut self, bits: Bits, opcode: u8, reg: Reg) {
        self.put(Few::prefixes(bits, 0, 0, reg).byte(opcode | reg & 7));
    }

    /// Appends an immediate: at most eight bytes.
    pub fn few_raw(&mut self, bytes: &[u8]) {
        self.put(Few::default().and(bytes));
    }

    /// ModRM and what belongs to it of `mem`; prefixes have the registers' upper bits.
    pub fn modrm(&mut self, reg: Reg, mem: Mem) {
        self.with_memory(Few::default(), reg, mem);
    }

    /// Likewise behind at most five bytes.
    fn with_memory(&mut self, few: Few, reg: Reg, mem: Mem) {
        let index = mem.index.map_or(4, |(r, _)| r);
        let reg = (reg & 7) << 3;
        let scale = mem.index.map_or(0, |(_, s)| s) << 6;
        let Some(base) = mem.base else {
            self.put(few.byte(reg | 4).byte(scale | (index & 7) << 3 | 5));
            return self.imm32(mem.disp);
        };
        let mode = match mem.disp {
            0 if base & 7 != 5 => 0,
            -128..=127 => 0x40,
            _ => 0x80,
        };
        let few = if mem.index.is_some() || base & 7 == 4 {
            few.byte(mode | reg | 4).byte(scale | (index & 7) << 3 | base & 7)
        } else {
            few.byte(mode | reg | base & 7)
        };
        match mode {
            0 => self.put(few),
            0x40 => self.put(few.byte(mem.disp as u8)),
            _ => {
                self.put(few);
                self.imm32(mem.disp);
            }
        }
    }

    pub fn mov(&mut self, to: Reg, from: Reg) {
        self.rr(true, &[0x8b], to, from);
    }

    /// `mov` of the low halves, which clears the upper one.
    pub fn mov32(&mut self, to: Reg, from: Reg) {
        self.rr(false, &[0x8b], to, from);
    }

    pub fn load(&mut self, to: Reg, mem: Mem) {
        self.rm(true, &[0x8b], to, mem);
    }

    pub fn load32(&mut self, to: Reg, mem: Mem) {
        self.rm(false, &[0x8b], to, mem);
    }

    pub fn store(&mut self, mem: Mem, from: Reg) {
        self.rm(true, &[0x89], from, mem);
    }

    pub fn store32(&mut self, mem: Mem, from: Reg) {
        self.rm(false, &[0x89], from, mem);
    }

    /// Stores a sign-extended immediate, 64 bits.
    pub fn store_imm(&mut self, mem: Mem, value: i32) {
        self.rm(true, &[0xc7], 0, mem);
        self.imm32(value);
    }

    /// Stores 32 bits.
    pub fn store_imm32(&mut self, mem: Mem, value: u32) {
        self.rm(false, &[0xc7], 0, mem);
        self.imm32(value as i32);
    }

    pub fn lea(&mut self, to: Reg, mem: Mem) {
        self.rm(true, &[0x8d], to, mem);
    }

    /// The address' low half.
    pub fn lea32(&mut self, to: Reg, mem: Mem) {
        self.rm(false, &[0x8d], to, mem);
    }

    pub fn alu(&mut self, op: Alu, wide: bool, to: Reg, from: Reg) {
        self.rr(wide, &[op as u8], to, from);
    }

    /// `opcode`, that of 32 bits, on registers of so many bytes.
    pub fn sized(&mut self, bytes: u32, opcode: u8, reg: Reg, rm: Reg) {
        if bytes == 2 {
            self.imm8(0x66);
        }
        self.rr(bytes == 8, &[if bytes == 1 { opcode & !1 } else { opcode }], reg, rm);
    }

    pub fn alu_mem(&mut self, op: Alu, wide: bool, to: Reg, mem: Mem) {
        self.rm(wide, &[op as u8], to, mem);
    }

    pub fn alu_imm(&mut self, op: Alu, wide: bool, to: Reg, value: i32) {
        let extension = op as u8 >> 3 & 7;
        if let Ok(small) = i8::try_from(value) {
            self.rr(wide, &[0x83], extension, to);
            self.imm8(small as u8);
        } else {
            self.rr(wide, &[0x81], extension, to);
            self.imm32(value);
        }
    }

    /// 64 bits in memory by a sign-extended immediate.
    pub fn alu_mem_imm(&mut self, op: Alu, mem: Mem, value: i32) {
        let extension = op as u8 >> 3 & 7;
        if let Ok(small) = i8::try_from(value) {
            self.rm(true, &[0x83], extension, mem);
            self.imm8(small as u8);
        } else {
            self.rm(true, &[0x81], extension, mem);
            self.imm32(value);
        }
    }

    /// `cmp dword [mem], value`, always with 32 bits; returns the offset of the value.
    pub fn cmp_mem_imm(&mut self, mem: Mem, value: u32) -> usize {
        self.rm(false, &[0x81], 7, mem);
        self.imm32(value as i32);
        self.here() - 4
    }

    pub fn shl(&mut self, wide: bool, r: Reg, count: u8) {
        self.rr(wide, &[0xc1], 4, r);
        self.imm8(count);
    }

    pub fn shr(&mut self, wide: bool, r: Reg, count: u8) {
        self.rr(wide, &[0xc1], 5, r);
        self.imm8(count);
    }

    /// `from`, shifted right, to another register; bits above those that are left hold whatever was below them.
    pub fn shifted(&mut self, to: Reg, from: Reg, count: u8) {
        if self.has_bmi2 {
            self.raw(&[0xc4, !(to & 8) << 4 & 0x80 | !(from & 8) << 2 & 0x20 | 0x43, 0xfb, 0xf0]); // rorx
            self.raw(&[0xc0 | (to & 7) << 3 | from & 7, count]);
        } else {
            self.mov(to, from);
            self.shr(true, to, count);
        }
    }

    pub fn sar(&mut self, wide: bool, r: Reg, count: u8) {
        self.rr(wide, &[0xc1], 7, r);
        self.imm8(count);
    }

    /// The shortest form that loads `value`. Leaves flags alone.
    pub fn mov_imm(&mut self, to: Reg, value: u64) {
        if let Ok(small) = u32::try_from(value) {
            self.mov_imm32(to, small);
        } else if i32::try_from(value as i64).is_ok() {
            self.rr(true, &[0xc7], 0, to);
            self.imm32(value as i32);
        } else {
            self.mov_imm64(to, value);
        }
    }

    /// The form with four bytes of immediate: six bytes for the upper registers.
    pub fn mov_imm32(&mut self, to: Reg, value: u32) {
        self.put(Few::rex(false, 0, 0, to).byte(0xb8 | to & 7));
        self.imm32(value as i32);
    }

    /// The ten-byte form.
    pub fn mov_imm64(&mut self, to: Reg, value: u64) {
        self.put(Few::rex(true, 0, 0, to).byte(0xb8 | to & 7));
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Any instruction whose registers are the host's.
    ///
    /// # Errors
    /// There is no such instruction.
    pub fn instruction(&mut self, instruction: &Instruction) -> Result<(), Unencodable> {
        let encoder = self.encoder.get_or_insert_with(|| Box::new(Encoder::new(64)));
        encoder.set_buffer(std::mem::take(&mut self.bytes));
        let encoded = encoder.encode(instruction, 0);
        self.bytes = encoder.take_buffer();
        encoded.map(drop).map_err(|_| Unencodable)
    }

    #[inline]
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub fn jcc(&mut self, condition: u8) -> Jump {
        self.raw(&[0x0f, 0x80 | condition, 0, 0, 0, 0]);
        Jump(self.here() - 4)
    }

    pub fn jmp(&mut self) -> Jump {
        self.raw(&[0xe9, 0, 0, 0, 0]);
        Jump(self.here() - 4)
    }

    pub fn jmp_to(&mut self, target: usize) {
        let jump = self.jmp();
        self.point(jump, target);
    }

    pub fn call(&mut self, target: usize) {
        let call = self.call_ahead();
        self.point(call, target);
    }

    /// A call whose target isn't known yet.
    pub fn call_ahead(&mut self) -> Jump {
        self.raw(&[0xe8, 0, 0, 0, 0]);
        Jump(self.here() - 4)
    }

    /// `call qword [mem]`.
    pub fn call_mem(&mut self, mem: Mem) {
        self.rm(false, &[0xff], 2, mem);
    }

    /// `jmp qword [mem]`.
    pub fn jmp_mem(&mut self, mem: Mem) {
        self.rm(false, &[0xff], 4, mem);
    }

    pub fn jmp_reg(&mut self, r: Reg) {
        self.rr(false, &[0xff], 4, r);
    }

    /// Lets `jump` go to `target`.
    pub fn point(&mut self, jump: Jump, target: usize) {
        let at = self.index(jump.0);
        self.bytes[at..at + 4].copy_from_slice(&displacement(jump.0, target));
    }

    /// Lets `jump` come here.
    pub fn bind(&mut self, jump: Jump) {
        self.point(jump, self.here());
    }
}

/// The displacement at offset `at` of a jump to offset `target`.
pub fn displacement(at: usize, target: usize) -> [u8; 4] {
    (target as i64 - at as i64 - 4).to_le_bytes()[..4].try_into().unwrap_or_default()
}
