//! SSE and AVX data instructions as host code: the guest's own, on vector registers that are loaded from the core
//! before and stored after.
//!
//! Generated code runs with the guest's MXCSR where no exception of it is unmasked; otherwise, and where CR0, CR4 or
//! XCR0 forbid the registers, a flag in the frame sends the instruction to its function.

use crate::emitter::{Mem, cc};
use crate::frame::{VECTOR_AVX, VECTOR_SSE, frame_field, gpr, xmm, ymm_high};
use crate::memory_path::{Access, Address, Place};
use crate::native::{Unencodable, host_operand, sized};
use crate::plan::has_memory;
use crate::registers::{A, Reg, home};
use crate::translate::Translator;
use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic as M, OpKind, Register};
use umbra_cpu::decode::register_index;
use umbra_cpu::op::Op;

/// Whether an instruction has vector and general registers and an ordinary memory operand only, all of them
/// explicit.
pub fn fits(i: &Instruction) -> bool {
    let code = i.code().op_code();
    let encoded = matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
    let registers: Vec<Register> =
        (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register).map(|n| i.op_register(n)).collect();
    let known = registers.iter().all(|r| r.is_xmm() || r.is_ymm() || r.is_gpr32() || r.is_gpr64());
    let index = i.memory_index();
    encoded
        && known
        && registers.iter().any(|r| r.is_xmm() || r.is_ymm())
        && (index == Register::None || index.is_gpr())
        && !has_implied_operands(i.mnemonic())
}

/// XMM0, RDI, ECX or a mask decide what these do, or they change the x87 state.
fn has_implied_operands(mnemonic: M) -> bool {
    matches!(
        mnemonic,
        M::Pblendvb
            | M::Blendvps
            | M::Blendvpd
            | M::Sha256rnds2
            | M::Cvtpi2ps
            | M::Cvtpi2pd
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Pcmpestri
            | M::Pcmpestri64
            | M::Pcmpestrm
            | M::Pcmpestrm64
            | M::Pcmpistri
            | M::Pcmpistrm
            | M::Vpcmpestri
            | M::Vpcmpestri64
            | M::Vpcmpestrm
            | M::Vpcmpestrm64
            | M::Vpcmpistri
            | M::Vpcmpistrm
    )
}

/// Whether it writes status flags, and then all of them: comparisons and tests.
pub fn writes_flags(i: &Instruction) -> bool {
    i.rflags_modified() != 0
}

fn is_vex(i: &Instruction) -> bool {
    i.code().op_code().encoding() == EncodingKind::VEX
}

/// Whether the first operand's old value has a part in the result.
fn reads_first(i: &Instruction) -> bool {
    if is_vex(i) {
        return writes_flags(i) || i.cpuid_features().contains(&CpuidFeature::FMA);
    }
    match i.mnemonic() {
        M::Movaps | M::Movups | M::Movapd | M::Movupd | M::Movdqa | M::Movdqu | M::Lddqu => false,
        M::Movd | M::Movq | M::Pshufd | M::Movddup | M::Movntdqa => false,
        M::Movss | M::Movsd => !has_memory(i),
        _ => true,
    }
}

/// Bytes that the memory operand's address must be a multiple of.
fn alignment(i: &Instruction) -> u8 {
    let size = i.memory_size().size() as u8;
    let unaligned = if is_vex(i) {
        !matches!(
            i.mnemonic(),
            M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntdq | M::Vmovntps | M::Vmovntpd | M::Vmovntdqa
        )
    } else {
        size < 16 || matches!(i.mnemonic(), M::Movups | M::Movupd | M::Movdqu | M::Lddqu)
    };
    if unaligned { 1 } else { size }
}

