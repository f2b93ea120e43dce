//! Hardware task switches ("Task Management", "Task Switching"): JMP, CALL and IRET to a TSS, task gates.
//!
//! Everything that can fault in the old task is read or checked before the first register changes. Later
//! faults, of the new task's segments, belong to the new task: they leave its return address in
//! [`Core::resume_at`].

use crate::core::Core;
use crate::frame::Frame;
use crate::op::{Flow, Stop};
use crate::segments::{ACCESSED, BUSY, selector_code, v86_segment};
use umbra_arch::control::Cr0;
use umbra_arch::descriptor::{Descriptor, system};
use umbra_arch::segment::{Seg, Segment};
use umbra_arch::state::reg;
use umbra_arch::{Bus, Fault, rflags};

/// What caused a switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// JMP.
    Jump,
    /// CALL: the new task is nested in the old one.
    Call,
    /// An interrupt or exception through a task gate, with the EXT bit for error codes: nested too.
    Event(u32),
    /// IRET with NT.
    Return,
}

impl Cause {
    fn nests(self) -> bool {
        matches!(self, Self::Call | Self::Event(_))
    }
    fn ext(self) -> u32 {
        if let Self::Event(ext) = self { ext } else { 0 }
    }
}

/// Where a TSS keeps what.
struct Layout {
    bytes: u64,
    last: u64,
    ip: u64,
    flags: u64,
    registers: u64,
    selectors: u64,
    /// Number of selectors from ES on; FS and GS aren't in a 16-bit TSS.
    segments: usize,
    ldt: u64,
}

const WIDE: Layout =
    Layout { bytes: 4, last: 0x67, ip: 0x20, flags: 0x24, registers: 0x28, selectors: 0x48, segments: 6, ldt: 0x60 };
const NARROW: Layout =
    Layout { bytes: 2, last: 0x2b, ip: 0x0e, flags: 0x10, registers: 0x12, selectors: 0x22, segments: 4, ldt: 0x2a };
const CR3_AT: u64 = 0x1c;
const TRAP_AT: u64 = 0x64;
/// DR7's local enables and LE, which a switch clears.
const LOCAL_ENABLES: u64 = 0x155;

fn layout(segment: &Segment) -> &'static Layout {
    if segment.attr.kind() & 8 != 0 { &WIDE } else { &NARROW }
}

