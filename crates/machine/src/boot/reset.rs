//! Starts without a boot protocol: the reset vector, and a boot sector as a BIOS would start it.

use super::{BootError, BootPlan, BootRequest, ImageKind, Piece};
use std::borrow::Cow;
use umbra_arch::segment::{Seg, Segment};
use umbra_arch::state::reg;
use umbra_arch::{CpuState, Gpa};

/// Where a BIOS puts a boot sector.
pub const BOOT_SECTOR_AT: u64 = 0x7c00;
/// DL for the first hard disk, as a BIOS hands it over.
const FIRST_HARD_DISK: u64 = 0x80;

/// Starts at the reset vector: what runs there is the firmware's business.
pub fn reset_plan() -> BootPlan<'static> {
    BootPlan { kind: None, pieces: Vec::new(), state: Box::new(CpuState::reset()) }
}

/// A flat image with 55AAh at offset 510, entered in real mode at 0:7C00h. There are no BIOS calls.
pub(super) fn boot_sector_plan<'a>(request: &BootRequest<'a>) -> Result<BootPlan<'a>, BootError> {
    let kind = ImageKind::BootSector;
    if request.initrd.is_some() {
        return Err(BootError::NoInitrdSupport { kind });
    }
    if !request.command_line.is_empty() {
        return Err(BootError::NoCommandLineSupport { kind });
    }
    let len = request.kernel.len() as u64;
    let what = "the boot sector with what follows it";
    if !request.map.is_usable(BOOT_SECTOR_AT, len) {
        let end = BOOT_SECTOR_AT.saturating_add(len);
        let why = "isn't all conventional RAM".into();
        return Err(BootError::DoesNotFit { what, start: BOOT_SECTOR_AT, end, why });
    }
    let mut state = CpuState::reset();
    state.seg[Seg::Cs as usize] = Segment::real(0);
    state.rip = BOOT_SECTOR_AT;
    state.gpr[reg::RSP] = BOOT_SECTOR_AT;
    state.gpr[reg::RDX] = FIRST_HARD_DISK;
    let piece = Piece { what, gpa: Gpa::new(BOOT_SECTOR_AT), bytes: Cow::Borrowed(request.kernel) };
    Ok(BootPlan { kind: Some(kind), pieces: vec![piece], state: Box::new(state) })
}
