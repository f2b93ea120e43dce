//! x87 instructions as host code: the guest's own, on the host's x87 registers.
//!
//! While the frame says that they are live, these hold the guest's FSW, tags and stack; FCW and the pointers are
//! always the core's. The first x87 operation of a block loads them; what looks at them in the core, and leaving
//! generated code, stores them: Rust code uses no x87 registers, so that other functions needn't. Where an exception
//! is unmasked or pending, or CR0 forbids x87 instructions, the block goes on with functions alone.

use crate::emitter::{Alu, Emitter, Jump, Mem, cc};
use crate::frame::{X87_CONTROL, X87_MASKS, fp, frame_field, fx};
use crate::memory_path::{Access, Address};
use crate::mmx;
use crate::plan::has_memory;
use crate::registers::{A, B, FLAGS, GUEST_RAX};
use crate::renaming::{Unencodable, host_operand};
use crate::translate::Translator;
use iced_x86::{CpuidFeature, FlowControl, Instruction, Mnemonic as M, OpKind, RflagsBits};
use umbra_cpu::op::Op;

/// What is known of the x87 state at the place in a block that is being translated.
#[derive(Default)]
pub struct Place {
    /// It is in the host's registers.
    pub is_live: bool,
    /// The last operation that FIP and FOP must say, but don't.
    pub pointers: Option<usize>,
    loads: Vec<Load>,
}

/// A block's first x87 operation found the state in the core.
struct Load {
    op: usize,
    jump: Jump,
    /// Where the operation begins when it is loaded.
    back: usize,
    pointers: Option<usize>,
}

fn is_x87(i: &Instruction) -> bool {
    // The mnemonics are in alphabetical order.
    let first = (M::F2xm1 as usize..=M::Fyl2xp1 as usize).contains(&(i.mnemonic() as usize));
    first
        && i.code()
            .cpuid_features()
            .iter()
            .any(|set| matches!(set, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387))
}

/// Whether it has host code, as all do but those that change control state or more than one operand.
pub fn fits(i: &Instruction) -> bool {
    let control = matches!(
        i.mnemonic(),
        M::Fninit | M::Fnclex | M::Fneni | M::Fndisi | M::Fnsetpm | M::Fnstenv | M::Fldenv | M::Fnsave | M::Frstor
    );
    let flags = || i.rflags_modified() & STATUS;
    is_x87(i) && !control && matches!(flags(), 0 | STATUS) || i.mnemonic() == M::Wait || mmx::fits(i)
}

/// All status flags; iced-x86 has C0 to C3 among the others.
const STATUS: u32 = RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::PF | RflagsBits::CF;

/// FCMOVcc.
pub fn reads_flags(i: &Instruction) -> bool {
    is_x87(i) && i.rflags_read() & STATUS != 0
}

/// Whether an instruction's function may look at the x87 state, or change what lets x87 instructions be used.
pub fn concerns(i: &Instruction) -> bool {
    use CpuidFeature as F;
    let sets = i.code().cpuid_features();
    let state = |set: &F| matches!(set, F::MMX | F::FXSR | F::XSAVE | F::XSAVEC | F::XSAVEOPT | F::XSAVES);
    let mmx = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm());
    let other = matches!(i.mnemonic(), M::Wait | M::Cvtpi2ps | M::Cvtpi2pd);
    let leaves = i.is_privileged() || i.flow_control() != FlowControl::Next;
    is_x87(i) || sets.iter().any(state) || mmx || other || leaves
}

fn writes_memory(i: &Instruction) -> bool {
    matches!(i.mnemonic(), M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp | M::Fnstcw | M::Fnstsw)
}

