//! x87 control: words, environment, whole state ("x87 FPU State", "x87 FPU Environment").
//!
//! FCS and FDS read as 0, as on CPUs that deprecate them. In real mode the environment holds the offset of the
//! last instruction and operand, not their linear addresses.

use super::Row;
use super::host_data::{Unit, X87};
use crate::core::Core;
use crate::decode::{Form, Loc};
use crate::op::{ExecFn, Flow, Op};
use iced_x86::Mnemonic as M;
use umbra_arch::Bus;
use umbra_arch::cpuid::Feature;
use umbra_arch::fpu::FpState;
use umbra_arch::paging::AccessKind;

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Fninit, "FINIT/FNINIT-Initialize Floating-Point Unit", |_| Some(fninit)).needs(Feature::Fpu),
    Row::new(M::Fnclex, "FCLEX/FNCLEX-Clear Exceptions", |_| Some(fnclex)).needs(Feature::Fpu),
    Row::new(M::Fldcw, "FLDCW-Load x87 FPU Control Word", |_| Some(fldcw)).needs(Feature::Fpu),
    Row::new(M::Fnstcw, "FSTCW/FNSTCW-Store x87 FPU Control Word", |_| Some(fnstcw)).needs(Feature::Fpu),
    Row::new(M::Fnstsw, "FSTSW/FNSTSW-Store x87 FPU Status Word", fnstsw).needs(Feature::Fpu),
    Row::new(M::Fnstenv, "FSTENV/FNSTENV-Store x87 FPU Environment", by_size::<StoreEnv>).needs(Feature::Fpu),
    Row::new(M::Fldenv, "FLDENV-Load x87 FPU Environment", by_size::<LoadEnv>).needs(Feature::Fpu),
    Row::new(M::Fnsave, "FSAVE/FNSAVE-Store x87 FPU State", by_size::<Save>).needs(Feature::Fpu),
    Row::new(M::Frstor, "FRSTOR-Restore x87 FPU State", by_size::<Restore>).needs(Feature::Fpu),
    Row::new(M::Fneni, "Intel 8087 Instructions That Do Nothing", |_| Some(nothing)).needs(Feature::Fpu),
    Row::new(M::Fndisi, "Intel 8087 Instructions That Do Nothing", |_| Some(nothing)).needs(Feature::Fpu),
    Row::new(M::Fnsetpm, "Intel 287 Instructions That Do Nothing", |_| Some(nothing)).needs(Feature::Fpu),
];

const EXCEPTIONS: u16 = 0x3f;
const SUMMARY: u16 = 0x8080;

/// Sets FSW.ES and B to what flags and masks say.
pub fn refresh_summary(fp: &mut FpState) {
    fp.fsw &= !SUMMARY;
    if fp.fsw & !fp.fcw & EXCEPTIONS != 0 {
        fp.fsw |= SUMMARY;
    }
}

/// As FNINIT leaves the x87 state; the registers keep their contents.
fn initialise(fp: &mut FpState) {
    turn(fp, fp.fsw >> 11 & 7, 0);
    (fp.fcw, fp.fsw, fp.ftw, fp.fop, fp.fip, fp.fdp) = (0x37f, 0, 0, 0, 0, 0);
}

/// The 16-bit tag word ("x87 FPU Tag Word").
pub fn full_tags(fp: &FpState) -> u16 {
    let top = usize::from(fp.fsw >> 11 & 7);
    (0..8).fold(0, |tags, physical| {
        let [mantissa, high] = fp.st[(physical + 8 - top) & 7];
        let exponent = high & 0x7fff;
        let tag = match () {
            _ if fp.ftw >> physical & 1 == 0 => 3,
            _ if exponent == 0 && mantissa == 0 => 1,
            _ if exponent == 0 || exponent == 0x7fff || mantissa >> 63 == 0 => 2,
            _ => 0,
        };
        tags | tag << (2 * physical)
    })
}

fn set_full_tags(fp: &mut FpState, tags: u16) {
    fp.ftw = (0..8).fold(0, |all, n| all | u8::from(tags >> (2 * n) & 3 != 3) << n);
}

fn nothing(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    c.check_x87_available()
}

fn fninit(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    c.check_x87_available()?;
    initialise(&mut c.s.fp);
    Ok(())
}

fn fnclex(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    c.check_x87_available()?;
    c.s.fp.fsw &= 0x7f00;
    Ok(())
}

fn fldcw(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    X87::ready(c)?;
    let value = c.load_operand::<u16>(bus, op)?;
    set_control(&mut c.s.fp, value as u16);
    Ok(())
}

/// Bit 6 reads as 1, other reserved bits as 0.
fn set_control(fp: &mut FpState, value: u16) {
    fp.fcw = value & 0x1f3f | 0x40;
    refresh_summary(fp);
}

fn fnstcw(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    c.check_x87_available()?;
    c.store_operand::<u16>(bus, op, u64::from(c.s.fp.fcw))
}

fn fnstsw(form: &mut Form) -> Option<ExecFn> {
    match form.dst {
        Loc::Reg => Some(|c, _, _| {
            c.check_x87_available()?;
            c.set_reg::<u16>(0, u64::from(c.s.fp.fsw));
            Ok(())
        }),
        Loc::Mem => Some(|c, bus, op| {
            c.check_x87_available()?;
            c.store_operand::<u16>(bus, op, u64::from(c.s.fp.fsw))
        }),
        _ => None,
    }
}

/// An instruction on the environment, with words of 2 or 4 bytes.
trait Environment: 'static {
    fn run<const WORD: usize>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow;
}
struct StoreEnv;
struct LoadEnv;
struct Save;
struct Restore;

