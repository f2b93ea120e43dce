//! Segment registers, descriptor tables and selector checks.

use super::Row;
use crate::by_wide;
use crate::core::{CodeSize, Core};
use crate::decode::{Form, Loc};
use crate::op::{ExecFn, Flow, Op, Stop};
use crate::segments::selector_code;
use crate::word::Word;
use iced_x86::{Code, Mnemonic as M, OpCodeOperandKind};
use umbra_arch::cpuid::Feature;
use umbra_arch::paging::AccessKind;
use umbra_arch::segment::{Attr, Seg, TableRegister};
use umbra_arch::state::Shadow;
use umbra_arch::{Bus, Fault};

const LDS: &str = "LDS/LES/LFS/LGS/LSS-Load Far Pointer";
const VERR: &str = "VERR/VERW-Verify a Segment for Reading or Writing";

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Mov, "MOV-Move", mov_from).only(|c| touches_segment(c) && !loads_segment(c)),
    Row::new(M::Mov, "MOV-Move", mov_to).only(loads_segment).ends(),
    Row::new(M::Lds, LDS, load_far::<3>).ends(),
    Row::new(M::Les, LDS, load_far::<0>).ends(),
    Row::new(M::Lfs, LDS, load_far::<4>).ends(),
    Row::new(M::Lgs, LDS, load_far::<5>).ends(),
    Row::new(M::Lss, LDS, load_far::<2>).ends(),
    Row::new(M::Lgdt, "LGDT/LIDT-Load Global/Interrupt Descriptor Table Register", table::<LGDT>).ends(),
    Row::new(M::Lidt, "LGDT/LIDT-Load Global/Interrupt Descriptor Table Register", table::<LIDT>).ends(),
    Row::new(M::Sgdt, "SGDT-Store Global Descriptor Table Register", table::<SGDT>),
    Row::new(M::Sidt, "SIDT-Store Interrupt Descriptor Table Register", table::<SIDT>),
    Row::new(M::Lldt, "LLDT-Load Local Descriptor Table Register", |f| selector_operand::<LLDT>(f)).ends(),
    Row::new(M::Ltr, "LTR-Load Task Register", |f| selector_operand::<LTR>(f)).ends(),
    Row::new(M::Verr, VERR, |f| selector_operand::<VERR_OP>(f)),
    Row::new(M::Verw, VERR, |f| selector_operand::<VERW_OP>(f)),
    Row::new(M::Sldt, "SLDT-Store Local Descriptor Table Register", |f| store_selector::<6>(f)),
    Row::new(M::Str, "STR-Store Task Register", |f| store_selector::<7>(f)),
    Row::new(M::Lar, "LAR-Load Access Rights Byte", lar_lsl::<true>),
    Row::new(M::Lsl, "LSL-Load Segment Limit", lar_lsl::<false>),
    Row::new(M::Arpl, "ARPL-Adjust RPL Field of Segment Selector", |f| match f.dst {
        Loc::Reg => Some(arpl_reg),
        Loc::Mem => Some(arpl_mem),
        _ => None,
    }),
    Row::new(M::Rdfsbase, "RDFSBASE/RDGSBASE-Read FS/GS Segment Base", |f| by_wide!(f.bytes, W => read_base::<W, 4>))
        .needs(Feature::Fsgsbase),
    Row::new(M::Rdgsbase, "RDFSBASE/RDGSBASE-Read FS/GS Segment Base", |f| by_wide!(f.bytes, W => read_base::<W, 5>))
        .needs(Feature::Fsgsbase),
    Row::new(M::Wrfsbase, "WRFSBASE/WRGSBASE-Write FS/GS Segment Base", |f| by_wide!(f.bytes, W => write_base::<W, 4>))
        .needs(Feature::Fsgsbase),
    Row::new(M::Wrgsbase, "WRFSBASE/WRGSBASE-Write FS/GS Segment Base", |f| by_wide!(f.bytes, W => write_base::<W, 5>))
        .needs(Feature::Fsgsbase),
    Row::new(M::Swapgs, "SWAPGS-Swap GS Base Register", |_| Some(swapgs)),
];

