//! The guest's bytes with other operands: what most instructions become. Prefixes, opcode and immediate stay, registers and
//! the memory operand are put in anew; nothing else of the instruction has to be known.

use crate::emitter::{Bits, Emitter, Mem};
use crate::registers::Reg;

/// An instruction's bytes, taken apart; of those that Intel's manual calls "ModRM" in the "Instruction Format", and their
/// short forms without, which become the general one.
#[derive(Clone, Copy)]
pub struct Form<'a> {
    /// Operands of 16 bits.
    half: bool,
    /// Operands of 64 bits.
    wide: bool,
    /// Behind 0F.
    second_map: bool,
    opcode: u8,
    /// ModRM's reg field: a guest register's number, or a part of the opcode.
    reg: u8,
    /// The register that ModRM's r/m field is; `None`: memory.
    rm: Option<u8>,
    /// The register is a part of the opcode instead.
    short: bool,
    /// The reg field is a register.
    has_reg: bool,
    immediate: &'a [u8],
}

/// What a form becomes.
#[derive(Clone, Copy)]
pub struct Rewritten {
    /// Instead of the guest register in ModRM's reg field.
    pub reg: Reg,
    pub rm: Rm,
    /// An operand is the low byte of RSP, RBP, RSI or RDI, which only a REX prefix can say.
    pub low_bytes: bool,
}

/// What ModRM's r/m field becomes.
#[derive(Clone, Copy)]
pub enum Rm {
    Register(Reg),
    Memory(Mem),
}

impl<'a> Form<'a> {
    /// Takes `bytes` apart, an instruction of 64- or 32-bit code. `None`: it isn't one of the ordinary ones.
    pub fn of(bytes: &'a [u8], narrow: bool) -> Option<Self> {
        let (mut at, mut half) = (0, false);
        loop {
            match *bytes.get(at)? {
                0x66 => half = true,
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x67 | 0xf0 => {}
                _ => break,
            }
            at += 1;
        }
        let rex = bytes[at];
        let rex = if !narrow && rex & 0xf0 == 0x40 { rex } else { 0 };
        at += usize::from(rex != 0);
        let second_map = *bytes.get(at)? == 0x0f;
        at += usize::from(second_map);
        let opcode = *bytes.get(at)?;
        let wide = rex & 8 != 0;
        let form = Form {
            half: half && !wide,
            wide,
            second_map,
            opcode,
            reg: 0,
            rm: None,
            short: false,
            has_reg: true,
            immediate: &[],
        };
        let with = |form: Self, immediate: usize| {
            let start = bytes.len().checked_sub(immediate).filter(|&start| start > at)?;
            Some(Self { immediate: &bytes[start..], ..form })
        };
        let full = if wide || !half { 4 } else { 2 };
        let modrm = *bytes.get(at + 1).unwrap_or(&0);
        let with_modrm = |immediate: usize, has_reg: bool| {
            let reg = modrm >> 3 & 7 | if has_reg { (rex & 4) << 1 } else { 0 };
            let rm = (modrm >= 0xc0).then_some(modrm & 7 | (rex & 1) << 3);
            with(Self { reg, rm, has_reg, ..form }, immediate)
        };
        if second_map {
            return match opcode {
                0x40..=0x4f | 0xaf | 0xb6 | 0xb7 | 0xbe | 0xbf => with_modrm(0, true),
                0x90..=0x9f => with_modrm(0, false),
                _ => None,
            };
        }
        let extension = modrm >> 3 & 7;
        // Without ModRM: the accumulator or the opcode's register as r/m, another opcode's `reg`.
        let general = |opcode: u8, reg: u8, rm: u8, immediate: usize| {
            with(Self { opcode, reg, rm: Some(rm), has_reg: false, ..form }, immediate)
        };
        let low = opcode & 7 | (rex & 1) << 3;
        match opcode {
            0x00..=0x3f if opcode & 7 < 4 => with_modrm(0, true),
            0x00..=0x3f if opcode & 7 == 4 => general(0x80, opcode >> 3, 0, 1),
            0x00..=0x3f if opcode & 7 == 5 => general(0x81, opcode >> 3, 0, full),
            0x40..=0x4f if narrow => general(0xff, opcode >> 3 & 1, opcode & 7, 0),
            0x63 if !narrow => with_modrm(0, true),
            0x69 => with_modrm(full, true),
            0x6b => with_modrm(1, true),
            0x80 | 0x83 => with_modrm(1, false),
            0x81 => with_modrm(full, false),
            0x84..=0x8b | 0x8d => with_modrm(0, true),
            0xa0..=0xa3 => Some(Self { opcode: 0x88 | (opcode & 1) | (!opcode & 2), ..form }),
            0xa8 => general(0xf6, 0, 0, 1),
            0xa9 => general(0xf7, 0, 0, full),
            0xb0..=0xb7 => general(0xb0, 0, low, 1).map(Self::short),
            0xb8..=0xbf => general(0xb8, 0, low, if wide { 8 } else { full }).map(Self::short),
            0xc0 | 0xc1 => with_modrm(1, false),
            0xc6 if extension == 0 => with_modrm(1, false),
            0xc7 if extension == 0 => with_modrm(full, false),
            0xd0..=0xd3 => with_modrm(0, false),
            0xf6 if extension == 0 => with_modrm(1, false),
            0xf7 if extension == 0 => with_modrm(full, false),
            0xf6 | 0xf7 if extension == 2 || extension == 3 => with_modrm(0, false),
            0xfe | 0xff if extension < 2 => with_modrm(0, false),
            _ => None,
        }
    }

