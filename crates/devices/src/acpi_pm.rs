//! ACPI power management, laid out as the PIIX4's block: PM1a event and control, PM timer, GPE0, and
//! the SMI command port by which systems switch from legacy to ACPI mode.

use crate::{Device, PortDevice, regmap};
use serde::{Deserialize, Serialize};
use umbra_arch::{AccessWidth, VirtualTime};

/// First port of the power-management block.
pub const PM_BASE: u16 = 0x600;
/// Ports of the block.
pub const PM_SIZE: u16 = 0x10;
/// PM1a event block (status, enable), 4 bytes.
pub const PM1A_EVT_BLK: u16 = PM_BASE;
/// PM1a control block, 2 bytes.
pub const PM1A_CNT_BLK: u16 = PM_BASE + 4;
/// PM timer block, 4 bytes.
pub const PM_TMR_BLK: u16 = PM_BASE + 8;
/// General-purpose event block 0 (status, enable), 4 bytes.
pub const GPE0_BLK: u16 = PM_BASE + 0xc;
/// SMI command port; the one after it is a scratch byte.
pub const SMI_CMD: u16 = 0xb2;
/// Written to [`SMI_CMD`]: hand over to ACPI.
pub const ACPI_ENABLE: u8 = 0xf1;
/// Written to [`SMI_CMD`]: back to legacy mode.
pub const ACPI_DISABLE: u8 = 0xf0;
/// SLP_TYP of S5 in the DSDT's `_S5`.
pub const S5_SLP_TYP: u8 = 0;
/// PM timer frequency in hertz.
pub const PM_TIMER_HZ: u64 = 3_579_545;

/// PM1 status and enable bits.
mod pm1 {
    pub const TIMER: u16 = 1 << 0;
    pub const GLOBAL: u16 = 1 << 5;
    pub const POWER_BUTTON: u16 = 1 << 8;
    pub const SLEEP_BUTTON: u16 = 1 << 9;
    pub const RTC: u16 = 1 << 10;
    pub const EVENTS: u16 = TIMER | GLOBAL | POWER_BUTTON | SLEEP_BUTTON | RTC;
}
/// PM1 control bits.
mod cnt {
    pub const SCI_EN: u16 = 1 << 0;
    pub const SLP_TYP_SHIFT: u16 = 10;
    pub const SLP_EN: u16 = 1 << 13;
    pub const WRITABLE: u16 = 0x1c02;
}

/// What the guest asks of the machine through SLP_EN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PowerRequest {
    /// S5.
    PowerOff,
    /// Another SLP_TYP.
    Sleep(u8),
}

/// The power-management block at [`PM_BASE`] and the SMI command port.
///
/// The SCI is a level: up while SCI_EN is set and an enabled event's status bit is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AcpiPm {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u16,
    gpe_enable: u16,
    smi_command: u8,
    smi_data: u8,
    /// 32 bits wide, not 24.
    wide_timer: bool,
    now: VirtualTime,
    request: Option<PowerRequest>,
}

impl Default for AcpiPm {
    fn default() -> Self {
        Self::new(false)
    }
}

