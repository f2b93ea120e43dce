//! Translations for people and profilers: guest code, in what way each instruction is done, host code.

use crate::engine::Engine;
use crate::frame::{Frame, INTO, NEAR_REGIONS};
use crate::memory_path::Access;
use crate::ranges::{NAMES, Name, StackRanges};
use crate::strings;
use crate::stubs::Stubs;
use crate::translate::{Code, Offsets};
use crate::windows::REGIONS;
use iced_x86::{
    Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter, OpKind, Register, SymbolResolver, SymbolResult,
};
use std::fmt::{self, Write};
use std::mem::offset_of;
use std::ops::Range;
use umbra_arch::CpuState;
use umbra_arch::fpu::FpState;
use umbra_cpu::block::Block;
use umbra_cpu::op::CODE_BASE;
use umbra_cpu::{Core, Interpreter};

/// A translation as it was made.
#[derive(Clone, Debug)]
pub struct Translated {
    /// Of its first block, as offset in CS.
    pub rip: u64,
    /// Code size: 16, 32 or 64.
    pub bits: u32,
    /// The blocks' bytes, one behind the other.
    pub guest: Vec<u8>,
    /// Its host code; exits aren't linked yet.
    pub host: Vec<u8>,
    /// How many bytes of it lie at `address`; the others lie at `rare_address`.
    pub often: usize,
    /// Address of the host code.
    pub address: u64,
    /// Address of that which is rarely executed.
    pub rare_address: u64,
    /// The instructions, in order.
    pub parts: Vec<Part>,
    /// Shared code, by address.
    pub(crate) stubs: Vec<(u64, String)>,
}

/// An instruction of a translation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// Where it is, as offset in CS.
    pub rip: u64,
    /// Its bytes, as range of the blocks'.
    pub guest: Range<usize>,
    /// Its host code but for rarely executed parts, which come behind all instructions.
    pub host: Range<usize>,
    /// In what way it is done: `Helper` is a call of its function.
    pub way: String,
}

/// Called with each translation when it has been made.
pub type Listener = Box<dyn FnMut(&Translated) + Send>;

/// The stubs by name.
pub(crate) fn names(stubs: &Stubs, base: u64) -> Vec<(u64, String)> {
    let named = [
        (stubs.helper, "helper"),
        (stubs.rest, "rest"),
        (stubs.tail, "tail"),
        (stubs.budget, "budget"),
        (stubs.link, "link"),
        (stubs.lookup, "lookup"),
        (stubs.find, "find"),
        (stubs.dispatch, "dispatch"),
        (stubs.change_view, "change_view"),
        (stubs.system_call, "system_call"),
        (stubs.system_return, "system_return"),
        (stubs.vectors_load, "vectors_load"),
        (stubs.x87_load, "x87_load"),
        (stubs.x87_store, "x87_store"),
    ];
    let ranges = [(Access::Read, "read"), (Access::Write, "write")].into_iter().flat_map(|(access, verb)| {
        (0..NAMES).map(move |name| (stubs.range(name as Name, access), format!("range_{verb}[{name}]")))
    });
    let named = named.into_iter().map(|(at, name)| (at, name.to_owned()));
    named.chain(ranges).chain(strings::names(&stubs.repeated)).map(|(at, name)| (base + at as u64, name)).collect()
}

impl Translated {
    /// Blocks, the first one at `rip`, with these bytes, whose code is at these offsets from an address.
    pub(crate) fn of(
        blocks: &[&Block],
        rip: u64,
        guest: Vec<u8>,
        code: &Code,
        (base, at): (u64, Offsets),
        stubs: Vec<(u64, String)>,
    ) -> Self {
        let ends = code.starts.iter().skip(1).map(|(end, _)| *end);
        let first = blocks[0];
        let mut bytes = 0;
        let ops = blocks.iter().flat_map(|block| {
            let start = bytes;
            bytes += block.pieces().map(|(_, len)| len as usize).sum::<usize>();
            let block_rip = rip.wrapping_add(block.rip.wrapping_sub(first.rip));
            block.ops.iter().map(move |op| {
                let at = start + usize::from(op.start);
                (block_rip.wrapping_add(op.start.into()), at..at + usize::from(op.len))
            })
        });
        let parts = ops.zip(&code.starts).zip(ends).map(|(((rip, guest), (start, kind)), end)| Part {
            rip,
            guest,
            host: *start..end,
            way: kind.map_or_else(String::new, |kind| format!("{kind:?}")),
        });
        let (address, rare_address) = (base + at.often as u64, base + at.rare as u64);
        let (bits, parts) = (first.bits(), parts.collect());
        Self { rip, bits, parts, guest, host: code.bytes.clone(), often: code.often, address, rare_address, stubs }
    }

    fn guest_text(&self, part: &Part) -> String {
        let bytes = self.guest.get(part.guest.clone()).unwrap_or_default();
        let i = Decoder::with_ip(self.bits, bytes, part.rip, DecoderOptions::NONE).decode();
        let mut text = String::new();
        numbers(IntelFormatter::new()).format(&i, &mut text);
        text
    }

