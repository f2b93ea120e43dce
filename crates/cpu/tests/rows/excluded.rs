//! Codes that aren't compared natively, with the reason.

use iced_x86::{Code, Mnemonic};

/// Why a code can't be compared with the host; `None` if it is.
pub fn reason(code: Code) -> Option<&'static str> {
    use Mnemonic::*;
    let segment = code.op_code().op_kinds().iter().any(|k| {
        use iced_x86::OpCodeOperandKind as K;
        matches!(k, K::seg_reg | K::es | K::ss | K::ds | K::fs | K::gs)
    });
    if matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
    ) {
        return Some("a no-op on Intel's processors, undefined on AMD's");
    }
    Some(match code.mnemonic() {
        Mov | Pop if segment && loads(code) => "loads a segment register: its descriptor table is the host's",
        Push if code.op_code().op_kind(0) == iced_x86::OpCodeOperandKind::fs => "FS is the process's",
        Lds | Les | Lfs | Lgs | Lss => "loads a segment register: its descriptor table is the host's",
        Jmp | Call if umbra_cpu::isa::branch::is_far(code) => "far transfer: descriptor tables are the host's",
        Retf | Iret | Iretd | Iretq => "far transfer: descriptor tables are the host's",
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

fn loads(code: Code) -> bool {
    use iced_x86::OpCodeOperandKind as K;
    matches!(code.op_code().op_kind(0), K::seg_reg | K::es | K::ss | K::ds | K::fs | K::gs)
}
