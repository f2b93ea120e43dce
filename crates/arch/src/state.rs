//! [`CpuState`]: everything architectural about one virtual CPU, and nothing else.

use crate::addr::Gpa;
use crate::control::{Cr0, Cr3, Cr4, Efer};
use crate::fpu::FpState;
use crate::segment::{Attr, Seg, Segment, TableRegister};
use serde::{Deserialize, Serialize};

/// Index of a general register in [`CpuState::gpr`], in encoding order.
pub mod reg {
    #![allow(missing_docs, reason = "the names are the manual's")]
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// What the CPU is doing between instructions ("Guest Non-Register State": activity state).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[repr(u8)]
pub enum Activity {
    /// Executing instructions.
    #[default]
    Running,
    /// After HLT.
    Halted,
    /// After INIT on an application processor.
    WaitForSipi,
    /// After a triple fault.
    Shutdown,
    /// After MWAIT.
    Waiting,
}

/// Which events the instruction just executed holds back for one instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[repr(u8)]
pub enum Shadow {
    /// None.
    #[default]
    None,
    /// STI with IF previously 0: external interrupts.
    Sti,
    /// MOV SS or POP SS: external interrupts, NMI and debug exceptions.
    MovSs,
}

/// MSRs that live in the CPU itself. Local-APIC MSRs live behind [`Bus`](crate::Bus).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[repr(C)]
pub struct Msrs {
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR (no use on Intel; readable and writable).
    pub cstar: u64,
    /// IA32_FMASK.
    pub fmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// What is added to virtual time to give the TSC.
    pub tsc_offset: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// IA32_MTRR_DEF_TYPE.
    pub mtrr_def_type: u64,
    /// IA32_MTRR_PHYSBASE0, PHYSMASK0, PHYSBASE1, ... (8 pairs).
    pub mtrr_var: [u64; 16],
    /// The eleven fixed-range MTRRs in order of address.
    pub mtrr_fix: [u64; 11],
    /// IA32_SPEC_CTRL.
    pub spec_ctrl: u64,
    /// IA32_XSS.
    pub xss: u64,
    /// IA32_PKRS.
    pub pkrs: u64,
    /// IA32_DEBUGCTL.
    pub debugctl: u64,
    /// IA32_FEATURE_CONTROL.
    pub feature_control: u64,
    /// IA32_BIOS_SIGN_ID.
    pub bios_sign_id: u64,
    /// IA32_UMWAIT_CONTROL.
    pub umwait_control: u64,
}

/// The whole architectural state of one virtual CPU. Engines, snapshots, accelerators and tests
/// exchange exactly this.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[repr(C)]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8..R15.
    pub gpr: [u64; 16],
    /// RIP (offset in CS) of the next instruction.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS, LDTR, TR; see [`Seg`].
    pub seg: [Segment; 8],
    /// GDTR.
    pub gdtr: TableRegister,
    /// IDTR.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: Cr0,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: Cr3,
    /// CR4.
    pub cr4: Cr4,
    /// EFER.
    pub efer: Efer,
    /// The latched PDPTEs of PAE paging ("PDPTE Registers").
    pub pdpte: [u64; 4],
    /// DR0..DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// XCR0.
    pub xcr0: u64,
    /// PKRU.
    pub pkru: u32,
    /// Current privilege level.
    pub cpl: u8,
    /// Running, halted, ...
    pub activity: Activity,
    /// The line (physical address) that MONITOR named, unless somebody has stored to it since.
    pub monitor: Option<Gpa>,
    /// Interrupt shadow of the last instruction.
    pub shadow: Shadow,
    /// An NMI is being handled: further ones wait for IRET.
    pub nmi_blocked: bool,
    /// Debug conditions held back by MOV SS, as DR6 will show them ("Pending Debug Exceptions").
    pub pending_debug: u64,
    /// Model-specific registers.
    pub msr: Msrs,
    /// x87, SSE and AVX registers.
    pub fp: FpState,
}

impl Default for Msrs {
    fn default() -> Self {
        Self {
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            tsc_offset: 0,
            tsc_adjust: 0,
            pat: 0x0007_0406_0007_0406,
            misc_enable: 1 | crate::msr::MONITOR_ENABLED,
            mtrr_def_type: 0xc06,
            mtrr_var: [0; 16],
            mtrr_fix: [0x0606_0606_0606_0606; 11],
            spec_ctrl: 0,
            xss: 0,
            pkrs: 0,
            debugctl: 0,
            feature_control: 1,
            bios_sign_id: 0,
            umwait_control: 0,
        }
    }
}

impl CpuState {
    /// As after power-up ("Processor State After Reset"): real mode at F000:FFF0 with CS base FFFF0000h.
    /// RDX holds the processor signature, which the machine fills in from its CPUID profile.
    pub fn reset() -> Self {
        let data = Segment::real(0);
        let system = |kind: u32| Segment { base: 0, limit: 0xffff, attr: Attr(0x80 | kind), selector: 0 };
        let cs = Segment { base: 0xffff_0000, limit: 0xffff, attr: Attr(0x9b), selector: 0xf000 };
        Self {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: crate::rflags::FIXED,
            seg: [data, cs, data, data, data, data, system(2), system(0xb)],
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            cr0: Cr0::RESET,
            cr2: 0,
            cr3: Cr3::new(0),
            cr4: Cr4::new(0),
            efer: Efer::new(0),
            pdpte: [0; 4],
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            xcr0: 1,
            pkru: 0,
            cpl: 0,
            activity: Activity::Running,
            monitor: None,
            shadow: Shadow::None,
            nmi_blocked: false,
            pending_debug: 0,
            msr: Msrs::default(),
            fp: FpState::default(),
        }
    }

    /// One segment register.
    #[inline(always)]
    pub fn segment(&self, seg: Seg) -> &Segment {
        &self.seg[seg as usize & 7]
    }
    /// Virtual-8086 mode.
    #[inline]
    pub fn is_v86(&self) -> bool {
        self.rflags & crate::rflags::VM != 0
    }
    /// 64-bit mode: IA-32e mode with CS.L.
    #[inline]
    pub fn is_64bit_code(&self) -> bool {
        self.efer.lma() && self.seg[Seg::Cs as usize].attr.is_long()
    }
    /// Real-address mode.
    #[inline]
    pub fn is_real_mode(&self) -> bool {
        !self.cr0.pe()
    }
    /// Number of significant linear-address bits in IA-32e mode: 48 or 57.
    #[inline]
    pub fn linear_bits(&self) -> u32 {
        if self.cr4.la57() { 57 } else { 48 }
    }
}
