//! Cases as small text files (TOML): what differs from the layout's own state and memory.

use crate::case::{Case, Code, Layout, Piece, Run};
use crate::ring0::Paging;
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use umbra_hostexec::native::{Mode, Until};

/// A case file that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// Not TOML, or a key is missing.
    #[error("{0}")]
    Toml(#[from] toml::de::Error),
    /// A state that isn't one.
    #[error("state: {0}")]
    State(#[from] serde_json::Error),
    /// A value that isn't one of those that exist.
    #[error("{key}: {value:?} is none of those that exist")]
    Value {
        /// Its key.
        key: &'static str,
        /// What it says.
        value: String,
    },
}

/// Where a case comes from, and what was seen.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Origin {
    /// The engines that differ.
    pub engines: Vec<String>,
    /// The generator.
    pub generator: String,
    /// The campaign's seed, as text (TOML has no 64-bit unsigned numbers).
    pub seed: String,
    /// The case's number there.
    pub index: u64,
    /// What differs.
    pub difference: String,
}

#[derive(Serialize, Deserialize)]
struct File {
    origin: Origin,
    layout: String,
    run: String,
    #[serde(default)]
    watch: Vec<String>,
    code: CodeText,
    #[serde(default)]
    state: Value,
    #[serde(default)]
    step: Vec<Step>,
    #[serde(default)]
    memory: Vec<PieceText>,
}

#[derive(Serialize, Deserialize)]
struct CodeText {
    gpa: String,
    linked: bool,
    tail: String,
}

#[derive(Serialize, Deserialize)]
struct Step {
    bytes: String,
    /// For the reader only.
    #[serde(default)]
    text: String,
}

#[derive(Serialize, Deserialize)]
struct PieceText {
    gpa: String,
    bytes: String,
}

/// The case as text.
pub fn write(case: &Case, origin: &Origin) -> String {
    let step = |bytes: &Vec<u8>| Step { bytes: hex(bytes), text: disassemble(case.layout, bytes) };
    let piece = |piece: &Piece| PieceText { gpa: number(piece.gpa), bytes: hex(&piece.bytes) };
    let file = File {
        origin: origin.clone(),
        layout: layout_name(case.layout).into(),
        run: match case.run {
            Run::Instruction(Until::Step) => "step".into(),
            Run::Instruction(Until::Breakpoint) => "breakpoint".into(),
            Run::Halt { at_most } => format!("halt {at_most}"),
        },
        watch: case.watch.iter().map(|range| format!("{:#x}..{:#x}", range.start, range.end)).collect(),
        code: CodeText { gpa: number(case.code.gpa), linked: case.code.linked, tail: hex(&case.code.tail) },
        state: changes(&value(&case.layout.state()), &value(&case.state)).unwrap_or_else(|| json!({})),
        step: case.code.steps.iter().map(step).collect(),
        memory: case.memory.iter().map(piece).collect(),
    };
    // Strings, booleans, tables and arrays only: nothing that TOML lacks.
    toml::to_string(&file).unwrap_or_default()
}

/// The case in a text.
///
/// # Errors
/// [`SavedError`] names what is wrong.
pub fn read(text: &str) -> Result<(Case, Origin), SavedError> {
    let file: File = toml::from_str(text)?;
    let layout = layout_of(&file.layout)?;
    let mut state = value(&layout.state());
    apply(&mut state, &file.state);
    let steps = file.step.iter().map(|step| unhex(&step.bytes)).collect::<Result<_, _>>()?;
    let memory = file.memory.iter().map(|p| Ok(Piece { gpa: parse("memory", &p.gpa)?, bytes: unhex(&p.bytes)? }));
    let case = Case {
        layout,
        state: serde_json::from_value(numbers(state))?,
        memory: memory.collect::<Result<_, SavedError>>()?,
        code: Code {
            gpa: parse("code", &file.code.gpa)?,
            steps,
            linked: file.code.linked,
            tail: unhex(&file.code.tail)?,
        },
        run: run_of(&file.run)?,
        watch: file.watch.iter().map(|text| range(text)).collect::<Result<_, _>>()?,
    };
    Ok((case, file.origin))
}

const LAYOUTS: [(&str, Layout); 7] = [
    ("blank", Layout::Blank),
    ("ring0-2level", Layout::Ring0(Paging::TwoLevel)),
    ("ring0-pae", Layout::Ring0(Paging::Pae)),
    ("ring0-long", Layout::Ring0(Paging::Long)),
    ("window-16", Layout::Window(Mode::Bits16)),
    ("window-32", Layout::Window(Mode::Bits32)),
    ("window-64", Layout::Window(Mode::Bits64)),
];

