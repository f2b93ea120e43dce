//! `umbra dump`: what the translator makes of guest code.

use crate::exit_code;
use crate::run::JitOffArgs;
use clap::{Args as ClapArgs, ValueEnum};
use umbra_jit::{SampleMode, translations_of};

/// Show the host code of guest code, block by block: each guest instruction with its bytes and the way it is done
/// (`Helper` is a call of its function), then its host instructions. `umbra run --dump-blocks` shows those of a whole run.
#[derive(ClapArgs, Debug)]
#[group(id = "dump")]
pub struct Args {
    /// Guest code in hexadecimal, for example 4801d8
    #[arg(value_name = "HEX", value_parser = Code::parse)]
    code: Code,
    /// Code size
    #[arg(long, value_enum, value_name = "BITS", default_value_t = Mode::Bits64)]
    mode: Mode,
    #[command(flatten)]
    without: JitOffArgs,
}

/// `HEX`.
#[derive(Clone, Debug)]
struct Code(Vec<u8>);

/// `--mode`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Mode {
    /// Real mode
    #[value(name = "16")]
    Bits16,
    /// Protected mode
    #[value(name = "32")]
    Bits32,
    /// 64-bit mode
    #[value(name = "64")]
    Bits64,
}

impl Code {
    fn parse(text: &str) -> Result<Self, String> {
        let digits: String = text.chars().filter(|c| !c.is_whitespace()).collect();
        let wrong = || format!("{text:?} is no code: write its bytes in hexadecimal, for example 4801d8");
        if digits.is_empty() || !digits.is_ascii() || !digits.len().is_multiple_of(2) {
            return Err(wrong());
        }
        let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).map_err(|_| wrong());
        (0..digits.len()).step_by(2).map(byte).collect::<Result<_, _>>().map(Self)
    }
}

/// Prints the listing; gives the exit code.
pub fn execute(args: &Args) -> u8 {
    let mode = match args.mode {
        Mode::Bits16 => SampleMode::Bits16,
        Mode::Bits32 => SampleMode::Bits32,
        Mode::Bits64 => SampleMode::Bits64,
    };
    match translations_of(&args.code.0, mode, args.without.options()) {
        Ok(blocks) => {
            blocks.iter().for_each(|block| print!("{block}"));
            exit_code::CLEAN
        }
        Err(why) => {
            eprintln!("umbra: {why}");
            exit_code::HOST
        }
    }
}
