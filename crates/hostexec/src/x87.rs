//! x87 instructions: on an FXSAVE image of their own. Exceptions are masked, but for overflow and underflow, whose
//! unmasked response is a result of its own; none is delivered, since no waiting instruction follows before FNINIT.

use crate::exec::{Operands, Stub};
use crate::host_op::{HostOp, Outcome};
use umbra_arch::fpu::FpState;
use umbra_arch::rflags;

/// FSW: exception flags, stack fault.
const FLAGS: u16 = 0x3f;
const STACK_FAULT: u16 = 1 << 6;
/// FSW: error summary and busy.
const SUMMARY: u16 = 0x8080;
const C1: u16 = 1 << 9;
/// FSW: condition codes and TOP.
const CODES_AND_TOP: u16 = 0x7f00;
/// Invalid, denormal, divide by zero: signalled before anything is computed.
const BEFORE: u16 = 7;
/// Overflow, underflow.
const RANGE: u16 = 0x18;

/// What FXRSTOR and FXSAVE work on. The XMM part is scratch.
#[derive(Default)]
pub(crate) struct Image(FpState);

impl Image {
    /// MXCSR_MASK of the host ("Guidelines for Writing to the MXCSR Register").
    pub(crate) fn mxcsr_mask(&mut self) -> u32 {
        self.0.mxcsr_mask = 0;
        // SAFETY: the image is 512 bytes and aligned to 64; every x86-64 CPU has FXSAVE.
        unsafe { std::arch::x86_64::_fxsave64(std::ptr::from_mut(&mut self.0).cast()) };
        if self.0.mxcsr_mask == 0 { 0xffbf } else { self.0.mxcsr_mask }
    }

    fn load(&mut self, fp: &FpState) {
        let image = &mut self.0;
        image.fcw = fp.fcw | (FLAGS & !RANGE);
        image.fsw = fp.fsw & CODES_AND_TOP;
        image.ftw = fp.ftw;
        image.st = fp.st;
    }
}

/// Runs an x87 instruction. Only FSW's exception part changes if an unmasked exception comes before the
/// computation, or a store goes out of range unmasked.
pub(crate) fn run(stub: &Stub, op: HostOp, image: &mut Image, o: Operands<'_>) -> Outcome {
    let mut mem = *o.mem;
    image.load(o.fp);
    let flags = stub.call(op, &mut image.0, o.gpr, *o.rflags & rflags::STATUS, &mut mem);
    let new = &image.0;
    let mut raised = new.fsw & (FLAGS | STACK_FAULT);
    let unmasked = raised & !o.fp.fcw & FLAGS;
    let before = unmasked & BEFORE != 0;
    if before || (unmasked & RANGE != 0 && stub.stores) {
        if before {
            raised &= BEFORE | STACK_FAULT;
        }
        if raised & STACK_FAULT != 0 {
            o.fp.fsw = o.fp.fsw & !C1 | new.fsw & C1;
        }
        o.fp.fsw |= raised | SUMMARY;
        return Outcome::Suppressed;
    }
    let sticky = o.fp.fsw & (FLAGS | STACK_FAULT | SUMMARY);
    o.fp.fsw = new.fsw & CODES_AND_TOP | sticky | raised;
    if unmasked != 0 {
        o.fp.fsw |= SUMMARY;
    }
    o.fp.ftw = new.ftw;
    o.fp.st = new.st;
    *o.mem = mem;
    stub.merge_flags(o.rflags, flags);
    Outcome::Done
}
