//! From a guest's instruction to the form a stub is made for: operands renamed, memory operand redirected.

use crate::host_op::Class;
use crate::{HostExecError, HostFeatures};
use iced_x86::{
    Code, CodeSize, EncodingKind, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register, RflagsBits,
};
use umbra_arch::rflags;

/// Where the value of an explicit register operand lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Slot {
    /// Not a register.
    None,
    /// An XMM register.
    Xmm,
    /// A YMM register.
    Ymm,
    /// An MMX register.
    Mm,
    /// A general register.
    Gpr,
}

/// Registers an instruction uses without naming them.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct Implicit {
    /// XMM0 is read or written.
    pub xmm0: bool,
    /// RAX and RDX are read.
    pub rax_rdx: bool,
    /// RCX is written.
    pub rcx: bool,
}

/// An instruction ready for a stub.
#[derive(Clone, Debug)]
pub(crate) struct Form {
    /// The instruction, its operands renamed.
    pub core: Instruction,
    pub class: Class,
    /// Vector classes: what the operands are.
    pub slots: [Slot; 4],
    /// Vector classes: the guest's register numbers of `slots`.
    pub regs: [u8; 4],
    /// Operand 0 is a register that is written.
    pub writes_slot0: bool,
    pub implicit: Implicit,
    pub mem_read: u8,
    pub mem_write: u8,
    pub mem_align: u8,
    pub mxcsr: bool,
    pub enters_mmx: bool,
    pub flags_read: bool,
    pub flags_written: u64,
    /// Integer class: the register that addresses the memory operand.
    pub mem_base: Register,
}

fn unsupported<T>(code: Code, reason: &'static str) -> Result<T, HostExecError> {
    Err(HostExecError::Unsupported { code, reason })
}

/// Register through which vector and x87 stubs address the memory operand.
pub(crate) const MEM: Register = Register::R8;
/// Host register that stands for a general register operand in vector stubs.
const GPR: Register = Register::R11;

impl Form {
    /// Classifies and renames.
    pub(crate) fn of(guest: &Instruction, host: &HostFeatures) -> Result<Form, HostExecError> {
        let code = guest.code();
        check_features(code, host)?;
        if code.flow_control() != FlowControl::Next || code.is_privileged() {
            return unsupported(code, "a branch, an exception or a privileged instruction");
        }
        if code.is_stack_instruction() || guest.is_string_instruction() || guest.is_vsib() {
            return unsupported(code, "more than one memory access, or one that isn't its operand");
        }
        if by_hand(code.mnemonic()) {
            return unsupported(code, "changes or stores control state, or accesses memory under a mask");
        }
        let class = class_of(guest)?;
        let mut form = Form {
            core: *guest,
            class,
            slots: [Slot::None; 4],
            regs: [0; 4],
            writes_slot0: false,
            implicit: Implicit::default(),
            mem_read: 0,
            mem_write: 0,
            mem_align: 1,
            mxcsr: matches!(class, Class::Sse | Class::Avx | Class::Mmx) && obeys_mxcsr(code.mnemonic()),
            enters_mmx: false,
            flags_read: false,
            flags_written: 0,
            mem_base: MEM,
        };
        form.strip_prefixes();
        match class {
            Class::Integer => form.pick_base()?,
            Class::X87 => {}
            Class::Sse | Class::Avx | Class::Mmx => form.rename()?,
        }
        form.redirect_memory()?;
        form.inspect()?;
        Ok(form)
    }

    fn strip_prefixes(&mut self) {
        let core = &mut self.core;
        core.set_code_size(CodeSize::Code64);
        core.set_has_lock_prefix(false);
        core.set_has_xacquire_prefix(false);
        core.set_has_xrelease_prefix(false);
        core.set_has_rep_prefix(false);
        core.set_has_repne_prefix(false);
        core.set_segment_prefix(Register::None);
    }

    /// Operand k goes to XMM, YMM or MM k+1 (XMM0 is left for implicit use), a general register to R11.
    fn rename(&mut self) -> Result<(), HostExecError> {
        let code = self.core.code();
        for k in 0..self.core.op_count() {
            if self.core.op_kind(k) != OpKind::Register {
                continue;
            }
            let register = self.core.op_register(k);
            let slot = k as usize;
            if slot >= 4 {
                return unsupported(code, "too many register operands");
            }
            let (kind, host) = if register.is_xmm() {
                (Slot::Xmm, Register::XMM1 + k)
            } else if register.is_ymm() {
                (Slot::Ymm, Register::YMM1 + k)
            } else if register.is_mm() {
                (Slot::Mm, Register::MM1 + k)
            } else if register.is_gpr32() {
                (Slot::Gpr, Register::R11D)
            } else if register.is_gpr64() {
                (Slot::Gpr, GPR)
            } else {
                return unsupported(code, "an operand of another kind");
            };
            if kind == Slot::Gpr && self.slots.contains(&Slot::Gpr) {
                return unsupported(code, "two general register operands");
            }
            if register.number() > 15 {
                return unsupported(code, "a register that only EVEX encodes");
            }
            self.slots[slot] = kind;
            self.regs[slot] = register.number() as u8;
            self.core.set_op_register(k, host);
        }
        self.enters_mmx = self.slots.contains(&Slot::Mm) || self.core.mnemonic() == Mnemonic::Cvtpi2ps;
        Ok(())
    }

