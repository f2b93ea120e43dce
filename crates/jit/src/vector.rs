//! SSE and AVX data instructions as host code: the guest's own, on the host's registers of the same numbers.
//!
//! While the frame says that they are live, these are the guest's. The first vector operation of a block loads them,
//! calling a function stores them. Generated code runs with the guest's MXCSR where no exception of it is unmasked;
//! otherwise, and where CR0, CR4 or XCR0 forbid the registers, the block goes on with its operations' functions.

use crate::emitter::{Alu, Jump, cc};
use crate::frame::{MXCSR_DEFAULT, VECTOR_AVX, VECTOR_SSE, frame_field, gpr};
use crate::memory_path::{self, Access, Address};
use crate::plan::has_memory;
use crate::registers::{A, Reg, home};
use crate::renaming::{Unencodable, host_operand, sized};
use crate::translate::Translator;
use iced_x86::{EncodingKind, Instruction, Mnemonic as M, OpKind, Register};
use umbra_cpu::decode::register_index;
use umbra_cpu::op::Op;

/// What is known of the vector registers at the place in a block that is being translated.
#[derive(Default)]
pub struct Place {
    /// Units that are allowed, the registers being in the host's.
    pub live: u8,
    loads: Vec<Load>,
}

/// A block's first operation of a unit found the registers in the core.
struct Load {
    op: usize,
    unit: u8,
    jump: Jump,
    /// Where the operation begins when they are loaded.
    back: usize,
    /// The last x87 operation before, whose pointers aren't in the core.
    pointers: Option<usize>,
}

/// Whether an instruction's operands are vector and general registers, and perhaps an ordinary memory operand. XMM0
/// and RCX, which some use without naming them, are where the host's are.
pub fn fits(i: &Instruction) -> bool {
    let registers = || (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register).map(|n| i.op_register(n));
    let vector = registers().any(|r| r.is_xmm() || r.is_ymm()) || names_no_vector(i.mnemonic());
    let known = || registers().all(|r| r.is_xmm() || r.is_ymm() || r.is_gpr32() || r.is_gpr64());
    let index = i.memory_index();
    let encoded = || matches!(i.code().op_code().encoding(), EncodingKind::Legacy | EncodingKind::VEX);
    vector && known() && encoded() && (index == Register::None || index.is_gpr()) && !is_special(i.mnemonic())
}

/// What has to do with vector registers or MXCSR without a vector register among its operands, at least with a
/// memory operand.
fn names_no_vector(mnemonic: M) -> bool {
    matches!(
        mnemonic,
        M::Vzeroupper
            | M::Vzeroall
            | M::Stmxcsr
            | M::Vstmxcsr
            | M::Ldmxcsr
            | M::Vldmxcsr
            | M::Cvtss2si
            | M::Cvttss2si
            | M::Cvtsd2si
            | M::Cvttsd2si
            | M::Vcvtss2si
            | M::Vcvttss2si
            | M::Vcvtsd2si
            | M::Vcvttsd2si
    )
}

/// RAX, RDX or RDI are operands, or the x87 state changes.
fn is_special(mnemonic: M) -> bool {
    matches!(
        mnemonic,
        M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Pcmpestri
            | M::Pcmpestri64
            | M::Pcmpestrm
            | M::Pcmpestrm64
            | M::Vpcmpestri
            | M::Vpcmpestri64
            | M::Vpcmpestrm
            | M::Vpcmpestrm64
            | M::Cvtpi2ps
            | M::Cvtpi2pd
    )
}

/// Whether it writes status flags, and then all of them: comparisons and tests.
pub fn writes_flags(i: &Instruction) -> bool {
    i.rflags_modified() != 0
}

fn is_vex(i: &Instruction) -> bool {
    i.code().op_code().encoding() == EncodingKind::VEX
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
        size < 16 || matches!(i.mnemonic(), M::Movups | M::Movupd | M::Movdqu | M::Lddqu | M::Pcmpistri | M::Pcmpistrm)
    };
    if unaligned { 1 } else { size }
}

