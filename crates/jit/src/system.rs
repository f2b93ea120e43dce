//! Operations of system code: the interrupt flag, selectors.

use crate::emitter::cc;
use crate::frame::{self, gpr};
use crate::registers::{A, home};
use crate::translate::Translator;
use iced_x86::{Instruction, Mnemonic as M, OpKind};
use umbra_arch::rflags;
use umbra_cpu::decode::register_index;

/// An operation of system code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum System {
    /// CLI.
    Cli,
    /// MOV from a segment register to a general one of at least 32 bits.
    Selector,
}

impl System {
    /// Which of them `i` is.
    pub fn of(i: &Instruction) -> Option<Self> {
        match i.mnemonic() {
            M::Cli => Some(Self::Cli),
            M::Mov
                if i.op_count() == 2 && i.op1_kind() == OpKind::Register && i.op1_register().is_segment_register() =>
            {
                let wide = i.op0_kind() == OpKind::Register && i.op0_register().size() >= 4;
                wide.then_some(Self::Selector)
            }
            _ => None,
        }
    }
}

impl Translator<'_> {
    /// An operation of system code. Its slow path is open.
    pub fn system(&mut self, i: &Instruction, system: System) {
        match system {
            System::Cli => self.cli(),
            System::Selector => self.selector(i),
        }
    }

    /// CLI with CPL 0; any other goes by IOPL and may fault.
    fn cli(&mut self) {
        self.host_flags = false;
        self.e.rm(false, &[0x80], 7, frame::cpl()); // cmp byte
        self.e.raw(&[0]);
        let other = self.e.jcc(cc::NOT_EQUAL);
        self.slow(other);
        self.e.rm(false, &[0x81], 4, frame::rflags()); // and dword
        self.e.raw(&(!(rflags::IF as u32)).to_le_bytes());
    }

    fn selector(&mut self, i: &Instruction) {
        let general = register_index(i.op0_register());
        let to = home(general).unwrap_or(A);
        self.e.rm(false, &[0x0f, 0xb7], to, frame::selector(i.op1_register().number())); // movzx
        if home(general).is_none() {
            self.e.store(gpr(general), A);
        }
    }
}
