//! Translations of a piece of code that belongs to no guest: for `umbra dump` and tests.

use crate::listing::Translated;
use crate::{Jit, JitError, JitOptions};
use std::sync::{Arc, Mutex, PoisonError};
use umbra_arch::control::{Cr0, Cr3, Cr4, Efer};
use umbra_arch::cpuid::CpuidProfile;
use umbra_arch::segment::{Attr, Seg, Segment};
use umbra_arch::{CpuState, Gpa, Vcpu};
use umbra_cpu::EngineOptions;
use umbra_memory::{GuestMemory, MemoryError};

/// Why there is no translation.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// There can't be a translator.
    #[error(transparent)]
    Jit(#[from] JitError),
    /// There is no memory for the code.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Too much code.
    #[error("{0} bytes are too many: give at most {LONGEST}")]
    TooLong(usize),
    /// The block at this offset can't be translated.
    #[error("offset {0:#x}: there is no block that can be translated")]
    Untranslatable(u64),
}

/// Processor mode of a sample.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SampleMode {
    /// Real mode.
    Bits16,
    /// Protected mode.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

const RAM: u64 = 2 << 20;
/// Where the code is.
const CODE: u64 = 0x8000;
/// Where tables are that map the first 2 MiB one to one.
const TABLES: u64 = 0x2000;
/// Most bytes of code.
const LONGEST: usize = 4096;

/// Translates code block by block, without running any of it.
///
/// # Errors
/// [`SampleError`].
pub fn translations_of(code: &[u8], mode: SampleMode, options: JitOptions) -> Result<Vec<Translated>, SampleError> {
    if code.len() > LONGEST {
        return Err(SampleError::TooLong(code.len()));
    }
    let memory = Arc::new(GuestMemory::new(RAM)?);
    for (at, entry) in [(0, TABLES + 0x1003), (0x1000, TABLES + 0x2003), (0x2000, 0x83)] {
        memory.write(Gpa::new(TABLES + at), &u64::to_le_bytes(entry));
    }
    // The last instruction is followed by HLT.
    memory.write(Gpa::new(CODE), &[code, &[0xf4]].concat());
    let options = JitOptions { threshold: 0, hot_after: 0, legacy: true, ..options };
    let mut engine = Jit::new(memory, &CpuidProfile::default(), 0, &EngineOptions::default(), options)?;
    let heard = Arc::new(Mutex::new(Vec::new()));
    let all = Arc::clone(&heard);
    engine.set_listener(Box::new(move |translated| {
        heard.lock().unwrap_or_else(PoisonError::into_inner).push(translated.clone());
    }));
    let mut state = state(mode);
    while state.rip < CODE + code.len() as u64 {
        engine.set_state(&state);
        state.rip = engine.translate_here().ok_or(SampleError::Untranslatable(state.rip - CODE))?;
    }
    Ok(std::mem::take(&mut *all.lock().unwrap_or_else(PoisonError::into_inner)))
}

/// Flat segments, no interrupts.
fn state(mode: SampleMode) -> CpuState {
    let mut s = CpuState::reset();
    let (cr0, cr4, efer, attr) = match mode {
        SampleMode::Bits16 => (0x10, 0x600, 0, 0x9b),
        SampleMode::Bits32 => (0x11, 0x600, 0, 0xc09b),
        SampleMode::Bits64 => (0x8000_0011, 0x4_0620, 0x500, 0xa09b),
    };
    s.cr0 = Cr0::new(cr0);
    s.cr3 = Cr3::new(TABLES);
    s.cr4 = Cr4::new(cr4);
    s.efer = Efer::new(efer);
    s.xcr0 = 7;
    if mode == SampleMode::Bits32 {
        for seg in [Seg::Ds, Seg::Es, Seg::Ss] {
            s.seg[seg as usize] = Segment::flat_data(0x10, 0);
        }
    }
    s.seg[Seg::Cs as usize] = Segment { selector: 8, base: 0, limit: u32::MAX, attr: Attr(attr) };
    s.rip = CODE;
    s
}
