//! SIMD floating-point exceptions ("SIMD Floating-Point Exception Conditions") when some are unmasked.

use crate::exec::{Operands, Stub};
use crate::host_op::{HostOp, Outcome};
use umbra_arch::fpu::{FpState, MXCSR_MASK};

/// MXCSR bits.
const FLAGS: u32 = 0x3f;
const MASKS: u32 = 0x1f80;
const UNDERFLOW: u32 = 1 << 4;
const UNDERFLOW_MASK: u32 = 1 << 11;
const FLUSH_TO_ZERO: u32 = 1 << 15;
/// Denormals are zeros.
pub(crate) const DAZ: u32 = 1 << 6;
/// Invalid, denormal, divide by zero: signalled before anything is computed.
const BEFORE: u32 = 7;

/// The host can run with this MXCSR: no exception, no reserved bit.
#[inline(always)]
pub(crate) fn all_masked(mxcsr: u32) -> bool {
    mxcsr & (MASKS | !MXCSR_MASK) == MASKS
}

/// Runs on copies with everything masked, then decides.
#[cold]
pub(crate) fn run_careful(stub: &Stub, op: HostOp, o: Operands<'_>) -> Outcome {
    let guest = o.fp.mxcsr & MXCSR_MASK;
    let quiet = (guest | MASKS) & !FLAGS;
    let mut raised = 0;
    if guest & UNDERFLOW_MASK == 0 {
        // Unmasked, a tiny result underflows even when it is exact: flushing to zero shows every tiny result.
        let (fp, ..) = attempt(stub, op, &o, quiet | FLUSH_TO_ZERO);
        raised |= fp.mxcsr & UNDERFLOW;
    }
    let (mut fp, gpr, flags, mem) = attempt(stub, op, &o, quiet);
    raised |= fp.mxcsr & FLAGS;
    let unmasked = raised & !(guest >> 7);
    if unmasked & BEFORE != 0 {
        raised &= BEFORE;
    }
    if unmasked != 0 {
        o.fp.mxcsr = guest | raised;
        return Outcome::SimdException;
    }
    fp.mxcsr = guest | raised;
    (*o.fp, *o.gpr, *o.rflags, *o.mem) = (fp, gpr, flags, mem);
    Outcome::Done
}

fn attempt(stub: &Stub, op: HostOp, o: &Operands<'_>, mxcsr: u32) -> (FpState, [u64; 16], u64, crate::MemBuf) {
    let (mut fp, mut gpr, mut rflags, mut mem) = (*o.fp, *o.gpr, *o.rflags, *o.mem);
    fp.mxcsr = mxcsr;
    stub.run_vector(op, Operands { fp: &mut fp, gpr: &mut gpr, rflags: &mut rflags, mem: &mut mem });
    (fp, gpr, rflags, mem)
}