    /// A base register that the instruction doesn't use; a low one, since AH and its kind forbid REX.
    fn pick_base(&mut self) -> Result<(), HostExecError> {
        let code = self.core.code();
        let foreign = |k: u32| self.core.op_kind(k) == OpKind::Register && !self.core.op_register(k).is_gpr();
        if (0..self.core.op_count()).any(foreign) {
            return unsupported(code, "a segment, control or debug register");
        }
        let mut bare = self.core;
        bare.set_memory_base(Register::None);
        bare.set_memory_index(Register::None);
        let mut factory = InstructionInfoFactory::new();
        let used = factory.info(&bare).used_registers();
        let uses = |r: Register| used.iter().any(|u| u.register().full_register() == r);
        if uses(Register::RSP) {
            return unsupported(code, "uses RSP");
        }
        use Register::{R8, R9, RAX, RBX, RCX, RDI, RDX, RSI};
        let base = [RDI, RSI, RBX, RDX, RCX, RAX, R8, R9].into_iter().find(|r| !uses(*r));
        self.mem_base = base.unwrap_or(R9);
        Ok(())
    }

    fn redirect_memory(&mut self) -> Result<(), HostExecError> {
        let code = self.core.code();
        for k in 0..self.core.op_count() {
            let kind = self.core.op_kind(k);
            match kind {
                OpKind::Register
                | OpKind::Immediate8
                | OpKind::Immediate8_2nd
                | OpKind::Immediate16
                | OpKind::Immediate32
                | OpKind::Immediate64
                | OpKind::Immediate8to16
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate32to64 => {}
                OpKind::Memory => {
                    self.core.set_memory_base(self.mem_base);
                    self.core.set_memory_index(Register::None);
                    self.core.set_memory_index_scale(1);
                    self.core.set_memory_displacement64(0);
                    self.core.set_memory_displ_size(0);
                }
                _ => return unsupported(code, "an implicit or far memory operand"),
            }
        }
        Ok(())
    }

    /// What the renamed instruction reads and writes, from iced's tables.
    fn inspect(&mut self) -> Result<(), HostExecError> {
        let code = self.core.code();
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(&self.core);
        match info.used_memory() {
            [] => {}
            [memory] if memory.base() == self.mem_base => {
                let size = memory.memory_size().size();
                if !(1..=64).contains(&size) {
                    return unsupported(code, "a memory operand of unknown size");
                }
                if reads(memory.access()) {
                    self.mem_read = size as u8;
                }
                if writes(memory.access()) {
                    self.mem_write = size as u8;
                }
                if self.class == Class::Integer && bit_string(&self.core) {
                    return unsupported(code, "a bit string reaches beyond its operand");
                }
                self.mem_align = alignment(&self.core, size) as u8;
            }
            _ => return unsupported(code, "more than one memory access, or one that isn't its operand"),
        }
        self.flags_read = self.core.rflags_read() & STATUS_BITS != 0;
        self.flags_written = flags_of(self.core.rflags_modified());
        if matches!(self.class, Class::Sse | Class::Avx | Class::Mmx) {
            for k in 0..self.core.op_count() {
                let written = self.core.op_kind(k) == OpKind::Register && writes(info.op_access(k));
                if written && k != 0 {
                    return unsupported(code, "writes an operand other than the first");
                }
                self.writes_slot0 |= written;
            }
            self.find_implicit(info.used_registers().iter().map(|u| u.register().full_register()))?;
        }
        Ok(())
    }

    fn find_implicit(&mut self, used: impl Iterator<Item = Register>) -> Result<(), HostExecError> {
        for register in used {
            let explicit = (0..4).any(|k| match self.slots[k] {
                Slot::None => false,
                Slot::Xmm | Slot::Ymm => register == Register::ZMM1 + k as u32,
                Slot::Mm => register == Register::MM1 + k as u32,
                Slot::Gpr => register == GPR,
            });
            match register {
                _ if explicit => {}
                MEM => {}
                Register::ZMM0 => self.implicit.xmm0 = true,
                Register::RAX | Register::RDX => self.implicit.rax_rdx = true,
                Register::RCX => self.implicit.rcx = true,
                _ => return unsupported(self.core.code(), "uses another register implicitly"),
            }
        }
        Ok(())
    }
}

