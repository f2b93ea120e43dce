//! Who answers at which port, and what an access takes.

use super::{Pc, Request};
use crate::events::Source;
use umbra_arch::{AccessWidth, VirtualTime};
use umbra_devices::PortDevice;

/// Virtual time of one access to a legacy port, in nanoseconds: an ISA bus cycle. Delay loops of
/// guests (and the timer's calibration) count on about a microsecond.
pub(super) const PORT_NS: u32 = 1000;

/// The device behind a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Owner {
    Pic,
    Pit,
    Keyboard,
    Rtc,
    Com1,
    Port92,
    Post,
    ResetControl,
    Pci,
    AcpiPm,
    DebugExit,
    DebugConsole,
    Test,
    FwCfg,
    Nobody,
}

/// The device that answers an access of `width` at `port`.
#[inline]
pub(super) const fn owner(port: u16, width: AccessWidth) -> Owner {
    match port {
        0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => Owner::Pic,
        0x40..=0x43 | 0x61 => Owner::Pit,
        0x60 | 0x64 => Owner::Keyboard,
        0x70..=0x73 => Owner::Rtc,
        0x80 => Owner::Post,
        0x92 => Owner::Port92,
        0xe0..=0xe7 | 0x2000..=0x200f => Owner::Test,
        0xe9 => Owner::DebugConsole,
        0xf4..=0xf7 => Owner::DebugExit,
        0x3f8..=0x3ff => Owner::Com1,
        0x510 | 0x511 | 0x514..=0x51b => Owner::FwCfg,
        0xb2 | 0xb3 | 0x600..=0x63f => Owner::AcpiPm,
        0xcf9 if matches!(width, AccessWidth::Byte) => Owner::ResetControl,
        0xcf8..=0xcff => Owner::Pci,
        _ => Owner::Nobody,
    }
}

impl Pc {
    fn port_device(&mut self, owner: Owner) -> Option<&mut dyn PortDevice> {
        let devices = &mut self.devices;
        Some(match owner {
            Owner::Pic => &mut devices.pic,
            Owner::Pit => &mut devices.pit,
            Owner::Keyboard => &mut devices.keyboard,
            Owner::Rtc => &mut devices.rtc,
            Owner::Com1 => &mut devices.com1,
            Owner::Port92 => &mut devices.port92,
            Owner::Post => &mut devices.post,
            Owner::ResetControl => &mut devices.reset_control,
            Owner::Pci => &mut devices.pci,
            Owner::AcpiPm => &mut devices.acpi_pm,
            Owner::DebugExit => &mut devices.debug_exit,
            Owner::DebugConsole => &mut devices.debug_console,
            Owner::Test => &mut devices.test,
            Owner::FwCfg => &mut devices.fw_cfg,
            Owner::Nobody => return None,
        })
    }

    pub(super) fn read_port(&mut self, now: VirtualTime, port: u16, width: AccessWidth) -> u32 {
        let owner = owner(port, width);
        let value = match self.port_device(owner) {
            Some(device) => device.port_read(now, port, width),
            None => width.mask() as u32,
        };
        self.settle_port(owner);
        value
    }

    pub(super) fn write_port(&mut self, now: VirtualTime, port: u16, width: AccessWidth, value: u32) {
        if self.measurement_port == Some(port) {
            return self.ask(Request::Mark(value as u8));
        }
        let owner = owner(port, width);
        if let Some(device) = self.port_device(owner) {
            device.port_write(now, port, width, value);
        }
        if owner == Owner::Test {
            self.settle_test_line(port);
        }
        self.settle_port(owner);
    }

    /// Passes on what an access to this device may have changed.
    fn settle_port(&mut self, owner: Owner) {
        match owner {
            Owner::Pic => self.settle_interrupts(),
            Owner::Pit => self.settle(Source::Pit),
            Owner::Keyboard => {
                self.settle(Source::Keyboard);
                self.update_a20();
            }
            Owner::Rtc => self.settle(Source::Rtc),
            Owner::Com1 => self.settle(Source::Com1),
            Owner::AcpiPm => self.settle(Source::AcpiPm),
            Owner::Port92 => {
                self.update_a20();
                if self.devices.port92.take_reset_request() {
                    self.ask(Request::Reset);
                }
            }
            Owner::ResetControl => {
                if self.devices.reset_control.take_reset_request() {
                    self.ask(Request::Reset);
                }
            }
            Owner::DebugExit => {
                if let Some(value) = self.devices.debug_exit.take_exit() {
                    self.ask(Request::DebugExit(value));
                }
            }
            Owner::DebugConsole => {
                let bytes = self.devices.debug_console.take_output();
                self.serial.push_debug(&bytes);
            }
            Owner::Pci | Owner::Post | Owner::Test | Owner::FwCfg | Owner::Nobody => {}
        }
    }

    /// Collects what the serial port sent and looks for the expected string in it. The host gets a line when it ends.
    pub(super) fn collect_serial(&mut self) {
        let bytes = self.devices.com1.take_output();
        self.attention |= bytes.ends_with(b"\n");
        if !bytes.is_empty() && self.serial.push(&bytes) {
            self.ask(Request::Expected);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_devices::*;

    /// The table above agrees with the devices' own lists, and no port has two owners in them.
    #[test]
    fn dispatch_agrees_with_the_devices() {
        let lists: [(Owner, &[u16]); 13] = [
            (Owner::Pic, PicPair::PORTS),
            (Owner::Pit, Pit::PORTS),
            (Owner::Keyboard, I8042::PORTS),
            (Owner::Rtc, Rtc::PORTS),
            (Owner::Port92, Port92::PORTS),
            (Owner::Post, PostPort::PORTS),
            (Owner::ResetControl, ResetControl::PORTS),
            (Owner::Pci, PciBus::PORTS),
            (Owner::AcpiPm, AcpiPm::PORTS),
            (Owner::DebugExit, DebugExit::PORTS),
            (Owner::DebugConsole, DebugConsole::PORTS),
            (Owner::Test, TestDevice::PORTS),
            (Owner::FwCfg, FwCfg::PORTS),
        ];
        for (expected, ports) in lists {
            for &port in ports {
                assert_eq!(owner(port, AccessWidth::Byte), expected, "port {port:#x}");
            }
        }
        for port in Uart::new(uart::COM1_BASE).ports() {
            assert_eq!(owner(port, AccessWidth::Byte), Owner::Com1);
        }
        assert_eq!(owner(0xcf8, AccessWidth::Dword), Owner::Pci);
        assert_eq!(owner(0xcf9, AccessWidth::Word), Owner::Pci);
    }
}