fn by_size<E: Environment>(form: &mut Form) -> Option<ExecFn> {
    match form.bytes {
        14 | 94 => Some(E::run::<2>),
        28 | 108 => Some(E::run::<4>),
        _ => None,
    }
}

/// Seven words, as long as the longer format.
const ENV: usize = 28;
const STACK: usize = 80;

fn put<const WORD: usize>(image: &mut [u8], index: usize, value: u32) {
    image[index * WORD..][..WORD].copy_from_slice(&value.to_le_bytes()[..WORD]);
}

fn get<const WORD: usize>(image: &[u8], index: usize) -> u32 {
    let mut raw = [0; 4];
    raw[..WORD].copy_from_slice(&image[index * WORD..][..WORD]);
    u32::from_le_bytes(raw)
}

/// Real-address mode or virtual-8086 mode, which have formats of their own.
fn real_format(c: &Core) -> bool {
    c.s.is_real_mode() || c.s.is_v86()
}

fn write_env<const WORD: usize>(c: &Core, image: &mut [u8]) {
    let fp = &c.s.fp;
    // Reserved upper halves of the 32-bit format read as ones.
    let upper = if WORD == 4 { 0xffff_0000 } else { 0 };
    put::<WORD>(image, 0, u32::from(fp.fcw) | upper);
    put::<WORD>(image, 1, u32::from(fp.fsw) | upper);
    put::<WORD>(image, 2, u32::from(full_tags(fp)) | upper);
    let (fip, fdp, fop) = (fp.fip as u32, fp.fdp as u32, u32::from(fp.fop));
    if real_format(c) {
        put::<WORD>(image, 3, fip & 0xffff | upper);
        put::<WORD>(image, 4, fip >> 16 << 12 | fop);
        put::<WORD>(image, 5, fdp & 0xffff | upper);
        put::<WORD>(image, 6, fdp >> 16 << 12);
    } else {
        put::<WORD>(image, 3, fip);
        put::<WORD>(image, 4, if WORD == 4 { fop << 16 } else { 0 });
        put::<WORD>(image, 5, fdp);
        put::<WORD>(image, 6, upper);
    }
}

fn read_env<const WORD: usize>(c: &mut Core, image: &[u8]) {
    let real = real_format(c);
    let word = |n| get::<WORD>(image, n);
    let fp = &mut c.s.fp;
    fp.fsw = word(1) as u16;
    set_control(fp, word(0) as u16);
    set_full_tags(fp, word(2) as u16);
    if real {
        fp.fip = u64::from(word(4) >> 12 << 16 | word(3) & 0xffff);
        fp.fdp = u64::from(word(6) >> 12 << 16 | word(5) & 0xffff);
        fp.fop = (word(4) & 0x7ff) as u16;
    } else {
        fp.fip = u64::from(word(3));
        fp.fdp = u64::from(word(5));
        fp.fop = if WORD == 4 { (word(4) >> 16 & 0x7ff) as u16 } else { 0 };
    }
}

/// The stack order of [`FpState::st`] is by TOP: a new TOP renames registers, so they turn with it.
fn turn(fp: &mut FpState, old_top: u16, new_top: u16) {
    let by = usize::from(new_top.wrapping_sub(old_top) & 7);
    fp.st.rotate_left(by);
}

impl Environment for StoreEnv {
    fn run<const WORD: usize>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
        c.check_x87_available()?;
        let mut image = [0; ENV];
        write_env::<WORD>(c, &mut image);
        let lin = c.linear(op, 7 * WORD as u64, AccessKind::Write)?;
        c.write_bytes(bus, op, lin, &image[..7 * WORD])?;
        c.s.fp.fcw |= EXCEPTIONS;
        refresh_summary(&mut c.s.fp);
        Ok(())
    }
}

impl Environment for LoadEnv {
    fn run<const WORD: usize>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
        X87::ready(c)?;
        let mut image = [0; ENV];
        let lin = c.linear(op, 7 * WORD as u64, AccessKind::Read)?;
        c.read_bytes(bus, op, lin, &mut image[..7 * WORD])?;
        let old_top = c.s.fp.fsw >> 11 & 7;
        read_env::<WORD>(c, &image);
        let fp = &mut c.s.fp;
        turn(fp, old_top, fp.fsw >> 11 & 7);
        Ok(())
    }
}

impl Environment for Save {
    fn run<const WORD: usize>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
        c.check_x87_available()?;
        let mut image = [0; ENV + STACK];
        write_env::<WORD>(c, &mut image);
        for (slot, st) in image[7 * WORD..].chunks_exact_mut(10).zip(&c.s.fp.st) {
            slot[..8].copy_from_slice(&st[0].to_le_bytes());
            slot[8..].copy_from_slice(&st[1].to_le_bytes()[..2]);
        }
        let size = 7 * WORD + STACK;
        let lin = c.linear(op, size as u64, AccessKind::Write)?;
        c.write_bytes(bus, op, lin, &image[..size])?;
        initialise(&mut c.s.fp);
        Ok(())
    }
}

impl Environment for Restore {
    fn run<const WORD: usize>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
        X87::ready(c)?;
        let mut image = [0; ENV + STACK];
        let size = 7 * WORD + STACK;
        let lin = c.linear(op, size as u64, AccessKind::Read)?;
        c.read_bytes(bus, op, lin, &mut image[..size])?;
        read_env::<WORD>(c, &image);
        for (slot, st) in image[7 * WORD..size].chunks_exact(10).zip(&mut c.s.fp.st) {
            st[0] = u64::from_le_bytes(slot[..8].try_into().unwrap_or_default());
            st[1] = u64::from(u16::from_le_bytes([slot[8], slot[9]]));
        }
        Ok(())
    }
}
