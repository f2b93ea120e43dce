//! Far branches, software interrupts and fast system calls.

use super::Row;
use super::branch::is_far;
use crate::core::Core;
use crate::decode::{Form, Loc};
use crate::deliver::Event;
use crate::far::Transfer;
use crate::op::{ExecFn, Flow, Op};
use iced_x86::{Code, Mnemonic as M, OpKind};
use umbra_arch::cpuid::{Feature, Vendor};
use umbra_arch::fault::vector;
use umbra_arch::paging::AccessKind;
use umbra_arch::segment::{Seg, Segment};
use umbra_arch::state::reg;
use umbra_arch::{Bus, Fault, Gva, rflags};

const INT: &str = "INT n/INTO/INT3/INT1-Call to Interrupt Procedure";
const IRET: &str = "IRET/IRETD/IRETQ-Interrupt Return";

/// The rows.
pub const ROWS: &[Row] = &[
    Row::new(M::Jmp, "JMP-Jump", far::<false>).only(is_far).ends(),
    Row::new(M::Call, "CALL-Call Procedure", far::<true>).only(is_far).ends(),
    Row::new(M::Retf, "RET-Return From Procedure", |f| {
        f.aux = match f.i.code() {
            Code::Retfw | Code::Retfw_imm16 => 2,
            Code::Retfd | Code::Retfd_imm16 => 4,
            _ => 8,
        };
        Some(|c, bus, op| c.far_return(bus, op, op.aux, op.imm & 0xffff))
    })
    .ends(),
    Row::new(M::Iret, IRET, |_| Some(|c, bus, op| c.interrupt_return(bus, op, 2))).ends(),
    Row::new(M::Iretd, IRET, |_| Some(|c, bus, op| c.interrupt_return(bus, op, 4))).ends(),
    Row::new(M::Iretq, IRET, |_| Some(|c, bus, op| c.interrupt_return(bus, op, 8))).ends(),
    Row::new(M::Int, INT, |_| Some(|c, bus, op| software(c, bus, op, Event::Software(op.imm as u8)))).ends(),
    Row::new(M::Int3, INT, |_| Some(|c, bus, op| software(c, bus, op, Event::Short(vector::BP)))).ends(),
    Row::new(M::Into, INT, |_| Some(into)).ends(),
    Row::new(M::Int1, INT, |_| Some(|c, bus, op| software(c, bus, op, Event::Icebp))).ends(),
    Row::new(M::Syscall, "SYSCALL-Fast System Call", |_| Some(syscall)).needs(Feature::Syscall).ends(),
    Row::new(M::Sysret, "SYSRET-Return From Fast System Call", |_| Some(sysret::<false>))
        .needs(Feature::Syscall)
        .ends(),
    Row::new(M::Sysretq, "SYSRET-Return From Fast System Call", |_| Some(sysret::<true>))
        .needs(Feature::Syscall)
        .ends(),
    Row::new(M::Sysenter, "SYSENTER-Fast System Call", |_| Some(sysenter)).needs(Feature::Sep).ends(),
    Row::new(M::Sysexit, "SYSEXIT-Fast Return from Fast System Call", |_| Some(sysexit::<false>))
        .needs(Feature::Sep)
        .ends(),
    Row::new(M::Sysexitq, "SYSEXIT-Fast Return from Fast System Call", |_| Some(sysexit::<true>))
        .needs(Feature::Sep)
        .ends(),
];

/// JMP and CALL through a far pointer: immediate (aux: selector << 8 | bytes) or in memory (aux: bytes).
fn far<const CALL: bool>(form: &mut Form) -> Option<ExecFn> {
    let i = form.i;
    match i.op0_kind() {
        OpKind::FarBranch16 | OpKind::FarBranch32 => {
            let bytes = if i.op0_kind() == OpKind::FarBranch16 { 2 } else { 4 };
            let offset = if bytes == 2 { u64::from(i.far_branch16()) } else { u64::from(i.far_branch32()) };
            form.aux = offset << 24 | u64::from(i.far_branch_selector()) << 8 | bytes;
            Some(|c, bus, op| {
                let selector = (op.aux >> 8) as u16;
                c.far_transfer(bus, op, transfer::<CALL>(), selector, op.aux >> 24, op.aux & 0xff)
            })
        }
        _ if form.dst == Loc::Mem => {
            form.aux = i.memory_size().size() as u64 - 2;
            Some(far_memory::<CALL>)
        }
        _ => None,
    }
}

const fn transfer<const CALL: bool>() -> Transfer {
    if CALL { Transfer::Call } else { Transfer::Jump }
}

fn far_memory<const CALL: bool>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let n = op.aux as usize;
    let lin = c.linear(op, op.aux + 2, AccessKind::Read)?;
    let mut raw = [0u8; 10];
    c.read_bytes(bus, op, lin, &mut raw[..n + 2])?;
    let selector = u16::from_le_bytes([raw[n], raw[n + 1]]);
    let mut offset = [0u8; 8];
    offset[..n].copy_from_slice(&raw[..n]);
    c.far_transfer(bus, op, transfer::<CALL>(), selector, u64::from_le_bytes(offset), op.aux)
}

