//! One instruction in text.

use super::Scene;
use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter};
use std::fmt;
use umbra_arch::segment::Seg;

/// A disassembled instruction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Line {
    /// Offset in CS.
    pub rip: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// In Intel's syntax.
    pub text: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}: ", self.rip)?;
        for byte in &self.bytes {
            write!(f, "{byte:02x}")?;
        }
        write!(f, "  {}", self.text)
    }
}

/// The instruction at `rip`, decoded for the code size in force.
pub(super) fn decode(scene: &Scene<'_>, rip: u64) -> Option<(Instruction, Vec<u8>)> {
    let bytes = scene.bytes(scene.linear(rip), 15);
    if bytes.is_empty() {
        return None;
    }
    let size = if scene.state.is_64bit_code() {
        64
    } else if scene.state.segment(Seg::Cs).attr.is_big() {
        32
    } else {
        16
    };
    let instruction = Decoder::with_ip(size, &bytes, rip, DecoderOptions::NONE).decode();
    Some((instruction, bytes))
}

/// The instruction at `rip` in text; `None` if its first byte isn't mapped.
pub fn disassemble(scene: &Scene<'_>, rip: u64) -> Option<Line> {
    let (instruction, mut bytes) = decode(scene, rip)?;
    if instruction.is_invalid() {
        return Some(Line { rip, bytes, text: "(no valid instruction)".into() });
    }
    bytes.truncate(instruction.len());
    let mut text = String::new();
    let mut formatter = IntelFormatter::new();
    formatter.options_mut().set_hex_prefix("0x");
    formatter.options_mut().set_hex_suffix("");
    formatter.format(&instruction, &mut text);
    Some(Line { rip, bytes, text })
}
