//! The way from real mode through protected mode to long mode, for ROMs that test something else.

use crate::embedded::real::load_data_segments;
use crate::embedded::{protected, tables};
use crate::link::{Code, Linker, RomError, link};
use crate::pc::{STACK_TOP, selector};
use crate::report;
use iced_x86::code_asm::*;

/// What a ROM's pieces return.
pub type Done = Result<(), RomError>;

/// A ROM's checks in each width.
pub struct Stages {
    /// Printed first.
    pub title: &'static str,
    /// In real mode; ends there if it needs no more.
    pub real: fn(&mut Code<'_>) -> Done,
    /// In 32-bit protected mode without paging; the probe tables of the embedded guest are built.
    pub protected: fn(&mut Code<'_>) -> Done,
    /// In 64-bit mode under the first 4-level root.
    pub long: fn(&mut Code<'_>) -> Done,
    /// Tables and routines of the ROM's own.
    pub data: fn(&mut Linker) -> Done,
}

/// Nothing to check in a width.
pub fn nothing(_: &mut Code<'_>) -> Done {
    Ok(())
}

/// No data.
pub fn no_data(_: &mut Linker) -> Done {
    Ok(())
}

/// The image of a ROM with these stages.
pub fn build(stages: &Stages) -> Result<Vec<u8>, RomError> {
    link(|l| {
        l.code(16, |c| real(c, stages))?;
        l.code(32, |c| in_protected_mode(c, stages))?;
        l.code(64, |c| in_long_mode(c, stages))?;
        let mut far = l.address("protected").to_le_bytes().to_vec();
        far.extend_from_slice(&selector::CODE32.to_le_bytes());
        l.data("far protected", &far)?;
        (stages.data)(l)?;
        report::runtime(l)
    })
}

fn real(c: &mut Code<'_>, stages: &Stages) -> Done {
    c.cli()?;
    report::initialise(c)?;
    report::print(c, stages.title)?;
    report::print(c, "\n\n")?;
    (stages.real)(c)?;
    let gdtr = c.address("gdtr");
    c.lgdt(fword_ptr(gdtr))?;
    c.mov(eax, cr0)?;
    c.or(eax, 1)?;
    c.mov(cr0, eax)?;
    let far = c.address("far protected");
    Ok(c.jmp(fword_ptr(far))?)
}

fn in_protected_mode(c: &mut Code<'_>, stages: &Stages) -> Done {
    c.name("protected")?;
    load_data_segments(c, selector::DATA32)?;
    c.mov(esp, STACK_TOP)?;
    let idtr = c.address("idtr.32");
    c.lidt(fword_ptr(idtr))?;
    let build = c.address("build_tables");
    c.call(u64::from(build))?;
    (stages.protected)(c)?;
    protected::enter_long_mode(c)?;
    tables::build(c)
}

fn in_long_mode(c: &mut Code<'_>, stages: &Stages) -> Done {
    c.name("long mode")?;
    load_data_segments(c, selector::DATA32)?;
    c.mov(esp, STACK_TOP)?;
    let idtr = c.address("idtr.64");
    c.lidt(fword_ptr(idtr))?;
    (stages.long)(c)?;
    report::print(c, "\n")?;
    c.jump("finish.64")
}

/// Checks that `body` raises `vector` with `code` (0 for exceptions without one).
pub fn raises(c: &mut Code<'_>, vector: u8, code: u32, body: impl FnOnce(&mut Code<'_>) -> Done) -> Done {
    report::check_raises(c, vector, body)?;
    report::check_memory(c, crate::pc::variable::FAULT_CODE, code)?;
    // What the body pushed stays behind.
    Ok(c.mov(esp, STACK_TOP)?)
}
