//! A linker for images that mix 16-, 32- and 64-bit code.
//!
//! An image is composed from top to bottom: code of one width, data, text. Names may be used before they
//! are defined: composing is repeated with the addresses of the pass before until nothing moves.

use crate::{ENTRY, LOAD};
use iced_x86::code_asm::{AsmMemoryOperand, CodeAssembler, CodeLabel, dword_ptr};
use iced_x86::{BlockEncoderOptions, IcedError};
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};

const LOAD_AT: u32 = LOAD.raw() as u32;
/// Where the variables start.
const MAX_SIZE: usize = 0xf000;
const MAX_PASSES: usize = 20;

/// Why a ROM has no image: a defect of the ROM, not of its caller.
#[derive(Debug, thiserror::Error)]
pub enum RomError {
    /// An instruction or label is wrong.
    #[error("the ROM does not assemble: {0}")]
    Assemble(#[from] IcedError),
    /// A name is used and never defined.
    #[error("the ROM uses {0:?} and never defines it")]
    Undefined(String),
    /// A name is defined twice.
    #[error("the ROM defines {0:?} twice")]
    DefinedTwice(String),
    /// The image reaches into the variables.
    #[error("the ROM has {0} bytes, more than {MAX_SIZE}")]
    TooLarge(usize),
    /// Addresses go on moving.
    #[error("the ROM's addresses do not settle")]
    Unsettled,
}

type Symbols = BTreeMap<String, u32>;

/// One pass over an image.
pub struct Linker {
    image: Vec<u8>,
    texts: Vec<String>,
    known: Symbols,
    defined: Symbols,
    missing: Option<String>,
    fresh: u32,
}

/// Code of one width under construction. Instructions are [`CodeAssembler`]'s.
pub struct Code<'l> {
    asm: CodeAssembler,
    linker: &'l mut Linker,
    names: Vec<(String, CodeLabel)>,
}

/// The image that `compose` describes.
pub fn link(compose: impl Fn(&mut Linker) -> Result<(), RomError>) -> Result<Vec<u8>, RomError> {
    let mut known = Symbols::new();
    for _ in 0..MAX_PASSES {
        let mut linker =
            Linker { image: Vec::new(), texts: Vec::new(), known, defined: Symbols::new(), missing: None, fresh: 0 };
        compose(&mut linker)?;
        linker.place_texts()?;
        if linker.image.len() > MAX_SIZE {
            return Err(RomError::TooLarge(linker.image.len()));
        }
        if linker.defined == linker.known {
            return match linker.missing {
                Some(name) => Err(RomError::Undefined(name)),
                None => Ok(linker.image),
            };
        }
        known = linker.defined;
    }
    Err(RomError::Unsettled)
}

impl Linker {
    fn here(&self) -> u32 {
        LOAD_AT + self.image.len() as u32
    }

    fn define(&mut self, name: &str, at: u32) -> Result<(), RomError> {
        match self.defined.insert(name.to_owned(), at) {
            Some(_) => Err(RomError::DefinedTwice(name.to_owned())),
            None => Ok(()),
        }
    }

    /// Linear address of `name`.
    pub fn address(&mut self, name: &str) -> u32 {
        let found = self.known.get(name).copied();
        if found.is_none() {
            self.missing = Some(name.to_owned());
        }
        found.unwrap_or(LOAD_AT)
    }

    /// Appends code of `bits` bits.
    pub fn code(
        &mut self,
        bits: u32,
        write: impl FnOnce(&mut Code<'_>) -> Result<(), RomError>,
    ) -> Result<(), RomError> {
        let at = self.here();
        let mut code = Code { asm: CodeAssembler::new(bits)?, linker: self, names: Vec::new() };
        write(&mut code)?;
        let Code { mut asm, names, .. } = code;
        let origin = if bits == 16 { at - LOAD_AT } else { at };
        let assembled = asm.assemble_options(u64::from(origin), BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
        for (name, label) in names {
            let offset = assembled.label_ip(&label)? as u32 - origin;
            self.define(&name, at + offset)?;
        }
        self.image.extend_from_slice(&assembled.inner.code_buffer);
        Ok(())
    }

    /// Appends data, aligned to 16 bytes.
    pub fn data(&mut self, name: &str, bytes: &[u8]) -> Result<(), RomError> {
        self.image.resize(self.image.len().next_multiple_of(16), 0);
        self.define(name, self.here())?;
        self.image.extend_from_slice(bytes);
        Ok(())
    }

    /// Address of a zero-terminated text, which is stored once.
    fn text(&mut self, text: &str) -> u32 {
        if !self.texts.iter().any(|t| t == text) {
            self.texts.push(text.to_owned());
        }
        self.address(&format!("text {text}"))
    }

    fn place_texts(&mut self) -> Result<(), RomError> {
        for text in std::mem::take(&mut self.texts) {
            self.define(&format!("text {text}"), self.here())?;
            self.image.extend_from_slice(text.as_bytes());
            self.image.push(0);
        }
        Ok(())
    }
}

impl Deref for Code<'_> {
    type Target = CodeAssembler;
    fn deref(&self) -> &CodeAssembler {
        &self.asm
    }
}

impl DerefMut for Code<'_> {
    fn deref_mut(&mut self) -> &mut CodeAssembler {
        &mut self.asm
    }
}

