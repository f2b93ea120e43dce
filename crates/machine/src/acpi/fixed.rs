//! FADT, FACS and HPET ("Fixed ACPI Description Table", "Firmware ACPI Control Structure", "IA-PC HPET
//! Specification").

use super::table::Table;
use crate::memory_map::HPET_BASE;
use umbra_devices::acpi_pm::{ACPI_DISABLE, ACPI_ENABLE, GPE0_BLK, PM_TMR_BLK, PM1A_CNT_BLK, PM1A_EVT_BLK, SMI_CMD};
use umbra_devices::hpet::BLOCK_ID;

/// ISA interrupt of the power-management block.
pub(crate) const SCI_IRQ: u8 = 9;

/// The PIIX reset control register, and the value that resets hard.
const RESET_PORT: u16 = 0xcf9;
const RESET_VALUE: u8 = 6;

/// IA-PC Boot Architecture Flags: legacy devices and an 8042 are there, VGA is not.
const BOOT_ARCH: u16 = 1 | 1 << 1 | 1 << 2;

/// Fixed Feature Flags: WBINVD works, C1 exists, no fixed sleep button, RTC wake is not fixed hardware,
/// the reset register works.
const FEATURES: u32 = 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 10;

/// Lengths in bytes of the power-management blocks.
const EVT_BYTES: u8 = 4;
const CNT_BYTES: u8 = 2;
const TMR_BYTES: u8 = 4;
const GPE_BYTES: u8 = 4;

const CENTURY_IN_CMOS: u8 = 0x32;
const FADT_BYTES: usize = 244;

/// A register in system I/O space ("Generic Address Structure"); port 0 is an absent one.
fn port_gas(table: &mut Table, port: u16, bytes: u8) {
    let access = match bytes {
        1 => 1,
        2 => 2,
        _ => 3,
    };
    if port == 0 {
        return table.raw(&[0; 12]);
    }
    table.raw(&[1, bytes * 8, 0, access]);
    table.u64(port.into());
}

pub(super) fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    let mut t = Table::new(b"FACP", 3);
    t.u32(facs as u32);
    t.u32(dsdt as u32);
    t.u8(0);
    t.u8(1);
    t.u16(SCI_IRQ.into());
    t.u32(SMI_CMD.into());
    t.raw(&[ACPI_ENABLE, ACPI_DISABLE, 0, 0]);
    for port in [PM1A_EVT_BLK, 0, PM1A_CNT_BLK, 0, 0, PM_TMR_BLK, GPE0_BLK, 0] {
        t.u32(port.into());
    }
    t.raw(&[EVT_BYTES, CNT_BYTES, 0, TMR_BYTES, GPE_BYTES, 0, 0, 0]);
    // C2 and C3 latencies that say "not supported", then no cache flush by stride, no duty cycle.
    t.u16(0xfff);
    t.u16(0xfff);
    t.raw(&[0; 8]);
    t.u8(CENTURY_IN_CMOS);
    t.u16(BOOT_ARCH);
    t.u8(0);
    t.u32(FEATURES);
    port_gas(&mut t, RESET_PORT, 1);
    t.raw(&[RESET_VALUE, 0, 0, 0]);
    t.u64(facs);
    t.u64(dsdt);
    for (port, bytes) in [
        (PM1A_EVT_BLK, EVT_BYTES),
        (0, 0),
        (PM1A_CNT_BLK, CNT_BYTES),
        (0, 0),
        (0, 0),
        (PM_TMR_BLK, TMR_BYTES),
        (GPE0_BLK, GPE_BYTES),
        (0, 0),
    ] {
        port_gas(&mut t, port, bytes);
    }
    debug_assert_eq!(t.offset(), FADT_BYTES);
    t.finish()
}

/// Where the HPET is. Periodic timers of fewer ticks than a microsecond's lose interrupts.
pub(super) fn hpet() -> Vec<u8> {
    const MIN_TICKS: u16 = 100;
    let mut t = Table::new(b"HPET", 1);
    t.u32(BLOCK_ID);
    t.raw(&[0, 64, 0, 0]);
    t.u64(HPET_BASE);
    t.u8(0);
    t.u16(MIN_TICKS);
    t.u8(0);
    t.finish()
}

/// The structure that firmware and system share; it has no checksum.
pub(super) fn facs() -> Vec<u8> {
    let mut facs = vec![0; 64];
    facs[..4].copy_from_slice(b"FACS");
    facs[4] = 64;
    facs[32] = 1;
    facs
}
