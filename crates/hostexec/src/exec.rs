//! [`HostExec`]: prepares instructions and runs them.

use crate::code_memory::CodeMemory;
use crate::form::Form;
use crate::host_op::{Class, HostExecError, HostOp, MemBuf, Outcome, Prepared};
use crate::integer::Division;
use crate::x87::Image;
use crate::{HostFeatures, host_features, mmx, simd, stub, x87};
use hashbrown::HashMap;
use iced_x86::{Encoder, Instruction};
use umbra_arch::fpu::FpState;
use umbra_arch::rflags;

/// Address space for stubs: more than all vector and x87 forms together need.
const CODE_BYTES: usize = 16 << 20;

/// One piece of generated code and how it is to be called.
#[derive(Clone, Copy)]
pub(crate) struct Stub {
    entry: stub::Entry,
    class: Class,
    mxcsr: bool,
    enters_mmx: bool,
    /// A store that an unmasked x87 overflow or underflow suppresses.
    pub(crate) stores: bool,
    flags_written: u64,
    division: Option<Division>,
}

/// The registers and memory an instruction works on.
pub(crate) struct Operands<'a> {
    pub fp: &'a mut FpState,
    pub gpr: &'a mut [u64; 16],
    pub rflags: &'a mut u64,
    pub mem: &'a mut MemBuf,
}

/// Identity of a stub: encoding of the renamed instruction, which determines everything else.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    bytes: [u8; 15],
    class: u8,
}

/// Owner of the generated code. Not shared between threads; each virtual CPU has its own.
pub struct HostExec {
    stubs: Vec<Stub>,
    cache: HashMap<Key, u32>,
    image: Box<Image>,
    features: HostFeatures,
    /// Last, so that it outlives the entries that point into it.
    code: CodeMemory,
}

impl HostExec {
    /// An executor without stubs.
    ///
    /// # Errors
    /// When the operating system gives no executable memory.
    pub fn new() -> Result<Self, HostExecError> {
        let features = host_features();
        let mut image = Box::new(Image::default());
        if image.mxcsr_mask() & simd::DAZ == 0 {
            return Err(HostExecError::NoDaz);
        }
        let code = CodeMemory::new(CODE_BYTES)?;
        Ok(Self { stubs: Vec::new(), cache: HashMap::new(), image, features, code })
    }

    /// Finds or makes the stub for `guest`, decoded in any code size.
    ///
    /// # Errors
    /// [`Unsupported`](HostExecError::Unsupported) with a reason for everything but data instructions,
    /// [`MissingFeature`](HostExecError::MissingFeature) when the host lacks it.
    pub fn prepare(&mut self, guest: &Instruction) -> Result<Prepared, HostExecError> {
        let form = Form::of(guest, &self.features)?;
        let key = Key { bytes: encode(&form)?, class: form.class as u8 };
        let index = match self.cache.get(&key) {
            Some(index) => *index,
            None => self.add_stub(&form, key)?,
        };
        Ok(Prepared {
            op: HostOp::new(index, form.regs),
            class: form.class,
            mem_read: form.mem_read,
            mem_write: form.mem_write,
            mem_align: form.mem_align,
            mxcsr: form.mxcsr,
            enters_mmx: form.enters_mmx,
            flags_read: form.flags_read,
            flags_written: form.flags_written,
        })
    }

    fn add_stub(&mut self, form: &Form, key: Key) -> Result<u32, HostExecError> {
        let refused =
            |_| HostExecError::Unsupported { code: form.core.code(), reason: "can't be assembled in 64-bit code" };
        let bytes = stub::assemble(form).map_err(refused)?;
        let address = self.code.append(&bytes)?;
        // SAFETY: `address` is the start of complete code with this signature, and stays mapped with `self`.
        let entry = unsafe { std::mem::transmute::<*const u8, stub::Entry>(address) };
        let index = self.stubs.len() as u32;
        self.stubs.push(Stub {
            entry,
            class: form.class,
            mxcsr: form.mxcsr,
            enters_mmx: form.enters_mmx,
            stores: form.mem_write != 0,
            flags_written: form.flags_written,
            division: Division::of(&form.core),
        });
        self.cache.insert(key, index);
        Ok(index)
    }

