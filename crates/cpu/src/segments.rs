//! Segment limits and types outside 64-bit mode, and loading segment registers.

use crate::core::Core;
use crate::loaded::{Place, Rules};
use crate::op::Stop;
use umbra_arch::descriptor::{Descriptor, system};
use umbra_arch::paging::AccessKind;
use umbra_arch::segment::{Seg, Segment};
use umbra_arch::{Bus, Fault};

/// What an access does with its segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SegmentUse {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch.
    Fetch,
}

impl SegmentUse {
    /// From the paging access kind.
    #[inline(always)]
    pub fn of(kind: AccessKind) -> Self {
        match kind {
            AccessKind::Read => Self::Read,
            AccessKind::Write => Self::Write,
            AccessKind::Fetch => Self::Fetch,
        }
    }
}

/// A selector's error code: index, TI; RPL replaced by 0.
pub const fn selector_code(selector: u16) -> u32 {
    (selector & 0xfffc) as u32
}

impl Core {
    /// Legacy-mode linear address with limit and type checks ("Limit Checking", "Type Checking").
    #[inline]
    pub fn segmented(&mut self, seg: u8, offset: u64, bytes: u64, usage: SegmentUse) -> Result<u64, Stop> {
        if self.seg_checked >> (seg & 7) & 1 != 0 {
            self.check_segment(seg, offset, bytes, usage)?;
        }
        Ok(self.seg_base[seg as usize & 7].wrapping_add(offset) & 0xffff_ffff)
    }

    fn check_segment(&mut self, seg: u8, offset: u64, bytes: u64, usage: SegmentUse) -> Result<(), Stop> {
        let s = &self.s.seg[seg as usize & 7];
        let attr = s.attr;
        let typed = !self.s.cr0.pe()
            || self.s.is_v86()
            || match usage {
                SegmentUse::Read => attr.is_readable(),
                SegmentUse::Write => attr.is_writable_data(),
                SegmentUse::Fetch => true,
            };
        let last = offset + (bytes.max(1) - 1);
        let inside = if attr.is_expand_down() {
            let top = if attr.is_big() { 0xffff_ffff } else { 0xffff };
            offset > u64::from(s.limit) && last <= top
        } else {
            last <= u64::from(s.limit)
        };
        if typed && inside && !attr.is_unusable() {
            return Ok(());
        }
        self.raise(if seg == Seg::Ss as u8 { Fault::SS0 } else { Fault::GP0 })
    }

    /// Linear address of the descriptor that `selector` names, with the table's limit checked for `bytes`.
    fn descriptor_address(&mut self, selector: u16, bytes: u64, fault: fn(u32) -> Fault) -> Result<u64, Stop> {
        let index = u64::from(selector & 0xfff8);
        let (base, limit) = if selector & 4 != 0 {
            let ldt = self.s.segment(Seg::Ldtr);
            if ldt.attr.is_unusable() {
                return self.raise(fault(selector_code(selector)));
            }
            (ldt.base, u64::from(ldt.limit))
        } else {
            (self.s.gdtr.base, u64::from(self.s.gdtr.limit))
        };
        if index + bytes - 1 > limit {
            return self.raise(fault(selector_code(selector)));
        }
        Ok(base.wrapping_add(index))
    }

    /// Reads the 8-byte descriptor of `selector`; outside the table raises `fault`.
    pub fn read_descriptor(
        &mut self,
        bus: &mut dyn Bus,
        selector: u16,
        fault: fn(u32) -> Fault,
    ) -> Result<Descriptor, Stop> {
        let at = self.descriptor_address(selector, 8, fault)?;
        Ok(Descriptor(self.read_system::<u64>(bus, at)?))
    }

    /// Reads a 16-byte system descriptor of IA-32e mode: both halves.
    pub fn read_descriptor16(
        &mut self,
        bus: &mut dyn Bus,
        selector: u16,
        fault: fn(u32) -> Fault,
    ) -> Result<(Descriptor, u64), Stop> {
        let at = self.descriptor_address(selector, 16, fault)?;
        let low = self.read_system::<u64>(bus, at)?;
        let high = self.read_system::<u64>(bus, at.wrapping_add(8))?;
        Ok((Descriptor(low), high))
    }

    /// Sets a descriptor's accessed or busy bit in memory if it isn't set ("Code- and Data-Segment Descriptor Types").
    pub fn mark_descriptor(&mut self, bus: &mut dyn Bus, selector: u16, d: Descriptor, bit: u64) -> Result<(), Stop> {
        if d.0 & bit == 0 {
            let at = self.descriptor_address(selector, 8, Fault::gp)?;
            self.write_system::<u64>(bus, at, d.0 | bit)?;
        }
        Ok(())
    }

    /// MOV to DS, ES, FS, GS or SS, POP and far pointer loads ("MOV-Move", "LDS/LES/LFS/LGS/LSS").
    pub fn load_segment(&mut self, bus: &mut dyn Bus, seg: Seg, selector: u16) -> Result<(), Stop> {
        if !self.s.cr0.pe() || self.s.is_v86() {
            let v86 = self.s.is_v86();
            let s = &mut self.s.seg[seg as usize];
            if v86 {
                *s = v86_segment(selector);
            } else {
                // Limit and attributes stay ("unreal mode").
                s.selector = selector;
                s.base = u64::from(selector) << 4;
            }
            self.segments_changed();
            return Ok(());
        }
        let loaded = if seg == Seg::Ss {
            self.stack_segment(bus, selector, self.s.cpl, Fault::gp)?
        } else {
            self.data_segment_or(bus, selector, Fault::gp)?
        };
        self.s.seg[seg as usize] = loaded;
        self.segments_changed();
        Ok(())
    }