fn software(c: &mut Core, bus: &mut dyn Bus, op: &Op, event: Event) -> Flow {
    let back = op.next_rip(c.block_rip);
    c.software_interrupt(bus, event, back)
}

fn into(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    if c.flags.of() { software(c, bus, op, Event::Short(vector::OF)) } else { Ok(()) }
}

/// Segments that SYSCALL and SYSENTER load without looking at descriptors.
fn flat(c: &mut Core, cs: Segment, ss: u16, cpl: u8) {
    c.s.seg[Seg::Cs as usize] = cs;
    c.s.seg[Seg::Ss as usize] = Segment::flat_data(ss, cpl);
    c.s.cpl = cpl;
    c.segments_changed();
    c.view_changed();
    c.break_block = true;
}

fn syscall(c: &mut Core, _: &mut dyn Bus, op: &Op) -> Flow {
    // Intel: only in 64-bit mode. AMD: in compatibility mode too, by CSTAR.
    let wide = c.s.is_64bit_code();
    if !c.s.efer.sce() || !(wide || c.s.efer.lma() && c.profile.vendor == Vendor::Amd) {
        return c.raise(Fault::UNDEFINED);
    }
    c.gpr[reg::RCX] = op.next_rip(c.block_rip);
    let flags = c.rflags() & !rflags::RF;
    c.gpr[11] = flags;
    let target = if wide { c.s.msr.lstar } else { c.s.msr.cstar };
    let selector = (c.s.msr.star >> 32) as u16 & 0xfffc;
    c.set_rflags(flags & !c.s.msr.fmask);
    flat(c, Segment::code64(selector, 0), selector.wrapping_add(8), 0);
    c.next_rip = target;
    c.trap_pending = c.s.rflags & rflags::TF != 0;
    Ok(())
}

fn sysret<const WIDE: bool>(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    if !c.s.efer.sce() || !c.s.is_64bit_code() {
        return c.raise(Fault::UNDEFINED);
    }
    if c.s.cpl != 0 {
        return c.raise(Fault::GP0);
    }
    let rip = if WIDE { c.gpr[reg::RCX] } else { c.gpr[reg::RCX] & 0xffff_ffff };
    if !Gva::new(rip).is_canonical(c.s.linear_bits()) {
        return c.raise(Fault::GP0);
    }
    let base = (c.s.msr.star >> 48) as u16;
    let cs = if WIDE { Segment::code64(base.wrapping_add(16) | 3, 3) } else { Segment::flat_code32(base | 3, 3) };
    let flags = c.gpr[11] & (rflags::WRITABLE & !(rflags::RF | rflags::VM));
    c.set_rflags(flags);
    flat(c, cs, base.wrapping_add(8) | 3, 3);
    c.next_rip = rip;
    c.trap_pending = c.s.rflags & rflags::TF != 0;
    Ok(())
}

fn sysenter(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    let selector = c.s.msr.sysenter_cs as u16 & 0xfffc;
    if !c.s.cr0.pe() || selector == 0 {
        return c.raise(Fault::GP0);
    }
    let long = c.s.efer.lma();
    c.set_rflags(c.rflags() & !(rflags::VM | rflags::IF | rflags::RF));
    let cs = if long { Segment::code64(selector, 0) } else { Segment::flat_code32(selector, 0) };
    flat(c, cs, selector.wrapping_add(8), 0);
    let (esp, eip) = (c.s.msr.sysenter_esp, c.s.msr.sysenter_eip);
    c.gpr[reg::RSP] = if long { esp } else { esp & 0xffff_ffff };
    c.next_rip = if long { eip } else { eip & 0xffff_ffff };
    Ok(())
}

fn sysexit<const WIDE: bool>(c: &mut Core, _: &mut dyn Bus, _: &Op) -> Flow {
    let base = c.s.msr.sysenter_cs as u16 & 0xfffc;
    if !c.s.cr0.pe() || base == 0 || c.s.cpl != 0 {
        return c.raise(Fault::GP0);
    }
    let (rip, rsp) = (c.gpr[reg::RDX], c.gpr[reg::RCX]);
    let bits = c.s.linear_bits();
    if WIDE && !(Gva::new(rip).is_canonical(bits) && Gva::new(rsp).is_canonical(bits)) {
        return c.raise(Fault::GP0);
    }
    let (cs, ss) = if WIDE {
        (Segment::code64(base.wrapping_add(32) | 3, 3), base.wrapping_add(40) | 3)
    } else {
        (Segment::flat_code32(base.wrapping_add(16) | 3, 3), base.wrapping_add(24) | 3)
    };
    flat(c, cs, ss, 3);
    c.gpr[reg::RSP] = if WIDE { rsp } else { rsp & 0xffff_ffff };
    c.next_rip = if WIDE { rip } else { rip & 0xffff_ffff };
    Ok(())
}