    /// Executes `op`. Registers and flags change as the instruction changes them, and nothing else of `fp`
    /// but MXCSR's flags; FOP, FIP and FDP are the caller's. `mem` holds the memory operand before and after.
    ///
    /// An x87 instruction must not be run while an unmasked exception is pending (FSW.ES): that is #MF.
    ///
    /// # Panics
    /// When no stub has that number: `op` is of another executor.
    #[inline]
    pub fn run(
        &mut self,
        op: HostOp,
        fp: &mut FpState,
        gpr: &mut [u64; 16],
        rflags: &mut u64,
        mem: &mut MemBuf,
    ) -> Outcome {
        let stub = self.stubs[op.stub()];
        let operands = Operands { fp, gpr, rflags, mem };
        match stub.class {
            Class::Sse | Class::Avx | Class::Mmx if stub.mxcsr && !simd::all_masked(operands.fp.mxcsr) => {
                simd::run_careful(&stub, op, operands)
            }
            Class::Sse | Class::Avx | Class::Mmx => {
                stub.run_vector(op, operands);
                Outcome::Done
            }
            Class::X87 => x87::run(&stub, op, &mut self.image, operands),
            Class::Integer => stub.run_integer(op, operands),
        }
    }

    /// Number of stubs and bytes of code made so far.
    pub fn code_size(&self) -> (usize, usize) {
        (self.stubs.len(), self.code.used())
    }

    /// What the host can execute.
    pub fn features(&self) -> HostFeatures {
        self.features
    }
}

impl Stub {
    /// With MXCSR's exceptions masked, or an instruction that doesn't obey it.
    #[inline(always)]
    pub(crate) fn run_vector(&self, op: HostOp, o: Operands<'_>) {
        if self.enters_mmx {
            mmx::enter(o.fp);
        }
        let flags = self.call(op, o.fp, o.gpr, *o.rflags, o.mem);
        self.merge_flags(o.rflags, flags);
    }

    /// Status flags into RFLAGS.
    #[inline(always)]
    pub(crate) fn merge_flags(&self, rflags: &mut u64, flags: u64) {
        *rflags = *rflags & !self.flags_written | flags & self.flags_written;
    }

    fn run_integer(&self, op: HostOp, o: Operands<'_>) -> Outcome {
        if self.division.is_some_and(|d| d.faults(o.gpr, &o.mem.0)) {
            return Outcome::DivideError;
        }
        let flags = self.call(op, o.fp, o.gpr, *o.rflags, o.mem);
        *o.rflags = *o.rflags & !rflags::STATUS | flags & rflags::STATUS;
        Outcome::Done
    }

    /// Runs the code; returns the host's flags (meaningful if the instruction writes any).
    #[inline(always)]
    pub(crate) fn call(&self, op: HostOp, fp: *mut FpState, gpr: &mut [u64; 16], flags: u64, mem: &mut MemBuf) -> u64 {
        let flags = flags & rflags::STATUS | rflags::FIXED;
        // SAFETY: `entry` is a stub of this crate: it keeps the System V convention and touches only what the
        // pointers cover, an FpState (x87: its first 512 bytes, the image), 16 registers and 64 aligned bytes;
        // register numbers are below 16 (`HostOp`). It can't fault: MXCSR's and FCW's exceptions are masked by
        // the callers, or wait for an instruction that doesn't come (`x87`), MXCSR's reserved bits are 0 (`simd::all_masked`), division was checked.
        unsafe { (self.entry)(fp, gpr.as_mut_ptr(), flags, op.regs(), mem.0.as_mut_ptr()) }
    }
}

fn encode(form: &Form) -> Result<[u8; 15], HostExecError> {
    let mut encoder = Encoder::new(64);
    let mut bytes = [0; 15];
    match encoder.encode(&form.core, 0) {
        Ok(length) if length <= 15 => bytes[..length].copy_from_slice(&encoder.take_buffer()),
        _ => {
            let reason = "has no encoding in 64-bit code";
            return Err(HostExecError::Unsupported { code: form.core.code(), reason });
        }
    }
    Ok(bytes)
}