fn touches_segment(code: Code) -> bool {
    let info = code.op_code();
    (0..info.op_count()).any(|n| info.op_kind(n) == OpCodeOperandKind::seg_reg)
}

fn loads_segment(code: Code) -> bool {
    code.op_code().op_kind(0) == OpCodeOperandKind::seg_reg
}

/// Segment register with encoding `n`.
pub fn seg_of(n: u8) -> Seg {
    Seg::USER[usize::from(n).min(5)]
}

fn mov_from(form: &mut Form) -> Option<ExecFn> {
    match form.dst {
        Loc::Reg => by_wide!(form.bytes, W => |c: &mut Core, _: &mut dyn Bus, op: &Op| {
            let value = u64::from(c.s.seg[op.src as usize & 7].selector);
            c.set_reg::<W>(op.dst, value);
            Ok(())
        }),
        Loc::Mem => Some(|c, bus, op| {
            let value = u64::from(c.s.seg[op.src as usize & 7].selector);
            c.store_operand::<u16>(bus, op, value)
        }),
        _ => None,
    }
}

fn mov_to(form: &mut Form) -> Option<ExecFn> {
    // MOV to CS is undefined.
    if form.i.op0_register() == iced_x86::Register::CS {
        return None;
    }
    match form.src {
        Loc::Reg => Some(|c, bus, op| {
            let selector = c.reg::<u16>(op.src) as u16;
            load(c, bus, seg_of(op.dst), selector)
        }),
        Loc::Mem => Some(|c, bus, op| {
            let selector = c.load_operand::<u16>(bus, op)? as u16;
            load(c, bus, seg_of(op.dst), selector)
        }),
        _ => None,
    }
}

fn load(c: &mut Core, bus: &mut dyn Bus, seg: Seg, selector: u16) -> Flow {
    c.load_segment(bus, seg, selector)?;
    if seg == Seg::Ss {
        c.shadow_next = Shadow::MovSs;
        c.check_events = true;
    }
    Ok(())
}

fn load_far<const SEG: u8>(form: &mut Form) -> Option<ExecFn> {
    if form.src != Loc::Mem {
        return None;
    }
    by_wide!(form.bytes, W => far_pointer::<W, SEG>)
}

fn far_pointer<W: Word, const SEG: u8>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let n = W::BYTES as usize;
    let lin = c.linear(op, W::BYTES + 2, AccessKind::Read)?;
    let mut raw = [0u8; 10];
    c.read_bytes(bus, op, lin, &mut raw[..n + 2])?;
    let selector = u16::from_le_bytes([raw[n], raw[n + 1]]);
    let mut offset = [0u8; 8];
    offset[..n].copy_from_slice(&raw[..n]);
    load(c, bus, seg_of(SEG), selector)?;
    c.set_reg::<W>(op.dst, u64::from_le_bytes(offset));
    Ok(())
}

const LGDT: u8 = 0;
const LIDT: u8 = 1;
const SGDT: u8 = 2;
const SIDT: u8 = 3;

/// LGDT, LIDT, SGDT, SIDT; aux: bytes of the base as moved.
fn table<const KIND: u8>(form: &mut Form) -> Option<ExecFn> {
    let operand16 = matches!(form.i.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16);
    form.aux = match form.size {
        CodeSize::Bits64 => 8,
        _ if operand16 => 3,
        _ => 4,
    };
    Some(if KIND <= LIDT { load_table::<KIND> } else { store_table::<KIND> })
}

fn load_table<const KIND: u8>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    if c.s.cpl != 0 {
        return c.raise(Fault::GP0);
    }
    let n = if op.aux == 8 { 8 } else { 4 };
    let lin = c.linear(op, n as u64 + 2, AccessKind::Read)?;
    let mut raw = [0u8; 10];
    c.read_bytes(bus, op, lin, &mut raw[..n + 2])?;
    let mut base = [0u8; 8];
    base[..n].copy_from_slice(&raw[2..n + 2]);
    let mut base = u64::from_le_bytes(base);
    if op.aux == 3 {
        base &= 0xff_ffff;
    }
    if op.aux == 8 && !c.fits_register(base) {
        return c.raise(Fault::GP0);
    }
    let register = TableRegister { base, limit: u16::from_le_bytes([raw[0], raw[1]]) };
    if KIND == LGDT {
        c.s.gdtr = register
    } else {
        c.s.idtr = register
    }
    Ok(())
}