impl Translator<'_> {
    /// x87 operation number `at`. Its slow path is open.
    pub fn x87(&mut self, at: usize, i: &Instruction, op: &Op, live: bool) -> Result<(), Unencodable> {
        self.need_x87(at);
        match i.mnemonic() {
            // Nothing is pending.
            M::Wait => {}
            _ if mmx::fits(i) => self.on_host(i, op, 1, live)?,
            M::Fldcw => self.load_control(op),
            M::Fnstcw => {
                let place = self.lookup(&Address::of(op), 2, Access::Write);
                self.load16(place.free, fp(fx::FCW));
                self.store16(place.mem, place.free);
            }
            M::Fnstsw if !has_memory(i) => {
                self.e.mov(B, FLAGS);
                self.e.raw(&[0xdf, 0xe0]); // fnstsw ax
                self.e.raw(&[0x66]);
                self.e.rr(false, &[0x8b], GUEST_RAX, FLAGS);
                self.e.mov(FLAGS, B);
            }
            M::Fnstsw => self.x87_data(i, op)?,
            _ => {
                if reads_flags(i) {
                    self.need_flags();
                }
                self.x87_data(i, op)?;
                if i.rflags_modified() & STATUS != 0 {
                    self.host_flags = live;
                    if live {
                        self.e.save_flags();
                    }
                }
                if has_memory(i) {
                    self.linear(&Address::of(op).effective());
                    self.e.store(fp(fx::FDP), A);
                }
                self.x87.pointers = Some(at);
            }
        }
        Ok(())
    }

    fn x87_data(&mut self, i: &Instruction, op: &Op) -> Result<(), Unencodable> {
        let mut host = *i;
        if has_memory(i) {
            let access = if writes_memory(i) { Access::Write } else { Access::Read };
            let place = self.lookup(&Address::of(op), i.memory_size().size() as u32, access);
            host_operand(&mut host, &place);
        }
        self.e.instruction(&host)
    }

    /// FLDCW: its function unmasks exceptions.
    fn load_control(&mut self, op: &Op) {
        let place = self.lookup(&Address::of(op), 2, Access::Read);
        self.host_flags = false;
        self.load16(A, place.mem);
        self.e.alu_imm(Alu::And, false, A, X87_CONTROL.into());
        self.e.alu_imm(Alu::Or, false, A, 0x40);
        self.e.mov32(B, A);
        self.e.alu_imm(Alu::And, false, B, X87_MASKS.into());
        self.e.alu_imm(Alu::Cmp, false, B, X87_MASKS.into());
        let unmasks = self.e.jcc(cc::NOT_EQUAL);
        self.slow(unmasks);
        self.store16(fp(fx::FCW), A);
        self.e.rm(false, &[0xd9], 5, fp(fx::FCW));
    }

    fn load16(&mut self, to: u8, mem: Mem) {
        self.e.rm(false, &[0x0f, 0xb7], to, mem);
    }

    fn store16(&mut self, mem: Mem, from: u8) {
        store16(&mut self.e, mem, from);
    }

    /// The x87 state must be in the host's registers from here on.
    fn need_x87(&mut self, op: usize) {
        if self.x87.is_live {
            return;
        }
        self.host_flags = false;
        self.e.rm(false, &[0x80], 7, frame_field!(x87_live)); // cmp
        self.e.raw(&[0]);
        let jump = self.e.jcc(cc::EQUAL);
        self.x87.loads.push(Load { op, jump, back: self.e.here(), pointers: self.x87.pointers });
        self.x87.is_live = true;
    }

    /// What [`need_x87`](Self::need_x87) jumps to.
    pub fn emit_x87_loads(&mut self) {
        for load in std::mem::take(&mut self.x87.loads) {
            self.e.bind(load.jump);
            if let Some(op) = load.pointers {
                self.emit_pointers(op);
            }
            self.e.call(self.stubs.x87_load);
            let unusable = self.e.jcc(cc::NOT_EQUAL);
            self.by_function(load.op, unusable);
            self.e.jmp_to(load.back);
        }
    }

    /// FIP and FOP go to the core if they aren't there. Clobbers [`A`], leaves flags alone.
    pub fn store_pointers(&mut self) {
        if let Some(op) = self.x87.pointers.take() {
            self.emit_pointers(op);
        }
    }

    /// FIP and FOP of operation `op` go to the core.
    pub fn emit_pointers(&mut self, op: usize) {
        let op = &self.block.ops[op];
        let rip = self.block.rip.wrapping_add(op.start.into());
        self.rip(A, rip);
        self.e.store(fp(fx::FIP), A);
        self.e.raw(&[0x66]);
        self.e.rm(false, &[0xc7], 0, fp(fx::FOP)); // mov word
        self.e.raw(&op.x87_opcode().to_le_bytes());
    }
}

fn store16(e: &mut Emitter, mem: Mem, from: u8) {
    e.raw(&[0x66]);
    e.rm(false, &[0x89], from, mem);
}

/// See [`Stubs::x87_load`](crate::stubs::Stubs::x87_load). Vector registers and MXCSR come back as they are.
pub fn emit_load(e: &mut Emitter) -> usize {
    let here = e.here();
    e.rm(false, &[0x80], 7, frame_field!(x87_usable)); // cmp
    e.raw(&[1]);
    let unusable = e.jcc(cc::NOT_EQUAL);
    e.rm(true, &[0x0f, 0xae], 0, image(0)); // fxsave64
    e.load(A, fp(fx::FCW));
    e.store(image(fx::FCW), A);
    for n in (0..8 * 16).step_by(16) {
        e.load(A, fp(fx::ST + n));
        e.load(B, fp(fx::ST + n + 8));
        e.store(image(fx::ST + n), A);
        e.store(image(fx::ST + n + 8), B);
    }
    e.rm(true, &[0x0f, 0xae], 1, image(0)); // fxrstor64
    e.rm(false, &[0xc6], 0, frame_field!(x87_live)); // mov byte
    e.raw(&[1]);
    e.bind(unusable);
    e.raw(&[0xc3]);
    here
}

/// Place in the frame's FXSAVE image.
fn image(offset: usize) -> Mem {
    Mem { disp: frame_field!(image).disp + offset as i32, ..frame_field!(image) }
}

/// See [`Stubs::x87_store`](crate::stubs::Stubs::x87_store).
pub fn emit_store(e: &mut Emitter) -> usize {
    let here = e.here();
    e.rm(false, &[0x80], 7, frame_field!(x87_live)); // cmp
    e.raw(&[0]);
    let stored = e.jcc(cc::EQUAL);
    e.rm(true, &[0x0f, 0xae], 0, image(0)); // fxsave64
    e.rm(false, &[0x0f, 0xb7], A, image(fx::FSW)); // movzx
    store16(e, fp(fx::FSW), A);
    e.rm(false, &[0x0f, 0xb6], A, image(fx::FTW)); // movzx
    e.rm(false, &[0x88], A, fp(fx::FTW));
    for n in (0..8 * 16).step_by(16) {
        e.load(A, image(fx::ST + n));
        e.load(B, image(fx::ST + n + 8));
        e.store(fp(fx::ST + n), A);
        e.store(fp(fx::ST + n + 8), B);
    }
    // As functions are to be called: empty, with the usual FCW.
    e.raw(&[0x0f, 0x77]); // emms
    e.rm(false, &[0xd9], 5, frame_field!(host_fcw)); // fldcw
    e.rm(false, &[0xc6], 0, frame_field!(x87_live)); // mov byte
    e.raw(&[0]);
    e.bind(stored);
    e.raw(&[0xc3]);
    here
}