impl Translator<'_> {
    /// A vector instruction. Its slow path is open.
    pub fn vector(&mut self, i: &Instruction, op: &Op, live: bool) -> Result<(), Unencodable> {
        self.need_vectors(if is_vex(i) { VECTOR_AVX } else { VECTOR_SSE });
        let mut host = *i;
        let mut free = A;
        if has_memory(i) {
            let access = if i.op0_kind() == OpKind::Memory { Access::Write } else { Access::Read };
            let mut place = self.lookup(&Address::of(op), i.memory_size().size() as u32, access);
            if alignment(i) > 1 {
                self.e.lea(A, place.mem);
                place = Place::SCRATCH;
                self.e.rr(false, &[0xf6], 0, A); // test
                self.e.raw(&[alignment(i) - 1]);
                let misaligned = self.e.jcc(cc::NOT_EQUAL);
                self.slow(misaligned);
            }
            host_operand(&mut host, &place);
            free = place.free;
        }
        let mut vectors = 0;
        for n in (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register) {
            let register = i.op_register(n);
            if register.is_gpr() {
                let place = self.general(i, n, free);
                host.set_op_register(n, sized(place, register.size()));
                continue;
            }
            let first = if register.is_ymm() { Register::YMM0 } else { Register::XMM0 };
            host.set_op_register(n, Register::try_from(first as usize + vectors).unwrap_or(Register::None));
            if n > 0 || reads_first(i) {
                self.load_vector(vectors as u8, register);
            }
            vectors += 1;
        }
        self.encode(&host)?;
        self.result(i, live, free);
        Ok(())
    }

    /// General register operand `n` to a host register.
    fn general(&mut self, i: &Instruction, n: u32, free: Reg) -> Reg {
        let guest = register_index(i.op_register(n));
        home(guest).unwrap_or_else(|| {
            self.e.load(free, gpr(guest));
            free
        })
    }

    fn result(&mut self, i: &Instruction, live: bool, free: Reg) {
        if writes_flags(i) {
            self.host_flags = live;
            if live {
                self.e.save_flags();
            }
            return;
        }
        if i.op0_kind() != OpKind::Register {
            return;
        }
        let register = i.op0_register();
        if register.is_gpr() {
            let guest = register_index(register);
            if home(guest).is_none() {
                self.e.store(gpr(guest), free);
            }
            return;
        }
        let n = register.number() as u8;
        self.e.rm(false, &[0x0f, 0x11], 0, xmm(n)); // movups
        if register.is_ymm() {
            vex_lane(self, 0x19, 0, ymm_high(n)); // vextractf128
        } else if is_vex(i) {
            self.e.store_imm(ymm_high(n), 0);
            self.e.store_imm(Mem { disp: ymm_high(n).disp + 8, ..ymm_high(n) }, 0);
        }
    }

    fn load_vector(&mut self, host: u8, register: Register) {
        let n = register.number() as u8;
        self.e.rm(false, &[0x0f, 0x10], host, xmm(n)); // movups
        if register.is_ymm() {
            vex_lane(self, 0x18, host, ymm_high(n)); // vinsertf128 host, host, mem, 1
        }
    }

    /// Vector registers may be used, or the function is called: that may find it so, and go on.
    fn need_vectors(&mut self, unit: u8) {
        self.host_flags = false;
        self.e.rm(false, &[0xf6], 0, frame_field!(vectors)); // test byte
        self.e.raw(&[unit]);
        let forbidden = self.e.jcc(cc::EQUAL);
        self.slow(forbidden);
    }
}

/// VINSERTF128 (18h) or VEXTRACTF128 (19h) of the upper lane.
fn vex_lane(t: &mut Translator<'_>, opcode: u8, host: u8, mem: Mem) {
    // Three-byte VEX, map 0F3A, 256 bits, prefix 66; inverted bits: R and X set, B by the base.
    let base = mem.base.unwrap_or(0);
    let source = if opcode == 0x18 { !host & 0xf } else { 0xf };
    let second = 0xc0 | u8::from(base < 8) << 5 | 3;
    t.e.raw(&[0xc4, second, source << 3 | 5, opcode]);
    t.e.modrm(host, mem);
    t.e.raw(&[1]);
}