impl AcpiPm {
    /// Ports the device answers at.
    pub const PORTS: &'static [u16] = &[
        0x600, 0x601, 0x602, 0x603, 0x604, 0x605, 0x606, 0x607, 0x608, 0x609, 0x60a, 0x60b, 0x60c, 0x60d, 0x60e, 0x60f,
        0xb2, 0xb3,
    ];

    /// A block in legacy mode; `wide_timer` makes the PM timer 32 bits wide instead of 24 (the FADT's
    /// TMR_VAL_EXT flag says the same).
    pub fn new(wide_timer: bool) -> Self {
        Self {
            status: 0,
            enable: 0,
            control: 0,
            gpe_status: 0,
            gpe_enable: 0,
            smi_command: 0,
            smi_data: 0,
            wide_timer,
            now: VirtualTime(0),
            request: None,
        }
    }

    /// Level of the system control interrupt.
    pub fn sci(&self) -> bool {
        let event = self.status & self.enable & pm1::EVENTS != 0 || self.gpe_status & self.gpe_enable != 0;
        self.control & cnt::SCI_EN != 0 && event
    }

    /// What the guest asked for since the last call.
    pub fn take_request(&mut self) -> Option<PowerRequest> {
        self.request.take()
    }

    /// The user presses the power button.
    pub fn press_power_button(&mut self, now: VirtualTime) {
        self.advance(now);
        self.status |= pm1::POWER_BUTTON;
    }

    /// General-purpose event `n` (0..16) happens.
    pub fn raise_gpe(&mut self, n: u8) {
        self.gpe_status |= 1u16.checked_shl(n.into()).unwrap_or(0);
    }

    /// The PM timer's value.
    fn timer(&self) -> u32 {
        let ticks = self.now.ticks(PM_TIMER_HZ) as u32;
        if self.wide_timer { ticks } else { ticks & 0xff_ffff }
    }

    /// Ticks between two changes of the timer's highest bit, as a shift.
    fn toggle_shift(&self) -> u32 {
        if self.wide_timer { 31 } else { 23 }
    }

    fn toggles(&self, now: VirtualTime) -> u64 {
        now.ticks(PM_TIMER_HZ) >> self.toggle_shift()
    }

    fn read(&self, port: u16) -> u8 {
        let byte = |register: u16, high: bool| if high { (register >> 8) as u8 } else { register as u8 };
        let high = port & 1 != 0;
        match port.wrapping_sub(PM_BASE) {
            0 | 1 => byte(self.status, high),
            2 | 3 => byte(self.enable, high),
            4 | 5 => byte(self.control, high),
            offset @ 8..12 => (self.timer() >> (8 * (offset - 8))) as u8,
            12 | 13 => byte(self.gpe_status, high),
            14 | 15 => byte(self.gpe_enable, high),
            6 | 7 => 0,
            _ if port == SMI_CMD => self.smi_command,
            _ if port == SMI_CMD + 1 => self.smi_data,
            _ => 0xff,
        }
    }

    fn write(&mut self, port: u16, byte: u8) {
        let high = port & 1 != 0;
        let lane = if high { 0xff00u16 } else { 0x00ff };
        let value = if high { u16::from(byte) << 8 } else { byte.into() };
        let merged = |old: u16| old & !lane | value;
        match port.wrapping_sub(PM_BASE) {
            0 | 1 => self.status &= !value,
            2 | 3 => self.enable = merged(self.enable) & pm1::EVENTS,
            4 | 5 => self.write_control(merged(self.control), lane & value & cnt::SLP_EN != 0),
            12 | 13 => self.gpe_status &= !value,
            14 | 15 => self.gpe_enable = merged(self.gpe_enable),
            _ if port == SMI_CMD => self.write_smi_command(byte),
            _ if port == SMI_CMD + 1 => self.smi_data = byte,
            _ => {}
        }
    }

    /// SCI_EN belongs to the SMI command port, SLP_EN reads as 0.
    fn write_control(&mut self, value: u16, sleep: bool) {
        self.control = self.control & cnt::SCI_EN | value & cnt::WRITABLE;
        if sleep {
            let kind = (self.control >> cnt::SLP_TYP_SHIFT & 7) as u8;
            self.request = Some(if kind == S5_SLP_TYP { PowerRequest::PowerOff } else { PowerRequest::Sleep(kind) });
        }
    }

    fn write_smi_command(&mut self, byte: u8) {
        self.smi_command = byte;
        match byte {
            ACPI_ENABLE => self.control |= cnt::SCI_EN,
            ACPI_DISABLE => self.control &= !cnt::SCI_EN,
            _ => {}
        }
    }
}

impl Device for AcpiPm {
    fn advance(&mut self, now: VirtualTime) {
        let now = now.max(self.now);
        if self.toggles(now) != self.toggles(self.now) {
            self.status |= pm1::TIMER;
        }
        self.now = now;
    }
    fn next_event(&self) -> Option<VirtualTime> {
        let awaited = self.control & cnt::SCI_EN != 0 && self.enable & pm1::TIMER != 0 && !self.sci();
        let next = (self.toggles(self.now) + 1) << self.toggle_shift();
        awaited.then(|| VirtualTime::of_ticks(next, PM_TIMER_HZ))
    }
    fn reset(&mut self) {
        *self = Self { now: self.now, ..Self::new(self.wide_timer) };
    }
}