    /// Host instructions of a range, a line each.
    fn host_text(&self, range: Range<usize>, out: &mut String) {
        let bytes = self.host.get(range.clone()).unwrap_or_default();
        let inside = [(0..self.often, self.address), (self.often..self.host.len(), self.rare_address)];
        let start = inside.iter().find(|(part, _)| part.contains(&range.start));
        let Some(start) = start.map(|(part, address)| address + (range.start - part.start) as u64) else { return };
        let names = Names { stubs: self.stubs.clone(), inside };
        let mut formatter = numbers(IntelFormatter::with_options(Some(Box::new(names)), None));
        for i in &mut Decoder::with_ip(64, bytes, start, DecoderOptions::NONE) {
            let _ = write!(out, "  {:4x}    ", i.ip() - start + range.start as u64);
            formatter.format(&i, out);
            out.push('\n');
        }
    }
}

fn numbers(mut formatter: IntelFormatter) -> IntelFormatter {
    let options = formatter.options_mut();
    options.set_hex_prefix("0x");
    options.set_hex_suffix("");
    options.set_uppercase_hex(false);
    options.set_show_branch_size(false);
    options.set_rip_relative_addresses(true);
    formatter
}

impl fmt::Display for Translated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut host = String::new();
        let head = self.parts.first().map_or(self.host.len(), |part| part.host.start);
        self.host_text(0..head, &mut host);
        writeln!(f, "block {:#x}, {}-bit, {} bytes of host code", self.rip, self.bits, self.host.len())?;
        f.write_str(&host)?;
        for part in &self.parts {
            host.clear();
            self.host_text(part.host.clone(), &mut host);
            let bytes = self.guest.get(part.guest.clone()).unwrap_or_default();
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            writeln!(f, "{hex:<16} {:<40} {}", self.guest_text(part), part.way)?;
            f.write_str(&host)?;
        }
        host.clear();
        let tail = self.parts.last().map_or(0, |part| part.host.end);
        self.host_text(tail..self.host.len(), &mut host);
        writeln!(f, "behind them")?;
        f.write_str(&host)
    }
}

/// Names what host code addresses: fields of the engine, stubs, places in the translation.
struct Names {
    stubs: Vec<(u64, String)>,
    /// Parts of the translation and their addresses.
    inside: [(Range<usize>, u64); 2],
}

impl Names {
    /// The place in the translation that has an address.
    fn place(&self, address: u64) -> Option<usize> {
        self.inside.iter().find_map(|(part, start)| {
            let into = usize::try_from(address.checked_sub(*start)?).ok()?;
            (into < part.len()).then_some(part.start + into)
        })
    }
}

impl SymbolResolver for Names {
    fn symbol(
        &mut self,
        i: &Instruction,
        operand: u32,
        _: Option<u32>,
        address: u64,
        _: u32,
    ) -> Option<SymbolResult<'_>> {
        let name = match i.op_kind(operand) {
            OpKind::Memory if i.memory_base() == Register::R15 => {
                field(i.memory_displacement64().wrapping_add(INTO as u64) as usize)?
            }
            OpKind::NearBranch64 => match (self.place(address), self.stubs.iter().find(|(stub, _)| *stub == address)) {
                (Some(place), _) => format!("{place:#x}"),
                (None, Some((_, name))) => name.clone(),
                (None, None) => "shared_code".to_owned(),
            },
            _ => return None,
        };
        Some(SymbolResult::with_string(address, name))
    }
}

const FRAME: usize = offset_of!(Engine, frame);
const REGIONS_AT: usize = FRAME + offset_of!(Frame, regions);
const FAR_REGIONS_AT: usize = FRAME + offset_of!(Frame, far_regions);
const NEAR_AT: usize = FRAME + offset_of!(Frame, selected);
const CORE: usize = offset_of!(Engine, interp) + Interpreter::CORE_OFFSET;
const FP: usize = CORE + offset_of!(Core, s) + offset_of!(CpuState, fp);

/// The field at an offset from the engine. What lies elsewhere is named by its distance from where it begins, so that
/// names stay when other things grow.
fn field(offset: usize) -> Option<String> {
    let array = |name: &str, start: usize, size: usize, count: usize| {
        let at = offset.checked_sub(start).filter(|at| *at < size * count)?;
        let rest = if at % size == 0 { String::new() } else { format!("+{}", at % size) };
        Some(format!("{name}[{}]{rest}", at / size))
    };
    array("gpr", CORE + offset_of!(Core, gpr), 8, 16)
        .or_else(|| array("code_base", CORE + offset_of!(Core, gpr) + 8 * usize::from(CODE_BASE), 8, 1))
        .or_else(|| array("code_mode", CORE + offset_of!(Core, code_mode), 8, 1))
        .or_else(|| array("seg_base", CORE + offset_of!(Core, seg_base), 8, 8))
        .or_else(|| array("next_rip", CORE + offset_of!(Core, next_rip), 8, 1))
        .or_else(|| array("xmm", FP + offset_of!(FpState, xmm), 16, 16))
        .or_else(|| array("ymm_high", FP + offset_of!(FpState, ymm_high), 16, 16))
        .or_else(|| array("fp", FP, 1, size_of::<FpState>()))
        .or_else(|| array("region", REGIONS_AT, 8, 2 * NEAR_REGIONS))
        .or_else(|| array("far_region", FAR_REGIONS_AT, 8, 2 * (REGIONS - NEAR_REGIONS)))
        .or_else(|| array("stack", FRAME + offset_of!(Frame, stack), 8, size_of::<StackRanges>() / 8))
        .or_else(|| array("budget", FRAME + offset_of!(Frame, budget), 8, 1))
        .or_else(|| array("near", NEAR_AT, 8, (size_of::<Frame>() - offset_of!(Frame, selected)) / 8))
        .or_else(|| array("frame", FRAME, 8, size_of::<Frame>() / 8))
}