fn layout_name(layout: Layout) -> &'static str {
    LAYOUTS.iter().find(|(_, of)| *of == layout).map_or("blank", |(name, _)| name)
}

fn layout_of(name: &str) -> Result<Layout, SavedError> {
    let found = LAYOUTS.iter().find(|(of, _)| *of == name).map(|(_, layout)| *layout);
    found.ok_or_else(|| SavedError::Value { key: "layout", value: name.into() })
}

fn run_of(text: &str) -> Result<Run, SavedError> {
    let bad = || SavedError::Value { key: "run", value: text.into() };
    Ok(match text {
        "step" => Run::Instruction(Until::Step),
        "breakpoint" => Run::Instruction(Until::Breakpoint),
        _ => Run::Halt { at_most: text.strip_prefix("halt ").and_then(|n| n.parse().ok()).ok_or_else(bad)? },
    })
}

fn range(text: &str) -> Result<std::ops::Range<u64>, SavedError> {
    let bad = || SavedError::Value { key: "watch", value: text.into() };
    let (start, end) = text.split_once("..").ok_or_else(bad)?;
    Ok(parse("watch", start)?..parse("watch", end)?)
}

fn number(value: u64) -> String {
    format!("{value:#x}")
}

fn parse(key: &'static str, text: &str) -> Result<u64, SavedError> {
    let digits = text.strip_prefix("0x").and_then(|hex| u64::from_str_radix(hex, 16).ok());
    digits.ok_or_else(|| SavedError::Value { key, value: text.into() })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Result<Vec<u8>, SavedError> {
    let bad = || SavedError::Value { key: "bytes", value: text.into() };
    let pair = |n: usize| text.get(n..n + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok()).ok_or_else(bad);
    (0..text.len()).step_by(2).map(pair).collect()
}

/// The instructions of a step.
pub fn disassemble(layout: Layout, bytes: &[u8]) -> String {
    let bits = match layout {
        Layout::Window(mode) => mode.bits(),
        Layout::Ring0(paging) if !paging.is_long() => 32,
        Layout::Blank => 16,
        Layout::Ring0(_) => 64,
    };
    let mut formatter = IntelFormatter::new();
    let mut text = Vec::new();
    for i in Decoder::new(bits, bytes, DecoderOptions::NO_INVALID_CHECK).iter() {
        let mut line = String::new();
        formatter.format(&i, &mut line);
        text.push(line);
    }
    text.join("; ")
}

/// A state with its numbers as text.
fn value(state: &umbra_arch::CpuState) -> Value {
    texts(serde_json::to_value(state).unwrap_or_default())
}

fn texts(value: Value) -> Value {
    match value {
        Value::Number(n) => n.as_u64().map_or(Value::Null, |n| Value::String(number(n))),
        Value::Array(all) => all.into_iter().map(texts).collect(),
        Value::Object(all) => Value::Object(all.into_iter().map(|(key, value)| (key, texts(value))).collect()),
        other => other,
    }
}

fn numbers(value: Value) -> Value {
    match value {
        Value::String(text) => match parse("state", &text) {
            Ok(n) => n.into(),
            Err(_) => Value::String(text),
        },
        Value::Array(all) => all.into_iter().map(numbers).collect(),
        Value::Object(all) => Value::Object(all.into_iter().map(|(key, value)| (key, numbers(value))).collect()),
        other => other,
    }
}

/// What of `to` differs from `from`: arrays by index.
fn changes(from: &Value, to: &Value) -> Option<Value> {
    if from == to {
        return None;
    }
    let members = |from: &mut dyn Iterator<Item = (String, &Value, &Value)>| {
        Value::Object(from.filter_map(|(key, a, b)| Some((key, changes(a, b)?))).collect::<Map<_, _>>())
    };
    Some(match (from, to) {
        (Value::Object(a), Value::Object(b)) => {
            members(&mut a.iter().filter_map(|(key, value)| Some((key.clone(), value, b.get(key)?))))
        }
        (Value::Array(a), Value::Array(b)) => {
            members(&mut a.iter().zip(b).enumerate().map(|(n, (a, b))| (n.to_string(), a, b)))
        }
        _ => to.clone(),
    })
}

/// Puts changes into a value.
fn apply(to: &mut Value, change: &Value) {
    match (to, change) {
        (Value::Object(to), Value::Object(change)) => {
            change.iter().for_each(|(key, value)| to.get_mut(key).into_iter().for_each(|to| apply(to, value)));
        }
        (Value::Array(to), Value::Object(change)) => {
            for (key, value) in change {
                key.parse::<usize>().ok().and_then(|n| to.get_mut(n)).into_iter().for_each(|to| apply(to, value));
            }
        }
        (to, change) => *to = change.clone(),
    }
}
