//! Control and debug registers, TLB invalidation.

use super::Row;
use crate::by_wide;
use crate::core::Core;
use crate::decode::{Form, Loc};
use crate::op::{ExecFn, Flow, Op, Stop};
use crate::word::Word;
use iced_x86::{Code, Mnemonic as M, OpCodeOperandKind, Register};
use umbra_arch::control::{Cr0, Effects};
use umbra_arch::cpuid::Feature;
use umbra_arch::paging::AccessKind;
use umbra_arch::{Bus, Fault, Gpa, Gva};

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Mov, "MOV-Move to/from Control Registers", mov_cr)
        .only(|c| touches(c, OpCodeOperandKind::cr_reg))
        .ends(),
    Row::new(M::Mov, "MOV-Move to/from Debug Registers", mov_dr).only(|c| touches(c, OpCodeOperandKind::dr_reg)).ends(),
    Row::new(M::Lmsw, "LMSW-Load Machine Status Word", |f| {
        f.aux = u64::from(f.dst == Loc::Mem);
        Some(lmsw)
    })
    .ends(),
    Row::new(M::Smsw, "SMSW-Store Machine Status Word", |f| match f.dst {
        Loc::Reg => by_wide!(f.bytes, W => smsw_reg::<W>),
        _ => Some(smsw_mem),
    }),
    Row::new(M::Clts, "CLTS-Clear Task-Switched Flag in CR0", |_| Some(clts)).ends(),
    // Serialising, but there is nothing stale to get rid of: it ends no block.
    Row::new(M::Invlpg, "INVLPG-Invalidate TLB Entries", |_| Some(invlpg)),
    Row::new(M::Invpcid, "INVPCID-Invalidate Process-Context Identifier", |_| Some(invpcid))
        .needs(Feature::Invpcid)
        .ends(),
];

fn touches(code: Code, kind: OpCodeOperandKind) -> bool {
    let info = code.op_code();
    (0..info.op_count()).any(|n| info.op_kind(n) == kind)
}

impl Core {
    /// Ring 0, or #GP(0).
    pub fn need_ring0(&mut self) -> Flow {
        if self.s.cpl != 0 {
            return self.raise(Fault::GP0);
        }
        Ok(())
    }

    /// Runs a control-register write's pure rule.
    fn control_effects(
        &mut self,
        write: impl FnOnce(&Core, &mut dyn FnMut(Gpa) -> [u64; 4]) -> Result<Effects, Fault>,
    ) -> Result<Effects, Stop> {
        let mut read = |gpa: Gpa| {
            let mut raw = [0u8; 32];
            self.mem.read(gpa, &mut raw);
            std::array::from_fn(|i| u64::from_le_bytes(std::array::from_fn(|b| raw[8 * i + b])))
        };
        let effects = write(self, &mut read);
        self.check(effects)
    }

    fn control_write(
        &mut self,
        write: impl FnOnce(&Core, &mut dyn FnMut(Gpa) -> [u64; 4]) -> Result<Effects, Fault>,
    ) -> Flow {
        let effects = self.control_effects(write)?;
        self.commit(&effects);
        Ok(())
    }

    /// What loading CR3 from a TSS would do.
    pub fn cr3_effects(&mut self, value: u64) -> Result<Effects, Stop> {
        self.control_effects(|c, read| c.control_regs().write_cr3(value, &c.limits, read))
    }

    /// MOV to CR0 and relatives.
    pub fn write_cr0(&mut self, value: u64) -> Flow {
        self.control_write(|c, read| c.control_regs().write_cr0(value, c.code_context(), &c.limits, read))
    }
    /// MOV to CR3.
    pub fn write_cr3(&mut self, value: u64) -> Flow {
        self.control_write(|c, read| c.control_regs().write_cr3(value, &c.limits, read))
    }
    /// MOV to CR4.
    pub fn write_cr4(&mut self, value: u64) -> Flow {
        self.control_write(|c, read| c.control_regs().write_cr4(value, &c.limits, read))
    }
}

fn number(r: Register) -> Option<u8> {
    (r.is_cr() || r.is_dr()).then(|| r.number() as u8)
}

fn mov_cr(form: &mut Form) -> Option<ExecFn> {
    let i = form.i;
    let write = number(i.op0_register());
    let n = write.or_else(|| number(i.op1_register()))?;
    if !matches!(n, 0 | 2 | 3 | 4 | 8) {
        return None;
    }
    Some(if write.is_some() { to_cr } else { from_cr })
}

fn from_cr(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    c.need_ring0()?;
    let value = match op.src {
        0 => c.s.cr0.raw(),
        2 => c.s.cr2,
        3 => c.s.cr3.raw(),
        4 => c.s.cr4.raw(),
        _ => u64::from(bus.read_cr8()),
    };
    if op.legacy {
        c.set_reg::<u32>(op.dst, value)
    } else {
        c.set_reg::<u64>(op.dst, value)
    }
    Ok(())
}

