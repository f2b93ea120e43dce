//! Codes that aren't compared natively, with the reason.

use iced_x86::{Code, Mnemonic};

/// Why a code can't be compared with the host; `None` if it is.
pub fn reason(code: Code) -> Option<&'static str> {
    use Mnemonic::*;
    let fs = code.op_code().op_kinds().contains(&iced_x86::OpCodeOperandKind::fs);
    if matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
    ) {
        return Some("a no-op on Intel's processors, undefined on AMD's");
    }
    Some(match code.mnemonic() {
        Push | Pop if fs => "FS is the process's",
        Lfs => "FS is the process's",
        Iret | Iretd | Iretq => "would go on without the trap flag",
        _ if matches!(code, Code::Jmp_m1664 | Code::Call_m1664 | Code::Lss_r64_m1664 | Code::Lgs_r64_m1664) => {
            "AMD's processors have no 64-bit far pointers"
        }
        Int | Int1 | Int3 | Into | Syscall | Sysenter | Sysret | Sysretq | Sysexit | Sysexitq => {
            "enters or leaves a kernel"
        }
        Cpuid | Rdtsc | Rdtscp | Rdpid | Rdrand | Rdseed | Rdpmc | Xgetbv => "its result is the host's own",
        Rdfsbase | Wrfsbase | Wrgsbase | Wrpkru | Rdpkru => "process state of the host",
        Sgdt | Sidt | Sldt | Str | Smsw => "host kernels emulate or forbid it (UMIP)",
        Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xrstor | Xrstor64 => {
            "the host's state components differ"
        }
        Fxsave | Fxsave64 | Fxrstor | Fxrstor64 | Fnsave | Fnstenv | Frstor | Fldenv => {
            "instruction and data pointers differ between processors"
        }
        _ => return None,
    })
}