/// What a TSS holds of a task.
struct Image {
    cr3: Option<u64>,
    ip: u64,
    flags: u64,
    registers: [u64; 8],
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl Core {
    /// JMP or CALL to a TSS or task gate `d` in the GDT; `back` is the next instruction.
    pub fn task_transfer(&mut self, bus: &mut dyn Bus, cause: Cause, selector: u16, d: Descriptor, back: u64) -> Flow {
        let code = selector_code(selector);
        let attr = d.attr();
        if attr.dpl() < self.s.cpl.max((selector & 3) as u8) {
            return self.raise(Fault::gp(code));
        }
        if attr.kind() == system::TASK_GATE {
            if !attr.is_present() {
                return self.raise(Fault::np(code));
            }
            return self.task_switch(bus, cause, (d.0 >> 16) as u16, back);
        }
        self.task_switch(bus, cause, selector, back)
    }

    /// IRET with NT: back to the task in the link field.
    pub fn task_return(&mut self, bus: &mut dyn Bus, back: u64) -> Flow {
        let link = self.read_system::<u16>(bus, self.s.segment(Seg::Tr).base)? as u16;
        self.task_switch(bus, Cause::Return, link, back)
    }

    /// Switches to the task of TSS `selector`; `back` is the old task's EIP.
    pub fn task_switch(&mut self, bus: &mut dyn Bus, cause: Cause, selector: u16, back: u64) -> Flow {
        let (new, d) = self.new_task(bus, cause, selector)?;
        let image = self.read_task(bus, &new)?;
        let paging = match image.cr3.filter(|_| self.s.cr0.pg()) {
            Some(cr3) => Some(self.cr3_effects(cr3)?),
            None => None,
        };
        let old = *self.s.segment(Seg::Tr);
        self.save_task(bus, &old, cause, back)?;
        if !cause.nests() {
            self.change_busy(bus, old.selector, false)?;
        }
        if cause.nests() {
            self.write_system::<u16>(bus, new.base, u64::from(old.selector))?;
        }
        if cause != Cause::Return {
            self.mark_descriptor(bus, selector, d, BUSY)?;
        }
        // From here on the new task runs.
        self.s.seg[Seg::Tr as usize] = Segment { attr: umbra_arch::segment::Attr(new.attr.0 | 2), ..new };
        if let Some(effects) = paging {
            self.commit(&effects);
        }
        self.load_task(bus, &image, cause)
    }

    /// Checks the TSS that is switched to.
    fn new_task(&mut self, bus: &mut dyn Bus, cause: Cause, selector: u16) -> Result<(Segment, Descriptor), Stop> {
        let code = selector_code(selector) | cause.ext();
        let refuse = if cause == Cause::Return { Fault::ts } else { Fault::gp };
        if selector & 4 != 0 || selector & 0xfffc == 0 {
            return self.raise(refuse(code));
        }
        let d = self.read_descriptor(bus, selector, refuse)?;
        let attr = d.attr();
        let fits = match attr.kind() {
            system::TSS_AVAILABLE | system::TSS16_AVAILABLE => cause != Cause::Return,
            system::TSS_BUSY | system::TSS16_BUSY => cause == Cause::Return,
            _ => false,
        };
        if attr.is_code_or_data() || !fits {
            return self.raise(refuse(code));
        }
        if !attr.is_present() {
            return self.raise(Fault::np(code));
        }
        let new = d.segment(selector);
        if u64::from(new.limit) < layout(&new).last {
            return self.raise(Fault::ts(code));
        }
        Ok((new, d))
    }

    fn read_field(&mut self, bus: &mut dyn Bus, at: u64, bytes: u64) -> Result<u64, Stop> {
        if bytes == 2 { self.read_system::<u16>(bus, at) } else { self.read_system::<u32>(bus, at) }
    }

    fn write_field(&mut self, bus: &mut dyn Bus, at: u64, bytes: u64, value: u64) -> Flow {
        if bytes == 2 { self.write_system::<u16>(bus, at, value) } else { self.write_system::<u32>(bus, at, value) }
    }

    fn read_task(&mut self, bus: &mut dyn Bus, tss: &Segment) -> Result<Image, Stop> {
        let l = layout(tss);
        let wide = l.bytes == 4;
        let mut image = Image {
            cr3: if wide { Some(self.read_field(bus, tss.base.wrapping_add(CR3_AT), 4)?) } else { None },
            ip: self.read_field(bus, tss.base.wrapping_add(l.ip), l.bytes)?,
            flags: self.read_field(bus, tss.base.wrapping_add(l.flags), l.bytes)?,
            registers: [0; 8],
            selectors: [0; 6],
            ldt: self.read_field(bus, tss.base.wrapping_add(l.ldt), 2)? as u16,
            trap: wide && self.read_field(bus, tss.base.wrapping_add(TRAP_AT), 2)? & 1 != 0,
        };
        for n in 0..8 {
            let at = tss.base.wrapping_add(l.registers + n as u64 * l.bytes);
            image.registers[n] = self.read_field(bus, at, l.bytes)?;
        }
        for n in 0..l.segments {
            let at = tss.base.wrapping_add(l.selectors + n as u64 * l.bytes);
            image.selectors[n] = self.read_field(bus, at, 2)? as u16;
        }
        Ok(image)
    }

    fn save_task(&mut self, bus: &mut dyn Bus, tss: &Segment, cause: Cause, back: u64) -> Flow {
        let l = layout(tss);
        if tss.attr.is_unusable() || u64::from(tss.limit) < l.last {
            return self.raise(Fault::ts(selector_code(tss.selector)));
        }
        let mut flags = self.rflags();
        if cause == Cause::Return {
            flags &= !rflags::NT;
        }
        self.write_field(bus, tss.base.wrapping_add(l.ip), l.bytes, back)?;
        self.write_field(bus, tss.base.wrapping_add(l.flags), l.bytes, flags)?;
        for n in 0..8 {
            let at = tss.base.wrapping_add(l.registers + n as u64 * l.bytes);
            self.write_field(bus, at, l.bytes, self.gpr[n])?;
        }
        for n in 0..l.segments {
            let at = tss.base.wrapping_add(l.selectors + n as u64 * l.bytes);
            self.write_field(bus, at, 2, u64::from(self.s.seg[n].selector))?;
        }
        Ok(())
    }

    fn change_busy(&mut self, bus: &mut dyn Bus, selector: u16, busy: bool) -> Flow {
        let d = self.read_descriptor(bus, selector, Fault::ts)?;
        let at = self.s.gdtr.base.wrapping_add(u64::from(selector & 0xfff8));
        self.write_system::<u64>(bus, at, if busy { d.0 | BUSY } else { d.0 & !BUSY })
    }

    /// Registers, then segments; the latter can fault in the new task.
    fn load_task(&mut self, bus: &mut dyn Bus, image: &Image, cause: Cause) -> Flow {
        let mut flags = image.flags;
        if cause.nests() {
            flags |= rflags::NT;
        }
        self.gpr[..8].copy_from_slice(&image.registers);
        self.s.cr0 = Cr0::new(self.s.cr0.raw() | Cr0::TS);
        self.s.dr7 &= !LOCAL_ENABLES;
        self.set_rflags(flags);
        self.watch.keep_rf = true;
        self.watch.no_step = true;
        self.next_rip = image.ip;
        self.break_block = true;
        self.check_events = true;
        self.debug_changed();
        if image.trap {
            self.s.pending_debug |= crate::debug::DR6_BT;
        }
        for (n, &selector) in image.selectors.iter().enumerate() {
            self.s.seg[n] = Segment::null(selector);
        }
        self.s.seg[Seg::Ldtr as usize] = Segment::null(image.ldt);
        self.s.cpl = if flags & rflags::VM != 0 { 3 } else { (image.selectors[Seg::Cs as usize] & 3) as u8 };
        let loaded = self.load_task_segments(bus, image);
        self.segments_changed();
        self.view_changed();
        if loaded == Err(Stop::Fault) {
            self.resume_at = Some(image.ip);
        }
        loaded
    }

    fn load_task_segments(&mut self, bus: &mut dyn Bus, image: &Image) -> Flow {
        self.load_task_ldt(bus, image.ldt)?;
        if self.s.is_v86() {
            for (n, &selector) in image.selectors.iter().enumerate() {
                self.s.seg[n] = v86_segment(selector);
            }
            return Ok(());
        }
        let cs = self.task_code_segment(bus, image.selectors[Seg::Cs as usize])?;
        self.s.seg[Seg::Cs as usize] = cs;
        let ss = self.stack_segment(bus, image.selectors[Seg::Ss as usize], self.s.cpl, Fault::ts)?;
        self.s.seg[Seg::Ss as usize] = ss;
        for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
            let selector = image.selectors[seg as usize];
            let loaded = self.data_segment_or(bus, selector, Fault::ts)?;
            self.s.seg[seg as usize] = loaded;
        }
        if image.ip > u64::from(cs.limit) {
            return self.raise(Fault::GP0);
        }
        Ok(())
    }

