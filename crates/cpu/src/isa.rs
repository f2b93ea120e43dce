//! The instruction rows: one per instruction, in `isa/<family>.rs`. ADD INSTRUCTIONS THERE.
//!
//! A [`Row`] names the mnemonic (iced-x86's), the manual's section, the flags it leaves undefined, and a
//! selector that returns the function for a [`Form`] (or `None`: #UD). Selectors come from
//! [`operand`](crate::operand) (`binary::<Op>`, `unary::<Op>`, `convert::<Op>`), where loading, storing and
//! write-back live once; the row supplies the pure function. Odd instructions select a function of their own.
//! Rows that share a mnemonic (the string MOVSD and the SSE one) tell their codes apart with [`Row::only`].
//!
//! To add a family: a file with `pub const ROWS: &[Row]`, and its name in `FAMILIES` below.

use crate::core::Core;
use crate::decode::Form;
use crate::op::{ExecFn, Flow, NO_REG, Op};
use iced_x86::{Code, DecoderOptions, EncodingKind, Mnemonic};
use std::sync::OnceLock;
use umbra_arch::cpuid::Feature;
use umbra_arch::{Bus, Fault};

pub mod alu;
pub mod atomic;
pub mod avx;
pub mod bit;
pub mod branch;
pub mod control;
pub mod convert;
pub mod crc32;
pub mod decimal;
pub mod far;
pub mod flag;
pub mod host_data;
pub mod io;
pub mod mmx;
pub mod monitor;
pub mod mov;
pub mod muldiv;
pub mod nop;
pub mod segment;
pub mod shift;
pub mod sse;
pub mod sse_state;
pub mod stack;
pub mod string;
pub mod system;
pub mod vector_memory;
pub mod x87;
pub mod x87_env;
pub mod xsave;

/// Every family of rows.
const FAMILIES: &[&[Row]] = &[
    alu::ROWS,
    atomic::ROWS,
    avx::FMA_ROWS,
    avx::INTEGER_ROWS,
    avx::ROWS,
    bit::ROWS,
    branch::ROWS,
    control::ROWS,
    convert::ROWS,
    crc32::ROWS,
    decimal::ROWS,
    far::ROWS,
    flag::ROWS,
    io::ROWS,
    mmx::ROWS,
    mmx::STATE_ROWS,
    monitor::ROWS,
    mov::ROWS,
    muldiv::ROWS,
    nop::ROWS,
    segment::ROWS,
    shift::ROWS,
    sse::INTEGER_ROWS,
    sse::ROWS,
    sse::SHARED_NAME_ROWS,
    sse_state::ROWS,
    stack::ROWS,
    string::ROWS,
    system::ROWS,
    vector_memory::ROWS,
    x87::ROWS,
    x87_env::ROWS,
    xsave::ROWS,
];

/// Whether an instruction ends its canonical block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ends {
    /// No: the block goes on.
    No,
    /// Yes: a branch, a serialising or an I/O instruction.
    Block,
}

/// Chooses the function that executes a form; `None` if this form is undefined (#UD).
pub type Select = fn(&mut Form) -> Option<ExecFn>;

/// One instruction.
#[derive(Clone, Copy)]
pub struct Row {
    /// iced-x86's mnemonic.
    pub mnemonic: Mnemonic,
    /// Title of its section in SDM volume 2.
    pub section: &'static str,
    /// Chooses the function.
    pub select: Select,
    /// Narrows the mnemonic to some codes.
    pub only: Option<fn(Code) -> bool>,
    /// Status flags that the manual leaves undefined.
    pub undefined: u64,
    /// Whether it ends its block.
    pub ends: Ends,
    /// CPUID feature without which it is undefined.
    pub needs: Option<Feature>,
}

impl Row {
    /// A row without undefined flags that doesn't end its block.
    pub const fn new(mnemonic: Mnemonic, section: &'static str, select: Select) -> Self {
        Self { mnemonic, section, select, only: None, undefined: 0, ends: Ends::No, needs: None }
    }
    /// Only codes that `f` accepts.
    pub const fn only(mut self, f: fn(Code) -> bool) -> Self {
        self.only = Some(f);
        self
    }
    /// Leaves these RFLAGS bits undefined.
    pub const fn undefined(mut self, flags: u64) -> Self {
        self.undefined = flags;
        self
    }
    /// Undefined without this CPUID feature.
    pub const fn needs(mut self, feature: Feature) -> Self {
        self.needs = Some(feature);
        self
    }
    /// Ends its block.
    pub const fn ends(mut self) -> Self {
        self.ends = Ends::Block;
        self
    }
    /// Whether the row covers `code`. EVEX and XOP forms of a mnemonic are other instructions, and so are
    /// those of processors that we don't decode for.
    pub fn covers(&self, code: Code) -> bool {
        let info = code.op_code();
        let encoded = matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
        let decoded = info.decoder_option() == DecoderOptions::NONE;
        encoded && decoded && code.mnemonic() == self.mnemonic && self.only.is_none_or(|f| f(code))
    }
}

/// All rows with their index, in the order of the families.
pub fn rows() -> impl Iterator<Item = (u16, &'static Row)> {
    FAMILIES.iter().flat_map(|f| f.iter()).enumerate().map(|(i, row)| (i as u16, row))
}

/// The row that covers `code`, with its index.
pub fn row_of(code: Code) -> Option<(u16, &'static Row)> {
    static TABLE: OnceLock<Vec<Option<(u16, &'static Row)>>> = OnceLock::new();
    let table = TABLE.get_or_init(|| Code::values().map(|c| rows().find(|(_, row)| row.covers(c))).collect());
    table.get(code as usize).copied().flatten()
}

/// An operation that raises #UD, with no operands.
pub const fn invalid_op() -> Op {
    Op {
        exec: undefined,
        imm: 0,
        disp: 0,
        ea_mask: u64::MAX,
        base: NO_REG,
        index: NO_REG,
        scale: 0,
        seg: 3,
        dst: NO_REG,
        src: NO_REG,
        len: 1,
        legacy: false,
        start: 0,
        row: u16::MAX,
        prefix: 0,
        aux: 0,
    }
}

/// Raises #UD.
pub fn undefined(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    c.raise(Fault::UNDEFINED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_code_has_two_rows() {
        for code in Code::values() {
            let names: Vec<_> = rows().filter(|(_, r)| r.covers(code)).map(|(_, r)| r.section).collect();
            assert!(names.len() <= 1, "{code:?} is covered by {names:?}");
        }
    }

    #[test]
    fn every_row_covers_something() {
        for (_, row) in rows() {
            assert!(Code::values().any(|c| row.covers(c)), "{}", row.section);
        }
    }
}
