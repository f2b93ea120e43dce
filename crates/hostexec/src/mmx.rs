//! "Effect of MMX, x87 FPU, FXSAVE, and FXRSTOR Instructions on the x87 FPU Tag Word".

use umbra_arch::fpu::FpState;

/// TOP becomes 0 and every register valid. MMX registers are physical ones, while [`FpState::st`] is in stack
/// order: it rotates with TOP.
#[inline(always)]
pub(crate) fn enter(fp: &mut FpState) {
    let top = (fp.fsw >> 11 & 7) as usize;
    if top != 0 {
        fp.st.rotate_right(top);
        fp.fsw &= !(7 << 11);
    }
    fp.ftw = 0xff;
}