impl PortDevice for AcpiPm {
    fn port_read(&mut self, now: VirtualTime, port: u16, width: AccessWidth) -> u32 {
        self.advance(now);
        regmap::read_bytes(port, width, |port| self.read(port))
    }
    fn port_write(&mut self, now: VirtualTime, port: u16, width: AccessWidth, value: u32) {
        self.advance(now);
        regmap::write_bytes(port, width, value, |port, byte| self.write(port, byte));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::soak;
    use proptest::prelude::*;

    const NOW: VirtualTime = VirtualTime(0);

    fn out(p: &mut AcpiPm, port: u16, value: u16) {
        p.port_write(NOW, port, AccessWidth::Word, value.into());
    }

    #[test]
    fn block_is_where_the_ports_say() {
        let ports: Vec<u16> = (PM_BASE..PM_BASE + PM_SIZE).chain([SMI_CMD, SMI_CMD + 1]).collect();
        assert_eq!(AcpiPm::PORTS, ports);
    }

    #[test]
    fn acpi_handshake() {
        let mut p = AcpiPm::default();
        out(&mut p, PM1A_CNT_BLK, 1);
        assert_eq!(p.port_read(NOW, PM1A_CNT_BLK, AccessWidth::Word), 0, "SCI_EN is not software's");
        p.port_write(NOW, SMI_CMD, AccessWidth::Byte, ACPI_ENABLE.into());
        assert_eq!(p.port_read(NOW, PM1A_CNT_BLK, AccessWidth::Word), 1);
        p.port_write(NOW, SMI_CMD, AccessWidth::Byte, ACPI_DISABLE.into());
        assert_eq!(p.port_read(NOW, PM1A_CNT_BLK, AccessWidth::Word), 0);
    }

    #[test]
    fn sleep_requests() {
        for kind in 0..8u8 {
            for enable in [false, true] {
                for bytes in [false, true] {
                    let mut p = AcpiPm::default();
                    let value = u16::from(kind) << 10 | if enable { cnt::SLP_EN } else { 0 };
                    if bytes {
                        p.port_write(NOW, PM1A_CNT_BLK + 1, AccessWidth::Byte, u32::from(value >> 8));
                    } else {
                        out(&mut p, PM1A_CNT_BLK, value);
                    }
                    let expected = match (enable, kind) {
                        (false, _) => None,
                        (true, S5_SLP_TYP) => Some(PowerRequest::PowerOff),
                        (true, kind) => Some(PowerRequest::Sleep(kind)),
                    };
                    assert_eq!(p.take_request(), expected);
                    let shown = p.port_read(NOW, PM1A_CNT_BLK, AccessWidth::Word);
                    assert_eq!(shown, u32::from(kind) << 10, "SLP_EN reads as 0");
                }
            }
        }
    }

    #[test]
    fn timer_counts_at_its_rate() {
        for wide in [false, true] {
            let mut p = AcpiPm::new(wide);
            for seconds in [0u64, 1, 2, 4, 5, 599, 600, 1200, 1201] {
                let ticks = seconds * 3_579_545;
                let expected = ticks % if wide { 1 << 32 } else { 1 << 24 };
                let now = VirtualTime(seconds * 1_000_000_000);
                assert_eq!(u64::from(p.port_read(now, PM_TMR_BLK, AccessWidth::Dword)), expected);
            }
        }
    }

    #[test]
    fn timer_overflow_interrupt() {
        let mut p = AcpiPm::default();
        p.port_write(NOW, SMI_CMD, AccessWidth::Byte, ACPI_ENABLE.into());
        out(&mut p, PM1A_EVT_BLK + 2, 1);
        for n in 1..6u64 {
            let due = VirtualTime((n << 23).wrapping_mul(1_000_000_000).div_ceil(3_579_545));
            assert_eq!(p.next_event(), Some(due));
            p.advance(VirtualTime(due.0 - 1));
            assert!(!p.sci());
            p.advance(due);
            assert!(p.sci());
            assert_eq!(p.next_event(), None);
            p.port_write(due, PM1A_EVT_BLK, AccessWidth::Word, 1);
            assert!(!p.sci());
        }
    }

    #[test]
    fn power_button_and_gpe() {
        let mut p = AcpiPm::default();
        p.press_power_button(NOW);
        out(&mut p, PM1A_EVT_BLK + 2, 0x100);
        assert!(!p.sci(), "legacy mode");
        p.port_write(NOW, SMI_CMD, AccessWidth::Byte, ACPI_ENABLE.into());
        assert!(p.sci());
        assert_eq!(p.port_read(NOW, PM1A_EVT_BLK, AccessWidth::Dword), 0x0100_0100);
        out(&mut p, PM1A_EVT_BLK, 0x100);
        assert!(!p.sci());
        p.raise_gpe(3);
        p.raise_gpe(200);
        assert!(!p.sci());
        out(&mut p, GPE0_BLK + 2, 8);
        assert!(p.sci());
        p.port_write(NOW, GPE0_BLK, AccessWidth::Byte, 8);
        assert!(!p.sci());
    }

    proptest! {
        #[test]
        fn survives_anything(steps in soak::steps()) {
            soak::ports(AcpiPm::default(), AcpiPm::PORTS, &steps, |p, _| { p.take_request(); });
        }
    }
}