    fn load_task_ldt(&mut self, bus: &mut dyn Bus, selector: u16) -> Flow {
        if selector & 0xfffc == 0 {
            return Ok(());
        }
        let code = selector_code(selector);
        if selector & 4 != 0 {
            return self.raise(Fault::ts(code));
        }
        let d = self.read_descriptor(bus, selector, Fault::ts)?;
        let attr = d.attr();
        if attr.is_code_or_data() || attr.kind() != system::LDT || !attr.is_present() {
            return self.raise(Fault::ts(code));
        }
        self.s.seg[Seg::Ldtr as usize] = d.segment(selector);
        Ok(())
    }

    fn task_code_segment(&mut self, bus: &mut dyn Bus, selector: u16) -> Result<Segment, Stop> {
        let code = selector_code(selector);
        if selector & 0xfffc == 0 {
            return self.raise(Fault::ts(code));
        }
        let d = self.read_descriptor(bus, selector, Fault::ts)?;
        let (attr, rpl) = (d.attr(), (selector & 3) as u8);
        let allowed = if attr.is_conforming() { attr.dpl() <= rpl } else { attr.dpl() == rpl };
        if !attr.is_code() || !allowed {
            return self.raise(Fault::ts(code));
        }
        if !attr.is_present() {
            return self.raise(Fault::np(code));
        }
        self.mark_descriptor(bus, selector, d, ACCESSED)?;
        Ok(Descriptor(d.0 | ACCESSED).segment(selector))
    }

    /// An exception's error code on the new task's stack.
    pub fn push_task_code(&mut self, bus: &mut dyn Bus, code: u32) -> Flow {
        let bytes = layout(self.s.segment(Seg::Tr)).bytes;
        let mut frame = Frame::on_current_stack(self);
        let pushed = frame.push(self, bus, bytes, u64::from(code));
        if pushed == Err(Stop::Fault) {
            self.resume_at = Some(self.next_rip);
        }
        pushed?;
        frame.commit_pointer(self);
        debug_assert!(self.gpr[reg::RSP] >> 32 == 0);
        Ok(())
    }
}