    fn short(self) -> Self {
        Self { short: true, ..self }
    }

    /// The guest register in ModRM's reg field.
    pub fn reg(&self) -> Option<u8> {
        self.has_reg.then_some(self.reg)
    }

    /// The guest register in ModRM's r/m field, or in the opcode.
    pub fn rm(&self) -> Option<u8> {
        self.rm
    }

    /// The same operation with the guest register of ModRM's r/m field in its reg field, and memory instead of the one that was there.
    pub fn other_direction(&self) -> Option<Self> {
        let turns = matches!(self.opcode, 0x00..=0x3f | 0x88..=0x8b) && !self.second_map && self.opcode & 1 != 0;
        let reg = self.rm.filter(|_| turns && !self.half)?;
        Some(Self { opcode: self.opcode ^ 2, reg, rm: None, ..*self })
    }

    /// The same with memory instead of the register in ModRM's r/m field.
    pub fn with_memory(&self) -> Option<Self> {
        (!self.short).then_some(Self { rm: None, ..*self })
    }
}

impl Emitter {
    /// `form` with operands of the host.
    pub fn rewritten(&mut self, form: &Form<'_>, Rewritten { reg, rm, low_bytes }: Rewritten) {
        let reg = if form.has_reg { reg } else { form.reg };
        let bits = Bits { half: form.half, wide: form.wide, rex: low_bytes };
        let opcode = [0x0f, form.opcode];
        let opcode = &opcode[usize::from(!form.second_map)..];
        match rm {
            Rm::Register(rm) if form.short => self.bits_short(bits, form.opcode, rm),
            Rm::Register(rm) => self.bits_rr(bits, opcode, reg, rm),
            Rm::Memory(mem) => self.bits_rm(bits, opcode, reg, mem),
        }
        self.few_raw(form.immediate);
    }
}

#[cfg(test)]
mod tests {
    use super::{Form, Rewritten, Rm};
    use crate::emitter::{Emitter, Mem};
    use crate::plan::has_memory;
    use crate::registers::{B, Reg};
    use crate::renaming::{Operands, Renamed, by_encoder};
    use iced_x86::{Code, Decoder, DecoderOptions, Encoder, Instruction, OpKind};
    use std::collections::HashSet;
    use umbra_cpu::decode::register_index;
    use umbra_cpu::op::HIGH_BYTE;

    /// Where the operands are: the numbers say what it takes for each to be named, REX or not.
    fn host(guest: u8, turn: u8) -> Reg {
        (guest + turn) & 15
    }

    fn operands(i: &Instruction, turn: u8) -> Option<Operands> {
        let registers = (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register);
        registers
            .map(|operand| {
                let (register, guest) = (i.op_register(operand), register_index(i.op_register(operand)));
                let fits = register.is_gpr() && guest & HIGH_BYTE == 0;
                // A count of shifts is in CL on the host, too.
                let is_count = operand == 1 && i.op_count() == 2 && i.code().op_code().op_kind(1) == COUNT;
                fits.then_some(Renamed { operand, guest, host: if is_count { guest } else { host(guest, turn) } })
            })
            .collect()
    }

    const COUNT: iced_x86::OpCodeOperandKind = iced_x86::OpCodeOperandKind::cl;

