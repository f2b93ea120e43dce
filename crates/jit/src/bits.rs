//! Bit scans, counts and fields as host code. Flags that manuals leave undefined are the interpreter's: a scan or
//! count keeps them, the others have them as after a logic operation on the result.

use crate::emitter::{Alu, cc};
use crate::frame::gpr;
use crate::memory_path::{Access, Address};
use crate::plan::{has_memory, width};
use crate::registers::{A, B, FLAGS, Reg, home};
use crate::renaming::{Unencodable, host_operand, sized};
use crate::translate::Translator;
use iced_x86::{Instruction, Mnemonic as M, OpKind};
use umbra_arch::rflags;
use umbra_cpu::decode::register_index;
use umbra_cpu::op::Op;

/// How an instruction's flags are made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bits {
    /// There are none.
    NoFlags,
    /// CF and ZF alone are the host's.
    Count,
    /// ZF alone is the host's; a source of 0 leaves the destination alone.
    Scan,
    /// Those of a logic operation on the result.
    Logic,
    /// Likewise, but CF is the host's.
    Field,
}

impl Bits {
    /// What `i` is, if the host has it.
    pub fn of(i: &Instruction) -> Option<Self> {
        let bmi1 = is_x86_feature_detected!("bmi1");
        let bmi2 = is_x86_feature_detected!("bmi2");
        if width(i) < 4 {
            return None;
        }
        match i.mnemonic() {
            M::Tzcnt if bmi1 => Some(Self::Count),
            M::Lzcnt if is_x86_feature_detected!("lzcnt") => Some(Self::Count),
            M::Bsf | M::Bsr => Some(Self::Scan),
            M::Andn | M::Bextr if bmi1 => Some(Self::Logic),
            M::Blsi | M::Blsr | M::Blsmsk if bmi1 => Some(Self::Field),
            M::Bzhi if bmi2 => Some(Self::Field),
            M::Pdep | M::Pext | M::Rorx | M::Sarx | M::Shlx | M::Shrx if bmi2 => Some(Self::NoFlags),
            _ => None,
        }
    }

    /// Whether all status flags are written.
    pub fn writes_all(self) -> bool {
        matches!(self, Self::Logic | Self::Field)
    }
}

impl Translator<'_> {
    /// An instruction of these. Its slow path is open.
    pub fn bits(&mut self, i: &Instruction, op: &Op, bits: Bits, live: bool) -> Result<(), Unencodable> {
        let mut host = *i;
        let mut free = [A, B];
        if has_memory(i) {
            let place = self.lookup(&Address::of(op), i.memory_size().size() as u32, Access::Read);
            host_operand(&mut host, &place);
            free = [place.free; 2];
        }
        let mut sources = free.into_iter();
        for n in (1..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register) {
            let place = self.source(register_index(i.op_register(n)), sources.next().unwrap_or(A));
            host.set_op_register(n, sized(place, i.op_register(n).size()));
        }
        let guest = register_index(i.op0_register());
        // Sources are used up when the result is written.
        let result = home(guest).filter(|_| bits != Bits::Scan).unwrap_or(free[0]);
        host.set_op0_register(sized(result, i.op0_register().size()));
        self.e.instruction(&host)?;
        if bits == Bits::Scan {
            self.keep_old(guest, result);
        }
        match home(guest) {
            Some(r) if r != result => self.e.mov(r, result),
            Some(_) => {}
            None => self.e.store(gpr(guest), result),
        }
        if bits != Bits::NoFlags {
            self.host_flags = false;
            if live {
                self.bits_flags(bits, result, width(i) == 8);
            }
        }
        Ok(())
    }

    fn source(&mut self, guest: u8, free: Reg) -> Reg {
        home(guest).unwrap_or_else(|| {
            self.e.load(free, gpr(guest));
            free
        })
    }

    /// If the host's ZF is set, `result` becomes guest register `guest`.
    fn keep_old(&mut self, guest: u8, result: Reg) {
        match home(guest) {
            Some(r) => self.e.rr(true, &[0x0f, 0x40 | cc::EQUAL], result, r),
            None => self.e.rm(true, &[0x0f, 0x40 | cc::EQUAL], result, gpr(guest)),
        }
    }

    /// Flags to RAX. Clobbers [`B`].
    fn bits_flags(&mut self, bits: Bits, result: Reg, wide: bool) {
        match bits {
            Bits::NoFlags => {}
            Bits::Count => self.merge_flags(rflags::CF | rflags::ZF),
            Bits::Scan => self.merge_flags(rflags::ZF),
            Bits::Logic => {
                self.e.rr(wide, &[0x85], result, result); // test
                self.e.save_flags();
            }
            Bits::Field => {
                self.e.set_al(cc::BELOW);
                self.e.rr(wide, &[0x85], result, result); // test
                self.e.raw(&[0x9f, 0x08, 0xc4, 0xb0, 0x00]); // lahf; or ah, al; mov al, 0
            }
        }
    }

    /// Those of the host's flags that are in `mask`.
    fn merge_flags(&mut self, mask: u64) {
        let mask = (mask as i32) << 8;
        self.e.mov32(B, FLAGS);
        self.e.raw(&[0x9f]); // lahf
        self.e.alu_imm(Alu::And, false, FLAGS, mask);
        self.e.alu_imm(Alu::And, false, B, !mask);
        self.e.alu(Alu::Or, false, FLAGS, B);
    }
}