impl Translator<'_> {
    /// Vector operation number `at`. Its slow path is open.
    pub fn vector(&mut self, at: usize, i: &Instruction, op: &Op, live: bool) -> Result<(), Unencodable> {
        self.need_vectors(at, if is_vex(i) { VECTOR_AVX } else { VECTOR_SSE });
        if matches!(i.mnemonic(), M::Ldmxcsr | M::Vldmxcsr) {
            self.load_mxcsr(op);
            return Ok(());
        }
        self.on_host(i, op, alignment(i), live)
    }

    /// Emits `i` with its general registers and its memory operand, whose address must be a multiple of `alignment`,
    /// on the host. It writes its first operand at most.
    pub fn on_host(&mut self, i: &Instruction, op: &Op, alignment: u8, live: bool) -> Result<(), Unencodable> {
        let mut host = *i;
        let mut free = A;
        if has_memory(i) {
            let access = if i.op0_kind() == OpKind::Memory { Access::Write } else { Access::Read };
            let mut place = self.lookup(&Address::of(op), i.memory_size().size() as u32, access);
            if alignment > 1 {
                self.host_flags = false;
                self.e.lea(A, place.mem);
                place = memory_path::Place::SCRATCH;
                self.e.rr(false, &[0xf6], 0, A); // test
                self.e.raw(&[alignment - 1]);
                let misaligned = self.e.jcc(cc::NOT_EQUAL);
                self.slow(misaligned);
            }
            host_operand(&mut host, &place);
            free = place.free;
        }
        for n in (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register) {
            let register = i.op_register(n);
            if register.is_gpr() {
                let place = self.general(i, n, free);
                host.set_op_register(n, sized(place, register.size()));
            }
        }
        self.e.instruction(&host)?;
        self.result(i, live, free);
        Ok(())
    }

    /// LDMXCSR: its function unmasks exceptions, and knows what bits there are.
    fn load_mxcsr(&mut self, op: &Op) {
        let place = self.lookup(&Address::of(op), 4, Access::Read);
        self.host_flags = false;
        self.e.load32(A, place.mem);
        self.e.store32(frame_field!(scratch), A);
        self.e.alu_imm(Alu::And, false, A, !0xffff | MXCSR_DEFAULT as i32);
        self.e.alu_imm(Alu::Cmp, false, A, MXCSR_DEFAULT as i32);
        let unmasks = self.e.jcc(cc::NOT_EQUAL);
        self.slow(unmasks);
        self.e.rm(false, &[0x0f, 0xae], 2, frame_field!(scratch));
    }

    /// General register operand `n` to a host register.
    fn general(&mut self, i: &Instruction, n: u32, free: Reg) -> Reg {
        let guest = register_index(i.op_register(n));
        home(guest).unwrap_or_else(|| {
            self.e.load(free, gpr(guest));
            free
        })
    }

    /// Flags, and a general register that isn't at home in one of the host.
    fn result(&mut self, i: &Instruction, live: bool, free: Reg) {
        if writes_flags(i) {
            self.host_flags = live;
            if live {
                self.e.save_flags();
            }
        } else if i.op0_kind() == OpKind::Register && i.op0_register().is_gpr() {
            let guest = register_index(i.op0_register());
            if home(guest).is_none() {
                self.e.store(gpr(guest), free);
            }
        }
    }

    /// The vector registers must be the guest's from here on, and `unit` allowed.
    fn need_vectors(&mut self, op: usize, unit: u8) {
        if self.vectors.live & unit != 0 {
            return;
        }
        self.host_flags = false;
        self.e.rm(false, &[0xf6], 0, frame_field!(vectors_live)); // test byte
        self.e.raw(&[unit]);
        let jump = self.e.jcc(cc::EQUAL);
        self.vectors.loads.push(Load { op, unit, jump, back: self.e.here(), pointers: self.x87.pointers });
        self.vectors.live |= unit;
    }

    /// What [`need_vectors`](Self::need_vectors) jumps to.
    pub fn emit_vector_loads(&mut self) {
        for load in std::mem::take(&mut self.vectors.loads) {
            self.e.bind(load.jump);
            if let Some(op) = load.pointers {
                self.emit_pointers(op);
            }
            self.load_vectors(load.unit, load.op);
            self.e.jmp_to(load.back);
        }
    }

    /// Loads the vector registers; from operation `next` on everything is done by functions if the units can't be
    /// used.
    pub fn load_vectors(&mut self, units: u8, next: usize) {
        self.e.mov_imm(A, units.into());
        self.e.call(self.stubs.vectors_load);
        let loaded = self.e.jcc(cc::EQUAL);
        self.e.call(self.stubs.x87_store);
        let forbidden = self.e.jmp();
        self.by_function(next, forbidden);
        self.e.bind(loaded);
    }
}