    /// Checks and reads a segment for DS, ES, FS or GS; bad ones raise `fault` (#GP, or #TS in task switches).
    pub fn data_segment_or(
        &mut self,
        bus: &mut dyn Bus,
        selector: u16,
        fault: fn(u32) -> Fault,
    ) -> Result<Segment, Stop> {
        if selector & 0xfffc == 0 {
            return Ok(Segment::null(selector));
        }
        let code = selector_code(selector);
        let d = self.read_descriptor(bus, selector, fault)?;
        let attr = d.attr();
        let outer = self.s.cpl.max((selector & 3) as u8) > attr.dpl();
        if !attr.is_code_or_data() || !attr.is_readable() || !attr.is_conforming() && outer {
            return self.raise(fault(code));
        }
        if !attr.is_present() {
            return self.raise(Fault::np(code));
        }
        self.mark_descriptor(bus, selector, d, ACCESSED)?;
        Ok(Descriptor(d.0 | ACCESSED).segment(selector))
    }

    /// Checks and reads a stack segment for privilege level `cpl`; bad ones raise `fault` (#GP, or #TS on
    /// stack switches). A null selector is allowed in 64-bit mode below ring 3.
    #[inline(always)]
    pub fn stack_segment(
        &mut self,
        bus: &mut dyn Bus,
        selector: u16,
        cpl: u8,
        fault: fn(u32) -> Fault,
    ) -> Result<Segment, Stop> {
        if selector & 0xfffc == 0 {
            if self.s.is_64bit_code() && cpl < 3 && (selector & 3) as u8 == cpl {
                return Ok(Segment::null_stack(cpl));
            }
            return self.raise(fault(0));
        }
        let place = match self.loaded_before(selector, Rules::Stack(cpl)) {
            Some(place) => place,
            None => self.read_stack_segment(bus, selector, cpl, fault)?,
        };
        Ok(*self.loaded.at(place))
    }

    #[inline(never)]
    fn read_stack_segment(
        &mut self,
        bus: &mut dyn Bus,
        selector: u16,
        cpl: u8,
        fault: fn(u32) -> Fault,
    ) -> Result<Place, Stop> {
        let rpl = (selector & 3) as u8;
        let code = selector_code(selector);
        let d = self.read_descriptor(bus, selector, fault)?;
        let attr = d.attr();
        if rpl != cpl || !attr.is_writable_data() || attr.dpl() != cpl {
            return self.raise(fault(code));
        }
        if !attr.is_present() {
            return self.raise(Fault::ss(code));
        }
        self.mark_descriptor(bus, selector, d, ACCESSED)?;
        Ok(self.loads(selector, d, Rules::Stack(cpl)))
    }

    /// LLDT ("LLDT-Load Local Descriptor Table Register").
    pub fn load_ldt(&mut self, bus: &mut dyn Bus, selector: u16) -> Result<(), Stop> {
        if selector & 0xfffc == 0 {
            self.s.seg[Seg::Ldtr as usize] = Segment::null(selector);
            return Ok(());
        }
        let code = selector_code(selector);
        if selector & 4 != 0 {
            return self.raise(Fault::gp(code));
        }
        let segment = self.system_segment(bus, selector, |kind| kind == system::LDT)?.0;
        self.s.seg[Seg::Ldtr as usize] = segment;
        Ok(())
    }

    /// LTR ("LTR-Load Task Register"): the TSS becomes busy.
    pub fn load_tr(&mut self, bus: &mut dyn Bus, selector: u16) -> Result<(), Stop> {
        if selector & 0xfffc == 0 || selector & 4 != 0 {
            return self.raise(Fault::gp(selector_code(selector)));
        }
        let long = self.s.efer.lma();
        let fits = |kind| kind == system::TSS_AVAILABLE || !long && kind == system::TSS16_AVAILABLE;
        let (mut segment, d) = self.system_segment(bus, selector, fits)?;
        self.mark_descriptor(bus, selector, d, BUSY)?;
        segment.attr.0 |= 2;
        self.s.seg[Seg::Tr as usize] = segment;
        Ok(())
    }

    fn system_segment(
        &mut self,
        bus: &mut dyn Bus,
        selector: u16,
        fits: impl Fn(u8) -> bool,
    ) -> Result<(Segment, Descriptor), Stop> {
        let (d, high) = if self.s.efer.lma() {
            self.read_descriptor16(bus, selector, Fault::gp)?
        } else {
            (self.read_descriptor(bus, selector, Fault::gp)?, 0)
        };
        let attr = d.attr();
        let code = selector_code(selector);
        if attr.is_code_or_data() || !fits(attr.kind()) || high >> 40 & 0x1f != 0 {
            return self.raise(Fault::gp(code));
        }
        if !attr.is_present() {
            return self.raise(Fault::np(code));
        }
        let segment = d.segment64(high, selector);
        if self.s.efer.lma() && !self.fits_register(segment.base) {
            return self.raise(Fault::gp(code));
        }
        Ok((segment, d))
    }
}

/// The accessed bit of a code or data descriptor.
pub const ACCESSED: u64 = 1 << 40;
/// The busy bit of a TSS descriptor.
pub const BUSY: u64 = 1 << 41;

/// A segment register in virtual-8086 mode.
pub fn v86_segment(selector: u16) -> Segment {
    Segment { attr: umbra_arch::segment::Attr(0xf3), ..Segment::real(selector) }
}