fn store_table<const KIND: u8>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    c.check_umip()?;
    let register = if KIND == SGDT { c.s.gdtr } else { c.s.idtr };
    let n = if op.aux == 8 { 8 } else { 4 };
    let lin = c.linear(op, n as u64 + 2, AccessKind::Write)?;
    let mut raw = [0u8; 10];
    raw[..2].copy_from_slice(&register.limit.to_le_bytes());
    raw[2..n + 2].copy_from_slice(&register.base.to_le_bytes()[..n]);
    c.write_bytes(bus, op, lin, &raw[..n + 2])
}

impl Core {
    /// CR4.UMIP: SGDT, SIDT, SLDT, SMSW and STR outside ring 0 are #GP(0).
    pub fn check_umip(&mut self) -> Flow {
        if self.s.cr4.umip() && self.s.cpl > 0 {
            return self.raise(Fault::GP0);
        }
        Ok(())
    }

    /// System-segment instructions exist only in protected mode.
    fn need_protected(&mut self) -> Flow {
        if !self.s.cr0.pe() || self.s.is_v86() {
            return self.raise(Fault::UNDEFINED);
        }
        Ok(())
    }
}

const LLDT: u8 = 0;
const LTR: u8 = 1;
const VERR_OP: u8 = 2;
const VERW_OP: u8 = 3;

fn selector_operand<const KIND: u8>(form: &mut Form) -> Option<ExecFn> {
    match form.dst {
        Loc::Reg => Some(|c, bus, op| {
            let selector = c.reg::<u16>(op.dst) as u16;
            with_selector::<KIND>(c, bus, selector)
        }),
        Loc::Mem => Some(|c, bus, op| {
            c.need_protected()?;
            // Privilege is checked before the operand is read.
            if KIND <= LTR && c.s.cpl != 0 {
                return c.raise(Fault::GP0);
            }
            let selector = c.load_operand::<u16>(bus, op)? as u16;
            with_selector::<KIND>(c, bus, selector)
        }),
        _ => None,
    }
}

fn with_selector<const KIND: u8>(c: &mut Core, bus: &mut dyn Bus, selector: u16) -> Flow {
    c.need_protected()?;
    if KIND <= LTR && c.s.cpl != 0 {
        return c.raise(Fault::GP0);
    }
    match KIND {
        LLDT => c.load_ldt(bus, selector),
        LTR => c.load_tr(bus, selector),
        _ => {
            let found = visible(c, bus, selector)?;
            let ok = found.is_some_and(|(attr, _)| {
                attr.is_code_or_data() && if KIND == VERR_OP { attr.is_readable() } else { attr.is_writable_data() }
            });
            c.flags.set_zf(ok);
            Ok(())
        }
    }
}

/// The descriptor of `selector` if it exists and CPL and RPL may look at it; never a #GP for the selector.
fn visible(c: &mut Core, bus: &mut dyn Bus, selector: u16) -> Result<Option<(Attr, u32)>, Stop> {
    if selector & 0xfffc == 0 {
        return Ok(None);
    }
    let d = match c.read_descriptor(bus, selector, Fault::gp) {
        Ok(d) => d,
        Err(Stop::Fault) if c.fault == Fault::gp(selector_code(selector)) => return Ok(None),
        Err(stop) => return Err(stop),
    };
    let attr = d.attr();
    let outer = c.s.cpl.max((selector & 3) as u8) > attr.dpl();
    Ok((attr.is_conforming() || !outer).then_some((attr, d.limit())))
}

