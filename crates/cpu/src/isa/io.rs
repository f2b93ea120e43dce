//! IN and OUT.

use super::Row;
use crate::core::Core;
use crate::decode::{Form, Loc};
use crate::op::{ExecFn, Flow, Op};
use crate::word::Word;
use iced_x86::Mnemonic as M;
use umbra_arch::segment::Seg;
use umbra_arch::state::reg;
use umbra_arch::{Bus, Fault};

/// The rows.
pub const ROWS: &[Row] =
    &[Row::new(M::In, "IN-Input From Port", input).ends(), Row::new(M::Out, "OUT-Output to Port", output).ends()];

impl Core {
    /// I/O permission: CPL <= IOPL, or the TSS's bit map ("I/O Permission Bit Map").
    pub fn check_port(&mut self, bus: &mut dyn Bus, port: u16, bytes: u64) -> Flow {
        self.check_port_rights(bus, port, bytes)?;
        if self.watch.ports {
            self.watch_port(port, bytes);
        }
        Ok(())
    }

    fn check_port_rights(&mut self, bus: &mut dyn Bus, port: u16, bytes: u64) -> Flow {
        let outer = u64::from(self.s.cpl) > self.s.rflags >> 12 & 3;
        if !self.s.cr0.pe() || !outer && !self.s.is_v86() {
            return Ok(());
        }
        let tr = *self.s.segment(Seg::Tr);
        let wide = tr.attr.kind() & 8 != 0;
        if !wide || tr.limit < 0x67 {
            return self.raise(Fault::GP0);
        }
        let map = self.read_system::<u16>(bus, tr.base.wrapping_add(0x66))?;
        let at = map + u64::from(port / 8);
        if at + 1 > u64::from(tr.limit) {
            return self.raise(Fault::GP0);
        }
        let bits = self.read_system::<u16>(bus, tr.base.wrapping_add(at))?;
        let wanted = ((1u64 << bytes) - 1) << (port & 7);
        if bits & wanted != 0 {
            return self.raise(Fault::GP0);
        }
        Ok(())
    }
}

/// `IMM`: the port is the immediate, else DX.
fn input(form: &mut Form) -> Option<ExecFn> {
    match (form.bytes, form.src == Loc::Imm) {
        (1, true) => Some(read::<u8, true>),
        (2, true) => Some(read::<u16, true>),
        (4, true) => Some(read::<u32, true>),
        (1, false) => Some(read::<u8, false>),
        (2, false) => Some(read::<u16, false>),
        (4, false) => Some(read::<u32, false>),
        _ => None,
    }
}

fn output(form: &mut Form) -> Option<ExecFn> {
    match (form.src_bytes, form.dst == Loc::Imm) {
        (1, true) => Some(write::<u8, true>),
        (2, true) => Some(write::<u16, true>),
        (4, true) => Some(write::<u32, true>),
        (1, false) => Some(write::<u8, false>),
        (2, false) => Some(write::<u16, false>),
        (4, false) => Some(write::<u32, false>),
        _ => None,
    }
}

fn read<W: Word, const IMM: bool>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let port = if IMM { op.imm as u8 as u16 } else { c.gpr[reg::RDX] as u16 };
    c.check_port(bus, port, W::BYTES)?;
    let reply = bus.port_read(c.now(op.prefix), port, W::ACCESS);
    let value = c.settle(reply);
    c.set_reg::<W>(0, u64::from(value));
    Ok(())
}

fn write<W: Word, const IMM: bool>(c: &mut Core, bus: &mut dyn Bus, op: &Op) -> Flow {
    let port = if IMM { op.imm as u8 as u16 } else { c.gpr[reg::RDX] as u16 };
    c.check_port(bus, port, W::BYTES)?;
    let value = c.reg::<W>(0) as u32;
    let reply = bus.port_write(c.now(op.prefix), port, W::ACCESS, value);
    c.settle(reply);
    Ok(())
}
