//! CRC32: the Castagnoli polynomial, bit-reflected, as iSCSI, ext4 and btrfs use it.

use super::Row;
use crate::by_width;
use crate::core::Core;
use crate::decode::{Form, Loc};
use crate::op::{ExecFn, Flow, Op};
use crate::word::Word;
use iced_x86::Mnemonic as M;
use umbra_arch::Bus;
use umbra_arch::cpuid::Feature;

/// The row.
pub const ROWS: &[Row] = &[Row::new(M::Crc32, "CRC32-Accumulate CRC32 Value", crc32).needs(Feature::Sse42)];

const POLYNOMIAL: u32 = 0x82f6_3b78;

/// The remainder of each byte.
const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (POLYNOMIAL * (crc & 1));
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

fn accumulate<W: Word>(crc: u32, value: u64) -> u32 {
    value.to_le_bytes()[..W::BYTES as usize]
        .iter()
        .fold(crc, |crc, byte| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)])
}

fn crc32(form: &mut Form) -> Option<ExecFn> {
    match form.src {
        Loc::Reg => by_width!(form.src_bytes, W => register::<W>),
        Loc::Mem => by_width!(form.src_bytes, W => memory::<W>),
        _ => None,
    }
}

fn register<W: Word>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let crc = accumulate::<W>(c.reg::<u32>(op.dst) as u32, c.reg::<W>(op.src));
    c.set_reg::<u32>(op.dst, u64::from(crc));
    Ok(())
}

fn memory<W: Word>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let value = c.load_operand::<W>(bus, op)?;
    let crc = accumulate::<W>(c.reg::<u32>(op.dst) as u32, value);
    c.set_reg::<u32>(op.dst, u64::from(crc));
    Ok(())
}
