//! The segments that native code runs in.

use super::WINDOW;
use std::io;
use umbra_arch::segment::{Attr, Segment};

/// Size of code, and with it of the stack.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Mode {
    /// 16-bit code, data and stack; all bases are the window's address, limits 64 KiB.
    Bits16,
    /// 32-bit code in flat segments.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

const fn local(index: u16) -> u16 {
    index << 3 | 7
}

const USER_CS32: u16 = 0x23;
const USER_DS: u16 = 0x2b;
const USER_CS64: u16 = 0x33;
/// Selector of GS in every mode.
pub const SELECTOR_G: u16 = local(2);
/// Other local descriptors, for instructions that load or examine selectors: read-only data, not-present data,
/// expand-down data, execute-only code; all with GS's base and limit.
pub const LOCAL: [(u16, Attr); 4] =
    [(local(3), Attr(0x40f1)), (local(4), Attr(0x4073)), (local(5), Attr(0x40f7)), (local(6), Attr(0x40f9))];
/// Selectors of the operating system that 64-bit Linux fixes: kernel code and data, user 32-bit code, data,
/// 64-bit code.
pub const GLOBAL: [(u16, Attr); 5] = [
    (0x10, Attr(0xa09b)),
    (0x18, Attr(0xc093)),
    (USER_CS32, Attr(0xc0fb)),
    (USER_DS, Attr(0xc0f3)),
    (USER_CS64, Attr(0xa0fb)),
];
/// GS in every mode: a base of its own and a limit that a 16-bit offset can exceed.
pub const SEGMENT_G: Segment =
    Segment { base: WINDOW + 0x2000, limit: 0x1fff, attr: Attr(0x40f3), selector: SELECTOR_G };

impl Mode {
    /// Every mode.
    pub const ALL: [Mode; 3] = [Mode::Bits16, Mode::Bits32, Mode::Bits64];

    /// 16, 32 or 64.
    pub fn bits(self) -> u32 {
        match self {
            Mode::Bits16 => 16,
            Mode::Bits32 => 32,
            Mode::Bits64 => 64,
        }
    }
    /// CS.
    pub fn code(self) -> Segment {
        match self {
            Mode::Bits16 => Segment { base: WINDOW, limit: 0xffff, attr: Attr(0xfb), selector: local(0) },
            Mode::Bits32 => Segment::flat_code32(USER_CS32, 3),
            Mode::Bits64 => Segment::code64(USER_CS64, 3),
        }
    }
    /// DS, ES and SS.
    pub fn data(self) -> Segment {
        match self {
            Mode::Bits16 => Segment { base: WINDOW, limit: 0xffff, attr: Attr(0xf3), selector: local(1) },
            _ => Segment::flat_data(USER_DS, 3),
        }
    }
    /// What an offset in CS, DS, ES or SS is added to.
    pub fn base(self) -> u64 {
        if self == Mode::Bits16 { WINDOW } else { 0 }
    }
    /// Mask of a linear address and of the registers that matter.
    pub fn mask(self) -> u64 {
        if self == Mode::Bits64 { u64::MAX } else { 0xffff_ffff }
    }
}

/// struct user_desc of modify_ldt(2).
#[repr(C)]
struct Descriptor {
    entry: u32,
    base: u32,
    limit: u32,
    flags: u32,
}

/// Bits of [`Descriptor::flags`].
const BIG: u32 = 1;
const CODE: u32 = 2 << 1;
const EXPAND_DOWN: u32 = 1 << 1;
const READ_ONLY: u32 = 1 << 3;
const NOT_PRESENT: u32 = 1 << 5;

fn other(entry: u32, flags: u32) -> Descriptor {
    Descriptor { entry, base: SEGMENT_G.base as u32, limit: SEGMENT_G.limit, flags }
}

pub(super) fn install() -> io::Result<()> {
    let window = WINDOW as u32;
    let table = [
        Descriptor { entry: 0, base: window, limit: 0xffff, flags: CODE },
        Descriptor { entry: 1, base: window, limit: 0xffff, flags: 0 },
        Descriptor { entry: 2, base: SEGMENT_G.base as u32, limit: SEGMENT_G.limit, flags: BIG },
        other(3, BIG | READ_ONLY),
        other(4, BIG | NOT_PRESENT),
        other(5, BIG | EXPAND_DOWN),
        other(6, BIG | CODE | READ_ONLY),
    ];
    for descriptor in &table {
        // SAFETY: modify_ldt with function 1 reads one struct user_desc of this size.
        let done =
            unsafe { libc::syscall(libc::SYS_modify_ldt, 1, std::ptr::from_ref(descriptor), size_of::<Descriptor>()) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
