//! Integer instructions: for comparing an interpreter with the host CPU, not for running guests.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// Instructions that only compute on general registers, status flags and one memory operand.
pub(crate) fn is_data(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Add | Adc
            | Sub
            | Sbb
            | And
            | Or
            | Xor
            | Cmp
            | Test
            | Inc
            | Dec
            | Neg
            | Not
            | Mul
            | Imul
            | Div
            | Idiv
            | Shl
            | Sal
            | Shr
            | Sar
            | Rol
            | Ror
            | Rcl
            | Rcr
            | Shld
            | Shrd
            | Bt
            | Bts
            | Btr
            | Btc
            | Bsf
            | Bsr
            | Bswap
            | Mov
            | Movzx
            | Movsx
            | Movsxd
            | Xchg
            | Xadd
            | Cmpxchg
            | Cmpxchg8b
            | Cmpxchg16b
            | Cbw
            | Cwde
            | Cdqe
            | Cwd
            | Cdq
            | Cqo
            | Clc
            | Stc
            | Cmc
            | Lahf
            | Sahf
            | Seto
            | Setno
            | Setb
            | Setae
            | Sete
            | Setne
            | Setbe
            | Seta
            | Sets
            | Setns
            | Setp
            | Setnp
            | Setl
            | Setge
            | Setle
            | Setg
            | Cmovo
            | Cmovno
            | Cmovb
            | Cmovae
            | Cmove
            | Cmovne
            | Cmovbe
            | Cmova
            | Cmovs
            | Cmovns
            | Cmovp
            | Cmovnp
            | Cmovl
            | Cmovge
            | Cmovle
            | Cmovg
            | Crc32
            | Popcnt
            | Lzcnt
            | Tzcnt
            | Andn
            | Bextr
            | Blsi
            | Blsr
            | Blsmsk
            | Bzhi
            | Mulx
            | Pdep
            | Pext
            | Rorx
            | Sarx
            | Shlx
            | Shrx
            | Adcx
            | Adox
            | Movbe
    )
}

/// What DIV or IDIV divides by, for the check that precedes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Division {
    signed: bool,
    /// Operand size in bits: 8, 16, 32 or 64.
    bits: u32,
    divisor: Divisor,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Divisor {
    Memory,
    Register(usize),
    /// AH, CH, DH, BH.
    High(usize),
}

impl Division {
    pub(crate) fn of(core: &Instruction) -> Option<Self> {
        let signed = match core.mnemonic() {
            Mnemonic::Div => false,
            Mnemonic::Idiv => true,
            _ => return None,
        };
        if core.op_kind(0) == OpKind::Memory {
            let bits = core.memory_size().size() as u32 * 8;
            return Some(Self { signed, bits, divisor: Divisor::Memory });
        }
        let register = core.op_register(0);
        let divisor = match register {
            Register::AH => Divisor::High(0),
            Register::CH => Divisor::High(1),
            Register::DH => Divisor::High(2),
            Register::BH => Divisor::High(3),
            _ => Divisor::Register(register.full_register().number()),
        };
        Some(Self { signed, bits: register.size() as u32 * 8, divisor })
    }

    /// Whether it would raise #DE.
    pub(crate) fn faults(self, gpr: &[u64; 16], mem: &[u8; 64]) -> bool {
        let mask = u64::MAX >> (64 - self.bits);
        let divisor = match self.divisor {
            Divisor::Memory => u64::from_le_bytes(mem[..8].try_into().unwrap_or_default()),
            Divisor::Register(r) => gpr[r & 15],
            Divisor::High(r) => gpr[r & 15] >> 8,
        } & mask;
        let (rax, rdx) = (gpr[0], gpr[2]);
        let dividend = match self.bits {
            8 => u128::from(rax & 0xffff),
            bits => u128::from(rdx & mask) << bits | u128::from(rax & mask),
        };
        if divisor == 0 {
            return true;
        }
        if !self.signed {
            return dividend / u128::from(divisor) > u128::from(mask);
        }
        let wide = 128 - 2 * self.bits;
        let dividend = (dividend << wide) as i128 >> wide;
        let divisor = i128::from((divisor << (64 - self.bits)) as i64 >> (64 - self.bits));
        let limit = i128::from(mask >> 1);
        dividend.checked_div(divisor).is_none_or(|q| q > limit || q < -limit - 1)
    }
}
