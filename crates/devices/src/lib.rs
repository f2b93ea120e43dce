//! The PC's devices as pure register machines.
//!
//! A device is a struct with registers. It knows ports, offsets and virtual time, and neither a CPU,
//! nor host time, nor a thread. [`device`] states the contract of all of them. Interrupt lines and
//! other outputs are polled by the machine after it has touched a device or advanced it; nothing
//! calls back. A device's serde form is its save file.
//!
//! Every clock is derived from [`VirtualTime`](umbra_arch::VirtualTime) by integer division from a
//! fixed origin, never by adding rounded periods, so clocks do not drift against one another.
#![forbid(unsafe_code)]

pub mod acpi_pm;
pub mod async_pf;
mod bytes;
pub mod debug_console;
pub mod debug_exit;
pub mod device;
pub mod fw_cfg;
pub mod hpet;
pub mod i8042;
pub mod interrupt;
pub mod ioapic;
pub mod lapic;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod port92;
pub mod post;
pub mod regmap;
pub mod reset_control;
pub mod rtc;
#[cfg(test)]
mod soak;
pub mod test_device;
pub mod uart;

pub use acpi_pm::{AcpiPm, PowerRequest};
pub use async_pf::{AsyncPf, PageArrivals};
pub use debug_console::DebugConsole;
pub use debug_exit::DebugExit;
pub use device::{Device, MmioDevice, PortDevice};
pub use fw_cfg::{DmaMemory, FwCfg, FwCfgError};
pub use hpet::Hpet;
pub use i8042::I8042;
pub use interrupt::{DeliveryMode, InterruptMessage, Ipi, Shorthand};
pub use ioapic::IoApic;
pub use lapic::{LAPIC_HZ, Lapic, LapicConfig};
pub use pci::{PciBus, PciFunction};
pub use pic::PicPair;
pub use pit::Pit;
pub use port92::Port92;
pub use post::PostPort;
pub use reset_control::ResetControl;
pub use rtc::Rtc;
pub use test_device::TestDevice;
pub use uart::Uart;
