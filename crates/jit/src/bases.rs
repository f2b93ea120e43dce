//! The bases of FS and GS: RDFSBASE and its kin, RDMSR and WRMSR of them.

use crate::emitter::{Alu, Jump, Mem, cc};
use crate::frame::{self, gpr};
use crate::registers::{A, B, GUEST_RAX, RCX, RDX, home};
use crate::system_calls::unless_canonical;
use crate::translate::Translator;
use iced_x86::Instruction;
use umbra_arch::control::Cr4;
use umbra_arch::msr::{IA32_FS_BASE, IA32_GS_BASE, IA32_KERNEL_GS_BASE};
use umbra_arch::segment::Seg;
use umbra_cpu::decode::register_index;

/// Where an MSR is in the core; for a segment's base, what addressing uses, too.
fn places(msr: u32) -> Vec<Mem> {
    match msr {
        IA32_FS_BASE => base(Seg::Fs),
        IA32_GS_BASE => base(Seg::Gs),
        _ => vec![frame::kernel_gs_base()],
    }
}

fn base(seg: Seg) -> Vec<Mem> {
    vec![frame::segment_base(seg as usize), frame::seg_base(seg as u8)]
}

impl Translator<'_> {
    /// RDFSBASE, RDGSBASE.
    pub fn read_base(&mut self, i: &Instruction, seg: Seg) {
        self.needs_cr4(Cr4::FSGSBASE);
        let general = register_index(i.op0_register());
        let to = home(general).unwrap_or(A);
        let wide = i.op0_register().size() == 8;
        self.e.rm(wide, &[0x8b], to, frame::segment_base(seg as usize)); // mov
        if home(general).is_none() {
            self.e.store(gpr(general), A);
        }
    }

    /// WRFSBASE, WRGSBASE of an address that is canonical whatever the paging mode.
    pub fn write_base(&mut self, i: &Instruction, seg: Seg) {
        self.needs_cr4(Cr4::FSGSBASE);
        self.guest_register(A, register_index(i.op0_register()));
        if i.op0_register().size() == 8 {
            self.only_canonical();
        } else {
            self.e.mov32(A, A);
        }
        base(seg).into_iter().for_each(|place| self.e.store(place, A));
    }

    /// What is in [`A`]. Clobbers [`B`].
    pub fn only_canonical(&mut self) {
        let other = unless_canonical(&mut self.e, A, B);
        self.slow(other);
    }

    /// RDMSR of a base.
    pub fn read_msr(&mut self) {
        self.only_in_ring_0();
        let mut found = Vec::new();
        for msr in [IA32_FS_BASE, IA32_GS_BASE] {
            self.e.load(A, places(msr)[0]);
            self.e.alu_imm(Alu::Cmp, false, RCX, msr as i32);
            found.push(self.e.jcc(cc::EQUAL));
        }
        self.e.load(A, places(IA32_KERNEL_GS_BASE)[0]);
        self.e.alu_imm(Alu::Cmp, false, RCX, IA32_KERNEL_GS_BASE as i32);
        let other = self.e.jcc(cc::NOT_EQUAL);
        self.slow(other);
        self.bind_all(found);
        self.e.mov32(GUEST_RAX, A);
        self.e.shr(true, A, 32);
        self.e.mov(RDX, A);
    }

    /// WRMSR of an address to a base.
    pub fn write_msr(&mut self) {
        self.only_in_ring_0();
        self.e.mov32(A, GUEST_RAX);
        self.e.mov(B, RDX);
        self.e.shl(true, B, 32);
        self.e.alu(Alu::Or, true, A, B);
        self.only_canonical();
        let mut done = Vec::new();
        for msr in [IA32_FS_BASE, IA32_GS_BASE, IA32_KERNEL_GS_BASE] {
            self.e.alu_imm(Alu::Cmp, false, RCX, msr as i32);
            let not = self.e.jcc(cc::NOT_EQUAL);
            places(msr).into_iter().for_each(|place| self.e.store(place, A));
            if msr == IA32_KERNEL_GS_BASE {
                self.slow(not);
            } else {
                done.push(self.e.jmp());
                self.e.bind(not);
            }
        }
        self.bind_all(done);
    }

    fn bind_all(&mut self, jumps: Vec<Jump>) {
        jumps.into_iter().for_each(|jump| self.e.bind(jump));
    }
}
