//! VM exits decoded ("Basic Exit Reasons", "Exit Qualification for I/O Instructions").

use umbra_arch::AccessWidth;

/// A port access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct PortAccess {
    pub(super) port: u16,
    pub(super) width: AccessWidth,
    pub(super) is_in: bool,
}

/// What a VM exit asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Exit {
    /// The host interrupted the guest, or time was up.
    Interrupted,
    /// HLT.
    Halt,
    /// Interrupts can be taken now.
    Window,
    /// IN or OUT of a register.
    Port(PortAccess),
    /// Triple fault.
    TripleFault,
    /// Something that another engine has to do, by its basic exit reason.
    Other(u16),
}

/// Decodes a reason with its qualification.
pub(super) fn decode(reason: u64, qualification: u64) -> Exit {
    const ENTRY_FAILED: u64 = 1 << 31;
    match (reason & 0xffff, reason & ENTRY_FAILED != 0) {
        (1, false) | (52, false) => Exit::Interrupted,
        (2, false) => Exit::TripleFault,
        (7, false) => Exit::Window,
        (12, false) => Exit::Halt,
        (30, false) => port(qualification).map_or(Exit::Other(30), Exit::Port),
        (other, _) => Exit::Other(other as u16),
    }
}

/// `None` for string instructions, whose operands the qualification doesn't have.
fn port(qualification: u64) -> Option<PortAccess> {
    const IN: u64 = 1 << 3;
    const STRING: u64 = 1 << 4;
    let width = AccessWidth::of_bytes((qualification & 7) + 1)?;
    let access = PortAccess { port: (qualification >> 16) as u16, width, is_in: qualification & IN != 0 };
    (qualification & STRING == 0 && width != AccessWidth::Qword).then_some(access)
}
