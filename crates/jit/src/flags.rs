//! The guest's status flags as generated code keeps them: AH as LAHF leaves it, AL is OF.

use crate::emitter::Emitter;
use umbra_arch::rflags;
use umbra_cpu::flags::Flags;

/// Flags in AH, besides the bit that is always set.
const IN_AH: u64 = rflags::SF | rflags::ZF | rflags::AF | rflags::PF | rflags::CF;

/// From the interpreter's form.
#[inline]
pub fn pack(flags: Flags) -> u32 {
    let value = flags.to_rflags();
    ((value & IN_AH | 2) << 8 | value >> 11 & 1) as u32
}

/// To the interpreter's form.
#[inline]
pub fn unpack(packed: u32) -> Flags {
    let packed = u64::from(packed);
    Flags::from_rflags(packed >> 8 & IN_AH | (packed & 1) << 11)
}

impl Emitter {
    /// Saves the host's status flags as the guest's; leaves them alone.
    pub fn save_flags(&mut self) {
        self.raw(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
    }

    /// As [`save_flags`](Self::save_flags), with AF and OF cleared. Clobbers the host's flags.
    pub fn save_flags_without_af_and_of(&mut self) {
        self.raw(&[0x9f, 0x25, 0x00, 0xef, 0x00, 0x00]); // lahf; and eax, 0xef00
    }

    /// Loads the host's status flags with the guest's.
    pub fn restore_flags(&mut self) {
        self.raw(&[0x3c, 0x81, 0x9e]); // cmp al, -127; sahf
    }

    /// `setcc al`.
    pub fn set_al(&mut self, condition: u8) {
        self.raw(&[0x0f, 0x90 | condition, 0xc0]);
    }
}

/// Whether the host's logic instructions clear AF, as the interpreter's do; manuals leave it undefined.
pub fn logic_clears_af() -> bool {
    let mut clears = true;
    for value in [0u64, 1, u64::MAX, 0x10] {
        let saved: u64;
        // SAFETY: changes only the registers named, flags and its own stack slot.
        unsafe {
            std::arch::asm!(
                "mov {t:e}, 15",
                "add {t:e}, 1",
                "and {v}, {v}",
                "pushfq",
                "pop {t}",
                t = out(reg) saved,
                v = inout(reg) value => _,
            );
        }
        clears &= saved & rflags::AF == 0;
    }
    clears
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_survives_packing() {
        for bits in 0..64u64 {
            let names = [rflags::CF, rflags::PF, rflags::AF, rflags::ZF, rflags::SF, rflags::OF];
            let value = (0..6).filter(|i| bits >> i & 1 != 0).fold(0, |all, i| all | names[i]);
            assert_eq!(unpack(pack(Flags::from_rflags(value))).to_rflags(), value);
        }
    }
}