fn store_selector<const SEG: usize>(form: &mut Form) -> Option<ExecFn> {
    match form.dst {
        Loc::Reg => by_wide!(form.bytes, W => |c: &mut Core, _: &mut dyn Bus, op: &Op| {
            c.need_protected()?;
            c.check_umip()?;
            let value = u64::from(c.s.seg[SEG].selector);
            c.set_reg::<W>(op.dst, value);
            Ok(())
        }),
        Loc::Mem => Some(|c, bus, op| {
            c.need_protected()?;
            c.check_umip()?;
            let value = u64::from(c.s.seg[SEG].selector);
            c.store_operand::<u16>(bus, op, value)
        }),
        _ => None,
    }
}

fn lar_lsl<const RIGHTS: bool>(form: &mut Form) -> Option<ExecFn> {
    form.aux = u64::from(form.src == Loc::Mem);
    by_wide!(form.bytes, W => rights_or_limit::<W, RIGHTS>)
}

fn rights_or_limit<W: Word, const RIGHTS: bool>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    c.need_protected()?;
    let selector = if op.aux != 0 { c.load_operand::<u16>(bus, op)? } else { c.reg::<u16>(op.src) } as u16;
    let found = visible(c, bus, selector)?;
    let long = c.s.efer.lma();
    let allowed = |attr: Attr| {
        attr.is_code_or_data()
            || match attr.kind() {
                2 | 9 | 0xb => true,
                1 | 3 => !long,
                4 | 5 => RIGHTS && !long,
                0xc => RIGHTS,
                _ => false,
            }
    };
    match found.filter(|(attr, _)| allowed(*attr)) {
        Some((attr, limit)) => {
            let value = if RIGHTS { u64::from(attr.0) << 8 & 0xf0_ff00 } else { u64::from(limit) };
            c.set_reg::<W>(op.dst, value & W::MASK);
            c.flags.set_zf(true);
        }
        None => c.flags.set_zf(false),
    }
    Ok(())
}

fn adjusted(old: u64, rpl: u64) -> (u64, bool) {
    if old & 3 < rpl & 3 { (old & !3 | rpl & 3, true) } else { (old, false) }
}

fn arpl_reg(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    c.need_protected()?;
    let (new, changed) = adjusted(c.reg::<u16>(op.dst), c.reg::<u16>(op.src));
    c.set_reg::<u16>(op.dst, new);
    c.flags.set_zf(changed);
    Ok(())
}

fn arpl_mem(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    c.need_protected()?;
    let rpl = c.reg::<u16>(op.src);
    // Written only if it changes: a read-only operand whose RPL suffices is no fault.
    let (new, changed) = adjusted(c.load_operand::<u16>(bus, op)?, rpl);
    if changed {
        c.store_operand::<u16>(bus, op, new)?;
    }
    c.flags.set_zf(changed);
    Ok(())
}

fn need_fsgsbase(c: &mut Core) -> Flow {
    if !c.s.is_64bit_code() || !c.s.cr4.fsgsbase() {
        return c.raise(Fault::UNDEFINED);
    }
    Ok(())
}

fn read_base<W: Word, const SEG: usize>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    need_fsgsbase(c)?;
    let base = c.s.seg[SEG].base;
    c.set_reg::<W>(op.dst, base);
    Ok(())
}

fn write_base<W: Word, const SEG: usize>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    need_fsgsbase(c)?;
    let base = c.reg::<W>(op.dst);
    if !c.fits_register(base) {
        return c.raise(Fault::GP0);
    }
    c.set_segment_base(SEG, base);
    Ok(())
}

impl Core {
    /// Replaces the base of FS or GS.
    pub fn set_segment_base(&mut self, seg: usize, base: u64) {
        self.s.seg[seg].base = base;
        self.seg_base[seg] = base;
    }
}

fn swapgs(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    if !c.s.is_64bit_code() {
        return c.raise(Fault::UNDEFINED);
    }
    if c.s.cpl != 0 {
        return c.raise(Fault::GP0);
    }
    let gs = Seg::Gs as usize;
    let base = c.s.seg[gs].base;
    c.set_segment_base(gs, c.s.msr.kernel_gs_base);
    c.s.msr.kernel_gs_base = base;
    Ok(())
}