    /// What an encoder makes of it, as the text of what a decoder makes of that.
    fn expected(i: &Instruction, operands: &Operands, mem: Option<Mem>) -> Option<String> {
        let mut encoder = Encoder::new(64);
        encoder.encode(&by_encoder(i, operands, mem), 0).ok()?;
        Some(text(&encoder.take_buffer()))
    }

    fn text(bytes: &[u8]) -> String {
        let i = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
        let rest = if i.len() == bytes.len() { "" } else { " and more" };
        format!("{i}{rest} ({:?})", i.code())
    }

    fn rewritten(form: &Form<'_>, i: &Instruction, operands: &Operands, mem: Option<Mem>, turn: u8) -> String {
        let low = |r: &Renamed| (4..8).contains(&r.host) && i.op_register(r.operand).is_gpr8();
        let rm = match mem {
            Some(mem) => Rm::Memory(mem),
            None => Rm::Register(host(form.rm().unwrap(), turn)),
        };
        let reg = form.reg().map_or(0, |guest| host(guest, turn));
        let mut e = Emitter::new(0);
        e.rewritten(form, Rewritten { reg, rm, low_bytes: operands.iter().any(low) });
        text(&e.bytes)
    }

    /// Every opcode of one and two bytes, with prefixes, in 64- and 32-bit code.
    #[test]
    fn it_is_what_an_encoder_makes() {
        let mut codes: HashSet<Code> = HashSet::new();
        let prefixes: [&[u8]; 13] = [
            &[],
            &[0x66],
            &[0x40],
            &[0x41],
            &[0x44],
            &[0x48],
            &[0x4d],
            &[0x4f],
            &[0x67],
            &[0xf0],
            &[0x66, 0x48],
            &[0x65, 0x66, 0x45],
            &[0x66, 0x41],
        ];
        let all = || (0..0x200u32).flat_map(|opcode| (0..=255u8).map(move |modrm| (opcode, modrm)));
        for (bits, prefix) in [64, 32].into_iter().flat_map(|bits| prefixes.iter().map(move |prefix| (bits, prefix))) {
            for (opcode, modrm) in all() {
                let mut bytes = prefix.to_vec();
                bytes.extend((opcode > 0xff).then_some(0x0f));
                bytes.extend([opcode as u8, modrm, 0x21, 0x82, 3, 0x84, 5, 6, 7, 8, 9]);
                let i = Decoder::with_ip(bits, &bytes, 0, DecoderOptions::NONE).decode();
                let Some(form) = bytes.get(..i.len()).and_then(|bytes| Form::of(bytes, bits == 32)) else { continue };
                let turn = modrm % 7;
                let Some(operands) = operands(&i, turn).filter(|_| !i.is_invalid()) else { continue };
                let mem = Mem { base: Some(B), index: Some((3, 2)), disp: 0x1234 };
                let mem = has_memory(&i).then_some(mem);
                let expected = expected(&i, &operands, mem);
                let found = rewritten(&form, &i, &operands, mem, turn);
                assert_eq!(Some(found), expected, "{i} ({bytes:02x?}, {bits})");
                codes.insert(i.code());
            }
        }
        assert!(codes.len() > 250, "only {} forms", codes.len());
    }

    #[test]
    fn an_operand_in_memory() {
        let form = |bytes: &'static [u8]| Form::of(bytes, false).unwrap();
        let mem = Mem { base: Some(3), index: None, disp: 8 };
        let text = |form: Form<'_>, reg| {
            let mut e = Emitter::new(0);
            e.rewritten(&form, Rewritten { reg, rm: Rm::Memory(mem), low_bytes: false });
            text(&e.bytes)
        };
        let add = form(&[0x4c, 0x01, 0xd0]);
        assert_eq!((add.reg(), add.rm()), (Some(10), Some(0)));
        assert_eq!(text(add.other_direction().unwrap(), 1), "add rcx,[rbx+8] (Add_r64_rm64)");
        assert_eq!(text(add.with_memory().unwrap(), 1), "add [rbx+8],rcx (Add_rm64_r64)");
        assert!(form(&[0x4c, 0x85, 0xd0]).other_direction().is_none(), "TEST has one direction");
        assert!(form(&[0x66, 0x44, 0x01, 0xd0]).other_direction().is_none());
        assert!(form(&[0x49, 0xba, 1, 2, 3, 4, 5, 6, 7, 8]).with_memory().is_none());
    }
}