impl Code<'_> {
    /// Code width in bits.
    pub fn bits(&self) -> u32 {
        self.asm.bitness()
    }

    /// `linear` as this code addresses it: real mode has DS = [`ENTRY`]'s segment.
    pub fn offset(&self, linear: u32) -> u32 {
        if self.bits() == 16 { linear - (u32::from(ENTRY.0) << 4) } else { linear }
    }

    /// The dword at linear address `linear`.
    pub fn dword(&self, linear: u32) -> AsmMemoryOperand {
        dword_ptr(self.offset(linear))
    }

    /// Gives the next instruction a name that other code can use.
    pub fn name(&mut self, name: &str) -> Result<(), RomError> {
        let mut label = self.asm.create_label();
        self.asm.set_label(&mut label)?;
        // An instruction bears one label at most: this one is the name's.
        self.asm.zero_bytes()?;
        self.names.push((name.to_owned(), label));
        Ok(())
    }

    /// A name that nothing else has: for places whose address the code needs.
    pub fn fresh_name(&mut self) -> String {
        self.linker.fresh += 1;
        format!("place {}", self.linker.fresh)
    }

    /// Linear address of a name.
    pub fn linear(&mut self, name: &str) -> u32 {
        self.linker.address(name)
    }

    /// A name's address as this code addresses it.
    pub fn address(&mut self, name: &str) -> u32 {
        let linear = self.linear(name);
        self.offset(linear)
    }

    /// A text's address as this code addresses it.
    pub fn text(&mut self, text: &str) -> u32 {
        let linear = self.linker.text(text);
        self.offset(linear)
    }

    /// Calls a name with the code's width appended, as in `print.32`.
    pub fn call_own(&mut self, name: &str) -> Result<(), RomError> {
        let name = format!("{name}.{}", self.bits());
        let target = self.address(&name);
        Ok(self.asm.call(u64::from(target))?)
    }

    /// Names the next instruction, with the code's width appended.
    pub fn name_own(&mut self, name: &str) -> Result<(), RomError> {
        self.name(&format!("{name}.{}", self.bits()))
    }

    /// Jumps to a name in code of the same width.
    pub fn jump(&mut self, name: &str) -> Result<(), RomError> {
        let target = self.address(name);
        Ok(self.asm.jmp(u64::from(target))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_forwards_and_backwards_across_widths() {
        let image = link(|l| {
            l.code(16, |c| c.jump("end"))?;
            l.data("table", &[1, 2, 3])?;
            l.code(32, |c| {
                c.name("code")?;
                let table = c.address("table");
                Ok(c.push(table)?)
            })?;
            l.code(16, |c| {
                c.name("end")?;
                Ok(c.hlt()?)
            })
        })
        .expect("links");
        let table = LOAD_AT + 16;
        let mut expected = vec![0xeb, 22];
        expected.resize(16, 0);
        expected.extend([1, 2, 3, 0x68]);
        expected.extend(table.to_le_bytes());
        expected.push(0xf4);
        assert_eq!(image, expected);
    }

    #[test]
    fn mistakes_are_named() {
        let undefined = link(|l| l.code(32, |c| c.jump("nowhere")));
        assert!(matches!(undefined, Err(RomError::Undefined(name)) if name == "nowhere"));
        let twice = link(|l| l.data("a", &[1]).and_then(|()| l.data("a", &[2])));
        assert!(matches!(twice, Err(RomError::DefinedTwice(name)) if name == "a"));
        let large = link(|l| l.data("a", &[0; MAX_SIZE + 1]));
        assert!(matches!(large, Err(RomError::TooLarge(_))));
    }
}