fn to_cr(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    c.need_ring0()?;
    let value = if op.legacy { c.reg::<u32>(op.src) } else { c.reg::<u64>(op.src) };
    match op.dst {
        0 => c.write_cr0(value),
        2 => {
            c.s.cr2 = value;
            Ok(())
        }
        3 => c.write_cr3(value),
        4 => c.write_cr4(value),
        _ => {
            if value & !0xf != 0 {
                return c.raise(Fault::GP0);
            }
            let reply = bus.write_cr8(c.now(op.prefix), value as u8);
            c.settle(reply);
            c.check_events = true;
            Ok(())
        }
    }
}

fn mov_dr(form: &mut Form) -> Option<ExecFn> {
    let i = form.i;
    let write = number(i.op0_register());
    let n = write.or_else(|| number(i.op1_register()))?;
    (n < 8).then_some(if write.is_some() { to_dr } else { from_dr })
}

/// DR4 and DR5 are DR6 and DR7 unless CR4.DE makes them undefined.
fn debug_register(c: &mut Core, n: u8) -> Result<usize, Stop> {
    if matches!(n, 4 | 5) {
        if c.s.cr4.de() {
            return c.raise(Fault::UNDEFINED);
        }
        return Ok(usize::from(n) + 2);
    }
    c.need_ring0()?;
    Ok(usize::from(n))
}

fn from_dr(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let n = debug_register(c, op.src)?;
    c.need_ring0()?;
    c.general_detect()?;
    let value = match n {
        6 => c.s.dr6,
        7 => c.s.dr7,
        _ => c.s.dr[n & 3],
    };
    if op.legacy {
        c.set_reg::<u32>(op.dst, value)
    } else {
        c.set_reg::<u64>(op.dst, value)
    }
    Ok(())
}

fn to_dr(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    let n = debug_register(c, op.dst)?;
    c.need_ring0()?;
    c.general_detect()?;
    let value = if op.legacy { c.reg::<u32>(op.src) } else { c.reg::<u64>(op.src) };
    if n >= 6 && value >> 32 != 0 {
        return c.raise(Fault::GP0);
    }
    match n {
        6 => c.s.dr6 = value & 0xe00f | 0xffff_0ff0,
        7 => c.s.dr7 = value & 0xffff_2bff | 0x400,
        _ => c.s.dr[n & 3] = value,
    }
    c.debug_changed();
    Ok(())
}

fn lmsw(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    c.need_ring0()?;
    let value = if op.aux != 0 { c.load_operand::<u16>(bus, op)? } else { c.reg::<u16>(op.dst) };
    let old = c.s.cr0.raw();
    // PE can be set but not cleared.
    let new = old & !0xe | value & 0xf | old & Cr0::PE;
    c.write_cr0(new)
}

fn smsw_reg<W: Word>(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    c.check_umip()?;
    let value = c.s.cr0.raw();
    c.set_reg::<W>(op.dst, value);
    Ok(())
}

fn smsw_mem(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    c.check_umip()?;
    let value = c.s.cr0.raw();
    c.store_operand::<u16>(bus, op, value & 0xffff)
}

fn clts(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    c.need_ring0()?;
    c.s.cr0 = Cr0::new(c.s.cr0.raw() & !Cr0::TS);
    Ok(())
}

fn invlpg(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    c.need_ring0()?;
    let offset = c.effective(op);
    let lin = c.seg_base[op.seg as usize & 7].wrapping_add(offset);
    // A non-canonical address does nothing.
    if op.legacy {
        c.mmu.invlpg(Gva::new(lin & 0xffff_ffff));
    } else if Gva::new(lin).is_canonical(c.s.linear_bits()) {
        c.mmu.invlpg(Gva::new(lin));
    }
    Ok(())
}

fn invpcid(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    if !c.s.cr0.pe() {
        return c.raise(Fault::UNDEFINED);
    }
    c.need_ring0()?;
    let kind = if op.legacy { c.reg::<u32>(op.dst) } else { c.reg::<u64>(op.dst) };
    let lin = c.linear(op, 16, AccessKind::Read)?;
    let mut raw = [0u8; 16];
    c.read_bytes(bus, op, lin, &mut raw)?;
    let descriptor = u128::from_le_bytes(raw);
    let (pcid, address) = (descriptor as u64, (descriptor >> 64) as u64);
    let needs_pcid = matches!(kind, 0 | 1);
    if pcid > 0xfff || kind > 3 || needs_pcid && pcid != 0 && !c.s.cr4.pcide() {
        return c.raise(Fault::GP0);
    }
    if kind == 0 && !c.fits_register(address) {
        return c.raise(Fault::GP0);
    }
    c.mmu.invpcid(kind, pcid as u16, Gva::new(address));
    Ok(())
}