fn check_features(code: Code, host: &HostFeatures) -> Result<(), HostExecError> {
    for feature in code.cpuid_features() {
        match host.lookup(*feature) {
            None => return unsupported(code, "belongs to an instruction set that this crate doesn't run"),
            Some((_, true)) => {}
            Some((feature, false)) => return Err(HostExecError::MissingFeature { code, feature }),
        }
    }
    Ok(())
}

fn class_of(guest: &Instruction) -> Result<Class, HostExecError> {
    use iced_x86::CpuidFeature::{FPU, FPU287, FPU387};
    let code = guest.code();
    if code.cpuid_features().iter().any(|f| [FPU, FPU287, FPU387].contains(f)) {
        return Ok(Class::X87);
    }
    if crate::integer::is_data(code.mnemonic()) {
        return Ok(Class::Integer);
    }
    let registers =
        || (0..guest.op_count()).filter(|k| guest.op_kind(*k) == OpKind::Register).map(|k| guest.op_register(k));
    let vector = |r: Register| r.is_xmm() || r.is_ymm() || r.is_mm();
    // Conversions from memory to a general register name no vector register.
    let converts = obeys_mxcsr(guest.mnemonic()) || guest.mnemonic() == Mnemonic::Movnti;
    if !registers().any(vector) && !converts {
        return unsupported(code, "not a data instruction");
    }
    match code.encoding() {
        EncodingKind::VEX => Ok(Class::Avx),
        EncodingKind::Legacy if registers().any(|r| r.is_mm()) => Ok(Class::Mmx),
        EncodingKind::Legacy => Ok(Class::Sse),
        _ => unsupported(code, "EVEX, XOP or 3DNow! encoding"),
    }
}

/// Instructions of accepted sets that the CPU proper executes.
fn by_hand(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Ldmxcsr
            | Stmxcsr
            | Vldmxcsr
            | Vstmxcsr
            | Maskmovq
            | Maskmovdqu
            | Vmaskmovdqu
            | Vzeroall
            | Vzeroupper
            | Emms
            | Vmaskmovps
            | Vmaskmovpd
            | Vpmaskmovd
            | Vpmaskmovq
            | Wait
            | Fldcw
            | Fnstcw
            | Fstcw
            | Fnstsw
            | Fstsw
            | Fldenv
            | Fnstenv
            | Fstenv
            | Fnsave
            | Fsave
            | Frstor
            | Fninit
            | Finit
            | Fnclex
            | Fclex
            | Fneni
            | Feni
            | Fndisi
            | Fdisi
            | Fnsetpm
            | Fsetpm
            | Frstpm
    )
}

/// Arithmetic, comparison, conversion and rounding obey MXCSR; moves, shuffles and logic don't.
fn obeys_mxcsr(mnemonic: Mnemonic) -> bool {
    let name = format!("{mnemonic:?}").to_lowercase();
    let name = name.strip_prefix('v').unwrap_or(&name);
    if name.starts_with("cvt") {
        return true;
    }
    let Some(stem) = ["ps", "pd", "ss", "sd"].iter().find_map(|s| name.strip_suffix(s)) else {
        return false;
    };
    const STEMS: [&str; 17] = [
        "comi", "ucomi", "add", "sub", "mul", "div", "sqrt", "max", "min", "round", "addsub", "hadd", "hsub", "dp",
        "rcp", "rsqrt", "cmp",
    ];
    STEMS.contains(&stem) || ["fmadd", "fmsub", "fnmadd", "fnmsub"].iter().any(|s| stem.starts_with(s))
}

/// "Instructions ... Requiring Explicitly Aligned Memory", and all legacy SSE 16-byte operands but a few.
fn alignment(core: &Instruction, size: usize) -> usize {
    use Mnemonic::*;
    let mnemonic = core.mnemonic();
    match core.code().encoding() {
        EncodingKind::VEX => match mnemonic {
            Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa => size,
            _ => 1,
        },
        _ if size != 16 => 1,
        _ => match mnemonic {
            Movups | Movupd | Movdqu | Lddqu | Pcmpestri | Pcmpestri64 | Pcmpestrm | Pcmpestrm64 | Pcmpistri
            | Pcmpistrm => 1,
            _ => 16,
        },
    }
}

/// BT and its kind with a register as bit offset address memory outside their operand.
fn bit_string(core: &Instruction) -> bool {
    use Mnemonic::{Bt, Btc, Btr, Bts};
    matches!(core.mnemonic(), Bt | Bts | Btr | Btc) && core.op_kind(1) == OpKind::Register
}

fn reads(access: OpAccess) -> bool {
    matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

fn writes(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

const STATUS_BITS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// RFLAGS bits of iced's flag set.
fn flags_of(bits: u32) -> u64 {
    [
        (RflagsBits::OF, rflags::OF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
    ]
    .iter()
    .filter(|(bit, _)| bits & bit != 0)
    .fold(0, |all, (_, flag)| all | flag)
}
