//! x87 computations, loads and stores: all run by the host. Control instructions are in [`x87_env`](super::x87_env).

use super::Row;
use super::host_data::{host_rows, select};
use iced_x86::Mnemonic as M;

/// The rows.
pub const ROWS: &[Row] = host_rows! {
    F2xm1 Fabs Fadd Faddp Fbld Fbstp Fchs Fcmovb Fcmovbe Fcmove Fcmovnb Fcmovnbe Fcmovne Fcmovnu Fcmovu Fcom
    Fcomi Fcomip Fcomp Fcompp Fcos Fdecstp Fdiv Fdivp Fdivr Fdivrp Ffree Ffreep Fiadd Ficom Ficomp Fidiv
    Fidivr Fild Fimul Fincstp Fist Fistp Fisttp Fisub Fisubr Fld Fld1 Fldl2e Fldl2t Fldlg2 Fldln2 Fldpi Fldz
    Fmul Fmulp Fnop Fpatan Fprem Fprem1 Fptan Frndint Fscale Fsin Fsincos Fsqrt Fst Fstp Fstpnce Fsub Fsubp
    Fsubr Fsubrp Ftst Fucom Fucomi Fucomip Fucomp Fucompp Fxam Fxch Fxtract Fyl2x Fyl2xp1
};
